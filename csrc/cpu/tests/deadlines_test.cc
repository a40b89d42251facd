// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/rendezvous/deadlines.h"

#include <gtest/gtest.h>

#include <chrono>
#include <future>
#include <mutex>
#include <thread>
#include <vector>

namespace jax_ep {
namespace {

using std::chrono::milliseconds;

Deadlines::Clock::time_point in(milliseconds delay) { return Deadlines::Clock::now() + delay; }

TEST(Deadlines, CallBackInOrderAndNotEarly) {
  std::mutex mutex;
  std::vector<int> order;
  std::promise<void> last;
  const auto start = Deadlines::Clock::now();
  const auto note = [&](int which) {
    const std::lock_guard lock(mutex);
    order.push_back(which);
  };
  // The later one first: the earlier must wake the thread, which sleeps until the later.
  Deadlines::shared().add(start + milliseconds(120), [&] {
    note(2);
    last.set_value();
  });
  Deadlines::shared().add(start + milliseconds(30), [&] { note(1); });
  Deadlines::shared().add(start - milliseconds(1), [&] { note(0); });
  last.get_future().wait();
  EXPECT_GE(Deadlines::Clock::now() - start, milliseconds(120));
  EXPECT_EQ(order, (std::vector<int>{0, 1, 2}));
  EXPECT_EQ(Deadlines::shared().num_pending(), 0);
}

TEST(Deadlines, DoNotCallBackOnceCancelled) {
  std::promise<void> later;
  const auto ticket = Deadlines::shared().add(in(milliseconds(20)), [] { FAIL(); });
  Deadlines::shared().add(in(milliseconds(60)), [&] { later.set_value(); });
  Deadlines::shared().cancel(ticket);
  later.get_future().wait();
  Deadlines::shared().cancel(ticket);  // twice is harmless
  EXPECT_EQ(Deadlines::shared().num_pending(), 0);
}

TEST(Deadlines, MayBeAddedFromACallback) {
  std::promise<void> second;
  Deadlines::shared().add(in(milliseconds(1)), [&] {
    Deadlines::shared().add(in(milliseconds(1)), [&] { second.set_value(); });
  });
  second.get_future().wait();
}

TEST(Deadlines, AreThreadSafe) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([] {
      for (int i = 0; i < 200; ++i) {
        const auto ticket = Deadlines::shared().add(in(milliseconds(i % 3)), [] {});
        if (i % 2 == 0) Deadlines::shared().cancel(ticket);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::promise<void> after_all;
  Deadlines::shared().add(in(milliseconds(10)), [&] { after_all.set_value(); });
  after_all.get_future().wait();
  EXPECT_EQ(Deadlines::shared().num_pending(), 0);
}

}  // namespace
}  // namespace jax_ep
