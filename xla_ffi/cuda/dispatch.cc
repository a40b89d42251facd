// SPDX-License-Identifier: Apache-2.0
#include "csrc/launch/launch.h"
#include "xla_ffi/cuda/handlers.h"
#include "xla_ffi/cuda/rank_call.h"
#include "xla_ffi/cuda/trace_range.h"
#include "xla_ffi/op_arguments.h"

namespace jax_ep {
namespace {

ffi::Error dispatch(cudaStream_t stream,
                    int32_t device,
                    ffi::RemainingArgs operands,
                    ffi::RemainingRets results,
                    EpAttrs attrs,
                    int32_t call_site,
                    int32_t dtype,
                    int32_t wire,
                    bool zero_fill) {
  const TraceRange range("dispatch", attrs.group_id);
  const DispatchAttrs own{.dtype = dtype, .wire = wire, .zero_fill = zero_fill};
  OpArguments<DispatchOp> arguments;
  JAX_EP_FAIL_IF_ERROR(read_dispatch(operands, results, attrs, own, Platform::kCuda, arguments));
  const DispatchOp& op = arguments.op;
  RankCall call{.device = device, .stream = stream, .call_site = static_cast<uint32_t>(call_site)};
  JAX_EP_FAIL_IF_ERROR(find_rank(attrs, op.kKind, op.shape, call));
  JAX_EP_FAIL_IF_ERROR(check_rows(call.heap(), op));
  const int64_t row_bytes = op.hidden * size_bytes(op.dtype);
  if (call.spans_domains()) return launch_internode(call, arguments, row_bytes);
  return launch(call, arguments, row_bytes, launch_dispatch);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_dispatch_cuda,
                              dispatch,
                              with_dispatch_attrs(bind_call()),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
