// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CORE_GROUP_REGISTRY_H_
#define JAX_EP_CSRC_CORE_GROUP_REGISTRY_H_

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

namespace jax_ep {

// What the library holds for a live EP group.
struct GroupInfo {
  std::string name;  // for messages, e.g. "EpGroup 3 (axis 'expert')"
  int32_t num_ranks = 1;
  std::chrono::milliseconds timeout{60'000};
};

// The only process-global state: group id -> group, from creation until close(). Ids are never
// used twice in a process. Thread-safe.
class GroupRegistry {
 public:
  static GroupRegistry& instance();

  int64_t create(GroupInfo info);
  // False if there is no such group (closing twice is harmless).
  bool close(int64_t id);
  [[nodiscard]] std::optional<GroupInfo> find(int64_t id) const;
  [[nodiscard]] int64_t size() const;

 private:
  GroupRegistry() = default;
  struct Impl;
  static Impl& impl();
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_GROUP_REGISTRY_H_
