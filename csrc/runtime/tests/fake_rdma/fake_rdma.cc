// SPDX-License-Identifier: Apache-2.0
// Stands for the library of csrc/rdma in tests: it keeps a log and does as it is told.
//   JAX_EP_FAKE_RDMA_LOG  file to which each call adds a line
//   JAX_EP_FAKE_RDMA      what goes wrong, words: "abi", "no_id", "init_fails", "init_lies",
//                         "init_hangs", "init_waits", "no_memory", "no_map", "asymmetric",
//                         "finalize_hangs", "version=3.9.1"; "stuck": a kernel begins, and that is
//                         all
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <thread>

#include "csrc/launch/rdma_library.h"

namespace jax_ep {
namespace {

constexpr int32_t kIdBytes = 128;
bool initialized = false;
int32_t own_pe = 0;
int32_t all_pes = 1;

std::string told() {
  const char* const text = std::getenv("JAX_EP_FAKE_RDMA");
  return text == nullptr ? "" : text;
}
bool told(const char* word) { return told().find(word) != std::string::npos; }

template <typename... Values>
void log(const char* format, Values... values) {
  const char* const path = std::getenv("JAX_EP_FAKE_RDMA_LOG");
  if (path == nullptr) return;
  std::FILE* const file = std::fopen(path, "a");
  if (file == nullptr) std::abort();
  std::fprintf(file, format, values...);
  std::fputc('\n', file);
  std::fclose(file);
}

// As calls of NVSHMEM that take all processes, which must make the same in the same order. There
// each waits for ever; here the process is ended.
void meet(const char* call, size_t what) {
  static int number = 0;
  const char* const path = std::getenv("JAX_EP_FAKE_RDMA_LOG");
  if (path == nullptr) return;
  const std::string folder = std::filesystem::path(path).parent_path();
  const auto file = [&](int32_t pe) {
    return folder + "/call" + std::to_string(number) + "-" + call + "-" + std::to_string(what) +
           "-" + std::to_string(pe);
  };
  std::fclose(std::fopen(file(own_pe).c_str(), "w"));
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(5);
  for (int32_t pe = 0; pe < all_pes; ++pe) {
    while (!std::filesystem::exists(file(pe))) {
      if (std::chrono::steady_clock::now() > end) {
        std::fprintf(
            stderr, "fake_rdma: process %d makes call %d, %s, alone\n", own_pe, number, call);
        std::abort();
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  }
  ++number;
}

int loaded_version(int32_t version[3]) {
  version[0] = 3;
  version[1] = 4;
  version[2] = 5;
  const std::string text = told();
  const size_t at = text.find("version=");
  if (at != std::string::npos) {
    std::sscanf(text.c_str() + at, "version=%d.%d.%d", &version[0], &version[1], &version[2]);
  }
  return 0;
}

int make_id(void* id) {
  std::memset(id, 'i', kIdBytes);
  return told("no_id") ? 7 : 0;
}

int initialize(const void* id, int32_t pe, int32_t num_pes) {
  log("initialize id=%.4s pe=%d num_pes=%d", static_cast<const char*>(id), pe, num_pes);
  if (told("init_hangs")) std::this_thread::sleep_for(std::chrono::hours(1));
  if (told("init_fails")) return 7;
  own_pe = pe;
  all_pes = num_pes;
  if (told("init_waits"))
    std::this_thread::sleep_for(std::chrono::hours(1));  // for one that failed
  meet("initialize", 0);
  initialized = !told("init_lies");
  return 0;
}

int is_initialized() { return initialized ? 1 : 0; }

int finalize() {
  log("finalize");
  if (told("finalize_hangs")) std::this_thread::sleep_for(std::chrono::hours(1));
  meet("finalize", 0);
  initialized = false;
  return 0;
}

void* allocate(size_t bytes) {
  log("allocate bytes=%zu", bytes);
  meet("allocate", bytes);
  if (told("no_memory") && bytes > 256) return nullptr;
  // One after the other, and never again: at the same distances in all processes.
  constexpr size_t kArenaBytes = size_t{1} << 28;
  static auto* const arena = static_cast<char*>(std::calloc(kArenaBytes, 1));
  static size_t used = 0;
  if (told("asymmetric") && own_pe == 0 && bytes > 256) used += 512;
  char* const memory = arena + used;
  used += (bytes + 255) / 256 * 256;
  if (used > kArenaBytes) std::abort();
  return memory;
}

void release(void* /*memory*/) {
  log("release");
  meet("release", 0);
}

// As if each process's part lay behind the one of the process before.
void* map(void* memory, int32_t pe) {
  return told("no_map") ? nullptr : static_cast<char*>(memory) + int64_t{pe} * (int64_t{1} << 40);
}

cudaError_t load_kernels() {
  log("load_kernels");
  return cudaSuccess;
}

template <typename Params>
cudaError_t launch(const char* operation, const Params& params, const RdmaNetwork& network) {
  if (told("stuck")) {
    const auto op = static_cast<uint32_t>(Params().op.kKind);
    // Where a device stores it, which is another mapping of the host's memory.
    std::atomic_ref<uint64_t>(network.network.phases[0])
        .store(pack(KernelPhase{.epoch = 1, .op = op, .running = true}), std::memory_order_relaxed);
  }
  const Topology& topology = network.network.topology;
  std::string pes;
  std::string parts;  // of the domain's ranks, in multiples of what `map` adds
  for (int32_t rank = 0; rank < topology.num_ranks(); ++rank) {
    pes.append(rank > 0 ? "," : "").append(std::to_string(network.heaps.pe[rank]));
  }
  for (int32_t index = 0; index < topology.num_scaleup_ranks; ++index) {
    const int64_t apart = network.network.heap[index] - network.heaps.heap;
    parts.append(index > 0 ? "," : "").append(std::to_string(apart >> 40));
  }
  log("launch %s rank=%d domains=%d pes=%s parts=%s",
      operation,
      params.view.rank,
      topology.num_scaleout_ranks,
      pes.c_str(),
      parts.c_str());
  return cudaSuccess;
}

cudaError_t launch_plan(const PlanParams& params,
                        const RdmaNetwork& network,
                        const LaunchShape& /*shape*/,
                        cudaStream_t /*stream*/) {
  return launch("plan", params, network);
}
cudaError_t launch_dispatch(const DispatchParams& params,
                            const RdmaNetwork& network,
                            const LaunchShape& /*shape*/,
                            cudaStream_t /*stream*/) {
  return launch("dispatch", params, network);
}
cudaError_t launch_combine(const CombineParams& params,
                           const RdmaNetwork& network,
                           const LaunchShape& /*shape*/,
                           cudaStream_t /*stream*/) {
  return launch("combine", params, network);
}
cudaError_t launch_low_latency_dispatch(const PlanDispatchParams& params,
                                        const RdmaNetwork& network,
                                        const LaunchShape& /*shape*/,
                                        cudaStream_t /*stream*/) {
  return launch("low_latency_dispatch", params, network);
}
cudaError_t launch_low_latency_combine(const CombineParams& params,
                                       const RdmaNetwork& network,
                                       const LaunchShape& /*shape*/,
                                       cudaStream_t /*stream*/) {
  return launch("low_latency_combine", params, network);
}

}  // namespace
}  // namespace jax_ep

extern "C" __attribute__((visibility("default"))) const jax_ep::RdmaLibrary* jax_ep_rdma_library() {
  using namespace jax_ep;  // NOLINT
  static const RdmaLibrary library = {.abi = told("abi") ? kRdmaAbi + 1 : kRdmaAbi,
                                      .params_bytes = kRdmaParamsBytes,
                                      .network_bytes = sizeof(RdmaNetwork),
                                      .id_bytes = kIdBytes,
                                      .built_version = {3, 4, 5},
                                      .loaded_version = loaded_version,
                                      .make_id = make_id,
                                      .initialize = initialize,
                                      .is_initialized = is_initialized,
                                      .finalize = finalize,
                                      .allocate = allocate,
                                      .release = release,
                                      .map = map,
                                      .load_kernels = load_kernels,
                                      .launch_plan = launch_plan,
                                      .launch_dispatch = launch_dispatch,
                                      .launch_combine = launch_combine,
                                      .launch_low_latency_dispatch = launch_low_latency_dispatch,
                                      .launch_low_latency_combine = launch_low_latency_combine};
  return &library;
}
