// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CPU_TESTS_SHIFT_RANKS_H_
#define JAX_EP_CSRC_CPU_TESTS_SHIFT_RANKS_H_

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <deque>
#include <future>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "csrc/core/status.h"
#include "csrc/cpu/group_registry.h"
#include "csrc/cpu/rendezvous/deadlines.h"
#include "csrc/cpu/rendezvous/rendezvous.h"

namespace jax_ep {

// Devices of several groups of at most 100 ranks.
inline int32_t device_of_shift_rank(int32_t group_index, int32_t rank) {
  return 100 * group_index + rank;
}

// The group of all ShiftRanks.
inline GroupInfoPtr shift_group(std::chrono::milliseconds timeout = std::chrono::seconds(120),
                                std::chrono::milliseconds warn_after = std::chrono::seconds(60)) {
  GroupInfo info{.id = 3,
                 .name = "EpGroup 3 (axis 'expert')",
                 .num_ranks = 8,
                 .warn_after = warn_after,
                 .timeout = timeout,
                 .places = {}};
  for (int32_t group_index = 0; group_index < 10; ++group_index) {
    for (int32_t rank = 0; rank < 8; ++rank) {
      info.places[device_of_shift_rank(group_index, rank)] = {group_index, rank};
    }
  }
  return std::make_shared<const GroupInfo>(std::move(info));
}

// One rank's part of a plan whose answer tells which calls met: rank r sends its one token to
// rank (r + shift) % num_ranks, so rank d must receive from (d - shift) % num_ranks.
class ShiftRank {
 public:
  ShiftRank(int32_t rank, int32_t num_ranks, int32_t shift)
      : rank_(rank), num_ranks_(num_ranks), shift_(shift % num_ranks) {
    topk_idx_ = (rank + shift_) % num_ranks;
  }
  ShiftRank(const ShiftRank&) = delete;
  ShiftRank& operator=(const ShiftRank&) = delete;

  Rendezvous::Arrival arrival(int64_t run_id = 1, int32_t group_index = 0) {
    return {.run_id = run_id,
            .group = shift_group(),
            .device = device_of_shift_rank(group_index, rank_),
            .place = {.group_index = group_index, .rank = rank_},
            .num_ranks = num_ranks_,
            .call = PlanOp{.shape = {.num_ranks = num_ranks_,
                                     .num_experts = num_ranks_,
                                     .num_topk = 1,
                                     .num_tokens = 1,
                                     .recv_capacity = 1},
                           .topk_idx = &topk_idx_,
                           .slot = &slot_,
                           .row_source = &row_source_,
                           .row_topk_idx = nullptr,
                           .group_sizes = &group_size_,
                           .tokens_per_expert = &tokens_,
                           .num_dropped = &dropped_},
            .refusal = {}};
  }

  // Whether the calls that met were those of the same shift.
  [[nodiscard]] bool is_right() const {
    return slot_ == 0 && row_source_ == (rank_ - shift_ + num_ranks_) % num_ranks_;
  }

 private:
  int32_t rank_;
  int32_t num_ranks_;
  int32_t shift_;
  int32_t topk_idx_;
  int32_t slot_ = -7, row_source_ = -7, group_size_ = -7, tokens_ = -7, dropped_ = -7;
};

// The callback of a join(), as a future.
class Completion {
 public:
  Rendezvous::Done done() {
    // Shared: set_value() may still be at work on the promise when wait() has returned.
    return [promise = promise_](const Status& status) { promise->set_value(status); };
  }
  // Fails the test, rather than hanging it, if the callback does not come.
  Status wait() {
    if (future_.wait_for(std::chrono::seconds(120)) != std::future_status::ready) {
      return {StatusCode::kInternal, "the callback did not come"};
    }
    return future_.get();
  }
  [[nodiscard]] bool is_ready() const {
    return future_.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
  }

 private:
  std::shared_ptr<std::promise<Status>> promise_ = std::make_shared<std::promise<Status>>();
  std::future<Status> future_ = promise_->get_future();
};

// Whatever a test does, no rendezvous or deadline may be left.
class RendezvousFixture : public testing::Test {
 protected:
  void TearDown() override {
    EXPECT_EQ(Rendezvous::num_pending(), 0);
    EXPECT_EQ(Rendezvous::num_alive(), 0);
    EXPECT_EQ(Deadlines::shared().num_pending(), 0);
  }

  // All ranks of a group, for one rendezvous.
  static std::deque<ShiftRank> ranks(int32_t num_ranks, int32_t shift = 1) {
    std::deque<ShiftRank> result;
    for (int32_t rank = 0; rank < num_ranks; ++rank) result.emplace_back(rank, num_ranks, shift);
    return result;
  }
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_TESTS_SHIFT_RANKS_H_
