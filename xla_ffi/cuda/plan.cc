// SPDX-License-Identifier: Apache-2.0
#include "csrc/launch/launch.h"
#include "xla_ffi/cuda/handlers.h"
#include "xla_ffi/cuda/rank_call.h"
#include "xla_ffi/cuda/trace_range.h"
#include "xla_ffi/op_arguments.h"

namespace jax_ep {
namespace {

ffi::Error plan(cudaStream_t stream,
                int32_t device,
                ffi::RemainingArgs operands,
                ffi::RemainingRets results,
                EpAttrs attrs,
                int32_t call_site) {
  const TraceRange range("plan", attrs.group_id);
  OpArguments<PlanOp> arguments;
  JAX_EP_FAIL_IF_ERROR(read_plan(operands, results, attrs, Platform::kCuda, arguments));
  const PlanOp& op = arguments.op;
  RankCall call{.device = device, .stream = stream, .call_site = static_cast<uint32_t>(call_site)};
  JAX_EP_FAIL_IF_ERROR(find_rank(attrs, op.kKind, op.shape, call));
  if (call.spans_domains()) return launch_internode(call, arguments, 0);
  return launch(call, arguments, 0, launch_plan);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_plan_cuda,
                              plan,
                              bind_call(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
