// SPDX-License-Identifier: Apache-2.0
// What the kernels' tests have in common: scenarios that must pass.
#ifndef JAX_EP_CSRC_KERNELS_TESTS_EXPECT_SCENARIOS_H_
#define JAX_EP_CSRC_KERNELS_TESTS_EXPECT_SCENARIOS_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "csrc/sim/fiber.h"
#include "csrc/testing/run_scenario.h"

namespace jax_ep {

// Of so many schedules of the same kind, those that are run. AddressSanitizer takes six times as
// long for each, and what it looks for depends on the code that runs and not on the schedule: with
// it every fourth is enough.
constexpr uint64_t schedules(uint64_t count) {
#ifdef JAX_EP_SIM_ASAN
  return (count + 3) / 4;
#else
  return count;
#endif
}

inline void expect_ok(const Scenario& scenario, uint64_t seed = 1) {
  const Outcome outcome = run_scenario(scenario, seed);
  ASSERT_TRUE(outcome.report.ok()) << describe(scenario) << "\n" << outcome.report.text();
}

struct Domains {
  int32_t count;
  int32_t ranks;  // of each
};

// Operations on the ranks of all domains, with room for all rows, and sums over the domains.
inline ScenarioStep step_between(const Domains& domains,
                                 EpShape shape,
                                 int64_t hidden,
                                 DType dtype,
                                 const std::vector<ScenarioOp>& ops) {
  shape.num_ranks = domains.count * domains.ranks;
  shape.recv_capacity = std::max<int64_t>(worst_case_capacity(shape), 1);
  ScenarioStep step;
  step.ops = ops;
  step.options.shape = shape;
  step.options.hidden = hidden;
  step.options.dtype = dtype;
  step.options.domain_size = domains.ranks;
  return step;
}

// Random scenarios of the seeds, each checked against the CPU backend after every operation.
inline void expect_scenarios(uint64_t first,
                             uint64_t last,
                             const ScenarioLimits& limits,
                             bool races = true) {
  for (uint64_t seed = first; seed < first + schedules(last - first + 1); ++seed) {
    Scenario scenario = random_scenario(seed, limits);
    scenario.check_races = races;
    expect_ok(scenario, seed);
    if (testing::Test::HasFatalFailure()) return;
  }
}

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_KERNELS_TESTS_EXPECT_SCENARIOS_H_
