// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/error_record.h"

#include <gtest/gtest.h>

#include <optional>

#include "csrc/core/work_partition.h"

namespace jax_ep {
namespace {

ErrorRecord record(WaitTag tag, OpKind op) {
  return {.written = 1,
          .tag = static_cast<uint32_t>(tag),
          .op = static_cast<uint32_t>(op),
          .rank = 2,
          .peer = 5,
          .expected = 7,
          .seen = 6,
          .chunk = 3,
          .other_op = static_cast<uint32_t>(OpKind::kCombine),
          .detail = 0};
}

TEST(ErrorRecord, SaysWhichRowsDidNotCome) {
  EXPECT_EQ(describe(record(WaitTag::kArrived, OpKind::kDispatch), 60),
            "rank 2 waited 60 s in dispatch for the rows of rank 5 (chunk 3): expected exchange 7, "
            "saw 6; is rank 5 alive, and does it run the same operations in the same order?");
}

TEST(ErrorRecord, SaysWhoseRoutingDidNotCome) {
  EXPECT_EQ(describe(record(WaitTag::kArrived, OpKind::kPlan), 0.5),
            "rank 2 waited 0.5 s in plan for the routing of rank 5: expected exchange 7, saw 6; is "
            "rank 5 alive, and does it run the same operations in the same order?");
}

TEST(ErrorRecord, SaysWhatOfAPlanAndItsDispatchDidNotCome) {
  ErrorRecord both = record(WaitTag::kArrived, OpKind::kPlanDispatch);
  EXPECT_EQ(describe(both, 60),
            "rank 2 waited 60 s in plan_dispatch for the routing of rank 5: expected exchange 7, "
            "saw 6; is rank 5 alive, and does it run the same operations in the same order?");
  both.chunk = kRowFlags + 3;
  EXPECT_EQ(describe(both, 60),
            "rank 2 waited 60 s in plan_dispatch for the rows of rank 5 (chunk 3): expected "
            "exchange 7, saw 6; is rank 5 alive, and does it run the same operations in the same "
            "order?");
  EXPECT_EQ(awaited_text(WaitTag::kArrived, both.op, 5), "the routing or the rows of rank 5");
}

TEST(ErrorRecord, SaysWhoDidNotComeOverTheNetwork) {
  EXPECT_EQ(describe(record(WaitTag::kDelivered, OpKind::kDispatch), 60),
            "rank 2 waited 60 s in dispatch for a message of rank 5 over the network (chunk 3): "
            "expected message 7, saw 6; is rank 5 alive, and does it run the same operations in "
            "the same order?");
  // Who may in turn wait for the network is given more time.
  EXPECT_EQ(describe(record(WaitTag::kGathered, OpKind::kCombine), 60),
            "rank 2 waited 105 s in combine for the sums of rank 5 (chunk 3): expected message 7, "
            "saw 6; is rank 5 alive, and does it run the same operations in the same order?");
  const auto op = static_cast<uint32_t>(OpKind::kPlan);
  EXPECT_EQ(awaited_text(WaitTag::kCredit, op, 5),
            "rank 5 to have read a message over the network");
  EXPECT_EQ(awaited_text(WaitTag::kRelayed, op, 5), "rank 5 to hand on a message from the network");
}

TEST(ErrorRecord, SaysThatThePlanWasNotMade) {
  EXPECT_EQ(describe(record(WaitTag::kPlanned, OpKind::kPlanDispatch), 60),
            "rank 2 waited 120 s in plan_dispatch for the other blocks of its own kernel to have "
            "made the plan; do all of them fit on the device beside what else runs on it? (lower "
            "max_num_sms)");
}

TEST(ErrorRecord, SaysWhoHasNotReadItsRows) {
  EXPECT_EQ(describe(record(WaitTag::kAcknowledged, OpKind::kCombine), 60),
            "rank 2 waited 60 s in combine for rank 5 to have read the rows of an exchange "
            "before: expected exchange 7, saw 6; is rank 5 alive, and does it run the same "
            "operations in the same order?");
}

TEST(ErrorRecord, SaysThatBlocksDoNotRunTogether) {
  EXPECT_EQ(
      describe(record(WaitTag::kGridBarrier, OpKind::kPlan), 60),
      "rank 2 waited 120 s in plan for the other blocks of its own kernel: expected generation 7, "
      "saw 6; do all of them fit on the device beside what else runs on it? (lower max_num_sms)");
}

TEST(ErrorRecord, SaysThatTheProgramRunsElsewhere) {
  EXPECT_EQ(describe(record(WaitTag::kWrongRank, OpKind::kPlan), 60),
            "the program runs plan as rank 5 on a device that is rank 2 of its EpGroup; run it on "
            "the mesh that the group was made for");
}

TEST(ErrorRecord, SaysWhichOperationsMet) {
  EXPECT_EQ(describe(record(WaitTag::kWrongOp, OpKind::kDispatch), 60),
            "ranks disagree: exchange 7 is dispatch on rank 2 and combine on rank 5; all ranks "
            "must run the same operations in the same order");
}

TEST(ErrorRecord, SaysWhatOfTwoCallsDiffers) {
  ErrorRecord wrong = record(WaitTag::kWrongCall, OpKind::kDispatch);
  wrong.detail = 1U << static_cast<uint32_t>(CallPart::kTokens) |
                 1U << static_cast<uint32_t>(CallPart::kCallSite);
  EXPECT_EQ(describe(wrong, 60),
            "ranks disagree: exchange 7 is one dispatch on rank 2 and another dispatch on rank 5; "
            "they differ in the number of tokens and the call site (the layer); all "
            "ranks must run the same operations in the same order");
}

TEST(ErrorRecord, SaysWhichOperationsOverlapped) {
  EXPECT_EQ(describe(record(WaitTag::kOverlap, OpKind::kDispatch), 60),
            "two operations of the EpGroup ran on rank 2 at the same time: dispatch and combine; a "
            "rank runs one at a time: all on one stream, and no concurrent command buffers");
}

TEST(ErrorRecord, NamesAFlightThatIsNotOpen) {
  ErrorRecord stale = record(WaitTag::kStaleFlight, OpKind::kCombine);
  stale.expected = 12;
  stale.seen = 14;
  EXPECT_EQ(
      describe(stale, 60),
      "the second half of a combine of rank 2 got the flight of exchange 12, which is not open: "
      "it has been received before, 4 others have begun since, or it is of another EpGroup or "
      "operation (exchange 14 was begun last); a flight is used once");
}

TEST(ErrorRecord, SaysThatTheGroupWasClosed) {
  ErrorRecord closed = record(WaitTag::kClosed, OpKind::kDispatch);
  EXPECT_EQ(describe(closed, 60),
            "dispatch of rank 2 was called after the EpGroup had been closed: its results are NaN, "
            "or -1; a compiled function may be called only while the group that it was traced with "
            "is open");
  closed.detail = kClosedInAWait;
  EXPECT_EQ(describe(closed, 60),
            "the EpGroup was closed while rank 2 waited in dispatch for rank 5; close it when no "
            "thread launches programs with it");
}

TEST(ErrorRecord, SaysWhoGaveUpFirst) {
  ErrorRecord told = record(WaitTag::kPeerGaveUp, OpKind::kDispatch);
  told.detail = pack(Aborted{.by = 5,
                             .blamed = 3,
                             .tag = static_cast<uint32_t>(WaitTag::kArrived),
                             .op = static_cast<uint32_t>(OpKind::kPlan)});
  EXPECT_EQ(describe(told, 60),
            "rank 2 ended its dispatch because rank 5 gave up in plan, waiting for the routing of "
            "rank 3; look at the log of rank 5, and at rank 3");
  // A process that ends because its kernel is stuck says so for it.
  told.detail = pack(Aborted{.by = 5,
                             .blamed = 3,
                             .tag = static_cast<uint32_t>(WaitTag::kInTransport),
                             .op = static_cast<uint32_t>(OpKind::kCombine)});
  EXPECT_EQ(describe(told, 60),
            "rank 2 ended its dispatch because rank 5 gave up in combine, waiting for NVSHMEM, "
            "which sends to rank 3; look at the log of rank 5, and at rank 3");
}

TEST(ErrorRecord, KnowsWhatPeersAreToldOfIt) {
  const std::optional<Aborted> own = aborted_of(record(WaitTag::kDelivered, OpKind::kCombine));
  ASSERT_TRUE(own.has_value());
  EXPECT_EQ(own->by, 2U);
  EXPECT_EQ(own->blamed, 5U);
  EXPECT_EQ(own->tag, static_cast<uint32_t>(WaitTag::kDelivered));
  EXPECT_EQ(own->op, static_cast<uint32_t>(OpKind::kCombine));
  // Who was told passes on what it was told.
  ErrorRecord told = record(WaitTag::kPeerGaveUp, OpKind::kDispatch);
  told.detail = pack(*own);
  ASSERT_TRUE(aborted_of(told).has_value());
  EXPECT_EQ(pack(*aborted_of(told)), pack(*own));
  // A call of a closed group is nobody else's affair, unless it waited.
  ErrorRecord closed = record(WaitTag::kClosed, OpKind::kDispatch);
  EXPECT_FALSE(aborted_of(closed).has_value());
  closed.detail = kClosedInAWait;
  EXPECT_TRUE(aborted_of(closed).has_value());
}

TEST(ErrorRecord, SurvivesWhatItDoesNotKnow) {
  EXPECT_EQ(describe(record(static_cast<WaitTag>(99), static_cast<OpKind>(77)), 60),
            "rank 2 waited 60 s in an unknown operation for an unknown event (tag 99) of rank 5: "
            "expected exchange 7, saw 6; is rank 5 alive, and does it run the same operations in "
            "the same order?");
}

}  // namespace
}  // namespace jax_ep
