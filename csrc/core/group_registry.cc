// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/group_registry.h"

#include <mutex>
#include <unordered_map>
#include <utility>

namespace jax_ep {

struct GroupRegistry::Impl {
  std::mutex mutex;
  std::unordered_map<int64_t, GroupInfo> groups;
  int64_t next_id = 1;
};

// Never destroyed: threads may still look groups up while the process exits.
GroupRegistry& GroupRegistry::instance() {
  static auto* const registry = new GroupRegistry;
  return *registry;
}

GroupRegistry::Impl& GroupRegistry::impl() {
  static auto* const impl = new Impl;
  return *impl;
}

int64_t GroupRegistry::create(GroupInfo info) {
  Impl& state = impl();
  const std::lock_guard lock(state.mutex);
  const int64_t id = state.next_id++;
  state.groups.emplace(id, std::move(info));
  return id;
}

bool GroupRegistry::close(int64_t id) {
  Impl& state = impl();
  const std::lock_guard lock(state.mutex);
  return state.groups.erase(id) > 0;
}

std::optional<GroupInfo> GroupRegistry::find(int64_t id) const {
  Impl& state = impl();
  const std::lock_guard lock(state.mutex);
  const auto it = state.groups.find(id);
  if (it == state.groups.end()) return std::nullopt;
  return it->second;
}

int64_t GroupRegistry::size() const {
  Impl& state = impl();
  const std::lock_guard lock(state.mutex);
  return static_cast<int64_t>(state.groups.size());
}

}  // namespace jax_ep
