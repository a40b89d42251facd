// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/rendezvous/deadlines.h"

#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>

#include "csrc/cpu/threads.h"

namespace jax_ep {

struct Deadlines::Impl {
  std::mutex mutex;
  std::condition_variable wake_up;
  std::map<Ticket, std::function<void()>> pending;
  uint64_t next_id = 0;
  bool running = false;
  // When the thread looks again by itself. Rendezvous come and go much faster than deadlines
  // pass, so a deadline that is later than this does not wake the thread.
  Clock::time_point next_look = Clock::time_point::min();

  [[noreturn]] void run() {
    std::unique_lock lock(mutex);
    for (;;) {
      next_look = pending.empty() ? Clock::time_point::max() : pending.begin()->first.first;
      if (pending.empty()) {
        wake_up.wait(lock);
        continue;
      }
      if (Clock::now() < next_look) {
        wake_up.wait_until(lock, next_look);
        continue;
      }
      auto node = pending.extract(pending.begin());
      lock.unlock();
      node.mapped()();
      node = {};  // what the callback holds is released here, not under the lock
      lock.lock();
    }
  }
};

Deadlines::Deadlines() : impl_(new Impl) {}

Deadlines& Deadlines::shared() {
  static auto* const deadlines = new Deadlines;
  return *deadlines;
}

Deadlines::Ticket Deadlines::add(Clock::time_point deadline, std::function<void()> expired) {
  const std::lock_guard lock(impl_->mutex);
  const Ticket ticket{deadline, impl_->next_id++};
  impl_->pending.emplace(ticket, std::move(expired));
  // A process that may have no more threads has no deadlines until it may: each call tries.
  if (!impl_->running) {
    std::thread thread = start_thread("jax_ep_deadline", [impl = impl_] { impl->run(); });
    impl_->running = thread.joinable();
    if (impl_->running) thread.detach();
  }
  if (deadline < impl_->next_look) impl_->wake_up.notify_one();
  return ticket;
}

void Deadlines::cancel(const Ticket& ticket) {
  const std::lock_guard lock(impl_->mutex);
  impl_->pending.erase(ticket);
}

int64_t Deadlines::num_pending() const {
  const std::lock_guard lock(impl_->mutex);
  return static_cast<int64_t>(impl_->pending.size());
}

}  // namespace jax_ep
