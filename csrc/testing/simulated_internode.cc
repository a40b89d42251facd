// SPDX-License-Identifier: Apache-2.0
#include "csrc/testing/simulated_internode.h"

#include <algorithm>

namespace jax_ep {

namespace {

constexpr uint64_t kPhasesBytes = 256;  // of which few are used: what follows stays aligned
static_assert(8 * kNumChannels <= kPhasesBytes);

}  // namespace

uint64_t SimulatedRails::memory_bytes(const NetworkShape& shape) {
  return static_cast<uint64_t>(make_network_layout(shape).total_bytes) + kPhasesBytes;
}

uint32_t SimulatedRails::max_shared_bytes() {
  SimulatedInternodeParams<DispatchOp> products{};
  products.op.weighted = true;
  return std::max(
      {simulated_internode_kernel(SimulatedInternodeParams<PlanOp>{}).shared_bytes,
       simulated_internode_kernel(SimulatedInternodeParams<DispatchOp>{}).shared_bytes,
       simulated_internode_kernel(products).shared_bytes,
       simulated_internode_kernel(SimulatedInternodeParams<CombineOp>{}).shared_bytes,
       simulated_internode_kernel(SimulatedLowLatencyParams<PlanDispatchOp>{}).shared_bytes,
       simulated_internode_kernel(SimulatedLowLatencyParams<CombineOp>{}).shared_bytes});
}

SimulatedRails::SimulatedRails(sim::Machine& machine,
                               const NetworkShape& shape,
                               uint64_t offset,
                               const std::string& name)
    : machine_(machine), shape_(shape), layout_(make_network_layout(shape)), offset_(offset) {
  constexpr const char* kNames[kNumNetworkRegions] = {
      "delivered",        "credits",      "send_ring",
      "receive_ring",     "far_arrived",  "far_send",
      "far_receive",      "relayed",      "pulled",
      "gathered",         "freed",        "gather_ring",
      "rank_counts",      "runs",         "sequences",
      "delivered_sent",   "credits_sent", "parts_received",
      "far_arrived_sent", "tile_counts",  "all_counts",
      "run_places",       "run_starts"};
  for (int32_t rank = 0; rank < shape.topology.num_ranks(); ++rank) {
    const auto r = static_cast<uint32_t>(rank);
    for (int32_t i = 0; i < kNumNetworkRegions; ++i) {
      const auto region = static_cast<NetworkRegion>(i);
      std::byte* const at = heap(rank) + layout_.offset[i];
      const auto bytes = static_cast<uint64_t>(layout_.bytes[i]);
      machine_.name_region(r, at, bytes, name + "." + kNames[i]);
      const bool is_ring =
          region == NetworkRegion::kSendRing || region == NetworkRegion::kReceiveRing ||
          region == NetworkRegion::kFarSend || region == NetworkRegion::kFarReceive ||
          region == NetworkRegion::kGatherRing;
      const bool is_of_plan = region == NetworkRegion::kRankCounts ||
                              region == NetworkRegion::kRuns ||
                              region >= NetworkRegion::kTileCounts;
      // Rings, and what a plan counts, are written before they are read: they start uninitialized.
      if (!is_ring && !is_of_plan && bytes > 0) machine_.fill(r, at, 0, bytes);
    }
    machine_.name_region(
        r, reinterpret_cast<std::byte*>(phases(rank)), kPhasesBytes, name + ".phases");
    machine_.fill(r, reinterpret_cast<std::byte*>(phases(rank)), 0, kPhasesBytes);
    machine_.share(r, heap(rank), static_cast<uint64_t>(layout_.domain_bytes));
    machine_.register_for_network(r, heap(rank), static_cast<uint64_t>(layout_.network_bytes));
  }
}

void SimulatedRails::write_word(int32_t rank, NetworkRegion region, int64_t index, uint64_t value) {
  machine_.write(static_cast<uint32_t>(rank),
                 heap(rank) + layout_.at(region) + 8 * index,
                 &value,
                 sizeof value);
}

void SimulatedRails::set_sequences(uint64_t messages, uint64_t units) {
  const auto window = static_cast<uint64_t>(layout_.window);
  const auto gather = static_cast<uint64_t>(layout_.gather_units);
  // The last number below `end` in such a buffer.
  const auto last = [](uint64_t end, uint64_t buffer, uint64_t buffers) {
    return end - 1 - (end - 1 - buffer) % buffers;
  };
  const Topology& topology = shape_.topology;
  for (int32_t rank = 0; rank < topology.num_ranks(); ++rank) {
    write_word(rank, NetworkRegion::kSequences, 0, messages);
    write_word(rank, NetworkRegion::kSequences, 1, units);
    for (int32_t domain = 0; domain < topology.num_scaleout_ranks; ++domain) {
      for (uint64_t buffer = 0; buffer < window; ++buffer) {
        const uint64_t flag = arrival_flag(
            static_cast<uint32_t>(last(messages, buffer, window)), OpKind::kCombine, 0);
        const int64_t index = domain * static_cast<int64_t>(window) + static_cast<int64_t>(buffer);
        for (const NetworkRegion words : {NetworkRegion::kDelivered,
                                          NetworkRegion::kCredits,
                                          NetworkRegion::kDeliveredSent,
                                          NetworkRegion::kCreditsSent}) {
          write_word(rank, words, index, flag);
        }
      }
    }
    for (int32_t peer = 0; peer < topology.num_scaleup_ranks; ++peer) {
      for (uint64_t buffer = 0; buffer < gather; ++buffer) {
        const int64_t index = peer * static_cast<int64_t>(gather) + static_cast<int64_t>(buffer);
        const uint64_t freed = last(units, buffer, gather) + 1;
        write_word(rank, NetworkRegion::kFreed, index, freed);
        write_word(rank, NetworkRegion::kGathered, index, freed);
      }
    }
  }
}

void SimulatedRails::fill_far_words(uint32_t epoch) {
  const int64_t words = layout_.bytes[static_cast<int32_t>(NetworkRegion::kFarArrived)] / 8;
  for (int32_t rank = 0; rank < shape_.topology.num_ranks(); ++rank) {
    for (int64_t i = 0; i < words; ++i) {
      const uint64_t flag = arrival_flag(epoch, OpKind::kCombine, 0);
      write_word(rank, NetworkRegion::kFarArrived, i, flag);
      write_word(rank, NetworkRegion::kFarArrivedSent, i, flag);
    }
  }
}

std::byte* SimulatedRails::heap(int32_t rank) const {
  return machine_.memory(static_cast<uint32_t>(rank)) + offset_;
}

uint64_t* SimulatedRails::phases(int32_t rank) const {
  return reinterpret_cast<uint64_t*>(heap(rank) + layout_.total_bytes);
}

KernelPhase SimulatedRails::phase(int32_t rank, Channel channel) const {
  uint64_t word = 0;
  machine_.read(static_cast<uint32_t>(rank),
                phases(rank) + static_cast<int32_t>(channel),
                &word,
                sizeof word);
  return unpack_kernel_phase(word);
}

NetworkView SimulatedRails::network(int32_t rank) const {
  NetworkView view{};
  view.layout = layout_;
  view.topology = shape_.topology;
  const int32_t domain = shape_.topology.domain_of(rank);
  for (int32_t index = 0; index < shape_.topology.num_scaleup_ranks; ++index) {
    view.heap[index] = heap(shape_.topology.rank_at(domain, index));
  }
  view.phases = phases(rank);
  return view;
}

dev::SimulatedTransport SimulatedRails::transport(int32_t rank) const {
  dev::SimulatedTransport transport{};
  for (int32_t peer = 0; peer < shape_.topology.num_ranks(); ++peer) {
    transport.heap[peer] = heap(peer);
  }
  transport.rank = rank;
  return transport;
}

}  // namespace jax_ep
