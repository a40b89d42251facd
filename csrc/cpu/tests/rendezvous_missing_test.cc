// SPDX-License-Identifier: Apache-2.0
// Ranks that do not come, where the others go on without them.
#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <deque>
#include <random>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "csrc/core/notices.h"
#include "csrc/cpu/calls.h"
#include "csrc/cpu/rendezvous/missed_visits.h"
#include "csrc/cpu/rendezvous/rendezvous.h"
#include "csrc/cpu/tests/shift_ranks.h"

namespace jax_ep {
namespace {

using std::chrono::milliseconds;
using Flags = std::vector<uint8_t>;

constexpr milliseconds kSoon{60};
constexpr std::chrono::hours kNever{1};

// A ShiftRank whose token has a row: the rank's number plus 1.
class Visitor {
 public:
  Visitor(int32_t rank, int32_t num_ranks, int32_t shift)
      : ranks_(rank, num_ranks, shift),
        sent_(static_cast<float>(rank + 1)),
        missing(static_cast<size_t>(num_ranks), 7) {}

  Rendezvous::Arrival arrival(const GroupInfoPtr& group, const uint8_t* mask = nullptr) {
    Rendezvous::Arrival result = ranks_.arrival();
    PlanOp plan = std::get<PlanOp>(result.call);
    plan.rank_mask = mask;
    DispatchOp dispatch;
    dispatch.hidden = 1;
    dispatch.x = &sent_;
    dispatch.rows = &received;
    dispatch.missing_ranks = missing.data();
    result.call = plan_dispatch_op(plan, dispatch);
    result.group = group;
    return result;
  }
  [[nodiscard]] bool is_right() const { return ranks_.is_right(); }

 private:
  ShiftRank ranks_;
  float sent_;

 public:
  float received = -1;
  Flags missing;  // as of the visit
};

// One visit of a call site by ranks of a group.
class Visit {
 public:
  explicit Visit(int32_t num_ranks, int32_t shift = 1) : completions(num_ranks) {
    for (int32_t rank = 0; rank < num_ranks; ++rank) ranks.emplace_back(rank, num_ranks, shift);
  }
  void join(Rendezvous& site,
            const GroupInfoPtr& group,
            const std::vector<int32_t>& who,
            const Flags& mask = {}) {
    for (const int32_t rank : who) {
      site.join(ranks[rank].arrival(group, mask.empty() ? nullptr : mask.data()),
                completions[rank].done());
    }
  }
  void expect_ok(const std::vector<int32_t>& who) {
    for (const int32_t rank : who) {
      const Status status = completions[rank].wait();
      EXPECT_TRUE(status.ok()) << status.message();
    }
  }

  std::deque<Visitor> ranks;
  std::vector<Completion> completions;
};

class RendezvousMissingTest : public RendezvousFixture {
 protected:
  // What the log has been told.
  static std::string log() {
    Notices::shared().post(NoticeLevel::kInfo, "the end");
    std::string text;
    for (auto notice = Notices::shared().next(); notice->text != "the end";
         notice = Notices::shared().next()) {
      text += notice->text + "\n";
    }
    return text;
  }
  void SetUp() override { log(); }
};

TEST_F(RendezvousMissingTest, ThoseThatCameGoOnAtTheDeadline) {
  Rendezvous site;
  const GroupInfoPtr group = shift_group(kSoon);
  Visit visit(4);
  visit.join(site, group, {0, 1, 3});
  visit.expect_ok({0, 1, 3});
  const Flags missing = {0, 0, 1, 0};
  for (const int32_t rank : {0, 1, 3}) EXPECT_EQ(visit.ranks[rank].missing, missing);
  EXPECT_TRUE(visit.ranks[0].is_right());  // 3 -> 0 -> 1
  EXPECT_EQ(visit.ranks[0].received, 4);
  EXPECT_EQ(visit.ranks[1].received, 1);
  EXPECT_EQ(visit.ranks[3].received, 0);  // of 2
  EXPECT_FALSE(visit.ranks[1].is_right());
}

TEST_F(RendezvousMissingTest, ALateRankRunsAloneAtOnceAndMeetsTheOthersAtTheNextVisit) {
  Rendezvous site;
  const GroupInfoPtr group = shift_group(kSoon);
  Visit first(4, 0);  // each to itself
  first.join(site, group, {0, 1, 3});
  first.expect_ok({0, 1, 3});
  Visit second(4, 1);
  second.join(site, shift_group(), {0, 1, 3});
  first.join(site, group, {2});
  EXPECT_TRUE(first.completions[2].is_ready());
  first.expect_ok({2});
  const Flags missing = {1, 1, 0, 1};
  EXPECT_EQ(first.ranks[2].missing, missing);
  EXPECT_EQ(first.ranks[2].received, 3);  // what it has itself
  second.join(site, group, {2});
  second.expect_ok({0, 1, 2, 3});
  for (const Visitor& rank : second.ranks) {
    EXPECT_TRUE(rank.is_right());
    EXPECT_EQ(rank.missing, Flags(4, 0));
  }
}

TEST_F(RendezvousMissingTest, NobodyWaitsForARankThatIsGivenUp) {
  Rendezvous site;
  const GroupInfoPtr group = shift_group(kNever);
  Visit visit(4);
  visit.join(site, group, {0, 1, 3});
  group->given_up->add(1, std::vector<int32_t>{2});  // of another EP group
  group->given_up->add(0, std::vector<int32_t>{1});  // has come
  Rendezvous::end_waits(group->id);
  EXPECT_EQ(Rendezvous::num_pending(), 1);
  group->given_up->add(0, std::vector<int32_t>{2});
  Rendezvous::end_waits(group->id);
  visit.expect_ok({0, 1, 3});
  const Flags missing = {0, 0, 1, 0};
  EXPECT_EQ(visit.ranks[0].missing, missing);
  // From now on the last of the others ends it; but a given-up rank that comes is met.
  Visit without(4);
  without.join(site, group, {3, 1, 0});
  without.expect_ok({0, 1, 3});
  EXPECT_EQ(without.ranks[3].missing, missing);
  visit.join(site, group, {2});
  without.join(site, group, {2});
  Visit with(4);
  with.join(site, group, {2, 1, 0, 3});
  with.expect_ok({0, 1, 2, 3});
  for (const Visitor& rank : with.ranks) EXPECT_TRUE(rank.is_right());
}

TEST_F(RendezvousMissingTest, ARankMayBeBehindByManyVisits) {
  Rendezvous site;
  const GroupInfoPtr group = shift_group(kNever);
  group->given_up->add(0, std::vector<int32_t>{2});
  std::deque<Visit> visits;
  for (int32_t i = 0; i < 300; ++i) {
    visits.emplace_back(4, i % 4);
    visits.back().join(site, group, {0, 1, 3});
    visits.back().expect_ok({0, 1, 3});
  }
  for (Visit& visit : visits) {
    visit.join(site, group, {2});
    visit.expect_ok({2});
    EXPECT_EQ(visit.ranks[2].missing, (Flags{1, 1, 0, 1}));
  }
  Visit last(4, 3);
  last.join(site, group, {2});
  EXPECT_FALSE(last.completions[2].is_ready());
  last.join(site, group, {0, 1, 3});
  last.expect_ok({0, 1, 2, 3});
  for (const Visitor& rank : last.ranks) EXPECT_TRUE(rank.is_right());
}

TEST_F(RendezvousMissingTest, RanksThatAreLeftOutAreNotMissing) {
  Rendezvous site;
  const GroupInfoPtr group = shift_group(kSoon);
  const Flags mask = {1, 0, 1, 1, 1};
  Visit visit(5);
  visit.join(site, group, {0, 1, 3}, mask);
  visit.expect_ok({0, 1, 3});
  const Flags missing = {0, 0, 1, 0, 1};
  EXPECT_EQ(visit.ranks[0].missing, missing);
  EXPECT_EQ(visit.ranks[3].missing, missing);
  EXPECT_EQ(visit.ranks[1].missing, Flags(5, 0));  // waits for nobody
  // The visit that rank 4 has missed is of that mask.
  Visit all(5);
  all.join(site, shift_group(), {4});
  EXPECT_FALSE(all.completions[4].is_ready());
  all.join(site, shift_group(), {0, 1, 2, 3});
  all.expect_ok({0, 1, 2, 3, 4});
  visit.join(site, group, {4}, mask);
  EXPECT_TRUE(visit.completions[4].is_ready());
  EXPECT_EQ(visit.ranks[4].missing, (Flags{1, 0, 1, 1, 0}));
}

TEST_F(RendezvousMissingTest, TheLogSaysWhoGoesOnWithoutWhom) {
  Rendezvous site;
  Visit visit(3);
  visit.join(site, shift_group(kSoon), {2, 0});
  visit.expect_ok({0, 2});
  const std::string text = log();
  EXPECT_NE(text.find("rank(s) 1 of 3 did not reach this plan_dispatch within 0.06 s: rank(s) 0,2 "
                      "go on without"),
            std::string::npos)
      << text;
}

TEST_F(RendezvousMissingTest, AnErrorOfThoseThatCameIsTheirs) {
  Rendezvous site;
  const GroupInfoPtr group = shift_group(kSoon);
  Visit visit(3, 0);
  Rendezvous::Arrival other = visit.ranks[0].arrival(group);
  std::get<PlanDispatchOp>(other.call).dispatch.hidden = 2;
  site.join(std::move(other), visit.completions[0].done());
  visit.join(site, group, {1});
  for (const int32_t rank : {0, 1}) {
    EXPECT_EQ(visit.completions[rank].wait().code(), StatusCode::kInvalidArgument);
  }
}

// Each rank on its own thread, sometimes later than the deadline: whoever met agrees who did, and
// got the rows of that visit.
TEST_F(RendezvousMissingTest, WhoMetAgreesWhoDid) {
  constexpr int32_t kRanks = 5;
  constexpr int32_t kVisits = 60;
  Rendezvous site;
  const GroupInfoPtr group = shift_group(milliseconds(4));
  std::deque<Visit> visits;
  for (int32_t i = 0; i < kVisits; ++i) visits.emplace_back(kRanks, i % kRanks);
  std::vector<std::thread> threads;
  for (int32_t rank = 0; rank < kRanks; ++rank) {
    threads.emplace_back([&, rank] {
      std::minstd_rand random(static_cast<uint32_t>(rank) + 1);
      for (Visit& visit : visits) {
        if (random() % 8 == 0) std::this_thread::sleep_for(milliseconds(random() % 8));
        visit.join(site, group, {rank});
        EXPECT_TRUE(visit.completions[rank].wait().ok());
        if (rank == 3 && &visit == &visits[kVisits / 2]) {
          group->given_up->add(0, std::vector<int32_t>{4});
          Rendezvous::end_waits(group->id);
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int32_t i = 0; i < kVisits; ++i) {
    const std::deque<Visitor>& ranks = visits[static_cast<size_t>(i)].ranks;
    for (int32_t rank = 0; rank < kRanks; ++rank) {
      const Flags& missing = ranks[rank].missing;
      EXPECT_EQ(missing[rank], 0);
      for (int32_t other = 0; other < kRanks; ++other) {
        if (missing[other] != 0) continue;
        EXPECT_EQ(ranks[other].missing, missing);
      }
      const int32_t source = (rank + kRanks - i % kRanks) % kRanks;
      EXPECT_EQ(ranks[rank].received, missing[source] ? 0.0F : static_cast<float>(source + 1));
    }
  }
}

TEST(MissedVisits, AreOfARunAMaskAndARank) {
  MissedVisits visits;
  const Flags some = {1, 1, 0};
  const RankSet all;
  const RankSet mask(some.data(), 3);
  visits.add({1, 0}, all, std::vector<int32_t>{2, 1});
  visits.add({1, 0}, all, std::vector<int32_t>{2});
  visits.add({1, 0}, mask, std::vector<int32_t>{1});
  EXPECT_FALSE(visits.take({1, 0}, all, 0));
  EXPECT_FALSE(visits.take({1, 1}, all, 2));
  EXPECT_FALSE(visits.take({2, 0}, all, 2));
  EXPECT_FALSE(visits.take({1, 0}, mask, 2));
  EXPECT_TRUE(visits.take({1, 0}, all, 2));
  EXPECT_TRUE(visits.take({1, 0}, all, 2));
  EXPECT_FALSE(visits.take({1, 0}, all, 2));
  EXPECT_TRUE(visits.take({1, 0}, mask, 1));
  EXPECT_TRUE(visits.take({1, 0}, all, 1));
  EXPECT_FALSE(visits.take({1, 0}, all, 1));
}

TEST(MissedVisits, OfRunsLongAgoAreForgotten) {
  MissedVisits visits;
  const std::vector<int32_t> rank = {0};
  for (int64_t run = 0; run <= 1024; ++run) visits.add({run, 0}, RankSet(), rank);
  EXPECT_FALSE(visits.take({0, 0}, RankSet(), 0));
  EXPECT_TRUE(visits.take({1, 0}, RankSet(), 0));
  EXPECT_TRUE(visits.take({1024, 0}, RankSet(), 0));
}

// However many EP groups a mesh has.
TEST(MissedVisits, OfAllGroupsOfARunAreKept) {
  MissedVisits visits;
  const std::vector<int32_t> rank = {0};
  for (int32_t group = 0; group < 2000; ++group) visits.add({1, group}, RankSet(), rank);
  for (int32_t group = 0; group < 2000; ++group) {
    EXPECT_TRUE(visits.take({1, group}, RankSet(), 0)) << group;
  }
}

}  // namespace
}  // namespace jax_ep
