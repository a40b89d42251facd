// SPDX-License-Identifier: Apache-2.0
#include "csrc/runtime/rank_words.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstddef>
#include <cstring>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/core/protocol.h"
#include "csrc/runtime/tests/runtime_fixture.h"

namespace jax_ep {
namespace {

class RankWordsTest : public RuntimeTest {
 protected:
  static WordsOwner owner(const std::string& name) {
    return {.group_name = name, .device = 0, .num_ranks = 2, .timeout_s = 60, .report_s = 1};
  }
  static RankWords allocate(const WordsOwner& owner) {
    RankWords words;
    EXPECT_TRUE(is_ok(RankWords::allocate(owner, words)));
    return words;
  }
  // As a kernel stores it; where the host sees it.
  static void report(const RankWords& words, int32_t peer, const LongWait& wait) {
    auto* const on_device = words.long_waits_on_device() + peer;
    auto* const word = static_cast<uint64_t*>(fake_cudart::on_host(on_device));
    ASSERT_NE(word, nullptr);
    std::atomic_ref<uint64_t>(*word).store(pack(wait), std::memory_order_relaxed);
  }
  static ErrorRecord& record(const RankWords& words) {
    return *static_cast<ErrorRecord*>(fake_cudart::on_host(words.error_on_device()));
  }
  static std::vector<RankStatus> statuses_of(const std::string& name) {
    std::vector<RankStatus> found;
    for (RankStatus& status : rank_statuses()) {
      if (status.owner.group_name == name) found.push_back(std::move(status));
    }
    return found;
  }
  static bool any_byte(const RankWords& words) {
    const auto* const bytes = reinterpret_cast<const std::byte*>(words.control());
    for (int64_t i = 0; i < kControlBytes; ++i) {
      if (bytes[i] != std::byte{0}) return true;
    }
    return false;
  }
};

TEST_F(RankWordsTest, BeginAsZeros) {
  const RankWords words = allocate(owner("zeros"));
  EXPECT_FALSE(any_byte(words));
  EXPECT_FALSE(words.error().has_value());
  EXPECT_EQ(statuses_of("zeros").size(), 0U);
  const auto* const phases =
      static_cast<const uint64_t*>(fake_cudart::on_host(words.phases_on_device()));
  for (uint32_t channel = 0; channel < kNumChannels; ++channel) EXPECT_EQ(phases[channel], 0U);
}

TEST_F(RankWordsTest, ThatNoKernelHasSeenAreUsedAgain) {
  uint32_t* control = nullptr;
  {
    const RankWords words = allocate(owner("unseen"));
    control = words.control();
    std::memset(control, 0x55, kControlBytes);
    record(words).written = 1;
  }
  const RankWords words = allocate(owner("next"));
  EXPECT_EQ(words.control(), control);
  EXPECT_FALSE(any_byte(words));
  EXPECT_FALSE(words.error().has_value());
}

// A graph that was recorded with them may be launched at any time.
TEST_F(RankWordsTest, ThatKernelsMayHaveSeenAreNever) {
  std::set<uint32_t*> seen;
  std::set<ErrorRecord*> records;
  const size_t count = 2 * kWordsAtOnce + 1;
  for (size_t i = 0; i < count; ++i) {
    RankWords words = allocate(owner("seen"));
    words.publish();
    seen.insert(words.control());
    records.insert(words.error_on_device());
    EXPECT_TRUE(is_ok(words.close()));
  }
  EXPECT_EQ(seen.size(), count);
  EXPECT_EQ(records.size(), count);
  for (const uint32_t* control : seen) EXPECT_NE(control[0], 0U) << "still says closed";
}

TEST_F(RankWordsTest, CloseIsOfOneRankAndWaitsForNoKernel) {
  const RankWords other = allocate(owner("other"));
  RankWords words = allocate(owner("closed"));
  fake_cudart::run_kernels(0);
  EXPECT_TRUE(is_ok(words.close()));
  fake_cudart::finish_kernels();
  EXPECT_NE(words.control()[control_index(Control::kClosed)], 0U);
  EXPECT_EQ(words.control()[control_index(Channel::kHighThroughput, ChannelControl::kEpoch)], 0U);
  EXPECT_FALSE(any_byte(other));
  EXPECT_TRUE(is_ok(RankWords().close())) << "of no rank";
}

TEST_F(RankWordsTest, WhatAKernelSaysIsToldAlsoAfterItsGroup) {
  WordsOwner of = owner("says");
  of.group_index = 3;
  of.rank = 1;
  {
    RankWords words = allocate(of);
    const LongWait wait{.epoch = 7,
                        .op = static_cast<uint32_t>(OpKind::kDispatch),
                        .tag = static_cast<uint32_t>(WaitTag::kArrived),
                        .level = 2,
                        .ended = false};
    report(words, 0, wait);
    EXPECT_EQ(statuses_of("says").size(), 0U) << "no kernel runs with them yet";
    words.publish();
    ASSERT_EQ(statuses_of("says").size(), 1U);
    EXPECT_FALSE(statuses_of("says")[0].error.has_value());
  }
  const std::vector<RankStatus> statuses = statuses_of("says");
  ASSERT_EQ(statuses.size(), 1U);
  EXPECT_EQ(statuses[0].owner.group_index, 3);
  EXPECT_EQ(statuses[0].owner.rank, 1);
  ASSERT_EQ(statuses[0].waits.size(), 1U);
  EXPECT_EQ(statuses[0].waits[0].peer, 0);
  EXPECT_EQ(statuses[0].waits[0].wait.epoch, 7U);
  EXPECT_EQ(statuses[0].waits[0].wait.level, 2U);
}

// As a kernel between domains does when it begins and when it ends; each channel has its own.
TEST_F(RankWordsTest, WhatRunsIsKnownUntilItEnds) {
  const auto of_name = [](const std::string& name) {
    std::vector<KernelPhase> phases;
    for (const RunningKernel& kernel : running_kernels()) {
      if (kernel.owner.group_name == name) phases.push_back(kernel.phase);
    }
    return phases;
  };
  RankWords words = allocate(owner("runs"));
  auto* const on_host = static_cast<uint64_t*>(fake_cudart::on_host(words.phases_on_device()));
  ASSERT_NE(on_host, nullptr);
  const auto put = [&](Channel channel, const KernelPhase& phase) {
    std::atomic_ref<uint64_t>(on_host[static_cast<size_t>(channel)])
        .store(pack(phase), std::memory_order_relaxed);
  };
  const auto op = static_cast<uint32_t>(OpKind::kCombine);
  put(Channel::kHighThroughput, {.epoch = 7, .op = op, .running = true});
  EXPECT_EQ(of_name("runs").size(), 0U) << "no kernel runs with them yet";
  words.publish();
  ASSERT_EQ(of_name("runs").size(), 1U);
  EXPECT_EQ(of_name("runs")[0].epoch, 7U);
  EXPECT_EQ(of_name("runs")[0].op, op);
  put(Channel::kLowLatency, {.epoch = 2, .op = op, .running = true});
  EXPECT_EQ(of_name("runs").size(), 2U);
  put(Channel::kHighThroughput, {.epoch = 7, .op = op, .running = false});
  ASSERT_EQ(of_name("runs").size(), 1U);
  EXPECT_EQ(of_name("runs")[0].epoch, 2U);
  EXPECT_TRUE(is_ok(words.close()));
  EXPECT_EQ(of_name("runs").size(), 1U) << "it runs on when its group is closed";
}

TEST_F(RankWordsTest, TheWatchReadsWhileKernelsWriteAndGroupsComeAndGo) {
  std::atomic<bool> stop = false;
  std::thread watch([&] {
    while (!stop) {
      for (const RankStatus& status : statuses_of("watched")) {
        if (status.error.has_value()) {
          EXPECT_EQ(status.error->rank, 1U);
        }
      }
    }
  });
  for (int i = 0; i < 20; ++i) {
    RankWords words = allocate(owner("watched"));
    words.publish();
    std::thread kernel([&] {
      report(words, 1, {.epoch = 1, .op = 0, .tag = 2, .level = 1, .ended = false});
      ErrorRecord& error = record(words);
      error.rank = 1;
      // RELEASE(error): read by the watch.
      std::atomic_ref<uint32_t>(error.written).store(1, std::memory_order_release);
    });
    kernel.join();
    EXPECT_TRUE(words.error().has_value());
    EXPECT_TRUE(is_ok(words.close()));
  }
  stop = true;
  watch.join();
  EXPECT_EQ(statuses_of("watched").size(), 20U);
}

TEST_F(RankWordsTest, HaveOneOwner) {
  RankWords one = allocate(owner("one"));
  uint32_t* const control = one.control();
  RankWords other = std::move(one);
  EXPECT_EQ(other.control(), control);
  const RankWords third = allocate(owner("three"));
  EXPECT_NE(third.control(), control);
  other = allocate(owner("other"));
  EXPECT_EQ(allocate(owner("again")).control(), control) << "given up by `other`";
}

TEST_F(RankWordsTest, ThatCannotBeZeroedAreGivenBack) {
  uint32_t* const control = allocate(owner("first")).control();
  for (const char* function :
       {"cudaStreamCreateWithFlags", "cudaMemsetAsync", "cudaStreamSynchronize"}) {
    fake_cudart::fail(function, 1);
    RankWords words;
    const Status status = RankWords::allocate(owner("refused"), words);
    EXPECT_TRUE(contains(status.message(), function));
    EXPECT_EQ(allocate(owner("next")).control(), control);
  }
}

}  // namespace
}  // namespace jax_ep
