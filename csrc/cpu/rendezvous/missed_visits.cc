// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/rendezvous/missed_visits.h"

#include <algorithm>

namespace jax_ep {

std::deque<MissedVisits::OfRun>::iterator MissedVisits::find(int64_t run_id) {
  return std::find_if(
      runs_.begin(), runs_.end(), [run_id](const OfRun& run) { return run.run_id == run_id; });
}

void MissedVisits::add(const Key& key, const RankSet& mask, std::span<const int32_t> ranks) {
  if (ranks.empty()) return;
  const auto [run_id, group_index] = key;
  OfRun run{.run_id = run_id, .groups = {}};
  if (const auto at = find(run_id); at != runs_.end()) {
    run = std::move(*at);
    runs_.erase(at);
  }
  std::vector<OfMask>& masks = run.groups[group_index];
  auto of_mask = std::find_if(
      masks.begin(), masks.end(), [&mask](const OfMask& other) { return other.mask == mask; });
  if (of_mask == masks.end()) of_mask = masks.insert(masks.end(), {.mask = mask, .missed = {}});
  for (const int32_t rank : ranks) ++of_mask->missed[rank];
  runs_.push_back(std::move(run));
  if (runs_.size() > kMaxRuns) runs_.pop_front();
}

bool MissedVisits::take(const Key& key, const RankSet& mask, int32_t rank) {
  const auto run = find(key.first);
  if (run == runs_.end()) return false;
  const auto of_group = run->groups.find(key.second);
  if (of_group == run->groups.end()) return false;
  std::vector<OfMask>& masks = of_group->second;
  const auto of_mask = std::find_if(
      masks.begin(), masks.end(), [&mask](const OfMask& other) { return other.mask == mask; });
  if (of_mask == masks.end()) return false;
  const auto missed = of_mask->missed.find(rank);
  if (missed == of_mask->missed.end()) return false;
  if (--missed->second == 0) of_mask->missed.erase(missed);
  if (of_mask->missed.empty()) masks.erase(of_mask);
  if (masks.empty()) run->groups.erase(of_group);
  if (run->groups.empty()) runs_.erase(run);
  return true;
}

}  // namespace jax_ep
