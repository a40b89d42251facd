// SPDX-License-Identifier: Apache-2.0
#include "csrc/runtime/tests/fake_cudart/process.h"

#include <algorithm>
#include <cstdio>

namespace jax_ep::fake_cudart {

// Never destroyed: threads may outlive main().
Process& Process::instance() {
  static auto* const process = [] {
    auto* const made = new Process;
    made->machine = make_machine(1);
    made->default_streams.push_back({.id = 0, .device = 0, .waits_for_default = true, .work = {}});
    return made;
  }();
  return *process;
}

Thread& Thread::current() {
  thread_local Thread thread;
  const uint64_t generation = Process::instance().generation;
  if (thread.generation != generation) thread = {.generation = generation};
  return thread;
}

bool Process::has_device(int device) const {
  return device >= 0 && device < static_cast<int>(machine.devices.size());
}

bool Process::reaches(int from, int to) const {
  if (from == to) return false;  // as CUDA says
  return machine.reaches.empty() ||
         machine.reaches[static_cast<size_t>(from)][static_cast<size_t>(to)];
}

size_t Process::bytes_in_use(int device) const {
  size_t bytes = 0;
  for (const Allocation& allocation : allocations) {
    if (allocation.device == device && !allocation.freed && !allocation.old) {
      bytes += allocation.pages->bytes();
    }
  }
  return bytes;
}

Allocation* Process::find_allocation(const void* address) {
  const auto it = std::find_if(allocations.begin(), allocations.end(), [&](const Allocation& a) {
    return !a.freed && a.pages->contains(address);
  });
  return it == allocations.end() ? nullptr : &*it;
}

Mapping* Process::find_mapping(const void* address) {
  const auto it = std::find_if(mappings.begin(), mappings.end(), [&](const Mapping& m) {
    return m.pages->contains(address);
  });
  return it == mappings.end() ? nullptr : &*it;
}

Stream* Process::find_stream(cudaStream_t stream) {
  if (stream == nullptr) return &default_streams[static_cast<size_t>(Thread::current().device)];
  const auto it = std::find_if(streams.begin(), streams.end(), [&](const Stream& candidate) {
    return candidate.id == reinterpret_cast<uintptr_t>(stream);
  });
  return it == streams.end() ? nullptr : &*it;
}

Call::Call(std::string_view function, Kind kind)
    : process_(Process::instance()), lock_(process_.mutex), function_(function), kind_(kind) {
  process_.calls.emplace_back(function);
  std::vector<Failure>& failures = process_.failures;
  for (Failure& failure : failures) {
    if (!failure.function.empty() && failure.function != function) continue;
    if (--failure.left == 0) error_ = failure.error;
  }
  std::erase_if(failures, [](const Failure& failure) { return failure.left <= 0; });
  if (kind == Kind::kQuery) return;
  if (process_.trapped && error_ == cudaSuccess) error_ = cudaErrorLaunchFailure;
  process_.contexts.insert(Thread::current().device);
}

cudaError_t Call::end(cudaError_t error) {
  const cudaError_t result = error_ != cudaSuccess ? error_ : error;
  if (result != cudaSuccess) Thread::current().last_error = result;
  return result;
}

void Call::wait_for_kernels(int device) {
  ++process_.waiting;
  process_.changed.notify_all();
  process_.changed.wait(lock_, [&] { return process_.trapped || !process_.busy.contains(device); });
  --process_.waiting;
  if (process_.trapped && error_ == cudaSuccess) error_ = cudaErrorLaunchFailure;
}

void Call::violation(const std::string& what) {
  process_.violations.push_back(function_ + ": " + what);
}

void complete(Stream& stream) {
  // Taken first: none is done twice.
  for (const auto& work : std::exchange(stream.work, {})) work();
}

std::string text_of(const void* address) {
  char text[32];
  std::snprintf(text, sizeof(text), "%p", address);
  return text;
}

}  // namespace jax_ep::fake_cudart
