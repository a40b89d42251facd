// SPDX-License-Identifier: Apache-2.0
// The library for RDMA of this process, once it has been loaded, and network heaps in its memory.
// Another transport: internode_kernels.h says where it goes.
#ifndef JAX_EP_CSRC_RUNTIME_TRANSPORT_RDMA_H_
#define JAX_EP_CSRC_RUNTIME_TRANSPORT_RDMA_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "csrc/core/status.h"
#include "csrc/launch/rdma_library.h"
#include "csrc/runtime/transport/internode_kernels.h"

namespace jax_ep {

// Loads the library at a path, for good; again is no error. FailedPrecondition if it does not load,
// or is of another version of jax_ep.
Status load_rdma_library(const std::string& path);
// Null if none has been loaded. Thread-safe, like the one above.
const RdmaLibrary* rdma_library();

// A rank's network heap in symmetric memory. To allocate it and to give it back takes all processes
// of the job; whether all do is for the caller to know, so nothing is given back by a destructor.
class RdmaHeap {
 public:
  // FailedPrecondition if no library is loaded, or it is not initialized; ResourceExhausted if
  // there is too little memory: says what to raise.
  Status allocate(int64_t bytes);
  void release();

  [[nodiscard]] std::byte* base() const { return base_; }
  // Where a process's heap is mapped here; null if it is not.
  [[nodiscard]] std::byte* map(int32_t pe) const;

 private:
  std::byte* base_ = nullptr;
};

// Kernels that reach other domains by RDMA.
class RdmaKernels final : public InternodeKernels {
 public:
  explicit RdmaKernels(const RdmaNetwork& network) : network_(network) {}

  [[nodiscard]] cudaError_t launch(const PlanParams& params,
                                   const LaunchShape& shape,
                                   cudaStream_t stream) const override {
    return rdma_library()->launch_plan(params, network_, shape, stream);
  }
  [[nodiscard]] cudaError_t launch(const DispatchParams& params,
                                   const LaunchShape& shape,
                                   cudaStream_t stream) const override {
    return rdma_library()->launch_dispatch(params, network_, shape, stream);
  }
  [[nodiscard]] cudaError_t launch(const CombineParams& params,
                                   const LaunchShape& shape,
                                   cudaStream_t stream) const override {
    return rdma_library()->launch_combine(params, network_, shape, stream);
  }
  [[nodiscard]] cudaError_t launch_low_latency(const PlanDispatchParams& params,
                                               const LaunchShape& shape,
                                               cudaStream_t stream) const override {
    return rdma_library()->launch_low_latency_dispatch(params, network_, shape, stream);
  }
  [[nodiscard]] cudaError_t launch_low_latency(const CombineParams& params,
                                               const LaunchShape& shape,
                                               cudaStream_t stream) const override {
    return rdma_library()->launch_low_latency_combine(params, network_, shape, stream);
  }

 private:
  RdmaNetwork network_;
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_RUNTIME_TRANSPORT_RDMA_H_
