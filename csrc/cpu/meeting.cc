// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/meeting.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include "csrc/cpu/rank_list.h"

namespace jax_ep {
namespace {

std::string format_seconds(std::chrono::milliseconds duration) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g s", static_cast<double>(duration.count()) / 1000);
  return text;
}

}  // namespace

Meeting::Meeting(const Rendezvous::Arrival& first)
    : group_name_(first.group_name),
      group_index_(first.group_index),
      op_name_(op_name(first.call)),
      timeout_(first.timeout),
      num_ranks_(first.num_ranks),
      num_expected_(first.num_ranks),
      here_(static_cast<size_t>(first.num_ranks)),
      calls_(static_cast<size_t>(first.num_ranks)) {}

bool Meeting::has(int32_t rank) const {
  return static_cast<size_t>(rank) < here_.size() && here_[static_cast<size_t>(rank)];
}

void Meeting::add(Rendezvous::Arrival arrival, Rendezvous::Done done) {
  const auto index = static_cast<size_t>(arrival.rank);
  here_[index] = true;
  ++num_here_;
  calls_[index] = std::move(arrival.call);
  waiters_.push_back({arrival.rank, FloatEnv::current(), std::move(done)});
}

void Meeting::add_late(const Rendezvous::Arrival& arrival) {
  num_expected_ = std::max(num_expected_, arrival.num_ranks);
  here_.resize(static_cast<size_t>(num_expected_));
  here_[static_cast<size_t>(arrival.rank)] = true;
  ++num_here_;
}

std::vector<int32_t> Meeting::ranks_here(bool here) const {
  std::vector<int32_t> ranks;
  for (int32_t rank = 0; rank < num_ranks_; ++rank) {
    if (has(rank) == here) ranks.push_back(rank);
  }
  return ranks;
}

std::string Meeting::context() const {
  return group_name_ + ", group_index " + std::to_string(group_index_) + ", " +
         std::string(op_name_) + ": ";
}

Status Meeting::missing_ranks() const {
  return {StatusCode::kDeadlineExceeded,
          context() + "rank(s) " + format_ranks(ranks_here(false)) + " of " +
              std::to_string(num_ranks_) + " did not reach this " + std::string(op_name_) +
              " within " + format_seconds(timeout_) +
              ": their program failed, or runs a different program; look for an earlier error of " +
              "theirs (rank(s) " + format_ranks(ranks_here(true)) + " came)"};
}

Status Meeting::other_num_ranks(const Rendezvous::Arrival& arrival) const {
  const std::vector<int32_t> here = ranks_here(true);
  return Status::invalid_argument(
      context() + "ranks disagree: num_ranks is " + std::to_string(num_ranks_) +
      (here.size() == 1 ? " on rank " : " on ranks ") + format_ranks(here) + " and " +
      std::to_string(arrival.num_ranks) + " on rank " + std::to_string(arrival.rank));
}

Status Meeting::abandoned() const {
  return {StatusCode::kFailedPrecondition,
          context() + "the program was abandoned while rank(s) " + format_ranks(ranks_here(true)) +
              " waited for rank(s) " + format_ranks(ranks_here(false)) + " of " +
              std::to_string(num_ranks_)};
}

std::vector<Waiter> Meeting::fail(Status error) {
  failure_ = std::move(error);
  calls_ = {};
  return take_waiters();
}

std::vector<Waiter> Meeting::take_waiters() { return std::exchange(waiters_, {}); }

}  // namespace jax_ep
