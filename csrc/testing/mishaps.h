// SPDX-License-Identifier: Apache-2.0
// Scenarios in which something goes wrong, and what the kernels must make of them.
#ifndef JAX_EP_CSRC_TESTING_MISHAPS_H_
#define JAX_EP_CSRC_TESTING_MISHAPS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "csrc/testing/run_scenario.h"
#include "csrc/testing/scenario.h"

namespace jax_ep {

// An exchange of three ranks whose last operation is `last`, and meets with the mishap.
Scenario mishap_scenario(Mishap mishap, OpKind last, Layout layout, uint64_t seed);
// The same of low-latency calls: `last` is kPlanDispatch or kCombine.
Scenario low_latency_mishap_scenario(Mishap mishap, OpKind last, Layout layout, uint64_t seed);

// Each mishap with each operation and layout that it can happen to.
std::vector<Scenario> all_mishaps(uint64_t seed);

// What is wrong with how a scenario with a mishap ended; empty if it ended as it must.
std::string verdict_on(const Scenario& scenario, const Outcome& outcome);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_TESTING_MISHAPS_H_
