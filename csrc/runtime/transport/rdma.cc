// SPDX-License-Identifier: Apache-2.0
#include "csrc/runtime/transport/rdma.h"

#include <dlfcn.h>

#include <atomic>
#include <mutex>
#include <utility>

#include "csrc/core/heap_description.h"

namespace jax_ep {
namespace {

std::atomic<const RdmaLibrary*> loaded = nullptr;

Status does_not_load(const std::string& path, const std::string& why) {
  return {StatusCode::kFailedPrecondition, "the RDMA library " + path + " does not load: " + why};
}

bool fits(const RdmaLibrary& library) {
  return library.abi == kRdmaAbi && library.params_bytes == kRdmaParamsBytes &&
         library.network_bytes == sizeof(RdmaNetwork) && library.id_bytes > 0 &&
         library.id_bytes <= kMaxRdmaIdBytes;
}

}  // namespace

Status load_rdma_library(const std::string& path) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  if (rdma_library() != nullptr) return {};
  void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return does_not_load(path, dlerror());
  auto* const function =
      reinterpret_cast<RdmaLibraryFunction*>(dlsym(handle, kRdmaLibraryFunction));
  if (function == nullptr) {
    return does_not_load(path, std::string("it has no ") + kRdmaLibraryFunction);
  }
  const RdmaLibrary* const library = function();
  if (!fits(*library)) {
    return does_not_load(path, "it is of another version of jax_ep; build both together");
  }
  // RELEASE(library): all that the library has set up. ACQUIRE(library) by rdma_library.
  loaded.store(library, std::memory_order_release);
  return {};
}

const RdmaLibrary* rdma_library() { return loaded.load(std::memory_order_acquire); }

Status RdmaHeap::allocate(int64_t bytes) {
  const RdmaLibrary* const library = rdma_library();
  if (library == nullptr || library->is_initialized() == 0) {
    return {StatusCode::kFailedPrecondition, "the RDMA library has not been initialized"};
  }
  base_ = static_cast<std::byte*>(library->allocate(static_cast<size_t>(bytes)));
  if (base_ != nullptr) return {};
  return {StatusCode::kResourceExhausted,
          "a network heap of " + bytes_text(bytes) +
              " does not fit into NVSHMEM's symmetric memory; raise NVSHMEM_SYMMETRIC_SIZE, or "
              "lower hidden or max_tokens_per_rank"};
}

void RdmaHeap::release() {
  if (base_ != nullptr) rdma_library()->release(std::exchange(base_, nullptr));
}

std::byte* RdmaHeap::map(int32_t pe) const {
  return static_cast<std::byte*>(rdma_library()->map(base_, pe));
}

}  // namespace jax_ep
