// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/rendezvous/completer.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <future>
#include <latch>
#include <memory>
#include <thread>

namespace jax_ep {
namespace {

using std::chrono::milliseconds;

TEST(Completer, RunsEachCallbackOnAThreadOfItsOwn) {
  Completer completer(std::chrono::seconds(30));
  constexpr int kCallbacks = 12;
  // Every callback waits for all others: any two on one thread would hang.
  std::latch all_in(kCallbacks);
  std::latch all_out(kCallbacks);
  for (int i = 0; i < kCallbacks; ++i) {
    completer.post([&] {
      all_in.arrive_and_wait();
      all_out.count_down();
    });
  }
  all_out.wait();
  EXPECT_EQ(completer.num_threads(), kCallbacks);
}

TEST(Completer, KeepsIdleThreadsForTheNextCallback) {
  Completer completer(std::chrono::seconds(30));
  for (int i = 0; i < 50; ++i) {
    std::promise<void> ran;
    completer.post([&ran] { ran.set_value(); });
    ran.get_future().wait();
  }
  // A thread that is still on its way back to idle may make a callback start another.
  EXPECT_LT(completer.num_threads(), 25);
}

TEST(Completer, EndsThreadsThatStayIdle) {
  Completer completer(milliseconds(20));
  std::promise<void> ran;
  completer.post([&ran] { ran.set_value(); });
  ran.get_future().wait();
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (completer.num_threads() > 0 && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(milliseconds(5));
  }
  EXPECT_EQ(completer.num_threads(), 0);

  std::promise<void> ran_again;
  completer.post([&ran_again] { ran_again.set_value(); });
  ran_again.get_future().wait();
}

TEST(Completer, ReleasesWhatACallbackHolds) {
  Completer completer(std::chrono::seconds(30));
  auto held = std::make_shared<int>(1);
  const std::weak_ptr<int> watched = held;
  completer.post([held = std::move(held)] {});
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!watched.expired() && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(milliseconds(1));
  }
  EXPECT_TRUE(watched.expired()) << "an idle thread must not keep its last callback";
}

TEST(Completer, RunsWhatWasPostedBeforeItIsDestroyed) {
  auto ran = std::make_shared<std::promise<void>>();
  auto future = ran->get_future();
  {
    Completer completer(std::chrono::seconds(30));
    completer.post([ran] { ran->set_value(); });
  }
  EXPECT_EQ(future.wait_for(std::chrono::seconds(20)), std::future_status::ready);
}

}  // namespace
}  // namespace jax_ep
