// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/rendezvous/rendezvous.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "csrc/core/notices.h"
#include "csrc/cpu/float_env.h"
#include "csrc/cpu/rendezvous/completer.h"
#include "csrc/cpu/rendezvous/deadlines.h"
#include "csrc/cpu/rendezvous/pending_rendezvous.h"
#include "csrc/cpu/worker_pool.h"

namespace jax_ep {
namespace {

std::atomic<int64_t> open_meetings{0};

Status check_arrival(const Rendezvous::Arrival& arrival) {
  const auto invalid = [&arrival](const std::string& what) {
    return Status::invalid_argument(arrival.group->name + ", " +
                                    std::string(op_name(arrival.call)) + ": " + what);
  };
  if (arrival.num_ranks < 1) {
    return invalid("num_ranks is " + std::to_string(arrival.num_ranks) +
                   ", but must be at least 1");
  }
  if (arrival.place.rank < 0 || arrival.place.rank >= arrival.num_ranks) {
    return invalid("rank is " + std::to_string(arrival.place.rank) + ", but must be in [0, " +
                   std::to_string(arrival.num_ranks) + ")");
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

// Before the ranks are told: their programs may end the process.
void post_failure(const Status& status) {
  Notices::shared().post(NoticeLevel::kError, status.message());
}

// Ranks that wait in a failed meeting, and its error.
struct Failed {
  std::vector<Waiter> waiters;
  Status error;
};

void post_and_tell(std::vector<Failed> all) {
  for (Failed& failed : all) {
    post_failure(failed.error);
    tell(std::move(failed.waiters), failed.error);
  }
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

  // Failed meetings that are remembered for their late ranks, and refused runs.
  static constexpr size_t kMaxFailed = 64;

  mutable std::mutex mutex;
  // The meetings of each key, oldest first: those that lack a rank, and failed ones of which a
  // rank has not been told.
  std::map<Key, std::deque<MeetingPtr>> meetings;
  std::deque<std::pair<Key, MeetingPtr>> failed;   // of `meetings`, oldest failure first
  std::deque<std::pair<int64_t, Status>> refused;  // by run_id, oldest first

  void join(Arrival arrival, Done done);
  void alarm(const Key& key, const MeetingPtr& meeting);
  void abandon();
  void refuse_run(int64_t run_id, const Status& error);
  void close_group(int64_t group_id);
  void add_waits(std::vector<Wait>& waits) const;

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
  [[nodiscard]] const Status* refusal_of(int64_t run_id) const;
  // Of the open meetings that `picks`: their waiting ranks, to be told.
  template <typename Picks, typename ErrorOf>
  std::vector<Failed> fail_open(const Picks& picks, const ErrorOf& error_of);
  MeetingPtr find_or_open(const Key& key, const Arrival& arrival);
  void set_alarm(const Key& key, const MeetingPtr& meeting);
  std::vector<Waiter> fail(const Key& key, const MeetingPtr& meeting, const Status& error);
  void close(const MeetingPtr& meeting);
  void forget(const Key& key, const MeetingPtr& meeting);
};

void Rendezvous::Impl::join(Arrival arrival, Done done) {
  const int32_t rank = arrival.place.rank;
  const Key key{arrival.run_id, arrival.place.group_index};
  Outcome outcome;
  {
    const std::lock_guard lock(mutex);
    outcome = admit(key, std::move(arrival), done);
  }
  if (outcome.late) return done(*outcome.late);
  if (!outcome.failure && !outcome.complete) return;  // it waits

  const Status status = outcome.failure ? *outcome.failure : execute_meeting(*outcome.complete);
  if (!status.ok()) post_failure(status);
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
  if (const Status* refusal = refusal_of(arrival.run_id)) {
    outcome.late = *refusal;
    return outcome;
  }
  // Closed since the caller found it open: close_group() has been here already, or will come.
  if (arrival.group->closed->load()) {
    outcome.late = closed_group(arrival.group->name, op_name(arrival.call));
    return outcome;
  }
  const MeetingPtr meeting = find_or_open(key, arrival);
  if (meeting->failure()) {
    outcome.late = meeting->failure();
    meeting->add_late(arrival);
    if (meeting->is_complete()) forget(key, meeting);
  } else if (arrival.num_ranks != meeting->num_ranks() || !arrival.refusal.ok()) {
    outcome.failure =
        arrival.refusal.ok() ? meeting->other_num_ranks(arrival) : meeting->refused(arrival);
    outcome.waiters = fail(key, meeting, *outcome.failure);
    meeting->add_late(arrival);
    if (meeting->is_complete()) forget(key, meeting);
  } else {
    meeting->add(std::move(arrival), std::move(done));
    if (meeting->is_complete()) {
      if (const auto text = meeting->came_after_warning()) {
        Notices::shared().post(NoticeLevel::kInfo, *text);
      }
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
    if (!meeting->has(arrival.place.rank)) return meeting;
  }
  auto meeting = std::make_shared<Meeting>(arrival);
  queue.push_back(meeting);
  ++open_meetings;
  set_alarm(key, meeting);
  return meeting;
}

void Rendezvous::Impl::set_alarm(const Key& key, const MeetingPtr& meeting) {
  meeting->alarm = Deadlines::shared().add(
      meeting->next_alarm(),
      [weak_impl = weak_from_this(), weak_meeting = std::weak_ptr(meeting), key] {
        const auto impl = weak_impl.lock();
        const auto meeting = weak_meeting.lock();
        if (impl && meeting) impl->alarm(key, meeting);
      });
}

// The meeting has ended, well or not.
void Rendezvous::Impl::close(const MeetingPtr& meeting) {
  Deadlines::shared().cancel(meeting->alarm);
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

void Rendezvous::Impl::alarm(const Key& key, const MeetingPtr& meeting) {
  const std::vector<Wait> all = Rendezvous::waits();  // takes the mutex of each rendezvous in turn
  Status error;
  std::vector<Waiter> waiters;
  {
    const std::lock_guard lock(mutex);
    // The last rank, or another failure, may have come between the alarm and here.
    if (meeting->is_complete() || meeting->failure()) return;
    if (!meeting->is_past_deadline()) {
      const std::string cause = root_cause(meeting->wait(), all);
      Notices::shared().post(NoticeLevel::kWarning, meeting->warning(cause));
      meeting->warned();
      return set_alarm(key, meeting);
    }
    error = meeting->missing_ranks();
    waiters = fail(key, meeting, error);
  }
  post_and_tell({{std::move(waiters), error}});
}

void Rendezvous::Impl::abandon() {
  std::vector<Failed> told;
  {
    const std::lock_guard lock(mutex);
    for (const auto& [key, queue] : meetings) {
      for (const MeetingPtr& meeting : queue) {
        if (meeting->failure()) continue;
        close(meeting);
        const Status error = meeting->abandoned("the program was abandoned");
        told.push_back({meeting->fail(error), error});
      }
    }
    meetings.clear();
    failed.clear();
  }
  post_and_tell(std::move(told));
}

template <typename Picks, typename ErrorOf>
std::vector<Failed> Rendezvous::Impl::fail_open(const Picks& picks, const ErrorOf& error_of) {
  std::vector<std::pair<Key, MeetingPtr>> open;
  for (const auto& [key, queue] : meetings) {
    for (const MeetingPtr& meeting : queue) {
      if (!meeting->failure() && picks(key, *meeting)) open.emplace_back(key, meeting);
    }
  }
  std::vector<Failed> told;
  for (const auto& [key, meeting] : open) {
    const Status error = error_of(*meeting);
    told.push_back({fail(key, meeting, error), error});
  }
  return told;
}

void Rendezvous::Impl::close_group(int64_t group_id) {
  std::vector<Failed> told;
  {
    const std::lock_guard lock(mutex);
    told = fail_open(
        [group_id](const Key&, const Meeting& meeting) { return meeting.group().id == group_id; },
        [](const Meeting& meeting) { return meeting.abandoned("the group was closed"); });
  }
  post_and_tell(std::move(told));
}

const Status* Rendezvous::Impl::refusal_of(int64_t run_id) const {
  for (const auto& [run, error] : refused) {
    if (run == run_id) return &error;
  }
  return nullptr;
}

void Rendezvous::Impl::refuse_run(int64_t run_id, const Status& error) {
  std::vector<Failed> told;
  {
    const std::lock_guard lock(mutex);
    if (refusal_of(run_id) != nullptr) return;
    refused.emplace_back(run_id, error);
    if (refused.size() > kMaxFailed) refused.pop_front();
    told = fail_open([run_id](const Key& key, const Meeting&) { return key.first == run_id; },
                     [&error](const Meeting&) { return error; });
  }
  post_failure(error);
  for (Failed& failed : told) tell(std::move(failed.waiters), error);
}

void Rendezvous::Impl::add_waits(std::vector<Wait>& waits) const {
  const std::lock_guard lock(mutex);
  for (const auto& [key, queue] : meetings) {
    for (const MeetingPtr& meeting : queue) {
      if (!meeting->failure()) waits.push_back(meeting->wait());
    }
  }
}

// All rendezvous of the process. A weak one: it may be on its way out.
struct Rendezvous::Everywhere {
  std::mutex mutex;
  std::map<const Impl*, std::weak_ptr<Impl>> impls;

  static Everywhere& instance() {
    static auto* const everywhere = new Everywhere;
    return *everywhere;
  }
  std::vector<std::shared_ptr<Impl>> all() {
    const std::lock_guard lock(mutex);
    std::vector<std::shared_ptr<Impl>> result;
    for (const auto& [raw, weak] : impls) {
      if (auto impl = weak.lock()) result.push_back(std::move(impl));
    }
    return result;
  }
};

Rendezvous::Rendezvous() : impl_(std::make_shared<Impl>()) {
  Everywhere& everywhere = Everywhere::instance();
  const std::lock_guard lock(everywhere.mutex);
  everywhere.impls.emplace(impl_.get(), impl_);
}

Rendezvous::~Rendezvous() {
  {
    Everywhere& everywhere = Everywhere::instance();
    const std::lock_guard lock(everywhere.mutex);
    everywhere.impls.erase(impl_.get());
  }
  impl_->abandon();
}

void Rendezvous::join(Arrival arrival, Done done) {
  if (const Status status = check_arrival(arrival); !status.ok()) {
    post_failure(status);
    return done(status);
  }
  // A callback may destroy this object before join() returns.
  const std::shared_ptr<Impl> impl = impl_;
  impl->join(std::move(arrival), std::move(done));
}

void Rendezvous::refuse_run(int64_t run_id, const Status& error) {
  const std::shared_ptr<Impl> impl = impl_;
  impl->refuse_run(run_id, error);
}

void Rendezvous::close_group(int64_t group_id) {
  for (const auto& impl : Everywhere::instance().all()) impl->close_group(group_id);
}

std::vector<Wait> Rendezvous::waits() {
  std::vector<Wait> waits;
  for (const auto& impl : Everywhere::instance().all()) impl->add_waits(waits);
  return waits;
}

int64_t Rendezvous::num_open_meetings() { return open_meetings; }

int64_t Rendezvous::num_alive() {
  Everywhere& everywhere = Everywhere::instance();
  const std::lock_guard lock(everywhere.mutex);
  return static_cast<int64_t>(everywhere.impls.size());
}

}  // namespace jax_ep
