// SPDX-License-Identifier: Apache-2.0
// What the log is told of ranks that are late or fail, before anybody reads a result.
#include <gtest/gtest.h>

#include <chrono>
#include <deque>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/core/notices.h"
#include "csrc/cpu/rendezvous/rendezvous.h"
#include "csrc/cpu/rendezvous/waits.h"
#include "csrc/cpu/tests/shift_ranks.h"

namespace jax_ep {
namespace {

using std::chrono::milliseconds;

class RendezvousWarnings : public RendezvousFixture {
 protected:
  Completion& join(Rendezvous& site, Rendezvous::Arrival arrival) {
    Completion& completion = completions_.emplace_back();
    site.join(std::move(arrival), completion.done());
    return completion;
  }
  Completion& join(Rendezvous& site, ShiftRank& rank, const GroupInfoPtr& group) {
    Rendezvous::Arrival arrival = rank.arrival();
    arrival.group = group;
    return join(site, std::move(arrival));
  }
  // The next notice; its text has the seconds that were waited replaced by "S", because a busy
  // machine warns late.
  static Notice next_notice() {
    Notice notice = *Notices::shared().next();
    for (const std::string before : {"have waited ", "came after "}) {
      const size_t at = notice.text.find(before);
      if (at == std::string::npos) continue;
      const size_t from = at + before.size();
      notice.text.replace(from, notice.text.find(" s", from) - from, "S");
    }
    return notice;
  }
  static void expect_notice(NoticeLevel level, const std::string& text) {
    const Notice notice = next_notice();
    EXPECT_EQ(notice.level, level);
    EXPECT_EQ(notice.text, text);
  }

  std::deque<Completion> completions_;
};

const char* const kRank2Late =
    "EpGroup 3 (axis 'expert'), group_index 0, plan: rank(s) 0,1 of 3 have waited S s for rank(s) "
    "2; rank 2 (device 2) is in no operation of an EP group: its program failed, is busy "
    "elsewhere, or runs something else. Giving up after 120 s";

TEST_F(RendezvousWarnings, ALateRankIsNamedAgainAndAgainUntilItComes) {
  Rendezvous site;
  std::deque<ShiftRank> all = ranks(3);
  const GroupInfoPtr group = shift_group(std::chrono::seconds(120), milliseconds(40));
  const auto start = std::chrono::steady_clock::now();
  join(site, all[0], group);
  join(site, all[1], group);
  for (int i = 0; i < 3; ++i) expect_notice(NoticeLevel::kWarning, kRank2Late);
  // After 40, 80 and 160 ms.
  EXPECT_GE(std::chrono::steady_clock::now() - start, milliseconds(160));
  join(site, all[2], group);
  for (Completion& completion : completions_) EXPECT_TRUE(completion.wait().ok());
  expect_notice(NoticeLevel::kInfo,
                "EpGroup 3 (axis 'expert'), group_index 0, plan: rank(s) 2 came after S s");
}

TEST_F(RendezvousWarnings, RanksInTimeAreNotMentioned) {
  Rendezvous site;
  std::deque<ShiftRank> all = ranks(3);
  for (ShiftRank& rank : all) join(site, rank.arrival());
  for (Completion& completion : completions_) EXPECT_TRUE(completion.wait().ok());
  Notices::shared().post(NoticeLevel::kInfo, "nothing before this");
  expect_notice(NoticeLevel::kInfo, "nothing before this");
}

TEST_F(RendezvousWarnings, WhatFailsIsPostedOnceForAllRanks) {
  Rendezvous site;
  std::deque<ShiftRank> all = ranks(2);
  const int32_t bad = 17;
  for (int32_t rank = 0; rank < 2; ++rank) {
    Rendezvous::Arrival arrival = all[rank].arrival();
    if (rank == 1) std::get<PlanOp>(arrival.call).topk_idx = &bad;
    join(site, std::move(arrival));
  }
  for (Completion& completion : completions_) {
    EXPECT_EQ(completion.wait().code(), StatusCode::kInvalidArgument);
  }
  expect_notice(NoticeLevel::kError,
                "EpGroup 3 (axis 'expert'), group_index 0, plan: rank 1: topk_idx[0, 0] is 17, but "
                "must be -1 (no selection) or an expert in [0, 2)");
  join(site, all[0], shift_group(milliseconds(20), milliseconds(10)));
  const Status late = completions_.back().wait();
  // On a busy machine the deadline may come before a warning.
  Notice notice = next_notice();
  while (notice.level == NoticeLevel::kWarning) notice = next_notice();
  EXPECT_EQ(notice.level, NoticeLevel::kError);
  EXPECT_EQ(notice.text, late.message());
  Notices::shared().post(NoticeLevel::kInfo, "nothing before this");
  expect_notice(NoticeLevel::kInfo, "nothing before this");
}

TEST_F(RendezvousWarnings, ARefusedRankFailsTheOthersAtOnce) {
  Rendezvous site;
  std::deque<ShiftRank> all = ranks(3);
  join(site, all[0].arrival());
  Rendezvous::Arrival refused = all[1].arrival();
  refused.refusal = {StatusCode::kFailedPrecondition, "rank 1 is elsewhere"};
  join(site, std::move(refused));
  join(site, all[2].arrival());
  for (Completion& completion : completions_) {
    const Status status = completion.wait();
    EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
    EXPECT_EQ(status.message(),
              "EpGroup 3 (axis 'expert'), group_index 0, plan: rank 1 is elsewhere");
  }
  (void)Notices::shared().next();
}

TEST_F(RendezvousWarnings, ClosingAGroupFailsItsOpenMeetingsEverywhere) {
  Rendezvous site;
  Rendezvous other_site;
  std::deque<ShiftRank> all = ranks(2);
  std::deque<ShiftRank> more = ranks(2);
  std::deque<ShiftRank> others = ranks(2);
  GroupInfo info = *shift_group();
  info.id = 4;
  const auto other_group = std::make_shared<const GroupInfo>(info);
  join(site, all[0].arrival());
  join(other_site, more[1].arrival());
  Completion& of_other_group = join(site, others[0], other_group);
  Rendezvous::close_group(3);
  for (size_t i = 0; i < 2; ++i) {
    const Status status = completions_[i].wait();
    EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
    EXPECT_NE(status.message().find("the group was closed while rank(s) "), std::string::npos)
        << status.message();
    EXPECT_EQ(Notices::shared().next()->level, NoticeLevel::kError);
  }
  EXPECT_FALSE(of_other_group.is_ready());
  Rendezvous::close_group(4);
  EXPECT_FALSE(of_other_group.wait().ok());
  (void)Notices::shared().next();
}

TEST_F(RendezvousWarnings, WaitsSayWhoWaitsForWhom) {
  Rendezvous site;
  std::deque<ShiftRank> all = ranks(3);
  EXPECT_TRUE(Rendezvous::waits().empty());
  join(site, all[2].arrival(1, 4));
  const std::vector<Wait> waits = Rendezvous::waits();
  ASSERT_EQ(waits.size(), 1U);
  EXPECT_EQ(waits[0].group->id, 3);
  EXPECT_EQ(waits[0].group_index, 4);
  EXPECT_EQ(waits[0].op, "plan");
  ASSERT_EQ(waits[0].waiting.size(), 1U);
  EXPECT_EQ(waits[0].waiting[0].device, device_of_shift_rank(4, 2));
  ASSERT_EQ(waits[0].missing.size(), 2U);
  EXPECT_EQ(waits[0].missing[1].rank, 1);
  EXPECT_EQ(waits[0].missing[1].device, device_of_shift_rank(4, 1));
  join(site, all[0].arrival(1, 4));
  join(site, all[1].arrival(1, 4));
  EXPECT_TRUE(Rendezvous::waits().empty());
  for (Completion& completion : completions_) EXPECT_TRUE(completion.wait().ok());
}

// --- root causes -------------------------------------------------------------------------------

GroupInfoPtr named(int64_t id, const std::string& name) {
  return std::make_shared<const GroupInfo>(GroupInfo{.id = id, .name = name, .places = {}});
}

TEST(RootCause, IsTheRankThatWaitsForNobody) {
  const GroupInfoPtr a = named(1, "EpGroup 1");
  const GroupInfoPtr b = named(2, "EpGroup 2");
  const std::vector<Wait> all = {
      {.group = a, .op = "plan", .since = {}, .waiting = {{0, 0}, {1, 1}}, .missing = {{2, 2}}},
      {.group = b, .op = "combine", .since = {}, .waiting = {{0, 2}}, .missing = {{3, 5}}},
  };
  EXPECT_EQ(root_cause(all[0], all),
            "rank 2 (device 2) waits elsewhere: rank(s) 0 wait in combine of EpGroup 2 for rank(s) "
            "3; rank 3 (device 5) is in no operation of an EP group: its program failed, is busy "
            "elsewhere, or runs something else");
}

TEST(RootCause, MayBeACircle) {
  const GroupInfoPtr a = named(1, "EpGroup 1");
  const std::vector<Wait> all = {
      {.group = a, .op = "plan", .since = {}, .waiting = {{0, 0}}, .missing = {{1, 1}}},
      {.group = a, .op = "dispatch", .since = {}, .waiting = {{1, 1}}, .missing = {{0, 0}}},
  };
  EXPECT_EQ(root_cause(all[0], all),
            "rank 1 (device 1) waits elsewhere: rank(s) 1 wait in dispatch for rank(s) 0; rank 0 "
            "(device 0) waits elsewhere: rank(s) 0 wait in plan for rank(s) 1; they wait for one "
            "another: the ranks run different operations, or the same ones in another order");
}

}  // namespace
}  // namespace jax_ep
