// SPDX-License-Identifier: Apache-2.0
#include "csrc/runtime/cuda_registry.h"

#include <utility>

#include "csrc/core/group_errors.h"

namespace jax_ep {

// Never destroyed: at exit, handlers may still look groups up, and CUDA may be gone already.
CudaGroupRegistry& CudaGroupRegistry::instance() {
  static auto* const registry = new CudaGroupRegistry;
  return *registry;
}

bool CudaGroupRegistry::add(int64_t id, std::shared_ptr<CudaGroup> group) {
  const std::lock_guard lock(mutex_);
  return groups_.emplace(id, std::move(group)).second;
}

bool CudaGroupRegistry::close(int64_t id) {
  std::shared_ptr<CudaGroup> group;  // freed after the lock is released: CUDA may take its time
  const std::lock_guard lock(mutex_);
  const auto it = groups_.find(id);
  if (it == groups_.end()) return false;
  group = std::move(it->second);
  closed_.insert_or_assign(id, group->config().group.name);
  groups_.erase(it);
  return true;
}

std::shared_ptr<CudaGroup> CudaGroupRegistry::find(int64_t id) const {
  const std::lock_guard lock(mutex_);
  const auto it = groups_.find(id);
  return it == groups_.end() ? nullptr : it->second;
}

Status CudaGroupRegistry::find_open(int64_t id,
                                    std::string_view op,
                                    std::shared_ptr<CudaGroup>& group) const {
  group = find(id);
  if (group != nullptr) return {};
  const std::lock_guard lock(mutex_);
  const auto closed = closed_.find(id);
  return closed == closed_.end() ? unknown_group(id, op) : closed_group(closed->second, op);
}

int64_t CudaGroupRegistry::size() const {
  const std::lock_guard lock(mutex_);
  return static_cast<int64_t>(groups_.size());
}

}  // namespace jax_ep
