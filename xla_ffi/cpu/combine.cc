// SPDX-License-Identifier: Apache-2.0
#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/rank_call.h"
#include "xla_ffi/op_arguments.h"

namespace jax_ep {
namespace {

ffi::Future combine(CallSiteState* site,
                    ffi::RunId run_id,
                    int32_t device,
                    ffi::RemainingArgs operands,
                    ffi::RemainingRets results,
                    EpAttrs attrs,
                    int32_t domain_size) {
  const RankCall call{site, run_id, device};
  return take_part<CombineOp>(call, attrs, [&](auto& arguments) {
    return read_combine(operands, results, attrs, domain_size, Platform::kCpu, arguments);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_combine_cpu, combine, with_combine_attrs(bind_call()));

}  // namespace jax_ep
