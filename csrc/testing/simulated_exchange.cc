// SPDX-License-Identifier: Apache-2.0
#include "csrc/testing/simulated_exchange.h"

#include <cstddef>
#include <iterator>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "csrc/core/kernel_params.h"
#include "csrc/sim/machine.h"
#include "csrc/testing/kernel_arrays.h"
#include "csrc/testing/simulated_group.h"

namespace jax_ep {
namespace {

ExchangeSizes sizes_of(const SimulatedExchange& exchange) {
  return {.shape = {.num_ranks = exchange.num_ranks,
                    .num_experts = exchange.num_experts,
                    .num_topk = exchange.num_topk,
                    .num_tokens = exchange.num_tokens,
                    .recv_capacity = exchange.capacity,
                    .expert_alignment = exchange.expert_alignment,
                    .layout = static_cast<Layout>(exchange.layout)},
          .hidden = exchange.hidden,
          .num_scalars = exchange.num_topk,
          .domain_size = exchange.domain_size,
          .dtype = static_cast<DType>(exchange.dtype),
          .wire = static_cast<Wire>(exchange.wire),
          .x_format = static_cast<RowFormat>(exchange.x_format),
          .rows_format = static_cast<RowFormat>(exchange.rows_format),
          .zero_fill = exchange.zero_fill != 0,
          .weights_are_row_scalars = true};
}

HeapShape heap_shape_of(const SimulatedExchange& exchange) {
  return {.num_ranks = exchange.num_ranks,
          .num_experts = exchange.num_experts,
          .num_topk = exchange.num_topk,
          .max_tokens = exchange.max_tokens,
          .hidden = exchange.hidden,
          .dtype = static_cast<DType>(exchange.dtype),
          .wire = static_cast<Wire>(exchange.wire),
          .layout = static_cast<Layout>(exchange.layout)};
}

// What a rank runs, and its arrays in the simulated memory. All calls use the same arrays, as a
// program does; what was in them before a call is gone.
class RankProgram {
 public:
  RankProgram(const SimulatedExchange& exchange,
              int32_t rank,
              const RankView& view,
              std::byte* memory)
      : rank_(rank), memory_(memory), arrays_(sizes_of(exchange), memory) {
    const auto unweighted_out = arrays_.place<std::byte>(std::ssize(arrays_.out));
    operand(arrays_.topk_idx, exchange.topk_idx);
    operand(arrays_.x, exchange.x);
    operand(arrays_.x_scales, exchange.x_scales);
    operand(arrays_.token_scalars, exchange.topk_weights);
    operand(arrays_.y, exchange.y);
    result(arrays_.slot, exchange.slot);
    result(arrays_.row_source, exchange.row_source);
    result(arrays_.row_topk_idx, exchange.row_topk_idx);
    result(arrays_.group_sizes, exchange.group_sizes);
    result(arrays_.tokens_per_expert, exchange.tokens_per_expert);
    result(arrays_.num_dropped, exchange.num_dropped);
    result(arrays_.rows, exchange.rows);
    result(arrays_.rows_scales, exchange.rows_scales);
    result(arrays_.row_scalars, exchange.row_weights);
    result(arrays_.out, exchange.weighted);
    result(unweighted_out, exchange.unweighted);
    result(arrays_.returned_scalars, exchange.returned_weights);
    plan_ = arrays_.plan(view);
    dispatch_ = arrays_.dispatch(view);
    plan_dispatch_ = arrays_.plan_dispatch(view);
    weighted_ = arrays_.combine(view);
    unweighted_ = weighted_;
    unweighted_.op.weighted = false;
    unweighted_.op.num_scalars = 0;
    unweighted_.op.out = unweighted_out.data();
  }

  [[nodiscard]] uint64_t bytes() const { return arrays_.bytes(); }

  void append_call(sim::Machine& machine,
                   SimulatedGroup& group,
                   int32_t call,
                   const SimulatedLaunch& launch) {
    const auto r = static_cast<uint32_t>(rank_);
    machine.host_call(r, 0, [this, &machine] { upload(machine); });
    if (call % 2 == 0) {
      group.launch(plan_, launch);
      group.launch(dispatch_, launch);
    } else {
      group.launch(plan_dispatch_, launch);
    }
    group.launch(weighted_, launch);
    group.launch(unweighted_, launch);
    machine.host_call(r, 0, [this, &machine, call] { download(machine, call); });
  }

 private:
  struct Operand {
    std::byte* device;
    const std::byte* host;  // this rank's part
    uint64_t bytes;
  };
  struct Result {
    const std::byte* device;
    std::byte* host;  // this rank's part of the first call
    uint64_t bytes;
  };

  void upload(sim::Machine& machine) const {
    const auto r = static_cast<uint32_t>(rank_);
    machine.poison(r, memory_, bytes());
    machine.write(r, arrays_.program_rank.data(), &rank_, sizeof rank_);
    for (const Operand& operand : operands_) {
      machine.write(r, operand.device, operand.host, operand.bytes);
    }
    // Dispatch may leave rows alone that hold no token, and their scales: NaN in every dtype.
    if (!arrays_.rows.empty()) machine.fill(r, arrays_.rows.data(), 0xFF, arrays_.rows.size());
    const std::span<std::byte> scales = std::as_writable_bytes(arrays_.rows_scales);
    if (!scales.empty()) machine.fill(r, scales.data(), 0xFF, scales.size());
  }

  void download(sim::Machine& machine, int32_t call) const {
    for (const Result& result : results_) {
      const auto ranks = static_cast<uint64_t>(plan_.op.shape.num_ranks);
      std::byte* const host = result.host + static_cast<uint64_t>(call) * ranks * result.bytes;
      machine.read(static_cast<uint32_t>(rank_), result.device, host, result.bytes);
    }
  }

  template <typename T>
  using HostType = std::conditional_t<std::is_same_v<T, std::byte>, uint8_t, T>;

  // `host` has the arrays of all ranks.
  template <typename T>
  void operand(std::span<T> array, const HostType<T>* host) {
    if (array.empty()) return;
    const auto* const mine = reinterpret_cast<const std::byte*>(host) + rank_ * bytes_of(array);
    operands_.push_back({std::as_writable_bytes(array).data(), mine, array.size_bytes()});
  }
  template <typename T>
  void result(std::span<T> array, HostType<T>* host) {
    if (array.empty()) return;
    std::byte* const mine = reinterpret_cast<std::byte*>(host) + rank_ * bytes_of(array);
    results_.push_back({std::as_bytes(array).data(), mine, array.size_bytes()});
  }
  template <typename T>
  static int64_t bytes_of(std::span<T> array) {
    return static_cast<int64_t>(array.size_bytes());
  }

  int32_t rank_;
  std::byte* memory_;
  KernelArrays arrays_;
  std::vector<Operand> operands_;
  std::vector<Result> results_;
  PlanParams plan_{};
  DispatchParams dispatch_{};
  PlanDispatchParams plan_dispatch_{};
  CombineParams weighted_{};
  CombineParams unweighted_{};
};

}  // namespace
}  // namespace jax_ep

const char* jax_ep_simulate(const SimulatedExchange* exchange) {
  using namespace jax_ep;
  const HeapShape heap = heap_shape_of(*exchange);
  const auto num_ranks = static_cast<uint32_t>(exchange->num_ranks);
  const SimulatedLaunch launch{.blocks = static_cast<uint32_t>(exchange->blocks),
                               .tail_blocks = static_cast<uint32_t>(exchange->tail_blocks)};
  const uint64_t heap_bytes = SimulatedGroup::memory_bytes(heap);
  const uint64_t arrays_bytes = RankProgram(*exchange, 0, {}, nullptr).bytes();

  sim::Config config;
  config.num_ranks = num_ranks;
  config.max_blocks = launch.blocks + launch.tail_blocks;
  config.max_threads = SimulatedGroup::kMaxThreads;
  config.granule_bytes = granule_bytes(heap.hidden, heap.dtype, heap.wire);
  config.memory_bytes =
      static_cast<uint64_t>(align_up(static_cast<int64_t>(heap_bytes + arrays_bytes), 4096));
  config.shared_bytes = SimulatedGroup::max_shared_bytes();
  sim::Machine machine(config);
  machine.reset(exchange->seed);
  SimulatedGroup group(machine, heap, kChunkTarget, 0, "group");
  std::vector<std::unique_ptr<RankProgram>> programs;
  for (uint32_t rank = 0; rank < num_ranks; ++rank) {
    const auto r = static_cast<int32_t>(rank);
    programs.push_back(std::make_unique<RankProgram>(
        *exchange, r, group.view(r), machine.memory(rank) + heap_bytes));
    for (int32_t call = 0; call < exchange->calls; ++call) {
      programs.back()->append_call(machine, group, call, launch);
    }
  }
  const sim::Report report = machine.run();
  static thread_local std::string text;
  text = report.ok() ? "" : report.text();
  return text.c_str();
}
