// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/low_latency.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "csrc/core/heap_layout.h"
#include "csrc/core/low_latency_fit.h"

namespace jax_ep {
namespace {

TEST(Packets, HaveRoomForAllThatTravels) {
  EXPECT_EQ(num_packets(0), 0);
  EXPECT_EQ(num_packets(1), 1);
  EXPECT_EQ(num_packets(12), 1);
  EXPECT_EQ(num_packets(13), 2);
  EXPECT_EQ(num_packets(14336), 1195);
  EXPECT_EQ(num_expert_packets(7), 2);
  EXPECT_EQ(num_scalar_packets(7), 3);
  EXPECT_LT(kMaxLowLatencyBins, static_cast<int32_t>(kNoExpertInPacket));
}

// As csrc/kernels/low_latency/dispatch_rows.h cuts a row: segments of `elements`, the last shorter,
// each with its scales in fours, and in packets of its own.
int64_t fp8_packets(int64_t hidden, int64_t elements) {
  int64_t packets = 0;
  for (int64_t first = 0; first < hidden; first += elements) {
    const int64_t n = std::min(elements, hidden - first);
    packets += num_packets(n + 4 * align_up(ceil_div(n, kScaleBlock), 4));
  }
  return packets;
}

TEST(Packets, ARowInFp8TakesNoMoreThanOneOfTheDType) {
  for (int64_t hidden = 16; hidden <= 16384; hidden += 16) {
    ASSERT_LE(fp8_packets(hidden, 1536), num_packets(hidden * 2)) << hidden;
    ASSERT_LE(fp8_packets(hidden, 512), num_packets(hidden * 4)) << hidden;
  }
}

TEST(Flags, TellExchangesApart) {
  constexpr uint32_t kLast = std::numeric_limits<uint32_t>::max();
  for (const uint32_t epoch : {0U, 1U, 0x7FFF'FFFFU, 0x8000'0000U, kLast}) {
    EXPECT_NE(packet_flag(epoch), 0);
    EXPECT_NE(packet_flag(epoch), packet_flag(epoch + 1));
    EXPECT_NE(bank_of_epoch(epoch), bank_of_epoch(epoch + 1));
    // What the bank held before.
    EXPECT_NE(packet_flag(epoch), packet_flag(epoch - static_cast<uint32_t>(kLowLatencyBanks)));
  }
}

// A packet that nobody has stored to since is gone when its flag comes again, 2^31 exchanges later.
TEST(Flags, EachBankIsClearedBeforeTheyBeginAnew) {
  uint32_t cleared = 0;
  for (uint32_t epoch = 5 * kClearBankEvery - 4; epoch != 5 * kClearBankEvery + 4; ++epoch) {
    if (clears_bank(epoch)) cleared |= 1U << bank_of_epoch(epoch);
  }
  EXPECT_EQ(cleared, 0b11);
  EXPECT_EQ(uint64_t{1} << 31, uint64_t{kClearBankEvery} * 128);
  EXPECT_FALSE(clears_bank(kClearBankEvery - 1));
  EXPECT_FALSE(clears_bank(kClearBankEvery + 2));
}

TEST(Heap, HasRoomForLowLatencyExchangesIfItIsAsked) {
  HeapShape shape{.num_ranks = 8,
                  .num_experts = 256,
                  .num_topk = 8,
                  .max_tokens = 4096,
                  .hidden = 7168,
                  .dtype = DType::kBFloat16};
  const int64_t without = make_heap_layout(shape).total_bytes;
  shape.low_latency_tokens = 128;
  const HeapLayout layout = make_heap_layout(shape);
  const int64_t packets = 128 * 1195 + ceil_div(128 * 8, 6) + ceil_div(128 * 8, 3);
  EXPECT_NEAR(layout.total_bytes - without, 2 * 8 * 16 * packets, 3 * 256);
}

}  // namespace
}  // namespace jax_ep
