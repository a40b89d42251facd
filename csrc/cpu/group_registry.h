// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CPU_GROUP_REGISTRY_H_
#define JAX_EP_CSRC_CPU_GROUP_REGISTRY_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "csrc/core/group_errors.h"
#include "csrc/core/status.h"
#include "csrc/cpu/given_up_ranks.h"

namespace jax_ep {

// Which rank a device is, and of which of the EP groups that the mesh's other axes make.
struct RankPlace {
  int32_t group_index = 0;
  int32_t rank = 0;

  bool operator==(const RankPlace&) const = default;
};

class Flights;
std::shared_ptr<Flights> make_flights();

// What the library holds for a live EP group.
struct GroupInfo {
  int64_t id = 0;
  std::string name = {};  // for messages, e.g. "EpGroup 3 (axis 'expert')"
  int32_t num_ranks = 1;
  std::chrono::milliseconds warn_after{};
  std::chrono::milliseconds timeout{};
  // By device ordinal. This, and nothing that a program computes, says who meets whom: what an
  // operand says of a rank's group may be the same on devices that hold other data.
  std::unordered_map<int32_t, RankPlace> places = {};

  // Set when the group is closed, for those who found it open just before.
  std::shared_ptr<std::atomic<bool>> closed = std::make_shared<std::atomic<bool>>(false);
  // Of a group that goes on without ranks that do not come.
  std::shared_ptr<GivenUpRanks> given_up = std::make_shared<GivenUpRanks>();
  // Exchanges of which the first half has begun. See csrc/cpu/flights/flights.h.
  std::shared_ptr<Flights> flights = make_flights();

  // The device of a rank; -1 if there is none.
  [[nodiscard]] int32_t device_of(const RankPlace& place) const;
};

using GroupInfoPtr = std::shared_ptr<const GroupInfo>;

// Seconds as they come from a user: a number above 0, infinity too. What is longer than a century
// is a century, which no sum of times overflows with.
std::chrono::milliseconds to_milliseconds(double seconds);

// The CPU groups of this process: group id -> group, from creation until close(). An id is the
// caller's choice, never used twice in a process. Thread-safe.
class GroupRegistry {
 public:
  static GroupRegistry& instance();

  // False if there is, or was, a group of that id.
  bool add(GroupInfo info);
  // False if there is no such group (closing twice is harmless).
  bool close(int64_t id);
  // Null if there is no such group.
  [[nodiscard]] GroupInfoPtr find(int64_t id) const;
  // The group for a call of `op`; closed_group or unknown_group if there is none.
  Status find_open(int64_t id, std::string_view op, GroupInfoPtr& info) const;
  [[nodiscard]] int64_t size() const;
  // Those that are open.
  [[nodiscard]] std::vector<GroupInfoPtr> all() const;

 private:
  GroupRegistry() = default;
  struct Impl;
  static Impl& impl();
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_GROUP_REGISTRY_H_
