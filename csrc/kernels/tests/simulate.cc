// SPDX-License-Identifier: Apache-2.0
// Runs random scenarios on the simulator.
//   simulate [--seeds FIRST:LAST] [--seconds S] [--ranks R] [--groups N] [--low-latency]
//            [--masks] [--internode | --by-counts] [--bfloat16] [--no-races] [--verbose]
//   simulate --mishaps [--seeds FIRST:LAST]     scenarios in which something goes wrong
//   simulate --absences [--seeds FIRST:LAST]    ranks that do not come, and are left out
// Prints the first failure and exits with 1; the seed reproduces it.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "csrc/testing/absences.h"
#include "csrc/testing/mishaps.h"
#include "csrc/testing/run_scenario.h"

namespace {

struct Arguments {
  uint64_t first = 1;
  uint64_t last = 50;
  double seconds = 1e9;
  bool races = true;
  bool verbose = false;
  bool mishaps = false;
  bool absences = false;
  jax_ep::ScenarioLimits limits;
};

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    const bool has_value = i + 1 < argc;
    if (flag == "--seeds" && has_value) {
      char* rest = nullptr;
      arguments.first = std::strtoull(argv[++i], &rest, 10);
      arguments.last = *rest == ':' ? std::strtoull(rest + 1, nullptr, 10) : arguments.first;
    } else if (flag == "--seconds" && has_value) {
      arguments.seconds = std::atof(argv[++i]);
      arguments.last = ~uint64_t{0};
    } else if (flag == "--ranks" && has_value) {
      arguments.limits.num_ranks = {std::atoi(argv[++i])};
    } else if (flag == "--groups" && has_value) {
      arguments.limits.groups = std::atoi(argv[++i]);
    } else if (flag == "--low-latency") {
      arguments.limits.low_latency = true;
    } else if (flag == "--masks") {
      arguments.limits.masks = true;
    } else if (flag == "--internode") {
      arguments.limits.internode = true;
    } else if (flag == "--by-counts") {
      arguments.limits.internode = arguments.limits.plans_by_counts = true;
    } else if (flag == "--bfloat16") {
      arguments.limits.dtypes = {jax_ep::DType::kBFloat16};
    } else if (flag == "--no-races") {
      arguments.races = false;
    } else if (flag == "--mishaps") {
      arguments.mishaps = true;
    } else if (flag == "--absences") {
      arguments.absences = true;
    } else if (flag == "--verbose") {
      arguments.verbose = true;
    } else {
      std::fprintf(stderr, "simulate: bad argument %s\n", argv[i]);
      std::exit(2);
    }
  }
  if (arguments.limits.masks && arguments.limits.internode) {
    std::fprintf(stderr, "simulate: --masks goes with neither --internode nor --by-counts\n");
    std::exit(2);
  }
  return arguments;
}

int run_mishaps(const Arguments& arguments) {
  for (uint64_t seed = arguments.first; seed <= arguments.last; ++seed) {
    for (const jax_ep::Scenario& scenario : jax_ep::all_mishaps(seed)) {
      const std::string wrong = verdict_on(scenario, run_scenario(scenario, seed));
      if (wrong.empty()) continue;
      std::printf("seed %lu failed: %s\n%s\n", seed, describe(scenario).c_str(), wrong.c_str());
      return 1;
    }
  }
  return 0;
}

int run_absences(const Arguments& arguments) {
  for (uint64_t seed = arguments.first; seed <= arguments.last; ++seed) {
    const std::string wrong = jax_ep::run_stories(seed);
    if (wrong.empty()) continue;
    std::printf("seed %lu failed:\n%s\n", seed, wrong.c_str());
    return 1;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const Arguments arguments = parse(argc, argv);
  if (arguments.mishaps) return run_mishaps(arguments);
  if (arguments.absences) return run_absences(arguments);
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [start] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  uint64_t runs = 0;
  uint64_t steps = 0;
  uint64_t seed = arguments.first;
  for (; seed <= arguments.last && elapsed() < arguments.seconds; ++seed) {
    jax_ep::Scenario scenario = jax_ep::random_scenario(seed, arguments.limits);
    scenario.check_races = arguments.races;
    if (arguments.verbose) std::printf("seed %lu: %s\n", seed, describe(scenario).c_str());
    const jax_ep::Outcome outcome = jax_ep::run_scenario(scenario, seed);
    ++runs;
    steps += outcome.report.steps;
    if (outcome.report.ok()) continue;
    std::printf("seed %lu failed: %s\n%s\n",
                seed,
                describe(scenario).c_str(),
                outcome.report.text().c_str());
    return 1;
  }
  std::printf("%lu schedules passed (seeds %lu to %lu): %.1f schedules/s, %.2f million steps/s\n",
              runs,
              arguments.first,
              seed - 1,
              static_cast<double>(runs) / elapsed(),
              static_cast<double>(steps) / 1e6 / elapsed());
  return 0;
}
