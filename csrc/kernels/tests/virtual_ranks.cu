// SPDX-License-Identifier: Apache-2.0
// All ranks of a group on one GPU, in one process: a heap and a stream each. Runs the simulator's
// random scenarios on the hardware, and times the kernels.
//   virtual_ranks scenarios [FIRST LAST]
//   virtual_ranks time RANKS TOKENS HIDDEN TOPK EXPERTS SMS [fp8] [rank]
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "csrc/core/float_formats.h"
#include "csrc/kernels/launch.h"
#include "csrc/testing/rank_arrays.h"
#include "csrc/testing/scenario.h"
#include "csrc/tuning/heuristics.h"

namespace jax_ep {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

struct DeviceFree {
  void operator()(std::byte* memory) const { cudaFree(memory); }
};
using DeviceArray = std::unique_ptr<std::byte, DeviceFree>;

DeviceArray allocate(size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, std::max<size_t>(bytes, 256)), "cudaMalloc");
  check(cudaMemset(memory, 0, std::max<size_t>(bytes, 256)), "cudaMemset");
  return DeviceArray(static_cast<std::byte*>(memory));
}

class GpuMemory : public DeviceMemory {
 public:
  void write(void* to, const void* from, size_t bytes) override {
    check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "write");
  }
  void read(void* to, const void* from, size_t bytes) override {
    check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "read");
  }
};

class VirtualRanks {
 public:
  explicit VirtualRanks(const HeapShape& shape, int32_t chunk_target = kChunkTarget)
      : layout_(make_heap_layout(shape)), chunk_target_(chunk_target) {
    check(cudaHostAlloc(&words_, sizeof(*words_) * kMaxRanks, cudaHostAllocMapped), "host");
    std::memset(static_cast<void*>(words_), 0, sizeof(*words_) * kMaxRanks);
    control_ = allocate(static_cast<size_t>(kControlBytes) * kMaxRanks);
    for (int32_t rank = 0; rank < shape.num_ranks; ++rank) {
      heaps_.push_back(allocate(static_cast<size_t>(layout_.total_bytes)));
      streams_.emplace_back();
      check(cudaStreamCreateWithFlags(&streams_.back(), cudaStreamNonBlocking), "stream");
    }
  }
  ~VirtualRanks() {
    for (cudaStream_t stream : streams_) cudaStreamDestroy(stream);
    cudaFreeHost(words_);
  }
  VirtualRanks(const VirtualRanks&) = delete;
  VirtualRanks& operator=(const VirtualRanks&) = delete;

  [[nodiscard]] RankView view(int32_t rank) const {
    RankView view{};
    view.layout = layout_;
    for (size_t peer = 0; peer < heaps_.size(); ++peer) view.heap[peer] = heaps_[peer].get();
    view.control = reinterpret_cast<uint32_t*>(control_.get() + rank * kControlBytes);
    view.error = &words_[rank].error;
    view.long_waits = words_[rank].long_waits;
    view.report_ns = 1'000'000'000;
    view.timeout_ns = 5'000'000'000;
    view.rank = rank;
    view.chunk_target = chunk_target_;
    view.num_ranks = static_cast<int32_t>(heaps_.size());
    return view;
  }
  [[nodiscard]] cudaStream_t stream(int32_t rank) const {
    return streams_[static_cast<size_t>(rank)];
  }
  [[nodiscard]] int32_t num_ranks() const { return static_cast<int32_t>(heaps_.size()); }

  void synchronize() {
    for (int32_t rank = 0; rank < num_ranks(); ++rank) {
      const cudaError_t error = cudaStreamSynchronize(stream(rank));
      if (error == cudaSuccess) continue;
      for (int32_t r = 0; r < num_ranks(); ++r) {
        const ErrorRecord& error_of_rank = words_[r].error;
        if (error_of_rank.written != 0) std::printf("%s\n", describe(error_of_rank, 5.0).c_str());
      }
      check(error, "a kernel");
    }
  }

 private:
  struct HostWords {
    ErrorRecord error;
    uint64_t long_waits[kMaxRanks];
  };

  HeapLayout layout_;
  int32_t chunk_target_;
  std::vector<DeviceArray> heaps_;
  std::vector<cudaStream_t> streams_;
  DeviceArray control_;
  HostWords* words_ = nullptr;  // by rank
};

// What tuning chooses, on so many SMs.
LaunchShape launch_of(OpKind op, const ClusterOptions& options, int32_t blocks) {
  const int64_t row_bytes = options.hidden * size_bytes(options.dtype);
  LaunchShape shape =
      launch_shape(op, options.shape, row_bytes, {.available = 132, .requested = 0});
  shape.num_blocks = blocks;
  return shape;
}

// --- scenarios -----------------------------------------------------------------------------------

std::string run_step(VirtualRanks& ranks, const ScenarioStep& step, int32_t blocks) {
  Problem problem(step.options, step.x_format, step.rows_format);
  if (!problem.ok) return "the CPU backend failed";
  GpuMemory memory;
  std::vector<DeviceArray> storage;
  std::vector<RankArrays> arrays;
  for (int32_t rank = 0; rank < ranks.num_ranks(); ++rank) {
    storage.push_back(allocate(RankArrays(problem, rank, nullptr).bytes()));
    arrays.emplace_back(problem, rank, storage.back().get());
    arrays.back().upload(memory);
  }
  check(cudaDeviceSynchronize(), "upload");
  for (const OpKind op : step.ops) {
    for (int32_t rank = 0; rank < ranks.num_ranks(); ++rank) {
      const RankArrays& mine = arrays[static_cast<size_t>(rank)];
      const RankView view = ranks.view(rank);
      cudaStream_t stream = ranks.stream(rank);
      const LaunchShape shape = launch_of(op, step.options, blocks);
      switch (op) {
        case OpKind::kPlan: check(launch_plan(mine.plan(view), shape, stream), "plan"); break;
        case OpKind::kDispatch:
          check(launch_dispatch(mine.dispatch(view), shape, stream), "dispatch");
          break;
        case OpKind::kCombine:
          check(launch_combine(mine.combine(view), shape, stream), "combine");
          break;
      }
    }
  }
  ranks.synchronize();
  for (int32_t rank = 0; rank < ranks.num_ranks(); ++rank) {
    const RankArrays& mine = arrays[static_cast<size_t>(rank)];
    std::string error;
    for (const OpKind op : step.ops) {
      if (!error.empty()) break;
      if (op == OpKind::kPlan) error = mine.check_plan(memory);
      if (op == OpKind::kDispatch) error = mine.check_dispatch(memory);
      if (op == OpKind::kCombine) error = mine.check_combine(memory);
    }
    if (!error.empty()) return "rank " + std::to_string(rank) + ": " + error;
  }
  return {};
}

int run_scenarios(uint64_t first, uint64_t last) {
  for (uint64_t seed = first; seed <= last; ++seed) {
    const Scenario scenario =
        random_scenario(seed, {.max_tokens = seed % 4 == 0 ? 300 : 20, .steps = 4});
    const GroupScenario& group = scenario.groups[0];
    VirtualRanks ranks(heap_shape(group), group.chunk_target);
    for (const ScenarioStep& step : group.steps) {
      const std::string error = run_step(ranks, step, static_cast<int32_t>(scenario.blocks));
      if (error.empty()) continue;
      std::printf("seed %lu: %s\n%s\n", seed, describe(scenario).c_str(), error.c_str());
      return 1;
    }
  }
  std::printf("scenarios %lu to %lu passed\n", first, last);
  return 0;
}

// --- times -------------------------------------------------------------------------------------

// bfloat16 numbers as models have them: how long FP8 takes depends on the data.
void fill_with_normals(void* to, int64_t bytes) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> numbers(1 << 20);
  for (uint16_t& number : numbers) number = float_to_bfloat16(normal(random));
  for (int64_t at = 0; at < bytes; at += std::ssize(numbers) * 2) {
    const int64_t size = std::min<int64_t>(std::ssize(numbers) * 2, bytes - at);
    check(cudaMemcpy(static_cast<std::byte*>(to) + at,
                     numbers.data(),
                     static_cast<size_t>(size),
                     cudaMemcpyHostToDevice),
          "fill");
  }
}

void run_times(const ClusterOptions& options, int32_t sms) {
  const EpShape& shape = options.shape;
  VirtualRanks ranks(
      heap_shape(GroupScenario{.max_tokens = shape.num_tokens, .steps = {{.options = options}}}));
  std::vector<DeviceArray> storage;
  const auto array = [&](int64_t bytes) {
    storage.push_back(allocate(static_cast<size_t>(bytes)));
    return storage.back().get();
  };
  const int64_t row_bytes = options.hidden * size_bytes(options.dtype);
  const int64_t selections = shape.num_tokens * shape.num_topk;
  const int64_t max_rows =
      max_rows_per_token(shape.layout, shape.num_topk, shape.num_local_experts());
  std::mt19937 random(1);
  std::vector<PlanParams> plans;
  std::vector<DispatchParams> dispatches;
  std::vector<CombineParams> combines;
  for (int32_t rank = 0; rank < shape.num_ranks; ++rank) {
    std::vector<int32_t> routing;
    std::vector<int32_t> experts(static_cast<size_t>(shape.num_experts));
    for (size_t e = 0; e < experts.size(); ++e) experts[e] = static_cast<int32_t>(e);
    for (int64_t token = 0; token < shape.num_tokens; ++token) {
      for (int32_t k = 0; k < shape.num_topk; ++k) {
        const auto other =
            static_cast<size_t>(k) + random() % (experts.size() - static_cast<size_t>(k));
        std::swap(experts[static_cast<size_t>(k)], experts[other]);
        routing.push_back(experts[static_cast<size_t>(k)]);
      }
    }
    const auto ints = [&](int64_t count) { return reinterpret_cast<int32_t*>(array(count * 4)); };
    const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(array(count * 4)); };
    int32_t* const program_rank = ints(1);
    check(cudaMemcpy(program_rank, &rank, sizeof rank, cudaMemcpyHostToDevice), "copy");
    int32_t* const topk_idx = ints(selections);
    check(cudaMemcpy(topk_idx, routing.data(), routing.size() * 4, cudaMemcpyHostToDevice), "copy");
    const RankView view = ranks.view(rank);
    plans.push_back({.view = view,
                     .call_tag = 0,
                     .program_rank = program_rank,
                     .op = {.shape = shape,
                            .topk_idx = topk_idx,
                            .slot = ints(selections),
                            .row_source = ints(shape.recv_capacity),
                            .row_topk_idx = ints(shape.recv_capacity * shape.num_topk),
                            .source_slot = ints(shape.num_ranks * shape.num_tokens * max_rows),
                            .group_sizes = ints(shape.num_row_groups()),
                            .tokens_per_expert = ints(shape.num_local_experts()),
                            .num_dropped = ints(1)}});
    dispatches.push_back(
        {.view = view,
         .call_tag = 0,
         .program_rank = program_rank,
         .op = {.shape = shape,
                .hidden = options.hidden,
                .num_scalars = shape.num_topk,
                .dtype = options.dtype,
                .wire = options.wire,
                .zero_fill = false,
                .x = array(shape.num_tokens * row_bytes),
                .token_scalars = floats(selections),
                .topk_idx = topk_idx,
                .slot = plans.back().op.slot,
                .row_source = plans.back().op.row_source,
                .source_slot = plans.back().op.source_slot,
                .rows = array(shape.recv_capacity * row_bytes),
                .row_scalars = floats(shape.recv_capacity * shape.scalars_per_row())}});
    fill_with_normals(const_cast<void*>(dispatches.back().op.x), shape.num_tokens * row_bytes);
    combines.push_back({.view = view,
                        .call_tag = 0,
                        .program_rank = program_rank,
                        .op = {.shape = shape,
                               .hidden = options.hidden,
                               .weighted = true,
                               .num_scalars = 0,
                               .dtype = options.dtype,
                               .y = dispatches.back().op.rows,
                               .weights = dispatches.back().op.row_scalars,
                               .topk_idx = topk_idx,
                               .slot = plans.back().op.slot,
                               .row_topk_idx = plans.back().op.row_topk_idx,
                               .source_slot = plans.back().op.source_slot,
                               .out = array(shape.num_tokens * row_bytes)}});
  }
  // Rounds are replayed from one CUDA graph a rank: the host's launches cost nothing, and the
  // operations prove that they can be captured.
  const auto measure = [&](const char* name, const auto& launch) {
    constexpr int kRounds = 50;
    std::vector<cudaGraphExec_t> graphs;
    std::vector<cudaEvent_t> starts(static_cast<size_t>(shape.num_ranks));
    std::vector<cudaEvent_t> ends(starts.size());
    for (int32_t rank = 0; rank < shape.num_ranks; ++rank) {
      cudaStream_t stream = ranks.stream(rank);
      cudaGraph_t graph = nullptr;
      check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
      for (int round = 0; round < kRounds; ++round) check(launch(rank), name);
      check(cudaStreamEndCapture(stream, &graph), "capture");
      check(cudaGraphInstantiate(&graphs.emplace_back(), graph), "instantiate");
      check(cudaGraphDestroy(graph), "destroy");
      check(cudaEventCreate(&starts[static_cast<size_t>(rank)]), "event");
      check(cudaEventCreate(&ends[static_cast<size_t>(rank)]), "event");
    }
    float slowest = 0;
    for (int repetition = 0; repetition < 2; ++repetition) {
      for (int32_t rank = 0; rank < shape.num_ranks; ++rank) {
        const auto r = static_cast<size_t>(rank);
        check(cudaEventRecord(starts[r], ranks.stream(rank)), "record");
        check(cudaGraphLaunch(graphs[r], ranks.stream(rank)), name);
        check(cudaEventRecord(ends[r], ranks.stream(rank)), "record");
      }
      ranks.synchronize();
      slowest = 0;
      for (size_t r = 0; r < starts.size(); ++r) {
        float ms = 0;
        check(cudaEventElapsedTime(&ms, starts[r], ends[r]), "elapsed");
        slowest = std::max(slowest, ms);
      }
    }
    for (cudaGraphExec_t graph : graphs) check(cudaGraphExecDestroy(graph), "destroy");
    std::printf("  %-9s %8.1f us\n", name, static_cast<double>(slowest) * 1e3 / kRounds);
  };
  std::printf("%s, %d SMs a rank\n", describe(options).c_str(), sms);
  const auto at = [](int32_t rank) { return static_cast<size_t>(rank); };
  measure("plan", [&](int32_t r) {
    return launch_plan(plans[at(r)], launch_of(OpKind::kPlan, options, sms), ranks.stream(r));
  });
  measure("dispatch", [&](int32_t r) {
    return launch_dispatch(
        dispatches[at(r)], launch_of(OpKind::kDispatch, options, sms), ranks.stream(r));
  });
  measure("combine", [&](int32_t r) {
    return launch_combine(
        combines[at(r)], launch_of(OpKind::kCombine, options, sms), ranks.stream(r));
  });
}

}  // namespace
}  // namespace jax_ep

int main(int argc, char** argv) {
  using namespace jax_ep;
  check(load_kernels(), "load_kernels");
  const std::string mode = argc > 1 ? argv[1] : "scenarios";
  if (mode == "scenarios") {
    return run_scenarios(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1,
                         argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 200);
  }
  if (argc < 8) return 2;
  ClusterOptions options;
  options.shape.num_ranks = std::atoi(argv[2]);
  options.shape.num_tokens = std::atoi(argv[3]);
  options.hidden = std::atoi(argv[4]);
  options.shape.num_topk = std::atoi(argv[5]);
  options.shape.num_experts = std::atoi(argv[6]);
  options.dtype = DType::kBFloat16;
  for (int i = 8; i < argc; ++i) {
    if (std::strcmp(argv[i], "fp8") == 0) options.wire = Wire::kFloat8E4M3;
    if (std::strcmp(argv[i], "rank") == 0) options.shape.layout = Layout::kRank;
  }
  const EpShape& shape = options.shape;
  options.shape.recv_capacity = shape.num_tokens * shape.num_topk * 5 / 4 + 1024;
  run_times(options, std::atoi(argv[7]));
  return 0;
}
