// SPDX-License-Identifier: Apache-2.0
#include "csrc/kernels/tests/simulated_group.h"

#include <algorithm>

#include "csrc/core/heap_regions.h"
#include "csrc/kernels/combine_kernel.h"
#include "csrc/kernels/dispatch_kernel.h"
#include "csrc/kernels/plan_kernel.h"

namespace jax_ep {
namespace {

// Blocks small enough for the simulator, and yet with several warps of every role somewhere.
using PlanShape = dev::PlanTile<2, 320>;
using DispatchShape = dev::DispatchTile<2, 1, 3, 512>;
using CombineShape = dev::CombineTile<1, 2, 2>;

constexpr uint64_t kErrorBytes = 256;

template <typename Tile>
sim::LaunchShape shape_of(uint32_t blocks) {
  return {.blocks = blocks,
          .threads = Tile::kWarps * 32,
          .shared_bytes = sizeof(typename Tile::SharedStorage)};
}

template <typename Kernel, typename Tile, typename Params>
void append(sim::Machine& machine, const Params& params, uint32_t stream, uint32_t blocks) {
  machine.launch(static_cast<uint32_t>(params.view.rank), stream, shape_of<Tile>(blocks), [params] {
    Kernel(params).run();
  });
}

template <template <typename, typename> typename Kernel, typename Tile, typename Params>
void append_for_dtype(sim::Machine& machine,
                      const Params& params,
                      uint32_t stream,
                      uint32_t blocks) {
  switch (params.dtype) {
    case DType::kFloat32:
      return append<Kernel<Tile, dev::Float32Rows>, Tile>(machine, params, stream, blocks);
    case DType::kBFloat16:
      return append<Kernel<Tile, dev::BFloat16Rows>, Tile>(machine, params, stream, blocks);
    case DType::kFloat16:
      return append<Kernel<Tile, dev::Float16Rows>, Tile>(machine, params, stream, blocks);
  }
}

}  // namespace

uint32_t SimulatedGroup::max_shared_bytes() {
  return static_cast<uint32_t>(std::max({sizeof(PlanShape::SharedStorage),
                                         sizeof(DispatchShape::SharedStorage),
                                         sizeof(CombineShape::SharedStorage)}));
}

uint64_t SimulatedGroup::memory_bytes(const HeapShape& shape) {
  return static_cast<uint64_t>(make_heap_layout(shape).total_bytes) + kErrorBytes;
}

SimulatedGroup::SimulatedGroup(sim::Machine& machine,
                               const HeapShape& shape,
                               uint64_t offset,
                               const std::string& name)
    : machine_(machine),
      layout_(make_heap_layout(shape)),
      num_ranks_(shape.num_ranks),
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

std::byte* SimulatedGroup::heap(int32_t rank) const {
  return machine_.memory(static_cast<uint32_t>(rank)) + offset_;
}

RankView SimulatedGroup::view(int32_t rank) const {
  RankView view{};
  view.layout = layout_;
  for (int32_t peer = 0; peer < num_ranks_; ++peer) view.heap[peer] = heap(peer);
  view.error = reinterpret_cast<ErrorRecord*>(heap(rank) + layout_.total_bytes);
  view.timeout_ns = uint64_t{1} << 38;  // expires when only time can help
  view.rank = rank;
  view.num_ranks = num_ranks_;
  return view;
}

ErrorRecord SimulatedGroup::error(int32_t rank) {
  ErrorRecord record{};
  machine_.read(static_cast<uint32_t>(rank), view(rank).error, &record, sizeof record);
  return record;
}

void SimulatedGroup::launch(const PlanParams& params, uint32_t stream, uint32_t blocks) {
  append<dev::PlanKernel<PlanShape>, PlanShape>(machine_, params, stream, blocks);
}
void SimulatedGroup::launch(const DispatchParams& params, uint32_t stream, uint32_t blocks) {
  append_for_dtype<dev::DispatchKernel, DispatchShape>(machine_, params, stream, blocks);
}
void SimulatedGroup::launch(const CombineParams& params, uint32_t stream, uint32_t blocks) {
  append_for_dtype<dev::CombineKernel, CombineShape>(machine_, params, stream, blocks);
}

}  // namespace jax_ep
