// SPDX-License-Identifier: Apache-2.0
// What tests ask the fake CUDA runtime, and what they tell it.
#include <thread>
#include <utility>

#include "csrc/runtime/tests/fake_cudart/process.h"

namespace jax_ep::fake_cudart {
namespace {

struct Locked {
  Process& process = Process::instance();
  std::unique_lock<std::mutex> lock{process.mutex};
  Process* operator->() { return &process; }
};

std::string bytes_of(const Pages& pages, int device) {
  return std::to_string(pages.bytes()) + " bytes on device " + std::to_string(device);
}

}  // namespace

Machine make_machine(int count, int first) {
  Machine machine;
  for (int i = first; i < first + count; ++i) {
    Device device{};
    device.uuid.fill(std::byte{0xD0});
    device.uuid[15] = static_cast<std::byte>(i);
    machine.devices.push_back(device);
  }
  return machine;
}

void reset(Machine machine) {
  Locked process;
  process->machine = std::move(machine);
  process->contexts.clear();
  process->enabled_peers.clear();
  process->allocations.remove_if([](const Allocation& allocation) { return allocation.freed; });
  for (Allocation& allocation : process->allocations) allocation.old = true;
  for (HostAllocation& allocation : process->host_allocations) allocation.old = true;
  process->mappings.clear();
  process->streams.clear();
  process->default_streams.clear();
  for (size_t i = 0; i < process->machine.devices.size(); ++i) {
    process->default_streams.push_back(
        {.id = 0, .device = static_cast<int>(i), .waits_for_default = true, .work = {}});
  }
  process->failures.clear();
  process->busy.clear();
  process->trapped = false;
  process->calls.clear();
  process->violations.clear();
  process->launches.clear();
  process->kernel = nullptr;
  ++process->generation;
  process->changed.notify_all();
}

void fail(std::string_view function, int n, cudaError_t error) {
  Locked()->failures.push_back({.function = std::string(function), .left = n, .error = error});
}

int pending_failures() { return static_cast<int>(Locked()->failures.size()); }

void trap() {
  Locked process;
  process->trapped = true;
  process->changed.notify_all();
}

void run_kernels(int device) { Locked()->busy.insert(device); }

void finish_kernels() {
  Locked process;
  process->busy.clear();
  process->changed.notify_all();
}

void finish_kernels_after(std::chrono::milliseconds delay) {
  std::thread([delay] {
    std::this_thread::sleep_for(delay);
    finish_kernels();
  }).detach();
}

int num_waiting() { return Locked()->waiting; }

std::vector<Launch> launches() { return Locked()->launches; }

void set_kernel(std::function<void(const Launch&)> kernel) { Locked()->kernel = std::move(kernel); }

std::vector<std::string> calls() { return Locked()->calls; }

std::vector<std::string> leaks() {
  Locked process;
  std::vector<std::string> found;
  for (const Allocation& allocation : process->allocations) {
    if (allocation.freed || allocation.old) continue;
    found.push_back("cudaMalloc: " + bytes_of(*allocation.pages, allocation.device));
  }
  for (const HostAllocation& allocation : process->host_allocations) {
    if (allocation.old) continue;
    found.push_back("cudaHostAlloc: " + std::to_string(allocation.pages->bytes()) + " bytes");
  }
  for (const Mapping& mapping : process->mappings) {
    found.push_back("cudaIpcOpenMemHandle: " + bytes_of(*mapping.pages, mapping.device));
  }
  for (const Stream& stream : process->streams) {
    found.push_back("cudaStreamCreateWithFlags: on device " + std::to_string(stream.device));
  }
  return found;
}

std::vector<std::string> violations() { return Locked()->violations; }

std::vector<std::string> abandoned_mappings() {
  Locked process;
  std::vector<std::string> found;
  for (const Mapping& mapping : process->mappings) {
    if (!mapping.pages->abandoned()) continue;
    found.push_back(bytes_of(*mapping.pages, mapping.device) + ", of process " +
                    std::to_string(mapping.ticket.pid));
  }
  return found;
}

std::vector<int> contexts() {
  Locked process;
  return {process->contexts.begin(), process->contexts.end()};
}

bool peer_enabled(int device, int peer) { return Locked()->enabled_peers.contains({device, peer}); }

void* on_host(void* on_device) {
  Locked process;
  for (const HostAllocation& allocation : process->host_allocations) {
    const auto offset = static_cast<std::byte*>(on_device) - allocation.pages->alias();
    if (offset < 0 || static_cast<size_t>(offset) >= allocation.pages->bytes()) continue;
    return allocation.pages->data() + offset;
  }
  return nullptr;
}

std::vector<unsigned> host_flags() {
  Locked process;
  std::vector<unsigned> flags;
  for (const HostAllocation& allocation : process->host_allocations) {
    if (!allocation.old) flags.push_back(allocation.flags);
  }
  return flags;
}

cudaError_t last_error() { return Thread::current().last_error; }

int current_device() { return Thread::current().device; }

}  // namespace jax_ep::fake_cudart
