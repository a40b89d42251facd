// SPDX-License-Identifier: Apache-2.0
#include "csrc/runtime/transport/symmetric_heap.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <thread>
#include <utility>

#include "csrc/runtime/tests/runtime_fixture.h"

namespace jax_ep {
namespace {

constexpr int64_t kUnit = int64_t{2} << 20;

class SymmetricHeapTest : public RuntimeTest {
 protected:
  static SymmetricHeap allocate(int32_t device) {
    SymmetricHeap heap;
    EXPECT_TRUE(
        is_ok(SymmetricHeap::allocate(small_shape(2), DomainLink::kMappedMemory, device, heap)));
    return heap;
  }
  static HeapHandle handle_of(const SymmetricHeap& heap, int32_t rank = 0) {
    HeapHandle handle;
    const HeapOwner owner{.nonce = kNonce, .group_index = 0, .rank = rank};
    EXPECT_TRUE(is_ok(heap.export_handle(owner, handle)));
    return handle;
  }
};

TEST_F(SymmetricHeapTest, IsZeroedInWholeUnits) {
  const SymmetricHeap heap = allocate(2);
  EXPECT_EQ(heap.device(), 2);
  EXPECT_EQ(heap.layout().total_bytes, make_heap_layout(small_shape(2)).total_bytes);
  EXPECT_EQ(left_behind(), Texts{"cudaMalloc: " + std::to_string(kUnit) + " bytes on device 2"});
  EXPECT_TRUE(std::all_of(
      heap.base(), heap.base() + kUnit, [](std::byte byte) { return byte == std::byte{0}; }));
}

TEST_F(SymmetricHeapTest, LeavesTheCurrentDeviceAsItWas) {
  ASSERT_EQ(cudaSetDevice(3), cudaSuccess);
  {
    const SymmetricHeap heap = allocate(1);
    EXPECT_EQ(fake_cudart::current_device(), 3);
    handle_of(heap);
    EXPECT_EQ(fake_cudart::current_device(), 3);
  }
  EXPECT_EQ(fake_cudart::current_device(), 3);
}

// What else the process runs may take long, or wait for this very process.
TEST_F(SymmetricHeapTest, IsMadeWhileKernelsRun) {
  fake_cudart::run_kernels(0);
  std::atomic<bool> done = false;
  std::atomic<bool> waited = false;
  std::thread watch([&] {
    while (!done && !waited) waited = fake_cudart::num_waiting() > 0;
    fake_cudart::finish_kernels();
  });
  const SymmetricHeap heap = allocate(0);
  done = true;
  watch.join();
  EXPECT_FALSE(waited);
}

TEST_F(SymmetricHeapTest, ABadShapeCostsNothing) {
  HeapShape shape = small_shape(2);
  shape.num_topk = kMaxTopk + 1;
  SymmetricHeap heap;
  EXPECT_EQ(SymmetricHeap::allocate(shape, DomainLink::kMappedMemory, 0, heap).code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(fake_cudart::calls(), Texts{});
}

TEST_F(SymmetricHeapTest, OneThatDoesNotFitSaysWhatIsThereAndWhatToLower) {
  fake_cudart::Machine machine = fake_cudart::make_machine(2);
  machine.devices[1].bytes = 3 << 20;
  fake_cudart::reset(machine);
  const SymmetricHeap first = allocate(1);
  SymmetricHeap second;
  const Status status =
      SymmetricHeap::allocate(small_shape(2), DomainLink::kMappedMemory, 1, second);
  EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
  EXPECT_TRUE(contains(status.message(),
                       "a symmetric heap of 2.0 MiB does not fit on CUDA device 1, which has 1.0 "
                       "MiB free of 3.0 MiB. It needs: "));
  EXPECT_TRUE(contains(status.message(), "max_tokens_per_rank"));
}

TEST_F(SymmetricHeapTest, OneThatDoesNotFitOnADeviceThatDoesNotAnswer) {
  fake_cudart::fail("cudaMalloc", 1, cudaErrorMemoryAllocation);
  fake_cudart::fail("cudaMemGetInfo", 1);
  SymmetricHeap heap;
  const Status status = SymmetricHeap::allocate(small_shape(2), DomainLink::kMappedMemory, 1, heap);
  EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
  EXPECT_TRUE(contains(status.message(), "does not fit on CUDA device 1. It needs: "));
}

TEST_F(SymmetricHeapTest, HasOneOwner) {
  SymmetricHeap one = allocate(0);
  std::byte* const base = one.base();
  SymmetricHeap other = std::move(one);
  EXPECT_EQ(one.base(), nullptr);
  EXPECT_EQ(other.base(), base);
  EXPECT_EQ(other.device(), 0);
  SymmetricHeap third = allocate(1);
  third = std::move(other);
  EXPECT_EQ(third.base(), base);
  EXPECT_EQ(left_behind().size(), 1U) << "the third's former memory";
}

TEST_F(SymmetricHeapTest, AHandleTravelsAsBytes) {
  const SymmetricHeap heap = allocate(3);
  const HeapHandle handle = handle_of(heap, 1);
  EXPECT_EQ(handle.owner.nonce, kNonce);
  EXPECT_EQ(handle.owner.rank, 1);
  EXPECT_EQ(handle.base, heap.base());
  EXPECT_EQ(handle.device_ordinal, 3);
  EXPECT_EQ(handle.device, fake_cudart::make_machine(4).devices[3].uuid);
  EXPECT_TRUE(handle.in_this_process());

  const std::string bytes = handle.to_bytes();
  HeapHandle parsed;
  ASSERT_TRUE(is_ok(HeapHandle::from_bytes(bytes, parsed)));
  EXPECT_EQ(std::memcmp(&parsed, &handle, sizeof(handle)), 0);
  std::string other_version = bytes;
  other_version[7] ^= 1;
  for (const std::string& wrong : {bytes + "x", bytes.substr(1), std::string(), other_version}) {
    EXPECT_EQ(HeapHandle::from_bytes(wrong, parsed).code(), StatusCode::kInvalidArgument);
  }
}

// What was in memory before is nobody else's business: padding is not left as it was.
TEST_F(SymmetricHeapTest, AHandleHoldsNothingElse) {
  const SymmetricHeap heap = allocate(0);
  std::string texts[2];
  for (int i = 0; i < 2; ++i) {
    HeapHandle handle;
    std::memset(static_cast<void*>(&handle), 0x11 * (i + 1), sizeof(handle));
    const HeapOwner owner{.nonce = kNonce, .group_index = 0, .rank = 0};
    ASSERT_TRUE(is_ok(heap.export_handle(owner, handle)));
    texts[i] = handle.to_bytes();
  }
  EXPECT_EQ(texts[0], texts[1]);
}

using PeerMappingTest = SymmetricHeapTest;

TEST_F(PeerMappingTest, InOneProcessIsThePointerItself) {
  const SymmetricHeap heap = allocate(1);
  const HeapHandle handle = handle_of(heap);
  for (int i = 0; i < 2; ++i) {  // the second time, access is enabled already
    PeerMapping mapping;
    ASSERT_TRUE(is_ok(PeerMapping::map(handle, 0, mapping)));
    EXPECT_EQ(mapping.base(), heap.base());
    EXPECT_TRUE(fake_cudart::peer_enabled(0, 1));
    EXPECT_FALSE(fake_cudart::peer_enabled(1, 0));
    EXPECT_EQ(fake_cudart::last_error(), cudaSuccess);
  }
}

TEST_F(PeerMappingTest, OnOneDeviceNeedsNoAccess) {
  const SymmetricHeap heap = allocate(1);
  PeerMapping mapping;
  ASSERT_TRUE(is_ok(PeerMapping::map(handle_of(heap), 1, mapping)));
  EXPECT_EQ(mapping.base(), heap.base());
  EXPECT_FALSE(fake_cudart::peer_enabled(1, 1));
}

TEST_F(PeerMappingTest, DevicesThatDoNotReachEachOtherAreNamed) {
  fake_cudart::Machine machine = fake_cudart::make_machine(2);
  machine.reaches = {{true, false}, {true, true}};
  fake_cudart::reset(machine);
  const SymmetricHeap heap = allocate(1);
  PeerMapping mapping;
  const Status status = PeerMapping::map(handle_of(heap), 0, mapping);
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_TRUE(
      contains(status.message(), "CUDA device 0 cannot access the memory of device 1; all"));
  EXPECT_EQ(mapping.base(), nullptr);
}

TEST_F(PeerMappingTest, AFailureToEnableAccessIsReported) {
  const SymmetricHeap heap = allocate(1);
  const HeapHandle handle = handle_of(heap);
  fake_cudart::fail("cudaDeviceEnablePeerAccess", 1, cudaErrorUnknown);
  PeerMapping mapping;
  const Status status = PeerMapping::map(handle, 0, mapping);
  EXPECT_EQ(status.code(), StatusCode::kInternal);
  EXPECT_TRUE(contains(status.message(), "cudaErrorUnknown"));
  EXPECT_TRUE(contains(status.message(), "cudaDeviceEnablePeerAccess"));
}

}  // namespace
}  // namespace jax_ep
