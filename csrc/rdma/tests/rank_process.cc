// SPDX-License-Identifier: Apache-2.0
#include "csrc/rdma/tests/rank_process.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <span>
#include <thread>

#include "csrc/core/low_latency_fit.h"
#include "csrc/tuning/heuristics.h"

namespace jax_ep {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kTimeoutS = 20.0;  // of a kernel's waits; of those for processes, twice as much

// As the handlers choose kernels, with so many blocks.
class Launcher {
 public:
  Launcher(const ClusterOptions& options,
           int32_t blocks,
           const RankOfScenario& mine,
           cudaStream_t stream)
      : options_(options), blocks_(blocks), mine_(mine), stream_(stream) {}

  [[nodiscard]] cudaError_t launch(const ScenarioOp& op, const RankArrays& arrays) const {
    const RdmaLibrary& library = *rdma_library();
    const RankView& view = mine_.view;
    switch (op.kind) {
      case OpKind::kPlan: return run(library.launch_plan, arrays.plan(view));
      case OpKind::kDispatch: return run(library.launch_dispatch, arrays.dispatch(view));
      case OpKind::kCombine: {
        const CombineParams params = arrays.combine(view);
        if (fits_low_latency(view.layout, params.op, /*spans_domains=*/true)) {
          return run(library.launch_low_latency_combine, params, /*low_latency=*/true);
        }
        return run(library.launch_combine, params);
      }
      case OpKind::kPlanDispatch: {
        const PlanDispatchParams params = arrays.plan_dispatch(view);
        if (fits_low_latency(view.layout, params.op)) {
          return run(library.launch_low_latency_dispatch, params, /*low_latency=*/true);
        }
        // Between domains there is no other kernel that does both.
        const cudaError_t error = run(library.launch_plan, arrays.plan(view));
        return error != cudaSuccess ? error : run(library.launch_dispatch, arrays.dispatch(view));
      }
    }
    return cudaErrorInvalidValue;
  }

 private:
  template <typename Op>
  [[nodiscard]] cudaError_t run(RdmaLaunch<Op> launch,
                                const KernelParams<Op>& params,
                                bool low_latency = false) const {
    return launch(params, mine_.network, shape_of(Op::kKind, low_latency), stream_);
  }
  [[nodiscard]] LaunchShape shape_of(OpKind op, bool low_latency) const {
    const int64_t row_bytes = options_.hidden * size_bytes(options_.dtype);
    const SmBudget sms{.available = blocks_, .requested = blocks_};
    LaunchShape shape =
        low_latency
            ? low_latency_launch_shape(op, options_.shape, row_bytes, sms, /*spans_domains=*/true)
            : internode_launch_shape(op,
                                     options_.shape,
                                     row_bytes,
                                     sms,
                                     plans_by_counts(mine_.network.network.layout));
    shape.num_blocks = blocks_;
    return shape;
  }

  const ClusterOptions& options_;
  const int32_t blocks_;
  const RankOfScenario& mine_;
  const cudaStream_t stream_;
};

}  // namespace

class RankProcess::Memory : public DeviceMemory {
 public:
  Memory(const RankProcess& process, cudaStream_t stream) : process_(process), stream_(stream) {}
  void write(void* to, const void* from, size_t bytes) override {
    copy(to, from, bytes, cudaMemcpyHostToDevice);
  }
  void read(void* to, const void* from, size_t bytes) override {
    copy(to, from, bytes, cudaMemcpyDeviceToHost);
  }
  // After what the stream holds.
  void fill(void* to, std::byte with, size_t bytes) override {
    if (bytes == 0) return;
    const int value = std::to_integer<int>(with);
    process_.check(cudaMemsetAsync(to, value, bytes, stream_), "cudaMemsetAsync");
  }

 private:
  void copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    process_.check(cudaMemcpyAsync(to, from, bytes, kind, stream_), "cudaMemcpyAsync");
    process_.check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  }

  const RankProcess& process_;
  cudaStream_t stream_;
};

void RankProcess::fail(const std::string& what) const {
  std::printf("rank %d: %s\n", rank_, what.c_str());
  std::fflush(stdout);
  shared_.failed = true;
  _exit(1);
}

void RankProcess::check(cudaError_t error, const char* what) const {
  if (error != cudaSuccess) fail(std::string(what) + ": " + cudaGetErrorString(error));
}

void RankProcess::check(const Status& status) const {
  if (!status.ok()) fail(status.message());
}

// Of all processes. Who has come knows what the others have written to the shared memory.
void RankProcess::meet() {
  // RELEASE(meeting): what this process has written. ACQUIRE(meeting) below, by the others.
  shared_.arrived[rank_].store(++meetings_, std::memory_order_release);
  const auto end = Clock::now() + std::chrono::duration<double>(2 * kTimeoutS);
  for (int32_t peer = 0; peer < topology_.num_ranks(); ++peer) {
    while (shared_.arrived[peer].load(std::memory_order_acquire) < meetings_) {
      if (shared_.failed) _exit(1);
      if (Clock::now() > end) fail("rank " + std::to_string(peer) + " has not come in time");
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }
}

DeviceArray RankProcess::allocate(size_t bytes) const {
  void* memory = nullptr;
  const size_t some = std::max<size_t>(bytes, 256);
  check(cudaMalloc(&memory, some), "cudaMalloc");
  check(cudaMemset(memory, 0, some), "cudaMemset");
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  return DeviceArray(static_cast<std::byte*>(memory));
}

void RankProcess::join() {
  const int32_t domain = topology_.domain_of(rank_);
  if (!options_.one_host) {
    const std::string name = "node" + std::to_string(domain);
    if (unshare(CLONE_NEWUTS) != 0 || sethostname(name.data(), name.size()) != 0) {
      fail("has no host name of its own, which takes root: " + std::string(std::strerror(errno)));
    }
  }
  int devices = 0;
  check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
  device_ = domain % devices;
  check(cudaSetDevice(device_), "cudaSetDevice");
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  control_ = allocate(static_cast<size_t>(kControlBytes));
  // An error record, and behind it the waits that take long, and what runs.
  void* words = nullptr;
  const size_t bytes = sizeof *error_ + 8 * size_t{kMaxRanks + kNumChannels};
  check(cudaHostAlloc(&words, bytes, cudaHostAllocMapped), "cudaHostAlloc");
  std::memset(words, 0, bytes);
  error_ = static_cast<ErrorRecord*>(words);
  long_waits_ = reinterpret_cast<uint64_t*>(error_ + 1);
  phases_ = long_waits_ + kMaxRanks;

  check(load_rdma_library(options_.library));
  const RdmaLibrary& library = *rdma_library();
  if (rank_ == 0 && library.make_id(shared_.id) != 0) fail("the library makes no id");
  meet();
  const int error = library.initialize(shared_.id, rank_, topology_.num_ranks());
  if (error != 0 || library.is_initialized() == 0) {
    fail("initialize returned " + std::to_string(error));
  }
  check(library.load_kernels(), "load_kernels");
  meet();
}

void RankProcess::leave() {
  meet();
  rdma_library()->finalize();
  meet();
}

void RankProcess::set_view(RankOfScenario& mine, int32_t chunk_target) const {
  RankView& view = mine.view;
  view.layout = mine.heap.layout();
  view.first_neighbor = topology_.rank_at(topology_.domain_of(rank_), 0);
  view.num_neighbors = topology_.num_scaleup_ranks;
  for (int32_t i = 0; i < view.num_neighbors; ++i) {
    view.heap[view.first_neighbor + i] = mine.neighbors[static_cast<size_t>(i)].base();
  }
  view.control = reinterpret_cast<uint32_t*>(control_.get());
  view.error = error_;
  view.long_waits = long_waits_;
  view.report_ns = 5'000'000'000;
  view.timeout_ns = static_cast<uint64_t>(kTimeoutS * 1e9);
  view.rank = rank_;
  view.num_ranks = topology_.num_ranks();
  view.chunk_target = chunk_target;
}

// As the product makes a group: csrc/runtime/rank_context.cc. But with rings of the scenario's
// sizes, down to one message.
void RankProcess::open(const GroupScenario& group, RankOfScenario& mine) {
  check(SymmetricHeap::allocate(heap_shape(group), DomainLink::kRdma, device_, mine.heap));
  const HeapOwner owner{.nonce = 1, .group_index = 0, .rank = rank_};
  check(mine.heap.export_handle(owner, shared_.handles[rank_]));
  check(cudaMemset(control_.get(), 0, static_cast<size_t>(kControlBytes)), "cudaMemset");
  mine.network.network.layout = make_network_layout(network_shape(group));
  mine.network.network.topology = topology_;
  mine.network.network.phases = phases_;
  check(mine.network_heap.allocate(mine.network.network.layout.total_bytes));
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  meet();
  mine.network.heaps.heap = mine.network_heap.base();
  for (int32_t rank = 0; rank < topology_.num_ranks(); ++rank) mine.network.heaps.pe[rank] = rank;
  const int32_t first = topology_.rank_at(topology_.domain_of(rank_), 0);
  for (int32_t i = 0; i < topology_.num_scaleup_ranks; ++i) {
    mine.network.network.heap[i] = mine.network_heap.map(first + i);
    mine.neighbors.emplace_back();
    check(PeerMapping::map(shared_.handles[first + i], device_, mine.neighbors.back()));
  }
  check_mapped(mine);
  set_view(mine, group.chunk_target);
  meet();
}

// What is not mapped goes over the network.
void RankProcess::check_mapped(const RankOfScenario& mine) const {
  for (int32_t rank = 0; rank < topology_.num_ranks(); ++rank) {
    const bool is_neighbor = topology_.domain_of(rank) == topology_.domain_of(rank_);
    const bool is_mapped = mine.network_heap.map(rank) != nullptr;
    if (is_mapped == (is_neighbor || options_.one_host)) continue;
    fail("NVSHMEM " + std::string(is_mapped ? "maps" : "does not map") + " the memory of rank " +
         std::to_string(rank));
  }
}

void RankProcess::close(RankOfScenario& mine) {
  meet();
  mine.neighbors.clear();
  mine.network_heap.release();
  meet();
}

void RankProcess::synchronize() const {
  const cudaError_t error = cudaStreamSynchronize(stream_);
  if (error == cudaSuccess) return;
  if (error_->written != 0) fail(describe(*error_, kTimeoutS));
  check(error, "a kernel");
}

std::string RankProcess::run_step(const ScenarioStep& step,
                                  uint32_t blocks,
                                  const RankOfScenario& mine) {
  Problem problem(step.options, step.x_format, step.rows_format);
  if (!problem.ok) return "the CPU backend failed";
  Memory memory(*this, stream_);
  const DeviceArray storage = allocate(RankArrays(problem, rank_, nullptr).bytes());
  const RankArrays arrays(problem, rank_, storage.get());
  arrays.upload(memory);
  const Launcher launcher(step.options, static_cast<int32_t>(blocks), mine, stream_);
  for (const ScenarioOp& op : step.ops) {
    if (op.half == Half::kSecond) continue;  // between domains its first half does it all
    // Nothing that an earlier operation wrote can be taken for this one's.
    for (const std::span<std::byte> result : arrays.results_of(op.kind)) {
      memory.fill(result.data(), kUntouchedByte, result.size());
    }
    const bool both = op.kind == OpKind::kPlanDispatch;
    if (op.kind == OpKind::kDispatch || both) arrays.mark_rows(memory);
    check(launcher.launch(op, arrays), describe(op).c_str());
  }
  synchronize();
  for (const ScenarioOp& op : step.ops) {
    std::string error;
    const bool both = op.kind == OpKind::kPlanDispatch;
    if (op.kind == OpKind::kPlan || both) error = arrays.check_plan(memory);
    if ((op.kind == OpKind::kDispatch || both) && error.empty()) {
      error = arrays.check_dispatch(memory);
    }
    if (op.kind == OpKind::kCombine) error = arrays.check_combine(memory);
    if (!error.empty()) return describe(op) + ": " + error;
  }
  return {};
}

void RankProcess::run(uint64_t seed, const Scenario& scenario) {
  RankOfScenario mine;
  open(scenario.groups[0], mine);
  for (const ScenarioStep& step : scenario.groups[0].steps) {
    const std::string error = run_step(step, scenario.blocks, mine);
    if (!error.empty()) {
      fail("seed " + std::to_string(seed) + ": " + error + "\n" + describe(scenario));
    }
  }
  close(mine);
}

}  // namespace jax_ep
