// SPDX-License-Identifier: Apache-2.0
// The symmetric heap: one table gives every region's place and size. Host sizing, the kernels and
// docs/design/protocol.md read it; nothing else knows an offset. The network heap's:
// network_layout.h.
//
// Every rank of a group holds one heap of the same layout. Its first part is mapped by the group's
// other ranks; the rest, from `peer_bytes` on, is the rank's own.
#ifndef JAX_EP_CSRC_CORE_HEAP_LAYOUT_H_
#define JAX_EP_CSRC_CORE_HEAP_LAYOUT_H_

#include <cstdint>
#include <type_traits>

#include "csrc/core/dtype.h"
#include "csrc/core/ep_shape.h"
#include "csrc/core/limits.h"
#include "csrc/core/low_latency_protocol.h"
#include "csrc/core/protocol.h"
#include "csrc/core/topology.h"
#include "csrc/core/work_partition.h"

namespace jax_ep {

// Every rank scans what is gathered: R * T * K selections. By counts it scans its own, and what it
// receives, but in two exchanges and with more barriers. Chosen by a model, not measured.
inline constexpr int32_t kMaxGatheredDomains = 8;

// What a heap's size depends on; from the group's config.
struct HeapShape {
  int32_t num_ranks = 1;
  int32_t num_experts = 1;
  int32_t num_topk = 1;
  int64_t max_tokens = 1;  // T of any call is at most this
  int64_t hidden = 1;
  DType dtype = DType::kFloat32;
  Wire wire = Wire::kSame;
  Layout layout = Layout::kExpert;
  // T of any low-latency call is at most this, which is at most max_tokens; 0: there are none.
  int64_t low_latency_tokens = 0;
  int32_t num_neighbors = 0;  // ranks of a domain; 0: there is one domain
  // Among more domains plans do not gather the routing of all ranks, but counts of it; see
  // docs/design/internode.md. 0: kMaxGatheredDomains.
  int32_t gathered_domains = 0;

  [[nodiscard]] constexpr Topology topology() const {
    const int32_t ranks = num_neighbors > 0 ? num_neighbors : num_ranks;
    return {.num_scaleup_ranks = ranks, .num_scaleout_ranks = num_ranks / ranks};
  }
  [[nodiscard]] constexpr bool spans_domains() const { return topology().num_scaleout_ranks > 1; }
  [[nodiscard]] constexpr bool plans_by_counts() const {
    const int32_t max_gathered = gathered_domains > 0 ? gathered_domains : kMaxGatheredDomains;
    return spans_domains() && topology().num_scaleout_ranks > max_gathered;
  }
};

// The regions, in the order in which they lie in the heap.
enum class Region : int32_t {
  kAcknowledged,  // u32 [channels, R]: by peer, the last epoch whose rows of ours it has read
  kAborted,       // u32 [1]: an Aborted, once a peer has given up
  kSent,          // u32 [channels, R]: by source, the last epoch of which it has sent all
  kArrived,  // u64 [channels, R, kMaxFlags]: by source and chunk, arrival_flag of what has arrived
  kRouting,  // i32 [R, max_tokens, K]: topk_idx of every rank, unless plans are by counts
  kScalars,  // f32 [R, max_tokens, K]: scalars that travel with rows, of the domain's R
  kRows,     // bytes [R, max_tokens, row_stride]: rows on their way, FP8 rows with scales; likewise
  // Packets, too, are of the domain's R: other domains' are in the network heap.
  kExpertPackets,  // packets [banks, R, expert_packets]: topk_idx, of low-latency exchanges
  kScalarPackets,  // packets [banks, R, scalar_packets]: scalars that travel with rows, likewise
  kRowPackets,     // packets [banks, R, ll_tokens, row_packets]: rows on their way, likewise
  // From here on the rank's own.
  kCounts,  // u32 [bins, R, tiles]: selections per bin and tile, then the first position of each
  kTotals,  // u32 [bins]: selections per bin
};
inline constexpr int32_t kNumRegions = 12;
inline constexpr int32_t kFirstOwnRegion = static_cast<int32_t>(Region::kCounts);

struct RegionInfo {
  const char* name;
  const char* shape;
  const char* holds;
  int64_t offset;  // bytes from the heap's start
  int64_t bytes;
};

// The regions' places. Trivially copyable: kernels get it as a parameter.
struct HeapLayout {
  int64_t offset[kNumRegions];  // bytes
  int64_t bytes[kNumRegions];
  int64_t row_stride;  // bytes from a staged row to the next, a multiple of 16
  int64_t max_tokens;
  int64_t low_latency_tokens;
  int64_t expert_packets;  // that a bank has room for, of each rank; and so on
  int64_t scalar_packets;
  int64_t row_packets;  // of a row
  int64_t peer_bytes;   // the part that peers map
  int64_t total_bytes;  // of the heap

  constexpr int64_t at(Region region) const { return offset[static_cast<int32_t>(region)]; }
};
// No byte without a value: those of processes are compared as bytes.
static_assert(std::has_unique_object_representations_v<HeapLayout>);

constexpr HeapLayout make_heap_layout(const HeapShape& shape) {
  constexpr int64_t kRegionAlignment = 256;
  constexpr int64_t channels = kNumChannels;
  const int64_t ranks = shape.num_ranks;
  const int64_t neighbors = shape.topology().num_scaleup_ranks;
  const int64_t gathered = shape.plans_by_counts() ? 0 : ranks;
  const int64_t tokens = shape.max_tokens;
  const int64_t topk = shape.num_topk;
  const int64_t bins = num_bins(shape.layout, shape.num_experts, shape.num_ranks);
  HeapLayout layout{};
  // An FP8 row with its scales is never longer.
  layout.row_stride = align_up(shape.hidden * size_bytes(shape.dtype), 16);
  layout.max_tokens = tokens;
  const int64_t ll_tokens = shape.low_latency_tokens;
  layout.low_latency_tokens = ll_tokens;
  layout.expert_packets = num_expert_packets(ll_tokens * topk);
  layout.scalar_packets = num_scalar_packets(ll_tokens * topk);
  layout.row_packets = num_packets(layout.row_stride);
  const int64_t bytes[kNumRegions] = {
      4 * channels * ranks,
      4,
      4 * channels * ranks,
      8 * channels * ranks * kMaxFlags,
      4 * gathered * tokens * topk,
      4 * neighbors * tokens * topk,
      neighbors * tokens * layout.row_stride,
      16 * kLowLatencyBanks * neighbors * layout.expert_packets,
      16 * kLowLatencyBanks * neighbors * layout.scalar_packets,
      16 * kLowLatencyBanks * neighbors * ll_tokens * layout.row_packets,
      4 * ranks * max_num_tiles(tokens, shape.num_ranks) * bins,
      4 * bins,
  };
  int64_t end = 0;
  for (int32_t i = 0; i < kNumRegions; ++i) {
    layout.offset[i] = end;
    layout.bytes[i] = bytes[i];
    end = align_up(end + bytes[i], kRegionAlignment);
    if (i + 1 == kFirstOwnRegion) layout.peer_bytes = end;
  }
  layout.total_bytes = end;
  return layout;
}

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_HEAP_LAYOUT_H_
