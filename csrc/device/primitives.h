// SPDX-License-Identifier: Apache-2.0
// The hardware, as the kernels see it. Kernels reach memory, barriers and copy engines through
// this header alone. nvcc gets PTX (cuda_primitives.h); g++ gets calls into the
// simulator (simulated_primitives.h), which runs the same kernels under adversarial schedules.
//
// Both provide, in namespace jax_ep::dev (Ptr<T> is an address of global or shared memory):
//
//   identity  thread_id() block_id() num_threads() num_blocks() lane_id() warp_id()
//   block     block_sync()  shared<S>()  Shared<T>  address_of(Shared<T>&)
//             named_sync(barrier, threads): block_sync of the so many threads, whole warps, that
//             come to it; barriers 1 to 15 (0 is block_sync's)
//   warp      warp_sync()  warp_shfl(value, lane)  warp_ballot(bool)  warp_match(value)
//             (all 32 lanes take part; the last three order execution, never memory)
//   weak      ld(Ptr<T>)  st(Ptr<T>, T)                  T of 1, 2, 4, 8 or 16 bytes
//   strong    ld_acquire<Scope>(Ptr<T>)  ld_relaxed<Scope>  st_release<Scope>(Ptr<T>, value)
//             st_relaxed<Scope>                          T of 4 or 8 bytes
//             fetch_add_acq_rel<Scope>(Ptr<u32>, value) -> old  fetch_add_relaxed<Scope>
//             compare_exchange_acq_rel<Scope>(Ptr<u32>, expected, desired) -> old
//             fence_acq_rel<Scope>()
//   bulk      mbar_init(Mbar*, arrivals)  mbar_init_fence()  mbar_arrive_expect(Mbar*, bytes)
//             mbar_wait(Mbar*, parity)  bulk_load(Ptr shared, Ptr global, bytes, Mbar*)
//             bulk_store(Ptr global, Ptr shared, bytes)  bulk_commit()
//             bulk_prefetch(Ptr global, bytes): into the L2 cache; nothing that is seen
//             bulk_wait<N>()       all but the last N groups of this thread are written
//             bulk_wait_read<N>()  ... have been read from shared memory
//             fence_proxy_async_shared()  fence_proxy_async_global(): bulk copies that the thread,
//             or who synchronizes with it, issues see what it knows of that kind of memory
//   async     async_load<kOffset>(Ptr<Vec16> shared, Ptr<const Vec16> global): a thread's own load
//             of 16 bytes, at an offset of so many from both   async_commit()
//             async_wait<N>()      all but the last N groups of this thread are there, for it
//             (no bulk copies: they see what the thread has seen, without a fence)
//   launch    launch_dependents(): this block lets the launch behind this one begin; it does when
//   all
//             blocks have, or have ended
//   time      now_ns()  spin_pause(what)  trap()
//             kPollsPerLook: polls of a wait between two looks at the clock
//
// Ordering is PTX's memory model. Bulk copies need 16-byte aligned addresses and sizes, async loads
// addresses.
#ifndef JAX_EP_CSRC_DEVICE_PRIMITIVES_H_
#define JAX_EP_CSRC_DEVICE_PRIMITIVES_H_

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define JAX_EP_DEVICE __device__ __forceinline__
#define JAX_EP_HOST_DEVICE __host__ __device__ __forceinline__
#define JAX_EP_COLD inline __device__ __noinline__
#define JAX_EP_UNROLL _Pragma("unroll")
#define JAX_EP_NO_UNROLL _Pragma("unroll 1")
#else
#define JAX_EP_DEVICE inline
#define JAX_EP_HOST_DEVICE inline
#define JAX_EP_COLD inline
#define JAX_EP_UNROLL
#define JAX_EP_NO_UNROLL
#endif

namespace jax_ep::dev {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i32 = std::int32_t;
using i64 = std::int64_t;

inline constexpr u32 kWarpSize = 32;

// Whom a strong access, or a fence, synchronizes with: threads of this GPU, or of all GPUs that
// map the memory.
enum class Scope { kGpu, kSys };

// 16 bytes, moved as one access (which is not atomic as a whole).
struct alignas(16) Vec16 {
  u32 word[4];
};

// 16 bytes that are stored and loaded at once, with the flag that says of what they are: who sees
// the flag has the data.
struct alignas(16) Packet {
  u32 data[3];
  u32 flag;
};

// The address of an object in global or shared memory. It has no operator*: use ld and st.
template <typename T>
struct Ptr {
  T* raw = nullptr;
  JAX_EP_HOST_DEVICE Ptr operator+(std::int64_t count) const { return {raw + count}; }
};

// The same address, for an access of another type.
template <typename U, typename T>
JAX_EP_HOST_DEVICE Ptr<U> as(Ptr<T> pointer) {
  return {reinterpret_cast<U*>(pointer.raw)};
}

// A barrier in shared memory on which bulk loads complete.
struct Mbar {
  u64 word;
};

}  // namespace jax_ep::dev

#ifdef __CUDACC__
#include "csrc/device/cuda_primitives.h"
#else
#include "csrc/device/simulated_primitives.h"
#endif

#endif  // JAX_EP_CSRC_DEVICE_PRIMITIVES_H_
