// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/calls.h"
#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/rank_call.h"
#include "xla_ffi/op_arguments.h"

namespace jax_ep {
namespace {

ffi::Future combine(CpuSite* site,
                    ffi::RunId run_id,
                    int32_t device,
                    ffi::AnyBuffer program_rank,
                    ffi::AnyBuffer y,
                    ffi::AnyBuffer weights,
                    ffi::AnyBuffer row_scalars,
                    ffi::AnyBuffer topk_idx,
                    ffi::AnyBuffer slot,
                    ffi::Result<ffi::AnyBuffer> out,
                    ffi::Result<ffi::AnyBuffer> token_scalars,
                    EpAttrs attrs) {
  const CombineBuffers buffers{.program_rank = {"program_rank", program_rank},
                               .y = {"y", y},
                               .weights = {"weights", weights},
                               .row_scalars = {"row_scalars", row_scalars},
                               .topk_idx = {"topk_idx", topk_idx},
                               .slot = {"slot", slot},
                               .out = {"out", out},
                               .token_scalars = {"token_scalars", token_scalars}};
  CombineArguments arguments;
  const CpuCaller caller{site, run_id, device};
  if (Status status = check_combine(attrs, buffers, arguments); !status.ok()) {
    return refuse_call(caller, status);
  }
  return join_site(caller,
                   attrs,
                   buffers.program_rank,
                   CombineCall{.shape = arguments.shape,
                               .hidden = arguments.hidden,
                               .weighted = arguments.weighted,
                               .scalars = arguments.scalars,
                               .dtype = arguments.dtype,
                               .y = buffers.y.data<const void>(),
                               .weights = buffers.weights.data<const float>(),
                               .row_scalars = buffers.row_scalars.data<const float>(),
                               .topk_idx = buffers.topk_idx.data<const int32_t>(),
                               .slot = buffers.slot.data<const int32_t>(),
                               .out = buffers.out.data<void>(),
                               .token_scalars = buffers.token_scalars.data<float>()});
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_combine_cpu,
                              combine,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::State<CpuSite>>()
                                  .Ctx<ffi::RunId>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<ffi::AnyBuffer>()  // program_rank
                                  .Arg<ffi::AnyBuffer>()  // y
                                  .Arg<ffi::AnyBuffer>()  // weights
                                  .Arg<ffi::AnyBuffer>()  // row_scalars
                                  .Arg<ffi::AnyBuffer>()  // topk_idx
                                  .Arg<ffi::AnyBuffer>()  // slot
                                  .Ret<ffi::AnyBuffer>()  // out
                                  .Ret<ffi::AnyBuffer>()  // token_scalars
                                  .Attr<EpAttrs>("ep"));

}  // namespace jax_ep
