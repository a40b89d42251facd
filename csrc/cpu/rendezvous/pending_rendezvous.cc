// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/rendezvous/pending_rendezvous.h"

#include <algorithm>
#include <functional>
#include <utility>
#include <variant>

#include "csrc/cpu/flights/flight.h"
#include "csrc/cpu/rendezvous/rank_list.h"

namespace jax_ep {
namespace {

using std::chrono::milliseconds;

}  // namespace

RankSet ranks_of(const Rendezvous::Arrival& arrival) {
  const uint8_t* const mask =
      std::visit([](const auto& op) { return rank_mask_of(op); }, arrival.call);
  return {mask, arrival.num_ranks};
}

bool masks_missing_ranks(const Rendezvous::Arrival& arrival) {
  return std::visit([](const auto& op) { return missing_ranks_of(op) != nullptr; }, arrival.call);
}

PendingRendezvous::PendingRendezvous(const Rendezvous::Arrival& first)
    : group_(first.group),
      group_index_(first.place.group_index),
      op_name_(op_name(first)),
      deadline_(opened_ + group_->timeout),
      next_warning_(group_->warn_after),
      num_ranks_(first.num_ranks),
      masks_missing_(masks_missing_ranks(first)),
      mask_(ranks_of(first)),
      num_expected_(mask_.count(first.num_ranks)),
      arrived_(static_cast<size_t>(first.num_ranks)),
      devices_(static_cast<size_t>(first.num_ranks), -1),
      calls_(static_cast<size_t>(first.num_ranks), absent_op<PlanOp>()),
      flights_(static_cast<size_t>(first.num_ranks)) {}

bool PendingRendezvous::has(int32_t rank) const {
  return static_cast<size_t>(rank) < arrived_.size() && arrived_[static_cast<size_t>(rank)];
}

bool PendingRendezvous::lacks(const Rendezvous::Arrival& arrival) const {
  if (has(arrival.place.rank)) return false;
  if (ranks_of(arrival) == mask_) return true;
  return (failure_.has_value() || !arrival.refusal.ok()) && expects(arrival.place.rank);
}

bool PendingRendezvous::waits_with(const PendingRendezvous& other) const {
  const auto waits_for = [](const PendingRendezvous& a, const PendingRendezvous& b) {
    const std::vector<int32_t> missing = a.ranks_where(false);
    return std::any_of(missing.begin(), missing.end(), [&b](int32_t rank) { return b.has(rank); });
  };
  return waits_for(*this, other) && waits_for(other, *this);
}

void PendingRendezvous::add(Rendezvous::Arrival arrival, Rendezvous::Done done) {
  const auto index = static_cast<size_t>(arrival.place.rank);
  arrived_[index] = true;
  devices_[index] = arrival.device;
  ++num_arrived_;
  calls_[index] = std::move(arrival.call);
  flights_[index] = std::move(arrival.flight);
  waiters_.push_back({arrival.place.rank, FloatEnv::current(), std::move(done)});
}

void PendingRendezvous::add_late(const Rendezvous::Arrival& arrival) {
  if (arrival.num_ranks > num_ranks_) {
    num_expected_ = std::max(num_expected_, arrival.num_ranks);
    arrived_.resize(std::max(arrived_.size(), static_cast<size_t>(arrival.num_ranks)));
  }
  arrived_[static_cast<size_t>(arrival.place.rank)] = true;
  ++num_arrived_;
}

std::vector<int32_t> PendingRendezvous::ranks_where(bool arrived) const {
  std::vector<int32_t> ranks;
  for (int32_t rank = 0; rank < num_ranks_; ++rank) {
    if (expects(rank) && has(rank) == arrived) ranks.push_back(rank);
  }
  return ranks;
}

bool PendingRendezvous::awaits_nobody() const {
  return masks_missing_ && group_->given_up->has_all(group_index_, ranks_where(false));
}

std::vector<Waiter> PendingRendezvous::go_on() {
  has_gone_on_ = true;
  return take_waiters();
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
  for (const int32_t rank : ranks_where(true)) {
    wait.waiting.push_back({rank, devices_[static_cast<size_t>(rank)]});
  }
  for (const int32_t rank : ranks_where(false)) {
    wait.missing.push_back({rank, group_->device_of({group_index_, rank})});
  }
  return wait;
}

PendingRendezvous::Clock::time_point PendingRendezvous::next_alarm() const {
  return std::min(opened_ + next_warning_, deadline_);
}

void PendingRendezvous::warned() {
  missing_at_warning_ = ranks_where(false);
  next_warning_ *= 2;
}

std::string PendingRendezvous::seconds_waited() const {
  return format_seconds(std::chrono::duration_cast<milliseconds>(Clock::now() - opened_));
}

std::string PendingRendezvous::warning(const std::string& root_cause) const {
  return context() + "rank(s) " + format_ranks(ranks_where(true)) + " of " +
         std::to_string(num_ranks_) + " have waited " + seconds_waited() + " for rank(s) " +
         format_ranks(ranks_where(false)) + "; " + root_cause + ". Giving up after " +
         format_seconds(group_->timeout);
}

std::optional<std::string> PendingRendezvous::came_after_warning() const {
  if (missing_at_warning_.empty()) return std::nullopt;
  return context() + "rank(s) " + format_ranks(missing_at_warning_) + " came after " +
         seconds_waited();
}

Status PendingRendezvous::missing_ranks() const {
  return {StatusCode::kDeadlineExceeded,
          context() + "rank(s) " + format_ranks(ranks_where(false)) + " of " +
              std::to_string(num_ranks_) + " did not reach this " + std::string(op_name_) +
              " within " + format_seconds(group_->timeout) +
              ": their program failed, or runs a different program; look for an earlier error of " +
              "theirs (rank(s) " + format_ranks(ranks_where(true)) + " came)"};
}

std::string PendingRendezvous::gone_on() const {
  return context() + "rank(s) " + format_ranks(ranks_where(false)) + " of " +
         std::to_string(num_ranks_) + " did not reach this " + std::string(op_name_) + " within " +
         format_seconds(group_->timeout) + ": rank(s) " + format_ranks(ranks_where(true)) +
         " go on without (on_timeout is 'mask')";
}

Status PendingRendezvous::other_num_ranks(const Rendezvous::Arrival& arrival) const {
  const std::vector<int32_t> arrived = ranks_where(true);
  return Status::invalid_argument(
      context() + "ranks disagree: num_ranks is " + std::to_string(num_ranks_) +
      (arrived.size() == 1 ? " on rank " : " on ranks ") + format_ranks(arrived) + " and " +
      std::to_string(arrival.num_ranks) + " on rank " + std::to_string(arrival.place.rank));
}

Status PendingRendezvous::other_mask(const PendingRendezvous& other) const {
  std::vector<std::string> texts(static_cast<size_t>(std::max(num_ranks_, other.num_ranks_)));
  for (const PendingRendezvous* of : {this, &other}) {
    for (const int32_t rank : of->ranks_where(true)) {
      texts[static_cast<size_t>(rank)] = of->mask_.text(of->num_ranks_);
    }
  }
  const Status status = disagreement("rank_mask", texts);
  return {status.code(), context() + status.message()};
}

Status PendingRendezvous::refused(const Rendezvous::Arrival& arrival) const {
  return {arrival.refusal.code(), context() + arrival.refusal.message()};
}

Status PendingRendezvous::abandoned(std::string_view what) const {
  return {StatusCode::kFailedPrecondition,
          context() + std::string(what) + " while rank(s) " + format_ranks(ranks_where(true)) +
              " waited for rank(s) " + format_ranks(ranks_where(false)) + " of " +
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
