// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/protocol.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <set>

#include "csrc/core/wait_times.h"

namespace jax_ep {
namespace {

TEST(ArrivalFlag, HoldsEpochOperationAndCall) {
  for (const uint32_t epoch : {0U, 1U, 0x7FFF'FFFFU, 0xFFFF'FFFFU}) {
    for (const OpKind op :
         {OpKind::kPlan, OpKind::kDispatch, OpKind::kCombine, OpKind::kPlanDispatch}) {
      const uint64_t flag = arrival_flag(epoch, op, 0xABCDEF);
      EXPECT_EQ(epoch_of(flag), epoch);
      EXPECT_EQ(op_of(flag), static_cast<uint32_t>(op));
      EXPECT_EQ(tag_of(flag), 0xABCDEFU);
      EXPECT_NE(flag, 0U);
    }
  }
}

uint32_t byte_of(uint32_t tag, CallPart part) {
  return tag >> (8 * static_cast<uint32_t>(part)) & 0xFF;
}

TEST(CallTag, SaysWhichPartDiffers) {
  EpShape shape{.num_ranks = 8, .num_experts = 256, .num_topk = 8, .num_tokens = 128};
  const auto tag = [&](int64_t hidden, uint32_t call_site) {
    return call_tag(shape, hidden, DType::kBFloat16, Wire::kSame, 8, true, call_site);
  };
  const uint32_t base = tag(7168, 17);
  EXPECT_EQ(base, tag(7168, 17));
  EXPECT_LT(base, 1U << 24);
  const uint32_t elsewhere = tag(7168, 18);
  EXPECT_NE(byte_of(base, CallPart::kCallSite), byte_of(elsewhere, CallPart::kCallSite));
  EXPECT_EQ(base & 0xFFFF, elsewhere & 0xFFFF);
  const uint32_t narrow = tag(4096, 17);
  EXPECT_NE(byte_of(base, CallPart::kSizes), byte_of(narrow, CallPart::kSizes));
  EXPECT_EQ(base & 0xFF00FF, narrow & 0xFF00FF);
  shape.num_tokens = 127;
  const uint32_t fewer = tag(7168, 17);
  EXPECT_NE(byte_of(base, CallPart::kTokens), byte_of(fewer, CallPart::kTokens));
  EXPECT_EQ(base & 0xFFFF00, fewer & 0xFFFF00);
}

// Equal hashes of different calls are chance: 1 in 256.
TEST(CallTag, DifferentSizesRarelyAgree) {
  std::set<uint32_t> bytes;
  for (int64_t tokens = 0; tokens < 256; ++tokens) {
    const EpShape shape{.num_tokens = tokens};
    bytes.insert(call_tag(shape, 8, DType::kFloat32, Wire::kSame, 0, false, 0) & 0xFF);
  }
  EXPECT_GT(bytes.size(), 140U);  // 162 of 256 are expected
}

TEST(Aborted, SurvivesItsWord) {
  const Aborted aborted{.by = 63, .blamed = 62, .tag = 9, .op = 254};
  const uint32_t word = pack(aborted);
  EXPECT_NE(word, 0U);
  const Aborted got = unpack_aborted(word);
  EXPECT_EQ(got.by, 63U);
  EXPECT_EQ(got.blamed, 62U);
  EXPECT_EQ(got.tag, 9U);
  EXPECT_EQ(got.op, 254U);
  EXPECT_NE(pack(Aborted{}), 0U);
  // The last there is.
  const auto last = static_cast<uint32_t>(WaitTag::kInTransport);
  EXPECT_EQ(unpack_aborted(pack(Aborted{.by = 0, .blamed = 0, .tag = last, .op = 0})).tag, last);
}

// What a wait is behind comes first: rows, messages and credits, then who hands on or reduces, then
// sums, which wait for room; at last the rank's own blocks.
TEST(Timeouts, WhatAWaitIsBehindIsGivenUpFirst) {
  const auto quarters = [](OpKind op, WaitTag tag) { return timeout_quarters(op, tag, false); };
  for (const OpKind op : {OpKind::kPlan, OpKind::kDispatch, OpKind::kCombine}) {
    EXPECT_EQ(quarters(op, WaitTag::kArrived), 4U);
    EXPECT_LT(quarters(op, WaitTag::kArrived), quarters(op, WaitTag::kCredit));
    EXPECT_LT(quarters(op, WaitTag::kDelivered), quarters(op, WaitTag::kRelayed));
    EXPECT_LT(quarters(op, WaitTag::kDelivered), quarters(op, WaitTag::kGathered));
    EXPECT_LT(quarters(op, WaitTag::kCredit), quarters(op, WaitTag::kFreed));
    EXPECT_LT(quarters(op, WaitTag::kCredit), quarters(op, WaitTag::kPulled));
    EXPECT_LT(quarters(op, WaitTag::kFreed), quarters(op, WaitTag::kGathered));
    EXPECT_LT(quarters(op, WaitTag::kGathered), timeout_quarters(op, WaitTag::kGathered, true));
  }
  // A message of a dispatch depends on its sender alone, one of a combine on its domain.
  EXPECT_EQ(quarters(OpKind::kDispatch, WaitTag::kDelivered), 4U);
  EXPECT_GT(quarters(OpKind::kCombine, WaitTag::kDelivered), 4U);
}

TEST(LongWait, SurvivesItsWord) {
  const LongWait wait{.epoch = 0xFFFF'FFFF, .op = 254, .tag = 9, .level = 32, .ended = true};
  const LongWait got = unpack_long_wait(pack(wait));
  EXPECT_EQ(got.epoch, wait.epoch);
  EXPECT_EQ(got.op, 254U);
  EXPECT_EQ(got.tag, 9U);
  EXPECT_EQ(got.level, 32U);
  EXPECT_TRUE(got.ended);
  EXPECT_FALSE(got.given_up);
  LongWait gave_up = wait;
  gave_up.given_up = true;
  const LongWait without = unpack_long_wait(pack(gave_up));
  EXPECT_TRUE(without.ended);
  EXPECT_TRUE(without.given_up);
  EXPECT_NE(pack(LongWait{}), 0U);
}

TEST(KernelPhase, SurvivesItsWord) {
  for (const bool running : {true, false}) {
    const KernelPhase got =
        unpack_kernel_phase(pack(KernelPhase{.epoch = 0xFFFF'FFFF, .op = 254, .running = running}));
    EXPECT_EQ(got.epoch, 0xFFFF'FFFFU);
    EXPECT_EQ(got.op, 254U);
    EXPECT_EQ(got.running, running);
  }
  EXPECT_NE(pack(KernelPhase{}), 0U);
  EXPECT_FALSE(unpack_kernel_phase(0).running) << "before the first kernel";
}

TEST(WaitTimes, NoNumberOfSecondsOverflows) {
  EXPECT_EQ(to_wait_ns(1.5), 1'500'000'000U);
  for (const double seconds : {1e10, 1e11, 1e12, 1e300, std::numeric_limits<double>::infinity()}) {
    EXPECT_EQ(to_wait_ns(seconds), uint64_t{1} << 61) << seconds;
  }
  EXPECT_GT(static_cast<int64_t>(2 * to_wait_ns(1e300)), 0);
}

TEST(WaitTimes, OneOfTheReportsComesAfterTheTimeThatWasAskedFor) {
  for (const double warn_after : {0.25, 1.0, 1.5, 10.0, 600.0}) {
    const double first = first_report_s(warn_after);
    EXPECT_GT(first, 0.0);
    EXPECT_LE(first, 1.0);
    uint32_t level = 1;
    while (waited_s(first, level) < warn_after) ++level;
    EXPECT_DOUBLE_EQ(waited_s(first, level), warn_after);
  }
  EXPECT_EQ(first_report_s(std::numeric_limits<double>::infinity()), 1.0);
}

TEST(Control, WordsOfChannelsLieApart) {
  std::set<int32_t> indices = {control_index(Control::kClosed), control_index(Control::kFailed)};
  for (uint32_t channel = 0; channel < 3; ++channel) {
    for (int32_t word = 0; word < kNumChannelControlWords; ++word) {
      indices.insert(
          control_index(static_cast<Channel>(channel), static_cast<ChannelControl>(word)));
    }
  }
  EXPECT_EQ(indices.size(), 2U + 3 * kNumChannelControlWords);
  EXPECT_EQ(*indices.rbegin(), static_cast<int32_t>(indices.size()) - 1);
}

}  // namespace
}  // namespace jax_ep
