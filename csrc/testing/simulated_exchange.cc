// SPDX-License-Identifier: Apache-2.0
#include "csrc/testing/simulated_exchange.h"

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "csrc/core/kernel_params.h"
#include "csrc/sim/machine.h"
#include "csrc/testing/simulated_group.h"

namespace jax_ep {
namespace {

constexpr uint64_t kAlignment = 256;  // as XLA's buffers have

EpShape shape_of(const SimulatedExchange& exchange) {
  return {.num_ranks = exchange.num_ranks,
          .num_experts = exchange.num_experts,
          .num_topk = exchange.num_topk,
          .num_tokens = exchange.num_tokens,
          .recv_capacity = exchange.capacity,
          .expert_alignment = exchange.expert_alignment,
          .layout = static_cast<Layout>(exchange.layout)};
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
      : rank_(rank), memory_(memory) {
    const EpShape shape = shape_of(exchange);
    const int64_t rows = shape.recv_capacity;
    const int64_t selections = shape.num_tokens * shape.num_topk;
    const int64_t scalars = rows * shape.scalars_per_row();
    const auto dtype = static_cast<DType>(exchange.dtype);
    const int64_t row_bytes = exchange.hidden * size_bytes(dtype);
    const int64_t scales = ceil_div(exchange.hidden, kScaleBlock);
    const bool x_quantized = exchange.x_format != 0;
    const bool rows_quantized = exchange.rows_format != 0;
    const int64_t max_rows =
        max_rows_per_token(shape.layout, shape.num_topk, shape.num_local_experts());
    const int64_t row_topk_idx = shape.layout == Layout::kRank ? scalars : 0;
    program_rank_ = place<int32_t>(1);
    rows_bytes_ = static_cast<uint64_t>(rows * (rows_quantized ? exchange.hidden : row_bytes));
    plan_ = {
        .view = view,
        .call_tag = 0,
        .program_rank = program_rank_,
        .op = {.shape = shape,
               .topk_idx = operand(exchange.topk_idx, selections),
               .slot = result(exchange.slot, selections),
               .row_source = result(exchange.row_source, rows),
               .row_topk_idx = result(exchange.row_topk_idx, row_topk_idx),
               .source_slot = place<int32_t>(shape.num_ranks * shape.num_tokens * max_rows),
               .group_sizes = result(exchange.group_sizes, shape.num_row_groups()),
               .tokens_per_expert = result(exchange.tokens_per_expert, shape.num_local_experts()),
               .num_dropped = result(exchange.num_dropped, 1)}};
    dispatch_ = {
        .view = view,
        .call_tag = 0,
        .program_rank = program_rank_,
        .op = {.shape = shape,
               .hidden = exchange.hidden,
               .num_scalars = shape.num_topk,
               .dtype = dtype,
               .wire = static_cast<Wire>(exchange.wire),
               .x_format = static_cast<RowFormat>(exchange.x_format),
               .rows_format = static_cast<RowFormat>(exchange.rows_format),
               .zero_fill = exchange.zero_fill != 0,
               .x = operand(exchange.x,
                            shape.num_tokens * (x_quantized ? exchange.hidden : row_bytes)),
               .x_scales = operand(exchange.x_scales, x_quantized ? shape.num_tokens * scales : 0),
               .token_scalars = operand(exchange.topk_weights, selections),
               .topk_idx = plan_.op.topk_idx,
               .slot = plan_.op.slot,
               .row_source = plan_.op.row_source,
               .source_slot = plan_.op.source_slot,
               .rows = result(exchange.rows, static_cast<int64_t>(rows_bytes_)),
               .rows_scales = result(exchange.rows_scales, rows_quantized ? rows * scales : 0),
               .row_scalars = result(exchange.row_weights, scalars)}};
    weighted_ = {.view = view,
                 .call_tag = 0,
                 .program_rank = program_rank_,
                 .op = {.shape = shape,
                        .hidden = exchange.hidden,
                        .weighted = true,
                        .num_scalars = shape.num_topk,
                        .dtype = dtype,
                        .y = operand(exchange.y, rows * row_bytes),
                        .weights = dispatch_.op.row_scalars,
                        .row_scalars = dispatch_.op.row_scalars,
                        .topk_idx = plan_.op.topk_idx,
                        .slot = plan_.op.slot,
                        .row_topk_idx = plan_.op.row_topk_idx,
                        .source_slot = plan_.op.source_slot,
                        .out = result(exchange.weighted, shape.num_tokens * row_bytes),
                        .token_scalars = result(exchange.returned_weights, selections)}};
    unweighted_ = weighted_;
    unweighted_.op.weighted = false;
    unweighted_.op.num_scalars = 0;
    unweighted_.op.out = result(exchange.unweighted, shape.num_tokens * row_bytes);
  }

  [[nodiscard]] uint64_t bytes() const { return bytes_; }

  void append_call(sim::Machine& machine, SimulatedGroup& group, int32_t call, uint32_t blocks) {
    const auto r = static_cast<uint32_t>(rank_);
    machine.host_call(r, 0, [this, &machine] { upload(machine); });
    group.launch(plan_, {.blocks = blocks});
    group.launch(dispatch_, {.blocks = blocks});
    group.launch(weighted_, {.blocks = blocks});
    group.launch(unweighted_, {.blocks = blocks});
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
    machine.poison(r, memory_, bytes_);
    machine.write(r, program_rank_, &rank_, sizeof rank_);
    for (const Operand& operand : operands_) {
      machine.write(r, operand.device, operand.host, operand.bytes);
    }
    // Dispatch may leave rows alone that hold no token: NaN in every dtype.
    if (rows_bytes_ > 0) machine.fill(r, dispatch_.op.rows, 0xFF, rows_bytes_);
  }

  void download(sim::Machine& machine, int32_t call) const {
    for (const Result& result : results_) {
      const auto ranks = static_cast<uint64_t>(plan_.op.shape.num_ranks);
      std::byte* const host = result.host + static_cast<uint64_t>(call) * ranks * result.bytes;
      machine.read(static_cast<uint32_t>(rank_), result.device, host, result.bytes);
    }
  }

  template <typename T>
  T* place(int64_t count) {
    T* const at = reinterpret_cast<T*>(memory_ + bytes_);
    bytes_ += static_cast<uint64_t>(align_up(count * int64_t{sizeof(T)}, kAlignment));
    return at;
  }
  template <typename T>
  const T* operand(const T* host, int64_t count) {
    T* const at = place<T>(count);
    if (count > 0) {
      operands_.push_back({reinterpret_cast<std::byte*>(at),
                           reinterpret_cast<const std::byte*>(host + rank_ * count),
                           static_cast<uint64_t>(count) * sizeof(T)});
    }
    return at;
  }
  template <typename T>
  T* result(T* host, int64_t count) {
    T* const at = place<T>(count);
    if (count > 0) {
      results_.push_back({reinterpret_cast<const std::byte*>(at),
                          reinterpret_cast<std::byte*>(host + rank_ * count),
                          static_cast<uint64_t>(count) * sizeof(T)});
    }
    return at;
  }

  int32_t rank_;
  std::byte* memory_;
  uint64_t bytes_ = 0;
  uint64_t rows_bytes_ = 0;
  std::vector<Operand> operands_;
  std::vector<Result> results_;
  int32_t* program_rank_ = nullptr;
  PlanParams plan_{};
  DispatchParams dispatch_{};
  CombineParams weighted_{};
  CombineParams unweighted_{};
};

}  // namespace
}  // namespace jax_ep

const char* jax_ep_simulate(const SimulatedExchange* exchange) {
  using namespace jax_ep;
  const HeapShape heap = heap_shape_of(*exchange);
  const auto num_ranks = static_cast<uint32_t>(exchange->num_ranks);
  const auto blocks = static_cast<uint32_t>(exchange->blocks);
  const uint64_t heap_bytes = SimulatedGroup::memory_bytes(heap);
  const uint64_t arrays_bytes = RankProgram(*exchange, 0, {}, nullptr).bytes();

  sim::Config config;
  config.num_ranks = num_ranks;
  config.max_blocks = blocks;
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
      programs.back()->append_call(machine, group, call, blocks);
    }
  }
  const sim::Report report = machine.run();
  static thread_local std::string text;
  text = report.ok() ? "" : report.text();
  return text.c_str();
}
