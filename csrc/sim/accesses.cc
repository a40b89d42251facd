// SPDX-License-Identifier: Apache-2.0
// Loads, stores, atomics, fences and time. Whether an access races with another one is decided in
// memory.cc, of mbarriers in bulk.cc.
#include <cstring>

#include "csrc/sim/engine.h"

namespace jax_ep::sim {
namespace {

Stamp stamp_of(const Thread& thread, Order order, MemoryScope scope) {
  Stamp stamp;
  stamp.time = thread.view.now;
  stamp.participant = static_cast<uint16_t>(thread.view.owner);
  stamp.location = thread.location & 0xfff;
  stamp.strong = order != Order::kWeak;
  stamp.gpu_scope = scope == MemoryScope::kGpu;
  return stamp;
}

// What the thread knows, for others to acquire. Its later accesses belong to a new epoch.
Published publish(Thread& thread, MemoryScope scope) {
  Published published{thread.view, thread.id.rank, scope == MemoryScope::kGpu, 0};
  ++thread.view.now;
  return published;
}

// The thread read a store that published something.
void take_in(
    Engine& e, Thread& thread, uint64_t address, uint32_t index, Order order, MemoryScope scope) {
  const Published& published = e.memory.published(index);
  const bool same_rank = published.rank == thread.id.rank;
  const bool in_scope = same_rank || (scope == MemoryScope::kSys && !published.gpu_scope);
  if (published.serial == thread.acquired || !in_scope) return;
  if (published.from_network) {
    if (order != Order::kRelaxed) thread.from_network[address].join(published.view);
    return;
  }
  if (order == Order::kRelaxed) {
    (same_rank ? thread.seen_near : thread.seen_far).join(published.view);
    return;
  }
  thread.view.join(published.view);
  thread.acquired = published.serial;
  thread.sync = "acquire";
  thread.sync_location = thread.location;
}

// The store half of an atomic: extends the release sequence of the store that it replaces.
// `own`: what the atomic releases itself, or null.
void replace(
    Engine& e, uint64_t address, uint32_t value, Stamp by, uint32_t replaced, Published* own) {
  uint32_t published = 0;
  if (replaced && own) {
    Published chain = e.memory.published(replaced);
    chain.view.disown();
    own->view.disown();
    chain.view.join(own->view);
    chain.gpu_scope |= own->gpu_scope;  // strict: one narrow link narrows the chain
    chain.rank = own->rank;
    published = e.memory.publish(std::move(chain));
  } else if (own) {
    published = e.memory.publish(std::move(*own));
  } else {
    published = replaced;
  }
  const uint32_t visible = e.draw_visible();
  e.memory.store(address, 4, &value, {&e.current->view, by}, &visible, published);
  e.report_memory(by);
  e.wake_watchers(address, visible);
}

// A thread that polls watches what it loads: one word, and one more that it looks at in between.
void watch(Thread& thread, uint64_t address) {
  if (thread.watch == kNothing || thread.watch == address) {
    thread.watch = address;
  } else if (thread.watch_too == kNothing || thread.watch_too == address) {
    thread.watch_too = address;
  } else {
    thread.watch = kAnything;
  }
}

void check_granule(Engine& e, uint32_t bytes) {
  if (bytes >= e.config.granule_bytes) return;
  e.fail_here("misuse",
              format("access of %u bytes; the least here is %u", bytes, e.config.granule_bytes));
}

}  // namespace

const ThreadId& self() { return engine->current->id; }

namespace ops {

void* shared_base(std::size_t bytes) {
  Engine& e = *engine;
  const Block& block = *e.current->block;
  if (bytes > block.shape.shared_bytes) {
    e.fail_here(
        "address",
        format("shared memory of %zu bytes; the launch gave %u", bytes, block.shape.shared_bytes));
  }
  return e.arena + e.shared_base(block);
}

void load(const void* from, void* to, uint32_t bytes, Order order, MemoryScope scope, Location at) {
  Engine& e = *engine;
  Thread& thread = e.step(at);
  check_granule(e, bytes);
  const uint64_t address = e.resolve(from, bytes, bytes, Reach::kAny);
  const Access access{&thread.view, stamp_of(thread, order, scope)};
  const uint32_t published = e.memory.load(address, bytes, to, access, e.time);
  e.report_memory(access.stamp);
  if (order == Order::kWeak) return;
  std::memcpy(&thread.last_strong, to, sizeof thread.last_strong);
  watch(thread, address);
  thread.watched_at = e.time;
  if (published) take_in(e, thread, address, published, order, scope);
}

void store(
    void* to, const void* from, uint32_t bytes, Order order, MemoryScope scope, Location at) {
  Engine& e = *engine;
  Thread& thread = e.step(at);
  check_granule(e, bytes);
  const uint64_t address = e.resolve(to, bytes, bytes, Reach::kAny);
  e.kill_before_store(address);
  const Access access{&thread.view, stamp_of(thread, order, scope)};
  // The view must be the one that the store is checked with: publish() ends its epoch.
  uint32_t published = 0;
  if (order == Order::kRelease) {
    published = e.memory.publish(publish(thread, scope));
  } else if (order == Order::kRelaxed && thread.has_fence) {
    published = e.memory.publish(thread.fenced);
  }
  uint32_t visible[Memory::kWords];
  visible[0] = e.draw_visible();
  for (uint32_t w = 1; w < bytes / 4; ++w) {  // wide weak stores tear
    visible[w] = order == Order::kWeak ? e.draw_visible() : visible[0];
  }
  e.memory.store(address, bytes, from, access, visible, published);
  e.report_memory(access.stamp);
  if (order != Order::kWeak) e.wake_watchers(address, visible[0]);
}

uint32_t fetch_add(void* to, uint32_t value, Order order, MemoryScope scope, Location at) {
  Engine& e = *engine;
  Thread& thread = e.step(at);
  const uint64_t address = e.resolve(to, 4, 4, Reach::kAny);
  const Stamp by = stamp_of(thread, order, scope);
  uint32_t old = 0;
  const uint32_t replaced = e.memory.load_newest(address, &old, e.time);
  e.report_memory(by);
  if (replaced) take_in(e, thread, address, replaced, order, scope);
  if (order == Order::kRelaxed) {
    replace(e, address, old + value, by, replaced, nullptr);
    return old;
  }
  Published own = publish(thread, scope);
  replace(e, address, old + value, by, replaced, &own);
  return old;
}

uint32_t compare_exchange(
    void* to, uint32_t expected, uint32_t desired, MemoryScope scope, Location at) {
  Engine& e = *engine;
  Thread& thread = e.step(at);
  const uint64_t address = e.resolve(to, 4, 4, Reach::kAny);
  const Stamp by = stamp_of(thread, Order::kAcquireRelease, scope);
  uint32_t old = 0;
  const uint32_t replaced = e.memory.load_newest(address, &old, e.time);
  e.report_memory(by);
  if (replaced) take_in(e, thread, address, replaced, Order::kAcquireRelease, scope);
  if (old != expected) return old;
  Published own = publish(thread, scope);
  replace(e, address, desired, by, replaced, &own);
  return old;
}

void fence(MemoryScope scope, Location at) {
  Thread& thread = engine->step(at);
  thread.view.join(thread.seen_near);
  if (scope == MemoryScope::kSys) thread.view.join(thread.seen_far);
  thread.fenced = publish(thread, scope);
  thread.has_fence = true;
  thread.sync = "fence";
  thread.sync_location = thread.location;
}

uint64_t now_ns() {
  const Engine& e = *engine;
  // Not drawn: to look at the clock changes nothing.
  const uint64_t skew = e.config.clock_skew_ns;
  return e.time + e.time_offset + (skew == 0 ? 0 : (e.time * 0x9e3779b97f4a7c15U >> 32) % skew);
}

void spin_pause(const char* what, Location at) { engine->spin(what, at); }

void trap(Location at) {
  engine->step(at);
  engine->trap_here();
}

}  // namespace ops
}  // namespace jax_ep::sim
