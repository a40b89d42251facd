// SPDX-License-Identifier: Apache-2.0
// Groups whose ranks are in two processes, which map each other's heaps for real.
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "csrc/core/heap_layout.h"
#include "csrc/runtime/tests/rank_process.h"
#include "csrc/runtime/tests/runtime_fixture.h"
#include "csrc/tuning/heuristics.h"

namespace jax_ep {
namespace {

constexpr int kGroup = 0;
constexpr int64_t kOffset = 4096;

class Processes : public ::testing::Test {
 protected:
  void create(int group = kGroup, uint64_t nonce = 1) {
    ASSERT_TRUE(is_ok(first_.create(group, {.rank = 0, .device = 0, .nonce = nonce})));
    ASSERT_TRUE(is_ok(second_.create(group, {.rank = 1, .device = 1, .nonce = nonce})));
  }

  void connect(int group = kGroup) {
    const Texts handles{first_.handle(group), second_.handle(group)};
    ASSERT_TRUE(is_ok(first_.connect(group, handles)));
    ASSERT_TRUE(is_ok(second_.connect(group, handles)));
  }

  void create_and_connect(int group = kGroup, uint64_t nonce = 1) {
    create(group, nonce);
    connect(group);
  }

  void close(int group = kGroup) {
    EXPECT_TRUE(is_ok(first_.disconnect(group)));
    EXPECT_TRUE(is_ok(second_.disconnect(group)));
    first_.destroy(group);
    second_.destroy(group);
  }

  // Nothing is open, and nothing was misused.
  static void expect_clean(RankProcess& process) {
    EXPECT_EQ(without_pools(process.list("leaks")), Texts{});
    EXPECT_EQ(process.list("violations"), Texts{});
    EXPECT_EQ(process.tell("last_error"), "0");
    EXPECT_EQ(process.tell("pending_failures"), "0");
  }

  static void wait_until_waiting(RankProcess& process) {
    while (process.tell("num_waiting") == "0") std::this_thread::yield();
  }

  RankProcess first_;
  RankProcess second_;
};

TEST_F(Processes, SeeEachOthersBytes) {
  create_and_connect();
  first_.store(kGroup, 1, kOffset, "from-first-to-second");
  EXPECT_EQ(second_.load(kGroup, 1, kOffset, 20), "from-first-to-second");
  second_.store(kGroup, 0, kOffset, "and-back");
  EXPECT_EQ(first_.load(kGroup, 0, kOffset, 8), "and-back");
  EXPECT_EQ(first_.load(kGroup, 1, 0, 1), std::string(1, '\0')) << "heaps begin zeroed";
  close();
  expect_clean(first_);
  expect_clean(second_);
}

TEST_F(Processes, HaveGroupsThatDoNotMix) {
  create_and_connect(1, 11);
  create_and_connect(2, 12);
  first_.store(1, 1, kOffset, "one");
  first_.store(2, 1, kOffset, "two");
  EXPECT_EQ(second_.load(1, 1, kOffset, 3), "one");
  EXPECT_EQ(second_.load(2, 1, kOffset, 3), "two");
  close(1);
  first_.store(2, 1, kOffset, "TWO");
  EXPECT_EQ(second_.load(2, 1, kOffset, 3), "TWO");
  close(2);
  expect_clean(first_);
  expect_clean(second_);
}

TEST_F(Processes, ShareADevice) {
  for (RankProcess* const process : {&first_, &second_}) process->tell("reset 1 0");
  ASSERT_TRUE(is_ok(first_.create(kGroup, {.rank = 0, .device = 0})));
  ASSERT_TRUE(is_ok(second_.create(kGroup, {.rank = 1, .device = 0})));
  connect();
  second_.store(kGroup, 0, kOffset, "shared");
  EXPECT_EQ(first_.load(kGroup, 0, kOffset, 6), "shared");
  EXPECT_EQ(first_.sms(kGroup), 66) << "half of the device's";
  close();
  expect_clean(first_);
  expect_clean(second_);
}

// Of a mesh with two EP groups on one GPU: kernels of the one hold SMs while those of the other
// wait for them, so the blocks of all four ranks have to fit at once.
TEST_F(Processes, ShareADeviceWithTheRanksOfOtherGroups) {
  std::vector<std::unique_ptr<RankProcess>> processes;
  Texts handles;
  for (int32_t i = 0; i < 4; ++i) {
    processes.push_back(std::make_unique<RankProcess>());
    processes.back()->tell("reset 1 0");
    ASSERT_TRUE(is_ok(
        processes.back()->create(kGroup, {.rank = i % 2, .device = 0, .group_index = i / 2})));
    handles.push_back(processes.back()->handle(kGroup));
  }
  int blocks = 0;
  for (const auto& process : processes) {
    ASSERT_TRUE(is_ok(process->connect(kGroup, handles)));
    const SmBudget budget{.available = process->sms(kGroup), .requested = 1000};
    blocks += launch_shape(OpKind::kDispatch,
                           {.num_ranks = 2,
                            .num_experts = 256,
                            .num_topk = 8,
                            .num_tokens = 4096,
                            .recv_capacity = 8192,
                            .expert_alignment = 1,
                            .layout = Layout::kExpert},
                           14336,
                           budget)
                  .num_blocks;
  }
  EXPECT_EQ(blocks, 132) << "all SMs of the device";
  for (const auto& process : processes) EXPECT_TRUE(is_ok(process->disconnect(kGroup)));
  for (const auto& process : processes) {
    process->destroy(kGroup);
    expect_clean(*process);
  }
}

// CUDA_VISIBLE_DEVICES: device 0 of both, and not the same.
TEST_F(Processes, NeedNotSeeEachOthersDevices) {
  first_.tell("reset 1 0");
  second_.tell("reset 1 1");
  ASSERT_TRUE(is_ok(first_.create(kGroup, {.rank = 0, .device = 0})));
  ASSERT_TRUE(is_ok(second_.create(kGroup, {.rank = 1, .device = 0})));
  connect();
  second_.store(kGroup, 0, kOffset, "unseen");
  EXPECT_EQ(first_.load(kGroup, 0, kOffset, 6), "unseen");
  EXPECT_EQ(first_.sms(kGroup), 132) << "another device of the same number";
  close();
  expect_clean(first_);
  expect_clean(second_);
}

TEST_F(Processes, AreToldThatDevicesDoNotReachEachOther) {
  second_.tell("unreachable 1 0");
  create();
  const Texts handles{first_.handle(kGroup), second_.handle(kGroup)};
  ASSERT_TRUE(is_ok(first_.connect(kGroup, handles)));
  const Status status = second_.connect(kGroup, handles);
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_TRUE(contains(
      status.message(),
      "CUDA device 1 cannot map the heap of rank 0 in process " + std::to_string(first_.pid())));
  EXPECT_TRUE(contains(status.message(), "cudaErrorPeerAccessUnsupported"));
  close();
  expect_clean(first_);
  expect_clean(second_);
}

TEST_F(Processes, RefuseEachOthersOtherGroups) {
  ASSERT_TRUE(is_ok(first_.create(kGroup, {.rank = 0, .device = 0, .nonce = 1})));
  ASSERT_TRUE(is_ok(second_.create(kGroup, {.rank = 1, .device = 1, .nonce = 2})));
  const Status status = first_.connect(kGroup, {first_.handle(kGroup), second_.handle(kGroup)});
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(status.message(), "the handle of rank 1 is of another EpGroup");
  close();
  expect_clean(first_);
  expect_clean(second_);
}

TEST_F(Processes, RefuseHeapsThatAreLaidOutOtherwise) {
  ASSERT_TRUE(is_ok(first_.create(kGroup, {.rank = 0, .device = 0, .max_tokens = 4})));
  ASSERT_TRUE(is_ok(second_.create(kGroup, {.rank = 1, .device = 1, .max_tokens = 64})));
  const Texts handles{first_.handle(kGroup), second_.handle(kGroup)};
  for (RankProcess* const process : {&first_, &second_}) {
    const Status status = process->connect(kGroup, handles);
    EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
    EXPECT_TRUE(contains(status.message(), "laid out otherwise"));
  }
  close();
  expect_clean(first_);
  expect_clean(second_);
}

TEST_F(Processes, RefuseHandlesOfAnotherVersion) {
  create();
  std::string other = second_.handle(kGroup);
  other[1] ^= 1;
  const Status status = first_.connect(kGroup, {first_.handle(kGroup), other});
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(contains(status.message(), "all processes must run the same"));
  close();
}

// Each call that maps peers fails once, after the heap of rank 1 of three has been mapped.
TEST_F(Processes, KeepNothingMappedWhenOneHeapCannotBe) {
  RankProcess third;
  for (RankProcess* const process : {&first_, &second_, &third}) process->tell("reset 3 0");
  ASSERT_TRUE(is_ok(first_.create(kGroup, {.rank = 0, .num_ranks = 3, .device = 0})));
  ASSERT_TRUE(is_ok(second_.create(kGroup, {.rank = 1, .num_ranks = 3, .device = 1})));
  ASSERT_TRUE(is_ok(third.create(kGroup, {.rank = 2, .num_ranks = 3, .device = 2})));
  const Texts handles{first_.handle(kGroup), second_.handle(kGroup), third.handle(kGroup)};
  const size_t own = first_.list("leaks").size();
  for (const char* failure : {"fail cudaIpcOpenMemHandle 1 999",
                              "fail cudaIpcOpenMemHandle 2 999",
                              "fail cudaGetDevice 3 999"}) {
    first_.tell(failure);
    const Status status = first_.connect(kGroup, handles);
    EXPECT_FALSE(status.ok()) << failure;
    EXPECT_TRUE(contains(status.message(), "cudaErrorUnknown"));
    EXPECT_EQ(first_.list("leaks").size(), own) << failure;
    EXPECT_EQ(first_.tell("last_error"), "0") << failure;
  }
  ASSERT_TRUE(is_ok(first_.connect(kGroup, handles)));
  EXPECT_EQ(first_.list("leaks").size(), own + 2);
  for (RankProcess* const process : {&first_, &second_, &third}) {
    EXPECT_TRUE(is_ok(process->disconnect(kGroup)));
  }
  for (RankProcess* const process : {&first_, &second_, &third}) {
    process->destroy(kGroup);
    expect_clean(*process);
  }
}

// Here in this process, which has no ranks.
TEST_F(Processes, AMappingHasOneOwner) {
  create();
  fake_cudart::reset(fake_cudart::make_machine(2));
  std::vector<HeapHandle> handles(2);
  ASSERT_TRUE(is_ok(HeapHandle::from_bytes(from_hex(first_.handle(kGroup)), handles[0])));
  ASSERT_TRUE(is_ok(HeapHandle::from_bytes(from_hex(second_.handle(kGroup)), handles[1])));
  EXPECT_FALSE(handles[0].in_this_process());
  {
    PeerMapping one;
    ASSERT_TRUE(is_ok(PeerMapping::map(handles[0], 1, one)));
    std::byte* const base = one.base();
    PeerMapping other = std::move(one);
    EXPECT_EQ(one.base(), nullptr);
    EXPECT_EQ(other.base(), base);
    PeerMapping third;
    ASSERT_TRUE(is_ok(PeerMapping::map(handles[1], 1, third)));
    EXPECT_EQ(left_behind().size(), 2U);
    third = std::move(other);
    EXPECT_EQ(third.base(), base);
    EXPECT_EQ(left_behind().size(), 1U) << "the third's former mapping";
  }
  EXPECT_EQ(left_behind(), Texts{});
  EXPECT_EQ(fake_cudart::violations(), Texts{});
  close();
}

TEST_F(Processes, AHeapThatIsFreedAlreadyIsNotMapped) {
  create();
  const Texts handles{first_.handle(kGroup), second_.handle(kGroup)};
  second_.destroy(kGroup);
  const Status status = first_.connect(kGroup, handles);
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_TRUE(contains(status.message(), "cannot map the heap of rank 1"));
  EXPECT_TRUE(contains(status.message(), "cudaErrorInvalidValue"));
  first_.destroy(kGroup);
  expect_clean(first_);
}

TEST_F(Processes, AHeapOfADeadProcessIsNotMapped) {
  create();
  const Texts handles{first_.handle(kGroup), second_.handle(kGroup)};
  second_.kill();
  const Status status = first_.connect(kGroup, handles);
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_TRUE(contains(status.message(), "cudaErrorInvalidResourceHandle"));
  first_.destroy(kGroup);
  expect_clean(first_);
}

// The others free what they hold, and the dead one's mapping of it is no reason not to.
TEST_F(Processes, OneThatDiesLeavesTheOthersWhole) {
  create_and_connect();
  EXPECT_EQ(first_.list("abandoned_mappings"), Texts{});
  second_.kill();
  EXPECT_EQ(first_.list("abandoned_mappings").size(), 1U);
  EXPECT_TRUE(is_ok(first_.disconnect(kGroup)));
  first_.destroy(kGroup);
  expect_clean(first_);
}

// Why processes tell each other that they have disconnected before any of them frees its heap.
TEST_F(Processes, AHeapThatIsFreedWhileAPeerHasItMappedIsNoticed) {
  create_and_connect();
  EXPECT_TRUE(is_ok(first_.disconnect(kGroup)));
  first_.destroy(kGroup);
  const Texts violations = first_.list("violations");
  ASSERT_EQ(violations.size(), 1U);
  EXPECT_TRUE(contains(violations[0], "is freed while another process has it mapped"));
  EXPECT_EQ(second_.list("abandoned_mappings").size(), 1U);
  EXPECT_TRUE(is_ok(second_.disconnect(kGroup)));
  second_.destroy(kGroup);
  expect_clean(second_);
}

// What a process does that is alone to close: the other one may still store.
TEST_F(Processes, AHeapIsLeftToAPeerThatHasItMapped) {
  create_and_connect();
  EXPECT_TRUE(is_ok(first_.disconnect(kGroup)));
  first_.leave_heaps(kGroup);
  first_.destroy(kGroup);
  EXPECT_EQ(first_.list("violations"), Texts{});
  EXPECT_EQ(second_.list("abandoned_mappings"), Texts{});
  second_.store(kGroup, 0, kOffset, "late");
  EXPECT_EQ(second_.load(kGroup, 0, kOffset, 4), "late");
  EXPECT_TRUE(is_ok(second_.disconnect(kGroup)));
  second_.destroy(kGroup);
  expect_clean(second_);
  EXPECT_EQ(without_pools(first_.list("leaks")).size(), 1U) << "its heap, for good";
}

// Its kernel still stores into the peer's heap and reads its own.
TEST_F(Processes, WhatARunningKernelUsesStaysMapped) {
  create_and_connect();
  first_.tell("run_kernels 0");
  const Status status = first_.disconnect(kGroup, 0.1);
  EXPECT_EQ(status.code(), StatusCode::kDeadlineExceeded);
  EXPECT_EQ(status.message(), "kernels still run on CUDA device 0");
  EXPECT_TRUE(first_.told_closed(kGroup)) << "for kernels that graphs launch later";
  first_.destroy(kGroup);  // does not wait
  EXPECT_EQ(first_.list("violations"), Texts{});
  EXPECT_EQ(without_pools(first_.list("leaks")).size(), 2U) << "its heap, and the peer's";
  first_.tell("finish_kernels");
  EXPECT_TRUE(is_ok(second_.disconnect(kGroup)));
  second_.leave_heaps(kGroup);
  second_.destroy(kGroup);
  EXPECT_EQ(second_.list("violations"), Texts{});
}

TEST_F(Processes, CloseInAnyOrder) {
  // Disconnects of both before the first destroy, and no other rule.
  using Step = std::function<void(RankProcess&)>;
  const Step disconnect = [](RankProcess& process) {
    EXPECT_TRUE(is_ok(process.disconnect(kGroup)));
  };
  const Step destroy = [](RankProcess& process) { process.destroy(kGroup); };
  for (const bool first_disconnects : {true, false}) {
    for (const bool first_destroys : {true, false}) {
      create_and_connect();
      const auto both = [&](const Step& step, bool first) {
        step(first ? first_ : second_);
        step(first ? second_ : first_);
      };
      both(disconnect, first_disconnects);
      both(destroy, first_destroys);
      expect_clean(first_);
      expect_clean(second_);
    }
  }
}

TEST_F(Processes, DestroyWithoutDisconnectUnmapsToo) {
  create_and_connect();
  EXPECT_TRUE(is_ok(second_.disconnect(kGroup)));
  first_.destroy(kGroup);  // its peer has unmapped it
  second_.destroy(kGroup);
  expect_clean(first_);
  expect_clean(second_);
}

TEST_F(Processes, KeepPeersMappedWhileTheirOwnKernelsRun) {
  create_and_connect();
  first_.tell("run_kernels 0");
  first_.begin_disconnect(kGroup);
  wait_until_waiting(first_);
  EXPECT_EQ(first_.list("leaks").back().substr(0, 20), "cudaIpcOpenMemHandle");
  first_.store(kGroup, 1, kOffset, "late");  // the kernel's last store
  EXPECT_EQ(second_.load(kGroup, 1, kOffset, 4), "late");
  first_.tell("finish_kernels");
  first_.join();
  first_.destroy(kGroup);
  EXPECT_EQ(first_.list("violations").size(), 1U) << "second has not disconnected";
  EXPECT_TRUE(is_ok(second_.disconnect(kGroup)));
  second_.destroy(kGroup);
  expect_clean(second_);
}

TEST_F(Processes, ATrapInOneDoesNotKeepTheOtherFromClosing) {
  create_and_connect();
  first_.tell("trap");
  EXPECT_TRUE(contains(first_.disconnect(kGroup).message(), "cudaErrorLaunchFailure"));
  EXPECT_TRUE(is_ok(second_.disconnect(kGroup)));
  first_.destroy(kGroup);
  second_.destroy(kGroup);
  for (RankProcess* const process : {&first_, &second_}) {
    EXPECT_EQ(without_pools(process->list("leaks")), Texts{});
    EXPECT_EQ(process->list("violations"), Texts{});
  }
}

TEST_F(Processes, AGroupComesAfterAnother) {
  for (uint64_t nonce = 1; nonce <= 5; ++nonce) {
    create_and_connect(kGroup, nonce);
    EXPECT_EQ(first_.load(kGroup, 1, kOffset, 1), std::string(1, '\0'));
    first_.store(kGroup, 1, kOffset, "used");
    close();
  }
  expect_clean(first_);
  expect_clean(second_);
}

}  // namespace
}  // namespace jax_ep

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "--rank-process") return jax_ep::serve_ranks();
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
