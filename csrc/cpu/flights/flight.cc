// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/flights/flight.h"

#include <algorithm>
#include <atomic>
#include <random>
#include <utility>

#include "csrc/cpu/rendezvous/rank_list.h"

namespace jax_ep {
namespace {

using std::chrono::milliseconds;

// The upper half of the numbers of this process. Not 0, which an array of zeros would name.
FlightNumber process_part() {
  static const FlightNumber part = [] {
    std::random_device random;
    return FlightNumber{random() | 1U} << 32;
  }();
  return part;
}

Status refused(std::string message) {
  return {StatusCode::kFailedPrecondition, std::move(message)};
}

}  // namespace

FlightNumber next_flight_number() {
  static std::atomic<uint64_t> count{0};
  return process_part() + ++count;
}

std::string flight_name(FlightNumber number) {
  const FlightNumber count = number - process_part();
  if (number > process_part() && count <= UINT32_MAX) return "flight " + std::to_string(count);
  return "flight " + std::to_string(number) + " (a number that this process has not given)";
}

Flight::Flight(const Flights::Start& first)
    : kind_(first.kind),
      run_id_(first.run_id),
      site_(first.site),
      group_index_(first.place.group_index),
      group_name_(first.group->name),
      ranks_(first.ranks),
      counts_(first.counts),
      parts_(static_cast<size_t>(first.group->num_ranks)) {}

bool Flight::is_of(const Flights::Start& start) const {
  return site_ == start.site && run_id_ == start.run_id &&
         group_index_ == start.place.group_index && ranks_ == start.ranks;
}

bool Flight::has(int32_t rank) const {
  return parts_[static_cast<size_t>(rank)].state != State::kMissing;
}

void Flight::stage(int32_t rank, StagedOperandsPtr operands) {
  parts_[static_cast<size_t>(rank)].operands = std::move(operands);
}

Status Flight::take(const Flights::Done& done, StagedOperandsPtr& operands) {
  const std::string name = flight_name(number_);
  if (done.kind != kind_) {
    return refused(name + " is of " + std::string(start_name(kind_)) + "; allowed: one of " +
                   std::string(start_name(done.kind)));
  }
  if (done.place.group_index != group_index_) {
    return refused(name + " is of group_index " + std::to_string(group_index_) +
                   "; allowed: one of group_index " + std::to_string(done.place.group_index));
  }
  Part& part = parts_[static_cast<size_t>(done.place.rank)];
  const std::string rank = "rank " + std::to_string(done.place.rank);
  if (part.state == State::kDone) {
    return refused(name + " is used twice by " + rank + "; allowed: once");
  }
  if (part.operands == nullptr) return refused(name + " was not started by " + rank);
  part.state = State::kDone;
  operands = std::exchange(part.operands, nullptr);
  return {};
}

void Flight::wait(milliseconds warn_after, milliseconds timeout) {
  since_ = Clock::now();
  warn_after_ = next_warning_ = warn_after;
  timeout_ = timeout;
}

std::vector<Flight::Waiter> Flight::open() {
  is_open_ = true;
  return take_waiters();
}

std::vector<Flight::Waiter> Flight::take_waiters() { return std::exchange(waiters, {}); }

Flight::Clock::time_point Flight::next_alarm() const {
  return since_ + std::min(next_warning_, timeout_);
}

std::vector<int32_t> Flight::ranks_not_done() const {
  std::vector<int32_t> ranks;
  for (size_t i = 0; i < parts_.size(); ++i) {
    const bool takes_part = ranks_.has(static_cast<int32_t>(i));
    if (takes_part && parts_[i].state != State::kDone) ranks.push_back(static_cast<int32_t>(i));
  }
  return ranks;
}

std::vector<int32_t> Flight::ranks_that_wait() const {
  std::vector<int32_t> ranks;
  for (const Waiter& waiter : waiters) ranks.push_back(waiter.start.place.rank);
  std::sort(ranks.begin(), ranks.end());
  return ranks;
}

std::string Flight::description() const {
  std::vector<int32_t> done;
  for (size_t i = 0; i < parts_.size(); ++i) {
    if (parts_[i].state == State::kDone) done.push_back(static_cast<int32_t>(i));
  }
  return flight_name(number_) + " (" + std::string(start_name(kind_)) + ", done by " +
         (done.empty() ? "no rank" : "rank(s) " + format_ranks(done)) + " of " +
         std::to_string(parts_.size()) + ")";
}

std::string Flight::context() const {
  return group_name_ + ", group_index " + std::to_string(group_index_) + ", " +
         std::string(start_name(kind_)) + ": ";
}

Wait Flight::wait_for(const std::vector<int32_t>& missing) const {
  const GroupInfoPtr& group = waiters.front().start.group;
  Wait wait{.group = group,
            .group_index = group_index_,
            .op = start_name(kind_),
            .since = since_,
            .waiting = {},
            .missing = {}};
  const auto on_device = [&](int32_t rank) {
    return RankOnDevice{rank, group->device_of({group_index_, rank})};
  };
  for (const int32_t rank : ranks_that_wait()) wait.waiting.push_back(on_device(rank));
  for (const int32_t rank : missing) wait.missing.push_back(on_device(rank));
  return wait;
}

std::string Flight::warning(const std::string& open) const {
  const auto waited = std::chrono::duration_cast<milliseconds>(Clock::now() - since_);
  return context() + "rank(s) " + format_ranks(ranks_that_wait()) + " have waited " +
         format_seconds(waited) + " for an open flight to end: " + open + ". Giving up after " +
         format_seconds(timeout_);
}

Status Flight::none_ended(const std::string& open) const {
  return {StatusCode::kDeadlineExceeded,
          context() + "rank(s) " + format_ranks(ranks_that_wait()) + " waited, and within " +
              format_seconds(timeout_) + " no open flight ended: " + open + "; at most " +
              std::to_string(Flights::kMaxOpen) +
              " may be open: finish one, with dispatch_done or combine_done, before the next is "
              "started"};
}

std::string Flight::gave_up() const {
  return "was given up: rank(s) " + format_ranks(ranks_that_wait()) + " waited for it in " +
         std::string(start_name(kind_)) + " for " + format_seconds(timeout_);
}

}  // namespace jax_ep
