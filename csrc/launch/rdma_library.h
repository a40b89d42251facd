// SPDX-License-Identifier: Apache-2.0
// What a library for RDMA offers, and all that is known of it outside: a table of functions, which
// `jax_ep_rdma_library` of the shared library returns. It is loaded when a group spans hosts; so
// what does not, needs neither it nor what it is linked with. The one there is stands on NVSHMEM
// (csrc/rdma); tests have a fake of it.
//
// Life: `initialize` once in a process, with all others of the job; then for each group `allocate`,
// `load_kernels`, launches, and `release`; at last `finalize`. All but launches are called by one
// thread at a time, with the rank's device current; `allocate`, `release` and `finalize` are
// collective over all processes of the job.
#ifndef JAX_EP_CSRC_LAUNCH_RDMA_LIBRARY_H_
#define JAX_EP_CSRC_LAUNCH_RDMA_LIBRARY_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/core/kernel_params.h"
#include "csrc/tuning/launch_shape.h"

namespace jax_ep {

struct RdmaNetwork {
  NetworkView network;
  SymmetricHeaps heaps;
};

// Raise it with every change of the table, or of what is passed through it.
inline constexpr uint32_t kRdmaAbi = 5;
inline constexpr int32_t kMaxRdmaIdBytes = 1024;

template <typename Op>
using RdmaLaunch = cudaError_t (*)(const KernelParams<Op>& params,
                                   const RdmaNetwork& network,
                                   const LaunchShape& shape,
                                   cudaStream_t stream);

struct RdmaLibrary {
  uint32_t abi;              // kRdmaAbi; the sizes catch what was forgotten
  uint32_t params_bytes;     // of the parameters of all launches, and of a LaunchShape
  uint32_t network_bytes;    // sizeof(RdmaNetwork)
  int32_t id_bytes;          // of a job's id, at most kMaxRdmaIdBytes
  int32_t built_version[3];  // of what it was built with, NVSHMEM for one

  // Of what it has found: it must do what that one did. Needs no GPU.
  int (*loaded_version)(int32_t version[3]);
  // Of a new job, for all its processes. Needs no GPU. These return 0, or an error of the
  // library's.
  int (*make_id)(void* id);
  // Waits for all processes of the job, without limit.
  int (*initialize)(const void* id, int32_t pe, int32_t num_pes);
  // Whether that has been done: it may return 0 though it failed.
  int (*is_initialized)();
  int (*finalize)();

  // Symmetric memory, zeroed; null if there is too little of it.
  void* (*allocate)(size_t bytes);
  void (*release)(void* memory);
  // Where this process maps a peer's; null if it does not.
  void* (*map)(void* memory, int32_t pe);

  // As those of csrc/launch/launch.h.
  cudaError_t (*load_kernels)();
  RdmaLaunch<PlanOp> launch_plan;
  RdmaLaunch<DispatchOp> launch_dispatch;
  RdmaLaunch<CombineOp> launch_combine;
  RdmaLaunch<PlanDispatchOp> launch_low_latency_dispatch;
  RdmaLaunch<CombineOp> launch_low_latency_combine;
};

inline constexpr uint32_t kRdmaParamsBytes = sizeof(PlanParams) + sizeof(DispatchParams) +
                                             sizeof(CombineParams) + sizeof(PlanDispatchParams) +
                                             sizeof(LaunchShape);

// What the shared library exports.
inline constexpr char kRdmaLibraryFunction[] = "jax_ep_rdma_library";
using RdmaLibraryFunction = const RdmaLibrary*();

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_LAUNCH_RDMA_LIBRARY_H_
