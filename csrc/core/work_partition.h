// SPDX-License-Identifier: Apache-2.0
// How the work of a call is cut into pieces that are counted or signaled one by one: what the
// sender and the receiver must agree on. So it depends on the call's sizes and on constants alone,
// and on nothing that may be tuned for one rank (csrc/tuning).
#ifndef JAX_EP_CSRC_CORE_WORK_PARTITION_H_
#define JAX_EP_CSRC_CORE_WORK_PARTITION_H_

#include <cstdint>

#include "csrc/core/ep_shape.h"
#include "csrc/core/limits.h"
#include "csrc/core/protocol.h"

namespace jax_ep {

// Rows are signaled chunk by chunk; a chunk is a run of consecutive tokens of one source rank.
inline constexpr int32_t kMaxChunks = 2048;
// Flags of one source: where routing and rows travel in the same exchange, those of the routing
// come first, and those of the rows follow from kRowFlags on. Else what travels has the first ones.
inline constexpr int32_t kMaxFlags = 4096;
inline constexpr int32_t kRowFlags = kMaxChunks;
static_assert(kMaxFlags == 2 * kMaxChunks);
// The plan counts selections per tile: a longer run of tokens of one source rank.
inline constexpr int32_t kMaxTiles = 64;

// Tokens of a chunk, unless there would be too many chunks. Few: first arrivals come early, and the
// last round of work is even. But a chunk costs a flag for each rank, and its sender and receiver
// stand still for it: routing is little work, the sum of rows is much.
inline constexpr int32_t kMaxPlanChunkTokens = 8;
inline constexpr int32_t kMaxDispatchChunkTokens = 4;
inline constexpr int32_t kMaxCombineChunkTokens = 2;
constexpr int32_t max_chunk_tokens(OpKind op) {
  switch (op) {
    case OpKind::kPlan: return kMaxPlanChunkTokens;
    case OpKind::kDispatch: return kMaxDispatchChunkTokens;
    case OpKind::kPlanDispatch: break;  // has the chunks of both
    case OpKind::kCombine: break;
  }
  return kMaxCombineChunkTokens;
}

// Tokens of a chunk: few, so that a small batch spreads over many warps and a large one arrives
// piece by piece; enough that a large one needs no more than kMaxChunks flags. A function of the
// operation, T and a constant alone, because the sender and the receiver must agree.
inline constexpr int32_t kChunkTarget = 256;  // chunks, for batches that are not large
constexpr int32_t chunk_tokens(OpKind op, int64_t num_tokens, int32_t chunk_target = kChunkTarget) {
  const int64_t target = ceil_div(num_tokens, chunk_target);
  const int64_t max_tokens = max_chunk_tokens(op);
  const int64_t few = target < 1 ? 1 : target > max_tokens ? max_tokens : target;
  const int64_t min_tokens = ceil_div(num_tokens, kMaxChunks);
  return static_cast<int32_t>(few > min_tokens ? few : min_tokens);
}
constexpr int32_t num_chunks(OpKind op, int64_t num_tokens, int32_t chunk_target = kChunkTarget) {
  return static_cast<int32_t>(ceil_div(num_tokens, chunk_tokens(op, num_tokens, chunk_target)));
}

// Parts that the rows of a chunk are cut into, at most `max_parts`: a batch of few chunks spreads
// over many warps nevertheless. Each part of each chunk has a flag; agreed on like chunk_tokens.
constexpr int32_t num_parts(int32_t chunks,
                            int32_t max_parts,
                            int32_t chunk_target = kChunkTarget) {
  const int32_t target = chunks > 0 ? chunk_target / chunks : 1;
  const int32_t parts = target < max_parts ? target : max_parts;
  return parts > 1 ? parts : 1;
}

// Whether a rank tells its peers when it has sent all of a dispatch: not in small calls, in which
// nothing is left to do by then.
constexpr bool tells_all_sent(int64_t num_tokens, int32_t chunk_target = kChunkTarget) {
  return num_tokens >= chunk_target;
}

// What the parts of a row are made of, and so how many there are at most: segments of at most so
// many bytes, of the rows that dispatch sends, and of those that combine sums.
inline constexpr int32_t kDispatchSegmentBytes = 4096;
inline constexpr int32_t kCombineSegmentBytes = 2048;

// About 512 tiles over all ranks, of a multiple of kTileUnit tokens.
inline constexpr int64_t kTileUnit = 8;
constexpr int64_t max_tiles(int32_t num_ranks) {
  return 512 / num_ranks < kMaxTiles ? 512 / num_ranks : kMaxTiles;
}
constexpr int32_t tile_tokens(int64_t num_tokens, int32_t num_ranks) {
  const int64_t tokens = align_up(ceil_div(num_tokens, max_tiles(num_ranks)), kTileUnit);
  return static_cast<int32_t>(tokens < kTileUnit ? kTileUnit : tokens);
}
constexpr int32_t num_tiles(int64_t num_tokens, int32_t num_ranks) {
  return static_cast<int32_t>(ceil_div(num_tokens, tile_tokens(num_tokens, num_ranks)));
}
// The most tiles of any call with at most so many tokens; fewer tokens may make more tiles.
constexpr int64_t max_num_tiles(int64_t max_tokens, int32_t num_ranks) {
  const int64_t units = ceil_div(max_tokens, kTileUnit);
  return units < max_tiles(num_ranks) ? units : max_tiles(num_ranks);
}

// What a plan counts: selections per expert, and in layout "rank" tokens per rank too.
constexpr int32_t num_bins(Layout layout, int32_t num_experts, int32_t num_ranks) {
  return num_experts + (layout == Layout::kRank ? num_ranks : 0);
}

// The most rows that one rank holds of one token.
constexpr int32_t max_rows_per_token(Layout layout, int32_t num_topk, int32_t num_local_experts) {
  if (layout == Layout::kRank) return 1;
  return num_topk < num_local_experts ? num_topk : num_local_experts;
}

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_WORK_PARTITION_H_
