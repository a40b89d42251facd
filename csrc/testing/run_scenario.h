// SPDX-License-Identifier: Apache-2.0
// Runs a scenario on the simulator, and compares every result with the CPU backend's.
#ifndef JAX_EP_CSRC_TESTING_RUN_SCENARIO_H_
#define JAX_EP_CSRC_TESTING_RUN_SCENARIO_H_

#include <array>
#include <cstdint>
#include <vector>

#include "csrc/core/error_record.h"
#include "csrc/core/protocol.h"
#include "csrc/sim/machine.h"
#include "csrc/testing/scenario.h"

namespace jax_ep {

using ChannelPhases = std::array<KernelPhase, kNumChannels>;

struct Outcome {
  sim::Report report;
  std::vector<ErrorRecord> errors;  // of the first group, by rank
  // Of the first group, by rank, what it reported last of its waits for Scenario::rank.
  std::vector<LongWait> long_waits;
  // Of the first group, by rank, where there are several domains.
  std::vector<ChannelPhases> phases;
};
// The same scenario and seed give the same run.
Outcome run_scenario(const Scenario& scenario, uint64_t seed);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_TESTING_RUN_SCENARIO_H_
