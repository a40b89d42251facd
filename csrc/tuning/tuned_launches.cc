// SPDX-License-Identifier: Apache-2.0
#include "csrc/tuning/tuned_launches.h"

#include <algorithm>
#include <bit>
#include <string>

#include "csrc/core/shape_check.h"

namespace jax_ep {
namespace {

Status check_one(const TunedLaunch& tuned) {
  if (tuned.op != OpKind::kPlanDispatch && tuned.op != OpKind::kCombine) {
    return Status::invalid_argument("op is " + std::string(name(tuned.op)) +
                                    "; allowed: plan_dispatch, combine");
  }
  const bool dispatches = tuned.op == OpKind::kPlanDispatch;
  if (tuned.num_tokens < 1 || !std::has_single_bit(static_cast<uint64_t>(tuned.num_tokens))) {
    return out_of_range("num_tokens", tuned.num_tokens, "powers of two");
  }
  const LaunchChoice& choice = tuned.choice;
  if (choice.num_sms < 0) return out_of_range("num_sms", choice.num_sms, "0 or more");
  if (choice.num_senders < 0 || (tuned.low_latency && choice.num_senders != 0)) {
    return out_of_range("num_senders", choice.num_senders, tuned.low_latency ? "0" : "0 or more");
  }
  const auto tail = static_cast<int32_t>(choice.tail);
  if (choice.tail == Tail::kModel) return {};
  if (tuned.low_latency || !dispatches) return out_of_range("tail", tail, "-1");
  if (choice.tail == Tail::kOff || choice.tail == Tail::kOn) return {};
  return out_of_range("tail", tail, "-1, 0 and 1");
}

}  // namespace

Status check_tuned(const std::vector<TunedLaunch>& tuned) {
  for (const TunedLaunch& one : tuned) JAX_EP_RETURN_IF_ERROR(check_one(one));
  return {};
}

LaunchChoice find_choice(const std::vector<TunedLaunch>& tuned,
                         OpKind op,
                         bool low_latency,
                         int64_t num_tokens) {
  if (num_tokens < 1) return {};
  const auto up_to = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(num_tokens)));
  const auto found = std::find_if(tuned.begin(), tuned.end(), [&](const TunedLaunch& one) {
    return one.op == op && one.low_latency == low_latency && one.num_tokens == up_to;
  });
  return found == tuned.end() ? LaunchChoice{} : found->choice;
}

}  // namespace jax_ep
