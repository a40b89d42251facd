// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/heap_fit.h"
#include "csrc/core/row_alignment.h"
#include "csrc/kernels/launch.h"
#include "csrc/runtime/cuda_status.h"
#include "csrc/tuning/heuristics.h"
#include "xla_ffi/cuda/handlers.h"
#include "xla_ffi/cuda/rank_call.h"
#include "xla_ffi/op_arguments.h"

namespace jax_ep {
namespace {

ffi::Error combine(cudaStream_t stream,
                   int32_t device,
                   ffi::AnyBuffer program_rank,
                   ffi::AnyBuffer y,
                   ffi::AnyBuffer weights,
                   ffi::AnyBuffer row_scalars,
                   ffi::AnyBuffer topk_idx,
                   ffi::AnyBuffer slot,
                   ffi::AnyBuffer row_topk_idx_arg,
                   ffi::AnyBuffer source_slot_arg,
                   ffi::Result<ffi::AnyBuffer> out,
                   ffi::Result<ffi::AnyBuffer> token_scalars,
                   EpAttrs attrs,
                   int32_t place) {
  const CombineBuffers buffers{.program_rank = {"program_rank", program_rank},
                               .y = {"y", y},
                               .weights = {"weights", weights},
                               .row_scalars = {"row_scalars", row_scalars},
                               .topk_idx = {"topk_idx", topk_idx},
                               .slot = {"slot", slot},
                               .out = {"out", out},
                               .token_scalars = {"token_scalars", token_scalars}};
  const Buffer row_topk_idx("row_topk_idx", row_topk_idx_arg);
  const Buffer source_slot("source_slot", source_slot_arg);
  CombineArguments arguments;
  JAX_EP_FAIL_IF_ERROR(check_combine(attrs, buffers, arguments));
  const EpShape& shape = arguments.shape;
  if (arguments.weighted && shape.layout == Layout::kRank) {
    JAX_EP_FAIL_IF_ERROR(
        row_topk_idx.check(ffi::DataType::S32, {shape.recv_capacity, shape.num_topk}));
  }
  JAX_EP_FAIL_IF_ERROR(check_source_slot(source_slot, shape));
  CudaSite site;
  JAX_EP_FAIL_IF_ERROR(find_site(attrs, device, "combine", shape, site));
  JAX_EP_FAIL_IF_ERROR(check_rows_fit(site.heap(), arguments.hidden, arguments.dtype, Wire::kSame));
  const int64_t row_bytes = arguments.hidden * size_bytes(arguments.dtype);
  JAX_EP_FAIL_IF_ERROR(
      check_rows_aligned("y", buffers.y.data<const void>(), shape.recv_capacity, row_bytes));
  JAX_EP_FAIL_IF_ERROR(
      check_rows_aligned("out", buffers.out.data<const void>(), shape.num_tokens, row_bytes));
  CombineParams params{.view = site.rank->view(),
                       .shape = shape,
                       .call_tag = 0,
                       .hidden = arguments.hidden,
                       .weighted = arguments.weighted,
                       .scalars = arguments.scalars,
                       .dtype = arguments.dtype,
                       .program_rank = buffers.program_rank.data<const int32_t>(),
                       .y = buffers.y.data<const void>(),
                       .weights = buffers.weights.data<const float>(),
                       .row_scalars = buffers.row_scalars.data<const float>(),
                       .topk_idx = buffers.topk_idx.data<const int32_t>(),
                       .slot = buffers.slot.data<const int32_t>(),
                       .row_topk_idx = row_topk_idx.data<const int32_t>(),
                       .source_slot = source_slot.data<const int32_t>(),
                       .out = buffers.out.data<void>(),
                       .token_scalars = buffers.token_scalars.data<float>()};
  const LaunchShape launch =
      launch_shape(OpKind::kCombine, shape, row_bytes, site.rank->sm_budget());
  params.call_tag = call_tag_of(params, static_cast<uint32_t>(place));
  const DeviceGuard guard(device);
  JAX_EP_FAIL_IF_ERROR(guard.status());
  return to_error(JAX_EP_CUDA_STATUS(launch_combine(params, launch, stream)));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_combine_cuda,
                              combine,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<ffi::AnyBuffer>()  // program_rank
                                  .Arg<ffi::AnyBuffer>()  // y
                                  .Arg<ffi::AnyBuffer>()  // weights
                                  .Arg<ffi::AnyBuffer>()  // row_scalars
                                  .Arg<ffi::AnyBuffer>()  // topk_idx
                                  .Arg<ffi::AnyBuffer>()  // slot
                                  .Arg<ffi::AnyBuffer>()  // row_topk_idx
                                  .Arg<ffi::AnyBuffer>()  // source_slot
                                  .Ret<ffi::AnyBuffer>()  // out
                                  .Ret<ffi::AnyBuffer>()  // token_scalars
                                  .Attr<EpAttrs>("ep")
                                  .Attr<int32_t>("place"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
