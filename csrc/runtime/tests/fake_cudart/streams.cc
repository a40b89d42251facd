// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include <utility>

#include "csrc/runtime/tests/fake_cudart/process.h"

namespace {

using jax_ep::fake_cudart::Call;
using jax_ep::fake_cudart::complete;
using jax_ep::fake_cudart::Stream;
using jax_ep::fake_cudart::Thread;

}  // namespace

extern "C" {

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int flags) {
  Call call("cudaStreamCreateWithFlags");
  if (call.refused()) return call.end();
  if ((flags & ~cudaStreamNonBlocking) != 0) return call.end(cudaErrorInvalidValue);
  call->streams.push_back({.id = ++call->num_streams,
                           .device = Thread::current().device,
                           .waits_for_default = (flags & cudaStreamNonBlocking) == 0,
                           .work = {}});
  *stream = reinterpret_cast<cudaStream_t>(call->num_streams);
  return call.end();
}

// Kernels run on streams that wait for the default stream, unlike XLA's: it is the worse case.
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  Call call("cudaStreamSynchronize");
  if (call.refused()) return call.end();
  Stream* on = call->find_stream(stream);
  if (on != nullptr && on->waits_for_default) {
    call.wait_for_kernels(on->device);
    on = call->find_stream(stream);
  }
  if (on == nullptr) {
    call.violation("the stream has been destroyed, or was never created");
    return call.end(cudaErrorInvalidResourceHandle);
  }
  complete(*on);
  return call.end();
}

// What is on the stream is done all the same, as late as it can be.
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  Call call("cudaStreamDestroy", Call::Kind::kRelease);
  Stream* const found = stream == nullptr ? nullptr : call->find_stream(stream);
  if (found == nullptr) {
    call.violation("the stream has been destroyed, or was never created");
    return call.end(cudaErrorInvalidResourceHandle);
  }
  Stream& heir = call->default_streams[static_cast<size_t>(found->device)];
  for (auto& work : found->work) heir.work.push_back(std::move(work));
  call->streams.remove_if([&](const Stream& candidate) { return &candidate == found; });
  return call.end();
}

}  // extern "C"
