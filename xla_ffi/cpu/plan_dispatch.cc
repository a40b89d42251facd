// SPDX-License-Identifier: Apache-2.0
#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/rank_call.h"
#include "xla_ffi/op_arguments.h"

namespace jax_ep {
namespace {

ffi::Future plan_dispatch(CallSiteState* site,
                          ffi::RunId run_id,
                          int32_t device,
                          ffi::RemainingArgs operands,
                          ffi::RemainingRets results,
                          EpAttrs attrs,
                          int32_t dtype,
                          int32_t wire,
                          bool zero_fill) {
  const RankCall call{site, run_id, device};
  const DispatchAttrs own{.dtype = dtype, .wire = wire, .zero_fill = zero_fill};
  OpArguments<PlanDispatchOp> arguments;
  if (Status status = read_plan_dispatch(operands, results, attrs, own, Platform::kCpu, arguments);
      !status.ok()) {
    return refuse_call(call, status);
  }
  return join_rendezvous(call, attrs, arguments.program_rank, arguments.op);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_plan_dispatch_cpu,
                              plan_dispatch,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::State<CallSiteState>>()
                                  .Ctx<ffi::RunId>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<EpAttrs>("ep")
                                  .Attr<int32_t>("dtype")
                                  .Attr<int32_t>("wire")
                                  .Attr<bool>("zero_fill"));

}  // namespace jax_ep
