// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/worker_pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/cpu/threads.h"

namespace jax_ep {
namespace {

// One parallel_for in progress; lives on its caller's stack.
struct Job {
  const std::function<void(int64_t, int64_t)>& body;
  int64_t n;
  int64_t grain;
  int64_t num_chunks;
  std::atomic<int64_t> next_chunk{0};
  int num_inside = 0;  // helpers working on it; guarded by the pool's mutex

  void run_chunks() {
    for (;;) {
      const int64_t chunk = next_chunk.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= num_chunks) return;
      const int64_t begin = chunk * grain;
      body(begin, std::min(n, begin + grain));
    }
  }
};

}  // namespace

struct WorkerPool::Impl {
  std::mutex mutex;
  std::condition_variable work_or_stop;
  std::condition_variable helper_left;
  std::deque<Job*> jobs;  // those that may have chunks left
  bool stopping = false;
  std::vector<std::thread> helpers;

  void help() {
    std::unique_lock lock(mutex);
    for (;;) {
      work_or_stop.wait(lock, [this] { return stopping || !jobs.empty(); });
      if (stopping) return;
      // To the back of the queue, so that helpers spread over concurrent jobs.
      Job* const job = jobs.front();
      jobs.pop_front();
      jobs.push_back(job);
      ++job->num_inside;
      lock.unlock();
      job->run_chunks();
      lock.lock();
      withdraw(job);
      if (--job->num_inside == 0) helper_left.notify_all();
    }
  }

  // Called once the job has no chunk left to start. The mutex is held.
  void withdraw(Job* job) {
    const auto it = std::find(jobs.begin(), jobs.end(), job);
    if (it != jobs.end()) jobs.erase(it);
  }
};

WorkerPool::WorkerPool(int num_helpers) : impl_(std::make_unique<Impl>()) {
  for (int i = 0; i < num_helpers; ++i) {
    std::thread helper = start_thread("jax_ep_worker", [impl = impl_.get()] { impl->help(); });
    if (!helper.joinable()) break;  // the process may have no more threads: do with these
    impl_->helpers.push_back(std::move(helper));
  }
}

WorkerPool::~WorkerPool() {
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->stopping = true;
  }
  impl_->work_or_stop.notify_all();
  for (std::thread& helper : impl_->helpers) helper.join();
}

WorkerPool& WorkerPool::shared() {
  static auto* const pool = new WorkerPool(num_usable_cores() - 1);
  return *pool;
}

void WorkerPool::parallel_for(int64_t n,
                              int64_t grain,
                              const std::function<void(int64_t, int64_t)>& body) {
  if (n <= 0) return;
  grain = std::clamp<int64_t>(grain, 1, n);
  const int64_t num_chunks = (n - 1) / grain + 1;
  Job job{.body = body, .n = n, .grain = grain, .num_chunks = num_chunks};
  const int64_t num_wanted = std::min<int64_t>(num_helpers(), num_chunks - 1);
  if (num_wanted == 0) {
    job.run_chunks();
    return;
  }
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->jobs.push_back(&job);
  }
  for (int64_t i = 0; i < num_wanted; ++i) impl_->work_or_stop.notify_one();
  job.run_chunks();
  // The helpers' last release of the mutex is what makes their writes visible here.
  std::unique_lock lock(impl_->mutex);
  impl_->withdraw(&job);
  impl_->helper_left.wait(lock, [&job] { return job.num_inside == 0; });
}

int WorkerPool::num_helpers() const { return static_cast<int>(impl_->helpers.size()); }

}  // namespace jax_ep
