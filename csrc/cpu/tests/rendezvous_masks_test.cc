// SPDX-License-Identifier: Apache-2.0
// Ranks that take no part: who meets whom, and who is told what.
#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <deque>
#include <string>
#include <variant>
#include <vector>

#include "csrc/cpu/calls.h"
#include "csrc/cpu/rendezvous/rank_set.h"
#include "csrc/cpu/rendezvous/rendezvous.h"
#include "csrc/cpu/tests/shift_ranks.h"

namespace jax_ep {
namespace {

using Mask = std::vector<uint8_t>;

class RendezvousMasksTest : public RendezvousFixture {
 protected:
  static Rendezvous::Arrival arrival(ShiftRank& rank, const Mask& mask) {
    Rendezvous::Arrival result = rank.arrival();
    std::get<PlanOp>(result.call).rank_mask = mask.data();
    return result;
  }
};

TEST(RankSet, AllRanksAreAllRanksHoweverTheyAreSaid) {
  const Mask all = {1, 1, 1};
  EXPECT_EQ(RankSet(all.data(), 3), RankSet(nullptr, 3));
  const Mask some = {1, 0, 1};
  const RankSet set(some.data(), 3);
  EXPECT_EQ(set.count(3), 2);
  EXPECT_TRUE(set.has(0) && !set.has(1) && set.has(2));
  EXPECT_EQ(set.text(3), "[1, 0, 1]");
  EXPECT_EQ(RankSet::only(2, 3).text(3), "[0, 0, 1]");
}

TEST_F(RendezvousMasksTest, ARankThatIsLeftOutIsDoneAtOnceAndTheOthersDoNotWaitForIt) {
  Rendezvous site;
  std::deque<ShiftRank> all = ranks(4, 2);  // 0 <-> 2, 1 <-> 3
  const Mask mask = {1, 0, 1, 1};
  std::array<Completion, 4> completions;
  site.join(arrival(all[1], mask), completions[1].done());
  EXPECT_TRUE(completions[1].is_ready());
  EXPECT_EQ(Rendezvous::num_pending(), 0);
  for (const int32_t rank : {3, 0, 2}) {
    site.join(arrival(all[rank], mask), completions[rank].done());
  }
  for (Completion& completion : completions) EXPECT_TRUE(completion.wait().ok());
  EXPECT_TRUE(all[0].is_right());
  EXPECT_TRUE(all[2].is_right());
  EXPECT_FALSE(all[3].is_right());  // its token has no rank to go to
}

TEST_F(RendezvousMasksTest, ARankThatComesBackDoesNotMeetVisitsThatItSatOut) {
  Rendezvous site;
  std::deque<ShiftRank> first = ranks(3, 0);
  std::deque<ShiftRank> second = ranks(3, 1);
  const Mask without = {1, 1, 0};
  const Mask with = {1, 1, 1};
  std::array<Completion, 3> before;
  std::array<Completion, 3> after;
  site.join(arrival(first[2], without), before[2].done());
  site.join(arrival(second[2], with), after[2].done());  // is ahead of the others
  for (const int32_t rank : {0, 1}) site.join(arrival(first[rank], without), before[rank].done());
  for (const int32_t rank : {0, 1}) site.join(arrival(second[rank], with), after[rank].done());
  for (Completion& completion : before) EXPECT_TRUE(completion.wait().ok());
  for (Completion& completion : after) EXPECT_TRUE(completion.wait().ok());
  for (const int32_t rank : {0, 1}) EXPECT_TRUE(first[rank].is_right());
  for (const ShiftRank& rank : second) EXPECT_TRUE(rank.is_right());
}

TEST_F(RendezvousMasksTest, RanksThatWaitForEachOtherUnderDifferentMasksAreTold) {
  Rendezvous site;
  std::deque<ShiftRank> all = ranks(4);
  const Mask everybody = {1, 1, 1, 1};
  const Mask without = {1, 1, 0, 1};
  std::array<Completion, 3> completions;
  site.join(arrival(all[0], everybody), completions[0].done());
  site.join(arrival(all[2], everybody), completions[1].done());
  EXPECT_EQ(Rendezvous::num_pending(), 1);
  site.join(arrival(all[3], without), completions[2].done());
  const std::string text =
      "ranks disagree: rank_mask is [1, 1, 1, 1] on ranks 0,2 and [1, 1, 0, 1] on rank 3";
  for (Completion& completion : completions) {
    const Status status = completion.wait();
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find(text), std::string::npos) << status.message();
  }
  // Who comes later is told, too.
  Completion late;
  site.join(arrival(all[1], without), late.done());
  EXPECT_EQ(late.wait().code(), StatusCode::kInvalidArgument);
}

TEST_F(RendezvousMasksTest, MissingRanksAreOnesThatTakePart) {
  Rendezvous site;
  std::deque<ShiftRank> all = ranks(5);
  const Mask mask = {1, 0, 1, 1, 1};
  const GroupInfoPtr group = shift_group(std::chrono::milliseconds(50));
  std::array<Completion, 2> completions;
  for (const int32_t rank : {0, 3}) {
    Rendezvous::Arrival here = arrival(all[rank], mask);
    here.group = group;
    site.join(std::move(here), completions[rank == 0 ? 0 : 1].done());
  }
  for (Completion& completion : completions) {
    const Status status = completion.wait();
    EXPECT_EQ(status.code(), StatusCode::kDeadlineExceeded);
    EXPECT_NE(status.message().find("rank(s) 2,4 of 5 did not reach"), std::string::npos)
        << status.message();
  }
}

TEST_F(RendezvousMasksTest, ARankOfAClosedGroupIsToldThoughItMeetsNobody) {
  Rendezvous site;
  std::deque<ShiftRank> all = ranks(2);
  const Mask mask = {1, 0};
  Rendezvous::Arrival here = arrival(all[1], mask);
  here.group->closed->store(true);
  Completion completion;
  site.join(std::move(here), completion.done());
  EXPECT_EQ(completion.wait().code(), StatusCode::kFailedPrecondition);
}

TEST(ExecuteAlone, NothingIsSelectedWhateverTheRoutingSays) {
  ShiftRank rank(1, 3, 0);
  ASSERT_TRUE(execute_alone(1, rank.arrival().call, WorkerPool::shared()).ok());
  EXPECT_FALSE(rank.is_right());  // its own token would be in row 0
}

}  // namespace
}  // namespace jax_ep
