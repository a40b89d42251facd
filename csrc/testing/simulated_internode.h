// SPDX-License-Identifier: Apache-2.0
// The kernels between domains on the simulator, and the network heaps that they need.
#ifndef JAX_EP_CSRC_TESTING_SIMULATED_INTERNODE_H_
#define JAX_EP_CSRC_TESTING_SIMULATED_INTERNODE_H_

#include <cstdint>
#include <string>

#include "csrc/core/kernel_params.h"
#include "csrc/device/transport/simulated_transport.h"
#include "csrc/sim/machine.h"
#include "csrc/testing/simulated_kernel.h"

namespace jax_ep {

template <typename Op>
using SimulatedInternodeParams = InternodeParams<Op, dev::SimulatedTransport>;

SimulatedKernel simulated_internode_kernel(const SimulatedInternodeParams<PlanOp>& params);
SimulatedKernel simulated_internode_kernel(const SimulatedInternodeParams<DispatchOp>& params);
SimulatedKernel simulated_internode_kernel(const SimulatedInternodeParams<CombineOp>& params);

// The low-latency ones.
template <typename Op>
using SimulatedLowLatencyParams = InternodeLowLatencyParams<Op, dev::SimulatedTransport>;

SimulatedKernel simulated_internode_kernel(const SimulatedLowLatencyParams<PlanDispatchOp>& params);
SimulatedKernel simulated_internode_kernel(const SimulatedLowLatencyParams<CombineOp>& params);

// The network heaps of a group's ranks.
class SimulatedRails {
 public:
  // Bytes of every rank's memory.
  static uint64_t memory_bytes(const NetworkShape& shape);
  // Threads of the kernels' blocks, and the most shared memory of one.
  static constexpr uint32_t kMaxThreads = 160;
  static uint32_t max_shared_bytes();

  // Lays them at `offset` of every rank's memory: words are zeros. `name` is for reports.
  SimulatedRails(sim::Machine& machine,
                 const NetworkShape& shape,
                 uint64_t offset,
                 const std::string& name);

  // As after so many messages to each domain, and so many units of sums.
  void set_sequences(uint64_t messages, uint64_t units);

  // As after a low-latency exchange that has used all words of both banks.
  void fill_far_words(uint32_t epoch);

  // What a rank's kernel of a channel told its host last.
  [[nodiscard]] KernelPhase phase(int32_t rank, Channel channel) const;

  // The parameters of a rank's kernel, but for what they have with one domain, too.
  template <typename Op>
  [[nodiscard]] SimulatedInternodeParams<Op> params(const KernelParams<Op>& of_rank) const {
    const int32_t rank = of_rank.view.rank;
    return {of_rank, network(rank), transport(rank)};
  }
  template <typename Op>
  [[nodiscard]] SimulatedLowLatencyParams<Op> low_latency_params(
      const KernelParams<Op>& of_rank) const {
    const int32_t rank = of_rank.view.rank;
    return {of_rank, network(rank), transport(rank)};
  }

 private:
  [[nodiscard]] std::byte* heap(int32_t rank) const;
  // Behind the heap.
  [[nodiscard]] uint64_t* phases(int32_t rank) const;
  [[nodiscard]] NetworkView network(int32_t rank) const;
  [[nodiscard]] dev::SimulatedTransport transport(int32_t rank) const;
  void write_word(int32_t rank, NetworkRegion region, int64_t index, uint64_t value);

  sim::Machine& machine_;
  NetworkShape shape_;
  NetworkLayout layout_;
  uint64_t offset_;
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_TESTING_SIMULATED_INTERNODE_H_
