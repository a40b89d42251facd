// SPDX-License-Identifier: Apache-2.0
// Set-up, and the main loop.
#include "csrc/sim/engine.h"

#include <sys/mman.h>

#include <bit>
#include <cstdlib>

namespace jax_ep::sim {
namespace {

constexpr uint64_t kGapBytes = 4096;  // after each memory, so that running over its end is seen
constexpr uint32_t kLeastSpace = 4096;

uint32_t num_threads(const Config& c) {
  return c.num_ranks * c.streams * c.max_blocks * c.max_threads;
}
uint32_t num_blocks(const Config& c) { return c.num_ranks * c.streams * c.max_blocks; }
uint32_t shift_for(uint64_t bytes) {
  return static_cast<uint32_t>(std::bit_width(std::max<uint64_t>(bytes, kLeastSpace) - 1));
}

}  // namespace

Engine::Engine(const Config& c)
    : config(c),
      rank_shift(shift_for(c.memory_bytes + kGapBytes)),
      shared_shift(shift_for(c.shared_bytes + kGapBytes)),
      arena_bytes((uint64_t{c.num_ranks} << rank_shift) +
                  (uint64_t{sim::num_blocks(c)} << shared_shift)),
      memory(arena_bytes),
      stacks(sim::num_threads(c)),
      threads(sim::num_threads(c)),
      blocks(sim::num_blocks(c)),
      ranks(c.num_ranks) {
  void* mapping =
      mmap(nullptr, arena_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) std::abort();
  arena = static_cast<std::byte*>(mapping);
  memory.check_races = c.check_races;
  memory.stale_reads = c.stale_reads;
  for (uint32_t i = 0; i < blocks.size(); ++i) {
    blocks[i].rank = i / (c.max_blocks * c.streams);
    blocks[i].stream = i / c.max_blocks % c.streams;
    blocks[i].warps.resize(c.max_threads / kWarpLanes);
  }
}

Engine::~Engine() { munmap(arena, arena_bytes); }

void Engine::reset(uint64_t new_seed) {
  memory.reset();
  memory.rank_of.assign(1, 0);
  memory.block_of.assign(1, Memory::kNoBlock);
  const uint32_t threads_per_block = config.max_threads;
  for (uint32_t i = 0; i < threads.size(); ++i) {
    Thread& thread = threads[i];
    thread.view = thread.seen_near = thread.seen_far = {};
    thread.from_network.clear();
    thread.view.owner = 1 + i;
    thread.fenced = {};
    thread.state = ThreadState::kDone;
    thread.stores = thread.async_loads = {};
    thread.acquired = 0;
    thread.sync = nullptr;
    memory.rank_of.push_back(static_cast<uint16_t>(blocks[i / threads_per_block].rank));
    memory.block_of.push_back(static_cast<uint16_t>(i / threads_per_block));
  }
  for (Block& block : blocks) {
    block.alive = 0;
    block.ready.clear();
    block.spinning.clear();
    block.mbars.clear();
  }
  for (uint32_t r = 0; r < config.num_ranks; ++r) {
    ranks[r] = {};
    ranks[r].streams.resize(config.streams);
    for (uint32_t s = 0; s < config.streams; ++s) {
      ranks[r].streams[s].done.owner = host_participant(r, s);
      ranks[r].streams[s].done.now = 1;  // everybody knows what happened at 0
      memory.rank_of.push_back(static_cast<uint16_t>(r));
      memory.block_of.push_back(Memory::kNoBlock);
    }
  }
  Clock::make_room(static_cast<uint32_t>(memory.rank_of.size()));
  participants.clear();
  participant_names.clear();
  regions.clear();
  active.clear();
  watchers.clear();
  second_watches.clear();
  first_trap = {};
  copies.clear();
  messages.clear();
  network_words.clear();
  report = {};
  time = horizon = strong_horizon = 1;
  time_offset = 0;
  num_ready = favorite_picks = budget = 0;
  picks = 0;
  favorite = nullptr;
  current = nullptr;
  host_stream = nullptr;
  running = engines_due = false;

  seed = new_seed;
  random = Random(seed * 0x2545f4914f6cdd1d + 1);
  profile = ScheduleProfile::draw(random);
}

uint16_t Engine::participant(uint64_t key, const Block& block, const std::string& new_name) {
  const auto next = static_cast<uint16_t>(memory.rank_of.size());
  const auto [it, fresh] = participants.try_emplace(key, next);
  if (fresh) {
    if (next == Clock::kMaxParticipants) fail_here("misuse", "too many threads and copy engines");
    memory.rank_of.push_back(static_cast<uint16_t>(block.rank));
    memory.block_of.push_back(static_cast<uint16_t>(&block - blocks.data()));
    participant_names.push_back(new_name);
    Clock::make_room(next + 1u);
  }
  return it->second;
}

void Engine::advance_engines() {
  if (copies.empty() || (!messages.empty() && random.chance(1, 2))) {
    advance_messages();
  } else {
    advance_copies();
  }
}

Report Engine::run() {
  engine = this;
  running = true;
  for (uint32_t r = 0; r < config.num_ranks; ++r) {
    for (uint32_t s = 0; s < config.streams; ++s) advance_stream(r, s);
  }
  while (report.ok()) {
    if (report.steps > config.max_steps || time > 0xf0000000u) {
      fail("livelock", "the limit on steps is reached; " + waiting());
      break;
    }
    if (!engines_idle() && (engines_due || random.chance(1, profile.copy_lag))) {
      engines_due = false;
      advance_engines();
      continue;
    }
    // Nobody can do anything but poll: skip ahead.
    if (!num_ready && engines_idle() && time < strong_horizon) {
      time += random.below(strong_horizon - time + 1);
    }
    Thread* next = pick();
    if (!next && !engines_idle()) {
      advance_engines();
      continue;
    }
    if (!next && active.empty()) break;
    if (!next) next = last_hope();
    if (!next) {
      fail("deadlock", waiting());
      break;
    }
    resume(*next);
  }
  running = false;
  // Those that went on came to an end: what is left to say is that one trapped.
  if (report.ok()) report = first_trap.ok() ? report : first_trap;
  if (report.ok()) join_streams();
  report.seed = seed;
  report.profile = profile.text();
  return report;
}

}  // namespace jax_ep::sim
