// SPDX-License-Identifier: Apache-2.0
// The fake CUDA runtime, in one process. Two processes: processes_test.cc.
#include "csrc/runtime/tests/fake_cudart/fake_cudart.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "csrc/launch/launch.h"

namespace jax_ep::fake_cudart {
namespace {

using Texts = std::vector<std::string>;
using Devices = std::vector<int>;

class FakeCudart : public ::testing::Test {
 protected:
  FakeCudart() { reset(make_machine(3)); }
  ~FakeCudart() override { reset(make_machine(1)); }

  static void* allocate(size_t bytes = 64) {
    void* memory = nullptr;
    EXPECT_EQ(cudaMalloc(&memory, bytes), cudaSuccess);
    return memory;
  }
  static void* allocate_on_host(unsigned flags = cudaHostAllocMapped) {
    void* memory = nullptr;
    EXPECT_EQ(cudaHostAlloc(&memory, 64, flags), cudaSuccess);
    return memory;
  }
};

TEST_F(FakeCudart, ContextsAreMadeWhereCudaMakesThem) {
  int value = 0;
  cudaDeviceProp properties;
  EXPECT_EQ(cudaGetDevice(&value), cudaSuccess);
  EXPECT_EQ(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 1), cudaSuccess);
  EXPECT_EQ(cudaGetDeviceProperties(&properties, 1), cudaSuccess);
  EXPECT_EQ(cudaDeviceCanAccessPeer(&value, 0, 1), cudaSuccess);
  EXPECT_EQ(contexts(), Devices{});
  EXPECT_EQ(cudaSetDevice(1), cudaSuccess);
  EXPECT_EQ(contexts(), Devices{1});
  void* const memory = allocate_on_host();
  EXPECT_EQ(contexts(), Devices{1});
  // A thread begins with device 0.
  std::thread([&] { EXPECT_EQ(cudaFreeHost(memory), cudaSuccess); }).join();
  EXPECT_EQ(contexts(), (Devices{0, 1}));
}

TEST_F(FakeCudart, ThreadsHaveADeviceAndALastErrorEach) {
  EXPECT_EQ(cudaSetDevice(2), cudaSuccess);
  EXPECT_EQ(cudaSetDevice(99), cudaErrorInvalidDevice);
  EXPECT_EQ(current_device(), 2);
  std::thread([] {
    EXPECT_EQ(current_device(), 0);
    EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  }).join();
  EXPECT_EQ(last_error(), cudaErrorInvalidDevice);
  EXPECT_EQ(cudaSetDevice(1), cudaSuccess);  // a success hides no error
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidDevice);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

TEST_F(FakeCudart, MemoryIsNotZeroAndNeverWhereItWas) {
  auto* const first = static_cast<unsigned char*>(allocate());
  EXPECT_TRUE(std::all_of(first, first + 64, [](unsigned char byte) { return byte != 0; }));
  EXPECT_EQ(cudaFree(first), cudaSuccess);
  void* const second = allocate();
  EXPECT_NE(second, first);
  EXPECT_EQ(cudaFree(second), cudaSuccess);
}

using FakeCudartDeathTest = FakeCudart;

// What a sanitizer calls an access to such an address differs from what the system calls it.
TEST_F(FakeCudartDeathTest, MemoryIsGoneWhenFreedAndEndsWhereItEnds) {
  auto* const small = static_cast<volatile char*>(allocate(256));
  EXPECT_DEATH(small[256] = 1, "");
  auto* const memory = static_cast<volatile char*>(allocate(4096));
  EXPECT_DEATH(memory[4096] = 1, "");
  EXPECT_DEATH(memory[-1] = 1, "");
  EXPECT_EQ(cudaFree(const_cast<char*>(memory)), cudaSuccess);
  EXPECT_DEATH(memory[0] = 1, "");
}

TEST_F(FakeCudart, MemoryRunsOut) {
  Machine machine = make_machine(2);
  machine.devices[1].bytes = 1 << 20;
  reset(machine);
  EXPECT_EQ(cudaSetDevice(1), cudaSuccess);
  void* const memory = allocate(1 << 19);
  size_t available = 0;
  size_t total = 0;
  EXPECT_EQ(cudaMemGetInfo(&available, &total), cudaSuccess);
  EXPECT_EQ(available, size_t{1} << 19);
  EXPECT_EQ(total, size_t{1} << 20);
  void* none = nullptr;
  EXPECT_EQ(cudaMalloc(&none, (1 << 19) + 1), cudaErrorMemoryAllocation);
  EXPECT_EQ(none, nullptr);
  EXPECT_EQ(cudaFree(memory), cudaSuccess);
  EXPECT_EQ(cudaMemGetInfo(&available, &total), cudaSuccess);
  EXPECT_EQ(available, total);
}

TEST_F(FakeCudart, MisuseIsRefusedAndNoted) {
  void* const memory = allocate();
  void* const host = allocate_on_host();
  EXPECT_EQ(cudaFree(host), cudaErrorInvalidValue);
  EXPECT_EQ(cudaFreeHost(memory), cudaErrorInvalidValue);
  EXPECT_EQ(cudaFree(static_cast<char*>(memory) + 8), cudaErrorInvalidValue);
  EXPECT_EQ(cudaIpcCloseMemHandle(memory), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemsetAsync(memory, 0, 65, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(violations().size(), 5U);
  EXPECT_EQ(cudaFree(memory), cudaSuccess);
  EXPECT_EQ(cudaFree(memory), cudaErrorInvalidValue);
  EXPECT_NE(violations().back().find("has been freed"), std::string::npos);
  EXPECT_EQ(cudaFreeHost(host), cudaSuccess);
  EXPECT_EQ(cudaFreeHost(host), cudaErrorInvalidValue);
  cudaStream_t stream = nullptr;
  EXPECT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaStreamSynchronize(stream), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(violations().size(), 9U);
}

TEST_F(FakeCudart, LeaksAreListed) {
  EXPECT_EQ(cudaSetDevice(2), cudaSuccess);
  void* const memory = allocate(100);
  void* const host = allocate_on_host();
  cudaStream_t stream = nullptr;
  EXPECT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  EXPECT_EQ(leaks(),
            (Texts{"cudaMalloc: 100 bytes on device 2",
                   "cudaHostAlloc: 64 bytes",
                   "cudaStreamCreateWithFlags: on device 2"}));
  EXPECT_EQ(cudaFree(memory), cudaSuccess);
  EXPECT_EQ(cudaFreeHost(host), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
  EXPECT_EQ(leaks(), Texts{});
}

TEST_F(FakeCudart, HostMemoryHasAnAddressForDevices) {
  auto* const host = static_cast<char*>(allocate_on_host(cudaHostAllocMapped));
  void* device = nullptr;
  EXPECT_EQ(cudaHostGetDevicePointer(&device, host, 0), cudaSuccess);
  EXPECT_NE(device, host);
  std::strcpy(static_cast<char*>(device), "written by a device");
  EXPECT_STREQ(host, "written by a device");
  EXPECT_EQ(on_host(device), host);
  EXPECT_EQ(on_host(host), nullptr);
  EXPECT_EQ(host_flags(), std::vector<unsigned>{cudaHostAllocMapped});
  void* const unmapped = allocate_on_host(0);
  EXPECT_EQ(cudaHostGetDevicePointer(&device, unmapped, 0), cudaErrorInvalidValue);
}

TEST_F(FakeCudart, WorkOnAStreamIsDoneWhenSomebodyWaitsForIt) {
  auto* const memory = static_cast<char*>(allocate());
  memory[0] = 'x';
  cudaStream_t stream = nullptr;
  EXPECT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  EXPECT_EQ(cudaMemsetAsync(memory, 'a', 1, stream), cudaSuccess);
  EXPECT_EQ(memory[0], 'x');
  EXPECT_EQ(cudaStreamSynchronize(nullptr), cudaSuccess);
  EXPECT_EQ(memory[0], 'x');
  EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  EXPECT_EQ(memory[0], 'a');
  EXPECT_EQ(cudaMemsetAsync(memory, 'b', 1, stream), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
  EXPECT_EQ(memory[0], 'a');
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(memory[0], 'b');
}

TEST_F(FakeCudart, PeersAreReachedWhereTheMachineSaysSo) {
  Machine machine = make_machine(3);
  machine.reaches = {{true, true, false}, {true, true, true}, {false, true, true}};
  reset(machine);
  int can = -1;
  EXPECT_EQ(cudaDeviceCanAccessPeer(&can, 0, 1), cudaSuccess);
  EXPECT_EQ(can, 1);
  EXPECT_EQ(cudaDeviceCanAccessPeer(&can, 0, 2), cudaSuccess);
  EXPECT_EQ(can, 0);
  EXPECT_EQ(cudaDeviceCanAccessPeer(&can, 0, 0), cudaSuccess);
  EXPECT_EQ(can, 0);
  EXPECT_EQ(cudaDeviceCanAccessPeer(&can, 0, 3), cudaErrorInvalidDevice);
  EXPECT_EQ(cudaDeviceEnablePeerAccess(0, 0), cudaErrorPeerAccessUnsupported);
  EXPECT_EQ(cudaDeviceEnablePeerAccess(2, 0), cudaErrorPeerAccessUnsupported);
  EXPECT_EQ(cudaDeviceEnablePeerAccess(1, 0), cudaSuccess);
  EXPECT_EQ(cudaDeviceEnablePeerAccess(1, 0), cudaErrorPeerAccessAlreadyEnabled);
  EXPECT_TRUE(peer_enabled(0, 1));
  EXPECT_FALSE(peer_enabled(1, 0));
}

TEST_F(FakeCudart, DevicesAreAsTheMachineSays) {
  Machine machine = make_machine(2);
  machine.devices[1].num_sms = 7;
  machine.devices[1].major = 8;
  reset(machine);
  int value = 0;
  EXPECT_EQ(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 1), cudaSuccess);
  EXPECT_EQ(value, 7);
  EXPECT_EQ(cudaDeviceGetAttribute(&value, cudaDevAttrComputeCapabilityMajor, 1), cudaSuccess);
  EXPECT_EQ(value, 8);
  EXPECT_EQ(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 2),
            cudaErrorInvalidDevice);
  cudaDeviceProp one;
  cudaDeviceProp other;
  EXPECT_EQ(cudaGetDeviceProperties(&one, 0), cudaSuccess);
  EXPECT_EQ(cudaGetDeviceProperties(&other, 1), cudaSuccess);
  EXPECT_NE(std::memcmp(&one.uuid, &other.uuid, sizeof(one.uuid)), 0);
}

TEST_F(FakeCudart, FailuresHappenWhenTheyAreToHappen) {
  fail("cudaMalloc", 2, cudaErrorMemoryAllocation);
  fail("", 5, cudaErrorUnknown);
  void* memory = nullptr;
  EXPECT_EQ(cudaMalloc(&memory, 8), cudaSuccess);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(pending_failures(), 2);
  void* none = nullptr;
  EXPECT_EQ(cudaMalloc(&none, 8), cudaErrorMemoryAllocation);
  EXPECT_EQ(none, nullptr);
  EXPECT_EQ(pending_failures(), 1);
  EXPECT_EQ(cudaGetLastError(), cudaErrorMemoryAllocation);  // not one of the calls
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(cudaFree(memory), cudaErrorUnknown);
  EXPECT_EQ(pending_failures(), 0);
  EXPECT_EQ(leaks(), Texts{}) << "what gives back does so even when it fails";
  EXPECT_EQ(calls(),
            (Texts{"cudaMalloc",
                   "cudaDeviceSynchronize",
                   "cudaMalloc",
                   "cudaDeviceSynchronize",
                   "cudaFree"}));
}

TEST_F(FakeCudart, AfterATrapNothingReachesADevice) {
  void* const memory = allocate();
  void* const host = allocate_on_host();
  trap();
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  int value = 0;
  EXPECT_EQ(cudaGetDevice(&value), cudaSuccess);
  EXPECT_EQ(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0), cudaSuccess);
  for (const int device : {0, 1}) {
    EXPECT_EQ(cudaSetDevice(device), cudaSuccess);
    void* none = nullptr;
    EXPECT_EQ(cudaMalloc(&none, 8), cudaErrorLaunchFailure);
    EXPECT_EQ(cudaHostAlloc(&none, 8, 0), cudaErrorLaunchFailure);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorLaunchFailure);
    EXPECT_EQ(cudaGetLastError(), cudaErrorLaunchFailure);
    EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  }
  EXPECT_EQ(cudaFree(memory), cudaErrorLaunchFailure);
  EXPECT_EQ(cudaFreeHost(host), cudaErrorLaunchFailure);
  EXPECT_EQ(leaks(), Texts{});
}

// The calls that wait for kernels on a device, and some that do not.
TEST_F(FakeCudart, SomeCallsWaitForKernels) {
  void* const memory = allocate();
  void* const host = allocate_on_host();
  cudaStream_t stream = nullptr;
  EXPECT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  const auto waits = [](auto call) {
    run_kernels(0);
    std::thread thread([&] { EXPECT_EQ(call(), cudaSuccess); });
    while (num_waiting() == 0) std::this_thread::yield();
    finish_kernels();
    thread.join();
  };
  waits([] { return cudaDeviceSynchronize(); });
  waits([] { return cudaStreamSynchronize(nullptr); });
  waits([&] { return cudaFree(memory); });
  waits([&] { return cudaFreeHost(host); });
  run_kernels(0);
  EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  EXPECT_EQ(cudaSetDevice(1), cudaSuccess);
  EXPECT_EQ(cudaFree(allocate()), cudaSuccess);
}

TEST_F(FakeCudart, KernelsFinishByThemselves) {
  run_kernels(0);
  finish_kernels_after(std::chrono::milliseconds(5));
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

TEST_F(FakeCudart, ATrapEndsTheWait) {
  run_kernels(0);
  std::thread thread([] { EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorLaunchFailure); });
  while (num_waiting() == 0) std::this_thread::yield();
  trap();
  thread.join();
}

TEST_F(FakeCudart, LaunchesAreRecordedAndRun) {
  std::vector<int> seen;
  set_kernel([&](const Launch& launch) { seen.push_back(launch.device); });
  EXPECT_EQ(cudaSetDevice(1), cudaSuccess);
  const auto stream = reinterpret_cast<cudaStream_t>(uintptr_t{0x1000});
  PlanParams plan{};
  plan.view.rank = 3;
  EXPECT_EQ(launch_plan(plan, {.num_blocks = 5, .num_warps = 16, .num_stages = 0}, stream),
            cudaSuccess);
  EXPECT_EQ(seen, std::vector<int>{1});
  ASSERT_EQ(launches().size(), 1U);
  const Launch launch = launches().front();
  EXPECT_EQ(launch.stream, stream);
  EXPECT_EQ(launch.shape.num_blocks, 5);
  EXPECT_EQ(std::get<PlanParams>(launch.params).view.rank, 3);
}

// As with cudaLaunchKernelExC.
TEST_F(FakeCudart, ALaunchReportsItsOwnErrorAlone) {
  EXPECT_EQ(cudaSetDevice(99), cudaErrorInvalidDevice);
  EXPECT_EQ(launch_combine({}, {}, nullptr), cudaSuccess);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidDevice);
  EXPECT_EQ(launches().size(), 1U);
}

TEST_F(FakeCudart, WhatIsNeverFreedOutlivesAReset) {
  void* const memory = allocate();
  void* on_host = nullptr;
  ASSERT_EQ(cudaHostAlloc(&on_host, 64, cudaHostAllocMapped), cudaSuccess);
  reset(make_machine(1));
  EXPECT_EQ(leaks(), std::vector<std::string>{});
  std::memset(memory, 1, 16);
  std::memset(on_host, 1, 64);
  void* on_device = nullptr;
  EXPECT_EQ(cudaHostGetDevicePointer(&on_device, on_host, 0), cudaSuccess);
  EXPECT_EQ(fake_cudart::on_host(static_cast<std::byte*>(on_device) + 8),
            static_cast<std::byte*>(on_host) + 8);
  EXPECT_EQ(cudaFree(memory), cudaSuccess);
  EXPECT_EQ(cudaFreeHost(on_host), cudaSuccess);
}

TEST_F(FakeCudart, AHandleIsNotForTheProcessThatMadeIt) {
  void* const memory = allocate();
  cudaIpcMemHandle_t handle;
  EXPECT_EQ(cudaIpcGetMemHandle(&handle, memory), cudaSuccess);
  void* mapped = nullptr;
  EXPECT_EQ(cudaIpcOpenMemHandle(&mapped, handle, cudaIpcMemLazyEnablePeerAccess),
            cudaErrorDeviceUninitialized);
  EXPECT_EQ(cudaIpcGetMemHandle(&handle, &handle), cudaErrorInvalidValue);
  EXPECT_EQ(cudaFree(memory), cudaSuccess);
  EXPECT_EQ(cudaIpcGetMemHandle(&handle, memory), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace jax_ep::fake_cudart
