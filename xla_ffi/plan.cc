// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/calls.h"
#include "xla_ffi/handlers.h"
#include "xla_ffi/site.h"
#include "xla_ffi/validate.h"

namespace jax_ep {
namespace {

ffi::Future plan(CpuSite* site,
                 ffi::RunId run_id,
                 ffi::AnyBuffer group_rank,
                 ffi::AnyBuffer topk_idx_arg,
                 ffi::Result<ffi::AnyBuffer> slot_ret,
                 ffi::Result<ffi::AnyBuffer> row_source_ret,
                 ffi::Result<ffi::AnyBuffer> row_topk_idx_ret,
                 ffi::Result<ffi::AnyBuffer> group_sizes_ret,
                 ffi::Result<ffi::AnyBuffer> tokens_per_expert_ret,
                 ffi::Result<ffi::AnyBuffer> num_dropped_ret,
                 EpAttrs attrs) {
  using enum ffi::DataType;
  const Buffer topk_idx("topk_idx", topk_idx_arg);
  const Buffer slot("slot", slot_ret);
  const Buffer row_source("row_source", row_source_ret);
  const Buffer row_topk_idx("row_topk_idx", row_topk_idx_ret);
  const Buffer group_sizes("group_sizes", group_sizes_ret);
  const Buffer tokens_per_expert("tokens_per_expert", tokens_per_expert_ret);
  const Buffer num_dropped("num_dropped", num_dropped_ret);

  JAX_EP_FAIL_IF_ERROR(row_source.check(S32, {kAny}));
  EpShape shape;
  JAX_EP_FAIL_IF_ERROR(make_shape(attrs, topk_idx.dim(0), row_source.dim(0), shape));
  JAX_EP_FAIL_IF_ERROR(topk_idx.check(S32, {shape.num_tokens, shape.num_topk}));
  JAX_EP_FAIL_IF_ERROR(slot.check(S32, {shape.num_tokens, shape.num_topk}));
  if (shape.layout == Layout::kRank) {
    JAX_EP_FAIL_IF_ERROR(row_topk_idx.check(S32, {shape.recv_capacity, shape.num_topk}));
  } else {
    JAX_EP_FAIL_IF_ERROR(row_topk_idx.check(S32, {0}));
  }
  JAX_EP_FAIL_IF_ERROR(group_sizes.check(S32, {shape.num_row_groups()}));
  JAX_EP_FAIL_IF_ERROR(tokens_per_expert.check(S32, {shape.num_local_experts()}));
  JAX_EP_FAIL_IF_ERROR(num_dropped.check(S32, {}));

  return join_site(site,
                   run_id,
                   attrs,
                   group_rank,
                   PlanCall{.shape = shape,
                            .topk_idx = topk_idx.data<const int32_t>(),
                            .slot = slot.data<int32_t>(),
                            .row_source = row_source.data<int32_t>(),
                            .row_topk_idx = row_topk_idx.data<int32_t>(),
                            .group_sizes = group_sizes.data<int32_t>(),
                            .tokens_per_expert = tokens_per_expert.data<int32_t>(),
                            .num_dropped = num_dropped.data<int32_t>()});
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_plan_cpu,
                              plan,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::State<CpuSite>>()
                                  .Ctx<ffi::RunId>()
                                  .Arg<ffi::AnyBuffer>()  // group_rank
                                  .Arg<ffi::AnyBuffer>()  // topk_idx
                                  .Ret<ffi::AnyBuffer>()  // slot
                                  .Ret<ffi::AnyBuffer>()  // row_source
                                  .Ret<ffi::AnyBuffer>()  // row_topk_idx
                                  .Ret<ffi::AnyBuffer>()  // group_sizes
                                  .Ret<ffi::AnyBuffer>()  // tokens_per_expert
                                  .Ret<ffi::AnyBuffer>()  // num_dropped
                                  .Attr<EpAttrs>("ep"));

}  // namespace jax_ep
