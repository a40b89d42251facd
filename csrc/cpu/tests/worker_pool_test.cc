// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/worker_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

namespace jax_ep {
namespace {

// Runs parallel_for and expects each index exactly once, in ranges of at most `grain`.
void expect_covers_once(WorkerPool& pool, int64_t n, int64_t grain) {
  std::vector<std::atomic<int>> visits(static_cast<size_t>(n));
  std::atomic<int64_t> longest{0};
  pool.parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    EXPECT_LT(begin, end);
    for (int64_t seen = longest; end - begin > seen;) {
      if (longest.compare_exchange_weak(seen, end - begin)) break;
    }
    for (int64_t i = begin; i < end; ++i) ++visits[static_cast<size_t>(i)];
  });
  EXPECT_LE(longest, std::max<int64_t>(grain, 1));
  for (const auto& count : visits) ASSERT_EQ(count, 1) << "n " << n << ", grain " << grain;
}

class WorkerPoolSizes : public testing::TestWithParam<int> {};

TEST_P(WorkerPoolSizes, CoversTheRangeOnce) {
  WorkerPool pool(GetParam());
  EXPECT_EQ(pool.num_helpers(), GetParam());
  for (const int64_t n : {0, 1, 2, 7, 64, 1000}) {
    for (const int64_t grain : {1, 2, 3, 64, 1000, 5000}) expect_covers_once(pool, n, grain);
  }
}

TEST_P(WorkerPoolSizes, ToleratesAGrainBelowOne) {
  WorkerPool pool(GetParam());
  expect_covers_once(pool, 10, 0);
  expect_covers_once(pool, 10, -5);
}

TEST_P(WorkerPoolSizes, ServesConcurrentCallers) {
  WorkerPool pool(GetParam());
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&pool, i] {
      for (int round = 0; round < 100; ++round) expect_covers_once(pool, 50 + i, 3);
    });
  }
  for (std::thread& caller : callers) caller.join();
}

INSTANTIATE_TEST_SUITE_P(Helpers, WorkerPoolSizes, testing::Values(0, 1, 3));

TEST(WorkerPool, RunsOneChunkOnTheCaller) {
  WorkerPool pool(2);
  std::thread::id thread;
  pool.parallel_for(10, 10, [&](int64_t, int64_t) { thread = std::this_thread::get_id(); });
  EXPECT_EQ(thread, std::this_thread::get_id());
}

TEST(WorkerPool, HelpersTakePart) {
  WorkerPool pool(2);
  std::mutex mutex;
  std::condition_variable all_in;
  std::set<std::thread::id> inside;
  // Each chunk waits until three threads are in one: would hang if the caller were alone.
  pool.parallel_for(3, 1, [&](int64_t, int64_t) {
    std::unique_lock lock(mutex);
    inside.insert(std::this_thread::get_id());
    all_in.notify_all();
    all_in.wait(lock, [&] { return inside.size() == 3; });
  });
  EXPECT_TRUE(inside.contains(std::this_thread::get_id()));
}

TEST(WorkerPool, WritesAreVisibleAfterwards) {
  WorkerPool pool(2);
  std::vector<int> values(1000);
  for (int round = 1; round <= 50; ++round) {
    pool.parallel_for(1000, 10, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) values[static_cast<size_t>(i)] += round;
    });
    ASSERT_EQ(values, std::vector<int>(1000, round * (round + 1) / 2));
  }
}

TEST(WorkerPool, HelpersHaveTheDefaultRounding) {
  ASSERT_EQ(std::fesetround(FE_UPWARD), 0);
  {
    WorkerPool pool(2);  // made by a thread with other modes, which new threads inherit
    const std::thread::id caller = std::this_thread::get_id();
    pool.parallel_for(200, 1, [&](int64_t, int64_t) {
      const bool on_caller = std::this_thread::get_id() == caller;
      EXPECT_EQ(std::fegetround(), on_caller ? FE_UPWARD : FE_TONEAREST);
      std::this_thread::yield();
    });
  }
  std::fesetround(FE_TONEAREST);
}

TEST(WorkerPool, SharedIsOne) {
  EXPECT_EQ(&WorkerPool::shared(), &WorkerPool::shared());
  EXPECT_GE(WorkerPool::shared().num_helpers(), 0);
  expect_covers_once(WorkerPool::shared(), 1000, 7);
}

}  // namespace
}  // namespace jax_ep
