// SPDX-License-Identifier: Apache-2.0
// What the handlers of all platforms have in common: the attributes and buffers of each target, and
// their checks. An operand or result that an op can do without is passed with shape [0] (rows that
// do not travel: with H = 0).
#ifndef JAX_EP_XLA_FFI_OP_ARGUMENTS_H_
#define JAX_EP_XLA_FFI_OP_ARGUMENTS_H_

#include <cstdint>
#include <string_view>

#include "csrc/core/dtype.h"
#include "csrc/core/ep_shape.h"
#include "csrc/core/status.h"
#include "xla/ffi/api/ffi.h"
#include "xla_ffi/buffer.h"

namespace jax_ep {

// The attributes that every target has; one dictionary attribute named "ep".
struct EpAttrs {
  int64_t group_id;
  int32_t num_ranks;
  int32_t num_experts;
  int32_t num_topk;
  int32_t expert_alignment;
  int32_t layout;  // Layout
};

// Where a handler runs: on CUDA the plan also says which rows hold which token (source_slot), and
// the other operations read it.
enum class SourceSlot { kAbsent, kPresent };

struct PlanBuffers {
  Buffer program_rank;       // int32 [1] in: this rank, as the program says
  Buffer topk_idx;           // int32 [T, K] in
  Buffer slot;               // int32 [T, K] out
  Buffer row_source;         // int32 [C] out
  Buffer row_topk_idx;       // int32 [C, K] out; absent in layout "expert"
  Buffer source_slot;        // int32 [R * T, J] out, or absent
  Buffer group_sizes;        // int32 [num_row_groups] out
  Buffer tokens_per_expert;  // int32 [L] out
  Buffer num_dropped;        // int32 [] out
};

struct DispatchBuffers {
  Buffer program_rank;   // int32 [1] in
  Buffer x;              // rows [T, H] in
  Buffer token_scalars;  // float32 [T, K] in, or absent
  Buffer topk_idx;       // int32 [T, K] in
  Buffer slot;           // int32 [T, K] in
  Buffer row_source;     // int32 [C] in
  Buffer rows;           // rows [C, H] out
  Buffer row_scalars;    // float32 [C] or [C, K] out; absent with token_scalars
};

struct CombineBuffers {
  Buffer program_rank;   // int32 [1] in
  Buffer y;              // rows [C, H] in
  Buffer weights;        // float32 [C] or [C, K] in, or absent
  Buffer row_scalars;    // float32 [C] or [C, K] in, or absent
  Buffer topk_idx;       // int32 [T, K] in
  Buffer slot;           // int32 [T, K] in
  Buffer out;            // rows [T, H] out
  Buffer token_scalars;  // float32 [T, K] out; absent with row_scalars
};

// What the buffers and attributes of a call say.
struct PlanArguments {
  EpShape shape;
};
struct DispatchArguments {
  EpShape shape;
  int64_t hidden;
  int32_t scalars;  // K, or 0: none travel
  DType dtype;
  Wire wire;
};
struct CombineArguments {
  EpShape shape;
  int64_t hidden;
  bool weighted;
  int32_t scalars;  // K, or 0: none travel
  DType dtype;
};

// Each returns InvalidArgument that names the first bad buffer or attribute.
Status check_plan(const EpAttrs& attrs,
                  const PlanBuffers& buffers,
                  SourceSlot source_slot,
                  PlanArguments& arguments);
Status check_dispatch(const EpAttrs& attrs,
                      int32_t wire,
                      const DispatchBuffers& buffers,
                      DispatchArguments& arguments);
Status check_combine(const EpAttrs& attrs,
                     const CombineBuffers& buffers,
                     CombineArguments& arguments);

// InvalidArgument unless the buffer is the int32 [R * T, J] that a plan of this shape yields.
Status check_source_slot(const Buffer& buffer, const EpShape& shape);

// An error on its way to XLA, which takes it in the type that the handler returns.
struct Failure {
  Status status;
  operator xla::ffi::Error() const;   // NOLINT(google-explicit-constructor)
  operator xla::ffi::Future() const;  // NOLINT(google-explicit-constructor)
};

// Success or the error.
xla::ffi::Error to_error(const Status& status);

}  // namespace jax_ep

// In a handler: returns the error to XLA.
#define JAX_EP_FAIL_IF_ERROR(expression)                          \
  do {                                                            \
    if (::jax_ep::Status status_ = (expression); !status_.ok()) { \
      return ::jax_ep::Failure{status_};                          \
    }                                                             \
  } while (false)

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_ep::EpAttrs,
                                      xla::ffi::StructMember<int64_t>("group_id"),
                                      xla::ffi::StructMember<int32_t>("num_ranks"),
                                      xla::ffi::StructMember<int32_t>("num_experts"),
                                      xla::ffi::StructMember<int32_t>("num_topk"),
                                      xla::ffi::StructMember<int32_t>("expert_alignment"),
                                      xla::ffi::StructMember<int32_t>("layout"));

#endif  // JAX_EP_XLA_FFI_OP_ARGUMENTS_H_
