// SPDX-License-Identifier: Apache-2.0
// Groups whose ranks are all of this process. Several processes: processes_test.cc.
#include "csrc/runtime/cuda_group.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "csrc/core/protocol.h"
#include "csrc/runtime/tests/runtime_fixture.h"

namespace jax_ep {
namespace {

class CudaGroupTest : public RuntimeTest {
 protected:
  static std::unique_ptr<CudaGroup> create(const CudaGroupConfig& config) {
    std::unique_ptr<CudaGroup> group;
    EXPECT_TRUE(is_ok(CudaGroup::create(config, group)));
    return group;
  }
  static std::unique_ptr<CudaGroup> connected(const CudaGroupConfig& config) {
    std::unique_ptr<CudaGroup> group = create(config);
    EXPECT_TRUE(is_ok(connect_all(*group)));
    return group;
  }
  // What kernels of a rank read first.
  static uint32_t told_closed(const RankContext& rank) {
    return rank.view().control[control_index(Control::kClosed)];
  }
  // What was left to kernels is nothing for the next test.
  static void end_of_kernels() {
    fake_cudart::finish_kernels();
    while (fake_cudart::num_waiting() > 0) std::this_thread::yield();
    fake_cudart::reset(fake_cudart::make_machine(4));
  }
  static Status find(const CudaGroup& group, int32_t device) {
    const RankContext* rank = nullptr;
    const Status status = group.find(device, rank);
    EXPECT_EQ(status.ok(), rank != nullptr);
    return status;
  }
};

TEST_F(CudaGroupTest, BadRanksCostNothing) {
  std::unique_ptr<CudaGroup> group;
  for (const int32_t rank : {-1, 2}) {
    CudaGroupConfig config = group_config(2);
    config.ranks[1].rank = rank;
    const Status status = CudaGroup::create(config, group);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(),
              "rank is " + std::to_string(rank) + "; allowed: 0 to num_ranks - 1 = 1");
  }
  CudaGroupConfig config = group_config(2);
  config.ranks[1].device = 0;
  const Status status = CudaGroup::create(config, group);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "CUDA device 0 is given to 2 ranks of one process; allowed: one");
  EXPECT_EQ(group, nullptr);
  EXPECT_EQ(fake_cudart::calls(), Texts{});
}

TEST_F(CudaGroupTest, ServesCallsFromTheLastConnectToTheDisconnect) {
  const std::unique_ptr<CudaGroup> group = create(group_config(2));
  EXPECT_EQ(find(*group, 0).code(), StatusCode::kFailedPrecondition);
  ASSERT_TRUE(is_ok(group->connect(0, 0, handles_of(*group))));
  EXPECT_EQ(find(*group, 0).message(), "EpGroup 0 is not connected to its peers");
  ASSERT_TRUE(is_ok(group->connect(0, 1, handles_of(*group))));
  for (int32_t device = 0; device < 2; ++device) {
    const RankContext* rank = nullptr;
    ASSERT_TRUE(is_ok(group->find(device, rank)));
    EXPECT_EQ(rank->config().local.rank, device);
  }
  EXPECT_TRUE(contains(find(*group, 2).message(), "EpGroup 0 has no rank on CUDA device 2"));
  EXPECT_TRUE(is_ok(group->disconnect(kNoLimit)));
  EXPECT_EQ(find(*group, 0).code(), StatusCode::kFailedPrecondition);
}

TEST_F(CudaGroupTest, ARankConnectsOnceAndOnlyWhereItIs) {
  const std::unique_ptr<CudaGroup> group = connected(group_config(2));
  const std::vector<HeapHandle> handles = handles_of(*group);
  EXPECT_EQ(group->connect(0, 1, handles).message(),
            "connect: rank 1 of group 0 is connected already");
  EXPECT_EQ(group->connect(0, 2, handles).message(),
            "connect: rank 2 of group 0 is not of this process");
  EXPECT_EQ(group->connect(1, 0, handles).message(),
            "connect: rank 0 of group 1 is not of this process");
  EXPECT_TRUE(is_ok(find(*group, 0)));
}

TEST_F(CudaGroupTest, HandlesComeInAnyOrderAndNoneIsMissing) {
  const std::unique_ptr<CudaGroup> group = create(group_config(3));
  std::vector<HeapHandle> handles = handles_of(*group);
  std::reverse(handles.begin(), handles.end());
  handles.pop_back();
  const Status status = group->connect(0, 0, handles);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "connect: no handle of rank 0 of group 0 among 2");
  handles.push_back(group->ranks()[0].handle());
  ASSERT_TRUE(is_ok(group->connect(0, 1, handles)));
  EXPECT_EQ(group->ranks()[1].view().heap[2], group->ranks()[2].handle().base);
}

TEST_F(CudaGroupTest, HasAnEpGroupForEachIndex) {
  CudaGroupConfig config = group_config(2);
  config.ranks.push_back({.device = 2, .group_index = 1, .rank = 1});
  config.ranks.push_back({.device = 3, .group_index = 1, .rank = 0});
  const std::unique_ptr<CudaGroup> group = connected(config);
  const std::span<const RankContext> ranks = group->ranks();
  EXPECT_EQ(ranks[0].view().heap[1], ranks[1].handle().base);
  EXPECT_EQ(ranks[2].view().heap[0], ranks[3].handle().base);
  EXPECT_EQ(ranks[2].view().heap[1], ranks[2].handle().base);
}

TEST_F(CudaGroupTest, AsksTheHostWhomNotToWaitForOnlyIfItGoesOn) {
  EXPECT_EQ(connected(group_config(2))->ranks()[0].view().given_up, nullptr);
}

TEST_F(CudaGroupTest, TellsKernelsOfAnEpGroupWhomNotToWaitFor) {
  CudaGroupConfig config = group_config(2);
  config.group.masks_missing_ranks = true;
  config.ranks.push_back({.device = 2, .group_index = 1, .rank = 1});
  config.ranks.push_back({.device = 3, .group_index = 1, .rank = 0});
  const std::unique_ptr<CudaGroup> group = connected(config);
  const auto told = [&](size_t i) {
    return *static_cast<const uint64_t*>(
        fake_cudart::on_host(const_cast<uint64_t*>(group->ranks()[i].view().given_up)));
  };
  EXPECT_EQ(told(2), 0U);
  const int32_t ranks[] = {1};
  ASSERT_TRUE(is_ok(group->give_up_on(1, ranks)));
  const int32_t others[] = {0};
  ASSERT_TRUE(is_ok(group->give_up_on(1, others)));
  EXPECT_EQ(told(0), 0U);
  EXPECT_EQ(told(1), 0U);
  EXPECT_EQ(told(2), 3U);
  EXPECT_EQ(told(3), 3U);
  const int32_t unknown[] = {0, 2};
  const Status status = group->give_up_on(0, unknown);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "give_up_on: ranks holds 2; allowed: 0 to 1");
  EXPECT_EQ(told(0), 0U);
}

TEST_F(CudaGroupTest, AFailedConnectCanBeTriedAgain) {
  const std::unique_ptr<CudaGroup> group = create(group_config(2));
  std::vector<HeapHandle> wrong = handles_of(*group);
  wrong[1].owner.nonce += 1;
  EXPECT_EQ(group->connect(0, 0, wrong).code(), StatusCode::kFailedPrecondition);
  EXPECT_FALSE(group->ranks()[0].connected());
  ASSERT_TRUE(is_ok(connect_all(*group)));
  EXPECT_TRUE(is_ok(find(*group, 0)));
}

TEST_F(CudaGroupTest, ReportsTheFirstRankThatGaveUp) {
  const std::unique_ptr<CudaGroup> group = connected(group_config(3));
  EXPECT_TRUE(is_ok(group->error()));
  for (const size_t index : {2, 1}) {
    give_up(group->ranks()[index], WaitTag::kArrived);
    EXPECT_TRUE(contains(group->error().message(), "rank " + std::to_string(index) + " waited"));
  }
}

// A rank is unmapped only when none of the process runs a kernel that may store there.
TEST_F(CudaGroupTest, DisconnectWaitsForAllKernelsFirst) {
  const std::unique_ptr<CudaGroup> group = connected(group_config(2));
  fake_cudart::run_kernels(1);
  std::thread thread([&] { EXPECT_TRUE(is_ok(group->disconnect(kNoLimit))); });
  while (fake_cudart::num_waiting() == 0) std::this_thread::yield();
  EXPECT_TRUE(group->ranks()[0].connected());
  EXPECT_EQ(find(*group, 0).code(), StatusCode::kFailedPrecondition) << "no call may begin now";
  fake_cudart::finish_kernels();
  thread.join();
  EXPECT_FALSE(group->ranks()[0].connected());
}

// A CUDA graph may launch kernels at any time, with what they were recorded with.
TEST_F(CudaGroupTest, DisconnectTellsTheKernelsOfRecordedGraphs) {
  const std::unique_ptr<CudaGroup> group = connected(group_config(2));
  const std::unique_ptr<CudaGroup> other = connected(group_config(2));
  for (const RankContext& rank : group->ranks()) EXPECT_EQ(told_closed(rank), 0U);
  const size_t before = fake_cudart::calls().size();
  EXPECT_TRUE(is_ok(group->disconnect(kNoLimit)));
  for (const RankContext& rank : group->ranks()) EXPECT_NE(told_closed(rank), 0U);
  for (const RankContext& rank : other->ranks()) EXPECT_EQ(told_closed(rank), 0U);
  // One that was launched before it could be told is waited for too.
  Texts order = fake_cudart::calls();
  order.erase(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(before));
  std::erase_if(order, [](const std::string& call) {
    return call != "cudaDeviceSynchronize" && call != "cudaMemsetAsync";
  });
  EXPECT_EQ(order,
            (Texts{"cudaDeviceSynchronize",
                   "cudaDeviceSynchronize",
                   "cudaMemsetAsync",
                   "cudaMemsetAsync",
                   "cudaDeviceSynchronize",
                   "cudaDeviceSynchronize"}));
  EXPECT_TRUE(is_ok(group->disconnect(kNoLimit))) << "again";
}

TEST_F(CudaGroupTest, WordsOutliveTheGroup) {
  std::unique_ptr<CudaGroup> group = connected(group_config(1));
  const RankView view = group->ranks()[0].view();
  EXPECT_TRUE(is_ok(group->disconnect(kNoLimit)));
  group.reset();
  const std::unique_ptr<CudaGroup> next = connected(group_config(1));
  EXPECT_NE(next->ranks()[0].view().control, view.control);
  EXPECT_NE(next->ranks()[0].view().error, view.error);
  EXPECT_NE(view.control[control_index(Control::kClosed)], 0U) << "still, and for good";
}

TEST_F(CudaGroupTest, AGroupWhoseKernelsRunOnIsLeftAsItIs) {
  const auto begin = std::chrono::steady_clock::now();
  for (int32_t device = 0; device < 3; ++device) fake_cudart::run_kernels(device);
  {
    const std::unique_ptr<CudaGroup> group = connected(group_config(3));
    const Status status = group->disconnect(0.4);
    EXPECT_EQ(status.code(), StatusCode::kDeadlineExceeded);
    EXPECT_EQ(status.message(), "kernels still run on CUDA device 0");
    EXPECT_EQ(find(*group, 0).code(), StatusCode::kFailedPrecondition);
    EXPECT_NE(told_closed(group->ranks()[2]), 0U);
  }
  // Neither waited again for each device, nor for any to be freed.
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::milliseconds(1200));
  EXPECT_EQ(left_behind().size(), 3U);
  end_of_kernels();
}

// An error of one device does not hide that another is busy.
TEST_F(CudaGroupTest, AnErrorIsNoReasonToFreeWhatKernelsUse) {
  fake_cudart::run_kernels(1);
  {
    const std::unique_ptr<CudaGroup> group = connected(group_config(2));
    fake_cudart::fail("cudaDeviceSynchronize", 1);
    const Status status = group->disconnect(0.2);
    EXPECT_EQ(status.code(), StatusCode::kDeadlineExceeded);
    EXPECT_EQ(status.message(), "kernels still run on CUDA device 1");
  }
  EXPECT_EQ(left_behind().size(), 2U);
  end_of_kernels();
}

TEST_F(CudaGroupTest, AWaitWithALimitEndsWithTheKernels) {
  const std::unique_ptr<CudaGroup> group = connected(group_config(2));
  fake_cudart::run_kernels(1);
  fake_cudart::finish_kernels_after(std::chrono::milliseconds(50));
  EXPECT_TRUE(is_ok(group->disconnect(60)));
}

TEST_F(CudaGroupTest, HeapsAreLeftToPeersThatMayMapThem) {
  {
    const std::unique_ptr<CudaGroup> group = connected(group_config(2));
    EXPECT_TRUE(is_ok(group->disconnect(kNoLimit)));
    group->leave_heaps();
  }
  EXPECT_EQ(left_behind().size(), 2U);
  fake_cudart::reset(fake_cudart::make_machine(4));
}

// "Any step may be followed by destruction."
TEST_F(CudaGroupTest, IsDestroyedAfterAnyStep) {
  for (int steps = 0; steps <= 3; ++steps) {
    {
      const std::unique_ptr<CudaGroup> group = create(group_config(2));
      for (int32_t rank = 0; rank < std::min(steps, 2); ++rank) {
        ASSERT_TRUE(is_ok(group->connect(0, rank, handles_of(*group))));
      }
      if (steps == 3) {
        EXPECT_TRUE(is_ok(group->disconnect(kNoLimit)));
      }
    }
    EXPECT_EQ(left_behind(), Texts{}) << steps << " steps";
  }
}

TEST_F(CudaGroupTest, GroupsAreClosedInAnyOrder) {
  std::vector<size_t> order{0, 1, 2};
  do {
    std::vector<std::unique_ptr<CudaGroup>> groups;
    for (GroupNonce nonce = 1; nonce <= 3; ++nonce) {
      CudaGroupConfig config = group_config(2);
      config.group.nonce = nonce;
      groups.push_back(connected(config));
    }
    for (const size_t index : order) EXPECT_TRUE(is_ok(groups[index]->disconnect(kNoLimit)));
    for (const size_t index : order) {
      groups[index].reset();
      for (const auto& group : groups) {
        if (group == nullptr) continue;
        EXPECT_EQ(group->ranks()[1].handle().base[0], std::byte{0}) << "still there";
      }
    }
    EXPECT_EQ(left_behind(), Texts{});
  } while (std::next_permutation(order.begin(), order.end()));
}

// Handlers ask on threads of XLA while Python's thread connects and disconnects.
TEST_F(CudaGroupTest, IsAskedFromManyThreads) {
  const std::unique_ptr<CudaGroup> group = create(group_config(2));
  std::atomic<bool> stop = false;
  std::vector<std::thread> threads;
  for (int32_t device = 0; device < 2; ++device) {
    threads.emplace_back([&, device] {
      while (!stop) {
        const RankContext* rank = nullptr;
        if (!group->find(device, rank).ok()) continue;
        EXPECT_EQ(rank->view().heap[device], rank->handle().base);
        EXPECT_GT(rank->sm_budget().available, 0);
        EXPECT_TRUE(rank->error().ok());
        EXPECT_TRUE(group->error().ok());
      }
    });
  }
  ASSERT_TRUE(is_ok(connect_all(*group)));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  stop = true;
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(is_ok(group->disconnect(kNoLimit)));
}

}  // namespace
}  // namespace jax_ep
