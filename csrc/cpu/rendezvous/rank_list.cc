// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/rendezvous/rank_list.h"

namespace jax_ep {

std::string format_ranks(std::span<const int32_t> ranks) {
  std::string text;
  for (size_t begin = 0; begin < ranks.size();) {
    size_t end = begin + 1;
    while (end < ranks.size() && ranks[end] == ranks[end - 1] + 1) ++end;
    // A range from three on: "0,1" reads better than "0-1".
    if (end - begin < 3) end = begin + 1;
    if (!text.empty()) text += ',';
    text += std::to_string(ranks[begin]);
    if (end - begin > 1) text += '-' + std::to_string(ranks[end - 1]);
    begin = end;
  }
  return text;
}

}  // namespace jax_ep
