// SPDX-License-Identifier: Apache-2.0
// What the handlers of all platforms have in common: the attributes and buffers of each target, and
// their checks. An operand or result that an op can do without is passed with shape [0] (rows that
// do not travel: with H = 0).
#ifndef JAX_EP_XLA_FFI_OP_ARGUMENTS_H_
#define JAX_EP_XLA_FFI_OP_ARGUMENTS_H_

#include <cstdint>
#include <utility>

#include "csrc/core/ops.h"
#include "csrc/core/status.h"
#include "xla/ffi/api/ffi.h"
#include "xla_ffi/buffer.h"

namespace jax_ep {

namespace ffi = xla::ffi;

// The attributes that every target has; one dictionary attribute named "ep".
struct EpAttrs {
  int64_t group_id;
  int32_t num_ranks;
  int32_t num_experts;
  int32_t num_topk;
  int32_t expert_alignment;
  int32_t layout;  // Layout
};

// Those that a dispatch has besides.
struct DispatchAttrs {
  int32_t dtype;  // DType of rows that are not quantized
  int32_t wire;   // Wire
  bool zero_fill;
};

// Binds these, behind all others.
template <typename Binding>
auto with_dispatch_attrs(Binding binding) {
  return std::move(binding)
      .template Attr<int32_t>("dtype")
      .template Attr<int32_t>("wire")
      .template Attr<bool>("zero_fill");
}

// The same of a combine.
template <typename Binding>
auto with_combine_attrs(Binding binding) {
  return std::move(binding).template Attr<int32_t>("domain_size");
}

// Where a handler runs: on CUDA the plan also says which rows hold which token (source_slot), and
// the other operations read it.
enum class Platform { kCpu, kCuda };

// A call of an op, decoded and checked.
template <typename Op>
struct OpArguments {
  const int32_t* program_rank = nullptr;  // [1] in: this rank, as the program says
  Op op;
};

// Each decodes a call's operands and results, whose order and shapes are those of the op's pointers
// in csrc/core/ops.h, after `program_rank`; on CPU without those that are for GPUs only, but for
// the result `source_slot`, which is absent there. `rank_mask` is the last operand, where there is
// one: a call without it has fewer. So is `missing_ranks` the last result of a dispatch that makes
// its plan, and of a combine. InvalidArgument that names the first bad buffer or attribute.
Status read_plan(const Operands& operands,
                 const ffi::RemainingRets& results,
                 const EpAttrs& attrs,
                 Platform platform,
                 OpArguments<PlanOp>& arguments);
Status read_dispatch(const Operands& operands,
                     const ffi::RemainingRets& results,
                     const EpAttrs& attrs,
                     const DispatchAttrs& own,
                     Platform platform,
                     OpArguments<DispatchOp>& arguments);
// The dispatch's operands but for those of a plan, with the routing; the results of both.
Status read_plan_dispatch(const Operands& operands,
                          const ffi::RemainingRets& results,
                          const EpAttrs& attrs,
                          const DispatchAttrs& own,
                          Platform platform,
                          OpArguments<PlanDispatchOp>& arguments);
Status read_combine(const Operands& operands,
                    const ffi::RemainingRets& results,
                    const EpAttrs& attrs,
                    int32_t domain_size,
                    Platform platform,
                    OpArguments<CombineOp>& arguments);

// The same of a first half on GPUs, which has a ticket for its only result.
Status read_dispatch_start(const Operands& operands,
                           const ffi::RemainingRets& results,
                           const EpAttrs& attrs,
                           const DispatchAttrs& own,
                           int64_t recv_capacity,
                           OpArguments<PlanDispatchOp>& arguments,
                           uint32_t*& ticket);
Status read_combine_start(const Operands& operands,
                          const ffi::RemainingRets& results,
                          const EpAttrs& attrs,
                          int32_t domain_size,
                          OpArguments<CombineOp>& arguments,
                          uint32_t*& ticket);

// An error on its way to XLA, which takes it in the type that the handler returns.
struct Failure {
  Status status;
  operator ffi::Error() const;   // NOLINT(google-explicit-constructor)
  operator ffi::Future() const;  // NOLINT(google-explicit-constructor)
};

// Success or the error.
ffi::Error to_error(const Status& status);

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
