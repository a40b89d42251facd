// SPDX-License-Identifier: Apache-2.0
// Who waits for whom, as data: for messages, and for a group's health.
#ifndef JAX_EP_CSRC_CPU_RENDEZVOUS_WAITS_H_
#define JAX_EP_CSRC_CPU_RENDEZVOUS_WAITS_H_

#include <chrono>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "csrc/cpu/group_registry.h"

namespace jax_ep {

// A rank and the device that it is.
struct RankOnDevice {
  int32_t rank;
  int32_t device;
};

// Ranks of one EP group that wait for others in one operation.
struct Wait {
  GroupInfoPtr group;
  int32_t group_index = 0;
  std::string_view op;
  std::chrono::steady_clock::time_point since;  // the first of them came
  std::vector<RankOnDevice> waiting;
  std::vector<RankOnDevice> missing;
};

// "0.5 s".
std::string format_seconds(std::chrono::milliseconds duration);

// "rank(s) 0,1,3 wait in plan for rank(s) 2"; with the group's name where that is not `in`.
std::string describe(const Wait& wait, const GroupInfo& in);

// Why the ranks that `wait` lacks may not have come: follows each wait of a missing rank's device,
// in whatever group, to where nobody waits, or to a circle. `all` holds the waits of the process.
std::string root_cause(const Wait& wait, std::span<const Wait> all);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_RENDEZVOUS_WAITS_H_
