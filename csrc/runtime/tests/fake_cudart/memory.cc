// SPDX-License-Identifier: Apache-2.0
// Memory of devices, and memory of the host that devices reach.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "csrc/runtime/tests/fake_cudart/process.h"

namespace {

using jax_ep::fake_cudart::Allocation;
using jax_ep::fake_cudart::Call;
using jax_ep::fake_cudart::complete;
using jax_ep::fake_cudart::HostAllocation;
using jax_ep::fake_cudart::Mapping;
using jax_ep::fake_cudart::Pages;
using jax_ep::fake_cudart::Process;
using jax_ep::fake_cudart::Stream;
using jax_ep::fake_cudart::text_of;
using jax_ep::fake_cudart::Thread;

// The pages of a device's memory that hold an address, be it this process's or another's.
Pages* find_pages(Process& process, const void* address) {
  if (Allocation* const allocation = process.find_allocation(address)) {
    return allocation->pages.get();
  }
  Mapping* const mapping = process.find_mapping(address);
  return mapping == nullptr ? nullptr : mapping->pages.get();
}

auto find_host_allocation(Process& process, const void* address) {
  return std::find_if(process.host_allocations.begin(),
                      process.host_allocations.end(),
                      [&](const HostAllocation& a) { return a.pages->data() == address; });
}

// What is on a stream may use what is about to be freed.
void complete_all(Process& process) {
  for (Stream& stream : process.streams) complete(stream);
  for (Stream& stream : process.default_streams) complete(stream);
}

// What is to be written into a device's memory, or read of it, once the stream comes to it.
cudaError_t enqueue_access(Call& call,
                           const void* memory,
                           size_t bytes,
                           cudaStream_t stream,
                           std::function<void()> access) {
  Stream* const on = call->find_stream(stream);
  if (on == nullptr) {
    call.violation("the stream has been destroyed, or was never created");
    return call.end(cudaErrorInvalidResourceHandle);
  }
  const Pages* const pages = find_pages(call.process(), memory);
  const auto* const begin = static_cast<const std::byte*>(memory);
  if (pages == nullptr || bytes > static_cast<size_t>(pages->data() + pages->bytes() - begin)) {
    call.violation(text_of(memory) + " has no " + std::to_string(bytes) + " bytes");
    return call.end(cudaErrorInvalidValue);
  }
  on->work.emplace_back(std::move(access));
  return call.end();
}

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  Call call("cudaMalloc");
  if (call.refused()) return call.end();
  const int device = Thread::current().device;
  const size_t all = call->machine.devices[static_cast<size_t>(device)].bytes;
  const size_t used = std::min(call->bytes_in_use(device), all);
  if (bytes > all - used) return call.end(cudaErrorMemoryAllocation);
  std::unique_ptr<Pages> pages = Pages::make(bytes);
  if (pages == nullptr) return call.end(cudaErrorMemoryAllocation);
  *memory = pages->data();
  call->allocations.push_back({.pages = std::move(pages), .device = device});
  return call.end();
}

cudaError_t cudaFree(void* memory) {
  Call call("cudaFree", Call::Kind::kRelease);
  if (memory == nullptr) return call.end();
  const Allocation* const found = call->find_allocation(memory);
  if (found == nullptr || found->pages->data() != memory) {
    call.violation(text_of(memory) + " is no memory of cudaMalloc, or has been freed");
    return call.end(cudaErrorInvalidValue);
  }
  call.wait_for_kernels(found->device);
  complete_all(call.process());
  Allocation* const allocation = call->find_allocation(memory);
  if (allocation == nullptr) {
    call.violation(text_of(memory) + " is freed by two threads");
    return call.end(cudaErrorInvalidValue);
  }
  allocation->freed = true;
  if (allocation->pages->free()) {
    call.violation(text_of(memory) + " is freed while another process has it mapped");
  }
  return call.end();
}

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  Call call("cudaMemGetInfo");
  if (call.refused()) return call.end();
  const int device = Thread::current().device;
  *total = call->machine.devices[static_cast<size_t>(device)].bytes;
  *available = *total - std::min(call->bytes_in_use(device), *total);
  return call.end();
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned int flags) {
  Call call("cudaHostAlloc");
  if (call.refused()) return call.end();
  std::unique_ptr<Pages> pages = Pages::make(bytes, Pages::Alias::kSecond);
  if (pages == nullptr) return call.end(cudaErrorMemoryAllocation);
  *memory = pages->data();
  call->host_allocations.push_back({.pages = std::move(pages), .flags = flags});
  return call.end();
}

cudaError_t cudaHostGetDevicePointer(void** on_device, void* on_host, unsigned int flags) {
  Call call("cudaHostGetDevicePointer");
  if (call.refused()) return call.end();
  const auto it = find_host_allocation(call.process(), on_host);
  if (flags != 0 || it == call->host_allocations.end() || !(it->flags & cudaHostAllocMapped)) {
    return call.end(cudaErrorInvalidValue);
  }
  *on_device = it->pages->alias();
  return call.end();
}

cudaError_t cudaFreeHost(void* memory) {
  Call call("cudaFreeHost", Call::Kind::kRelease);
  if (memory == nullptr) return call.end();
  call.wait_for_kernels(Thread::current().device);
  complete_all(call.process());
  const auto it = find_host_allocation(call.process(), memory);
  if (it == call->host_allocations.end()) {
    call.violation(text_of(memory) + " is no memory of cudaHostAlloc, or has been freed");
    return call.end(cudaErrorInvalidValue);
  }
  call->host_allocations.erase(it);
  return call.end();
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  Call call("cudaMemsetAsync");
  if (call.refused()) return call.end();
  return enqueue_access(
      call, memory, bytes, stream, [memory, value, bytes] { std::memset(memory, value, bytes); });
}

// From the host's memory, which the call reads at once, as it does of memory that is not pinned; or
// from a device's, by cudaMemcpyDefault, to memory that the host reads behind a synchronization.
cudaError_t cudaMemcpyAsync(
    void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  Call call("cudaMemcpyAsync");
  if (call.refused()) return call.end();
  if (kind == cudaMemcpyDefault) {
    return enqueue_access(
        call, from, bytes, stream, [to, from, bytes] { std::memcpy(to, from, bytes); });
  }
  if (kind != cudaMemcpyHostToDevice) return call.end(cudaErrorInvalidValue);
  const auto* const begin = static_cast<const std::byte*>(from);
  std::vector<std::byte> copy(begin, begin + bytes);
  return enqueue_access(call, to, bytes, stream, [to, copy = std::move(copy)] {
    std::memcpy(to, copy.data(), copy.size());
  });
}

}  // extern "C"
