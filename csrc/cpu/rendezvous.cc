// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/rendezvous.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "csrc/core/float_env.h"
#include "csrc/cpu/completer.h"
#include "csrc/cpu/deadlines.h"
#include "csrc/cpu/meeting.h"
#include "csrc/cpu/worker_pool.h"

namespace jax_ep {
namespace {

std::atomic<int64_t> open_meetings{0};
std::atomic<int64_t> alive_rendezvous{0};

Status check_arrival(const Rendezvous::Arrival& arrival) {
  const auto invalid = [&arrival](const std::string& what) {
    return Status::invalid_argument(arrival.group_name + ", " + std::string(op_name(arrival.call)) +
                                    ": " + what);
  };
  if (arrival.num_ranks < 1) {
    return invalid("num_ranks is " + std::to_string(arrival.num_ranks) +
                   ", but must be at least 1");
  }
  if (arrival.rank < 0 || arrival.rank >= arrival.num_ranks) {
    return invalid("rank is " + std::to_string(arrival.rank) + ", but must be in [0, " +
                   std::to_string(arrival.num_ranks) + ")");
  }
  if (arrival.group_index < 0) {
    return invalid("group_index is " + std::to_string(arrival.group_index) +
                   ", but must be at least 0");
  }
  return {};
}

// Tells a waiting rank, on a thread that runs nothing else and that computes like the rank's own
// did: XLA continues the rank's program in the callback.
void tell(Waiter waiter, const Status& status) {
  Completer::shared().post([waiter = std::move(waiter), status] {
    waiter.float_env.apply();
    waiter.done(status);
    FloatEnv::apply_default();
  });
}

void tell(std::vector<Waiter> waiters, const Status& status) {
  for (Waiter& waiter : waiters) tell(std::move(waiter), status);
}

// Runs a meeting's operation; the error says where it happened.
Status execute_meeting(const Meeting& meeting) {
  Status status = check_agreement(meeting.calls());
  if (status.ok()) status = execute(meeting.calls(), WorkerPool::shared());
  if (status.ok()) return status;
  return {status.code(), meeting.context() + status.message()};
}

}  // namespace

// Outlives the Rendezvous while a deadline or a join() is still at work on it.
struct Rendezvous::Impl : std::enable_shared_from_this<Impl> {
  using MeetingPtr = std::shared_ptr<Meeting>;
  using Key = std::pair<int64_t, int32_t>;  // run_id, group_index

  // Failed meetings that are remembered for their late ranks.
  static constexpr size_t kMaxFailed = 64;

  std::mutex mutex;
  // The meetings of each key, oldest first: those that lack a rank, and failed ones of which a
  // rank has not been told.
  std::map<Key, std::deque<MeetingPtr>> meetings;
  std::deque<std::pair<Key, MeetingPtr>> failed;  // of `meetings`, oldest failure first

  void join(Arrival arrival, Done done);
  void expire(const Key& key, const MeetingPtr& meeting);
  void abandon();

 private:
  // How an arrival ends its meeting, or itself.
  struct Outcome {
    std::optional<Status> late;     // the arrival alone is told this
    std::optional<Status> failure;  // all are told this
    std::vector<Waiter> waiters;
    MeetingPtr complete;
  };
  // Those below are called with the mutex held.
  Outcome admit(const Key& key, Arrival arrival, Done& done);
  MeetingPtr find_or_open(const Key& key, const Arrival& arrival);
  std::vector<Waiter> fail(const Key& key, const MeetingPtr& meeting, const Status& error);
  void close(const MeetingPtr& meeting);
  void forget(const Key& key, const MeetingPtr& meeting);
};

void Rendezvous::Impl::join(Arrival arrival, Done done) {
  const int32_t rank = arrival.rank;
  const Key key{arrival.run_id, arrival.group_index};
  Outcome outcome;
  {
    const std::lock_guard lock(mutex);
    outcome = admit(key, std::move(arrival), done);
  }
  if (outcome.late) return done(*outcome.late);
  if (!outcome.failure && !outcome.complete) return;  // it waits

  const Status status = outcome.failure ? *outcome.failure : execute_meeting(*outcome.complete);
  // The others first: this rank's callback may wait for them.
  for (Waiter& waiter : outcome.waiters) {
    if (waiter.rank == rank) {
      done = std::move(waiter.done);
    } else {
      tell(std::move(waiter), status);
    }
  }
  done(status);
}

Rendezvous::Impl::Outcome Rendezvous::Impl::admit(const Key& key, Arrival arrival, Done& done) {
  Outcome outcome;
  const MeetingPtr meeting = find_or_open(key, arrival);
  if (meeting->failure()) {
    outcome.late = meeting->failure();
    meeting->add_late(arrival);
    if (meeting->is_complete()) forget(key, meeting);
  } else if (arrival.num_ranks != meeting->num_ranks()) {
    outcome.failure = meeting->other_num_ranks(arrival);
    outcome.waiters = fail(key, meeting, *outcome.failure);
    meeting->add_late(arrival);
    if (meeting->is_complete()) forget(key, meeting);
  } else {
    meeting->add(std::move(arrival), std::move(done));
    if (meeting->is_complete()) {
      close(meeting);
      forget(key, meeting);
      outcome.waiters = meeting->take_waiters();
      outcome.complete = meeting;
    }
  }
  return outcome;
}

Rendezvous::Impl::MeetingPtr Rendezvous::Impl::find_or_open(const Key& key,
                                                            const Arrival& arrival) {
  std::deque<MeetingPtr>& queue = meetings[key];
  for (const MeetingPtr& meeting : queue) {
    if (!meeting->has(arrival.rank)) return meeting;
  }
  auto meeting = std::make_shared<Meeting>(arrival);
  queue.push_back(meeting);
  ++open_meetings;
  // So that now + timeout cannot overflow; no program waits for longer.
  constexpr std::chrono::milliseconds kForever = std::chrono::hours(24 * 365);
  meeting->deadline = Deadlines::shared().add(
      Deadlines::Clock::now() + std::min(arrival.timeout, kForever),
      [weak_impl = weak_from_this(), weak_meeting = std::weak_ptr(meeting), key] {
        const auto impl = weak_impl.lock();
        const auto meeting = weak_meeting.lock();
        if (impl && meeting) impl->expire(key, meeting);
      });
  return meeting;
}

// The meeting has ended, well or not.
void Rendezvous::Impl::close(const MeetingPtr& meeting) {
  Deadlines::shared().cancel(meeting->deadline);
  --open_meetings;
}

void Rendezvous::Impl::forget(const Key& key, const MeetingPtr& meeting) {
  const auto it = meetings.find(key);
  std::erase(it->second, meeting);
  if (it->second.empty()) meetings.erase(it);
  if (meeting->failure()) {
    std::erase_if(failed, [&](const auto& entry) { return entry.second == meeting; });
  }
}

std::vector<Waiter> Rendezvous::Impl::fail(const Key& key,
                                           const MeetingPtr& meeting,
                                           const Status& error) {
  close(meeting);
  failed.emplace_back(key, meeting);
  std::vector<Waiter> waiters = meeting->fail(error);
  if (failed.size() > kMaxFailed) {
    const auto [oldest_key, oldest] = failed.front();
    forget(oldest_key, oldest);
  }
  return waiters;
}

void Rendezvous::Impl::expire(const Key& key, const MeetingPtr& meeting) {
  Status error;
  std::vector<Waiter> waiters;
  {
    const std::lock_guard lock(mutex);
    // The last rank, or another failure, may have come between the deadline and here.
    if (meeting->is_complete() || meeting->failure()) return;
    error = meeting->missing_ranks();
    waiters = fail(key, meeting, error);
  }
  tell(std::move(waiters), error);
}

void Rendezvous::Impl::abandon() {
  std::vector<std::pair<std::vector<Waiter>, Status>> told;
  {
    const std::lock_guard lock(mutex);
    for (const auto& [key, queue] : meetings) {
      for (const MeetingPtr& meeting : queue) {
        if (meeting->failure()) continue;
        close(meeting);
        const Status error = meeting->abandoned();
        told.emplace_back(meeting->fail(error), error);
      }
    }
    meetings.clear();
    failed.clear();
  }
  for (auto& [waiters, error] : told) tell(std::move(waiters), error);
}

Rendezvous::Rendezvous() : impl_(std::make_shared<Impl>()) { ++alive_rendezvous; }

Rendezvous::~Rendezvous() {
  impl_->abandon();
  --alive_rendezvous;
}

void Rendezvous::join(Arrival arrival, Done done) {
  if (const Status status = check_arrival(arrival); !status.ok()) return done(status);
  // A callback may destroy this object before join() returns.
  const std::shared_ptr<Impl> impl = impl_;
  impl->join(std::move(arrival), std::move(done));
}

int64_t Rendezvous::num_open_meetings() { return open_meetings; }

int64_t Rendezvous::num_alive() { return alive_rendezvous; }

}  // namespace jax_ep
