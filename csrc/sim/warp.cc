// SPDX-License-Identifier: Apache-2.0
// Barriers of blocks and warps, and what lanes of a warp tell each other.
#include <algorithm>

#include "csrc/sim/engine.h"

namespace jax_ep::sim {
namespace {

// Everyone in the group comes to know what each of them knew. `each` calls its argument with
// every thread of the group.
template <typename Each>
void synchronize(const char* what, const Each& each) {
  View all;
  each([&](Thread& thread) {
    all.generic.join(thread.view.generic);
    for (uint32_t s = 0; s < kNumMemorySpaces; ++s) all.async[s].join(thread.view.async[s]);
  });
  each([&](Thread& thread) {
    all.generic.raise(thread.view.owner, thread.view.now++);
    for (uint32_t s = 0; s < kNumMemorySpaces; ++s) {
      all.async[s].raise(thread.view.owner, thread.view.now_async[s]);
    }
  });
  each([&](Thread& thread) {
    thread.view.generic = all.generic;
    std::copy_n(all.async, kNumMemorySpaces, thread.view.async);
    thread.sync = what;
    thread.sync_location = thread.location;
  });
}

const char* name_of(Collective kind) {
  static const char* const kNames[] = {"warp_sync", "warp_shfl", "warp_ballot", "warp_match"};
  return kNames[static_cast<int>(kind)];
}

// Lanes that hold the same value as the lane.
uint32_t matching(const CollectiveState& warp, uint32_t lane) {
  uint32_t lanes = 0;
  for (uint32_t i = 0; i < kWarpLanes; ++i) {
    lanes |= uint32_t{warp.value[i] == warp.value[lane]} << i;
  }
  return lanes;
}

void give_results(const CollectiveState& warp, Thread* first) {
  uint32_t ballot = 0;
  for (uint32_t i = 0; i < kWarpLanes; ++i) ballot |= uint32_t{warp.value[i] != 0} << i;
  for (uint32_t i = 0; i < kWarpLanes; ++i) {
    switch (warp.kind) {
      case Collective::kSync: break;
      case Collective::kShuffle: first[i].result = warp.value[warp.source[i] % kWarpLanes]; break;
      case Collective::kBallot: first[i].result = ballot; break;
      case Collective::kMatch: first[i].result = matching(warp, i); break;
    }
  }
}

}  // namespace

namespace ops {

void barrier(uint32_t id, uint32_t threads, Location at) {
  Engine& e = *engine;
  Thread& thread = e.step(at);
  if (id >= kNamedBarriers || threads % kWarpLanes || threads > thread.id.num_threads) {
    e.fail_here("barrier", format("no barrier %u for %u threads", id, threads));
  }
  BarrierState& barrier = thread.block->barriers[id];
  if (barrier.arrived.empty()) barrier.expected = threads;
  if (barrier.expected != threads) {
    e.fail_here(
        "barrier",
        format(
            "barrier %u for %u threads; others came to it for %u", id, threads, barrier.expected));
  }
  barrier.arrived.push_back(&thread);
  if (barrier.arrived.size() < barrier.expected) {
    e.wait_as(ThreadState::kAtBarrier);
    return;
  }
  synchronize("barrier", [&](const auto& act) {
    for (Thread* other : barrier.arrived) act(*other);
  });
  for (Thread* other : barrier.arrived) {
    if (other != &thread) e.make_ready(*other);
  }
  barrier.arrived.clear();
}

uint32_t collective(Collective kind, uint32_t value, uint32_t source_lane, Location at) {
  Engine& e = *engine;
  Thread& thread = e.step(at);
  const uint32_t lane = thread.id.thread % kWarpLanes;
  CollectiveState& warp = thread.block->warps[thread.id.thread / kWarpLanes];
  if (warp.arrived == 0) warp.kind = kind;
  if (warp.kind != kind) {
    e.fail_here("collective",
                std::string("divergent warp: ") + name_of(kind) + " while other lanes are in " +
                    name_of(warp.kind));
  }
  warp.arrived |= 1u << lane;
  warp.value[lane] = value;
  warp.source[lane] = source_lane;
  if (warp.arrived != ~uint32_t{0}) {
    e.wait_as(ThreadState::kAtCollective);
    return thread.result;
  }
  warp.arrived = 0;
  Thread* first = &thread - lane;
  if (kind == Collective::kSync) {
    synchronize("warp_sync", [&](const auto& act) {
      for (uint32_t i = 0; i < kWarpLanes; ++i) act(first[i]);
    });
  }
  give_results(warp, first);
  for (uint32_t i = 0; i < kWarpLanes; ++i) {
    if (i != lane) e.make_ready(first[i]);
  }
  return thread.result;
}

}  // namespace ops
}  // namespace jax_ep::sim
