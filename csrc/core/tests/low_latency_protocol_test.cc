// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/low_latency_protocol.h"

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

// The same row as a far rank gets it, in words of 16 bytes.
TEST(Packets, ARowInFp8ForAFarRankTakesNoMoreThanOneOfTheDType) {
  for (int64_t hidden = 16; hidden <= 16384; hidden += 16) {
    int64_t bytes = 0;
    for (int64_t first = 0; first < hidden; first += 512) {
      const int64_t n = std::min<int64_t>(512, hidden - first);
      bytes += n + 4 * align_up(ceil_div(n, kScaleBlock), 4);
    }
    ASSERT_EQ(bytes % 16, 0);
    ASSERT_LE(bytes, hidden * 2) << hidden;
  }
}

TEST(Flags, TellExchangesApart) {
  constexpr uint32_t kLast = std::numeric_limits<uint32_t>::max();
  for (const uint32_t epoch : {0U, 1U, 0x7FFF'FFFFU, 0x8000'0000U, kLast}) {
    EXPECT_NE(packet_flag(epoch), 0);
    EXPECT_NE(packet_flag(epoch), packet_flag(epoch + 1));
    for (uint32_t later = 1; later < uint32_t{kLowLatencyBanks}; ++later) {
      EXPECT_NE(bank_of_epoch(epoch), bank_of_epoch(epoch + later));
    }
    EXPECT_EQ(bank_of_epoch(epoch), bank_of_epoch(epoch + static_cast<uint32_t>(kLowLatencyBanks)));
    // What the bank held before.
    EXPECT_NE(packet_flag(epoch), packet_flag(epoch - static_cast<uint32_t>(kLowLatencyBanks)));
  }
}

// Call tags have 24 bits, and 0 is one of them.
TEST(Flights, AreOpenWhateverTheirCall) {
  for (const uint32_t tag : {0U, 1U, 0xFF'FFFFU}) {
    EXPECT_NE(open_flight(tag), 0);
    EXPECT_EQ(call_tag_of_flight(open_flight(tag)), tag);
  }
}

// A packet that nobody has stored to since is gone when its flag comes again, 2^31 exchanges later.
TEST(Flags, EachBankIsClearedBeforeTheyBeginAnew) {
  uint32_t cleared = 0;
  for (uint32_t epoch = 5 * kClearBankEvery - 4; epoch != 5 * kClearBankEvery + 4; ++epoch) {
    if (clears_bank(epoch)) cleared |= 1U << bank_of_epoch(epoch);
  }
  EXPECT_EQ(cleared, 0b1111);
  EXPECT_EQ(uint64_t{1} << 31, uint64_t{kClearBankEvery} * 128);
  EXPECT_FALSE(clears_bank(kClearBankEvery - 1));
  EXPECT_FALSE(clears_bank(kClearBankEvery + static_cast<uint32_t>(kLowLatencyBanks)));
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
  EXPECT_NEAR(layout.total_bytes - without, kLowLatencyBanks * 8 * 16 * packets, 3 * 256);
  // Of ranks of other domains nothing comes as packets.
  shape.num_neighbors = 2;
  const int64_t of_domain = make_heap_layout(shape).total_bytes;
  shape.low_latency_tokens = 0;
  EXPECT_NEAR(of_domain - make_heap_layout(shape).total_bytes,
              kLowLatencyBanks * 2 * 16 * packets,
              3 * 256);
}

HeapLayout heap_for(int64_t low_latency_tokens) {
  return make_heap_layout({.num_ranks = 8,
                           .num_experts = 64,
                           .num_topk = 8,
                           .max_tokens = 4096,
                           .hidden = 7168,
                           .low_latency_tokens = low_latency_tokens});
}

TEST(Fit, IsOfTokensSelectionsAndBins) {
  const EpShape shape{.num_ranks = 8, .num_experts = 64, .num_topk = 8, .num_tokens = 256};
  EXPECT_TRUE(fits_low_latency(heap_for(256), shape));  // 16,384 selections
  EXPECT_FALSE(fits_low_latency(heap_for(255), shape));
  EXPECT_FALSE(fits_low_latency(heap_for(0), shape));
  EpShape other = shape;
  other.num_topk = 9;
  EXPECT_FALSE(fits_low_latency(heap_for(256), other));
  other.num_tokens = 227;  // 16,344 selections
  EXPECT_TRUE(fits_low_latency(heap_for(256), other));
  other = shape;
  other.num_experts = kMaxLowLatencyBins;
  EXPECT_TRUE(fits_low_latency(heap_for(256), other));
  other.layout = Layout::kRank;  // which counts ranks, too
  EXPECT_FALSE(fits_low_latency(heap_for(256), other));
  other.num_experts = kMaxLowLatencyBins - 8;
  EXPECT_TRUE(fits_low_latency(heap_for(256), other));
  other.num_tokens = 0;
  EXPECT_TRUE(fits_low_latency(heap_for(256), other));
  EXPECT_FALSE(fits_low_latency(heap_for(0), other));
}

TEST(Fit, IsOfWholeVectorsAndOfNoGradient) {
  const HeapLayout heap = heap_for(128);
  PlanDispatchOp op;
  op.dispatch.shape = {.num_ranks = 8, .num_experts = 64, .num_topk = 8, .num_tokens = 128};
  const auto fits = [&](int64_t hidden, DType dtype, Wire wire, RowFormat x, RowFormat rows) {
    op.dispatch.hidden = hidden;
    op.dispatch.dtype = dtype;
    op.dispatch.wire = wire;
    op.dispatch.x_format = x;
    op.dispatch.rows_format = rows;
    return fits_low_latency(heap, op);
  };
  using enum RowFormat;
  EXPECT_TRUE(fits(8, DType::kBFloat16, Wire::kSame, kDType, kDType));
  EXPECT_FALSE(fits(8, DType::kBFloat16, Wire::kFloat8E4M3, kDType, kDType));
  EXPECT_TRUE(fits(16, DType::kBFloat16, Wire::kFloat8E4M3, kFloat8E4M3, kFloat8E4M3));
  EXPECT_TRUE(fits(4, DType::kFloat32, Wire::kSame, kDType, kDType));
  EXPECT_FALSE(fits(2, DType::kFloat32, Wire::kSame, kDType, kDType));
  EXPECT_FALSE(fits(0, DType::kFloat32, Wire::kSame, kDType, kDType));
  ASSERT_TRUE(fits(16, DType::kFloat32, Wire::kSame, kDType, kDType));
  op.dispatch.weighted = true;
  EXPECT_FALSE(fits_low_latency(heap, op));
  op.dispatch.weighted = false;
  op.dispatch.with_dots = true;
  EXPECT_FALSE(fits_low_latency(heap, op));

  CombineOp combine;
  combine.shape = op.dispatch.shape;
  combine.hidden = 8;
  combine.dtype = DType::kFloat16;
  EXPECT_TRUE(fits_low_latency(heap, combine));
  combine.num_scalars = 8;
  EXPECT_FALSE(fits_low_latency(heap, combine));
  combine.num_scalars = 0;
  for (const int32_t domain_size : {1, 2, 8}) {
    combine.domain_size = domain_size;
    EXPECT_EQ(fits_low_latency(heap, combine), domain_size != 2);
    EXPECT_TRUE(fits_low_latency(heap, combine, /*spans_domains=*/true));
  }
  combine.hidden = 12;
  EXPECT_FALSE(fits_low_latency(heap, combine));
}

}  // namespace
}  // namespace jax_ep
