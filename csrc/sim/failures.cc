// SPDX-License-Identifier: Apache-2.0
// Addresses, and the scenario that a failure tells.
#include <cstdarg>
#include <cstdio>

#include "csrc/sim/engine.h"

namespace jax_ep::sim {
namespace {

constexpr std::size_t kMaxGroups = 24;  // of a deadlock's scenario

}  // namespace

std::string format(const char* pattern, ...) {
  char text[512];
  va_list args;
  va_start(args, pattern);
  std::vsnprintf(text, sizeof text, pattern, args);
  va_end(args);
  return text;
}

std::string Report::text() const {
  if (ok()) return "ok";
  return kind + ": " + what +
         format("\n    seed %llu after %llu primitives: ",
                static_cast<unsigned long long>(seed),
                static_cast<unsigned long long>(steps)) +
         profile;
}

uint64_t Engine::resolve(const void* address, uint64_t bytes, uint32_t alignment, Reach reach) {
  const uint64_t at = offset_of(address);
  const auto bad = [&](const char* why) {
    fail_here("address",
              std::string(why) + ": " +
                  (at < arena_bytes ? place(at) : format("address %p", address)) +
                  format(", %llu bytes", static_cast<unsigned long long>(bytes)));
  };
  if (at >= arena_bytes) bad("no memory of the device");
  if (at % alignment) bad("misaligned");
  const ThreadId& id = current->id;
  if (at < shared_begin()) {
    if (reach == Reach::kShared) bad("not in shared memory");
    const auto owner = static_cast<uint32_t>(at >> rank_shift);
    const uint64_t offset = at - rank_base(owner);
    if (offset + bytes > config.memory_bytes) bad("out of bounds");
    if (owner == id.rank) return at;
    const uint32_t per_node = config.ranks_per_node;
    if (per_node != 0 && owner / per_node != id.rank / per_node) bad("on another node");
    for (const auto& [begin, end] : ranks[owner].shared) {
      if (begin <= at && at + bytes <= end) return at;
    }
    bad("not mapped by this rank");
  }
  if (reach == Reach::kGlobal) bad("not in global memory");
  const uint64_t offset = at - shared_base(*current->block);
  if (offset >= uint64_t{1} << shared_shift) bad("shared memory of another block");
  if (offset + bytes > current->block->shape.shared_bytes) bad("out of bounds");
  return at;
}

void Engine::fail(const char* kind, std::string what) {
  if (report.ok()) {
    report.kind = kind;
    report.what = std::move(what);
  }
  if (current) throw Ended{};
}

void Engine::fail_here(const char* kind, const std::string& what) {
  if (report.ok()) {
    report.kind = kind;
    report.what = what + "\n    by " + name(*current);
  }
  throw Ended{};
}

void Engine::trap_here() {
  if (!config.survive_traps) fail_here("trap", "a kernel gave up");
  if (first_trap.ok()) {
    first_trap.kind = "trap";
    first_trap.what = "a kernel gave up\n    by " + name(*current);
  }
  kill_rank(current->id.rank);
  throw Ended{};
}

void Engine::fail_memory(Stamp by) {
  const Memory::Problem problem = memory.problem;
  memory.problem = {};
  std::string what = std::string(problem.what) + ": " + place(problem.address) + "\n    by " +
                     name(by) + last_sync(by);
  if (std::string(problem.kind) == "race") {
    what += "\n    and " + name(problem.other) + last_sync(problem.other);
  }
  fail(problem.kind, what);
}

std::string Engine::name(const Thread& thread) const {
  const ThreadId& id = thread.id;
  std::string text = format("rank %u block %u thread %u at ", id.rank, id.block, id.thread) +
                     locations.text(thread.location);
  if (config.streams > 1) text += format(", stream %u", id.stream);
  return text + format(", kernel %u", ranks[id.rank].streams[id.stream].kernels);
}

std::string Engine::name(Stamp stamp) const {
  const uint32_t who = stamp.participant;
  if (who == 0) return "the host before the run";
  if (who <= threads.size()) {
    const ThreadId& id = threads[who - 1].id;
    std::string text = format("rank %u block %u thread %u", id.rank, id.block, id.thread);
    if (config.streams > 1) text += format(" stream %u", id.stream);
    return text + " at " + locations.text(stamp.location);
  }
  const auto dynamic = static_cast<uint32_t>(who - 1 - threads.size());
  const uint32_t hosts = config.num_ranks * config.streams;
  if (dynamic < hosts) {
    return format(
        "the host in stream %u of rank %u", dynamic % config.streams, dynamic / config.streams);
  }
  return participant_names[dynamic - hosts] + " at " + locations.text(stamp.location);
}

std::string Engine::last_sync(Stamp stamp) const {
  if (stamp.participant == 0 || stamp.participant > threads.size()) return "";
  const Thread& thread = threads[stamp.participant - 1];
  if (!thread.sync) return "";
  return std::string(", latest synchronization: ") + thread.sync + " at " +
         locations.text(thread.sync_location);
}

std::string Engine::place(uint64_t address) const {
  if (address >= shared_begin()) {
    const uint64_t slot = (address - shared_begin()) >> shared_shift;
    const Block& block = blocks[slot];
    return format("shared memory of rank %u block %u + %#llx",
                  block.rank,
                  block.index,
                  static_cast<unsigned long long>(address - shared_base(block)));
  }
  const auto rank = static_cast<uint32_t>(address >> rank_shift);
  for (const NamedRegion& region : regions) {
    if (address - region.address >= region.bytes) continue;
    return region.name + format("[+%llu] of rank %u",
                                static_cast<unsigned long long>(address - region.address),
                                rank);
  }
  return format(
      "rank %u memory + %#llx", rank, static_cast<unsigned long long>(address - rank_base(rank)));
}

// Who waits for what, grouped by place.
std::string Engine::waiting() const {
  static const char* const kStates[] = {
      "ready", "running", "spinning", "waiting", "at a barrier", "at a warp collective", "done"};
  struct Group {
    std::string text, first;
    uint32_t count = 0;
  };
  std::vector<Group> groups;
  for (const Block* block : active) {
    const auto slot = static_cast<uint32_t>(block - blocks.data());
    for (uint32_t t = 0; t < block->shape.threads; ++t) {
      const Thread& thread = threads[slot * config.max_threads + t];
      if (thread.state == ThreadState::kDone) continue;
      std::string text = kStates[static_cast<int>(thread.state)];
      if (thread.state == ThreadState::kSpinning) {
        text += format(" for %s (last strong load: %u)", thread.what, thread.last_strong);
      } else if (thread.state == ThreadState::kAtCopy) {
        text += format(" for %s", thread.what);
      }
      text = format("rank %u, ", block->rank) + text + " at " + locations.text(thread.location);
      auto group = std::find_if(
          groups.begin(), groups.end(), [&](const Group& g) { return g.text == text; });
      if (group == groups.end()) {
        groups.push_back({text, format("block %u thread %u", block->index, t)});
        group = groups.end() - 1;
      }
      ++group->count;
    }
  }
  std::string text = format("%zu groups of threads wait", groups.size());
  for (std::size_t i = 0; i < groups.size() && i < kMaxGroups; ++i) {
    text += "\n    " + groups[i].text +
            format(": %u threads, first %s", groups[i].count, groups[i].first.c_str());
  }
  return text;
}

}  // namespace jax_ep::sim
