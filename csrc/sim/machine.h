// SPDX-License-Identifier: Apache-2.0
// A deterministic, adversarial simulator of several GPUs in one host thread: what tests see of it.
//
// Every CUDA thread is a fiber. A seeded scheduler picks who runs, for how long, and when every
// store and bulk copy takes effect, within what PTX's memory model allows. The same seed and
// configuration give the same run, step by step. One machine runs at a time in a process.
#ifndef JAX_EP_CSRC_SIM_MACHINE_H_
#define JAX_EP_CSRC_SIM_MACHINE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace jax_ep::sim {

struct Config {
  uint32_t num_ranks = 2;
  uint32_t ranks_per_node = 0;  // consecutive; messages alone reach other nodes. 0: one node
  uint32_t streams = 1;         // per rank
  uint32_t max_blocks = 2;      // of a kernel
  uint32_t max_threads = 128;   // of a block; a multiple of 32
  uint32_t resident_blocks =
      ~uint32_t{0};            // of a rank, over its streams; others wait for one's end
  uint32_t granule_bytes = 4;  // 1, 2 or 4: smaller accesses are reported
  uint64_t memory_bytes = uint64_t{1} << 20;   // per rank
  uint32_t shared_bytes = uint32_t{48} << 10;  // the most per block
  bool check_races = true;       // report accesses that the memory model leaves unordered
  bool stale_reads = true;       // let unordered loads return old values
  bool survive_traps = false;    // a trap ends its rank alone; the run still ends as "trap"
  bool expire_deadlines = true;  // where only time can help, let it pass: kernels' deadlines expire
  uint32_t max_leaps = 2;        // of time, of about 18 minutes each, before it is a deadlock
  uint64_t clock_skew_ns = 0;    // kernels' clocks differ, and step back, by less than this
  uint64_t max_steps = 200'000'000;  // primitives before it is called a livelock; below 2^31
};

struct LaunchShape {
  uint32_t blocks = 1;
  uint32_t threads = 32;      // per block, a multiple of 32
  uint32_t shared_bytes = 0;  // dynamic shared memory per block
};

// How a run ended.
struct Report {
  // Empty if all went well, else one of: "race", "uninitialized", "address", "misuse", "barrier",
  // "collective", "deadlock", "livelock", "exit", "trap", "wrong result".
  std::string kind;
  std::string what;  // who, where in the source, which address; several lines
  uint64_t seed = 0;
  std::string profile;    // how this seed misbehaves
  uint64_t steps = 0;     // primitives
  uint64_t switches = 0;  // of fibers
  uint32_t leaps = 0;     // of time

  bool ok() const { return kind.empty(); }
  // All of it, for a test's failure message.
  std::string text() const;
};

struct Engine;

// Addresses are of the simulated machine: not to be dereferenced, but to be given to kernels.
// Its methods are called by the test, and by checks and host calls while run() is under way.
class Machine {
 public:
  explicit Machine(const Config& config);
  ~Machine();
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  // Forgets all memory, ranges, names and queued work; all that is random follows from `seed`.
  void reset(uint64_t seed);

  // The start of the rank's memory, memory_bytes long, aligned to 4096; all of it uninitialized.
  std::byte* memory(uint32_t rank) const;

  // Lets other ranks access [address, address + bytes) of the rank's memory.
  void share(uint32_t rank, const void* address, uint64_t bytes);

  // Lets the network read and write [address, address + bytes) of the rank's memory.
  void register_for_network(uint32_t rank, const void* address, uint64_t bytes);

  // Reports call addresses in the range by this name.
  void name_region(uint32_t rank, const void* address, uint64_t bytes, std::string name);

  // Accesses of the host to the rank's own memory. Before and after run() they are ordered with
  // everything; in a check or host call, after all that its stream did before. After a run that
  // failed, read() returns the newest stores. Outside a run, what nothing has stored reads as the
  // poison 0xfff0dead; in a check it is an error.
  void write(uint32_t rank, void* address, const void* data, uint64_t bytes);
  void read(uint32_t rank, const void* address, void* data, uint64_t bytes);
  void fill(uint32_t rank, void* address, uint8_t value, uint64_t bytes);
  // Makes memory uninitialized again: a load before the next store is an error.
  void poison(uint32_t rank, void* address, uint64_t bytes);

  // Append to a stream of the rank. Two streams are not ordered with each other, but for what a
  // check or host call of one appends to another: it comes after that. A check returns an error
  // text, or "".
  void launch(uint32_t rank, uint32_t stream, LaunchShape shape, std::function<void()> kernel);
  void check(uint32_t rank, uint32_t stream, std::function<std::string()> check);
  void host_call(uint32_t rank, uint32_t stream, std::function<void()> call);

  // The rank is about to be killed, as a process is: all that it runs ends just before it stores to
  // another rank's memory for the `stores`-th time from now on, counted from 0.
  void kill_before(uint32_t rank, uint64_t stores);
  // Whether it has been.
  bool was_killed(uint32_t rank) const;

  // Runs until all streams are empty, or something is wrong. It can be called again after more
  // work is appended, if all went well; after an error only read() and reset() may follow.
  Report run();

 private:
  std::unique_ptr<Engine> engine_;
};

}  // namespace jax_ep::sim

#endif  // JAX_EP_CSRC_SIM_MACHINE_H_
