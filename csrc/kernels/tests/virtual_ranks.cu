// SPDX-License-Identifier: Apache-2.0
// All ranks of a group in one process, a heap and a stream each, on one GPU or shared out among
// several. Runs the simulator's random scenarios on the hardware, and times the kernels.
//   virtual_ranks scenarios [FIRST LAST [GPUS [KIND]]]; KIND: low-latency,
//                           internode, by-counts, or internode-low-latency
//   virtual_ranks time RANKS TOKENS HIDDEN TOPK EXPERTS SMS [fp8] [rank] [products] [gpus=N]
//                [senders=N] [tail=N] [domains=N]
// Domains are joined by mapped memory.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "csrc/core/float_formats.h"
#include "csrc/core/low_latency_fit.h"
#include "csrc/launch/launch.h"
#include "csrc/testing/kernel_arrays.h"
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

// The GPU of a rank, of so many: neighboring ranks share one.
int gpu_of(int32_t rank, int32_t num_ranks, int num_gpus) { return rank * num_gpus / num_ranks; }

void use_gpu(int gpu) { check(cudaSetDevice(gpu), "cudaSetDevice"); }

// Makes the kernels known to each GPU, and its memory to the others.
void open_gpus(int num_gpus) {
  for (int gpu = 0; gpu < num_gpus; ++gpu) {
    use_gpu(gpu);
    check(load_kernels(), "load_kernels");
    check(load_loopback_kernels(), "load_loopback_kernels");
    for (int peer = 0; peer < num_gpus; ++peer) {
      if (peer != gpu) check(cudaDeviceEnablePeerAccess(peer, 0), "cudaDeviceEnablePeerAccess");
    }
  }
}

// A kernel: what cudaMemsetAsync does under a sanitizer waits for other streams.
__global__ void fill_bytes(std::byte* to, std::byte with, size_t bytes) {
  for (size_t i = threadIdx.x; i < bytes; i += blockDim.x) to[i] = with;
}

class GpuMemory : public DeviceMemory {
 public:
  // Fills come after what the stream holds, and before what is put into it next.
  explicit GpuMemory(cudaStream_t stream = nullptr) : stream_(stream) {}
  void write(void* to, const void* from, size_t bytes) override {
    check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "write");
  }
  void read(void* to, const void* from, size_t bytes) override {
    check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "read");
  }
  void fill(void* to, std::byte with, size_t bytes) override {
    if (bytes == 0) return;
    fill_bytes<<<1, 512, 0, stream_>>>(static_cast<std::byte*>(to), with, bytes);
    check(cudaGetLastError(), "fill");
  }

 private:
  cudaStream_t stream_;
};

class VirtualRanks {
 public:
  VirtualRanks(const GroupScenario& group, int num_gpus)
      : VirtualRanks(heap_shape(group), group, num_gpus) {}

  VirtualRanks(const HeapShape& shape, const GroupScenario& group, int num_gpus)
      : layout_(make_heap_layout(shape)),
        num_gpus_(num_gpus),
        chunk_target_(group.chunk_target),
        num_neighbors_(shape.num_ranks / group.num_domains) {
    if (group.num_domains > 1) {
      topology_ = network_shape(group).topology;
      network_ = make_network_layout(network_shape(group));
    }
    constexpr unsigned kFlags = cudaHostAllocMapped | cudaHostAllocPortable;
    check(cudaHostAlloc(&words_, sizeof(*words_) * kMaxRanks, kFlags), "host");
    std::memset(static_cast<void*>(words_), 0, sizeof(*words_) * kMaxRanks);
    for (int32_t rank = 0; rank < shape.num_ranks; ++rank) {
      use_gpu(gpu_of(rank, shape.num_ranks, num_gpus));
      controls_.push_back(allocate(static_cast<size_t>(kControlBytes)));
      heaps_.push_back(allocate(static_cast<size_t>(layout_.total_bytes)));
      if (spans_domains()) {
        network_heaps_.push_back(allocate(static_cast<size_t>(network_.total_bytes)));
      }
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
    view.first_neighbor = rank / num_neighbors_ * num_neighbors_;
    view.num_neighbors = num_neighbors_;
    for (int32_t i = 0; i < num_neighbors_; ++i) {
      const int32_t peer = view.first_neighbor + i;
      view.heap[peer] = heaps_[static_cast<size_t>(peer)].get();
    }
    view.control = reinterpret_cast<uint32_t*>(controls_[static_cast<size_t>(rank)].get());
    view.error = &words_[rank].error;
    view.long_waits = words_[rank].long_waits;
    view.report_ns = 1'000'000'000;
    view.timeout_ns = 5'000'000'000;
    view.rank = rank;
    view.chunk_target = chunk_target_;
    view.num_ranks = static_cast<int32_t>(heaps_.size());
    return view;
  }
  [[nodiscard]] bool spans_domains() const { return topology_.num_scaleout_ranks > 1; }
  [[nodiscard]] LoopbackNetwork network(int32_t rank) const {
    LoopbackNetwork found{};
    found.network.layout = network_;
    found.network.topology = topology_;
    found.network.phases = words_[rank].phases;
    found.heaps.rank = rank;
    for (int32_t peer = 0; peer < num_ranks(); ++peer) {
      std::byte* const heap = network_heaps_[static_cast<size_t>(peer)].get();
      found.heaps.heap[peer] = heap;
      if (topology_.domain_of(peer) == topology_.domain_of(rank)) {
        found.network.heap[topology_.index_in_domain(peer)] = heap;
      }
    }
    return found;
  }
  // For what the calling thread does next for a rank.
  void use_gpu_of(int32_t rank) const { use_gpu(gpu_of(rank, num_ranks(), num_gpus_)); }
  // Of all GPUs.
  void synchronize_uploads() const {
    for (int gpu = 0; gpu < num_gpus_; ++gpu) {
      use_gpu(gpu);
      check(cudaDeviceSynchronize(), "upload");
    }
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
    check_phases();
  }

 private:
  // That kernels between domains have told the host of their beginning and of their end.
  void check_phases() const {
    for (int32_t rank = 0; rank < num_ranks() && spans_domains(); ++rank) {
      uint32_t epochs = 0;
      for (const uint64_t word : words_[rank].phases) {
        const KernelPhase phase = unpack_kernel_phase(word);
        epochs += phase.epoch;
        if (phase.running) std::printf("rank %d says that exchange %u runs\n", rank, phase.epoch);
        if (phase.running) std::exit(1);
      }
      if (epochs > 0) continue;
      std::printf("rank %d has not said that a kernel ran\n", rank);
      std::exit(1);
    }
  }

  struct HostWords {
    ErrorRecord error;
    uint64_t long_waits[kMaxRanks];
    uint64_t phases[kNumChannels];
  };

  HeapLayout layout_;
  int num_gpus_;
  int32_t chunk_target_;
  int32_t num_neighbors_;
  Topology topology_;
  NetworkLayout network_{};
  std::vector<DeviceArray> heaps_;
  std::vector<DeviceArray> network_heaps_;  // where there are several domains
  std::vector<cudaStream_t> streams_;
  std::vector<DeviceArray> controls_;
  HostWords* words_ = nullptr;  // by rank
};

// What tuning chooses, with as many blocks as are requested.
LaunchShape launch_of(OpKind op, const ClusterOptions& options, const SmBudget& sms) {
  const int64_t row_bytes = options.hidden * size_bytes(options.dtype);
  LaunchShape shape = launch_shape(op, options.shape, row_bytes, sms, options.wire);
  shape.num_blocks = sms.requested;
  return shape;
}

LaunchShape low_latency_launch_of(OpKind op,
                                  const ClusterOptions& options,
                                  const SmBudget& sms,
                                  bool spans_domains = false) {
  const int64_t row_bytes = options.hidden * size_bytes(options.dtype);
  return low_latency_launch_shape(op, options.shape, row_bytes, sms, spans_domains);
}

LaunchShape internode_launch_of(OpKind op,
                                const ClusterOptions& options,
                                const SmBudget& sms,
                                const LoopbackNetwork& network) {
  const int64_t row_bytes = options.hidden * size_bytes(options.dtype);
  LaunchShape shape = internode_launch_shape(
      op, options.shape, row_bytes, sms, plans_by_counts(network.network.layout));
  shape.num_blocks = sms.requested;
  return shape;
}

// --- scenarios -----------------------------------------------------------------------------------

cudaError_t launch_internode(const ScenarioOp& op,
                             const RankArrays& arrays,
                             const RankView& view,
                             const LoopbackNetwork& network,
                             const ClusterOptions& options,
                             const SmBudget& sms,
                             cudaStream_t stream) {
  if (op.half == Half::kSecond) return cudaSuccess;  // its first half did all
  const auto launch = [&](const auto& params) {
    const OpKind kind = decltype(params.op)::kKind;
    const LaunchShape shape = internode_launch_of(kind, options, sms, network);
    return launch_over_loopback(params, network, shape, stream);
  };
  const auto launch_low_latency = [&](const auto& params) {
    LaunchShape shape = low_latency_launch_of(op.kind, options, sms, /*spans_domains=*/true);
    shape.num_blocks = sms.requested;
    return launch_low_latency_over_loopback(params, network, shape, stream);
  };
  switch (op.kind) {
    case OpKind::kPlan: return launch(arrays.plan(view));
    case OpKind::kDispatch: return launch(arrays.dispatch(view));
    case OpKind::kCombine: {
      const CombineParams params = arrays.combine(view);
      if (fits_low_latency(view.layout, params.op, true)) return launch_low_latency(params);
      return launch(params);
    }
    case OpKind::kPlanDispatch: {
      const PlanDispatchParams params = arrays.plan_dispatch(view);
      if (fits_low_latency(view.layout, params.op)) return launch_low_latency(params);
      const cudaError_t error = launch(arrays.plan(view));
      return error != cudaSuccess ? error : launch(arrays.dispatch(view));
    }
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_op(const ScenarioOp& op,
                      const RankArrays& arrays,
                      const RankView& view,
                      const ScenarioStep& step,
                      const Scenario& scenario,
                      cudaStream_t stream) {
  const auto blocks = static_cast<int32_t>(scenario.blocks);
  const SmBudget sms{.available = blocks, .requested = blocks};
  LaunchShape shape = launch_of(op.kind, step.options, sms);
  LaunchShape low_latency_shape = low_latency_launch_of(op.kind, step.options, sms);
  low_latency_shape.num_blocks = blocks;
  const auto tail_blocks = static_cast<int32_t>(scenario.tail_blocks);
  const auto in_halves = [&](auto& params) {
    if (!arrays.has_halves(op.kind, view)) return false;
    params.half = op.half;
    params.ticket = arrays.ticket(op.flight);
    return true;
  };
  const bool did_all = op.half == Half::kSecond;  // its first half, of what is in one piece
  switch (op.kind) {
    case OpKind::kPlan: return launch_plan(arrays.plan(view), shape, stream);
    case OpKind::kDispatch:
      shape.num_tail_blocks = tail_blocks;
      return launch_dispatch(arrays.dispatch(view), shape, stream);
    case OpKind::kCombine: {
      CombineParams params = arrays.combine(view);
      if (in_halves(params)) return launch_low_latency_combine(params, low_latency_shape, stream);
      return did_all ? cudaSuccess : launch_combine(params, shape, stream);
    }
    case OpKind::kPlanDispatch: {
      PlanDispatchParams params = arrays.plan_dispatch(view);
      if (in_halves(params)) return launch_low_latency_dispatch(params, low_latency_shape, stream);
      shape.num_tail_blocks = tail_blocks;
      return did_all ? cudaSuccess : launch_plan_dispatch(params, shape, stream);
    }
  }
  return cudaErrorInvalidValue;
}

// Of what a kernel is about to write, nothing that an earlier one wrote can be taken for its own.
void forget_results(const ScenarioOp& op,
                    const RankArrays& arrays,
                    const RankView& view,
                    cudaStream_t stream) {
  if (!arrays.writes_results(op.kind, op.half, view)) return;
  GpuMemory memory(stream);
  for (const std::span<std::byte> result : arrays.results_of(op.kind)) {
    memory.fill(result.data(), kUntouchedByte, result.size());
  }
  if (op.kind == OpKind::kDispatch || op.kind == OpKind::kPlanDispatch) arrays.mark_rows(memory);
}

std::string run_step(VirtualRanks& ranks, const ScenarioStep& step, const Scenario& scenario) {
  Problem problem(step.options, step.x_format, step.rows_format);
  if (!problem.ok) return "the CPU backend failed";
  GpuMemory memory;
  std::vector<DeviceArray> storage;
  std::vector<RankArrays> arrays;
  for (int32_t rank = 0; rank < ranks.num_ranks(); ++rank) {
    ranks.use_gpu_of(rank);
    storage.push_back(allocate(RankArrays(problem, rank, nullptr).bytes()));
    arrays.emplace_back(problem, rank, storage.back().get());
    arrays.back().upload(memory);
  }
  ranks.synchronize_uploads();
  const int32_t absent = step.options.absent_rank;
  const auto for_each_rank = [&](const auto& use) {
    for (int32_t rank = 0; rank < ranks.num_ranks(); ++rank) {
      if (rank == absent) continue;
      const RankView view = ranks.view(rank);
      ranks.use_gpu_of(rank);
      use(arrays[static_cast<size_t>(rank)], view, ranks.stream(rank));
    }
  };
  for (const ScenarioOp& op : step.ops) {
    // First on all ranks: under a sanitizer the host waits there for what the stream holds, and a
    // kernel in it for the ranks whose turn is yet to come.
    for_each_rank([&](const RankArrays& mine, const RankView& view, cudaStream_t stream) {
      forget_results(op, mine, view, stream);
    });
    for_each_rank([&](const RankArrays& mine, const RankView& view, cudaStream_t stream) {
      if (ranks.spans_domains()) {
        const auto blocks = static_cast<int32_t>(scenario.blocks);
        const SmBudget sms{.available = blocks, .requested = blocks};
        const LoopbackNetwork network = ranks.network(view.rank);
        check(launch_internode(op, mine, view, network, step.options, sms, stream),
              describe(op).c_str());
        return;
      }
      check(launch_op(op, mine, view, step, scenario, stream), describe(op).c_str());
    });
  }
  ranks.synchronize();
  for (int32_t rank = 0; rank < ranks.num_ranks(); ++rank) {
    if (rank == absent) continue;
    const RankArrays& mine = arrays[static_cast<size_t>(rank)];
    std::string error;
    for (const ScenarioOp& of_step : step.ops) {
      if (!error.empty()) break;
      const OpKind op = of_step.kind;
      const bool both = op == OpKind::kPlanDispatch;
      if (op == OpKind::kPlan || both) error = mine.check_plan(memory);
      if ((op == OpKind::kDispatch || both) && error.empty()) error = mine.check_dispatch(memory);
      if (op == OpKind::kCombine) error = mine.check_combine(memory);
    }
    if (!error.empty()) return "rank " + std::to_string(rank) + ": " + error;
  }
  return {};
}

int run_scenarios(uint64_t first, uint64_t last, int num_gpus, const std::string& of) {
  for (uint64_t seed = first; seed <= last; ++seed) {
    const bool by_counts = of == "by-counts";
    const Scenario scenario =
        random_scenario(seed,
                        {.max_tokens = seed % 4 == 0 ? 300 : 20,
                         .steps = 4,
                         .low_latency = of.ends_with("low-latency"),
                         .internode = by_counts || of.starts_with("internode"),
                         .plans_by_counts = by_counts});
    const GroupScenario& group = scenario.groups[0];
    VirtualRanks ranks(group, num_gpus);
    for (const ScenarioStep& step : group.steps) {
      const std::string error = run_step(ranks, step, scenario);
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

// Distinct experts for each token, drawn alike.
std::vector<int32_t> random_routing(const EpShape& shape, std::mt19937& random) {
  std::vector<int32_t> experts(static_cast<size_t>(shape.num_experts));
  std::iota(experts.begin(), experts.end(), 0);
  std::vector<int32_t> routing;
  for (int64_t token = 0; token < shape.num_tokens; ++token) {
    for (size_t k = 0; k < static_cast<size_t>(shape.num_topk); ++k) {
      std::swap(experts[k], experts[k + random() % (experts.size() - k)]);
      routing.push_back(experts[k]);
    }
  }
  return routing;
}

// The ops of all ranks of one layer, on arrays that nobody looks at.
class TimedRanks {
 public:
  // senders: warps of a block that send first; 0: as tuning says. tail: SMs of
  // dispatch's; -1: likewise.
  TimedRanks(
      const ClusterOptions& options, int num_gpus, int32_t senders, int32_t tail, int32_t domains)
      : options_(options),
        num_gpus_(num_gpus),
        senders_(senders),
        tail_(tail),
        shape_(options.shape),
        ranks_(GroupScenario{.max_tokens = shape_.num_tokens,
                             .low_latency_tokens =
                                 shape_.num_tokens <= kMaxLowLatencyTokens ? shape_.num_tokens : 0,
                             .num_domains = domains,
                             .window = 8,
                             .steps = {{.options = options}}},
               num_gpus) {
    std::mt19937 random(1);
    for (int32_t rank = 0; rank < shape_.num_ranks; ++rank) {
      ranks_.use_gpu_of(rank);
      add(rank, random);
    }
    ranks_.synchronize_uploads();
  }

  void time(int32_t sms) {
    const auto at = [](int32_t rank) { return static_cast<size_t>(rank); };
    if (ranks_.spans_domains()) return time_internode(sms);
    time("plan", [&](int32_t r) {
      return launch_plan(plans_[at(r)], launch_on(OpKind::kPlan, sms), ranks_.stream(r));
    });
    time("dispatch", [&](int32_t r) {
      return launch_dispatch(
          dispatches_[at(r)], launch_on(OpKind::kDispatch, sms), ranks_.stream(r));
    });
    time("plan_dispatch", [&](int32_t r) {
      return launch_plan_dispatch(
          plan_dispatches_[at(r)], launch_on(OpKind::kPlanDispatch, sms), ranks_.stream(r));
    });
    time("combine", [&](int32_t r) {
      return launch_combine(combines_[at(r)], launch_on(OpKind::kCombine, sms), ranks_.stream(r));
    });
    if (!fits_low_latency(ranks_.view(0).layout, combines_[0].op)) return;
    const SmBudget budget{.available = sms, .requested = sms};
    time("low latency: dispatch", [&](int32_t r) {
      const LaunchShape shape = low_latency_launch_of(OpKind::kPlanDispatch, options_, budget);
      return launch_low_latency_dispatch(plan_dispatches_[at(r)], shape, ranks_.stream(r));
    });
    time("low latency: combine", [&](int32_t r) {
      const LaunchShape shape = low_latency_launch_of(OpKind::kCombine, options_, budget);
      return launch_low_latency_combine(combines_[at(r)], shape, ranks_.stream(r));
    });
  }

 private:
  void time_internode(int32_t sms) {
    const auto time_op = [&](const char* name, OpKind op, const auto& params) {
      const LaunchShape shape = internode_launch_of(
          op, options_, {.available = sms, .requested = sms}, ranks_.network(0));
      time(name, [&](int32_t r) {
        return launch_over_loopback(
            params[static_cast<size_t>(r)], ranks_.network(r), shape, ranks_.stream(r));
      });
    };
    time_op("between domains: plan", OpKind::kPlan, plans_);
    time_op("between domains: dispatch", OpKind::kDispatch, dispatches_);
    time_op("between domains: combine", OpKind::kCombine, combines_);
  }

  [[nodiscard]] LaunchShape launch_on(OpKind op, int32_t sms) const {
    const int32_t available = std::max(132 * num_gpus_ / shape_.num_ranks, sms);
    LaunchShape shape =
        launch_of(op, options_, {.available = available, .requested = sms, .tail = tail_});
    if (senders_ > 0 && shape.num_senders > 0) shape.num_senders = senders_;
    return shape;
  }

  // Combine reads what dispatch has written; but for the routing and x, arrays start as zeros.
  void add(int32_t rank, std::mt19937& random) {
    const ExchangeSizes sizes = {.shape = shape_,
                                 .hidden = options_.hidden,
                                 .num_scalars = shape_.num_topk,
                                 .domain_size = options_.domain_size,
                                 .dtype = options_.dtype,
                                 .wire = options_.wire,
                                 .zero_fill = false,
                                 .row_weights = options_.row_weights,
                                 .row_dots = options_.row_dots,
                                 .y_is_rows = !options_.row_dots,
                                 .weights_are_row_scalars = true};
    storage_.push_back(allocate(KernelArrays(sizes, nullptr).bytes()));
    const KernelArrays arrays(sizes, storage_.back().get());
    GpuMemory memory;
    memory.write(arrays.program_rank.data(), &rank, sizeof rank);
    const std::vector<int32_t> routing = random_routing(shape_, random);
    memory.write(arrays.topk_idx.data(), routing.data(), arrays.topk_idx.size_bytes());
    fill_with_normals(arrays.x.data(), std::ssize(arrays.x));
    const RankView view = ranks_.view(rank);
    plans_.push_back(arrays.plan(view));
    dispatches_.push_back(arrays.dispatch(view));
    plan_dispatches_.push_back(arrays.plan_dispatch(view));
    combines_.push_back(arrays.combine(view));
    combines_.back().op.num_scalars = 0;  // no weights travel back
  }

  // Rounds are replayed from one CUDA graph a rank: the host's launches cost nothing, and the
  // operations prove that they can be captured.
  template <typename Launch>
  void time(const char* name, const Launch& launch) {
    constexpr int kRounds = 50;
    std::vector<cudaGraphExec_t> graphs;
    for (int32_t rank = 0; rank < shape_.num_ranks; ++rank) {
      ranks_.use_gpu_of(rank);
      cudaStream_t stream = ranks_.stream(rank);
      cudaGraph_t graph = nullptr;
      check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
      for (int round = 0; round < kRounds; ++round) check(launch(rank), name);
      check(cudaStreamEndCapture(stream, &graph), "capture");
      check(cudaGraphInstantiate(&graphs.emplace_back(), graph), "instantiate");
      check(cudaGraphDestroy(graph), "destroy");
    }
    (void)replay(name, graphs);  // warms up
    const double ms = replay(name, graphs);
    for (cudaGraphExec_t graph : graphs) check(cudaGraphExecDestroy(graph), "destroy");
    std::printf("  %-22s %8.1f us\n", name, ms * 1e3 / kRounds);
  }

  // Milliseconds of the slowest rank.
  double replay(const char* name, const std::vector<cudaGraphExec_t>& graphs) {
    std::vector<cudaEvent_t> starts(graphs.size());
    std::vector<cudaEvent_t> ends(graphs.size());
    for (size_t r = 0; r < graphs.size(); ++r) {
      ranks_.use_gpu_of(static_cast<int32_t>(r));
      check(cudaEventCreate(&starts[r]), "event");
      check(cudaEventCreate(&ends[r]), "event");
    }
    for (size_t r = 0; r < graphs.size(); ++r) {
      ranks_.use_gpu_of(static_cast<int32_t>(r));
      cudaStream_t stream = ranks_.stream(static_cast<int32_t>(r));
      check(cudaEventRecord(starts[r], stream), "record");
      check(cudaGraphLaunch(graphs[r], stream), name);
      check(cudaEventRecord(ends[r], stream), "record");
    }
    ranks_.synchronize();
    float slowest = 0;
    for (size_t r = 0; r < graphs.size(); ++r) {
      float ms = 0;
      check(cudaEventElapsedTime(&ms, starts[r], ends[r]), "elapsed");
      slowest = std::max(slowest, ms);
      check(cudaEventDestroy(starts[r]), "destroy");
      check(cudaEventDestroy(ends[r]), "destroy");
    }
    return static_cast<double>(slowest);
  }

  const ClusterOptions options_;
  const int num_gpus_;
  const int32_t senders_;
  const int32_t tail_;
  const EpShape shape_;
  VirtualRanks ranks_;
  std::vector<DeviceArray> storage_;
  std::vector<PlanParams> plans_;
  std::vector<DispatchParams> dispatches_;
  std::vector<PlanDispatchParams> plan_dispatches_;
  std::vector<CombineParams> combines_;
};

}  // namespace
}  // namespace jax_ep

int main(int argc, char** argv) {
  using namespace jax_ep;
  const std::string mode = argc > 1 ? argv[1] : "scenarios";
  if (mode == "scenarios") {
    const int num_gpus = argc > 4 ? std::atoi(argv[4]) : 1;
    open_gpus(num_gpus);
    return run_scenarios(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1,
                         argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 200,
                         num_gpus,
                         argc > 5 ? argv[5] : "");
  }
  if (argc < 8) return 2;
  ClusterOptions options;
  options.shape.num_ranks = std::atoi(argv[2]);
  options.shape.num_tokens = std::atoi(argv[3]);
  options.hidden = std::atoi(argv[4]);
  options.shape.num_topk = std::atoi(argv[5]);
  options.shape.num_experts = std::atoi(argv[6]);
  options.dtype = DType::kBFloat16;
  int num_gpus = 1;
  int32_t senders = 0;
  int32_t tail = -1;
  int32_t domains = 1;
  for (int i = 8; i < argc; ++i) {
    if (std::strcmp(argv[i], "fp8") == 0) options.wire = Wire::kFloat8E4M3;
    if (std::strcmp(argv[i], "rank") == 0) options.shape.layout = Layout::kRank;
    if (std::strcmp(argv[i], "products") == 0) options.row_weights = options.row_dots = true;
    if (std::strncmp(argv[i], "gpus=", 5) == 0) num_gpus = std::atoi(argv[i] + 5);
    if (std::strncmp(argv[i], "senders=", 8) == 0) senders = std::atoi(argv[i] + 8);
    if (std::strncmp(argv[i], "tail=", 5) == 0) tail = std::atoi(argv[i] + 5);
    if (std::strncmp(argv[i], "domains=", 8) == 0) domains = std::atoi(argv[i] + 8);
  }
  open_gpus(num_gpus);
  const EpShape& shape = options.shape;
  options.shape.recv_capacity = shape.num_tokens * shape.num_topk * 5 / 4 + 1024;
  const int sms = std::atoi(argv[7]);
  std::printf("%s, %d SMs a rank, %d GPUs\n", describe(options).c_str(), sms, num_gpus);
  if (domains > 1) options.domain_size = shape.num_ranks / domains;
  TimedRanks(options, num_gpus, senders, tail, domains).time(sms);
  return 0;
}
