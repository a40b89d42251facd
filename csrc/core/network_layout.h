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
};

// The regions, in the order in which they lie in the heap. N domains of G ranks, W buffers of a
// ring, U of the ring of sums.
enum class NetworkRegion : int32_t {
  kDelivered,    // u64 [N, W]: by domain and buffer, the message that is there
  kCredits,      // u64 [N, W]: likewise, the message of ours that has been read
  kSendRing,     // bytes [N - 1, W, buffer]: messages to the other domains
  kReceiveRing,  // bytes [N - 1, W, buffer]: messages from there; the domain's ranks read them
  // From here on ranks of the domain write, and not the network.
  kRelayed,     // u64 [G, N, W]: by rail, the message that can be read there
  kPulled,      // u64 [G, N, W, parts]: by reader and part of the message, the one it has read
  kGathered,    // u64 [G, U]: by rank, the unit of sums that it has stored
  kFreed,       // u64 [G, U]: by rail, the unit that it has read
  kGatherRing,  // bytes [U, G, buffer]: units of sums, of each rank
  // From here on the rank's own.
  kSequences,      // u64 [2]: messages to each domain so far; units of sums so far
  kDeliveredSent,  // u64 [N, W]: what was said last in the peers' words
  kCreditsSent,    // u64 [N, W]: likewise
  kPartsReceived,  // u32 [W]: parts of a rail chunk that have been summed; 0 between exchanges
};
inline constexpr int32_t kNumNetworkRegions = 13;

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
  int32_t unused;         // no byte without a value: layouts are compared as bytes
  int64_t network_bytes;  // the part that the network reads and writes
  int64_t domain_bytes;   // the part that the domain's ranks map
  int64_t total_bytes;

  [[nodiscard]] constexpr int64_t at(NetworkRegion region) const {
    return offset[static_cast<int32_t>(region)];
  }
};

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
  const int64_t bytes[kNumNetworkRegions] = {
      8 * domains * window,
      8 * domains * window,
      (domains - 1) * window * layout.buffer_bytes,
      (domains - 1) * window * layout.buffer_bytes,
      8 * ranks * domains * window,
      8 * ranks * domains * window * kRailChunkParts,
      8 * ranks * units,
      8 * ranks * units,
      units * ranks * layout.buffer_bytes,
      16,
      8 * domains * window,
      8 * domains * window,
      4 * window,
  };
  int64_t end = 0;
  for (int32_t i = 0; i < kNumNetworkRegions; ++i) {
    layout.offset[i] = end;
    layout.bytes[i] = bytes[i];
    end = align_up(end + bytes[i], kRegionAlignment);
    if (i == static_cast<int32_t>(NetworkRegion::kReceiveRing)) layout.network_bytes = end;
    if (i == static_cast<int32_t>(NetworkRegion::kGatherRing)) layout.domain_bytes = end;
  }
  layout.total_bytes = end;
  return layout;
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
  const auto most =
      static_cast<int32_t>(layout.buffer_bytes / (int64_t{4} * tokens_per_chunk * num_topk));
  const auto some = static_cast<int32_t>(ceil_div(chunks, kRoutingMessages));
  const int32_t found = some < most ? some : most;
  return found > 1 ? found : 1;
}

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_NETWORK_LAYOUT_H_
