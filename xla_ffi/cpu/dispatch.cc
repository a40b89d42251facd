// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/calls.h"
#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/rank_call.h"
#include "xla_ffi/op_arguments.h"

namespace jax_ep {
namespace {

ffi::Future dispatch(CpuSite* site,
                     ffi::RunId run_id,
                     int32_t device,
                     ffi::AnyBuffer program_rank,
                     ffi::AnyBuffer x,
                     ffi::AnyBuffer token_scalars,
                     ffi::AnyBuffer topk_idx,
                     ffi::AnyBuffer slot,
                     ffi::AnyBuffer row_source,
                     ffi::Result<ffi::AnyBuffer> rows,
                     ffi::Result<ffi::AnyBuffer> row_scalars,
                     EpAttrs attrs,
                     int32_t wire,
                     bool zero_fill) {
  const DispatchBuffers buffers{.program_rank = {"program_rank", program_rank},
                                .x = {"x", x},
                                .token_scalars = {"token_scalars", token_scalars},
                                .topk_idx = {"topk_idx", topk_idx},
                                .slot = {"slot", slot},
                                .row_source = {"row_source", row_source},
                                .rows = {"rows", rows},
                                .row_scalars = {"row_scalars", row_scalars}};
  DispatchArguments arguments;
  const CpuCaller caller{site, run_id, device};
  if (Status status = check_dispatch(attrs, wire, buffers, arguments); !status.ok()) {
    return refuse_call(caller, status);
  }
  return join_site(caller,
                   attrs,
                   buffers.program_rank,
                   DispatchCall{.shape = arguments.shape,
                                .hidden = arguments.hidden,
                                .scalars = arguments.scalars,
                                .dtype = arguments.dtype,
                                .wire = arguments.wire,
                                .zero_fill = zero_fill,
                                .x = buffers.x.data<const void>(),
                                .token_scalars = buffers.token_scalars.data<const float>(),
                                .topk_idx = buffers.topk_idx.data<const int32_t>(),
                                .slot = buffers.slot.data<const int32_t>(),
                                .row_source = buffers.row_source.data<const int32_t>(),
                                .rows = buffers.rows.data<void>(),
                                .row_scalars = buffers.row_scalars.data<float>()});
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_dispatch_cpu,
                              dispatch,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::State<CpuSite>>()
                                  .Ctx<ffi::RunId>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<ffi::AnyBuffer>()  // program_rank
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<ffi::AnyBuffer>()  // token_scalars
                                  .Arg<ffi::AnyBuffer>()  // topk_idx
                                  .Arg<ffi::AnyBuffer>()  // slot
                                  .Arg<ffi::AnyBuffer>()  // row_source
                                  .Ret<ffi::AnyBuffer>()  // rows
                                  .Ret<ffi::AnyBuffer>()  // row_scalars
                                  .Attr<EpAttrs>("ep")
                                  .Attr<int32_t>("wire")
                                  .Attr<bool>("zero_fill"));

}  // namespace jax_ep
