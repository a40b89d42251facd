// SPDX-License-Identifier: Apache-2.0
// The simulator's engine: its state, and the services that the primitives are written with.
#ifndef JAX_EP_CSRC_SIM_ENGINE_H_
#define JAX_EP_CSRC_SIM_ENGINE_H_

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "csrc/sim/locations.h"
#include "csrc/sim/schedule_profile.h"
#include "csrc/sim/state.h"

namespace jax_ep::sim {

// Where an access may go.
enum class Reach { kAny, kGlobal, kShared };

struct Engine {
  explicit Engine(const Config& config);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  void reset(uint64_t seed);
  Report run();

  // ---- what primitives begin with, and how they wait --------------------------------------------
  // Starts a primitive: others run first, if it is time for them.
  Thread& step(const Location& at) {
    Thread& thread = *current;
    if (const uint16_t id = locations.id(at)) thread.location = id;
    ++time;
    ++report.steps;
    if (--budget == 0) {
      make_ready(thread);
      leave();
    }
    return thread;
  }
  void make_ready(Thread& thread) {
    ++num_ready;
    thread.state = ThreadState::kReady;
    thread.block->ready.push_back(&thread);
  }
  void wait_as(ThreadState state) {
    current->state = state;
    leave();
  }
  void spin(const char* what, const Location& at);
  // Lets others run; returns when the thread is resumed.
  void leave();

  // ---- time -------------------------------------------------------------------------------------
  // Notes that something that a spinning thread may wait for happens at `at`.
  void poke(uint32_t at) {
    horizon = std::max(horizon, at);
    strong_horizon = std::max(strong_horizon, at);
  }
  // A strong store to `address` becomes visible at `at`: those who poll it will look again.
  void wake_watchers(uint64_t address, uint32_t at);
  // When a store of now becomes visible to all.
  uint32_t draw_visible() {
    uint32_t at = time;
    if (random.chance(profile.late, 8)) at += random.below(profile.max_delay);
    horizon = std::max(horizon, at);
    return at;
  }

  // ---- addresses --------------------------------------------------------------------------------
  // The arena holds the ranks' memories, then the blocks' shared memories, each at a multiple of a
  // power of two with a gap after it.
  uint64_t rank_base(uint32_t rank) const { return uint64_t{rank} << rank_shift; }
  uint64_t shared_begin() const { return rank_base(config.num_ranks); }
  uint64_t shared_base(const Block& block) const {
    const auto slot = static_cast<uint64_t>(&block - blocks.data());
    return shared_begin() + (slot << shared_shift);
  }
  uint64_t offset_of(const void* address) const {
    return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(arena);
  }
  // The offset in the arena of an address that the thread may access; fails if it may not.
  uint64_t resolve(const void* address, uint64_t bytes, uint32_t alignment, Reach reach);

  // ---- failures ---------------------------------------------------------------------------------
  // Records the first failure, and ends the running thread; all others are abandoned.
  struct Ended {};
  void fail(const char* kind, std::string what);
  [[noreturn]] void fail_here(const char* kind, const std::string& what);
  // A kernel of the running thread traps: the run ends, or if others are to go on, the rank does.
  [[noreturn]] void trap_here();
  void kill_rank(uint32_t rank);
  // The running thread is about to store: ends the rank if it is time for that.
  void kill_before_store(uint64_t address) {
    const uint32_t by = current->id.rank;
    uint64_t& left = ranks[by].stores_to_live;
    if (left == ~uint64_t{0} || address >= shared_begin() || address >> rank_shift == by) return;
    if (left-- > 0) return;
    kill_rank(by);
    throw Ended{};
  }
  void report_memory(Stamp by) {
    if (memory.problem.kind) fail_memory(by);
  }
  void fail_memory(Stamp by);
  std::string name(Stamp stamp) const;
  std::string name(const Thread& thread) const;
  std::string place(uint64_t address) const;
  std::string last_sync(Stamp stamp) const;

  // ---- services of bulk.cc, network.cc and streams.cc -------------------------------------------
  void advance_stream(uint32_t rank, uint32_t stream);
  uint16_t participant(uint64_t key, const Block& block, const std::string& name);
  // What acts behind the threads' backs: copy engines and the network.
  bool engines_idle() const { return copies.empty() && messages.empty(); }
  void advance_engines();
  void advance_copies();
  void advance_messages();

  const Config config;
  const uint32_t rank_shift, shared_shift;
  const uint64_t arena_bytes;
  std::byte* arena = nullptr;  // address space without pages: touching it faults
  Memory memory;
  StackPool stacks;
  std::vector<Thread> threads;  // [ranks, streams, max_blocks, max_threads]
  std::vector<Block> blocks;    // [ranks, streams, max_blocks]
  std::vector<Rank> ranks;
  std::vector<NamedRegion> regions;
  std::map<uint64_t, uint16_t> participants;   // made on demand, by key
  std::vector<std::string> participant_names;  // of those
  LocationTable locations;

  uint64_t seed = 0;
  Random random;
  ScheduleProfile profile;
  uint32_t time = 1;                         // primitives, and what is skipped
  uint64_t time_offset = 0;                  // of now_ns(): deadlines that were made to expire
  uint32_t horizon = 1, strong_horizon = 1;  // when all stores, and all flags, are visible
  uint64_t picks = 0;
  uint32_t num_ready = 0;
  std::unordered_map<uint64_t, std::vector<Thread*>> watchers;  // spinning, wake_at is kNever
  std::set<uint64_t> second_watches;  // words that some thread has looked at between its polls
  std::vector<Block*> active;
  Block* favorite = nullptr;
  uint32_t favorite_picks = 0;
  Thread* current = nullptr;
  Stream* host_stream = nullptr;  // whose check or host call runs
  bool running = false;
  uint32_t budget = 0;
  bool engines_due = false;
  bool from_scheduler = false;  // who switched to the current thread
  FiberContext scheduler;
  std::vector<BulkCopy> copies;
  std::vector<NetworkMessage> messages;
  std::map<uint64_t, NetworkWord> network_words;  // by address
  Report report;
  Report first_trap;  // where a run goes on after one

 private:
  Thread* pick();
  Thread* pick_neighbor();
  Thread* pick_in(Block& block);
  int pollable(const Block& block);
  void wake(std::vector<Thread*>& parked, uint32_t at);
  bool wake_all();
  Thread* last_hope();
  void draw_speeds();
  void resume(Thread& thread);
  void make_current(Thread& thread);
  void start_blocks(uint32_t rank);
  void start_block(uint32_t rank, uint32_t stream);
  void retire(Thread& thread);
  void retire_block(Block& block);
  void join_streams();
  void wake_second_watchers(uint64_t address, uint32_t at);
  uint32_t block_slot(uint32_t rank, uint32_t stream, uint32_t block) const {
    return (rank * config.streams + stream) * config.max_blocks + block;
  }
  uint16_t host_participant(uint32_t rank, uint32_t stream) const {
    return static_cast<uint16_t>(1 + threads.size() + rank * config.streams + stream);
  }
  void fetch(BulkCopy& copy);
  void land(BulkCopy& copy);
  void fetch_piece(NetworkMessage& message);
  void land_piece(NetworkMessage& message);
  void change_word(NetworkMessage& message);
  std::string waiting() const;
  static void enter();
};

inline Engine* engine = nullptr;  // of the machine that runs

}  // namespace jax_ep::sim

#endif  // JAX_EP_CSRC_SIM_ENGINE_H_
