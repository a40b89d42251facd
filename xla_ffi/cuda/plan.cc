// SPDX-License-Identifier: Apache-2.0
#include "csrc/kernels/launch.h"
#include "csrc/runtime/cuda_status.h"
#include "csrc/tuning/heuristics.h"
#include "xla_ffi/cuda/handlers.h"
#include "xla_ffi/cuda/rank_call.h"
#include "xla_ffi/op_arguments.h"

namespace jax_ep {
namespace {

ffi::Error plan(cudaStream_t stream,
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
                EpAttrs attrs,
                int32_t place) {
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
  JAX_EP_FAIL_IF_ERROR(check_plan(attrs, buffers, SourceSlot::kPresent, arguments));
  CudaSite site;
  JAX_EP_FAIL_IF_ERROR(find_site(attrs, device, "plan", arguments.shape, site));
  PlanParams params{.view = site.rank->view(),
                    .shape = arguments.shape,
                    .call_tag = 0,
                    .program_rank = buffers.program_rank.data<const int32_t>(),
                    .topk_idx = buffers.topk_idx.data<const int32_t>(),
                    .slot = buffers.slot.data<int32_t>(),
                    .row_source = buffers.row_source.data<int32_t>(),
                    .row_topk_idx = buffers.row_topk_idx.data<int32_t>(),
                    .source_slot = buffers.source_slot.data<int32_t>(),
                    .group_sizes = buffers.group_sizes.data<int32_t>(),
                    .tokens_per_expert = buffers.tokens_per_expert.data<int32_t>(),
                    .num_dropped = buffers.num_dropped.data<int32_t>()};
  const LaunchShape launch =
      launch_shape(OpKind::kPlan, arguments.shape, 0, site.rank->sm_budget());
  params.call_tag = call_tag_of(params, static_cast<uint32_t>(place));
  const DeviceGuard guard(device);
  JAX_EP_FAIL_IF_ERROR(guard.status());
  return to_error(JAX_EP_CUDA_STATUS(launch_plan(params, launch, stream)));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_plan_cuda,
                              plan,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
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
                                  .Attr<EpAttrs>("ep")
                                  .Attr<int32_t>("place"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
