// SPDX-License-Identifier: Apache-2.0
// The kernels between domains over NVSHMEM's own network, on one GPU: a process for each rank, and
// for each domain a host, which is one in name alone. Runs the simulator's random scenarios, those
// of a topology in one job, and compares with the CPU backend bit by bit.
//   virtual_nodes LIBRARY FIRST LAST [low-latency] [by-counts] [nodes=NxG] [seconds=S] [one-host]
// LIBRARY is libjax_ep_rdma.so. low-latency: most calls by the low-latency kernels. by-counts:
// plans exchange counts. nodes: of the scenarios FIRST to LAST only those of N domains of G ranks.
// seconds: a job's, after which it is ended. one-host: no other names, so that NVSHMEM maps all
// memory. Hosts with other names take the rights of root.
// What NVSHMEM needs besides, and why: testing/ep_launch/emulated_hosts.py.
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/core/topology.h"
#include "csrc/rdma/tests/rank_process.h"
#include "csrc/testing/scenario.h"

namespace jax_ep {
namespace {

using Clock = std::chrono::steady_clock;

struct Options {
  std::string library;
  uint64_t first = 1;
  uint64_t last = 40;
  Topology only{0, 0};  // zeros: all there are
  int seconds = 120;
  bool low_latency = false;
  bool by_counts = false;
  bool one_host = false;
};

Scenario scenario_of(const Options& options, uint64_t seed) {
  return random_scenario(seed,
                         {.max_tokens = seed % 4 == 0 ? 300 : 20,
                          .steps = 4,
                          .low_latency = options.low_latency,
                          .internode = true,
                          .plans_by_counts = options.by_counts});
}

[[noreturn]] void run_rank(const Options& options,
                           const JobOptions& job,
                           const std::vector<uint64_t>& seeds,
                           Shared& shared,
                           int32_t rank) {
  RankProcess process(job, shared, rank);
  process.join();
  for (const uint64_t seed : seeds) process.run(seed, scenario_of(options, seed));
  process.leave();
  std::fflush(stdout);
  _exit(0);
}

// Whether all processes end well, in time. None is left.
bool wait_for(const std::vector<pid_t>& processes, Shared& shared, int seconds) {
  const auto end = Clock::now() + std::chrono::seconds(seconds);
  bool good = true;
  for (size_t rank = 0; rank < processes.size(); ++rank) {
    int status = 0;
    while (waitpid(processes[rank], &status, WNOHANG) == 0) {
      if (Clock::now() > end) {
        std::printf("rank %zu: ended after %d s\n", rank, seconds);
        kill(processes[rank], SIGKILL);
        waitpid(processes[rank], &status, 0);
        break;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    if (WIFSIGNALED(status)) std::printf("rank %zu: signal %d\n", rank, WTERMSIG(status));
    if (WIFEXITED(status) && status != 0) {
      std::printf("rank %zu: exit status %d\n", rank, WEXITSTATUS(status));
    }
    if (status != 0) {
      shared.failed = true;
      good = false;
    }
  }
  return good;
}

bool run_job(const Options& options, const Topology& topology, const std::vector<uint64_t>& seeds) {
  void* const memory =
      mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return false;
  auto* const shared = new (memory) Shared{};
  const JobOptions job{options.library, topology, options.one_host};
  const auto begin = Clock::now();
  const pid_t parent = getpid();
  std::vector<pid_t> processes;
  for (int32_t rank = 0; rank < topology.num_ranks(); ++rank) {
    const pid_t child = fork();
    if (child == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (getppid() == parent) run_rank(options, job, seeds, *shared, rank);
      _exit(1);
    }
    if (child < 0) {
      std::printf("rank %d: no process: %s\n", rank, std::strerror(errno));
      shared->failed = true;
      break;
    }
    processes.push_back(child);
  }
  const bool good = wait_for(processes, *shared, options.seconds) && !shared->failed;
  munmap(memory, sizeof(Shared));
  const std::chrono::duration<double> took = Clock::now() - begin;
  std::printf("%d x %d ranks%s: %zu scenarios %s, %.1f s\n",
              topology.num_scaleout_ranks,
              topology.num_scaleup_ranks,
              options.one_host ? " on one host" : "",
              seeds.size(),
              good ? "passed" : "FAILED",
              took.count());
  std::fflush(stdout);
  return good;
}

bool parse(int argc, char** argv, Options& options) {
  if (argc < 4) return false;
  options.library = argv[1];
  options.first = std::strtoull(argv[2], nullptr, 10);
  options.last = std::strtoull(argv[3], nullptr, 10);
  for (int i = 4; i < argc; ++i) {
    const std::string word = argv[i];
    int domains = 0;
    int ranks = 0;
    if (std::sscanf(argv[i], "nodes=%dx%d", &domains, &ranks) == 2) {
      options.only = {.num_scaleup_ranks = ranks, .num_scaleout_ranks = domains};
    } else if (word == "low-latency") {
      options.low_latency = true;
    } else if (word == "by-counts") {
      options.by_counts = true;
    } else if (word == "one-host") {
      options.one_host = true;
    } else if (std::sscanf(argv[i], "seconds=%d", &options.seconds) != 1) {
      return false;
    }
  }
  return options.first <= options.last;
}

// Those of a topology are one job.
int run(const Options& options) {
  std::map<std::pair<int32_t, int32_t>, std::vector<uint64_t>> jobs;
  for (uint64_t seed = options.first; seed <= options.last; ++seed) {
    const Scenario scenario = scenario_of(options, seed);
    const Topology topology = network_shape(scenario.groups[0]).topology;
    const bool is_other = topology.num_scaleup_ranks != options.only.num_scaleup_ranks ||
                          topology.num_scaleout_ranks != options.only.num_scaleout_ranks;
    if (options.only.num_ranks() > 0 && is_other) continue;
    // CUDA has no heap for rows without elements.
    if (scenario.groups[0].steps[0].options.hidden == 0) continue;
    jobs[{topology.num_scaleout_ranks, topology.num_scaleup_ranks}].push_back(seed);
  }
  size_t num_failed = 0;
  for (const auto& [shape, seeds] : jobs) {
    const Topology topology{.num_scaleup_ranks = shape.second, .num_scaleout_ranks = shape.first};
    if (!run_job(options, topology, seeds)) ++num_failed;
  }
  if (jobs.empty()) std::printf("no scenario has these nodes\n");
  if (jobs.empty() || num_failed > 0) return 1;
  std::printf("scenarios %lu to %lu passed\n", options.first, options.last);
  return 0;
}

}  // namespace
}  // namespace jax_ep

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);
  jax_ep::Options options;
  if (!jax_ep::parse(argc, argv, options)) {
    std::printf(
        "usage: virtual_nodes LIBRARY FIRST LAST [low-latency] [by-counts] [nodes=NxG] "
        "[seconds=S] [one-host]\n");
    return 2;
  }
  return jax_ep::run(options);
}
