// SPDX-License-Identifier: Apache-2.0
// Memory that processes share.
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "csrc/runtime/tests/fake_cudart/process.h"

namespace {

using jax_ep::fake_cudart::Allocation;
using jax_ep::fake_cudart::Call;
using jax_ep::fake_cudart::Mapping;
using jax_ep::fake_cudart::Pages;
using jax_ep::fake_cudart::Process;
using jax_ep::fake_cudart::text_of;
using jax_ep::fake_cudart::Thread;
using jax_ep::fake_cudart::Ticket;

struct Exported {
  Ticket ticket;
  std::array<std::byte, 16> device;  // its UUID
};
static_assert(sizeof(Exported) <= sizeof(cudaIpcMemHandle_t));

bool same(const Ticket& a, const Ticket& b) { return std::memcmp(&a, &b, sizeof(a)) == 0; }

// Whether a device reaches another one, which this process may not see: then CUDA maps it too.
bool reaches(const Process& process, int device, const std::array<std::byte, 16>& other) {
  const auto& devices = process.machine.devices;
  const auto it = std::find_if(
      devices.begin(), devices.end(), [&](const auto& of) { return of.uuid == other; });
  const int peer = static_cast<int>(it - devices.begin());
  return it == devices.end() || peer == device || process.reaches(device, peer);
}

cudaError_t error_of(Pages::OpenError error) {
  return error == Pages::OpenError::kOwnerGone ? cudaErrorInvalidResourceHandle
                                               : cudaErrorInvalidValue;
}

}  // namespace

extern "C" {

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* memory) {
  Call call("cudaIpcGetMemHandle");
  if (call.refused()) return call.end();
  const Allocation* const allocation = call->find_allocation(memory);
  if (allocation == nullptr) return call.end(cudaErrorInvalidValue);
  const Exported exported{
      .ticket = allocation->pages->ticket(),
      .device = call->machine.devices[static_cast<size_t>(allocation->device)].uuid};
  std::memset(handle, 0, sizeof(*handle));
  std::memcpy(handle, &exported, sizeof(exported));
  return call.end();
}

cudaError_t cudaIpcOpenMemHandle(void** memory, cudaIpcMemHandle_t handle, unsigned int flags) {
  Call call("cudaIpcOpenMemHandle");
  if (call.refused()) return call.end();
  Exported exported;
  std::memcpy(&exported, &handle, sizeof(exported));
  if (flags != cudaIpcMemLazyEnablePeerAccess) return call.end(cudaErrorInvalidValue);
  if (exported.ticket.pid == getpid()) return call.end(cudaErrorDeviceUninitialized);
  const int device = Thread::current().device;
  const auto it =
      std::find_if(call->mappings.begin(), call->mappings.end(), [&](const Mapping& mapping) {
        return mapping.device == device && same(mapping.ticket, exported.ticket);
      });
  if (it != call->mappings.end()) {
    ++it->opened;
    *memory = it->pages->data();
    return call.end();
  }
  if (!reaches(call.process(), device, exported.device)) {
    return call.end(cudaErrorPeerAccessUnsupported);
  }
  Pages::OpenError error;
  std::unique_ptr<Pages> pages = Pages::open(exported.ticket, error);
  if (pages == nullptr) return call.end(error_of(error));
  *memory = pages->data();
  call->mappings.push_back(
      {.pages = std::move(pages), .ticket = exported.ticket, .device = device});
  return call.end();
}

cudaError_t cudaIpcCloseMemHandle(void* memory) {
  Call call("cudaIpcCloseMemHandle", Call::Kind::kRelease);
  Mapping* const mapping = call->find_mapping(memory);
  if (mapping == nullptr || mapping->pages->data() != memory) {
    call.violation(text_of(memory) + " is not mapped from another process");
    return call.end(cudaErrorInvalidValue);
  }
  if (call->busy.contains(mapping->device)) {
    call.violation(text_of(memory) + " is unmapped while kernels run that may use it");
  }
  if (--mapping->opened == 0) {
    call->mappings.remove_if([&](const Mapping& candidate) { return &candidate == mapping; });
  }
  return call.end();
}

}  // extern "C"
