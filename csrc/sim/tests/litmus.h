// SPDX-License-Identifier: Apache-2.0
// What the simulator's own tests run on: three ranks of two blocks of two warps.
#ifndef JAX_EP_CSRC_SIM_TESTS_LITMUS_H_
#define JAX_EP_CSRC_SIM_TESTS_LITMUS_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "csrc/device/primitives.h"
#include "csrc/sim/machine.h"

namespace jax_ep::sim {

using dev::Ptr;
using dev::Scope;
using dev::u32;
using dev::u64;

inline constexpr u32 kWords = 64;  // of a rank's memory that are zero at the start, 16 bytes apart
inline constexpr u64 kLitmusBytes = 4096;

inline Config litmus_config() {
  Config config;
  config.num_ranks = 3;
  config.max_blocks = 2;
  config.max_threads = 64;
  config.memory_bytes = 2 * kLitmusBytes;  // the second half is neither shared nor initialized
  config.shared_bytes = 1024;
  config.granule_bytes = 1;
  config.max_steps = 100'000;
  return config;
}

// The thread that runs a litmus kernel.
struct Who {
  u32 rank = self().rank, block = self().block, thread = self().thread;
  bool is(u32 r, u32 t = 0, u32 b = 0) const { return rank == r && thread == t && block == b; }
};

using LitmusKernel = std::function<void(Who)>;

struct LitmusShared {
  alignas(128) dev::Shared<u32> words[16];
  alignas(8) dev::Mbar mbar;
};

inline Ptr<u32> first_word(LitmusShared& shared) { return shared.words[0].address(); }

// Runs kernels one after the other on every rank.
class Litmus {
 public:
  explicit Litmus(const Config& config) : machine_(config), config_(config) {}

  Machine& machine() { return machine_; }

  // Word i of a rank's memory; 16 bytes apart.
  Ptr<u32> word(u32 rank, u32 i) {
    return Ptr<u32>{reinterpret_cast<u32*>(machine_.memory(rank))} + 4 * i;
  }

  void prepare(uint64_t seed) {
    machine_.reset(seed);
    for (u32 r = 0; r < config_.num_ranks; ++r) {
      machine_.share(r, machine_.memory(r), kLitmusBytes);
      machine_.register_for_network(r, machine_.memory(r), kLitmusBytes);
      machine_.fill(r, machine_.memory(r), 0, 16 * kWords);
    }
  }

  Report run(uint64_t seed, const std::vector<LitmusKernel>& kernels) {
    prepare(seed);
    const LaunchShape shape{config_.max_blocks, config_.max_threads, config_.shared_bytes};
    for (const LitmusKernel& kernel : kernels) {
      for (u32 r = 0; r < config_.num_ranks; ++r) {
        machine_.launch(r, 0, shape, [&kernel] { kernel(Who()); });
      }
    }
    return machine_.run();
  }

 private:
  Machine machine_;
  Config config_;
};

template <Scope kScope = Scope::kSys>
void wait_acquire(Ptr<u32> flag, u32 value) {
  while (dev::ld_acquire<kScope>(flag) != value) dev::spin_pause("flag");
}
template <Scope kScope = Scope::kSys>
void wait_relaxed(Ptr<u32> flag, u32 value) {
  while (dev::ld_relaxed<kScope>(flag) != value) dev::spin_pause("flag");
}

}  // namespace jax_ep::sim

#endif  // JAX_EP_CSRC_SIM_TESTS_LITMUS_H_
