// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/rendezvous/completer.h"

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

#include "csrc/cpu/threads.h"

namespace jax_ep {

struct Completer::Impl {
  explicit Impl(std::chrono::milliseconds timeout) : idle_timeout(timeout) {}

  const std::chrono::milliseconds idle_timeout;
  std::mutex mutex;
  std::condition_variable posted_or_closing;
  std::deque<std::function<void()>> queue;
  int64_t num_idle = 0;
  int64_t num_threads = 0;
  bool closing = false;

  void run() {
    std::unique_lock lock(mutex);
    for (;;) {
      ++num_idle;
      posted_or_closing.wait_for(lock, idle_timeout, [this] { return closing || !queue.empty(); });
      --num_idle;
      if (queue.empty()) break;  // idle for too long, or closing
      std::function<void()> callback = std::move(queue.front());
      queue.pop_front();
      lock.unlock();
      callback();
      callback = nullptr;  // what it holds is released here, not under the lock
      lock.lock();
    }
    --num_threads;
  }
};

Completer::Completer(std::chrono::milliseconds idle_timeout)
    : impl_(std::make_shared<Impl>(idle_timeout)) {}

Completer::~Completer() {
  const std::lock_guard lock(impl_->mutex);
  impl_->closing = true;
  impl_->posted_or_closing.notify_all();
}

Completer& Completer::shared() {
  static auto* const completer = new Completer(std::chrono::seconds(30));
  return *completer;
}

void Completer::post(std::function<void()> callback) {
  std::unique_lock lock(impl_->mutex);
  impl_->queue.push_back(std::move(callback));
  // Every queued callback has a thread of its own: an idle one, or one made for it here (which
  // counts as idle only once it runs, so this may start one too many but never one too few).
  if (static_cast<int64_t>(impl_->queue.size()) <= impl_->num_idle) {
    impl_->posted_or_closing.notify_one();
    return;
  }
  ++impl_->num_threads;
  std::thread thread = start_thread("jax_ep_done", [impl = impl_] { impl->run(); });
  if (thread.joinable()) {
    thread.detach();
    return;
  }
  // The process may have no more threads. Better late, on a thread that is busy now, or here,
  // than never.
  if (--impl_->num_threads > 0) return;
  callback = std::move(impl_->queue.back());
  impl_->queue.pop_back();
  lock.unlock();
  callback();
}

int64_t Completer::num_threads() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->num_threads;
}

void post_with(const FloatEnv& float_env, std::function<void()> callback) {
  Completer::shared().post([float_env, callback = std::move(callback)] {
    float_env.apply();
    callback();
    FloatEnv::apply_default();
  });
}

}  // namespace jax_ep
