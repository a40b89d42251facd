// SPDX-License-Identifier: Apache-2.0
// What the handlers for platform CUDA have in common.
#ifndef JAX_EP_XLA_FFI_CUDA_RANK_CALL_H_
#define JAX_EP_XLA_FFI_CUDA_RANK_CALL_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>

#include "csrc/core/kernel_params.h"
#include "csrc/core/status.h"
#include "csrc/runtime/cuda_group.h"
#include "csrc/runtime/cuda_status.h"
#include "csrc/tuning/heuristics.h"
#include "xla/ffi/api/ffi.h"
#include "xla_ffi/op_arguments.h"

namespace jax_ep {

// One rank's execution of a custom call. Its group lives as long.
struct RankCall {
  int32_t device = 0;  // its ordinal
  cudaStream_t stream = nullptr;
  uint32_t call_site = 0;  // see call_tag
  Half half = Half::kBoth;
  uint32_t* ticket = nullptr;  // of half an exchange
  std::shared_ptr<CudaGroup> group = nullptr;
  const RankContext* rank = nullptr;

  [[nodiscard]] const HeapShape& heap() const { return group->config().group.heap; }
  [[nodiscard]] bool spans_domains() const { return rank->internode_kernels() != nullptr; }
};

// What every handler is bound to, in this order, before attributes of its own.
inline auto bind_call() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Ctx<ffi::DeviceOrdinal>()
      .RemainingArgs()
      .RemainingRets()
      .Attr<EpAttrs>("ep")
      .Attr<int32_t>("call_site");
}

// Finds the rank of a call on its device. FailedPrecondition if the group has been closed or has no
// rank there, RankContext::error() if a kernel of the rank has given up, InvalidArgument if the
// call does not fit the group's heap.
Status find_rank(const EpAttrs& attrs, OpKind op, const EpShape& shape, RankCall& call);

// InvalidArgument unless the rows of an operation fit the heap, and are aligned as its kernels
// need. A first half has no results.
Status check_rows(const HeapShape& heap, const DispatchOp& op);
Status check_rows(const HeapShape& heap, const CombineOp& op);

// Of a call that is to say which ranks were missing, and not one of the low-latency kernels: says
// that nobody was, for a rank that does not come ends the call. InvalidArgument between domains.
Status say_nobody_is_missing(const RankCall& call, uint8_t* missing_ranks);

// InvalidArgument unless a combine sums as a group that spans domains does.
Status check_domain_size(const HeapShape& heap, const CombineOp& op);

// Bytes of a row of the operation, in its dtype.
inline int64_t row_bytes_of(const PlanDispatchOp& op) {
  return op.dispatch.hidden * size_bytes(op.dispatch.dtype);
}
inline int64_t row_bytes_of(const CombineOp& op) { return op.hidden * size_bytes(op.dtype); }

template <typename Op>
using LaunchKernel = cudaError_t (*)(const KernelParams<Op>&, const LaunchShape&, cudaStream_t);

// Launches the kernel of an op; of which kind, for messages.
template <typename Op, typename Launch>
ffi::Error launch_as(const char* kind,
                     const RankCall& call,
                     const OpArguments<Op>& arguments,
                     const LaunchShape& shape,
                     const Launch& launch_kernel) {
  KernelParams<Op> params{.view = call.rank->view(),
                          .call_tag = call_tag_of(arguments.op, call.call_site),
                          .program_rank = arguments.program_rank,
                          .half = call.half,
                          .ticket = call.ticket,
                          .op = arguments.op};
  params.view.rank_mask = rank_mask_of(arguments.op);
  const DeviceGuard guard(call.device);
  JAX_EP_FAIL_IF_ERROR(guard.status());
  const cudaError_t error = launch_kernel(params, shape, call.stream);
  const std::string what = "launch_" + std::string(kind) + std::string(name(Op::kKind));
  return to_error(cuda_status(error, what.c_str(), __FILE__, __LINE__));
}

// The high-throughput kernel of an op that moves rows of so many bytes (0: none).
template <typename Op>
ffi::Error launch(const RankCall& call,
                  const OpArguments<Op>& arguments,
                  int64_t row_bytes,
                  LaunchKernel<Op> launch_kernel) {
  const EpShape& sizes = shape_of(arguments.op);
  const LaunchShape shape = launch_shape(Op::kKind,
                                         sizes,
                                         row_bytes,
                                         call.rank->sm_budget(),
                                         wire_of(arguments.op),
                                         call.group->choice_of(Op::kKind, false, sizes.num_tokens));
  return launch_as("", call, arguments, shape, launch_kernel);
}

// The one between domains, in a group that spans some.
template <typename Op>
ffi::Error launch_internode(const RankCall& call,
                            const OpArguments<Op>& arguments,
                            int64_t row_bytes) {
  const LaunchShape shape = internode_launch_shape(Op::kKind,
                                                   shape_of(arguments.op),
                                                   row_bytes,
                                                   call.rank->sm_budget(),
                                                   call.heap().plans_by_counts());
  return launch_as("internode_", call, arguments, shape, [&call](const auto&... with) {
    return call.rank->internode_kernels()->launch(with...);
  });
}

// The low-latency one, of an op that fits_low_latency; within one domain `launch_kernel`'s.
template <typename Op>
ffi::Error launch_low_latency(const RankCall& call,
                              const OpArguments<Op>& arguments,
                              LaunchKernel<Op> launch_kernel) {
  const EpShape& sizes = shape_of(arguments.op);
  const LaunchShape shape =
      low_latency_launch_shape(Op::kKind,
                               sizes,
                               row_bytes_of(arguments.op),
                               call.rank->sm_budget(),
                               call.spans_domains(),
                               call.group->choice_of(Op::kKind, true, sizes.num_tokens));
  if (!call.spans_domains()) {
    return launch_as("low_latency_", call, arguments, shape, launch_kernel);
  }
  return launch_as("internode_low_latency_", call, arguments, shape, [&call](const auto&... with) {
    return call.rank->internode_kernels()->launch_low_latency(with...);
  });
}

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CUDA_RANK_CALL_H_
