// SPDX-License-Identifier: Apache-2.0
// primitives.h on a GPU: sm_90 and later. Most of it is CCCL's; what CCCL has not is asm, one
// instruction a wrapper, each with its least architecture and the reason.
#ifndef JAX_EP_CSRC_DEVICE_CUDA_PRIMITIVES_H_
#define JAX_EP_CSRC_DEVICE_CUDA_PRIMITIVES_H_

#include <cuda/atomic>
#include <cuda/ptx>
#include <type_traits>

namespace jax_ep::dev {

// Not threadIdx.x: what is read at the start and at the end would keep a register in between.
JAX_EP_DEVICE u32 thread_id() { return cuda::ptx::get_sreg_tid_x(); }
JAX_EP_DEVICE u32 block_id() { return blockIdx.x; }
JAX_EP_DEVICE u32 num_threads() { return blockDim.x; }
JAX_EP_DEVICE u32 num_blocks() { return gridDim.x; }
JAX_EP_DEVICE u32 lane_id() { return threadIdx.x % kWarpSize; }
JAX_EP_DEVICE u32 warp_id() { return threadIdx.x / kWarpSize; }

// --- shared memory -----------------------------------------------------------------------------

// A word of shared memory; the simulator checks every access to it.
template <typename T>
class Shared {
 public:
  Shared() = default;
  Shared(const Shared&) = delete;
  JAX_EP_DEVICE operator T() const { return value_; }
  JAX_EP_DEVICE void operator=(T value) { value_ = value; }

 private:
  template <typename U>
  friend JAX_EP_DEVICE Ptr<U> address_of(Shared<U>& word);
  T value_;
};

template <typename T>
JAX_EP_DEVICE Ptr<T> address_of(Shared<T>& word) {
  return {&word.value_};
}

// The block's dynamic shared memory.
template <typename S>
JAX_EP_DEVICE S& shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return *reinterpret_cast<S*>(dynamic_shared_memory);
}

// --- blocks and warps --------------------------------------------------------------------------

JAX_EP_DEVICE void block_sync() { __syncthreads(); }
// Any architecture. CUDA C++ has no barrier for some of a block's warps but cooperative groups,
// which keep theirs in shared memory.
JAX_EP_DEVICE void named_sync(u32 barrier, u32 threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
JAX_EP_DEVICE void warp_sync() { __syncwarp(); }
JAX_EP_DEVICE u32 warp_shfl(u32 value, u32 lane) {
  return __shfl_sync(0xFFFF'FFFF, value, static_cast<int>(lane));
}
JAX_EP_DEVICE u32 warp_ballot(bool predicate) { return __ballot_sync(0xFFFF'FFFF, predicate); }
JAX_EP_DEVICE u32 warp_match(u32 value) { return __match_any_sync(0xFFFF'FFFF, value); }

// --- memory ------------------------------------------------------------------------------------

template <typename T>
JAX_EP_DEVICE std::remove_const_t<T> ld(Ptr<T> from) {
  return *from.raw;
}
template <typename T>
JAX_EP_DEVICE void st(Ptr<T> to, std::type_identity_t<T> value) {
  *to.raw = value;
}

template <Scope kScope, typename T>
using WordRef =
    cuda::atomic_ref<T,
                     kScope == Scope::kSys ? cuda::thread_scope_system : cuda::thread_scope_device>;

template <Scope kScope, typename T>
JAX_EP_DEVICE T ld_acquire(Ptr<T> from) {
  return WordRef<kScope, T>(*from.raw).load(cuda::memory_order_acquire);
}
template <Scope kScope, typename T>
JAX_EP_DEVICE T ld_relaxed(Ptr<T> from) {
  return WordRef<kScope, T>(*from.raw).load(cuda::memory_order_relaxed);
}
template <Scope kScope, typename T>
JAX_EP_DEVICE void st_release(Ptr<T> to, std::type_identity_t<T> value) {
  WordRef<kScope, T>(*to.raw).store(value, cuda::memory_order_release);
}
template <Scope kScope, typename T>
JAX_EP_DEVICE void st_relaxed(Ptr<T> to, std::type_identity_t<T> value) {
  WordRef<kScope, T>(*to.raw).store(value, cuda::memory_order_relaxed);
}
// sm_70. An access of type .b128 is a single one, which those of vectors are not. CCCL of CUDA 13.0
// has it, but writes the operands of the load in the wrong order, which ptxas refuses.
JAX_EP_DEVICE Packet ld_packet(Ptr<const Packet> from) {
  u64 low;
  u64 high;
  asm volatile(
      "{\n\t.reg .b128 packet;\n\t"
      "ld.relaxed.sys.global.b128 packet, [%2];\n\t"
      "mov.b128 {%0, %1}, packet;\n}"
      : "=l"(low), "=l"(high)
      : "l"(__cvta_generic_to_global(from.raw))
      : "memory");
  return {{static_cast<u32>(low), static_cast<u32>(low >> 32), static_cast<u32>(high)},
          static_cast<u32>(high >> 32)};
}
JAX_EP_DEVICE void st_packet(Ptr<Packet> to, const Packet& packet) {
  const u64 low = packet.data[0] | u64{packet.data[1]} << 32;
  const u64 high = packet.data[2] | u64{packet.flag} << 32;
  asm volatile(
      "{\n\t.reg .b128 packet;\n\t"
      "mov.b128 packet, {%1, %2};\n\t"
      "st.relaxed.sys.global.b128 [%0], packet;\n}" ::"l"(__cvta_generic_to_global(to.raw)),
      "l"(low),
      "l"(high)
      : "memory");
}
template <Scope kScope>
JAX_EP_DEVICE u32 fetch_add_acq_rel(Ptr<u32> to, u32 value) {
  return WordRef<kScope, u32>(*to.raw).fetch_add(value, cuda::memory_order_acq_rel);
}
template <Scope kScope>
JAX_EP_DEVICE u32 fetch_add_relaxed(Ptr<u32> to, u32 value) {
  return WordRef<kScope, u32>(*to.raw).fetch_add(value, cuda::memory_order_relaxed);
}
template <Scope kScope>
JAX_EP_DEVICE u32 compare_exchange_acq_rel(Ptr<u32> to, u32 expected, u32 desired) {
  WordRef<kScope, u32>(*to.raw).compare_exchange_strong(
      expected, desired, cuda::memory_order_acq_rel, cuda::memory_order_acquire);
  return expected;
}
template <Scope kScope>
JAX_EP_DEVICE void fence_acq_rel() {
  cuda::atomic_thread_fence(
      cuda::memory_order_acq_rel,
      kScope == Scope::kSys ? cuda::thread_scope_system : cuda::thread_scope_device);
}

// --- bulk copies -------------------------------------------------------------------------------

JAX_EP_DEVICE void mbar_init(Mbar* mbar, u32 arrivals) {
  cuda::ptx::mbarrier_init(&mbar->word, arrivals);
}
// Makes initialized mbarriers known to the copy engines. Follow it with a barrier of the threads
// that use them.
JAX_EP_DEVICE void mbar_init_fence() {
  cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
}
JAX_EP_DEVICE void mbar_arrive_expect(Mbar* mbar, u32 bytes) {
  (void)cuda::ptx::mbarrier_arrive_expect_tx(
      cuda::ptx::sem_release, cuda::ptx::scope_cta, cuda::ptx::space_shared, &mbar->word, bytes);
}
JAX_EP_DEVICE void mbar_wait(Mbar* mbar, u32 parity) {
  while (!cuda::ptx::mbarrier_try_wait_parity(&mbar->word, parity)) {
  }
}
JAX_EP_DEVICE void bulk_load(Ptr<u32> to, Ptr<const std::byte> from, u32 bytes, Mbar* mbar) {
  cuda::ptx::cp_async_bulk(
      cuda::ptx::space_cluster, cuda::ptx::space_global, to.raw, from.raw, bytes, &mbar->word);
}
JAX_EP_DEVICE void bulk_store(Ptr<std::byte> to, Ptr<u32> from, u32 bytes) {
  cuda::ptx::cp_async_bulk(
      cuda::ptx::space_global, cuda::ptx::space_shared, to.raw, from.raw, bytes);
}
// sm_90. CCCL of CUDA 13.0 has it for tensors only.
JAX_EP_DEVICE void bulk_prefetch(Ptr<const std::byte> from, u32 bytes) {
  asm volatile(
      "cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from.raw)),
      "r"(bytes));
}
JAX_EP_DEVICE void bulk_commit() { cuda::ptx::cp_async_bulk_commit_group(); }
template <int kPending>
JAX_EP_DEVICE void bulk_wait() {
  cuda::ptx::cp_async_bulk_wait_group(cuda::ptx::n32_t<kPending>{});
}
template <int kPending>
JAX_EP_DEVICE void bulk_wait_read() {
  cuda::ptx::cp_async_bulk_wait_group_read(cuda::ptx::n32_t<kPending>{});
}
// sm_80. CCCL has these as parts of a pipeline that counts its stages itself. The first bypasses
// L1.
template <int kOffset = 0>
JAX_EP_DEVICE void async_load(Ptr<Vec16> to, Ptr<const Vec16> from) {
  asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %2], 16;" ::"r"(
                   static_cast<u32>(__cvta_generic_to_shared(to.raw))),
               "l"(__cvta_generic_to_global(from.raw)),
               "n"(kOffset * sizeof(Vec16))
               : "memory");
}
JAX_EP_DEVICE void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
JAX_EP_DEVICE void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// Not the fence of both kinds of memory: it would wait for all that the SM has stored.
JAX_EP_DEVICE void fence_proxy_async_shared() {
  cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
}
JAX_EP_DEVICE void fence_proxy_async_global() {
  cuda::ptx::fence_proxy_async(cuda::ptx::space_global);
}

// --- launches ----------------------------------------------------------------------------------

JAX_EP_DEVICE void launch_dependents() { cudaTriggerProgrammaticLaunchCompletion(); }

// --- time --------------------------------------------------------------------------------------

// A clock that all SMs share. Its steps are a microsecond on some GPUs.
JAX_EP_DEVICE u64 now_ns() { return cuda::ptx::get_sreg_globaltimer(); }
// The clock, and what else a waiting thread looks at, would make its polls slow.
inline constexpr u32 kPollsPerLook = 64;
// Called by a thread that polls, between two polls.
JAX_EP_DEVICE void spin_pause(const char* /*what*/) {}
// Ends the kernel with an error; the context is lost.
[[noreturn]] JAX_EP_DEVICE void trap() {
  __trap();
  __builtin_unreachable();
}

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_CUDA_PRIMITIVES_H_
