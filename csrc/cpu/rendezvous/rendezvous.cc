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
#include "csrc/cpu/rendezvous/missed_visits.h"
#include "csrc/cpu/rendezvous/pending_rendezvous.h"
#include "csrc/cpu/worker_pool.h"

namespace jax_ep {
namespace {

std::atomic<int64_t> pending_count{0};

Status check_arrival(const Rendezvous::Arrival& arrival) {
  const auto invalid = [&arrival](const std::string& what) {
    return Status::invalid_argument(arrival.group->name + ", " + std::string(op_name(arrival)) +
                                    ": " + what);
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
  post_with(waiter.float_env, [done = std::move(waiter.done), status] { done(status); });
}

void tell(std::vector<Waiter> waiters, const Status& status) {
  for (Waiter& waiter : waiters) tell(std::move(waiter), status);
}

// Before the ranks are told: their programs may end the process.
void post_failure(const Status& status) {
  Notices::shared().post(NoticeLevel::kError, status.message());
}

// Ranks that wait in a failed rendezvous, and its error.
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

// The rank of a second half cannot take part.
void end_flight(const Rendezvous::Arrival& arrival, const Status& error) {
  if (arrival.flight) arrival.group->flights->end(arrival.flight->number, error);
}

// The operation has ended for all ranks: so have their flights, and if it failed, their programs.
void end(const std::pair<int64_t, int32_t>& key,
         const PendingRendezvous& pending,
         const Status& status) {
  pending.end_flights(status);
  if (!status.ok()) pending.group().flights->fail_run(key.first, key.second, status);
}

// Runs a rendezvous's operation; the error says where it happened.
Status execute_pending(const PendingRendezvous& pending) {
  Status status = pending.check_flights();
  if (status.ok()) status = check_agreement(pending.calls());
  if (status.ok()) status = execute(pending.calls(), WorkerPool::shared());
  if (status.ok()) return status;
  return {status.code(), pending.context() + status.message()};
}

// Runs it, and tells those that wait, on another thread.
void execute_later(const std::pair<int64_t, int32_t>& key,
                   std::shared_ptr<PendingRendezvous> pending,
                   std::vector<Waiter> waiters) {
  Completer::shared().post(
      [key, pending = std::move(pending), waiters = std::move(waiters)]() mutable {
        const Status status = execute_pending(*pending);
        end(key, *pending, status);
        if (!status.ok()) post_failure(status);
        tell(std::move(waiters), status);
      });
}

}  // namespace

// Outlives the Rendezvous while a deadline or a join() is still at work on it.
struct Rendezvous::Impl : std::enable_shared_from_this<Impl> {
  using PendingPtr = std::shared_ptr<PendingRendezvous>;
  using Key = std::pair<int64_t, int32_t>;  // run_id, group_index

  // Failed rendezvous that are remembered for their late ranks, and refused runs.
  static constexpr size_t kMaxFailed = 64;

  mutable std::mutex mutex;
  // The rendezvous of each key, oldest first: those that lack a rank, and failed ones of which a
  // rank has not been told.
  std::map<Key, std::deque<PendingPtr>> pending_by_key;
  std::deque<std::pair<Key, PendingPtr>> failed;   // of `pending_by_key`, oldest failure first
  std::deque<std::pair<int64_t, Status>> refused;  // by run_id, oldest first
  MissedVisits missed;

  void join(Arrival arrival, Done done);
  // Of a rank that its own mask leaves out.
  void run_alone(const Arrival& arrival, const Done& done);
  void end_waits(int64_t group_id);
  void alarm(const Key& key, const PendingPtr& pending);
  void abandon();
  void refuse_run(int64_t run_id, const Status& error);
  void close_group(int64_t group_id);
  void add_waits(std::vector<Wait>& waits) const;

 private:
  // How an arrival ends its rendezvous, or itself.
  struct Outcome {
    std::optional<Status> late;     // the arrival alone is told this
    std::optional<Status> failure;  // all are told this
    std::vector<Waiter> waiters;
    PendingPtr complete;
  };
  // Those below are called with the mutex held.
  Outcome admit(const Key& key, Arrival arrival, Done& done);
  // Whether the arrival is a visit that the others have made without it.
  bool is_late(const Key& key, const Arrival& arrival);
  std::vector<Waiter> go_on(const Key& key, const PendingPtr& pending);
  [[nodiscard]] const Status* refusal_of(int64_t run_id) const;
  // What any rank of the run, or of the group, is told by now; whoever said it first has posted it.
  [[nodiscard]] std::optional<Status> why_not_at_all(const Arrival& arrival) const;
  // Of the open rendezvous that `picks`: their waiting ranks, to be told.
  template <typename Picks, typename ErrorOf>
  std::vector<Failed> fail_open(const Picks& picks, const ErrorOf& error_of);
  PendingPtr find_or_open(const Key& key, const Arrival& arrival);
  // Null if there is none.
  [[nodiscard]] PendingPtr find_waiting_with(const Key& key, const PendingPtr& pending) const;
  void set_alarm(const Key& key, const PendingPtr& pending);
  std::vector<Waiter> fail(const Key& key, const PendingPtr& pending, const Status& error);
  void close(const PendingPtr& pending);
  void forget(const Key& key, const PendingPtr& pending);
};

void Rendezvous::Impl::join(Arrival arrival, Done done) {
  const int32_t rank = arrival.place.rank;
  const Key key{arrival.run_id, arrival.place.group_index};
  Outcome outcome;
  bool late = false;
  {
    const std::lock_guard lock(mutex);
    late = is_late(key, arrival);
    if (!late) outcome = admit(key, std::move(arrival), done);
  }
  if (late) {
    const Status status = execute_late(rank, arrival.call, WorkerPool::shared());
    if (!status.ok()) post_failure(status);
    return done(status);
  }
  if (outcome.late) return done(*outcome.late);
  if (!outcome.failure && !outcome.complete) return;  // it waits

  const Status status = outcome.failure ? *outcome.failure : execute_pending(*outcome.complete);
  if (outcome.complete) end(key, *outcome.complete, status);
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
  if (const std::optional<Status> why_not = why_not_at_all(arrival)) {
    outcome.late = *why_not;
    end_flight(arrival, *why_not);
    return outcome;
  }
  const PendingPtr pending = find_or_open(key, arrival);
  if (pending->failure()) {
    outcome.late = pending->failure();
    end_flight(arrival, *outcome.late);
    pending->add_late(arrival);
    if (pending->is_complete()) forget(key, pending);
  } else if (arrival.num_ranks != pending->num_ranks() || !arrival.refusal.ok()) {
    outcome.failure =
        arrival.refusal.ok() ? pending->other_num_ranks(arrival) : pending->refused(arrival);
    outcome.waiters = fail(key, pending, *outcome.failure);
    end_flight(arrival, *outcome.failure);
    pending->add_late(arrival);
    if (pending->is_complete()) forget(key, pending);
  } else {
    pending->add(std::move(arrival), std::move(done));
    if (!pending->is_complete() && pending->awaits_nobody()) {
      outcome.waiters = go_on(key, pending);
      outcome.complete = pending;
    } else if (pending->is_complete()) {
      if (const auto text = pending->came_after_warning()) {
        Notices::shared().post(NoticeLevel::kInfo, *text);
      }
      close(pending);
      forget(key, pending);
      outcome.waiters = pending->take_waiters();
      outcome.complete = pending;
    } else if (const PendingPtr other = find_waiting_with(key, pending)) {
      outcome.failure = pending->other_mask(*other);
      outcome.waiters = fail(key, pending, *outcome.failure);
      for (Waiter& waiter : fail(key, other, *outcome.failure)) {
        outcome.waiters.push_back(std::move(waiter));
      }
    }
  }
  return outcome;
}

Rendezvous::Impl::PendingPtr Rendezvous::Impl::find_or_open(const Key& key,
                                                            const Arrival& arrival) {
  std::deque<PendingPtr>& queue = pending_by_key[key];
  for (const PendingPtr& pending : queue) {
    if (pending->lacks(arrival)) return pending;
  }
  auto pending = std::make_shared<PendingRendezvous>(arrival);
  queue.push_back(pending);
  ++pending_count;
  set_alarm(key, pending);
  return pending;
}

Rendezvous::Impl::PendingPtr Rendezvous::Impl::find_waiting_with(const Key& key,
                                                                 const PendingPtr& pending) const {
  for (const PendingPtr& other : pending_by_key.at(key)) {
    if (other != pending && !other->failure() && pending->waits_with(*other)) return other;
  }
  return nullptr;
}

std::optional<Status> Rendezvous::Impl::why_not_at_all(const Arrival& arrival) const {
  if (const Status* refusal = refusal_of(arrival.run_id)) return *refusal;
  // Closed since the caller found it open: close_group() has been here already, or will come.
  if (arrival.group->closed->load()) return closed_group(arrival.group->name, op_name(arrival));
  return std::nullopt;
}

bool Rendezvous::Impl::is_late(const Key& key, const Arrival& arrival) {
  return masks_missing_ranks(arrival) && arrival.refusal.ok() && !why_not_at_all(arrival) &&
         missed.take(key, ranks_of(arrival), arrival.place.rank);
}

// Those that came end it without the others, whose visit it remains.
std::vector<Waiter> Rendezvous::Impl::go_on(const Key& key, const PendingPtr& pending) {
  close(pending);
  forget(key, pending);
  missed.add(key, pending->mask(), pending->missing());
  return pending->go_on();
}

void Rendezvous::Impl::end_waits(int64_t group_id) {
  struct Ended {
    Key key;
    PendingPtr pending;
    std::vector<Waiter> waiters;
  };
  std::vector<Ended> ended;
  {
    const std::lock_guard lock(mutex);
    for (const auto& [key, queue] : pending_by_key) {
      for (const PendingPtr& pending : queue) {
        if (pending->failure() || pending->group().id != group_id) continue;
        if (pending->awaits_nobody()) ended.push_back({key, pending, {}});
      }
    }
    for (auto& [key, pending, waiters] : ended) waiters = go_on(key, pending);
  }
  // Not under the lock: where no thread can be started they go on here, and come to the next call.
  for (auto& [key, pending, waiters] : ended) execute_later(key, pending, std::move(waiters));
}

void Rendezvous::Impl::run_alone(const Arrival& arrival, const Done& done) {
  std::optional<Status> status;
  {
    const std::lock_guard lock(mutex);
    status = why_not_at_all(arrival);
  }
  if (!status) {  // what everybody is told has been posted
    status = arrival.refusal.ok()
                 ? execute_alone(arrival.place.rank, arrival.call, WorkerPool::shared())
                 : arrival.refusal;
    if (!status->ok()) post_failure(*status);
  }
  end_flight(arrival, *status);
  done(*status);
}

void Rendezvous::Impl::set_alarm(const Key& key, const PendingPtr& pending) {
  pending->alarm = Deadlines::shared().add(
      pending->next_alarm(),
      [weak_impl = weak_from_this(), weak_pending = std::weak_ptr(pending), key] {
        const auto impl = weak_impl.lock();
        const auto pending = weak_pending.lock();
        if (impl && pending) impl->alarm(key, pending);
      });
}

// The rendezvous has ended, well or not.
void Rendezvous::Impl::close(const PendingPtr& pending) {
  Deadlines::shared().cancel(pending->alarm);
  --pending_count;
}

void Rendezvous::Impl::forget(const Key& key, const PendingPtr& pending) {
  const auto it = pending_by_key.find(key);
  std::erase(it->second, pending);
  if (it->second.empty()) pending_by_key.erase(it);
  if (pending->failure()) {
    std::erase_if(failed, [&](const auto& entry) { return entry.second == pending; });
  }
}

std::vector<Waiter> Rendezvous::Impl::fail(const Key& key,
                                           const PendingPtr& pending,
                                           const Status& error) {
  close(pending);
  failed.emplace_back(key, pending);
  std::vector<Waiter> waiters = pending->fail(error);
  pending->group().flights->fail_run(key.first, key.second, error);
  if (failed.size() > kMaxFailed) {
    const auto [oldest_key, oldest] = failed.front();
    forget(oldest_key, oldest);
  }
  return waiters;
}

void Rendezvous::Impl::alarm(const Key& key, const PendingPtr& pending) {
  const std::vector<Wait> all = Rendezvous::waits();  // takes the mutex of each rendezvous in turn
  Status error;
  std::vector<Waiter> waiters;
  bool goes_on = false;
  {
    const std::lock_guard lock(mutex);
    // The last rank, or another failure, may have come between the alarm and here.
    if (pending->is_complete() || pending->failure() || pending->has_gone_on()) return;
    if (!pending->is_past_deadline()) {
      const std::string cause = root_cause(pending->wait(), all);
      Notices::shared().post(NoticeLevel::kWarning, pending->warning(cause));
      pending->warned();
      return set_alarm(key, pending);
    }
    goes_on = pending->masks_missing();
    if (goes_on) {
      Notices::shared().post(NoticeLevel::kWarning, pending->gone_on());
      waiters = go_on(key, pending);
    } else {
      error = pending->missing_ranks();
      waiters = fail(key, pending, error);
    }
  }
  if (goes_on) return execute_later(key, pending, std::move(waiters));
  post_and_tell({{std::move(waiters), error}});
}

void Rendezvous::Impl::abandon() {
  std::vector<Failed> told;
  {
    const std::lock_guard lock(mutex);
    for (const auto& [key, queue] : pending_by_key) {
      for (const PendingPtr& pending : queue) {
        if (pending->failure()) continue;
        close(pending);
        const Status error = pending->abandoned("the program was abandoned");
        told.push_back({pending->fail(error), error});
      }
    }
    pending_by_key.clear();
    failed.clear();
  }
  post_and_tell(std::move(told));
}

template <typename Picks, typename ErrorOf>
std::vector<Failed> Rendezvous::Impl::fail_open(const Picks& picks, const ErrorOf& error_of) {
  std::vector<std::pair<Key, PendingPtr>> open;
  for (const auto& [key, queue] : pending_by_key) {
    for (const PendingPtr& pending : queue) {
      if (!pending->failure() && picks(key, *pending)) open.emplace_back(key, pending);
    }
  }
  std::vector<Failed> told;
  for (const auto& [key, pending] : open) {
    const Status error = error_of(*pending);
    told.push_back({fail(key, pending, error), error});
  }
  return told;
}

void Rendezvous::Impl::close_group(int64_t group_id) {
  std::vector<Failed> told;
  {
    const std::lock_guard lock(mutex);
    told = fail_open(
        [group_id](const Key&, const PendingRendezvous& pending) {
          return pending.group().id == group_id;
        },
        [](const PendingRendezvous& pending) { return pending.abandoned("the group was closed"); });
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
    told = fail_open(
        [run_id](const Key& key, const PendingRendezvous&) { return key.first == run_id; },
        [&error](const PendingRendezvous&) { return error; });
  }
  post_failure(error);
  for (Failed& failed : told) tell(std::move(failed.waiters), error);
}

void Rendezvous::Impl::add_waits(std::vector<Wait>& waits) const {
  const std::lock_guard lock(mutex);
  for (const auto& [key, queue] : pending_by_key) {
    for (const PendingPtr& pending : queue) {
      if (!pending->failure()) waits.push_back(pending->wait());
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

std::string_view op_name(const Rendezvous::Arrival& arrival) {
  return arrival.flight ? done_name(arrival.flight->kind) : op_name(arrival.call);
}

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
    end_flight(arrival, status);
    post_failure(status);
    return done(status);
  }
  // A callback may destroy this object before join() returns.
  const std::shared_ptr<Impl> impl = impl_;
  if (!ranks_of(arrival).has(arrival.place.rank)) return impl->run_alone(arrival, done);
  impl->join(std::move(arrival), std::move(done));
}

void Rendezvous::refuse_run(int64_t run_id, const Status& error) {
  const std::shared_ptr<Impl> impl = impl_;
  impl->refuse_run(run_id, error);
}

void Rendezvous::close_group(int64_t group_id) {
  for (const auto& impl : Everywhere::instance().all()) impl->close_group(group_id);
}

void Rendezvous::end_waits(int64_t group_id) {
  for (const auto& impl : Everywhere::instance().all()) impl->end_waits(group_id);
}

std::vector<Wait> Rendezvous::waits() {
  std::vector<Wait> waits;
  for (const auto& impl : Everywhere::instance().all()) impl->add_waits(waits);
  for (const auto& group : GroupRegistry::instance().all()) group->flights->add_waits(waits);
  return waits;
}

int64_t Rendezvous::num_pending() { return pending_count; }

int64_t Rendezvous::num_alive() {
  Everywhere& everywhere = Everywhere::instance();
  const std::lock_guard lock(everywhere.mutex);
  return static_cast<int64_t>(everywhere.impls.size());
}

}  // namespace jax_ep
