// SPDX-License-Identifier: Apache-2.0
// Who runs next.
#include <utility>

#include "csrc/sim/engine.h"

namespace jax_ep::sim {
namespace {

constexpr uint32_t kFullSpeed = 256;
constexpr uint64_t kExpiryNs = uint64_t{1} << 40;  // longer than any timeout

Thread* take(std::vector<Thread*>& from, uint32_t i) {
  Thread* thread = from[i];
  from[i] = from.back();
  from.pop_back();
  return thread;
}

}  // namespace

void Engine::make_current(Thread& thread) {
  thread.state = ThreadState::kRunning;
  current = &thread;
  budget = 1 + random.below(profile.burst);
  ++report.switches;
}

void Engine::resume(Thread& thread) {
  make_current(thread);
  from_scheduler = true;
  swap_fibers(scheduler, thread.context);
  // It may have passed on to others.
  Thread& last = *std::exchange(current, nullptr);
  if (last.state == ThreadState::kDone && report.ok() && !last.block->killed) retire(last);
}

void Engine::leave() {
  Thread& thread = *current;
  Thread* next = pick_neighbor();
  if (next == &thread) {
    make_current(thread);
  } else if (next) {
    make_current(*next);
    from_scheduler = false;
    swap_fibers(thread.context, next->context);
  } else {
    swap_fibers(thread.context, scheduler);
  }
}

// The next thread, if it is of the same block and nothing else is due: switching to it directly
// saves half of the switches.
Thread* Engine::pick_neighbor() {
  if (!engines_idle() && random.chance(1, profile.copy_lag)) engines_due = true;
  if (engines_due || favorite_picks <= 1 || report.steps > config.max_steps) return nullptr;
  if ((picks + 1) % profile.speed_period == 0 || favorite != current->block) return nullptr;
  ++picks;
  --favorite_picks;
  return pick_in(*favorite);
}

// A failed poll parks the thread until the flag that it loaded has changed, or anything if it
// loaded more than that. So waiting costs little, and a deadlock is decided, not guessed.
void Engine::spin(const char* what, const Location& at) {
  Thread& thread = *current;
  if (const uint16_t id = locations.id(at)) thread.location = id;
  thread.what = what;
  ++time;
  ++report.steps;
  thread.wake_at = kNever;
  if (thread.watch == kNothing) thread.watch = kAnything;
  if (thread.watch != kAnything) {
    thread.wake_at = memory.next_visible(thread.watch, thread.watched_at);
    if (thread.watch_too != kNothing) {
      thread.wake_at =
          std::min(thread.wake_at, memory.next_visible(thread.watch_too, thread.watched_at));
      second_watches.insert(thread.watch_too);
    }
  } else if (time < strong_horizon) {
    thread.wake_at = time + random.below(strong_horizon - time + 1);
  }
  if (thread.wake_at == kNever) {
    watchers[thread.watch].push_back(&thread);
  } else {
    thread.block->spinning.push_back(&thread);
  }
  wait_as(ThreadState::kSpinning);
  thread.watch = thread.watch_too = kNothing;
  thread.polled = time;
}

void Engine::wake_watchers(uint64_t address, uint32_t at) {
  poke(at);
  for (const uint64_t watch : {address, kAnything}) {
    const auto it = watchers.find(watch);
    if (it != watchers.end()) wake(it->second, at);
  }
  if (second_watches.contains(address)) wake_second_watchers(address, at);
}

// Seldom needed, and so a search.
void Engine::wake_second_watchers(uint64_t address, uint32_t at) {
  for (auto& [watched, parked] : watchers) {
    std::vector<Thread*> woken;
    std::erase_if(parked, [&](Thread* thread) {
      if (thread->watch_too == address) woken.push_back(thread);
      return thread->watch_too == address;
    });
    wake(woken, at);
  }
}

void Engine::wake(std::vector<Thread*>& parked, uint32_t at) {
  for (Thread* thread : parked) {
    thread->wake_at = at;
    thread->block->spinning.push_back(thread);
  }
  parked.clear();
}

// Lets all parked threads look again if one has not since the last store became visible.
bool Engine::wake_all() {
  bool behind = false;
  const auto for_parked = [this](const auto& act) {
    for (Block* block : active) {
      Thread* first = &threads[static_cast<uint32_t>(block - blocks.data()) * config.max_threads];
      for (Thread* thread = first; thread != first + block->shape.threads; ++thread) {
        if (thread->state == ThreadState::kSpinning && thread->wake_at == kNever) act(*thread);
      }
    }
  };
  for_parked([&](const Thread& thread) { behind |= thread.polled < horizon; });
  if (!behind) return false;
  for_parked([this](Thread& thread) {
    thread.wake_at = time;
    thread.block->spinning.push_back(&thread);
  });
  watchers.clear();
  return true;
}

// A spinning thread of the block that may look again now, or -1.
int Engine::pollable(const Block& block) {
  const auto n = static_cast<uint32_t>(block.spinning.size());
  if (n == 0) return -1;
  uint32_t i = random.below(n);
  for (uint32_t k = 0; k < n; ++k, i = i + 1 == n ? 0 : i + 1) {
    if (block.spinning[i]->wake_at <= time) return static_cast<int>(i);
  }
  return -1;
}

Thread* Engine::pick_in(Block& block) {
  const auto take_ready = [&] {
    --num_ready;
    return take(block.ready, random.below(static_cast<uint32_t>(block.ready.size())));
  };
  if (!block.ready.empty() && (block.spinning.empty() || !random.chance(1, 8))) {
    return take_ready();
  }
  const int i = pollable(block);
  if (i >= 0) return take(block.spinning, static_cast<uint32_t>(i));
  return block.ready.empty() ? nullptr : take_ready();
}

// Null if no thread can do anything, as far as is visible now.
Thread* Engine::pick() {
  const auto n = static_cast<uint32_t>(active.size());
  if (n == 0) return nullptr;
  if (picks++ % profile.speed_period == 0) draw_speeds();
  if (favorite_picks && --favorite_picks && favorite->alive) {
    if (Thread* thread = pick_in(*favorite)) return thread;
  }
  favorite_picks = 1 + random.below(profile.stay);
  for (uint32_t tries = 0; tries < 8; ++tries) {
    favorite = active[random.below(n)];
    if (random.below(kFullSpeed) >= favorite->weight) continue;
    if (Thread* thread = pick_in(*favorite)) return thread;
  }
  const uint32_t start = random.below(n);
  for (uint32_t i = 0; i < n; ++i) {
    favorite = active[(start + i) % n];
    if (Thread* thread = pick_in(*favorite)) return thread;
  }
  return nullptr;
}

// Only waiting threads are left. Lets every store become visible, then time pass until deadlines
// expire. Null: that did not help either.
Thread* Engine::last_hope() {
  time = std::max(time, horizon);
  if (Thread* thread = pick()) return thread;
  if (wake_all()) return pick();
  if (!config.expire_deadlines || report.leaps == config.max_leaps) return nullptr;
  ++report.leaps;
  time_offset += kExpiryNs;
  poke(++time);
  return wake_all() ? pick() : nullptr;
}

// Some ranks, and some blocks, fall far behind for a while.
void Engine::draw_speeds() {
  constexpr uint32_t kSpeeds[] = {kFullSpeed, kFullSpeed, 64, 8, 1};
  const uint32_t per_rank = config.streams * config.max_blocks;
  for (uint32_t r = 0; r < config.num_ranks; ++r) {
    const uint32_t rank_speed = random.one_of(kSpeeds);
    for (uint32_t b = 0; b < per_rank; ++b) {
      const uint32_t weight = rank_speed * random.one_of(kSpeeds) / kFullSpeed;
      blocks[r * per_rank + b].weight = std::max(1u, weight);
    }
  }
}

}  // namespace jax_ep::sim
