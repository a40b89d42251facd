// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/group_registry.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <mutex>
#include <utility>

namespace jax_ep {
namespace {

// Names of closed groups that are remembered for messages.
constexpr size_t kMaxClosed = 4096;

}  // namespace

struct GroupRegistry::Impl {
  std::mutex mutex;
  std::unordered_map<int64_t, GroupInfoPtr> groups;
  std::unordered_map<int64_t, std::string> closed;  // id -> name
  std::deque<int64_t> closed_order;                 // oldest first
};

int32_t GroupInfo::device_of(const RankPlace& place) const {
  const auto it = std::find_if(
      places.begin(), places.end(), [&](const auto& entry) { return entry.second == place; });
  return it == places.end() ? -1 : it->first;
}

std::chrono::milliseconds to_milliseconds(double seconds) {
  constexpr double kCentury = 100 * 365.25 * 86400;
  return std::chrono::milliseconds(
      static_cast<int64_t>(std::ceil(std::min(seconds, kCentury) * 1e3)));
}

// Never destroyed: threads may still look groups up while the process exits.
GroupRegistry& GroupRegistry::instance() {
  static auto* const registry = new GroupRegistry;
  return *registry;
}

GroupRegistry::Impl& GroupRegistry::impl() {
  static auto* const impl = new Impl;
  return *impl;
}

bool GroupRegistry::add(GroupInfo info) {
  Impl& state = impl();
  const std::lock_guard lock(state.mutex);
  const int64_t id = info.id;
  if (state.closed.contains(id)) return false;
  return state.groups.emplace(id, std::make_shared<const GroupInfo>(std::move(info))).second;
}

bool GroupRegistry::close(int64_t id) {
  Impl& state = impl();
  const std::lock_guard lock(state.mutex);
  const auto it = state.groups.find(id);
  if (it == state.groups.end()) return false;
  it->second->closed->store(true);
  state.closed.emplace(id, it->second->name);
  state.closed_order.push_back(id);
  if (state.closed_order.size() > kMaxClosed) {
    state.closed.erase(state.closed_order.front());
    state.closed_order.pop_front();
  }
  state.groups.erase(it);
  return true;
}

GroupInfoPtr GroupRegistry::find(int64_t id) const {
  Impl& state = impl();
  const std::lock_guard lock(state.mutex);
  const auto it = state.groups.find(id);
  return it == state.groups.end() ? nullptr : it->second;
}

Status GroupRegistry::find_open(int64_t id, std::string_view op, GroupInfoPtr& info) const {
  info = find(id);
  if (info != nullptr) return {};
  Impl& state = impl();
  const std::lock_guard lock(state.mutex);
  const auto closed = state.closed.find(id);
  return closed == state.closed.end() ? unknown_group(id, op) : closed_group(closed->second, op);
}

int64_t GroupRegistry::size() const {
  Impl& state = impl();
  const std::lock_guard lock(state.mutex);
  return static_cast<int64_t>(state.groups.size());
}

std::vector<GroupInfoPtr> GroupRegistry::all() const {
  Impl& state = impl();
  const std::lock_guard lock(state.mutex);
  std::vector<GroupInfoPtr> groups;
  for (const auto& [id, info] : state.groups) groups.push_back(info);
  return groups;
}

}  // namespace jax_ep
