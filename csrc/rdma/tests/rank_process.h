// SPDX-License-Identifier: Apache-2.0
// A rank's process of virtual_nodes.
#ifndef JAX_EP_CSRC_RDMA_TESTS_RANK_PROCESS_H_
#define JAX_EP_CSRC_RDMA_TESTS_RANK_PROCESS_H_

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "csrc/core/error_record.h"
#include "csrc/core/topology.h"
#include "csrc/launch/rdma_library.h"
#include "csrc/runtime/transport/rdma.h"
#include "csrc/runtime/transport/symmetric_heap.h"
#include "csrc/testing/rank_arrays.h"
#include "csrc/testing/scenario.h"

namespace jax_ep {

// What a process does of the command line.
struct JobOptions {
  std::string library;
  Topology topology;
  bool one_host = false;  // no host has a name of its own
};

// What the processes of a job share.
struct Shared {
  std::atomic<int32_t> arrived[kMaxRanks];  // by rank, how often
  std::atomic<bool> failed;
  std::byte id[kMaxRdmaIdBytes];
  HeapHandle handles[kMaxRanks];
};
static_assert(std::atomic<int32_t>::is_always_lock_free, "processes share them");

struct DeviceFree {
  void operator()(std::byte* memory) const { cudaFree(memory); }
};
using DeviceArray = std::unique_ptr<std::byte, DeviceFree>;

// What a rank has for the steps of one scenario.
struct RankOfScenario {
  SymmetricHeap heap;
  std::vector<PeerMapping> neighbors;
  RdmaHeap network_heap;
  RankView view{};
  RdmaNetwork network{};
};

class RankProcess {
 public:
  RankProcess(const JobOptions& options, Shared& shared, int32_t rank)
      : options_(options), topology_(options.topology), shared_(shared), rank_(rank) {}

  // On the host of its domain, in NVSHMEM's job.
  void join();
  void run(uint64_t seed, const Scenario& scenario);
  // One that left early would break what others still do.
  void leave();

 private:
  [[noreturn]] void fail(const std::string& what) const;
  void check(cudaError_t error, const char* what) const;
  void check(const Status& status) const;
  void meet();
  [[nodiscard]] DeviceArray allocate(size_t bytes) const;
  void open(const GroupScenario& group, RankOfScenario& mine);
  void close(RankOfScenario& mine);
  void check_mapped(const RankOfScenario& mine) const;
  void set_view(RankOfScenario& mine, int32_t chunk_target) const;
  [[nodiscard]] std::string run_step(const ScenarioStep& step,
                                     uint32_t blocks,
                                     const RankOfScenario& mine);
  void synchronize() const;

  class Memory;

  const JobOptions& options_;
  const Topology& topology_;
  Shared& shared_;
  const int32_t rank_;
  int32_t meetings_ = 0;
  int device_ = 0;
  cudaStream_t stream_ = nullptr;
  DeviceArray control_;
  ErrorRecord* error_ = nullptr;    // pinned
  uint64_t* long_waits_ = nullptr;  // [kMaxRanks], likewise
  uint64_t* phases_ = nullptr;      // [kNumChannels], likewise
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_RDMA_TESTS_RANK_PROCESS_H_
