// SPDX-License-Identifier: Apache-2.0
// The network heap: memory of every rank that ranks of other domains put bytes into, with what the
// ranks of its own domain hand on of them. One table gives every region's place and size, as
// heap_layout.h does for the heap; docs/design/internode.md explains the protocol.
//
// A *rail* is the ranks with the same index in their domains: a rank sends to those of its rail
// alone. A *rail chunk* is so many consecutive tokens of a rank; what a domain gets of one is a
// *message*, and has a *buffer* of a ring. Messages to a domain are counted on every rank, from 0
// on; what says that one is there, or has been read, is an arrival_flag (protocol.h) with the low
// half of its number in the place of an epoch.
#ifndef JAX_EP_CSRC_CORE_NETWORK_LAYOUT_H_
#define JAX_EP_CSRC_CORE_NETWORK_LAYOUT_H_

#include <cstdint>
#include <type_traits>

#include "csrc/core/heap_layout.h"
#include "csrc/core/limits.h"
#include "csrc/core/protocol.h"
#include "csrc/core/topology.h"
#include "csrc/core/work_partition.h"

namespace jax_ep {

// What a network heap's size depends on.
struct NetworkShape {
  Topology topology;
  int64_t max_tokens = 1;  // T of any call is at most this
  int64_t row_stride = 0;  // bytes of a row at most, a multiple of 16
  int32_t num_topk = 1;
  int32_t chunk_tokens = 32;  // of a rail chunk
  int32_t window = 3;         // buffers of a ring, for each other domain
  int32_t gather_units = 32;  // buffers of the ring of sums, for all
  // T of any low-latency call is at most this; 0: there are none. And the tokens of a message.
  int64_t low_latency_tokens = 0;
  int32_t low_latency_chunk = 1;
  bool plans_by_counts = false;  // see HeapShape; then the following count
  int32_t num_experts = 1;
  Layout layout = Layout::kExpert;
};

// The regions, in the order in which they lie in the heap. N domains of G ranks, W buffers of a
// ring, U of the ring of sums.
enum class NetworkRegion : int32_t {
  kDelivered,    // u64 [N, W]: by domain and buffer, the message that is there
  kCredits,      // u64 [N, W]: likewise, the message of ours that has been read
  kSendRing,     // bytes [N - 1, W, buffer]: messages to the other domains
  kReceiveRing,  // bytes [N - 1, W, buffer]: messages from there; the domain's ranks read them
  // Low-latency messages go to each rank of the other domains: M of them, see low_latency_messages.
  kFarArrived,  // u64 [far banks, R, M]: by source and message, arrival_flag of what is there
  kFarSend,     // bytes [far banks, R - G, far_bytes]: messages to those ranks
  kFarReceive,  // likewise: messages from them
  // From here on ranks of the domain write, and not the network.
  kRelayed,     // u64 [G, N, W]: by rail, the message that can be read there
  kPulled,      // u64 [G, N, W, parts]: by reader and part of the message, the one it has read
  kGathered,    // u64 [G, U]: by rank, the unit of sums that it has stored
  kFreed,       // u64 [G, U]: by rail, the unit that it has read
  kGatherRing,  // bytes [U, G, buffer]: units of sums, of each rank
  // Of a plan by counts alone (counts_plan.h); the domain's ranks read the first two.
  kRankCounts,  // u32 [bins]: the rank's selections per bin
  kRuns,        // u32 [max_tokens * K, run words]: its selections, sorted by expert
  // From here on the rank's own.
  kSequences,       // u64 [2]: messages to each domain so far; units of sums so far
  kDeliveredSent,   // u64 [N, W]: what was said last in the peers' words
  kCreditsSent,     // u64 [N, W]: likewise
  kPartsReceived,   // u32 [W]: parts of a rail chunk that have been summed; 0 between exchanges
  kFarArrivedSent,  // u64 [far banks, R, M]: what was said last in those words of the peers
  // Of a plan by counts alone.
  kTileCounts,  // u32 [bins, tiles]: selections of a tile of the rank's tokens; of those before it
  kAllCounts,   // u32 [R, bins]: every rank's selections per bin
  kRunPlaces,   // u32 [R, L + 1]: where the runs of its experts begin in what a source sends
  kRunStarts,   // u32 [E + 1]: where those of all experts begin in kRuns
};
inline constexpr int32_t kNumNetworkRegions = 23;

// A message's readers take it in so many parts, of equally many tokens.
inline constexpr int32_t kRailChunkParts = 4;
// What a message begins with: a bit for each token of the chunk that it has.
inline constexpr int32_t kMessageHeaderBytes = 16;
inline constexpr int32_t kMaxRailChunkTokens = 64;
// Ranks of a domain that has a network beside it; a word has a bit for each.
inline constexpr int32_t kMaxDomainRanks = 32;

// The regions' places. Trivially copyable: kernels get it as a parameter.
struct NetworkLayout {
  int64_t offset[kNumNetworkRegions];  // bytes
  int64_t bytes[kNumNetworkRegions];
  int64_t buffer_bytes;
  int64_t scalar_stride;   // bytes of a token's scalars in a message, a multiple of 16
  int64_t gather_scalars;  // likewise, in a unit of sums
  int32_t chunk_tokens;
  int32_t window;
  int32_t gather_units;
  int32_t far_chunk_tokens;    // of a low-latency message of rows
  int64_t low_latency_tokens;  // that there is room for
  int64_t far_messages;        // of a low-latency exchange, to a rank, at most
  int64_t far_routing_bytes;   // room for the first one
  int64_t far_chunk_bytes;     // room for each other one
  int64_t far_bytes;           // for all
  int64_t run_words;           // u32 words of a selection in kRuns; 0: plans gather the routing
  int64_t network_bytes;       // the part that the network reads and writes
  int64_t domain_bytes;        // the part that the domain's ranks map
  int64_t total_bytes;

  [[nodiscard]] constexpr int64_t at(NetworkRegion region) const {
    return offset[static_cast<int32_t>(region)];
  }
};

// No byte without a value: those of processes are compared as bytes.
static_assert(std::has_unique_object_representations_v<NetworkLayout>);

constexpr bool plans_by_counts(const NetworkLayout& layout) { return layout.run_words > 0; }

// Scalars of a token in a message: which ranks of the domain have some, and K of each of these.
constexpr int64_t scalar_bytes(int32_t num_topk, int32_t domain_ranks) {
  const int64_t holders = num_topk < domain_ranks ? num_topk : domain_ranks;
  return align_up(16 + 4 * holders * num_topk, 16);
}

constexpr NetworkLayout make_network_layout(const NetworkShape& shape) {
  constexpr int64_t kRegionAlignment = 256;
  const int64_t domains = shape.topology.num_scaleout_ranks;
  const int64_t ranks = shape.topology.num_scaleup_ranks;
  const int64_t window = shape.window;
  const int64_t units = shape.gather_units;
  NetworkLayout layout{};
  layout.chunk_tokens = shape.chunk_tokens;
  layout.window = shape.window;
  layout.gather_units = shape.gather_units;
  layout.scalar_stride = scalar_bytes(shape.num_topk, shape.topology.num_scaleup_ranks);
  layout.gather_scalars = align_up(4 * shape.num_topk, 16);
  const int64_t rows =
      kMessageHeaderBytes + shape.chunk_tokens * (shape.row_stride + layout.scalar_stride);
  // A chunk of a plan's routing fits, too.
  const int64_t few = ceil_div(shape.max_tokens, kMaxChunks);
  const int64_t plan_tokens = few > kMaxPlanChunkTokens ? few : kMaxPlanChunkTokens;
  const int64_t routing = align_up(4 * plan_tokens * shape.num_topk, 16);
  layout.buffer_bytes = align_up(rows > routing ? rows : routing, 128);
  layout.low_latency_tokens = shape.low_latency_tokens;
  layout.far_chunk_tokens = shape.low_latency_chunk;
  layout.far_messages = shape.low_latency_tokens > 0
                            ? 1 + ceil_div(shape.low_latency_tokens, shape.low_latency_chunk)
                            : 0;
  const int64_t selections = shape.low_latency_tokens * shape.num_topk;
  layout.far_routing_bytes = align_up(
      kPacketBytes * (num_expert_packets(selections) + num_scalar_packets(selections)), 128);
  layout.far_chunk_bytes =
      align_up(kMessageHeaderBytes + shape.low_latency_chunk * shape.row_stride, 128);
  layout.far_bytes =
      layout.far_messages > 0
          ? layout.far_routing_bytes + (layout.far_messages - 1) * layout.far_chunk_bytes
          : 0;
  const int64_t far_ranks = (domains - 1) * ranks;
  const int64_t far_words = 8 * kFarBanks * domains * ranks * layout.far_messages;
  const bool is_rank_major = shape.layout == Layout::kRank;
  layout.run_words = !shape.plans_by_counts ? 0 : is_rank_major ? 2 : 1;
  const int64_t all_ranks = domains * ranks;
  const int64_t experts = shape.num_experts;
  const int64_t bins =
      shape.plans_by_counts ? num_bins(shape.layout, shape.num_experts, all_ranks) : 0;
  const int64_t tiles = max_num_tiles(shape.max_tokens, 1);
  const int64_t bytes[kNumNetworkRegions] = {
      8 * domains * window,
      8 * domains * window,
      (domains - 1) * window * layout.buffer_bytes,
      (domains - 1) * window * layout.buffer_bytes,
      far_words,
      kFarBanks * far_ranks * layout.far_bytes,
      kFarBanks * far_ranks * layout.far_bytes,
      8 * ranks * domains * window,
      8 * ranks * domains * window * kRailChunkParts,
      8 * ranks * units,
      8 * ranks * units,
      units * ranks * layout.buffer_bytes,
      4 * bins,
      4 * shape.max_tokens * shape.num_topk * layout.run_words,
      16,
      8 * domains * window,
      8 * domains * window,
      4 * window,
      far_words,
      4 * bins * tiles,
      4 * bins * all_ranks,
      shape.plans_by_counts ? 4 * (experts + all_ranks) : 0,
      shape.plans_by_counts ? 4 * (experts + 1) : 0,
  };
  int64_t end = 0;
  for (int32_t i = 0; i < kNumNetworkRegions; ++i) {
    layout.offset[i] = end;
    layout.bytes[i] = bytes[i];
    end = align_up(end + bytes[i], kRegionAlignment);
    if (i == static_cast<int32_t>(NetworkRegion::kFarReceive)) layout.network_bytes = end;
    if (i == static_cast<int32_t>(NetworkRegion::kRuns)) layout.domain_bytes = end;
  }
  layout.total_bytes = end;
  return layout;
}

// Tokens of a low-latency message: about as many as have one row for a rank, if routing is even. So
// few messages are empty, and rows do not wait for each other.
constexpr int32_t far_chunk_tokens_of(const HeapShape& heap) {
  const int64_t tokens = ceil_div(heap.num_ranks, heap.num_topk);
  const int64_t max_tokens =
      heap.low_latency_tokens < kMaxRailChunkTokens ? heap.low_latency_tokens : kMaxRailChunkTokens;
  const int64_t some = tokens < max_tokens ? tokens : max_tokens;
  return static_cast<int32_t>(some > 1 ? some : 1);
}

// The network heap of a group that spans domains. How large its chunks and rings are comes of a
// model (docs/design/internode.md), and has not been measured on a network.
constexpr NetworkShape network_shape_of(const HeapShape& heap) {
  constexpr int32_t kManyDomains = 17;  // smaller messages of more domains fill a chunk as well
  constexpr int32_t kBuffersOfAll = 64;
  constexpr int32_t kFewestBuffers = 3;
  constexpr int32_t kMostBuffers = 16;
  constexpr int32_t kGatherTokens = 1024;
  const Topology topology = heap.topology();
  const int32_t peers = topology.num_scaleout_ranks - 1;
  const int32_t tokens = topology.num_scaleout_ranks < kManyDomains ? 32 : kMaxRailChunkTokens;
  const auto buffers = static_cast<int32_t>(ceil_div(kBuffersOfAll, peers > 0 ? peers : 1));
  NetworkShape shape{.topology = topology,
                     .max_tokens = heap.max_tokens,
                     .row_stride = make_heap_layout(heap).row_stride,
                     .num_topk = heap.num_topk};
  shape.chunk_tokens = heap.max_tokens < tokens ? static_cast<int32_t>(heap.max_tokens) : tokens;
  shape.window = buffers < kFewestBuffers ? kFewestBuffers : buffers;
  if (shape.window > kMostBuffers) shape.window = kMostBuffers;
  shape.gather_units = kGatherTokens / tokens;
  shape.low_latency_tokens = heap.low_latency_tokens;
  shape.low_latency_chunk = far_chunk_tokens_of(heap);
  shape.plans_by_counts = heap.plans_by_counts();
  shape.num_experts = heap.num_experts;
  shape.layout = heap.layout;
  return shape;
}

// All zeros where there is one domain.
constexpr NetworkLayout network_layout_of(const HeapShape& heap) {
  return heap.spans_domains() ? make_network_layout(network_shape_of(heap)) : NetworkLayout{};
}

// --- how a call is cut ---------------------------------------------------------------------------

// Chunks of a plan's routing that travel in one message: many, for there are few bytes in one; but
// there are several messages, so that several warps hand them on.
inline constexpr int32_t kRoutingMessages = 16;
constexpr int32_t plan_chunks_per_message(const NetworkLayout& layout,
                                          int32_t chunks,
                                          int32_t tokens_per_chunk,
                                          int32_t num_topk) {
  const auto max_chunks =
      static_cast<int32_t>(layout.buffer_bytes / (int64_t{4} * tokens_per_chunk * num_topk));
  const auto some = static_cast<int32_t>(ceil_div(chunks, kRoutingMessages));
  const int32_t found = some < max_chunks ? some : max_chunks;
  return found > 1 ? found : 1;
}

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_NETWORK_LAYOUT_H_
