// SPDX-License-Identifier: Apache-2.0
// The symmetric heap: one table gives every region's place and size. Host sizing, the kernels and
// docs/protocol.md read it; nothing else knows an offset.
//
// Every rank of a group holds one heap of the same layout. Its first part is mapped by the group's
// other ranks; the rest, from `peer_bytes` on, is the rank's own.
#ifndef JAX_EP_CSRC_CORE_HEAP_LAYOUT_H_
#define JAX_EP_CSRC_CORE_HEAP_LAYOUT_H_

#include <cstdint>

#include "csrc/core/dtype.h"
#include "csrc/core/ep_shape.h"

namespace jax_ep {

// Ranks of one scale-up domain, and the largest sizes that the kernels are written for.
inline constexpr int32_t kMaxRanks = 64;
inline constexpr int32_t kMaxTopk = 32;  // a warp's lanes hold the selections of a token
inline constexpr int32_t kMaxExperts = 4096;
inline constexpr int64_t kMaxTokens = int64_t{1} << 20;

// Rows are signaled chunk by chunk; a chunk is a run of consecutive tokens of one source rank.
inline constexpr int32_t kMaxChunks = 1024;
// The plan counts selections per tile: a longer run of tokens of one source rank.
inline constexpr int32_t kMaxTiles = 64;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t align_up(int64_t value, int64_t alignment) {
  return ceil_div(value, alignment) * alignment;
}

// Tokens of a chunk: few, so that a small batch spreads over many warps and a large one arrives
// piece by piece; enough that a large one needs no more than kMaxChunks flags. A function of T and
// a constant alone, because the sender and the receiver must agree.
inline constexpr int32_t kChunkTarget = 128;  // chunks, for batches that are not large
constexpr int32_t chunk_tokens(int64_t num_tokens, int32_t chunk_target = kChunkTarget) {
  const int64_t wanted = ceil_div(num_tokens, chunk_target);
  const int64_t few = wanted < 1 ? 1 : wanted > 8 ? 8 : wanted;
  const int64_t least = ceil_div(num_tokens, kMaxChunks);
  return static_cast<int32_t>(few > least ? few : least);
}
constexpr int32_t num_chunks(int64_t num_tokens, int32_t chunk_target = kChunkTarget) {
  return static_cast<int32_t>(ceil_div(num_tokens, chunk_tokens(num_tokens, chunk_target)));
}

// Parts that the rows of a chunk are cut into, at most `most`: a batch of few chunks spreads over
// many warps nevertheless. Each part of each chunk has a flag; agreed on like chunk_tokens.
constexpr int32_t num_parts(int32_t chunks, int32_t most, int32_t chunk_target = kChunkTarget) {
  const int32_t wanted = chunks > 0 ? chunk_target / chunks : 1;
  const int32_t parts = wanted < most ? wanted : most;
  return parts > 1 ? parts : 1;
}

// About 512 tiles over all ranks, of a multiple of kTileUnit tokens.
inline constexpr int64_t kTileUnit = 8;
constexpr int64_t most_tiles(int32_t num_ranks) {
  return 512 / num_ranks < kMaxTiles ? 512 / num_ranks : kMaxTiles;
}
constexpr int32_t tile_tokens(int64_t num_tokens, int32_t num_ranks) {
  const int64_t tokens = align_up(ceil_div(num_tokens, most_tiles(num_ranks)), kTileUnit);
  return static_cast<int32_t>(tokens < kTileUnit ? kTileUnit : tokens);
}
constexpr int32_t num_tiles(int64_t num_tokens, int32_t num_ranks) {
  return static_cast<int32_t>(ceil_div(num_tokens, tile_tokens(num_tokens, num_ranks)));
}
// The most tiles of any call with at most so many tokens; fewer tokens may make more tiles.
constexpr int64_t max_num_tiles(int64_t max_tokens, int32_t num_ranks) {
  const int64_t least = ceil_div(max_tokens, kTileUnit);
  return least < most_tiles(num_ranks) ? least : most_tiles(num_ranks);
}

// What a plan counts: selections per expert, and in layout "rank" tokens per rank too.
constexpr int32_t num_bins(Layout layout, int32_t num_experts, int32_t num_ranks) {
  return num_experts + (layout == Layout::kRank ? num_ranks : 0);
}

// Up to so many bins a plan runs with many warps; for more, its tables leave room for few.
inline constexpr int32_t kPlanFewBins = 1088;

// The most rows that one rank holds of one token.
constexpr int32_t max_rows_per_token(Layout layout, int32_t num_topk, int32_t num_local_experts) {
  if (layout == Layout::kRank) return 1;
  return num_topk < num_local_experts ? num_topk : num_local_experts;
}

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
};

// The regions, in the order in which they lie in the heap.
enum class Region : int32_t {
  kAcknowledged,  // u32 [R]: by peer, the last epoch whose rows of ours it has read
  kAborted,       // u32 [1]: an Aborted, once a peer has given up
  kArrived,       // u64 [R, kMaxChunks]: by source and chunk, arrival_flag of what has arrived
  kRouting,       // i32 [R, max_tokens, K]: topk_idx of every rank
  kScalars,       // f32 [R, max_tokens, K]: scalars that travel with rows
  kRows,          // bytes [R, max_tokens, row_stride]: rows on their way, FP8 rows with scales
  // From here on the rank's own.
  kCounts,  // u32 [bins, R, tiles]: selections per bin and tile, then the first position of each
  kTotals,  // u32 [bins]: selections per bin
};
inline constexpr int32_t kNumRegions = 8;
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
  int64_t peer_bytes;   // the part that peers map
  int64_t total_bytes;  // of the heap

  constexpr int64_t at(Region region) const { return offset[static_cast<int32_t>(region)]; }
};

constexpr HeapLayout make_heap_layout(const HeapShape& shape) {
  constexpr int64_t kRegionAlignment = 256;
  const int64_t ranks = shape.num_ranks;
  const int64_t tokens = shape.max_tokens;
  const int64_t topk = shape.num_topk;
  const int64_t bins = num_bins(shape.layout, shape.num_experts, shape.num_ranks);
  HeapLayout layout{};
  // An FP8 row with its scales is never longer.
  layout.row_stride = align_up(shape.hidden * size_bytes(shape.dtype), 16);
  layout.max_tokens = tokens;
  const int64_t bytes[kNumRegions] = {
      4 * ranks,
      4,
      8 * ranks * kMaxChunks,
      4 * ranks * tokens * topk,
      4 * ranks * tokens * topk,
      ranks * tokens * layout.row_stride,
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
