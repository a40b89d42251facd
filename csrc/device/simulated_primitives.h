// SPDX-License-Identifier: Apache-2.0
// The primitives for kernels that g++ compiles: calls into the simulator. Included by
// csrc/device/primitives.h, which says what they mean. Each takes its caller's source location,
// so that reports name the kernel's line.
#ifndef JAX_EP_CSRC_DEVICE_SIMULATED_PRIMITIVES_H_
#define JAX_EP_CSRC_DEVICE_SIMULATED_PRIMITIVES_H_

#include <bit>
#include <cstddef>
#include <type_traits>

#include "csrc/device/primitives.h"
#include "csrc/device/simulator.h"

namespace jax_ep::dev {

using Location = sim::Location;

constexpr sim::MemoryScope memory_scope(Scope scope) {
  return scope == Scope::kGpu ? sim::MemoryScope::kGpu : sim::MemoryScope::kSys;
}

// ---- identity -----------------------------------------------------------------------------------
inline u32 thread_id() { return sim::self().thread; }
inline u32 block_id() { return sim::self().block; }
inline u32 num_threads() { return sim::self().num_threads; }
inline u32 num_blocks() { return sim::self().num_blocks; }
inline u32 lane_id() { return sim::self().thread % kWarpSize; }
inline u32 warp_id() { return sim::self().thread / kWarpSize; }

// ---- weak accesses ------------------------------------------------------------------------------
template <typename T>
concept Accessible =
    std::is_trivially_copyable_v<T> && (sizeof(T) <= 16 && std::has_single_bit(sizeof(T)));

template <typename T>
  requires Accessible<T>
std::remove_const_t<T> ld(Ptr<T> from, Location at = Location::current()) {
  std::remove_const_t<T> value;
  sim::ops::load(from.raw, &value, sizeof value, sim::Order::kWeak, sim::MemoryScope::kSys, at);
  return value;
}
template <typename T>
  requires Accessible<T>
void st(Ptr<T> to, std::type_identity_t<T> value, Location at = Location::current()) {
  sim::ops::store(to.raw, &value, sizeof value, sim::Order::kWeak, sim::MemoryScope::kSys, at);
}

// ---- block and warp -----------------------------------------------------------------------------
// A word of shared memory, for members of the struct S of shared<S>(). Reads and writes are weak
// accesses, reported at the location of the thread's previous primitive.
template <typename T>
class Shared {
  static_assert(sizeof(T) == 4 && std::is_trivially_copyable_v<T>);

 public:
  Shared() = delete;
  Shared(const Shared&) = delete;

  operator T() const { return ld(address(), Location()); }
  Shared& operator=(T value) {
    st(address(), value, Location());
    return *this;
  }
  Shared& operator=(const Shared& other) { return *this = static_cast<T>(other); }

  Ptr<T> address() { return {&value_}; }
  Ptr<const T> address() const { return {&value_}; }

 private:
  T value_;
};

template <typename T>
Ptr<T> address_of(Shared<T>& word) {
  return word.address();
}

// The start of the block's dynamic shared memory.
template <typename S>
S& shared() {
  return *static_cast<S*>(sim::ops::shared_base(sizeof(S)));
}

inline void block_sync(Location at = Location::current()) {
  sim::ops::barrier(0, num_threads(), at);
}
inline void named_sync(u32 barrier, u32 threads, Location at = Location::current()) {
  sim::ops::barrier(barrier, threads, at);
}
inline void warp_sync(Location at = Location::current()) {
  sim::ops::collective(sim::Collective::kSync, 0, 0, at);
}
template <typename T>
  requires(sizeof(T) == 4)
T warp_shfl(T value, u32 lane, Location at = Location::current()) {
  const u32 bits = std::bit_cast<u32>(value);
  return std::bit_cast<T>(sim::ops::collective(sim::Collective::kShuffle, bits, lane, at));
}
inline u32 warp_ballot(bool predicate, Location at = Location::current()) {
  return sim::ops::collective(sim::Collective::kBallot, predicate, 0, at);
}
inline u32 warp_match(u32 value, Location at = Location::current()) {
  return sim::ops::collective(sim::Collective::kMatch, value, 0, at);
}

// ---- strong accesses ----------------------------------------------------------------------------
template <typename T>
concept StronglyAccessible = Accessible<T> && (sizeof(T) == 4 || sizeof(T) == 8);

template <Scope kScope, StronglyAccessible T>
std::remove_const_t<T> ld_acquire(Ptr<T> from, Location at = Location::current()) {
  std::remove_const_t<T> value;
  sim::ops::load(from.raw, &value, sizeof value, sim::Order::kAcquire, memory_scope(kScope), at);
  return value;
}
template <Scope kScope, StronglyAccessible T>
std::remove_const_t<T> ld_relaxed(Ptr<T> from, Location at = Location::current()) {
  std::remove_const_t<T> value;
  sim::ops::load(from.raw, &value, sizeof value, sim::Order::kRelaxed, memory_scope(kScope), at);
  return value;
}
template <Scope kScope, StronglyAccessible T>
void st_release(Ptr<T> to, std::type_identity_t<T> value, Location at = Location::current()) {
  sim::ops::store(to.raw, &value, sizeof value, sim::Order::kRelease, memory_scope(kScope), at);
}
template <Scope kScope, StronglyAccessible T>
void st_relaxed(Ptr<T> to, std::type_identity_t<T> value, Location at = Location::current()) {
  sim::ops::store(to.raw, &value, sizeof value, sim::Order::kRelaxed, memory_scope(kScope), at);
}
inline Packet ld_packet(Ptr<const Packet> from, Location at = Location::current()) {
  Packet packet;
  sim::ops::load(
      from.raw, &packet, sizeof packet, sim::Order::kRelaxed, sim::MemoryScope::kSys, at);
  return packet;
}
inline void st_packet(Ptr<Packet> to, const Packet& packet, Location at = Location::current()) {
  sim::ops::store(to.raw, &packet, sizeof packet, sim::Order::kRelaxed, sim::MemoryScope::kSys, at);
}
template <Scope kScope>
u32 fetch_add_acq_rel(Ptr<u32> to, u32 value, Location at = Location::current()) {
  return sim::ops::fetch_add(to.raw, value, sim::Order::kAcquireRelease, memory_scope(kScope), at);
}
template <Scope kScope>
u32 fetch_add_relaxed(Ptr<u32> to, u32 value, Location at = Location::current()) {
  return sim::ops::fetch_add(to.raw, value, sim::Order::kRelaxed, memory_scope(kScope), at);
}
template <Scope kScope>
u32 compare_exchange_acq_rel(Ptr<u32> to,
                             u32 expected,
                             u32 desired,
                             Location at = Location::current()) {
  return sim::ops::compare_exchange(to.raw, expected, desired, memory_scope(kScope), at);
}
template <Scope kScope>
void fence_acq_rel(Location at = Location::current()) {
  sim::ops::fence(memory_scope(kScope), at);
}

// ---- bulk copies --------------------------------------------------------------------------------
inline void mbar_init(Mbar* mbar, u32 arrivals, Location at = Location::current()) {
  sim::ops::mbar_init(mbar, arrivals, at);
}
inline void mbar_init_fence(Location at = Location::current()) { sim::ops::mbar_init_fence(at); }
inline void mbar_arrive_expect(Mbar* mbar, u32 bytes, Location at = Location::current()) {
  sim::ops::mbar_arrive_expect(mbar, bytes, at);
}
inline void mbar_wait(Mbar* mbar, u32 parity, Location at = Location::current()) {
  sim::ops::mbar_wait(mbar, parity, at);
}
template <typename T, typename U>
void bulk_load(
    Ptr<T> shared_to, Ptr<U> from, u32 bytes, Mbar* mbar, Location at = Location::current()) {
  sim::ops::bulk_load(shared_to.raw, from.raw, bytes, mbar, at);
}
template <typename T, typename U>
void bulk_store(Ptr<T> to, Ptr<U> shared_from, u32 bytes, Location at = Location::current()) {
  sim::ops::bulk_store(to.raw, shared_from.raw, bytes, at);
}
inline void bulk_prefetch(Ptr<const std::byte> from, u32 bytes, Location at = Location::current()) {
  sim::ops::bulk_prefetch(from.raw, bytes, at);
}
inline void bulk_commit(Location at = Location::current()) { sim::ops::bulk_commit(at); }
template <u32 kPending>
void bulk_wait(Location at = Location::current()) {
  sim::ops::bulk_wait(kPending, /*reads_only=*/false, at);
}
template <u32 kPending>
void bulk_wait_read(Location at = Location::current()) {
  sim::ops::bulk_wait(kPending, /*reads_only=*/true, at);
}
inline void fence_proxy_async_shared(Location at = Location::current()) {
  sim::ops::fence_proxy_async(sim::MemorySpace::kShared, at);
}
inline void fence_proxy_async_global(Location at = Location::current()) {
  sim::ops::fence_proxy_async(sim::MemorySpace::kGlobal, at);
}

// ---- async loads --------------------------------------------------------------------------------
template <int kOffset = 0>
void async_load(Ptr<Vec16> shared_to, Ptr<const Vec16> from, Location at = Location::current()) {
  sim::ops::async_load(shared_to.raw + kOffset, from.raw + kOffset, sizeof(Vec16), at);
}
inline void async_commit(Location at = Location::current()) { sim::ops::async_commit(at); }
template <u32 kPending>
void async_wait(Location at = Location::current()) {
  sim::ops::async_wait(kPending, at);
}

// ---- launches -----------------------------------------------------------------------------------
// The simulator runs both launches of a call as one, whose blocks begin in any order.
inline void launch_dependents() {}

// ---- the network
// ---------------------------------------------------------------------------------- Of the
// simulator alone: what SimulatedTransport is made of.
inline void network_put(Ptr<std::byte> to,
                        Ptr<const std::byte> from,
                        u32 bytes,
                        Ptr<u64> word,
                        u64 before,
                        u64 after,
                        Location at = Location::current()) {
  sim::ops::network_put(to.raw, from.raw, bytes, word.raw, before, after, at);
}
inline void network_acquired(Ptr<u64> word, Location at = Location::current()) {
  sim::ops::network_acquired(word.raw, at);
}

// ---- time ---------------------------------------------------------------------------------------
inline u64 now_ns() { return sim::ops::now_ns(); }
inline constexpr u32 kPollsPerLook = 1;  // a thread is woken to poll only where something changed
inline void spin_pause(const char* what, Location at = Location::current()) {
  sim::ops::spin_pause(what, at);
}
[[noreturn]] inline void trap(Location at = Location::current()) { sim::ops::trap(at); }

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_SIMULATED_PRIMITIVES_H_
