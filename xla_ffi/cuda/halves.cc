// SPDX-License-Identifier: Apache-2.0
// The halves of an exchange. Both get the operands of the whole operation: the second one needs, of
// what this rank has sent, what stays on it.
#include <string>
#include <vector>

#include "csrc/core/low_latency_fit.h"
#include "csrc/launch/launch.h"
#include "xla_ffi/cuda/handlers.h"
#include "xla_ffi/cuda/rank_call.h"
#include "xla_ffi/cuda/trace_range.h"
#include "xla_ffi/op_arguments.h"

namespace jax_ep {
namespace {

// Operands of the whole operations.
constexpr size_t kDispatchOperands = 5;
constexpr size_t kCombineOperands = 8;

// The operands of the whole among a second half's, which may be one more, a mask of ranks; and the
// ticket, which follows them.
Status split(const Operands& all, size_t num_whole, Operands& whole, RankCall& call) {
  if (all.size() <= num_whole) {
    return Status::invalid_argument("the call has " + std::to_string(all.size()) +
                                    " operands; expected at least " +
                                    std::to_string(num_whole + 1));
  }
  if (all.size() > num_whole + 1 && all[num_whole].element_type() == ffi::DataType::PRED) {
    ++num_whole;
  }
  const Buffer ticket("ticket", all[num_whole]);
  std::vector<ffi::AnyBuffer> first;
  for (size_t i = 0; i < num_whole; ++i) first.push_back(all[i]);
  whole = Operands(std::move(first));
  call.half = Half::kSecond;
  call.ticket = ticket.data<uint32_t>();
  return ticket.check(ffi::DataType::U32, {kTicketWords});
}

const DispatchOp& rows_of(const PlanDispatchOp& op) { return op.dispatch; }
const CombineOp& rows_of(const CombineOp& op) { return op; }

template <typename Op>
ffi::Error launch_half(const EpAttrs& attrs,
                       const OpArguments<Op>& arguments,
                       RankCall& call,
                       LaunchKernel<Op> launch_kernel) {
  const Op& op = arguments.op;
  JAX_EP_FAIL_IF_ERROR(find_rank(attrs, op.kKind, shape_of(op), call));
  JAX_EP_FAIL_IF_ERROR(check_rows(call.heap(), rows_of(op)));
  if (call.spans_domains() || !fits_low_latency(call.rank->view().layout, op)) {
    return Failure{
        {StatusCode::kFailedPrecondition,
         "half of a " + std::string(name(op.kKind)) +
             " of a call that has none: the program was traced with a group of another config"}};
  }
  return launch_low_latency(call, arguments, launch_kernel);
}

RankCall call_of(cudaStream_t stream, int32_t device, int32_t call_site) {
  return {.device = device, .stream = stream, .call_site = static_cast<uint32_t>(call_site)};
}

ffi::Error dispatch_start(cudaStream_t stream,
                          int32_t device,
                          ffi::RemainingArgs operands,
                          ffi::RemainingRets results,
                          EpAttrs attrs,
                          int32_t call_site,
                          int64_t recv_capacity,
                          int32_t dtype,
                          int32_t wire,
                          bool zero_fill) {
  const TraceRange range("dispatch_start", attrs.group_id);
  const DispatchAttrs own{.dtype = dtype, .wire = wire, .zero_fill = zero_fill};
  RankCall call = call_of(stream, device, call_site);
  call.half = Half::kFirst;
  OpArguments<PlanDispatchOp> arguments;
  JAX_EP_FAIL_IF_ERROR(
      read_dispatch_start(operands, results, attrs, own, recv_capacity, arguments, call.ticket));
  return launch_half(attrs, arguments, call, launch_low_latency_dispatch);
}

ffi::Error dispatch_done(cudaStream_t stream,
                         int32_t device,
                         ffi::RemainingArgs operands,
                         ffi::RemainingRets results,
                         EpAttrs attrs,
                         int32_t call_site,
                         int32_t dtype,
                         int32_t wire,
                         bool zero_fill) {
  const TraceRange range("dispatch_done", attrs.group_id);
  const DispatchAttrs own{.dtype = dtype, .wire = wire, .zero_fill = zero_fill};
  RankCall call = call_of(stream, device, call_site);
  Operands whole(std::vector<ffi::AnyBuffer>{});
  JAX_EP_FAIL_IF_ERROR(split(operands, kDispatchOperands, whole, call));
  OpArguments<PlanDispatchOp> arguments;
  JAX_EP_FAIL_IF_ERROR(read_plan_dispatch(whole, results, attrs, own, Platform::kCuda, arguments));
  return launch_half(attrs, arguments, call, launch_low_latency_dispatch);
}

ffi::Error combine_start(cudaStream_t stream,
                         int32_t device,
                         ffi::RemainingArgs operands,
                         ffi::RemainingRets results,
                         EpAttrs attrs,
                         int32_t call_site,
                         int32_t domain_size) {
  const TraceRange range("combine_start", attrs.group_id);
  RankCall call = call_of(stream, device, call_site);
  call.half = Half::kFirst;
  OpArguments<CombineOp> arguments;
  JAX_EP_FAIL_IF_ERROR(
      read_combine_start(operands, results, attrs, domain_size, arguments, call.ticket));
  return launch_half(attrs, arguments, call, launch_low_latency_combine);
}

ffi::Error combine_done(cudaStream_t stream,
                        int32_t device,
                        ffi::RemainingArgs operands,
                        ffi::RemainingRets results,
                        EpAttrs attrs,
                        int32_t call_site,
                        int32_t domain_size) {
  const TraceRange range("combine_done", attrs.group_id);
  RankCall call = call_of(stream, device, call_site);
  Operands whole(std::vector<ffi::AnyBuffer>{});
  JAX_EP_FAIL_IF_ERROR(split(operands, kCombineOperands, whole, call));
  OpArguments<CombineOp> arguments;
  JAX_EP_FAIL_IF_ERROR(
      read_combine(whole, results, attrs, domain_size, Platform::kCuda, arguments));
  return launch_half(attrs, arguments, call, launch_low_latency_combine);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_dispatch_start_cuda,
                              dispatch_start,
                              with_dispatch_attrs(bind_call().Attr<int64_t>("recv_capacity")),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_dispatch_done_cuda,
                              dispatch_done,
                              with_dispatch_attrs(bind_call()),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_combine_start_cuda,
                              combine_start,
                              with_combine_attrs(bind_call()),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_combine_done_cuda,
                              combine_done,
                              with_combine_attrs(bind_call()),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
