// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/flights/flights.h"

#include <algorithm>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "csrc/core/notices.h"
#include "csrc/cpu/flights/flight.h"
#include "csrc/cpu/rendezvous/completer.h"

namespace jax_ep {
namespace {

using Waiter = Flight::Waiter;

// Waiting ranks, and the error that they are to be told.
struct Refused {
  std::vector<Waiter> waiters;
  Status error;
};

void tell(Refused refused) {
  for (Waiter& waiter : refused.waiters) {
    post_with(waiter.float_env,
              [started = std::move(waiter.started), error = refused.error] { started(error, 0); });
  }
}

}  // namespace

// Outlives the Flights while a deadline or a rank is still at work on it.
struct Flights::Impl : std::enable_shared_from_this<Impl> {
  using FlightPtr = std::shared_ptr<Flight>;
  // A run, of all groups or of one.
  struct FailedRun {
    int64_t run_id = 0;
    std::optional<int32_t> group_index = {};
    Status error = {};

    [[nodiscard]] bool holds(int64_t run, int32_t index) const {
      return run == run_id && group_index.value_or(index) == index;
    }
  };

  // Of both, those that are remembered for messages.
  static constexpr size_t kMaxEnded = 64;
  // Open flights that do not count, of runs before the one that begins another. Where there are
  // more, the oldest was left behind by a program that failed elsewhere.
  static constexpr int64_t kMaxUncounted = 64;

  mutable std::mutex mutex;
  std::deque<FlightPtr> flights;  // by first arrival, open ones and waiting ones
  std::deque<std::pair<FlightNumber, std::string>> ended;  // and why, oldest first
  std::deque<FailedRun> failed_runs;                       // oldest first
  bool closed = false;

  void start(Start start, Started started);
  Status take(const Done& done, StagedOperandsPtr& operands);
  void end(FlightNumber number, const Status& outcome);
  void fail_run(const FailedRun& run);
  void close();
  void alarm(const FlightPtr& flight);
  void stage(const Start& start, const Started& started, FlightNumber number);

 private:
  // Those below are called with the mutex held.
  [[nodiscard]] Status refusal_of(const Start& start) const;
  [[nodiscard]] FlightPtr find(FlightNumber number) const;
  FlightPtr find_or_begin(const Start& start);
  FlightPtr take_left_behind(int64_t run_id);
  [[nodiscard]] bool may_open(const Flight& flight) const;
  void remove(const FlightPtr& flight, const std::string& why);
  // What the run starts from now on is refused.
  void note_failed(const FailedRun& run);
  // Flights may have ended: those that may be open now are; returns the ranks that waited.
  std::vector<std::pair<Waiter, FlightNumber>> admit(int32_t group_index);
  void set_alarm(const FlightPtr& flight);
  // Those that count.
  [[nodiscard]] std::vector<FlightPtr> open_ones(int32_t group_index) const;
  [[nodiscard]] std::string descriptions(int32_t group_index) const;
  [[nodiscard]] std::string why_not_there(FlightNumber number) const;

  // Without the mutex.
  void go_on(std::vector<std::pair<Waiter, FlightNumber>> admitted);

  friend class Flights;
};

void Flights::Impl::start(Start start, Started started) {
  Status refusal;
  FlightNumber number = 0;
  FlightPtr left_behind;  // its memory is freed without the mutex
  {
    const std::lock_guard lock(mutex);
    refusal = refusal_of(start);
    if (refusal.ok()) {
      if (!start.counts) left_behind = take_left_behind(start.run_id);
      const FlightPtr flight = find_or_begin(start);
      flight->begin(start.place.rank);
      number = flight->number();
      const bool is_first = flight->waiters.empty();
      if (!flight->is_open() && is_first && may_open(*flight)) flight->open();
      if (!flight->is_open()) {
        if (is_first) flight->wait(start.group->warn_after, start.group->timeout);
        flight->waiters.push_back({std::move(start), FloatEnv::current(), std::move(started)});
        if (is_first) set_alarm(flight);
        return;
      }
    }
  }
  if (!refusal.ok()) return started(refusal, 0);
  stage(start, started, number);
}

// Copies what the rank of an open flight brings, and tells it.
void Flights::Impl::stage(const Start& start, const Started& started, FlightNumber number) {
  auto operands = std::make_shared<const StagedOperands>(start.operands);
  Status status;
  {
    const std::lock_guard lock(mutex);
    if (const FlightPtr flight = find(number)) {
      flight->stage(start.place.rank, std::move(operands));
    } else {  // it has ended meanwhile
      status = {StatusCode::kFailedPrecondition,
                start.group->name + ", " + std::string(start_name(start.kind)) + ": " +
                    why_not_there(number)};
    }
  }
  started(status, status.ok() ? number : 0);
}

Status Flights::Impl::refusal_of(const Start& start) const {
  // Closed since the caller found the group open.
  if (closed) return closed_group(start.group->name, start_name(start.kind));
  for (const FailedRun& run : failed_runs) {
    if (run.holds(start.run_id, start.place.group_index)) return run.error;
  }
  return {};
}

Flights::Impl::FlightPtr Flights::Impl::find(FlightNumber number) const {
  const auto it = std::find_if(flights.begin(), flights.end(), [&](const FlightPtr& flight) {
    return flight->number() == number;
  });
  return it == flights.end() ? nullptr : *it;
}

Flights::Impl::FlightPtr Flights::Impl::find_or_begin(const Start& start) {
  for (const FlightPtr& flight : flights) {
    if (flight->is_of(start) && !flight->has(start.place.rank)) return flight;
  }
  return flights.emplace_back(std::make_shared<Flight>(start));
}

Flights::Impl::FlightPtr Flights::Impl::take_left_behind(int64_t run_id) {
  const auto is_left = [run_id](const FlightPtr& flight) {
    return !flight->counts() && flight->run_id() != run_id;
  };
  if (std::count_if(flights.begin(), flights.end(), is_left) <= kMaxUncounted) return nullptr;
  const FlightPtr oldest = *std::find_if(flights.begin(), flights.end(), is_left);
  remove(oldest, "was given up: no rank came for it while many programs ran");
  return oldest;
}

std::vector<Flights::Impl::FlightPtr> Flights::Impl::open_ones(int32_t group_index) const {
  std::vector<FlightPtr> open;
  for (const FlightPtr& flight : flights) {
    if (flight->is_open() && flight->counts() && flight->group_index() == group_index) {
      open.push_back(flight);
    }
  }
  return open;
}

bool Flights::Impl::may_open(const Flight& flight) const {
  if (!flight.counts()) return true;
  const std::vector<FlightPtr> open = open_ones(flight.group_index());
  const auto of_run = std::count_if(open.begin(), open.end(), [&](const FlightPtr& other) {
    return other->run_id() == flight.run_id();
  });
  return of_run > 0 ? of_run < kMaxOpen : open.size() < size_t{kMaxOpen};
}

std::vector<std::pair<Waiter, FlightNumber>> Flights::Impl::admit(int32_t group_index) {
  std::vector<std::pair<Waiter, FlightNumber>> admitted;
  for (const FlightPtr& flight : flights) {
    if (flight->is_open() || flight->group_index() != group_index) continue;
    flight->restart_wait();
    if (!may_open(*flight)) continue;
    Deadlines::shared().cancel(flight->alarm);
    for (Waiter& waiter : flight->open()) {
      admitted.emplace_back(std::move(waiter), flight->number());
    }
  }
  return admitted;
}

void Flights::Impl::go_on(std::vector<std::pair<Waiter, FlightNumber>> admitted) {
  for (auto& [waiter, number] : admitted) {
    const FloatEnv float_env = waiter.float_env;
    post_with(float_env, [self = shared_from_this(), waiter = std::move(waiter), number] {
      self->stage(waiter.start, waiter.started, number);
    });
  }
}

void Flights::Impl::remove(const FlightPtr& flight, const std::string& why) {
  if (!flight->is_open()) Deadlines::shared().cancel(flight->alarm);
  ended.emplace_back(flight->number(), why);
  if (ended.size() > kMaxEnded) ended.pop_front();
  std::erase(flights, flight);
}

std::string Flights::Impl::why_not_there(FlightNumber number) const {
  for (const auto& [other, why] : ended) {
    if (other == number) return flight_name(number) + " " + why;
  }
  return flight_name(number) +
         " is not open: it was used before, or is of another group, program "
         "or process; allowed: an open one, once";
}

Status Flights::Impl::take(const Done& done, StagedOperandsPtr& operands) {
  const std::lock_guard lock(mutex);
  const FlightPtr flight = find(done.number);
  if (flight == nullptr) return {StatusCode::kFailedPrecondition, why_not_there(done.number)};
  return flight->take(done, operands);
}

void Flights::Impl::end(FlightNumber number, const Status& outcome) {
  std::vector<std::pair<Waiter, FlightNumber>> admitted;
  FlightPtr flight;  // its memory is freed without the mutex
  {
    const std::lock_guard lock(mutex);
    flight = find(number);
    if (flight == nullptr) return;
    remove(flight,
           outcome.ok() ? "was used before, by all ranks; allowed: once"
                        : "ended with an error: " + outcome.message());
    admitted = admit(flight->group_index());
  }
  go_on(std::move(admitted));
}

void Flights::Impl::fail_run(const FailedRun& run) {
  std::vector<Refused> refused;
  std::vector<std::pair<Waiter, FlightNumber>> admitted;
  std::deque<FlightPtr> gone;  // their memory is freed without the mutex
  {
    const std::lock_guard lock(mutex);
    note_failed(run);
    for (const FlightPtr& flight : std::deque(flights)) {
      if (!run.holds(flight->run_id(), flight->group_index())) continue;
      refused.push_back({flight->take_waiters(), run.error});
      remove(flight, "ended with an error of its program: " + run.error.message());
      gone.push_back(flight);
    }
    for (const FlightPtr& flight : gone) {
      for (auto& waiter : admit(flight->group_index())) admitted.push_back(std::move(waiter));
    }
  }
  for (Refused& some : refused) tell(std::move(some));
  go_on(std::move(admitted));
}

void Flights::Impl::note_failed(const FailedRun& run) {
  const bool is_known =
      std::any_of(failed_runs.begin(), failed_runs.end(), [&run](const FailedRun& other) {
        return other.run_id == run.run_id && other.group_index == run.group_index;
      });
  if (is_known) return;
  failed_runs.push_back(run);
  if (failed_runs.size() > kMaxEnded) failed_runs.pop_front();
}

void Flights::Impl::close() {
  std::vector<Refused> refused;
  std::deque<FlightPtr> gone;
  {
    const std::lock_guard lock(mutex);
    closed = true;
    for (const FlightPtr& flight : flights) {
      if (flight->is_open()) continue;
      Deadlines::shared().cancel(flight->alarm);
      const Start& start = flight->waiters.front().start;
      const Status error = closed_group(start.group->name, start_name(start.kind));
      refused.push_back({flight->take_waiters(), error});
    }
    std::swap(flights, gone);
  }
  for (Refused& some : refused) {
    Notices::shared().post(NoticeLevel::kError, some.error.message());
    tell(std::move(some));
  }
}

void Flights::Impl::set_alarm(const FlightPtr& flight) {
  flight->alarm = Deadlines::shared().add(
      flight->next_alarm(), [weak_impl = weak_from_this(), weak_flight = std::weak_ptr(flight)] {
        const auto impl = weak_impl.lock();
        const auto flight = weak_flight.lock();
        if (impl && flight) impl->alarm(flight);
      });
}

std::string Flights::Impl::descriptions(int32_t group_index) const {
  std::string text;
  for (const FlightPtr& flight : open_ones(group_index)) {
    text += (text.empty() ? "" : ", ") + flight->description();
  }
  return text;
}

void Flights::Impl::alarm(const FlightPtr& flight) {
  Status error;
  std::vector<Waiter> waiters;
  std::vector<FlightPtr> given_up;
  std::string gave_up;
  FailedRun run;
  {
    const std::lock_guard lock(mutex);
    // It may have been opened, or ended, between the alarm and here.
    if (flight->is_open() || find(flight->number()) == nullptr) return;
    if (!flight->is_past_deadline()) {
      if (flight->is_past_warning()) {
        const std::string open = descriptions(flight->group_index());
        Notices::shared().post(NoticeLevel::kWarning, flight->warning(open));
        flight->warned();
      }
      return set_alarm(flight);
    }
    error = flight->none_ended(descriptions(flight->group_index()));
    gave_up = flight->gave_up();
    given_up = open_ones(flight->group_index());
    for (const FlightPtr& other : given_up) remove(other, gave_up);
    waiters = flight->take_waiters();
    remove(flight, "ended with an error: " + error.message());
    // Before anybody is told: a late rank of the run that comes now must not open it again.
    run = {flight->run_id(), flight->group_index(), error};
    note_failed(run);
  }
  Notices::shared().post(NoticeLevel::kError, error.message());
  tell({std::move(waiters), error});
  // Its late ranks are told; and others may be opened.
  fail_run(run);
  std::vector<std::pair<Waiter, FlightNumber>> admitted;
  {
    const std::lock_guard lock(mutex);
    admitted = admit(flight->group_index());
  }
  go_on(std::move(admitted));
}

Flights::Flights() : impl_(std::make_shared<Impl>()) {}
Flights::~Flights() = default;

void Flights::start(Start start, Started started) {
  impl_->start(std::move(start), std::move(started));
}

Status Flights::take(const Done& done, StagedOperandsPtr& operands) {
  return impl_->take(done, operands);
}

void Flights::end(FlightNumber number, const Status& outcome) { impl_->end(number, outcome); }

void Flights::fail_run(int64_t run_id, std::optional<int32_t> group_index, const Status& error) {
  impl_->fail_run({run_id, group_index, error});
}

void Flights::close() { impl_->close(); }

void Flights::add_waits(std::vector<Wait>& waits) const {
  const std::lock_guard lock(impl_->mutex);
  for (const auto& flight : impl_->flights) {
    if (flight->is_open() || flight->waiters.empty()) continue;
    std::vector<int32_t> missing;
    for (const auto& open : impl_->open_ones(flight->group_index())) {
      const std::vector<int32_t> ranks = open->ranks_not_done();
      missing.insert(missing.end(), ranks.begin(), ranks.end());
    }
    std::sort(missing.begin(), missing.end());
    missing.erase(std::unique(missing.begin(), missing.end()), missing.end());
    waits.push_back(flight->wait_for(missing));
  }
}

int64_t Flights::num_open() const {
  const std::lock_guard lock(impl_->mutex);
  return std::count_if(impl_->flights.begin(), impl_->flights.end(), [](const auto& flight) {
    return flight->is_open();
  });
}

std::shared_ptr<Flights> make_flights() { return std::make_shared<Flights>(); }

}  // namespace jax_ep
