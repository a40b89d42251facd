// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/rendezvous/waits.h"

#include <algorithm>
#include <cstdio>

#include "csrc/cpu/rendezvous/rank_list.h"

namespace jax_ep {
namespace {

std::string ranks_text(std::span<const RankOnDevice> ranks) {
  std::vector<int32_t> numbers;
  for (const RankOnDevice& rank : ranks) numbers.push_back(rank.rank);
  return format_ranks(numbers);
}

const Wait* find_wait_of(int32_t device, std::span<const Wait> all) {
  for (const Wait& wait : all) {
    const auto is_it = [device](const RankOnDevice& rank) { return rank.device == device; };
    if (std::any_of(wait.waiting.begin(), wait.waiting.end(), is_it)) return &wait;
  }
  return nullptr;
}

}  // namespace

std::string format_seconds(std::chrono::milliseconds duration) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g s", static_cast<double>(duration.count()) / 1000);
  return text;
}

std::string describe(const Wait& wait, const GroupInfo& in) {
  return "rank(s) " + ranks_text(wait.waiting) + " wait in " + std::string(wait.op) +
         (wait.group->id == in.id ? "" : " of " + wait.group->name) + " for rank(s) " +
         ranks_text(wait.missing);
}

std::string root_cause(const Wait& wait, std::span<const Wait> all) {
  std::string text;
  std::vector<int32_t> seen;  // devices
  const Wait* at = &wait;
  while (!at->missing.empty()) {
    const RankOnDevice& late = at->missing.front();
    const std::string who =
        "rank " + std::to_string(late.rank) + " (device " + std::to_string(late.device) + ")";
    const Wait* const next = find_wait_of(late.device, all);
    if (!text.empty()) text += "; ";
    if (next == nullptr) {
      return text + who + " is in no operation of an EP group: its program failed, is busy " +
             "elsewhere, or runs something else";
    }
    if (std::find(seen.begin(), seen.end(), late.device) != seen.end()) {
      return text + "they wait for one another: the ranks run different operations, or the same " +
             "ones in another order";
    }
    seen.push_back(late.device);
    text += who + " waits elsewhere: " + describe(*next, *wait.group);
    at = next;
  }
  return text;
}

}  // namespace jax_ep
