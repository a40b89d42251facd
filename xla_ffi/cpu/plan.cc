// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/calls.h"
#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/rank_call.h"
#include "xla_ffi/op_arguments.h"

namespace jax_ep {
namespace {

ffi::Future plan(CpuSite* site,
                 ffi::RunId run_id,
                 int32_t device,
                 ffi::AnyBuffer program_rank,
                 ffi::AnyBuffer topk_idx,
                 ffi::Result<ffi::AnyBuffer> slot,
                 ffi::Result<ffi::AnyBuffer> row_source,
                 ffi::Result<ffi::AnyBuffer> row_topk_idx,
                 ffi::Result<ffi::AnyBuffer> source_slot,
                 ffi::Result<ffi::AnyBuffer> group_sizes,
                 ffi::Result<ffi::AnyBuffer> tokens_per_expert,
                 ffi::Result<ffi::AnyBuffer> num_dropped,
                 EpAttrs attrs) {
  const PlanBuffers buffers{.program_rank = {"program_rank", program_rank},
                            .topk_idx = {"topk_idx", topk_idx},
                            .slot = {"slot", slot},
                            .row_source = {"row_source", row_source},
                            .row_topk_idx = {"row_topk_idx", row_topk_idx},
                            .source_slot = {"source_slot", source_slot},
                            .group_sizes = {"group_sizes", group_sizes},
                            .tokens_per_expert = {"tokens_per_expert", tokens_per_expert},
                            .num_dropped = {"num_dropped", num_dropped}};
  PlanArguments arguments;
  const CpuCaller caller{site, run_id, device};
  if (Status status = check_plan(attrs, buffers, SourceSlot::kAbsent, arguments); !status.ok()) {
    return refuse_call(caller, status);
  }
  return join_site(caller,
                   attrs,
                   buffers.program_rank,
                   PlanCall{.shape = arguments.shape,
                            .topk_idx = buffers.topk_idx.data<const int32_t>(),
                            .slot = buffers.slot.data<int32_t>(),
                            .row_source = buffers.row_source.data<int32_t>(),
                            .row_topk_idx = buffers.row_topk_idx.data<int32_t>(),
                            .group_sizes = buffers.group_sizes.data<int32_t>(),
                            .tokens_per_expert = buffers.tokens_per_expert.data<int32_t>(),
                            .num_dropped = buffers.num_dropped.data<int32_t>()});
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_plan_cpu,
                              plan,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::State<CpuSite>>()
                                  .Ctx<ffi::RunId>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<ffi::AnyBuffer>()  // program_rank
                                  .Arg<ffi::AnyBuffer>()  // topk_idx
                                  .Ret<ffi::AnyBuffer>()  // slot
                                  .Ret<ffi::AnyBuffer>()  // row_source
                                  .Ret<ffi::AnyBuffer>()  // row_topk_idx
                                  .Ret<ffi::AnyBuffer>()  // source_slot
                                  .Ret<ffi::AnyBuffer>()  // group_sizes
                                  .Ret<ffi::AnyBuffer>()  // tokens_per_expert
                                  .Ret<ffi::AnyBuffer>()  // num_dropped
                                  .Attr<EpAttrs>("ep"));

}  // namespace jax_ep
