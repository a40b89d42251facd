// SPDX-License-Identifier: Apache-2.0
// An EP group on the simulator: heaps, views and launches.
#ifndef JAX_EP_CSRC_TESTING_SIMULATED_GROUP_H_
#define JAX_EP_CSRC_TESTING_SIMULATED_GROUP_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "csrc/core/heap_layout.h"
#include "csrc/core/kernel_params.h"
#include "csrc/core/low_latency_fit.h"
#include "csrc/sim/machine.h"
#include "csrc/testing/rank_arrays.h"
#include "csrc/testing/simulated_internode.h"

namespace jax_ep {

// A rank's memory on the machine.
class SimulatedMemory : public DeviceMemory {
 public:
  SimulatedMemory(sim::Machine& machine, int32_t rank)
      : machine_(machine), rank_(static_cast<uint32_t>(rank)) {}
  void write(void* to, const void* from, size_t bytes) override {
    machine_.write(rank_, to, from, bytes);
  }
  void read(void* to, const void* from, size_t bytes) override {
    machine_.read(rank_, from, to, bytes);
  }
  void fill(void* to, std::byte with, size_t bytes) override {
    const std::vector<std::byte> from(bytes, with);
    if (bytes > 0) machine_.write(rank_, to, from.data(), bytes);
  }

 private:
  sim::Machine& machine_;
  uint32_t rank_;
};

// The machine's granule for rows of `hidden` elements: the smallest access that they need, for
// kernels move rows that are no multiple of 16 bytes element by element.
uint32_t granule_bytes(int64_t hidden, DType dtype, Wire wire);

struct SimulatedLaunch {
  uint32_t stream = 0;
  uint32_t blocks = 1;
  uint32_t tail_blocks = 0;  // of a dispatch, also with its plan
  uint32_t call_site = 0;    // of the call in the program
};

class SimulatedGroup {
 public:
  // Threads of the blocks that it launches, and the most shared memory of one.
  static constexpr uint32_t kMaxThreads = 96;
  static uint32_t max_shared_bytes();
  // Whether the call is a low-latency one.
  template <typename Params>
  static bool is_low_latency(const Params& params) {
    const RankView& view = params.view;
    const bool spans_domains = view.num_neighbors < view.num_ranks;
    if constexpr (requires { fits_low_latency(view.layout, params.op, spans_domains); }) {
      return fits_low_latency(view.layout, params.op, spans_domains);
    } else {
      return false;
    }
  }
  // Bytes that a group takes of every rank's memory: a multiple of 256, so that arrays may follow.
  static uint64_t memory_bytes(const HeapShape& shape);

  // Lays the group's heaps at `offset` of every rank's memory, all zeros. `name` is for reports.
  // Where the shape has neighbors, other ranks' heaps are not mapped.
  SimulatedGroup(sim::Machine& machine,
                 const HeapShape& shape,
                 int32_t chunk_target,
                 uint64_t offset,
                 const std::string& name);

  // As after so many exchanges without tokens, which use no chunk's flag.
  void set_epoch(uint32_t epoch);

  // As after an exchange of which all packets are left.
  void fill_packets(uint32_t epoch);

  // As the host does when a group is closed.
  void close(int32_t rank);
  // As the host does, for a rank that is not to wait for these others, as bits.
  void give_up_on(int32_t rank, uint64_t ranks);
  // Zeros where rows, scalars and routing are staged, which kernels write before they read: for
  // programs that are wrong, and may read what nobody has sent.
  void fill_staging(int32_t rank);

  [[nodiscard]] RankView view(int32_t rank) const;
  // Of a group that goes on without who does not come.
  [[nodiscard]] RankView masking_view(int32_t rank) const;
  [[nodiscard]] ErrorRecord error(int32_t rank);
  // Of which epoch the rank was told last that a source has sent all; 0: of none.
  [[nodiscard]] uint32_t sent(int32_t rank, int32_t source);
  // Of a channel, as the rank counts its exchanges.
  [[nodiscard]] uint32_t epoch(int32_t rank, Channel channel);
  // Which of them all its peers have ended, as the rank's last kernel has seen.
  [[nodiscard]] uint32_t peers_ended(int32_t rank, Channel channel);
  // Has it seen all end this one, and none since.
  void set_peers_ended(int32_t rank, uint32_t epoch);
  // What the rank reported last of its waits for a peer; level 0: nothing.
  [[nodiscard]] LongWait long_wait(int32_t rank, int32_t peer);

  // Append a kernel to a rank's stream. Also those of csrc/testing/simulated_internode.h.
  void launch(const PlanParams& params, const SimulatedLaunch& launch);
  void launch(const DispatchParams& params, const SimulatedLaunch& launch);
  void launch(const CombineParams& params, const SimulatedLaunch& launch);
  void launch(const PlanDispatchParams& params, const SimulatedLaunch& launch);
  void launch(SimulatedInternodeParams<PlanOp> params, const SimulatedLaunch& launch);
  void launch(SimulatedInternodeParams<DispatchOp> params, const SimulatedLaunch& launch);
  void launch(SimulatedInternodeParams<CombineOp> params, const SimulatedLaunch& launch);
  void launch(SimulatedLowLatencyParams<PlanDispatchOp> params, const SimulatedLaunch& launch);
  void launch(SimulatedLowLatencyParams<CombineOp> params, const SimulatedLaunch& launch);
  // The same of simulated_wait.
  void launch_wait(int32_t rank, int32_t peer, uint32_t stream);

 private:
  [[nodiscard]] std::byte* heap(int32_t rank) const;
  [[nodiscard]] std::byte* words(int32_t rank) const;
  [[nodiscard]] uint32_t* control(int32_t rank, int32_t index) const;

  sim::Machine& machine_;
  HeapLayout layout_;
  int32_t num_ranks_;
  int32_t num_neighbors_;
  int32_t chunk_target_;
  uint64_t offset_;
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_TESTING_SIMULATED_GROUP_H_
