// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/rendezvous/pending_rendezvous.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "csrc/cpu/flights/flight.h"
#include "csrc/cpu/rendezvous/rank_list.h"

namespace jax_ep {
namespace {

using std::chrono::milliseconds;

}  // namespace

PendingRendezvous::PendingRendezvous(const Rendezvous::Arrival& first)
    : group_(first.group),
      group_index_(first.place.group_index),
      op_name_(op_name(first)),
      deadline_(opened_ + group_->timeout),
      next_warning_(group_->warn_after),
      num_ranks_(first.num_ranks),
      num_expected_(first.num_ranks),
      here_(static_cast<size_t>(first.num_ranks)),
      devices_(static_cast<size_t>(first.num_ranks), -1),
      calls_(static_cast<size_t>(first.num_ranks)),
      flights_(static_cast<size_t>(first.num_ranks)) {}

bool PendingRendezvous::has(int32_t rank) const {
  return static_cast<size_t>(rank) < here_.size() && here_[static_cast<size_t>(rank)];
}

void PendingRendezvous::add(Rendezvous::Arrival arrival, Rendezvous::Done done) {
  const auto index = static_cast<size_t>(arrival.place.rank);
  here_[index] = true;
  devices_[index] = arrival.device;
  ++num_here_;
  calls_[index] = std::move(arrival.call);
  flights_[index] = std::move(arrival.flight);
  waiters_.push_back({arrival.place.rank, FloatEnv::current(), std::move(done)});
}

void PendingRendezvous::add_late(const Rendezvous::Arrival& arrival) {
  num_expected_ = std::max(num_expected_, arrival.num_ranks);
  here_.resize(static_cast<size_t>(num_expected_));
  here_[static_cast<size_t>(arrival.place.rank)] = true;
  ++num_here_;
}

std::vector<int32_t> PendingRendezvous::ranks_here(bool here) const {
  std::vector<int32_t> ranks;
  for (int32_t rank = 0; rank < num_ranks_; ++rank) {
    if (has(rank) == here) ranks.push_back(rank);
  }
  return ranks;
}

std::string PendingRendezvous::context() const {
  return group_->name + ", group_index " + std::to_string(group_index_) + ", " +
         std::string(op_name_) + ": ";
}

Wait PendingRendezvous::wait() const {
  Wait wait{.group = group_,
            .group_index = group_index_,
            .op = op_name_,
            .since = opened_,
            .waiting = {},
            .missing = {}};
  for (const int32_t rank : ranks_here(true)) {
    wait.waiting.push_back({rank, devices_[static_cast<size_t>(rank)]});
  }
  for (const int32_t rank : ranks_here(false)) {
    wait.missing.push_back({rank, group_->device_of({group_index_, rank})});
  }
  return wait;
}

PendingRendezvous::Clock::time_point PendingRendezvous::next_alarm() const {
  return std::min(opened_ + next_warning_, deadline_);
}

void PendingRendezvous::warned() {
  missing_at_warning_ = ranks_here(false);
  next_warning_ *= 2;
}

std::string PendingRendezvous::seconds_waited() const {
  return format_seconds(std::chrono::duration_cast<milliseconds>(Clock::now() - opened_));
}

std::string PendingRendezvous::warning(const std::string& root_cause) const {
  return context() + "rank(s) " + format_ranks(ranks_here(true)) + " of " +
         std::to_string(num_ranks_) + " have waited " + seconds_waited() + " for rank(s) " +
         format_ranks(ranks_here(false)) + "; " + root_cause + ". Giving up after " +
         format_seconds(group_->timeout);
}

std::optional<std::string> PendingRendezvous::came_after_warning() const {
  if (missing_at_warning_.empty()) return std::nullopt;
  return context() + "rank(s) " + format_ranks(missing_at_warning_) + " came after " +
         seconds_waited();
}

Status PendingRendezvous::missing_ranks() const {
  return {StatusCode::kDeadlineExceeded,
          context() + "rank(s) " + format_ranks(ranks_here(false)) + " of " +
              std::to_string(num_ranks_) + " did not reach this " + std::string(op_name_) +
              " within " + format_seconds(group_->timeout) +
              ": their program failed, or runs a different program; look for an earlier error of " +
              "theirs (rank(s) " + format_ranks(ranks_here(true)) + " came)"};
}

Status PendingRendezvous::other_num_ranks(const Rendezvous::Arrival& arrival) const {
  const std::vector<int32_t> here = ranks_here(true);
  return Status::invalid_argument(
      context() + "ranks disagree: num_ranks is " + std::to_string(num_ranks_) +
      (here.size() == 1 ? " on rank " : " on ranks ") + format_ranks(here) + " and " +
      std::to_string(arrival.num_ranks) + " on rank " + std::to_string(arrival.place.rank));
}

Status PendingRendezvous::refused(const Rendezvous::Arrival& arrival) const {
  return {arrival.refusal.code(), context() + arrival.refusal.message()};
}

Status PendingRendezvous::abandoned(std::string_view what) const {
  return {StatusCode::kFailedPrecondition,
          context() + std::string(what) + " while rank(s) " + format_ranks(ranks_here(true)) +
              " waited for rank(s) " + format_ranks(ranks_here(false)) + " of " +
              std::to_string(num_ranks_)};
}

std::vector<Waiter> PendingRendezvous::fail(Status error) {
  failure_ = std::move(error);
  end_flights(*failure_);
  calls_ = {};
  flights_ = {};
  return take_waiters();
}

Status PendingRendezvous::check_flights() const {
  std::vector<std::string> numbers;
  for (const auto& flight : flights_) {
    if (flight.has_value()) numbers.push_back(flight_name(flight->number));
  }
  // Operations in one piece have none, and call sites of both kinds are apart.
  if (std::adjacent_find(numbers.begin(), numbers.end(), std::not_equal_to<>()) == numbers.end()) {
    return {};
  }
  return disagreement("flight", numbers);
}

void PendingRendezvous::end_flights(const Status& outcome) const {
  for (const auto& flight : flights_) {
    if (flight.has_value()) group_->flights->end(flight->number, outcome);
  }
}

std::vector<Waiter> PendingRendezvous::take_waiters() { return std::exchange(waiters_, {}); }

}  // namespace jax_ep
