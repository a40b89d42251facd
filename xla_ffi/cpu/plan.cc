// SPDX-License-Identifier: Apache-2.0
#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/rank_call.h"
#include "xla_ffi/op_arguments.h"

namespace jax_ep {
namespace {

ffi::Future plan(CallSiteState* site,
                 ffi::RunId run_id,
                 int32_t device,
                 ffi::RemainingArgs operands,
                 ffi::RemainingRets results,
                 EpAttrs attrs) {
  const RankCall call{site, run_id, device};
  OpArguments<PlanOp> arguments;
  if (Status status = read_plan(operands, results, attrs, Platform::kCpu, arguments);
      !status.ok()) {
    return refuse_call(call, status);
  }
  return join_rendezvous(call, attrs, arguments.program_rank, arguments.op);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_plan_cpu,
                              plan,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::State<CallSiteState>>()
                                  .Ctx<ffi::RunId>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<EpAttrs>("ep"));

}  // namespace jax_ep
