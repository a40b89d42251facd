// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/network_layout.h"

#include <gtest/gtest.h>

#include <tuple>

#include "csrc/core/counts_plan.h"

namespace jax_ep {
namespace {

NetworkShape shape_of(int32_t domains, int32_t ranks) {
  return {.topology = {.num_scaleup_ranks = ranks, .num_scaleout_ranks = domains},
          .max_tokens = 4096,
          .row_stride = 14336,
          .num_topk = 8,
          .chunk_tokens = 32,
          .window = 8,
          .gather_units = 32,
          .low_latency_tokens = 32,
          .low_latency_chunk = 5};
}

int64_t bytes_of(const NetworkLayout& layout, NetworkRegion region) {
  return layout.bytes[static_cast<int32_t>(region)];
}

TEST(NetworkLayout, RegionsFollowEachOtherWithoutOverlap) {
  for (const int32_t domains : {2, 3, 8}) {
    for (const int32_t ranks : {1, 2, 8}) {
      NetworkShape shape = shape_of(domains, ranks);
      shape.plans_by_counts = true;
      shape.num_experts = 8 * domains * ranks;
      const NetworkLayout layout = make_network_layout(shape);
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
  EXPECT_LE(end_of(NetworkRegion::kFarReceive), layout.network_bytes);
  EXPECT_GE(layout.at(NetworkRegion::kRelayed), layout.network_bytes);
  EXPECT_LE(end_of(NetworkRegion::kGatherRing), layout.domain_bytes);
  EXPECT_GE(layout.at(NetworkRegion::kSequences), layout.domain_bytes);
  EXPECT_GE(layout.at(NetworkRegion::kFarArrivedSent), layout.domain_bytes);
}

// A first message, and one for every few tokens; each begins where the transport can put it.
TEST(NetworkLayout, LowLatencyMessagesHaveRoomForAllThatTravels) {
  const NetworkLayout layout = make_network_layout(shape_of(4, 8));
  EXPECT_EQ(layout.far_messages, 1 + 7);
  const int64_t selections = 32 * 8;
  EXPECT_GE(layout.far_routing_bytes,
            16 * (num_expert_packets(selections) + num_scalar_packets(selections)));
  EXPECT_GE(layout.far_chunk_bytes, kMessageHeaderBytes + 5 * 14336);
  EXPECT_EQ(layout.far_routing_bytes % 16, 0);
  EXPECT_EQ(layout.far_chunk_bytes % 16, 0);
  EXPECT_EQ(layout.far_bytes, layout.far_routing_bytes + 7 * layout.far_chunk_bytes);
  EXPECT_EQ(bytes_of(layout, NetworkRegion::kFarArrived), 8 * kFarBanks * 32 * 8);
  EXPECT_EQ(bytes_of(layout, NetworkRegion::kFarArrivedSent), 8 * kFarBanks * 32 * 8);
  for (const NetworkRegion region : {NetworkRegion::kFarSend, NetworkRegion::kFarReceive}) {
    EXPECT_EQ(bytes_of(layout, region), kFarBanks * 24 * layout.far_bytes);
  }
  NetworkShape without = shape_of(4, 8);
  without.low_latency_tokens = 0;
  const NetworkLayout none = make_network_layout(without);
  EXPECT_EQ(none.far_messages, 0);
  EXPECT_EQ(bytes_of(none, NetworkRegion::kFarReceive), 0);
}

TEST(NetworkLayout, ALowLatencyMessageHasAboutOneRow) {
  HeapShape heap{.num_ranks = 16, .num_experts = 64, .num_topk = 8, .max_tokens = 4096};
  heap.num_neighbors = 8;
  heap.low_latency_tokens = 32;
  EXPECT_EQ(network_shape_of(heap).low_latency_chunk, 2);
  EXPECT_EQ(network_shape_of(heap).low_latency_tokens, 32);
  heap.num_topk = 32;
  EXPECT_EQ(network_shape_of(heap).low_latency_chunk, 1);
  heap.num_topk = 1;
  heap.num_ranks = heap.num_experts = 64;
  EXPECT_EQ(network_shape_of(heap).low_latency_chunk, 32);  // all tokens
  heap.low_latency_tokens = 256;
  EXPECT_EQ(network_shape_of(heap).low_latency_chunk, 64);  // a header has a bit for each
  heap.low_latency_tokens = 0;
  EXPECT_EQ(network_shape_of(heap).low_latency_chunk, 1);
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
  EXPECT_EQ(bytes_of(many, NetworkRegion::kReceiveRing),
            7 * bytes_of(few, NetworkRegion::kReceiveRing));
  EXPECT_EQ(bytes_of(many, NetworkRegion::kGatherRing), bytes_of(few, NetworkRegion::kGatherRing));
  NetworkShape longer = shape_of(2, 8);
  longer.max_tokens = 65536;
  EXPECT_EQ(make_network_layout(longer).total_bytes, few.total_bytes);
}

// What a plan by counts keeps, and only if there is one.
TEST(NetworkLayout, APlanByCountsHasItsTables) {
  NetworkShape shape = shape_of(16, 2);
  const auto words = [&shape](NetworkRegion region) {
    return make_network_layout(shape).bytes[static_cast<int32_t>(region)] / 4;
  };
  using enum NetworkRegion;
  for (const NetworkRegion region :
       {kRankCounts, kRuns, kTileCounts, kAllCounts, kRunPlaces, kRunStarts}) {
    EXPECT_EQ(words(region), 0);
  }
  EXPECT_FALSE(plans_by_counts(make_network_layout(shape)));
  shape.plans_by_counts = true;
  shape.num_experts = 64;
  for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
    shape.layout = layout;
    const int64_t bins = layout == Layout::kExpert ? 64 : 64 + 32;
    EXPECT_TRUE(plans_by_counts(make_network_layout(shape)));
    EXPECT_EQ(words(kRankCounts), bins);
    EXPECT_EQ(words(kRuns), 4096 * 8 * (layout == Layout::kExpert ? 1 : 2));
    EXPECT_EQ(words(kTileCounts), 64 * bins);
    EXPECT_EQ(words(kAllCounts), 32 * bins);
    EXPECT_EQ(words(kRunPlaces), 32 * (64 / 32 + 1));
    EXPECT_EQ(words(kRunStarts), 64 + 1);
    const NetworkLayout heap = make_network_layout(shape);
    EXPECT_LE(heap.at(kRuns) + 4 * words(kRuns), heap.domain_bytes);
    EXPECT_GE(heap.at(kTileCounts), heap.domain_bytes);
  }
}

// Among more than eight domains, unless the group says otherwise; then nobody keeps all routing.
TEST(NetworkLayout, ManyDomainsPlanByCounts) {
  HeapShape heap{.num_ranks = 16, .num_experts = 64, .num_topk = 8, .max_tokens = 64, .hidden = 64};
  const auto routing = [&heap] {
    return make_heap_layout(heap).bytes[static_cast<int32_t>(Region::kRouting)];
  };
  for (const auto& [num_neighbors, gathered_domains, by_counts] : {std::tuple{0, 0, false},
                                                                   {2, 0, false},
                                                                   {1, 0, true},
                                                                   {1, 16, false},
                                                                   {2, 1, true},
                                                                   {16, 1, false},
                                                                   {8, 1, true},
                                                                   {8, 2, false}}) {
    heap.num_neighbors = num_neighbors;
    heap.gathered_domains = gathered_domains;
    EXPECT_EQ(heap.plans_by_counts(), by_counts) << num_neighbors << " " << gathered_domains;
    EXPECT_EQ(plans_by_counts(network_layout_of(heap)), by_counts);
    EXPECT_EQ(routing(), by_counts ? 0 : 4 * 16 * 64 * 8);
  }
}

// What it sends a domain is at most what a call's tokens can select there.
TEST(NetworkLayout, APlanByCountsSendsAsManyMessagesAsCouldBeNeeded) {
  NetworkShape shape = shape_of(16, 2);
  shape.plans_by_counts = true;
  shape.num_experts = 64;
  shape.row_stride = 0;
  shape.chunk_tokens = 1;
  const NetworkLayout layout = make_network_layout(shape);
  EpShape call{.num_ranks = 32, .num_experts = 64, .num_topk = 8, .num_tokens = 4096};
  const auto messages = [&] { return counts_plan_messages(layout, shape.topology, call); };
  const int64_t words = layout.buffer_bytes / 4;
  EXPECT_EQ(messages().words, words);
  EXPECT_EQ(messages().counts, ceil_div(64, words));
  EXPECT_EQ(messages().runs, ceil_div(4096 * 4, words)) << "four experts a domain";
  call.num_topk = 3;
  EXPECT_EQ(messages().runs, ceil_div(4096 * 3, words));
  call.num_tokens = 0;
  EXPECT_EQ(messages().total(), 0);
}

TEST(NetworkLayout, EntriesOfRunsHoldTheLargestCalls) {
  const uint32_t entry = run_entry(kMaxTokens - 1, kMaxTopk - 1);
  EXPECT_EQ(token_of_run_entry(entry), kMaxTokens - 1);
  EXPECT_EQ(index_of_run_entry(entry), kMaxTopk - 1);
  for (const bool leads : {false, true}) {
    const uint32_t row = run_entry_row(kMaxTokens - 1, leads);
    EXPECT_EQ(tokens_before_run_entry(row), kMaxTokens - 1);
    EXPECT_EQ(leads_run_entry(row), leads);
  }
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
  const int32_t max_chunks = plan_chunks_per_message(layout, kMaxChunks, 512, 32);
  EXPECT_LE(int64_t{4} * max_chunks * 512 * 32, layout.buffer_bytes);
}

}  // namespace
}  // namespace jax_ep
