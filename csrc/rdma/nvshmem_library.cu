// SPDX-License-Identifier: Apache-2.0
// libjax_ep_rdma.so: NVSHMEM behind the table of rdma_library.h. Who calls it, and what becomes of
// a process that fails in it: jax_ep/_src/groups/rdma.py. The only host code that includes
// NVSHMEM's headers.
#include <cuda_runtime.h>
#include <nvshmem.h>
#include <nvshmemx.h>

#include <cstring>

#include "csrc/launch/rdma_library.h"
#include "csrc/rdma/nvshmem_kernels.h"

namespace jax_ep {
namespace {

static_assert(sizeof(nvshmemx_uniqueid_t) <= kMaxRdmaIdBytes);

int loaded_version(int32_t version[3]) {
  int numbers[3] = {};
  nvshmemx_vendor_get_version_info(&numbers[0], &numbers[1], &numbers[2]);
  for (int i = 0; i < 3; ++i) version[i] = numbers[i];
  return 0;
}

int make_id(void* id) {
  nvshmemx_uniqueid_t made = NVSHMEMX_UNIQUEID_INITIALIZER;
  const int error = nvshmemx_get_uniqueid(&made);
  std::memcpy(id, &made, sizeof(made));
  return error;
}

int initialize(const void* id, int32_t pe, int32_t num_pes) {
  // NVSHMEM takes the thread's current context, and is not done if there is none: the runtime makes
  // its own current with the first call that needs one.
  if (cudaFree(nullptr) != cudaSuccess) return -1;
  nvshmemx_uniqueid_t copy;
  std::memcpy(&copy, id, sizeof(copy));
  nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
  const int error = nvshmemx_set_attr_uniqueid_args(pe, num_pes, &copy, &attributes);
  if (error != 0) return error;
  return nvshmemx_init_attr(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes);
}

int is_initialized() { return nvshmemx_init_status() >= NVSHMEM_STATUS_IS_INITIALIZED ? 1 : 0; }

int finalize() {
  nvshmem_finalize();
  return 0;
}

void* allocate(size_t bytes) {
  void* const memory = nvshmem_malloc(bytes);
  if (memory == nullptr) return nullptr;
  // After an error it stays allocated: to free it takes all processes.
  const bool zeroed =
      cudaMemset(memory, 0, bytes) == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess;
  return zeroed ? memory : nullptr;
}

void release(void* memory) { nvshmem_free(memory); }

void* map(void* memory, int32_t pe) { return nvshmem_ptr(memory, pe); }

cudaError_t load_kernels() {
  if (cudaError_t e = load_nvshmem_plan(); e != cudaSuccess) return e;
  if (cudaError_t e = load_nvshmem_dispatch(); e != cudaSuccess) return e;
  if (cudaError_t e = load_nvshmem_combine(); e != cudaSuccess) return e;
  if (cudaError_t e = load_nvshmem_low_latency_dispatch(); e != cudaSuccess) return e;
  return load_nvshmem_low_latency_combine();
}

constexpr RdmaLibrary kLibrary = {
    .abi = kRdmaAbi,
    .params_bytes = kRdmaParamsBytes,
    .network_bytes = sizeof(RdmaNetwork),
    .id_bytes = sizeof(nvshmemx_uniqueid_t),
    .built_version = {NVSHMEM_VENDOR_MAJOR_VERSION,
                      NVSHMEM_VENDOR_MINOR_VERSION,
                      NVSHMEM_VENDOR_PATCH_VERSION},
    .loaded_version = loaded_version,
    .make_id = make_id,
    .initialize = initialize,
    .is_initialized = is_initialized,
    .finalize = finalize,
    .allocate = allocate,
    .release = release,
    .map = map,
    .load_kernels = load_kernels,
    .launch_plan = launch_over_nvshmem,
    .launch_dispatch = launch_over_nvshmem,
    .launch_combine = launch_over_nvshmem,
    .launch_low_latency_dispatch = launch_low_latency_over_nvshmem,
    .launch_low_latency_combine = launch_low_latency_over_nvshmem,
};

}  // namespace
}  // namespace jax_ep

extern "C" __attribute__((visibility("default"))) const jax_ep::RdmaLibrary* jax_ep_rdma_library() {
  return &jax_ep::kLibrary;
}
