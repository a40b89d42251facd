// SPDX-License-Identifier: Apache-2.0
// Bulk copies and mbarriers: what happens behind the threads' backs.
//
// Each thread's bulk stores, and each mbarrier's bulk loads, are participants with clocks of their
// own. A thread learns of their work only by waiting.
#include "csrc/sim/engine.h"

namespace jax_ep::sim {
namespace {

constexpr uint32_t kBulkAlignment = 16;

Stamp copy_stamp(uint16_t participant, const BulkCopy& copy) {
  Stamp stamp;
  stamp.time = copy.sequence;
  stamp.participant = participant;
  stamp.location = copy.location & 0xfff;
  stamp.async = 1;
  return stamp;
}

void park(Engine& e, Thread& thread, const char* what) {
  thread.what = what;
  e.wait_as(ThreadState::kAtCopy);
}

// Whether the thread's bulk stores are as far as it waits for.
bool stores_done(const Thread& thread) {
  return std::none_of(thread.pending.begin(), thread.pending.end(), [&](const PendingStore& store) {
    return store.sequence <= thread.waits_upto && !(thread.waits_for_reads && store.fetched);
  });
}

void wake_issuer(Engine& e, Thread& thread) {
  if (!thread.in_bulk_wait || !stores_done(thread)) return;
  thread.in_bulk_wait = false;
  e.make_ready(thread);
}

void finish_phase(Engine& e, MbarState& mbar) {
  if (mbar.pending || mbar.bytes) return;
  ++mbar.phase;
  mbar.pending = mbar.expected;
  mbar.completed = std::exchange(mbar.arriving, {});
  mbar.completed.generic.raise(mbar.participant, mbar.issued);
  for (Thread* thread : mbar.waiting) e.make_ready(*thread);
  mbar.waiting.clear();
}

MbarState& find_mbar(Engine& e, const Thread& thread, const void* address) {
  const auto it = thread.block->mbars.find(e.offset_of(address));
  if (it == thread.block->mbars.end() ||
      (e.config.check_races && !thread.view.sees(it->second.init))) {
    e.fail_here("race", "mbarrier used where its mbar_init is not known");
  }
  return it->second;
}

BulkCopy make_copy(Engine& e, Thread& thread, uint32_t bytes) {
  if (bytes == 0 || bytes % kBulkAlignment) {
    e.fail_here("address", format("bulk copy of %u bytes, not a multiple of 16", bytes));
  }
  BulkCopy copy{};
  copy.issuer = &thread;
  copy.location = thread.location;
  copy.bytes = bytes;
  copy.view = thread.view;
  ++thread.view.now;  // what the issuer does next is not ordered before the copy
  return copy;
}

// Makes the inits of mbarriers that the thread knows of known to the copy engine.
void fence_mbars(Thread& thread) {
  for (auto& [address, mbar] : thread.block->mbars) {
    if (mbar.fenced.strong || !thread.view.sees(mbar.init)) continue;
    mbar.fenced.strong = 1;
    mbar.fenced.participant = static_cast<uint16_t>(thread.view.owner);
    mbar.fenced.time = thread.view.now;
  }
}

}  // namespace

namespace ops {

void mbar_init(void* address, uint32_t arrivals, Location at) {
  Engine& e = *engine;
  Thread& thread = e.step(at);
  const uint64_t offset = e.resolve(address, 8, 8, Reach::kShared);
  const ThreadId& id = thread.id;
  MbarState& mbar = thread.block->mbars[offset] = {};
  mbar.expected = mbar.pending = arrivals;
  mbar.participant = e.participant(
      offset << 2 | 1, *thread.block, format("bulk load of rank %u block %u", id.rank, id.block));
  mbar.issued = thread.view.generic[mbar.participant];
  mbar.init.participant = static_cast<uint16_t>(thread.view.owner);
  mbar.init.time = thread.view.now;
}

void mbar_init_fence(Location at) {
  Thread& thread = engine->step(at);
  fence_mbars(thread);
}

void mbar_arrive_expect(void* address, uint32_t bytes, Location at) {
  Engine& e = *engine;
  Thread& thread = e.step(at);
  MbarState& mbar = find_mbar(e, thread, address);
  if (!mbar.pending) e.fail_here("barrier", "too many arrivals at an mbarrier");
  mbar.bytes += bytes;
  --mbar.pending;
  mbar.arriving.join(thread.view);
  ++thread.view.now;
  finish_phase(e, mbar);
}

void mbar_wait(void* address, uint32_t parity, Location at) {
  Engine& e = *engine;
  Thread& thread = e.step(at);
  MbarState& mbar = find_mbar(e, thread, address);
  // Who is slow may miss a phase, and then waits for the next one but one.
  while ((mbar.phase & 1) == parity) {
    mbar.waiting.push_back(&thread);
    park(e, thread, "mbarrier");
  }
  thread.view.join(mbar.completed);
  thread.sync = "mbar_wait";
  thread.sync_location = thread.location;
}

void bulk_load(void* to, const void* from, uint32_t bytes, void* address, Location at) {
  Engine& e = *engine;
  Thread& thread = e.step(at);
  MbarState& mbar = find_mbar(e, thread, address);
  if (e.config.check_races && (!mbar.fenced.strong || !thread.view.sees(mbar.fenced))) {
    e.fail_here("race", "bulk_load reports to an mbarrier whose init no fence made known to it");
  }
  BulkCopy copy = make_copy(e, thread, bytes);
  copy.source = e.resolve(from, bytes, kBulkAlignment, Reach::kGlobal);
  copy.target = e.resolve(to, bytes, kBulkAlignment, Reach::kShared);
  copy.mbar = &mbar;
  copy.sequence = ++mbar.issued;
  copy.reads_as = copy.writes_as = mbar.participant;
  e.copies.push_back(std::move(copy));
}

void bulk_store(void* to, const void* from, uint32_t bytes, Location at) {
  Engine& e = *engine;
  Thread& thread = e.step(at);
  if (!thread.reads_as) {
    const ThreadId& id = thread.id;
    const std::string who =
        format("bulk store of rank %u block %u thread %u", id.rank, id.block, id.thread);
    thread.reads_as = e.participant(uint64_t{thread.view.owner} << 2 | 2, *thread.block, who);
    thread.writes_as = e.participant(uint64_t{thread.view.owner} << 2 | 3, *thread.block, who);
  }
  BulkCopy copy = make_copy(e, thread, bytes);
  copy.source = e.resolve(from, bytes, kBulkAlignment, Reach::kShared);
  copy.target = e.resolve(to, bytes, kBulkAlignment, Reach::kGlobal);
  copy.sequence = ++thread.issued;
  copy.reads_as = thread.reads_as;
  copy.writes_as = thread.writes_as;
  thread.pending.push_back({copy.sequence, false});
  e.copies.push_back(std::move(copy));
}

void bulk_commit(Location at) {
  Thread& thread = engine->step(at);
  thread.groups.push_back(thread.issued);
}

void bulk_wait(uint32_t allowed_pending, bool reads_only, Location at) {
  Engine& e = *engine;
  Thread& thread = e.step(at);
  if (thread.groups.size() <= allowed_pending) return;
  const uint32_t upto = thread.groups[thread.groups.size() - 1 - allowed_pending];
  const char* const name = reads_only ? "bulk_wait_read" : "bulk_wait";
  thread.waits_upto = upto;
  thread.waits_for_reads = reads_only;
  if (!stores_done(thread)) {
    thread.in_bulk_wait = true;
    park(e, thread, name);
  }
  thread.sync = name;
  thread.sync_location = thread.location;
  thread.view.generic.raise(thread.reads_as, upto);
  if (reads_only) return;
  thread.view.generic.raise(thread.writes_as, upto);
  thread.waited = std::max(thread.waited, upto);
}

void fence_proxy_async(MemorySpace space, Location at) {
  Thread& thread = engine->step(at);
  if (space == MemorySpace::kShared) fence_mbars(thread);
  const auto s = static_cast<uint32_t>(space);
  thread.view.async[s] = thread.view.generic;
  thread.view.now_async[s] = thread.view.now++;
}

}  // namespace ops

void Engine::advance_copies() {
  BulkCopy& copy = copies[random.below(static_cast<uint32_t>(copies.size()))];
  if (!copy.fetched) {
    fetch(copy);
    return;
  }
  land(copy);
  if (&copy != &copies.back()) copy = std::move(copies.back());
  copies.pop_back();
}

void Engine::fetch(BulkCopy& copy) {
  const MemorySpace source = copy.mbar ? MemorySpace::kGlobal : MemorySpace::kShared;
  const Access access{&copy.view, copy_stamp(copy.reads_as, copy), source};
  constexpr uint32_t kStep = Memory::kLineBytes;
  copy.data.resize(copy.bytes);
  for (uint32_t i = 0; i < copy.bytes; i += kStep) {
    memory.load(copy.source + i, kStep, copy.data.data() + i, access, time);
    check_memory(access.stamp);
  }
  copy.fetched = true;
  if (copy.mbar) return;
  for (PendingStore& store : copy.issuer->pending) {
    if (store.sequence == copy.sequence) store.fetched = true;
  }
  wake_issuer(*this, *copy.issuer);
}

void Engine::land(BulkCopy& copy) {
  const MemorySpace target = copy.mbar ? MemorySpace::kShared : MemorySpace::kGlobal;
  const Access access{&copy.view, copy_stamp(copy.writes_as, copy), target};
  constexpr uint32_t kStep = Memory::kLineBytes;
  for (uint32_t i = 0; i < copy.bytes; i += kStep) {
    uint32_t visible[Memory::kWords];
    for (uint32_t& at : visible) at = draw_visible();
    memory.store(copy.target + i, kStep, copy.data.data() + i, access, visible);
    check_memory(access.stamp);
  }
  if (copy.mbar) {
    copy.mbar->bytes -= copy.bytes;
    finish_phase(*this, *copy.mbar);
    return;
  }
  std::erase_if(copy.issuer->pending,
                [&](const PendingStore& store) { return store.sequence == copy.sequence; });
  wake_issuer(*this, *copy.issuer);
}

}  // namespace jax_ep::sim
