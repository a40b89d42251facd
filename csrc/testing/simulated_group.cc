// SPDX-License-Identifier: Apache-2.0
#include "csrc/testing/simulated_group.h"

#include <algorithm>

#include "csrc/core/heap_description.h"
#include "csrc/device/primitives.h"
#include "csrc/testing/simulated_kernel.h"

namespace jax_ep {
namespace {

// What a rank has behind its heap: its own words, its error record, its long waits.
constexpr uint64_t kErrorAt = kControlBytes;
constexpr uint64_t kLongWaitsAt = kErrorAt + 256;
constexpr uint64_t kGivenUpAt = kLongWaitsAt + 8 * kMaxRanks;
constexpr uint64_t kWordsBytes = kGivenUpAt + 8;
constexpr uint64_t kAlignment = 256;  // of what lies behind a group, as of what CUDA allocates

template <typename Params>
SimulatedKernel kernel_of(const Params& params) {
  if constexpr (requires { simulated_low_latency_kernel(params); }) {
    if (SimulatedGroup::is_low_latency(params)) {
      return missing_ranks_of(params.op) == nullptr ? simulated_low_latency_kernel(params)
                                                    : simulated_masking_kernel(params);
    }
  }
  return simulated_kernel(params);
}

template <typename Params>
void append_internode(sim::Machine& machine, Params params, const SimulatedLaunch& launch) {
  params.call_tag = call_tag_of(params.op, launch.call_site);
  params.blocks = {.first = 0, .num_main = static_cast<int32_t>(launch.blocks), .num_tail = 0};
  SimulatedKernel kernel = simulated_internode_kernel(params);
  machine.launch(
      static_cast<uint32_t>(params.view.rank),
      launch.stream,
      {.blocks = launch.blocks, .threads = kernel.threads, .shared_bytes = kernel.shared_bytes},
      std::move(kernel.body));
}

template <typename Params>
void append(sim::Machine& machine, Params params, const SimulatedLaunch& launch) {
  params.call_tag = call_tag_of(params.op, launch.call_site);
  const bool dispatches =
      params.op.kKind == OpKind::kDispatch || params.op.kKind == OpKind::kPlanDispatch;
  const bool has_tail = dispatches && !SimulatedGroup::is_low_latency(params);
  params.blocks = {.first = 0,
                   .num_main = static_cast<int32_t>(launch.blocks),
                   .num_tail = has_tail ? static_cast<int32_t>(launch.tail_blocks) : 0};
  // Both launches as one: blocks of the tail may begin at any time.
  const auto blocks = static_cast<uint32_t>(params.blocks.num_main + params.blocks.num_tail);
  SimulatedKernel kernel = kernel_of(params);
  machine.launch(static_cast<uint32_t>(params.view.rank),
                 launch.stream,
                 {.blocks = blocks, .threads = kernel.threads, .shared_bytes = kernel.shared_bytes},
                 std::move(kernel.body));
}

}  // namespace

uint32_t granule_bytes(int64_t hidden, DType dtype, Wire wire) {
  const int64_t element = wire == Wire::kSame ? size_bytes(dtype) : 1;
  return hidden * element % 16 == 0 ? 4 : static_cast<uint32_t>(element);
}

uint32_t SimulatedGroup::max_shared_bytes() {
  DispatchParams products{};
  products.op.weighted = true;
  return std::max({simulated_kernel(PlanParams{}).shared_bytes,
                   simulated_kernel(DispatchParams{}).shared_bytes,
                   simulated_kernel(products).shared_bytes,
                   simulated_kernel(CombineParams{}).shared_bytes,
                   simulated_kernel(PlanDispatchParams{}).shared_bytes,
                   simulated_low_latency_kernel(PlanDispatchParams{}).shared_bytes,
                   simulated_low_latency_kernel(CombineParams{}).shared_bytes});
}

uint64_t SimulatedGroup::memory_bytes(const HeapShape& shape) {
  const uint64_t bytes = static_cast<uint64_t>(make_heap_layout(shape).total_bytes) + kWordsBytes;
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

SimulatedGroup::SimulatedGroup(sim::Machine& machine,
                               const HeapShape& shape,
                               int32_t chunk_target,
                               uint64_t offset,
                               const std::string& name)
    : machine_(machine),
      layout_(make_heap_layout(shape)),
      num_ranks_(shape.num_ranks),
      num_neighbors_(shape.num_neighbors > 0 ? shape.num_neighbors : shape.num_ranks),
      chunk_target_(chunk_target),
      offset_(offset) {
  for (int32_t rank = 0; rank < num_ranks_; ++rank) {
    const auto r = static_cast<uint32_t>(rank);
    // Rows, scalars and scales are written before they are read: they start uninitialized.
    for (const Region region : {Region::kAcknowledged,
                                Region::kAborted,
                                Region::kSent,
                                Region::kArrived,
                                Region::kExpertPackets,
                                Region::kScalarPackets,
                                Region::kRowPackets}) {
      machine_.fill(r,
                    heap(rank) + layout_.at(region),
                    0,
                    static_cast<uint64_t>(layout_.bytes[static_cast<int32_t>(region)]));
    }
    machine_.fill(r, words(rank), 0, kWordsBytes);
    machine_.name_region(r, words(rank), kControlBytes, name + ".control");
    machine_.share(r, heap(rank), static_cast<uint64_t>(layout_.peer_bytes));
    for (const RegionInfo& region : heap_regions(shape)) {
      machine_.name_region(r,
                           heap(rank) + region.offset,
                           static_cast<uint64_t>(region.bytes),
                           name + "." + region.name);
    }
  }
}

void SimulatedGroup::set_epoch(uint32_t epoch) {
  for (int32_t rank = 0; rank < num_ranks_; ++rank) {
    const auto r = static_cast<uint32_t>(rank);
    for (const Channel channel : {Channel::kHighThroughput, Channel::kLowLatency}) {
      machine_.write(
          r, control(rank, control_index(channel, ChannelControl::kEpoch)), &epoch, sizeof epoch);
    }
    set_peers_ended(rank, epoch);
    const int32_t num_words = num_ranks_ * static_cast<int32_t>(kNumChannels);
    for (int32_t i = 0; i < num_words; ++i) {
      machine_.write(
          r, heap(rank) + layout_.at(Region::kAcknowledged) + 4 * i, &epoch, sizeof epoch);
    }
  }
}

void SimulatedGroup::set_peers_ended(int32_t rank, uint32_t epoch) {
  for (const ChannelControl seen : {ChannelControl::kPeersEnded, ChannelControl::kPeersEndedSeen}) {
    const int32_t index = control_index(Channel::kLowLatency, seen);
    machine_.write(static_cast<uint32_t>(rank), control(rank, index), &epoch, sizeof epoch);
  }
}

void SimulatedGroup::fill_packets(uint32_t epoch) {
  const dev::Packet packet{{1, 2, 3}, packet_flag(epoch)};
  for (int32_t rank = 0; rank < num_ranks_; ++rank) {
    for (const Region region :
         {Region::kExpertPackets, Region::kScalarPackets, Region::kRowPackets}) {
      const int64_t bytes = layout_.bytes[static_cast<int32_t>(region)];
      for (int64_t at = 0; at < bytes; at += kPacketBytes) {
        machine_.write(static_cast<uint32_t>(rank),
                       heap(rank) + layout_.at(region) + at,
                       &packet,
                       sizeof packet);
      }
    }
  }
}

void SimulatedGroup::close(int32_t rank) {
  const uint32_t closed = 1;
  machine_.write(static_cast<uint32_t>(rank),
                 control(rank, control_index(Control::kClosed)),
                 &closed,
                 sizeof closed);
}

void SimulatedGroup::give_up_on(int32_t rank, uint64_t ranks) {
  machine_.write(static_cast<uint32_t>(rank), words(rank) + kGivenUpAt, &ranks, sizeof ranks);
}

void SimulatedGroup::fill_staging(int32_t rank) {
  for (const Region region : {Region::kRouting, Region::kScalars, Region::kRows, Region::kCounts}) {
    machine_.fill(static_cast<uint32_t>(rank),
                  heap(rank) + layout_.at(region),
                  0,
                  static_cast<uint64_t>(layout_.bytes[static_cast<int32_t>(region)]));
  }
}

std::byte* SimulatedGroup::words(int32_t rank) const { return heap(rank) + layout_.total_bytes; }

uint32_t* SimulatedGroup::control(int32_t rank, int32_t index) const {
  return reinterpret_cast<uint32_t*>(words(rank)) + index;
}

std::byte* SimulatedGroup::heap(int32_t rank) const {
  return machine_.memory(static_cast<uint32_t>(rank)) + offset_;
}

RankView SimulatedGroup::view(int32_t rank) const {
  RankView view{};
  view.layout = layout_;
  view.first_neighbor = rank / num_neighbors_ * num_neighbors_;
  view.num_neighbors = num_neighbors_;
  for (int32_t i = 0; i < num_neighbors_; ++i) {
    view.heap[view.first_neighbor + i] = heap(view.first_neighbor + i);
  }
  view.control = control(rank, 0);
  view.error = reinterpret_cast<ErrorRecord*>(words(rank) + kErrorAt);
  view.long_waits = reinterpret_cast<uint64_t*>(words(rank) + kLongWaitsAt);
  // Expires when only time can help: time then leaps by 2^40, which is less than two of these.
  view.timeout_ns = uint64_t{3} << 38;
  view.report_ns = uint64_t{1} << 38;
  view.rank = rank;
  view.num_ranks = num_ranks_;
  view.chunk_target = chunk_target_;
  return view;
}

RankView SimulatedGroup::masking_view(int32_t rank) const {
  RankView view = this->view(rank);
  view.given_up = reinterpret_cast<uint64_t*>(words(rank) + kGivenUpAt);
  return view;
}

ErrorRecord SimulatedGroup::error(int32_t rank) {
  ErrorRecord record{};
  machine_.read(static_cast<uint32_t>(rank), view(rank).error, &record, sizeof record);
  return record;
}

uint32_t SimulatedGroup::sent(int32_t rank, int32_t source) {
  uint32_t epoch = 0;
  const std::byte* const word = heap(rank) + layout_.at(Region::kSent) + 4 * source;
  machine_.read(static_cast<uint32_t>(rank), word, &epoch, sizeof epoch);
  return epoch;
}

uint32_t SimulatedGroup::epoch(int32_t rank, Channel channel) {
  uint32_t epoch = 0;
  machine_.read(static_cast<uint32_t>(rank),
                control(rank, control_index(channel, ChannelControl::kEpoch)),
                &epoch,
                sizeof epoch);
  return epoch;
}

uint32_t SimulatedGroup::peers_ended(int32_t rank, Channel channel) {
  uint32_t epoch = 0;
  machine_.read(static_cast<uint32_t>(rank),
                control(rank, control_index(channel, ChannelControl::kPeersEndedSeen)),
                &epoch,
                sizeof epoch);
  return epoch;
}

LongWait SimulatedGroup::long_wait(int32_t rank, int32_t peer) {
  uint64_t word = 0;
  machine_.read(static_cast<uint32_t>(rank), view(rank).long_waits + peer, &word, sizeof word);
  return unpack_long_wait(word);
}

void SimulatedGroup::launch(const PlanParams& params, const SimulatedLaunch& launch) {
  append(machine_, params, launch);
}
void SimulatedGroup::launch(const DispatchParams& params, const SimulatedLaunch& launch) {
  append(machine_, params, launch);
}
void SimulatedGroup::launch(const CombineParams& params, const SimulatedLaunch& launch) {
  append(machine_, params, launch);
}
void SimulatedGroup::launch(const PlanDispatchParams& params, const SimulatedLaunch& launch) {
  append(machine_, params, launch);
}

void SimulatedGroup::launch(SimulatedInternodeParams<PlanOp> params,
                            const SimulatedLaunch& launch) {
  append_internode(machine_, params, launch);
}
void SimulatedGroup::launch(SimulatedInternodeParams<DispatchOp> params,
                            const SimulatedLaunch& launch) {
  append_internode(machine_, params, launch);
}
void SimulatedGroup::launch(SimulatedInternodeParams<CombineOp> params,
                            const SimulatedLaunch& launch) {
  append_internode(machine_, params, launch);
}

void SimulatedGroup::launch(SimulatedLowLatencyParams<PlanDispatchOp> params,
                            const SimulatedLaunch& launch) {
  append_internode(machine_, params, launch);
}
void SimulatedGroup::launch(SimulatedLowLatencyParams<CombineOp> params,
                            const SimulatedLaunch& launch) {
  append_internode(machine_, params, launch);
}

void SimulatedGroup::launch_wait(int32_t rank, int32_t peer, uint32_t stream) {
  SimulatedKernel kernel = simulated_wait(view(rank), peer);
  machine_.launch(
      static_cast<uint32_t>(rank), stream, {.threads = kernel.threads}, std::move(kernel.body));
}

}  // namespace jax_ep
