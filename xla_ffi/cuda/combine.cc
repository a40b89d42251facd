// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/low_latency_fit.h"
#include "csrc/launch/launch.h"
#include "xla_ffi/cuda/handlers.h"
#include "xla_ffi/cuda/rank_call.h"
#include "xla_ffi/cuda/trace_range.h"
#include "xla_ffi/op_arguments.h"

namespace jax_ep {
namespace {

ffi::Error combine(cudaStream_t stream,
                   int32_t device,
                   ffi::RemainingArgs operands,
                   ffi::RemainingRets results,
                   EpAttrs attrs,
                   int32_t call_site,
                   int32_t domain_size) {
  const TraceRange range("combine", attrs.group_id);
  OpArguments<CombineOp> arguments;
  JAX_EP_FAIL_IF_ERROR(
      read_combine(operands, results, attrs, domain_size, Platform::kCuda, arguments));
  const CombineOp& op = arguments.op;
  RankCall call{.device = device, .stream = stream, .call_site = static_cast<uint32_t>(call_site)};
  JAX_EP_FAIL_IF_ERROR(find_rank(attrs, op.kKind, op.shape, call));
  JAX_EP_FAIL_IF_ERROR(check_rows(call.heap(), op));
  JAX_EP_FAIL_IF_ERROR(check_domain_size(call.heap(), op));
  const bool is_low_latency = fits_low_latency(call.rank->view().layout, op, call.spans_domains());
  if (!is_low_latency || call.spans_domains()) {
    JAX_EP_FAIL_IF_ERROR(say_nobody_is_missing(call, op.missing_ranks));
  }
  if (is_low_latency) {
    return launch_low_latency(call, arguments, launch_low_latency_combine);
  }
  if (call.spans_domains()) return launch_internode(call, arguments, row_bytes_of(op));
  return launch(call, arguments, row_bytes_of(op), launch_combine);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_combine_cuda,
                              combine,
                              with_combine_attrs(bind_call()),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
