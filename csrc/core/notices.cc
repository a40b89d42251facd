// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/notices.h"

#include <condition_variable>
#include <deque>
#include <mutex>
#include <utility>

namespace jax_ep {

struct Notices::Impl {
  static constexpr size_t kMost = 1000;

  std::mutex mutex;
  std::condition_variable posted_or_stopped;
  std::deque<Notice> queue;
  int64_t num_lost = 0;
  bool stopped = false;
};

Notices::Notices() : impl_(new Impl) {}

Notices& Notices::shared() {
  static auto* const notices = new Notices;
  return *notices;
}

void Notices::post(NoticeLevel level, std::string text) {
  const std::lock_guard lock(impl_->mutex);
  if (impl_->queue.size() >= Impl::kMost) {
    ++impl_->num_lost;
    return;
  }
  impl_->queue.push_back({level, std::move(text)});
  impl_->posted_or_stopped.notify_one();
}

std::optional<Notice> Notices::next() {
  std::unique_lock lock(impl_->mutex);
  impl_->posted_or_stopped.wait(lock, [this] { return impl_->stopped || !impl_->queue.empty(); });
  if (impl_->queue.empty()) return std::nullopt;
  Notice notice = std::move(impl_->queue.front());
  impl_->queue.pop_front();
  if (impl_->queue.empty() && impl_->num_lost > 0) {
    const int64_t lost = std::exchange(impl_->num_lost, 0);
    impl_->queue.push_back(
        {NoticeLevel::kWarning,
         std::to_string(lost) + " messages were lost: they came faster than they were read"});
  }
  return notice;
}

void Notices::stop() {
  const std::lock_guard lock(impl_->mutex);
  impl_->stopped = true;
  impl_->posted_or_stopped.notify_all();
}

}  // namespace jax_ep
