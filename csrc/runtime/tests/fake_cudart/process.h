// SPDX-License-Identifier: Apache-2.0
// What the fake CUDA runtime holds. For its own files.
#ifndef JAX_EP_CSRC_RUNTIME_TESTS_FAKE_CUDART_PROCESS_H_
#define JAX_EP_CSRC_RUNTIME_TESTS_FAKE_CUDART_PROCESS_H_

#include <cuda_runtime_api.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "csrc/runtime/tests/fake_cudart/fake_cudart.h"
#include "csrc/runtime/tests/fake_cudart/pages.h"

namespace jax_ep::fake_cudart {

struct Allocation {
  std::unique_ptr<Pages> pages;
  int device;
  bool freed = false;  // but kept: others may ask for it
  bool old = false;    // of before the last reset
};

struct HostAllocation {
  std::unique_ptr<Pages> pages;
  unsigned flags;
  bool old = false;
};

// Memory of another process, for one device of this one.
struct Mapping {
  std::unique_ptr<Pages> pages;
  Ticket ticket;
  int device;
  int opened = 1;  // times
};

struct Stream {
  uintptr_t id;  // what cudaStream_t holds; never used again; 0: a default stream
  int device;
  bool waits_for_default;  // not created with cudaStreamNonBlocking
  std::vector<std::function<void()>> work;
};

struct Failure {
  std::string function;  // empty: any
  int left;              // calls until it happens
  cudaError_t error;
};

struct Process {
  static Process& instance();

  std::mutex mutex;
  std::condition_variable changed;
  std::atomic<uint64_t> generation = 1;  // of reset: threads forget what they held before
  Machine machine;
  std::set<int> contexts;
  std::set<std::pair<int, int>> enabled_peers;
  std::list<Allocation> allocations;
  std::list<HostAllocation> host_allocations;
  std::list<Mapping> mappings;
  std::list<Stream> streams;
  uintptr_t num_streams = 0;            // ever created
  std::vector<Stream> default_streams;  // one of each device
  std::vector<Failure> failures;
  std::set<int> busy;  // devices on which kernels run
  int waiting = 0;
  bool trapped = false;
  std::vector<std::string> calls;
  std::vector<std::string> violations;
  std::vector<Launch> launches;
  std::function<void(const Launch&)> kernel;

  [[nodiscard]] bool has_device(int device) const;
  [[nodiscard]] bool reaches(int from, int to) const;
  [[nodiscard]] size_t bytes_in_use(int device) const;
  Allocation* find_allocation(const void* address);
  Mapping* find_mapping(const void* address);
  // Null: the default stream of the current device.
  Stream* find_stream(cudaStream_t stream);
};

// What CUDA keeps for a thread.
struct Thread {
  static Thread& current();

  uint64_t generation = 0;
  int device = 0;
  cudaError_t last_error = cudaSuccess;
};

// One call of a function, from its begin to its end; the process is locked in between.
class Call {
 public:
  enum class Kind {
    kQuery,    // reaches no device
    kDevice,   // makes a context on the current device, fails after a trap
    kRelease,  // likewise, but gives back what it is asked to, whatever it returns
  };

  explicit Call(std::string_view function, Kind kind = Kind::kDevice);

  // Whether the call is to do nothing.
  [[nodiscard]] bool refused() const { return error_ != cudaSuccess && kind_ != Kind::kRelease; }
  // Its result, which becomes the thread's last error if it is one.
  cudaError_t end(cudaError_t error = cudaSuccess);

  // Waits until no kernel runs on the device.
  void wait_for_kernels(int device);
  // Notes what no program should do.
  void violation(const std::string& what);

  Process* operator->() { return &process_; }
  Process& process() { return process_; }

 private:
  Process& process_;
  std::unique_lock<std::mutex> lock_;
  std::string function_;
  Kind kind_;
  cudaError_t error_ = cudaSuccess;
};

// Does what has been put on a stream.
void complete(Stream& stream);

std::string text_of(const void* address);

}  // namespace jax_ep::fake_cudart

#endif  // JAX_EP_CSRC_RUNTIME_TESTS_FAKE_CUDART_PROCESS_H_
