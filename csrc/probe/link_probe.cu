// SPDX-License-Identifier: Apache-2.0
// What the SMs of this machine's GPUs move at most, into and out of memory and between GPUs: the
// bounds of the kernels. Each measurement streams segments through the kernels' own ring, and does
// nothing else. One process; one JSON object on stdout, in bytes per second and seconds.
//   link_probe [gpus=N] [sms=24,64,all | sms=every]
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "csrc/device/segment_ring.h"

namespace jax_ep {
namespace {

// Of a dispatch of bfloat16 rows of 7168 elements.
constexpr int kWarps = 14;
constexpr int kSegmentBytes = 3584;
using Stages = dev::SegmentStages<4, kSegmentBytes>;
struct SharedStorage {
  Stages stages[kWarps];
};

// Far larger than the L2 cache, so that nothing is found there.
constexpr int64_t kSpanBytes = int64_t{512} << 20;
// Enough work for an SM that starting late by some microseconds does not count.
constexpr int64_t kBytesPerSm = int64_t{16} << 20;
constexpr int kRepetitions = 5;
// How many places each segment is stored to when a dispatch expands rows.
constexpr uint32_t kExpandedCopies = 4;
constexpr uint64_t kRounds = 1000;
constexpr int kMaxPolls = 5'000'000;  // of one round: some seconds

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// --- what runs on the GPUs ---------------------------------------------------------------------

struct Flow {
  const std::byte* from;
  std::byte* to;
  bool loads;
  uint32_t copies;  // stores of each segment
  int64_t num_segments;
};

// Wraps around: the memory has room for fewer segments than are moved.
__device__ int64_t place_of(int64_t segment) {
  return segment % (kSpanBytes / kSegmentBytes) * kSegmentBytes;
}

__global__ void move_segments(Flow flow) {
  using namespace dev;
  const auto num_warps = int64_t{num_blocks()} * kWarps;
  const auto first = int64_t{warp_id()} * num_blocks() + block_id();
  SegmentRing ring(shared<SharedStorage>().stages[warp_id()]);
  int64_t loaded = first;
  for (int64_t segment = first; segment < flow.num_segments; segment += num_warps) {
    for (; flow.loads && loaded < flow.num_segments && ring.may_load(); loaded += num_warps) {
      ring.load({{flow.from + place_of(loaded)}, kSegmentBytes});
    }
    Ptr<u32> stage = address_of(shared<SharedStorage>().stages[warp_id()].stage[0][0]);
    if (flow.loads) {
      stage = ring.wait();
    } else {
      bulk_wait_read<Stages::kStages - 1>();
    }
    if (lane_id() < flow.copies) {
      const int64_t copy = segment * flow.copies + lane_id();
      bulk_store({flow.to + place_of(copy)}, stage, kSegmentBytes);
    }
    ring.used();
  }
  bulk_wait<0>();
}

// Moved as one: who sees the flag has the data.
struct alignas(16) Flagged {
  uint64_t data;
  uint64_t flag;
};

// By the compiler's own functions: CCCL 3.0's loads and stores of 16 bytes do not assemble.
__device__ void store_flagged(Flagged* to, Flagged value) {
  __nv_atomic_store(to, &value, __NV_ATOMIC_RELAXED, __NV_THREAD_SCOPE_SYSTEM);
}
__device__ uint64_t load_flag(Flagged* from) {
  Flagged value;
  __nv_atomic_load(from, &value, __NV_ATOMIC_RELAXED, __NV_THREAD_SCOPE_SYSTEM);
  return value.flag;
}

// Two GPUs in turn store 16 bytes to each other, and wait for the other's.
__global__ void play(Flagged* mine, Flagged* theirs, bool begins) {
  for (uint64_t round = 1; round <= kRounds; ++round) {
    if (begins) store_flagged(theirs, {.data = round, .flag = round});
    for (int polls = 0; load_flag(mine) != round; ++polls) {
      if (polls > kMaxPolls) __trap();  // the other one is not there
    }
    if (!begins) store_flagged(theirs, {.data = round, .flag = round});
  }
}

// --- the host's side ---------------------------------------------------------------------------

struct DeviceFree {
  void operator()(std::byte* memory) const { cudaFree(memory); }
};
using DeviceArray = std::unique_ptr<std::byte, DeviceFree>;

DeviceArray allocate(int64_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, static_cast<size_t>(bytes)), "cudaMalloc");
  check(cudaMemset(memory, 0, static_cast<size_t>(bytes)), "cudaMemset");
  return DeviceArray(static_cast<std::byte*>(memory));
}

// A GPU, its memory, and what measures it. For the life of the process.
struct Gpu {
  DeviceArray from;
  DeviceArray to;
  cudaStream_t stream;
  cudaEvent_t start;
  cudaEvent_t end;
};

enum class Where { kLocal, kPeer };

struct Measurement {
  const char* name;
  bool loads;
  uint32_t copies;
  Where from;
  Where to;
  bool all;  // GPUs at once, or the first one alone
  // Segments that count, for each that is moved: what is stored, or else what is loaded.
  [[nodiscard]] int64_t counted() const { return std::max<int64_t>(copies, 1); }
  [[nodiscard]] bool needs_peer() const { return from == Where::kPeer || to == Where::kPeer; }
};

constexpr auto kLocal = Where::kLocal;
constexpr auto kPeer = Where::kPeer;
constexpr Measurement kMeasurements[] = {
    {"load", true, 0, kLocal, kLocal, false},
    {"store", false, 1, kLocal, kLocal, false},
    {"copy", true, 1, kLocal, kLocal, false},
    {"expand", true, kExpandedCopies, kLocal, kLocal, false},
    {"peer_store", true, 1, kLocal, kPeer, false},
    {"peer_store_all", true, 1, kLocal, kPeer, true},
    {"peer_load", true, 0, kPeer, kLocal, false},
    {"peer_load_all", true, 0, kPeer, kLocal, true},
};

class Probe {
 public:
  explicit Probe(int num_gpus) : gpus_(static_cast<size_t>(num_gpus)) {
    for (int gpu = 0; gpu < num_gpus; ++gpu) open(gpu);
    for (int gpu = 0; gpu < num_gpus; ++gpu) synchronize(gpu);
  }

  [[nodiscard]] int num_gpus() const { return static_cast<int>(gpus_.size()); }

  // Bytes per second of each GPU, the slowest, at the best of some times.
  double rate(const Measurement& what, int sms) {
    const int64_t segments = sms * (kBytesPerSm / kSegmentBytes) / what.counted();
    double seconds = run(what, sms, segments);  // to warm up
    for (int i = 0; i < kRepetitions; ++i) seconds = std::min(seconds, run(what, sms, segments));
    return static_cast<double>(segments * what.counted() * kSegmentBytes) / seconds;
  }

  // The same, of the copy engines.
  double copy_engine_rate(bool all) {
    const auto launch = [this](int gpu) {
      check(cudaMemcpyPeerAsync(of(peer_of(gpu)).to.get(),
                                peer_of(gpu),
                                of(gpu).from.get(),
                                gpu,
                                kSpanBytes,
                                of(gpu).stream),
            "cudaMemcpyPeerAsync");
    };
    double seconds = timed(all, launch);
    for (int i = 0; i < kRepetitions; ++i) seconds = std::min(seconds, timed(all, launch));
    return static_cast<double>(kSpanBytes) / seconds;
  }

  // Seconds of a store of 16 bytes from the first GPU to the second, until a poll there sees it.
  double flag_latency() {
    for (int gpu = 0; gpu < 2; ++gpu) {
      use(gpu);
      check(cudaMemset(of(gpu).to.get(), 0, sizeof(Flagged)), "cudaMemset");
      check(cudaDeviceSynchronize(), "cudaMemset");
    }
    for (int gpu = 0; gpu < 2; ++gpu) {
      use(gpu);
      check(cudaEventRecord(of(gpu).start, of(gpu).stream), "record");
      play<<<1, 1, 0, of(gpu).stream>>>(reinterpret_cast<Flagged*>(of(gpu).to.get()),
                                        reinterpret_cast<Flagged*>(of(1 - gpu).to.get()),
                                        gpu == 0);
      check(cudaGetLastError(), "play");
      check(cudaEventRecord(of(gpu).end, of(gpu).stream), "record");
    }
    // The second GPU starts last, and so has waited least before the first round.
    const double seconds = std::min(elapsed(0), elapsed(1));
    return seconds / (2.0 * kRounds);
  }

 private:
  Gpu& of(int gpu) { return gpus_[static_cast<size_t>(gpu)]; }
  [[nodiscard]] int peer_of(int gpu) const { return (gpu + 1) % num_gpus(); }
  static void use(int gpu) { check(cudaSetDevice(gpu), "cudaSetDevice"); }

  void open(int gpu) {
    use(gpu);
    for (int peer = 0; peer < num_gpus(); ++peer) {
      if (peer != gpu) check(cudaDeviceEnablePeerAccess(peer, 0), "cudaDeviceEnablePeerAccess");
    }
    of(gpu).from = allocate(kSpanBytes);
    of(gpu).to = allocate(kSpanBytes);
    check(cudaStreamCreateWithFlags(&of(gpu).stream, cudaStreamNonBlocking), "stream");
    check(cudaEventCreate(&of(gpu).start), "event");
    check(cudaEventCreate(&of(gpu).end), "event");
    check(cudaFuncSetAttribute(
              move_segments, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(SharedStorage)),
          "cudaFuncSetAttribute");
    // Loads it now: not while the other GPU waits for it.
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, play), "cudaFuncGetAttributes");
  }

  double run(const Measurement& what, int sms, int64_t segments) {
    return timed(what.all, [&](int gpu) {
      const int source = what.from == kPeer ? peer_of(gpu) : gpu;
      const int target = what.to == kPeer ? peer_of(gpu) : gpu;
      const Flow flow{.from = of(source).from.get(),
                      .to = of(target).to.get(),
                      .loads = what.loads,
                      .copies = what.copies,
                      .num_segments = segments};
      move_segments<<<sms, kWarps * dev::kWarpSize, sizeof(SharedStorage), of(gpu).stream>>>(flow);
      check(cudaGetLastError(), what.name);
    });
  }

  // Seconds of the slowest GPU, of all or of the first.
  template <typename Launch>
  double timed(bool all, const Launch& launch) {
    const int last = all ? num_gpus() : 1;
    for (int gpu = 0; gpu < last; ++gpu) {
      use(gpu);
      check(cudaEventRecord(of(gpu).start, of(gpu).stream), "record");
      launch(gpu);
      check(cudaEventRecord(of(gpu).end, of(gpu).stream), "record");
    }
    double slowest = 0;
    for (int gpu = 0; gpu < last; ++gpu) slowest = std::max(slowest, elapsed(gpu));
    return slowest;
  }

  double elapsed(int gpu) {
    synchronize(gpu);
    float ms = 0;
    check(cudaEventElapsedTime(&ms, of(gpu).start, of(gpu).end), "elapsed");
    return static_cast<double>(ms) * 1e-3;
  }

  void synchronize(int gpu) {
    use(gpu);
    check(cudaStreamSynchronize(of(gpu).stream), "a measurement");
  }

  std::vector<Gpu> gpus_;
};

// --- the command line and the report -----------------------------------------------------------

struct Options {
  int num_gpus;
  std::vector<int> sms;
};

int count_sms() {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0), "attribute");
  return count;
}

std::vector<int> parse_sms(const std::string& text) {
  if (text == "every") {
    std::vector<int> sms(static_cast<size_t>(count_sms()));
    std::iota(sms.begin(), sms.end(), 1);
    return sms;
  }
  std::vector<int> sms;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find(',', at), text.size());
    const std::string word = text.substr(at, end - at);
    sms.push_back(word == "all" ? count_sms() : std::atoi(word.c_str()));
    at = end + 1;
  }
  return sms;
}

Options parse(int argc, char** argv) {
  int available = 0;
  check(cudaGetDeviceCount(&available), "cudaGetDeviceCount");
  Options options{.num_gpus = std::min(available, 2), .sms = parse_sms("24,64,all")};
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], "gpus=", 5) == 0) options.num_gpus = std::atoi(argv[i] + 5);
    if (std::strncmp(argv[i], "sms=", 4) == 0) options.sms = parse_sms(argv[i] + 4);
  }
  const auto possible = [](int sms) { return sms >= 1 && sms <= count_sms(); };
  if (options.num_gpus < 1 || options.num_gpus > available || options.sms.empty() ||
      !std::all_of(options.sms.begin(), options.sms.end(), possible)) {
    std::fprintf(stderr, "there are %d GPUs of %d SMs\n", available, count_sms());
    std::exit(2);
  }
  return options;
}

void print_rates(Probe& probe, const std::vector<int>& sms) {
  std::printf("  \"rates\": {");
  const char* separator = "\n";
  for (const Measurement& what : kMeasurements) {
    if (what.needs_peer() && probe.num_gpus() < 2) continue;
    std::printf("%s    \"%s\": {", separator, what.name);
    for (size_t i = 0; i < sms.size(); ++i) {
      std::printf("%s\"%d\": %.4g", i == 0 ? "" : ", ", sms[i], probe.rate(what, sms[i]));
    }
    std::printf("}");
    separator = ",\n";
  }
  std::printf("\n  }");
}

void print_report(const Options& options) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "properties");
  std::printf("{\n  \"gpu\": \"%s\",\n  \"num_gpus\": %d,\n  \"num_sms\": %d,\n",
              properties.name,
              options.num_gpus,
              properties.multiProcessorCount);
  Probe probe(options.num_gpus);
  print_rates(probe, options.sms);
  if (options.num_gpus > 1) {
    std::printf(",\n  \"copy_engine\": {\"one\": %.4g, \"all\": %.4g}",
                probe.copy_engine_rate(false),
                probe.copy_engine_rate(true));
    std::printf(",\n  \"flag_latency\": %.3g", probe.flag_latency());
  }
  std::printf("\n}\n");
}

}  // namespace
}  // namespace jax_ep

int main(int argc, char** argv) {
  jax_ep::print_report(jax_ep::parse(argc, argv));
  return 0;
}
