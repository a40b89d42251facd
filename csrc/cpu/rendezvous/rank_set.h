// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CPU_RENDEZVOUS_RANK_SET_H_
#define JAX_EP_CSRC_CPU_RENDEZVOUS_RANK_SET_H_

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace jax_ep {

// The ranks of a group that take part in a call.
class RankSet {
 public:
  RankSet() = default;  // all
  // `mask` [num_ranks] is not 0 for those that do; null: all do.
  RankSet(const uint8_t* mask, int32_t num_ranks) {
    if (mask == nullptr) return;
    in_.assign(mask, mask + num_ranks);
    if (std::all_of(in_.begin(), in_.end(), [](bool in) { return in; })) in_.clear();
  }
  static RankSet only(int32_t rank, int32_t num_ranks) {
    RankSet set;
    set.in_.assign(static_cast<size_t>(num_ranks), false);
    set.in_[static_cast<size_t>(rank)] = true;
    return set;
  }

  [[nodiscard]] bool has(int32_t rank) const {
    return in_.empty() ||
           (static_cast<size_t>(rank) < in_.size() && in_[static_cast<size_t>(rank)]);
  }
  [[nodiscard]] int32_t count(int32_t num_ranks) const {
    return in_.empty() ? num_ranks : static_cast<int32_t>(std::count(in_.begin(), in_.end(), true));
  }
  // "[1, 1, 0]", for messages.
  [[nodiscard]] std::string text(int32_t num_ranks) const {
    std::string text;
    for (int32_t rank = 0; rank < num_ranks; ++rank) {
      text += (text.empty() ? "[" : ", ") + std::string(has(rank) ? "1" : "0");
    }
    return text + "]";
  }
  bool operator==(const RankSet&) const = default;

 private:
  std::vector<bool> in_;  // empty: all
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_RENDEZVOUS_RANK_SET_H_
