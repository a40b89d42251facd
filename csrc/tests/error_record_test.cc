// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/error_record.h"

#include <gtest/gtest.h>

namespace jax_ep {
namespace {

ErrorRecord record(WaitTag tag, OpKind op) {
  return {.written = 1,
          .tag = static_cast<uint32_t>(tag),
          .op = static_cast<uint32_t>(op),
          .rank = 2,
          .peer = 5,
          .expected = tag == WaitTag::kArrived ? arrival_flag(7, OpKind::kPlan) : 7U,
          .seen = tag == WaitTag::kArrived ? arrival_flag(6, OpKind::kCombine) : 6U,
          .chunk = 3};
}

TEST(ErrorRecord, SaysWhichRowsDidNotCome) {
  EXPECT_EQ(describe(record(WaitTag::kArrived, OpKind::kDispatch), 60),
            "rank 2 waited 60 s in dispatch for the rows of rank 5 (chunk 3): expected epoch 7, "
            "saw 6; is rank 5 alive, and does it run the same operations in the same order?");
}

TEST(ErrorRecord, SaysWhoseRoutingDidNotCome) {
  EXPECT_EQ(describe(record(WaitTag::kArrived, OpKind::kPlan), 0.5),
            "rank 2 waited 0.5 s in plan for the routing of rank 5: expected epoch 7, saw 6; is "
            "rank 5 alive, and does it run the same operations in the same order?");
}

TEST(ErrorRecord, SaysWhoHasNotReadItsRows) {
  EXPECT_EQ(describe(record(WaitTag::kAcknowledged, OpKind::kCombine), 60),
            "rank 2 waited 60 s in combine for rank 5 to have read the rows of the exchange "
            "before: expected epoch 7, saw 6; is rank 5 alive, and does it run the same operations "
            "in the same order?");
}

TEST(ErrorRecord, SaysThatBlocksDoNotRunTogether) {
  EXPECT_EQ(
      describe(record(WaitTag::kGridBarrier, OpKind::kPlan), 60),
      "rank 2 waited 120 s in plan for the other blocks of its own kernel: expected generation 7, "
      "saw 6; do all of them fit on the device beside what else runs on it? (lower num_sms)");
}

TEST(ErrorRecord, SaysThatTheProgramRunsElsewhere) {
  EXPECT_EQ(describe(record(WaitTag::kWrongRank, OpKind::kPlan), 60),
            "the program runs plan as rank 5 on a device that is rank 2 of its EpGroup; run it on "
            "the mesh that the group was made for");
}

TEST(ErrorRecord, SaysWhichOperationsMet) {
  ErrorRecord wrong = record(WaitTag::kWrongOp, OpKind::kDispatch);
  wrong.expected = arrival_flag(7, OpKind::kDispatch);
  wrong.seen = arrival_flag(7, OpKind::kCombine);
  EXPECT_EQ(describe(wrong, 60),
            "ranks disagree: exchange 7 is dispatch on rank 2 and exchange 7 is combine on rank 5; "
            "all ranks must run the same operations in the same order");
}

TEST(ErrorRecord, SurvivesWhatItDoesNotKnow) {
  EXPECT_EQ(describe(record(static_cast<WaitTag>(99), static_cast<OpKind>(77)), 60),
            "rank 2 waited 60 s in an unknown operation for an unknown event (tag 99) of rank 5: "
            "expected epoch 7, saw 6; is rank 5 alive, and does it run the same operations in the "
            "same order?");
}

}  // namespace
}  // namespace jax_ep
