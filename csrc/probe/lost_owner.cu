// SPDX-License-Identifier: Apache-2.0
// Whether a GPU goes on when a peer into whose memory it stores is lost, and whether memory that it
// then stores into is anybody else's: what masks of lost ranks stand on. Two GPUs.
//   lost_owner kill|trap|exit
//
// Three processes. The survivor (GPU 0) and the owner (GPU 1) store into each other's memory by
// cudaIpc, as the heaps of groups are mapped, without a pause. Then the owner is killed, or a
// kernel of it traps, or it just exits. The heir starts on GPU 1, takes all memory that there is,
// and looks for words that it has not written, while the survivor goes on storing.
#include <cuda_runtime.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "csrc/device/primitives.h"

namespace jax_ep {
namespace {

constexpr size_t kHeapBytes = size_t{64} << 20;
constexpr size_t kHeapWords = kHeapBytes / sizeof(uint32_t);
constexpr uint64_t kBurstNs = 50'000'000;
constexpr int kBlocks = 32;
constexpr int kThreads = 256;
constexpr double kBeforeS = 1.0;  // of storing into each other
constexpr double kLimitS = 30.0;  // of everything
constexpr int kRounds = 6;        // of the heir's looking
constexpr useconds_t kBetweenRoundsUs = 300'000;

const char* who = "survivor";

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s: %s\n", who, what, cudaGetErrorString(error));
  std::fflush(stdout);
  _exit(1);
}

// Stores into the peer's memory until the time is over; reads own words, which the peer stores.
__global__ void exchange(uint32_t* peer, uint32_t* own, uint64_t duration_ns, uint32_t value) {
  const uint64_t begin = dev::now_ns();
  size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x;
  do {
    for (int k = 0; k < 64; ++k, i += size_t{gridDim.x} * blockDim.x) peer[i % kHeapWords] = value;
    dev::st_release<dev::Scope::kSys>(dev::Ptr<uint32_t>{peer + threadIdx.x}, value);
    const uint32_t got = dev::ld_acquire<dev::Scope::kSys>(dev::Ptr<uint32_t>{own + threadIdx.x});
    value += got == ~0u;  // never; so that it is read
  } while (dev::now_ns() - begin < duration_ns);
}
__global__ void fail() { dev::trap(); }
__global__ void fill(uint32_t* words, size_t count, uint32_t value) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    words[i] = value;
  }
}
__global__ void count_others(const uint32_t* words,
                             size_t count,
                             uint32_t value,
                             unsigned long long* others) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    if (words[i] != value) atomicAdd(others, 1ull);
  }
}

struct Heaps {
  uint32_t* own;
  uint32_t* peer;
};
Heaps exchange_heaps(int device, int socket) {
  check(cudaSetDevice(device), "cudaSetDevice");
  check(cudaDeviceEnablePeerAccess(1 - device, 0), "cudaDeviceEnablePeerAccess");
  Heaps heaps{};
  check(cudaMalloc(&heaps.own, kHeapBytes), "cudaMalloc");
  check(cudaMemset(heaps.own, 0, kHeapBytes), "cudaMemset");
  check(cudaDeviceSynchronize(), "cudaMemset");
  cudaIpcMemHandle_t mine;
  cudaIpcMemHandle_t other;
  check(cudaIpcGetMemHandle(&mine, heaps.own), "cudaIpcGetMemHandle");
  if (write(socket, &mine, sizeof(mine)) != sizeof(mine) ||
      recv(socket, &other, sizeof(other), MSG_WAITALL) != sizeof(other)) {
    _exit(1);
  }
  void* mapped = nullptr;
  check(cudaIpcOpenMemHandle(&mapped, other, cudaIpcMemLazyEnablePeerAccess),
        "cudaIpcOpenMemHandle");
  heaps.peer = static_cast<uint32_t*>(mapped);
  return heaps;
}

[[noreturn]] void be_owner(int socket, const std::string& end) {
  who = "owner";
  const Heaps heaps = exchange_heaps(1, socket);
  const int bursts = end == "kill" ? 1 << 20 : static_cast<int>(kBeforeS / (kBurstNs * 1e-9));
  for (int i = 0; i < bursts; ++i) {
    exchange<<<kBlocks, kThreads>>>(heaps.peer, heaps.own, kBurstNs, 7);
    check(cudaDeviceSynchronize(), "exchange");
  }
  if (end == "trap") {
    fail<<<1, 1>>>();
    std::printf("owner: %s\n", cudaGetErrorString(cudaDeviceSynchronize()));
    std::fflush(stdout);
    usleep(500'000);  // as a process that still reports
  }
  _exit(0);
}

// Ends with 1 if it finds a word that it has not written.
[[noreturn]] void be_heir(int begin) {
  who = "heir";
  char byte;
  if (read(begin, &byte, 1) != 1) _exit(2);  // the survivor did not survive
  check(cudaSetDevice(1), "cudaSetDevice");
  unsigned long long* others = nullptr;
  check(cudaMalloc(&others, sizeof(*others)), "cudaMalloc");
  check(cudaMemset(others, 0, sizeof(*others)), "cudaMemset");
  std::vector<uint32_t*> parts;
  for (uint32_t* part; cudaMalloc(&part, kHeapBytes) == cudaSuccess;) {
    parts.push_back(part);
    fill<<<kThreads, kThreads>>>(part, kHeapWords, static_cast<uint32_t>(~parts.size()));
  }
  cudaGetLastError();  // of the last cudaMalloc
  check(cudaDeviceSynchronize(), "fill");
  for (int round = 0; round < kRounds; ++round) {
    usleep(kBetweenRoundsUs);
    for (size_t i = 0; i < parts.size(); ++i) {
      count_others<<<kThreads, kThreads>>>(
          parts[i], kHeapWords, static_cast<uint32_t>(~(i + 1)), others);
    }
    check(cudaDeviceSynchronize(), "count_others");
  }
  unsigned long long found = 0;
  check(cudaMemcpy(&found, others, sizeof(found), cudaMemcpyDeviceToHost), "cudaMemcpy");
  std::printf("heir: %.1f GiB, %llu words changed\n", parts.size() * (1.0 / 16), found);
  std::fflush(stdout);
  _exit(found != 0 || parts.empty());
}

int be_survivor(pid_t owner, pid_t heir, int socket, int begin, const std::string& end) {
  const Heaps heaps = exchange_heaps(0, socket);
  const auto started = std::chrono::steady_clock::now();
  const auto seconds = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  };
  bool killed = false;
  bool lost = false;
  for (int bursts = 0; seconds() < kLimitS; ++bursts) {
    exchange<<<kBlocks, kThreads>>>(heaps.peer, heaps.own, kBurstNs, 9);
    if (end == "kill" && !killed && seconds() > kBeforeS) killed = kill(owner, SIGKILL) == 0;
    check(cudaDeviceSynchronize(), "exchange");
    int status = 0;
    if (!lost && waitpid(owner, &status, WNOHANG) == owner) {
      lost = true;
      std::printf("survivor: the owner is gone after %.2f s, status %d\n", seconds(), status);
      if (write(begin, "", 1) != 1) return 1;
    }
    if (lost && waitpid(heir, &status, WNOHANG) == heir) {
      check(cudaMemset(heaps.own, 5, kHeapBytes), "cudaMemset");
      check(cudaDeviceSynchronize(), "cudaMemset");
      std::printf("survivor: %d bursts; the heir's status is %d\n", bursts, status);
      return status != 0;
    }
  }
  std::printf("survivor: not done after %g s\n", kLimitS);
  kill(owner, SIGKILL);
  kill(heir, SIGKILL);
  return 1;
}

}  // namespace
}  // namespace jax_ep

int main(int argc, char** argv) {
  const std::string end = argc == 2 ? argv[1] : "";
  if (end != "kill" && end != "trap" && end != "exit") {
    std::fprintf(stderr, "usage: lost_owner kill|trap|exit\n");
    return 2;
  }
  int sockets[2];
  int begin[2];
  if (socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) != 0 || pipe(begin) != 0) return 2;
  // Nobody outlives the survivor, nor it twice its time; and whoever waits for a process that has
  // ended sees the end of what only that one could write to.
  alarm(static_cast<unsigned>(2 * jax_ep::kLimitS));
  const pid_t heir = fork();  // before CUDA is started in this process
  if (heir == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (const int other : {sockets[0], sockets[1], begin[1]}) close(other);
    jax_ep::be_heir(begin[0]);
  }
  const pid_t owner = fork();
  if (owner == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (const int other : {sockets[0], begin[0], begin[1]}) close(other);
    jax_ep::be_owner(sockets[1], end);
  }
  close(sockets[1]);
  close(begin[0]);
  const int status = jax_ep::be_survivor(owner, heir, sockets[0], begin[1], end);
  std::printf("%s: %s\n", end.c_str(), status == 0 ? "passed" : "FAILED");
  return status;
}
