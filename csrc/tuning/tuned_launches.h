// SPDX-License-Identifier: Apache-2.0
// Which launches of a group were found to be faster than the model's (heuristics.h), by measuring:
// `python -m jax_ep tune`. What is chosen here moves work between the blocks and warps of one rank.
// It changes no bit of a result, and ranks need not choose alike.
#ifndef JAX_EP_CSRC_TUNING_TUNED_LAUNCHES_H_
#define JAX_EP_CSRC_TUNING_TUNED_LAUNCHES_H_

#include <cstdint>
#include <vector>

#include "csrc/core/protocol.h"
#include "csrc/core/status.h"

namespace jax_ep {

// Whether a dispatch ends on idle SMs.
enum class Tail : int32_t { kModel = -1, kOff = 0, kOn = 1 };

// What a launch should be like, as far as its call allows it; by default, as the model says.
struct LaunchChoice {
  int32_t num_sms = 0;  // blocks at most; 0: the operation's default
  // Warps of a block that send first, all but one at most: one is left to receive, and of a
  // dispatch with its plan to make that. 0: the model's.
  int32_t num_senders = 0;
  Tail tail = Tail::kModel;

  friend bool operator==(const LaunchChoice&, const LaunchChoice&) = default;
};

// Calls of one operation: kPlanDispatch or kCombine.
struct TunedLaunch {
  OpKind op;
  bool low_latency;    // by the low-latency kernels, whose warps all send, and which have no tail
  int64_t num_tokens;  // a power of two: of calls with so many tokens, and of more than half of it
  LaunchChoice choice;
};

// InvalidArgument unless kernels can be launched so. `tuned` may have several of the same calls, of
// which the first counts.
Status check_tuned(const std::vector<TunedLaunch>& tuned);

// The choice for a call of so many tokens; the model's where there is none.
LaunchChoice find_choice(const std::vector<TunedLaunch>& tuned,
                         OpKind op,
                         bool low_latency,
                         int64_t num_tokens);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_TUNING_TUNED_LAUNCHES_H_
