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

ffi::Error dispatch(cudaStream_t stream,
                    int32_t device,
                    ffi::AnyBuffer program_rank,
                    ffi::AnyBuffer x,
                    ffi::AnyBuffer token_scalars,
                    ffi::AnyBuffer topk_idx,
                    ffi::AnyBuffer slot,
                    ffi::AnyBuffer row_source,
                    ffi::AnyBuffer source_slot_arg,
                    ffi::Result<ffi::AnyBuffer> rows,
                    ffi::Result<ffi::AnyBuffer> row_scalars,
                    EpAttrs attrs,
                    int32_t wire,
                    bool zero_fill,
                    int32_t place) {
  const DispatchBuffers buffers{.program_rank = {"program_rank", program_rank},
                                .x = {"x", x},
                                .token_scalars = {"token_scalars", token_scalars},
                                .topk_idx = {"topk_idx", topk_idx},
                                .slot = {"slot", slot},
                                .row_source = {"row_source", row_source},
                                .rows = {"rows", rows},
                                .row_scalars = {"row_scalars", row_scalars}};
  const Buffer source_slot("source_slot", source_slot_arg);
  DispatchArguments arguments;
  JAX_EP_FAIL_IF_ERROR(check_dispatch(attrs, wire, buffers, arguments));
  const EpShape& shape = arguments.shape;
  JAX_EP_FAIL_IF_ERROR(check_source_slot(source_slot, shape));
  CudaSite site;
  JAX_EP_FAIL_IF_ERROR(find_site(attrs, device, "dispatch", shape, site));
  JAX_EP_FAIL_IF_ERROR(
      check_rows_fit(site.heap(), arguments.hidden, arguments.dtype, arguments.wire));
  const int64_t row_bytes = arguments.hidden * size_bytes(arguments.dtype);
  const int64_t least_bytes = arguments.wire == Wire::kFloat8E4M3 ? arguments.hidden : row_bytes;
  JAX_EP_FAIL_IF_ERROR(
      check_rows_aligned("x", buffers.x.data<const void>(), shape.num_tokens, least_bytes));
  JAX_EP_FAIL_IF_ERROR(check_rows_aligned(
      "rows", buffers.rows.data<const void>(), shape.recv_capacity, least_bytes));
  DispatchParams params{.view = site.rank->view(),
                        .shape = shape,
                        .call_tag = 0,
                        .hidden = arguments.hidden,
                        .scalars = arguments.scalars,
                        .dtype = arguments.dtype,
                        .wire = arguments.wire,
                        .x_format = RowFormat::kDType,
                        .rows_format = RowFormat::kDType,
                        .zero_fill = zero_fill,
                        .program_rank = buffers.program_rank.data<const int32_t>(),
                        .x = buffers.x.data<const void>(),
                        .x_scales = nullptr,
                        .token_scalars = buffers.token_scalars.data<const float>(),
                        .topk_idx = buffers.topk_idx.data<const int32_t>(),
                        .slot = buffers.slot.data<const int32_t>(),
                        .row_source = buffers.row_source.data<const int32_t>(),
                        .source_slot = source_slot.data<const int32_t>(),
                        .rows = buffers.rows.data<void>(),
                        .rows_scales = nullptr,
                        .row_scalars = buffers.row_scalars.data<float>()};
  const LaunchShape launch =
      launch_shape(OpKind::kDispatch, shape, row_bytes, site.rank->sm_budget());
  params.call_tag = call_tag_of(params, static_cast<uint32_t>(place));
  const DeviceGuard guard(device);
  JAX_EP_FAIL_IF_ERROR(guard.status());
  return to_error(JAX_EP_CUDA_STATUS(launch_dispatch(params, launch, stream)));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_dispatch_cuda,
                              dispatch,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<ffi::AnyBuffer>()  // program_rank
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<ffi::AnyBuffer>()  // token_scalars
                                  .Arg<ffi::AnyBuffer>()  // topk_idx
                                  .Arg<ffi::AnyBuffer>()  // slot
                                  .Arg<ffi::AnyBuffer>()  // row_source
                                  .Arg<ffi::AnyBuffer>()  // source_slot
                                  .Ret<ffi::AnyBuffer>()  // rows
                                  .Ret<ffi::AnyBuffer>()  // row_scalars
                                  .Attr<EpAttrs>("ep")
                                  .Attr<int32_t>("wire")
                                  .Attr<bool>("zero_fill")
                                  .Attr<int32_t>("place"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
