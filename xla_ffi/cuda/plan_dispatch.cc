// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/low_latency_fit.h"
#include "csrc/launch/launch.h"
#include "xla_ffi/cuda/handlers.h"
#include "xla_ffi/cuda/rank_call.h"
#include "xla_ffi/cuda/trace_range.h"
#include "xla_ffi/op_arguments.h"

namespace jax_ep {
namespace {

ffi::Error plan_dispatch(cudaStream_t stream,
                         int32_t device,
                         ffi::RemainingArgs operands,
                         ffi::RemainingRets results,
                         EpAttrs attrs,
                         int32_t call_site,
                         int32_t dtype,
                         int32_t wire,
                         bool zero_fill) {
  const TraceRange range("plan_dispatch", attrs.group_id);
  const DispatchAttrs own{.dtype = dtype, .wire = wire, .zero_fill = zero_fill};
  OpArguments<PlanDispatchOp> arguments;
  JAX_EP_FAIL_IF_ERROR(
      read_plan_dispatch(operands, results, attrs, own, Platform::kCuda, arguments));
  const PlanDispatchOp& op = arguments.op;
  RankCall call{.device = device, .stream = stream, .call_site = static_cast<uint32_t>(call_site)};
  JAX_EP_FAIL_IF_ERROR(find_rank(attrs, op.kKind, shape_of(op), call));
  JAX_EP_FAIL_IF_ERROR(check_rows(call.heap(), op.dispatch));
  const int64_t row_bytes = row_bytes_of(op);
  const bool is_low_latency = fits_low_latency(call.rank->view().layout, op);
  if (!is_low_latency || call.spans_domains()) {
    JAX_EP_FAIL_IF_ERROR(say_nobody_is_missing(call, op.dispatch.missing_ranks));
  }
  if (is_low_latency) {
    return launch_low_latency(call, arguments, launch_low_latency_dispatch);
  }
  const bool internode = call.spans_domains();
  if (!internode && plan_fits_in_dispatch(shape_of(op))) {
    return launch(call, arguments, row_bytes, launch_plan_dispatch);
  }
  const int32_t* rank = arguments.program_rank;
  const OpArguments<PlanOp> plan{.program_rank = rank, .op = op.plan};
  const OpArguments<DispatchOp> dispatch{.program_rank = rank, .op = op.dispatch};
  ffi::Error error =
      internode ? launch_internode(call, plan, 0) : launch(call, plan, 0, launch_plan);
  if (error.failure()) return error;
  return internode ? launch_internode(call, dispatch, row_bytes)
                   : launch(call, dispatch, row_bytes, launch_dispatch);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_plan_dispatch_cuda,
                              plan_dispatch,
                              with_dispatch_attrs(bind_call()),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
