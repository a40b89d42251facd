// SPDX-License-Identifier: Apache-2.0
#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/rank_call.h"
#include "xla_ffi/op_arguments.h"

namespace jax_ep {
namespace {

ffi::Future dispatch(CallSiteState* site,
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
  return take_part<DispatchOp>(call, attrs, [&](auto& arguments) {
    return read_dispatch(operands, results, attrs, own, Platform::kCpu, arguments);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_dispatch_cpu, dispatch, with_dispatch_attrs(bind_call()));

}  // namespace jax_ep
