// SPDX-License-Identifier: Apache-2.0
#include "csrc/kernels/tests/simulated_group.h"

#include <algorithm>

#include "csrc/core/heap_regions.h"
#include "csrc/kernels/tests/simulated_kernel.h"

namespace jax_ep {
namespace {

constexpr uint64_t kErrorBytes = 256;

template <typename Params>
void append(sim::Machine& machine, const Params& params, uint32_t stream, uint32_t blocks) {
  SimulatedKernel kernel = simulated_kernel(params);
  machine.launch(static_cast<uint32_t>(params.view.rank),
                 stream,
                 {.blocks = blocks, .threads = kernel.threads, .shared_bytes = kernel.shared_bytes},
                 std::move(kernel.body));
}

}  // namespace

uint32_t granule_bytes(int64_t hidden, DType dtype, Wire wire) {
  const int64_t element = wire == Wire::kSame ? size_bytes(dtype) : 1;
  return hidden * element % 16 == 0 ? 4 : static_cast<uint32_t>(element);
}

uint32_t SimulatedGroup::max_shared_bytes() {
  return std::max({simulated_kernel(PlanParams{}).shared_bytes,
                   simulated_kernel(DispatchParams{}).shared_bytes,
                   simulated_kernel(CombineParams{}).shared_bytes});
}

uint64_t SimulatedGroup::memory_bytes(const HeapShape& shape) {
  return static_cast<uint64_t>(make_heap_layout(shape).total_bytes) + kErrorBytes;
}

SimulatedGroup::SimulatedGroup(sim::Machine& machine,
                               const HeapShape& shape,
                               int32_t chunk_target,
                               uint64_t offset,
                               const std::string& name)
    : machine_(machine),
      layout_(make_heap_layout(shape)),
      num_ranks_(shape.num_ranks),
      chunk_target_(chunk_target),
      offset_(offset) {
  for (int32_t rank = 0; rank < num_ranks_; ++rank) {
    const auto r = static_cast<uint32_t>(rank);
    // Rows, scalars and scales are written before they are read: they start uninitialized.
    for (const Region region : {Region::kAcknowledged, Region::kArrived, Region::kControl}) {
      machine_.fill(r,
                    heap(rank) + layout_.at(region),
                    0,
                    static_cast<uint64_t>(layout_.bytes[static_cast<int32_t>(region)]));
    }
    machine_.fill(r, view(rank).error, 0, sizeof(ErrorRecord));
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
    machine_.write(r, heap(rank) + layout_.at(Region::kControl), &epoch, sizeof epoch);
    for (int32_t peer = 0; peer < num_ranks_; ++peer) {
      machine_.write(
          r, heap(rank) + layout_.at(Region::kAcknowledged) + 4 * peer, &epoch, sizeof epoch);
    }
  }
}

std::byte* SimulatedGroup::heap(int32_t rank) const {
  return machine_.memory(static_cast<uint32_t>(rank)) + offset_;
}

RankView SimulatedGroup::view(int32_t rank) const {
  RankView view{};
  view.layout = layout_;
  for (int32_t peer = 0; peer < num_ranks_; ++peer) view.heap[peer] = heap(peer);
  view.error = reinterpret_cast<ErrorRecord*>(heap(rank) + layout_.total_bytes);
  // Expires when only time can help: time then leaps by 2^40, which is less than two of these.
  view.timeout_ns = uint64_t{3} << 38;
  view.rank = rank;
  view.num_ranks = num_ranks_;
  view.chunk_target = chunk_target_;
  return view;
}

ErrorRecord SimulatedGroup::error(int32_t rank) {
  ErrorRecord record{};
  machine_.read(static_cast<uint32_t>(rank), view(rank).error, &record, sizeof record);
  return record;
}

void SimulatedGroup::launch(const PlanParams& params, uint32_t stream, uint32_t blocks) {
  append(machine_, params, stream, blocks);
}
void SimulatedGroup::launch(const DispatchParams& params, uint32_t stream, uint32_t blocks) {
  append(machine_, params, stream, blocks);
}
void SimulatedGroup::launch(const CombineParams& params, uint32_t stream, uint32_t blocks) {
  append(machine_, params, stream, blocks);
}

}  // namespace jax_ep
