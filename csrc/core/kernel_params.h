// SPDX-License-Identifier: Apache-2.0
// What the kernels are launched with. The same for the GPU and for the simulator.
//
// Pointers are to the rank's own memory unless they say otherwise; shapes as in csrc/cpu/calls.h.
#ifndef JAX_EP_CSRC_CORE_KERNEL_PARAMS_H_
#define JAX_EP_CSRC_CORE_KERNEL_PARAMS_H_

#include <cstddef>
#include <cstdint>

#include "csrc/core/dtype.h"
#include "csrc/core/ep_shape.h"
#include "csrc/core/error_record.h"
#include "csrc/core/heap_layout.h"
#include "csrc/core/protocol.h"

namespace jax_ep {

// A rank of a group, as its kernels see it. Constant while the group lives.
struct RankView {
  HeapLayout layout;
  std::byte* heap[kMaxRanks];  // every rank's heap, as mapped by this rank
  uint32_t* control;           // see Control; never freed, and so are the next two
  ErrorRecord* error;          // in host memory that the device writes
  uint64_t* long_waits;        // [R] likewise: by peer, a LongWait, once there is one
  uint64_t report_ns;          // a wait is reported after this long, and twice, four times ...
  uint64_t timeout_ns;         // at most 2^61
  int32_t rank;
  int32_t num_ranks;
  int32_t chunk_target = kChunkTarget;  // see chunk_tokens; the same on all ranks
};

// Routing -> row of every selection at its destination, and the counts.
struct PlanParams {
  RankView view;
  EpShape shape;
  uint32_t call_tag;
  const int32_t* program_rank;  // [1] in: this rank, as the program says; must be the view's
  const int32_t* topk_idx;      // [T, K] in; what is not in [-1, E) counts as -1
  int32_t* slot;                // [T, K] out
  int32_t* row_source;          // [C] out
  int32_t* row_topk_idx;        // [C, K] out, kRank only
  int32_t* source_slot;         // [R * T, J] out: rows that this rank holds of each token of each
                                // rank, ascending, then -1; J = max_rows_per_token
  int32_t* group_sizes;         // [num_row_groups] out
  int32_t* tokens_per_expert;   // [L] out
  int32_t* num_dropped;         // [] out
};

// How rows look outside the kernels: in `dtype`, or quantized with their scales.
enum class RowFormat : int32_t {
  kDType = 0,
  kFloat8E4M3 = 1,  // float8_e4m3fn [.., H] and float32 scales [.., ceil(H / kScaleBlock)]
};

// Rows and scalars travel from their tokens to their slots.
struct DispatchParams {
  RankView view;
  EpShape shape;
  uint32_t call_tag;
  int64_t hidden;   // H, elements; 0: no rows travel
  int32_t scalars;  // K: one float32 per selection travels too; 0: none does
  DType dtype;
  Wire wire;
  RowFormat x_format;     // kFloat8E4M3 needs the FP8 wire
  RowFormat rows_format;  // kFloat8E4M3 needs the FP8 wire
  bool zero_fill;
  const int32_t* program_rank;  // [1] in
  const void* x;                // [T, H] in
  const float* x_scales;        // [T, ceil(H / 128)] in, x_format kFloat8E4M3 only
  const float* token_scalars;   // [T, K] in
  const int32_t* topk_idx;      // [T, K] in
  const int32_t* slot;          // [T, K] in
  const int32_t* row_source;    // [C] in
  const int32_t* source_slot;   // [R * T, J] in
  void* rows;                   // [C, H] out
  float* rows_scales;           // [C, ceil(H / 128)] out, rows_format kFloat8E4M3 only
  float* row_scalars;           // [C] (kExpert) or [C, K] (kRank) out
};

// Rows travel back and are summed; row scalars travel back to their selections.
struct CombineParams {
  RankView view;
  EpShape shape;
  uint32_t call_tag;
  int64_t hidden;  // H; 0: no rows travel
  bool weighted;
  int32_t scalars;  // K: row_scalars travel back; 0: they don't
  DType dtype;
  const int32_t* program_rank;  // [1] in
  const void* y;                // [C, H] in
  const float* weights;         // [C] (kExpert) or [C, K] (kRank) in if weighted
  const float* row_scalars;     // like weights, in if scalars > 0
  const int32_t* topk_idx;      // [T, K] in
  const int32_t* slot;          // [T, K] in
  const int32_t* row_topk_idx;  // [C, K] in, kRank and weighted only
  const int32_t* source_slot;   // [R * T, J] in
  void* out;                    // [T, H] out
  float* token_scalars;         // [T, K] out if scalars > 0; 0 where slot < 0
};

// The tag of a call, which goes into `call_tag` (0 until then). `place`: see csrc/core/protocol.h.
constexpr uint32_t call_tag_of(const PlanParams& params, uint32_t place) {
  return call_tag(params.shape, 0, DType::kFloat32, Wire::kSame, 0, false, place);
}
constexpr uint32_t call_tag_of(const DispatchParams& params, uint32_t place) {
  return call_tag(
      params.shape, params.hidden, params.dtype, params.wire, params.scalars, false, place);
}
constexpr uint32_t call_tag_of(const CombineParams& params, uint32_t place) {
  return call_tag(params.shape,
                  params.hidden,
                  params.dtype,
                  Wire::kSame,
                  params.scalars,
                  params.weighted,
                  place);
}

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_KERNEL_PARAMS_H_
