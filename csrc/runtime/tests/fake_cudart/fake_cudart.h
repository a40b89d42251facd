// SPDX-License-Identifier: Apache-2.0
// A CUDA runtime for tests, without GPUs: the functions of cuda_runtime_api.h and the launches of
// csrc/launch/launch.h, over memory of the host. Processes map each other's memory for real.
//
// It behaves as CUDA 13.0 was seen to on two H200 (driver 580), in what our code can notice: which
// calls make a context, which wait for kernels, what fails after a kernel has trapped, which error
// each misuse gets. It is stricter where CUDA is lenient by chance: memory comes with other bytes
// than zero, is at new addresses each time and gone when freed, work on a stream happens only when
// somebody waits for it, and the device's address of host memory is not the host's.
#ifndef JAX_EP_CSRC_RUNTIME_TESTS_FAKE_CUDART_FAKE_CUDART_H_
#define JAX_EP_CSRC_RUNTIME_TESTS_FAKE_CUDART_FAKE_CUDART_H_

#include <cuda_runtime_api.h>

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "csrc/core/kernel_params.h"
#include "csrc/launch/launch.h"
#include "csrc/tuning/launch_shape.h"

namespace jax_ep::fake_cudart {

struct Device {
  std::array<std::byte, 16> uuid;  // processes in which a device has the same share it
  int num_sms = 132;
  size_t bytes = size_t{1} << 30;  // of its memory
  int major = 9;                   // compute capability
  int minor = 0;
};

// The devices that this process sees.
struct Machine {
  std::vector<Device> devices;
  // [from][to]: whether kernels of one reach the other's memory. Empty: all do.
  std::vector<std::vector<bool>> reaches;
};

// `count` devices that reach each other, with UUIDs that count from `first`. The same in every
// process, so that device i of one is device i of another.
Machine make_machine(int count, int first = 0);

// Forgets everything, as if the process had only begun, on another machine. But memory that nobody
// has freed can still be used: what the process keeps for good is where it was.
void reset(Machine machine);

// --- failures ----------------------------------------------------------------------------------

// The n-th call from now on fails (1: the next), of `function`, or of any if that is empty. A call
// that gives something back does so nevertheless: CUDA uses its result to report what failed
// before. Several failures may be pending.
void fail(std::string_view function, int n, cudaError_t error = cudaErrorUnknown);
// Failures that have not happened yet.
int pending_failures();
// A kernel of this process has trapped. As with CUDA, every further call fails that would reach a
// device, on whichever device.
void trap();

// --- kernels -----------------------------------------------------------------------------------

// Kernels run on a device until `finish`: what waits for kernels waits.
void run_kernels(int device);
void finish_kernels();
// The same, later: for tests whose own thread might be the one that waits.
void finish_kernels_after(std::chrono::milliseconds delay);
// Threads that wait for kernels now.
int num_waiting();

struct Launch {
  int device;
  cudaStream_t stream;
  LaunchShape shape;
  std::variant<PlanParams, DispatchParams, CombineParams, PlanDispatchParams> params;
  std::optional<LoopbackNetwork> network = std::nullopt;  // between domains
};

// What has been launched, in order.
std::vector<Launch> launches();
// Called with each launch, by the thread that launches: stands for the kernel. May be empty.
void set_kernel(std::function<void(const Launch&)> kernel);

// --- what happened -----------------------------------------------------------------------------

// Names of all functions called, but for those that only describe errors.
std::vector<std::string> calls();
// What has not been given back since the reset: memory, mappings, streams.
std::vector<std::string> leaks();
// What CUDA leaves undefined or refuses, and no program should do, as it happened: memory freed
// twice, or while another process has it mapped, ...
std::vector<std::string> violations();
// Mappings of memory that its process has freed, or has taken with it when it ended.
std::vector<std::string> abandoned_mappings();
// Devices on which this process has a context, which takes hundreds of megabytes there.
std::vector<int> contexts();
// Whether peer access was enabled.
bool peer_enabled(int device, int peer);
// The host's address of memory of cudaHostAlloc, from that of devices; null if it is none. What
// stands for a kernel writes there, where sanitizers see that the host reads the same.
void* on_host(void* on_device);
// Flags that each live cudaHostAlloc was called with.
std::vector<unsigned> host_flags();
// What cudaGetLastError would return to this thread, and keeps.
cudaError_t last_error();
// The thread's current device.
int current_device();

}  // namespace jax_ep::fake_cudart

#endif  // JAX_EP_CSRC_RUNTIME_TESTS_FAKE_CUDART_FAKE_CUDART_H_
