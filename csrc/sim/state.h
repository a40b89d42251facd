// SPDX-License-Identifier: Apache-2.0
// What the engine keeps of threads, blocks, copies, streams and ranks.
#ifndef JAX_EP_CSRC_SIM_STATE_H_
#define JAX_EP_CSRC_SIM_STATE_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "csrc/device/simulator.h"
#include "csrc/sim/fiber.h"
#include "csrc/sim/machine.h"
#include "csrc/sim/memory.h"

namespace jax_ep::sim {

inline constexpr uint32_t kWarpLanes = 32;
inline constexpr uint32_t kNamedBarriers = 16;

enum class ThreadState : uint8_t {
  kReady,
  kRunning,
  kSpinning,
  kAtCopy,
  kAtBarrier,
  kAtCollective,
  kDone,
};

struct Block;

// Values of Thread::watch and Thread::wake_at.
inline constexpr uint64_t kNothing = ~uint64_t{0};
inline constexpr uint64_t kAnything = kNothing - 1;
inline constexpr uint32_t kNever = ~uint32_t{0};

// A copy that is not written yet.
struct PendingCopy {
  uint32_t sequence;
  bool fetched;
};

// The copies of a thread that it waits for in groups: its bulk stores, or its async loads.
struct CopyGroups {
  uint16_t reads_as = 0, writes_as = 0;  // participants that stand for them; 0: none yet
  uint32_t issued = 0, waited = 0;       // so far
  std::vector<uint32_t> groups;          // the last copy of each committed group
  std::vector<PendingCopy> pending;
};

// One CUDA thread.
struct Thread {
  FiberContext context;
  ThreadId id;
  Block* block;
  View view;
  ThreadState state;
  uint16_t location;     // of the primitive that it is in
  const char* what;      // it waits for
  uint64_t watch;        // the flag that it polls, kNothing or kAnything
  uint64_t watch_too;    // a second word that it looks at between polls, or kNothing
  uint32_t watched_at;   // when it last loaded that flag
  uint32_t polled;       // when its last poll began
  uint32_t wake_at;      // when a spinning thread may look again; kNever: once its flag changes
  uint32_t last_strong;  // what its last strong load returned
  const char* sync;      // the last primitive that let it know of others, and where
  uint16_t sync_location;
  uint64_t acquired;                      // serial of the last store that it synchronized with
  uint32_t result;                        // of a warp collective
  std::map<uint64_t, View> from_network;  // acquired, by word, and not handed over yet
  View seen_near, seen_far;  // by relaxed loads from this, from another rank: for a later fence
  Published fenced;          // what the last fence lets relaxed stores release
  bool has_fence;
  CopyGroups stores, async_loads;
  const CopyGroups* waits_for;  // or null
  bool waits_for_reads;         // only
  uint32_t waits_upto;          // this copy
};

struct BarrierState {
  uint32_t expected = 0;
  std::vector<Thread*> arrived;
};

struct CollectiveState {
  Collective kind = Collective::kSync;
  uint32_t arrived = 0;  // lanes
  uint32_t value[kWarpLanes];
  uint32_t source[kWarpLanes];
};

struct MbarState {
  uint32_t expected = 0, pending = 0, phase = 0;
  int64_t bytes = 0;         // announced and not landed
  uint16_t participant = 0;  // stands for the loads that report here
  uint32_t issued = 0;
  View arriving, completed;
  std::vector<Thread*> waiting;
  Stamp init;
  Stamp fenced;  // when its init was made known to the copy engine; strong is 0 until then
};

struct Block {
  uint32_t rank, stream, index;
  uint32_t alive = 0;   // threads
  bool killed = false;  // with its rank, by a trap
  uint32_t weight;      // relative speed, out of 256
  LaunchShape shape;
  std::vector<Thread*> ready;
  std::vector<Thread*> spinning;  // those whose wake_at has been set
  BarrierState barriers[kNamedBarriers];
  std::vector<CollectiveState> warps;
  std::map<uint64_t, MbarState> mbars;  // by address
};

// A bulk copy, or an async load. It reads its source some time after issue, writes its target later
// still.
struct BulkCopy {
  Thread* issuer;
  View view;  // the issuer's, at issue
  uint16_t location;
  uint32_t sequence;
  uint64_t source, target;
  uint32_t bytes;
  uint16_t reads_as, writes_as;
  MbarState* mbar;     // of a bulk load, or
  CopyGroups* groups;  // of the issuer
  bool is_async_load;
  bool fetched;
  std::vector<std::byte> data;
};

// A word that messages change, all of one rank. Participants stand for what the network reads and
// writes for it.
struct NetworkWord {
  uint32_t rank;
  uint16_t reads_as, writes_as;
  uint32_t messages = 0;  // so far
};

// A message on the network: bytes, and then a word that changes.
struct NetworkMessage {
  View view;  // the issuer's, at issue
  uint32_t rank;
  uint16_t location;
  uint64_t source, target, word;
  uint64_t before, after;  // of the word
  uint32_t sequence;       // of the word's messages
  std::vector<std::byte> data;
  std::vector<uint32_t> to_fetch, to_land;  // pieces, by number
};

struct StreamOp {
  LaunchShape shape;
  std::function<void()> kernel;  // or
  std::function<std::string()> check;
};

struct Stream {
  std::deque<StreamOp> ops;
  StreamOp running;  // a kernel
  uint32_t kernels = 0;
  uint32_t blocks_alive = 0;    // of the running kernel: not ended yet
  uint32_t blocks_waiting = 0;  // not started yet
  Clock before;                 // what was known when the running kernel was launched
  View done;                    // what the stream has done so far, as its host calls know it
};

struct NamedRegion {
  uint64_t address, bytes;
  std::string name;
};

struct Rank {
  std::vector<Stream> streams;
  uint32_t blocks_resident = 0;
  bool trapped = false;                    // or killed
  uint64_t stores_to_live = ~uint64_t{0};  // to other ranks' memory, before it is killed
  // Each [begin, end): what peers of the node may access, and what the network may.
  std::vector<std::pair<uint64_t, uint64_t>> shared, registered;
};

// printf's format, into a string.
std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

}  // namespace jax_ep::sim

#endif  // JAX_EP_CSRC_SIM_STATE_H_
