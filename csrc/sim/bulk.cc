// SPDX-License-Identifier: Apache-2.0
// Bulk copies, mbarriers and async loads: what happens behind the threads' backs.
//
// Each thread's bulk stores, each thread's async loads, and each mbarrier's bulk loads are
// participants with clocks of their own. A thread learns of their work only by waiting.
#include "csrc/sim/engine.h"

namespace jax_ep::sim {
namespace {

constexpr uint32_t kBulkAlignment = 16;

Stamp copy_stamp(uint16_t participant, const BulkCopy& copy) {
  Stamp stamp;
  stamp.time = copy.sequence;
  stamp.participant = participant;
  stamp.location = copy.location & 0xfff;
  stamp.async = copy.is_async_load ? 0 : 1;
  return stamp;
}

void park(Engine& e, Thread& thread, const char* what) {
  thread.what = what;
  e.wait_as(ThreadState::kAtCopy);
}

// Whether these copies of the thread are as far as it waits for.
bool copies_done(const Thread& thread, const CopyGroups& copies) {
  return std::none_of(copies.pending.begin(), copies.pending.end(), [&](const PendingCopy& copy) {
    return copy.sequence <= thread.waits_upto && !(thread.waits_for_reads && copy.fetched);
  });
}

void wake_issuer(Engine& e, Thread& thread, const CopyGroups& copies) {
  if (thread.waits_for != &copies || !copies_done(thread, copies)) return;
  thread.waits_for = nullptr;
  e.make_ready(thread);
}

// Until all groups but the last `allowed_pending` are done, or have been read.
void wait_for_groups(
    Engine& e, Thread& thread, CopyGroups& copies, uint32_t allowed_pending, const char* name) {
  if (copies.groups.size() <= allowed_pending) return;
  const uint32_t upto = copies.groups[copies.groups.size() - 1 - allowed_pending];
  thread.waits_upto = upto;
  if (!copies_done(thread, copies)) {
    thread.waits_for = &copies;
    park(e, thread, name);
  }
  thread.sync = name;
  thread.sync_location = thread.location;
  if (copies.reads_as) thread.view.generic.raise(copies.reads_as, upto);
  if (thread.waits_for_reads) return;
  if (copies.writes_as) thread.view.generic.raise(copies.writes_as, upto);
  copies.waited = std::max(copies.waited, upto);
}

// The thread's next copy, with the participants that stand for it.
void issue(BulkCopy& copy, CopyGroups& copies) {
  copy.groups = &copies;
  copy.sequence = ++copies.issued;
  copy.reads_as = copies.reads_as;
  copy.writes_as = copies.writes_as;
  copies.pending.push_back({copy.sequence, false});
}

uint16_t participant_of(Engine& e, Thread& thread, uint64_t kind, const char* what) {
  const ThreadId& id = thread.id;
  return e.participant(
      uint64_t{thread.view.owner} << 2 | kind,
      *thread.block,
      format("%s of rank %u block %u thread %u", what, id.rank, id.block, id.thread));
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

// Nothing that a thread could see; but an address that is no good is a fault.
void bulk_prefetch(const void* from, uint32_t bytes, Location at) {
  Engine& e = *engine;
  e.step(at);
  (void)e.resolve(from, bytes, kBulkAlignment, Reach::kGlobal);
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
  if (!thread.stores.reads_as) {
    thread.stores.reads_as = participant_of(e, thread, 2, "bulk store");
    thread.stores.writes_as = participant_of(e, thread, 3, "bulk store");
  }
  BulkCopy copy = make_copy(e, thread, bytes);
  copy.source = e.resolve(from, bytes, kBulkAlignment, Reach::kShared);
  copy.target = e.resolve(to, bytes, kBulkAlignment, Reach::kGlobal);
  issue(copy, thread.stores);
  e.copies.push_back(std::move(copy));
}

void bulk_commit(Location at) {
  Thread& thread = engine->step(at);
  thread.stores.groups.push_back(thread.stores.issued);
}

void bulk_wait(uint32_t allowed_pending, bool reads_only, Location at) {
  Engine& e = *engine;
  Thread& thread = e.step(at);
  thread.waits_for_reads = reads_only;
  wait_for_groups(
      e, thread, thread.stores, allowed_pending, reads_only ? "bulk_wait_read" : "bulk_wait");
}

void async_load(void* to, const void* from, uint32_t bytes, Location at) {
  Engine& e = *engine;
  Thread& thread = e.step(at);
  if (!thread.async_loads.reads_as) {
    thread.async_loads.reads_as = thread.async_loads.writes_as =
        participant_of(e, thread, 0, "async load");
  }
  BulkCopy copy = make_copy(e, thread, bytes);
  copy.is_async_load = true;
  copy.source = e.resolve(from, bytes, kBulkAlignment, Reach::kGlobal);
  copy.target = e.resolve(to, bytes, kBulkAlignment, Reach::kShared);
  issue(copy, thread.async_loads);
  e.copies.push_back(std::move(copy));
}

void async_commit(Location at) {
  Thread& thread = engine->step(at);
  thread.async_loads.groups.push_back(thread.async_loads.issued);
}

void async_wait(uint32_t allowed_pending, Location at) {
  Engine& e = *engine;
  Thread& thread = e.step(at);
  thread.waits_for_reads = false;
  wait_for_groups(e, thread, thread.async_loads, allowed_pending, "async_wait");
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
  const MemorySpace source =
      copy.mbar || copy.is_async_load ? MemorySpace::kGlobal : MemorySpace::kShared;
  const Access access{&copy.view, copy_stamp(copy.reads_as, copy), source};
  constexpr uint32_t kStep = Memory::kLineBytes;
  copy.data.resize(copy.bytes);
  for (uint32_t i = 0; i < copy.bytes; i += kStep) {
    memory.load(copy.source + i, kStep, copy.data.data() + i, access, time);
    report_memory(access.stamp);
  }
  copy.fetched = true;
  if (!copy.groups) return;
  for (PendingCopy& pending : copy.groups->pending) {
    if (pending.sequence == copy.sequence) pending.fetched = true;
  }
  wake_issuer(*this, *copy.issuer, *copy.groups);
}

void Engine::land(BulkCopy& copy) {
  const MemorySpace target =
      copy.mbar || copy.is_async_load ? MemorySpace::kShared : MemorySpace::kGlobal;
  const Access access{&copy.view, copy_stamp(copy.writes_as, copy), target};
  constexpr uint32_t kStep = Memory::kLineBytes;
  for (uint32_t i = 0; i < copy.bytes; i += kStep) {
    uint32_t visible[Memory::kWords];
    for (uint32_t& at : visible) at = draw_visible();
    memory.store(copy.target + i, kStep, copy.data.data() + i, access, visible);
    report_memory(access.stamp);
  }
  if (copy.mbar) {
    copy.mbar->bytes -= copy.bytes;
    finish_phase(*this, *copy.mbar);
    return;
  }
  std::erase_if(copy.groups->pending,
                [&](const PendingCopy& pending) { return pending.sequence == copy.sequence; });
  wake_issuer(*this, *copy.issuer, *copy.groups);
}

}  // namespace jax_ep::sim
