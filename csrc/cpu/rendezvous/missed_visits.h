// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CPU_RENDEZVOUS_MISSED_VISITS_H_
#define JAX_EP_CSRC_CPU_RENDEZVOUS_MISSED_VISITS_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include "csrc/cpu/rendezvous/rank_set.h"

namespace jax_ep {

// How many visits of a call site the others have made without a rank. The rank makes them when it
// comes, in program order: its next arrivals are those, and not ones that the others are waiting
// at. So a rank that is behind never meets another visit's ranks, however far behind it is.
class MissedVisits {
 public:
  using Key = std::pair<int64_t, int32_t>;  // run_id, group_index

  // Ranks of a mask have missed a visit.
  void add(const Key& key, const RankSet& mask, std::span<const int32_t> ranks);
  // Whether a rank's arrival under a mask is a visit that it has missed. It is one less then.
  bool take(const Key& key, const RankSet& mask, int32_t rank);

 private:
  // Of a run whose ranks do not come any more nobody takes them: the oldest ones are forgotten. All
  // EP groups of a run together, and far more runs than JAX launches ahead of a device.
  static constexpr size_t kMaxRuns = 1024;

  struct OfMask {
    RankSet mask;
    std::map<int32_t, int64_t> missed;  // by rank, above 0
  };
  struct OfRun {
    int64_t run_id;
    std::map<int32_t, std::vector<OfMask>> groups;  // by group_index
  };
  std::deque<OfRun>::iterator find(int64_t run_id);

  std::deque<OfRun> runs_;  // that which missed a visit last is at the end
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_RENDEZVOUS_MISSED_VISITS_H_
