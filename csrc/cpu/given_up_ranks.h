// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CPU_GIVEN_UP_RANKS_H_
#define JAX_EP_CSRC_CPU_GIVEN_UP_RANKS_H_

#include <cstdint>
#include <mutex>
#include <set>
#include <span>
#include <utility>

namespace jax_ep {

// Ranks that nobody waits for any more, for as long as their group lives. Thread-safe.
class GivenUpRanks {
 public:
  void add(int32_t group_index, std::span<const int32_t> ranks) {
    const std::lock_guard lock(mutex_);
    for (const int32_t rank : ranks) ranks_.emplace(group_index, rank);
  }
  // Whether all of these are given up.
  [[nodiscard]] bool has_all(int32_t group_index, std::span<const int32_t> ranks) const {
    const std::lock_guard lock(mutex_);
    for (const int32_t rank : ranks) {
      if (!ranks_.contains({group_index, rank})) return false;
    }
    return true;
  }

 private:
  mutable std::mutex mutex_;
  std::set<std::pair<int32_t, int32_t>> ranks_;  // group index, rank
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_GIVEN_UP_RANKS_H_
