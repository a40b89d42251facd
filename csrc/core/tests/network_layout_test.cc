// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/network_layout.h"

#include <gtest/gtest.h>

namespace jax_ep {
namespace {

NetworkShape shape_of(int32_t domains, int32_t ranks) {
  return {.topology = {.num_scaleup_ranks = ranks, .num_scaleout_ranks = domains},
          .max_tokens = 4096,
          .row_stride = 14336,
          .num_topk = 8,
          .chunk_tokens = 32,
          .window = 8,
          .gather_units = 32};
}

TEST(NetworkLayout, RegionsFollowEachOtherWithoutOverlap) {
  for (const int32_t domains : {2, 3, 8}) {
    for (const int32_t ranks : {1, 2, 8}) {
      const NetworkLayout layout = make_network_layout(shape_of(domains, ranks));
      int64_t end = 0;
      for (int32_t i = 0; i < kNumNetworkRegions; ++i) {
        EXPECT_GE(layout.offset[i], end);
        EXPECT_EQ(layout.offset[i] % 256, 0);
        EXPECT_GT(layout.bytes[i], 0);
        end = layout.offset[i] + layout.bytes[i];
      }
      EXPECT_GE(layout.total_bytes, end);
    }
  }
}

// What the network writes comes first, then what the domain's ranks write; the rest is the rank's.
TEST(NetworkLayout, PartsHaveTheirWriters) {
  const NetworkLayout layout = make_network_layout(shape_of(4, 8));
  const auto end_of = [&layout](NetworkRegion region) {
    return layout.at(region) + layout.bytes[static_cast<int32_t>(region)];
  };
  EXPECT_LE(end_of(NetworkRegion::kReceiveRing), layout.network_bytes);
  EXPECT_GE(layout.at(NetworkRegion::kRelayed), layout.network_bytes);
  EXPECT_LE(end_of(NetworkRegion::kGatherRing), layout.domain_bytes);
  EXPECT_GE(layout.at(NetworkRegion::kSequences), layout.domain_bytes);
}

TEST(NetworkLayout, AMessageHasRoomForAChunkOfRowsAndForOneOfRouting) {
  const NetworkLayout rows = make_network_layout(shape_of(2, 8));
  EXPECT_GE(rows.buffer_bytes, kMessageHeaderBytes + 32 * (14336 + 16 + 4 * 8 * 8));
  NetworkShape narrow = shape_of(2, 8);
  narrow.row_stride = 0;
  narrow.chunk_tokens = 1;
  narrow.num_topk = 32;
  narrow.max_tokens = kMaxTokens;
  const NetworkLayout routing = make_network_layout(narrow);
  EXPECT_GE(routing.buffer_bytes, 4 * ceil_div(kMaxTokens, kMaxChunks) * 32);
}

// Rings do not grow with the tokens of a call, and units not with the domains.
TEST(NetworkLayout, RingsHaveTheirSize) {
  const NetworkLayout few = make_network_layout(shape_of(2, 8));
  const NetworkLayout many = make_network_layout(shape_of(8, 8));
  const auto bytes = [](const NetworkLayout& layout, NetworkRegion region) {
    return layout.bytes[static_cast<int32_t>(region)];
  };
  EXPECT_EQ(bytes(many, NetworkRegion::kReceiveRing), 7 * bytes(few, NetworkRegion::kReceiveRing));
  EXPECT_EQ(bytes(many, NetworkRegion::kGatherRing), bytes(few, NetworkRegion::kGatherRing));
  NetworkShape longer = shape_of(2, 8);
  longer.max_tokens = 65536;
  EXPECT_EQ(make_network_layout(longer).total_bytes, few.total_bytes);
}

// Rings hold enough of each size of group; a chunk is no longer than a call.
TEST(NetworkLayout, AGroupsHeapGivesItsShape) {
  HeapShape heap{
      .num_ranks = 16, .num_experts = 64, .num_topk = 8, .max_tokens = 4096, .hidden = 64};
  heap.num_neighbors = 8;
  EXPECT_EQ(network_shape_of(heap).topology.num_scaleout_ranks, 2);
  EXPECT_EQ(network_shape_of(heap).topology.num_scaleup_ranks, 8);
  EXPECT_EQ(network_shape_of(heap).chunk_tokens, 32);
  EXPECT_EQ(network_shape_of(heap).window, 16);
  EXPECT_EQ(network_shape_of(heap).gather_units, 32);
  EXPECT_EQ(network_shape_of(heap).row_stride, 256);
  heap.max_tokens = 5;
  EXPECT_EQ(network_shape_of(heap).chunk_tokens, 5);
  heap.num_ranks = heap.num_experts = 64;
  heap.max_tokens = 4096;
  EXPECT_EQ(network_shape_of(heap).window, 10);
  heap.num_neighbors = 2;
  EXPECT_EQ(network_shape_of(heap).window, 3);
  EXPECT_EQ(network_shape_of(heap).chunk_tokens, 64);
  EXPECT_EQ(network_shape_of(heap).gather_units, 16);
  EXPECT_GT(network_layout_of(heap).total_bytes, 0);
  for (const int32_t one_domain : {0, 64}) {
    heap.num_neighbors = one_domain;
    EXPECT_EQ(network_layout_of(heap).total_bytes, 0);
  }
}

TEST(NetworkLayout, RoutingTravelsInSeveralMessagesThatFit) {
  const NetworkLayout layout = make_network_layout(shape_of(2, 8));
  EXPECT_EQ(plan_chunks_per_message(layout, 1, 1, 8), 1);
  EXPECT_EQ(plan_chunks_per_message(layout, 512, 8, 8), 512 / kRoutingMessages);
  const int32_t most = plan_chunks_per_message(layout, kMaxChunks, 512, 32);
  EXPECT_LE(int64_t{4} * most * 512 * 32, layout.buffer_bytes);
}

}  // namespace
}  // namespace jax_ep
