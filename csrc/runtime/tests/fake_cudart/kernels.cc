// SPDX-License-Identifier: Apache-2.0
// Stands for csrc/kernels: loads nothing, and records what is launched.
#include <cuda_runtime_api.h>

#include <string_view>

#include "csrc/launch/launch.h"
#include "csrc/runtime/tests/fake_cudart/process.h"

extern "C" cudaError_t cudaFuncSetAttribute(const void* function,
                                            cudaFuncAttribute attribute,
                                            int value) {
  jax_ep::fake_cudart::Call call("cudaFuncSetAttribute");
  if (call.refused()) return call.end();
  const bool known =
      function != nullptr && value > 0 && attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
  return call.end(known ? cudaSuccess : cudaErrorInvalidValue);
}

namespace jax_ep {
namespace {

using fake_cudart::Call;
using fake_cudart::Launch;
using fake_cudart::Thread;

// As many as csrc/kernels compiles: four of plan, and six each, for three dtypes and two layouts,
// of dispatch with and without products, of combine and of a plan with its dispatch, and of the
// last two of low latency, which also come in a kind that leaves out missing ranks.
constexpr int kNumKernels = 52;
// And between domains: two of plan, and six each of dispatch with and without products, of combine,
// and of the last two of low latency.
constexpr int kNumLoopbackKernels = 32;
constexpr char kKernels[kNumKernels + kNumLoopbackKernels] = {};
constexpr int32_t kSharedBytes = 1024;

cudaError_t load(const char* first, int count) {
  for (int i = 0; i < count; ++i) {
    const cudaError_t error =
        cudaFuncSetAttribute(first + i, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename Params>
cudaError_t launch(std::string_view name,
                   const Params& params,
                   const LaunchShape& shape,
                   cudaStream_t stream,
                   const LoopbackNetwork* network = nullptr) {
  Launch launched{
      .device = Thread::current().device, .stream = stream, .shape = shape, .params = params};
  if (network != nullptr) launched.network = *network;
  std::function<void(const Launch&)> kernel;
  {
    Call call(name);
    if (call.refused()) return call.end();
    call->launches.push_back(launched);
    kernel = call->kernel;
  }
  if (kernel) kernel(launched);
  return cudaSuccess;
}

}  // namespace

cudaError_t load_kernels() { return load(kKernels, kNumKernels); }
cudaError_t load_loopback_kernels() { return load(kKernels + kNumKernels, kNumLoopbackKernels); }

int32_t shared_bytes_per_block() { return kSharedBytes; }

cudaError_t launch_plan(const PlanParams& params, const LaunchShape& shape, cudaStream_t stream) {
  return launch("launch_plan", params, shape, stream);
}

cudaError_t launch_dispatch(const DispatchParams& params,
                            const LaunchShape& shape,
                            cudaStream_t stream) {
  return launch("launch_dispatch", params, shape, stream);
}

cudaError_t launch_combine(const CombineParams& params,
                           const LaunchShape& shape,
                           cudaStream_t stream) {
  return launch("launch_combine", params, shape, stream);
}

cudaError_t launch_plan_dispatch(const PlanDispatchParams& params,
                                 const LaunchShape& shape,
                                 cudaStream_t stream) {
  return launch("launch_plan_dispatch", params, shape, stream);
}

cudaError_t launch_low_latency_dispatch(const PlanDispatchParams& params,
                                        const LaunchShape& shape,
                                        cudaStream_t stream) {
  return launch("launch_low_latency_dispatch", params, shape, stream);
}

cudaError_t launch_low_latency_combine(const CombineParams& params,
                                       const LaunchShape& shape,
                                       cudaStream_t stream) {
  return launch("launch_low_latency_combine", params, shape, stream);
}

template <typename Op>
cudaError_t launch_over_loopback(const KernelParams<Op>& params,
                                 const LoopbackNetwork& network,
                                 const LaunchShape& shape,
                                 cudaStream_t stream) {
  return launch("launch_over_loopback", params, shape, stream, &network);
}
template cudaError_t launch_over_loopback(const PlanParams&,
                                          const LoopbackNetwork&,
                                          const LaunchShape&,
                                          cudaStream_t);
template cudaError_t launch_over_loopback(const DispatchParams&,
                                          const LoopbackNetwork&,
                                          const LaunchShape&,
                                          cudaStream_t);
template cudaError_t launch_over_loopback(const CombineParams&,
                                          const LoopbackNetwork&,
                                          const LaunchShape&,
                                          cudaStream_t);

template <typename Op>
cudaError_t launch_low_latency_over_loopback(const KernelParams<Op>& params,
                                             const LoopbackNetwork& network,
                                             const LaunchShape& shape,
                                             cudaStream_t stream) {
  return launch("launch_low_latency_over_loopback", params, shape, stream, &network);
}
template cudaError_t launch_low_latency_over_loopback(const PlanDispatchParams&,
                                                      const LoopbackNetwork&,
                                                      const LaunchShape&,
                                                      cudaStream_t);
template cudaError_t launch_low_latency_over_loopback(const CombineParams&,
                                                      const LoopbackNetwork&,
                                                      const LaunchShape&,
                                                      cudaStream_t);

}  // namespace jax_ep
