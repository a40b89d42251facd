// SPDX-License-Identifier: Apache-2.0
// What simulated_primitives.h calls: the primitives, with sizes and types erased, on the fiber of a
// simulated thread. Their meanings are those of primitives.h; csrc/sim, the layer above, implements
// them.
#ifndef JAX_EP_CSRC_DEVICE_SIMULATOR_H_
#define JAX_EP_CSRC_DEVICE_SIMULATOR_H_

#include <cstddef>
#include <cstdint>
#include <source_location>

namespace jax_ep::sim {

using Location = std::source_location;

enum class Order : uint8_t { kWeak, kRelaxed, kAcquire, kRelease, kAcquireRelease };
enum class MemoryScope : uint8_t { kGpu, kSys };
enum class MemorySpace : uint8_t { kGlobal, kShared };
inline constexpr uint32_t kNumMemorySpaces = 2;
enum class Collective : uint8_t { kSync, kShuffle, kBallot, kMatch };

struct ThreadId {
  uint32_t rank, stream, block, thread, num_blocks, num_threads;
};
const ThreadId& self();

namespace ops {

void* shared_base(std::size_t bytes);

// An access whose location is unknown (shared memory words) is reported at the last known one.
void load(const void* from, void* to, uint32_t bytes, Order order, MemoryScope scope, Location at);
void store(void* to, const void* from, uint32_t bytes, Order order, MemoryScope scope, Location at);
uint32_t fetch_add(void* to, uint32_t value, Order order, MemoryScope scope, Location at);
// With an acquire, and where it stores a release.
uint32_t compare_exchange(
    void* to, uint32_t expected, uint32_t desired, MemoryScope scope, Location at);
void fence(MemoryScope scope, Location at);

void barrier(uint32_t id, uint32_t threads, Location at);
uint32_t collective(Collective kind, uint32_t value, uint32_t source_lane, Location at);

void mbar_init(void* mbar, uint32_t arrivals, Location at);
void mbar_init_fence(Location at);
void mbar_arrive_expect(void* mbar, uint32_t bytes, Location at);
void mbar_wait(void* mbar, uint32_t parity, Location at);
void bulk_prefetch(const void* from, uint32_t bytes, Location at);
void bulk_load(void* to, const void* from, uint32_t bytes, void* mbar, Location at);
void bulk_store(void* to, const void* from, uint32_t bytes, Location at);
void bulk_commit(Location at);
void bulk_wait(uint32_t allowed_pending, bool reads_only, Location at);
void fence_proxy_async(MemorySpace space, Location at);
void async_load(void* to, const void* from, uint32_t bytes, Location at);
void async_commit(Location at);
void async_wait(uint32_t allowed_pending, Location at);

// See csrc/device/transport/transport.h. A word that holds `before` gets `after`.
void network_put(void* to,
                 const void* from,
                 uint32_t bytes,
                 void* word,
                 uint64_t before,
                 uint64_t after,
                 Location at);
void network_acquired(const void* word, Location at);

uint64_t now_ns();
void spin_pause(const char* what, Location at);
[[noreturn]] void trap(Location at);

}  // namespace ops
}  // namespace jax_ep::sim

#endif  // JAX_EP_CSRC_DEVICE_SIMULATOR_H_
