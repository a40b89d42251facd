// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_RUNTIME_CUDA_REGISTRY_H_
#define JAX_EP_CSRC_RUNTIME_CUDA_REGISTRY_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>

#include "csrc/runtime/cuda_group.h"

namespace jax_ep {

// Group id -> group on CUDA, from creation until close(). Process-global, because FFI handlers know
// a group by its id only. An id is the same in all processes of a group and in every run, because
// it is part of compiled programs. Thread-safe.
class CudaGroupRegistry {
 public:
  static CudaGroupRegistry& instance();

  // False if there is a group of that id.
  bool add(int64_t id, std::shared_ptr<CudaGroup> group);
  // Forgets a group and, once no handler uses it, frees it. False if there is no such group.
  bool close(int64_t id);
  // Null if there is no such group.
  [[nodiscard]] std::shared_ptr<CudaGroup> find(int64_t id) const;
  // The group for a call of `op`; closed_group or unknown_group if there is none.
  Status find_open(int64_t id, std::string_view op, std::shared_ptr<CudaGroup>& group) const;
  [[nodiscard]] int64_t size() const;

 private:
  CudaGroupRegistry() = default;

  mutable std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<CudaGroup>> groups_;
  std::unordered_map<int64_t, std::string> closed_;  // id -> name
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_RUNTIME_CUDA_REGISTRY_H_
