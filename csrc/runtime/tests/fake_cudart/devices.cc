// SPDX-License-Identifier: Apache-2.0
// Errors and devices.
#include <cuda_runtime_api.h>

#include <cstring>
#include <utility>

#include "csrc/runtime/tests/fake_cudart/process.h"

namespace {

using jax_ep::fake_cudart::Call;
using jax_ep::fake_cudart::complete;
using jax_ep::fake_cudart::Device;
using jax_ep::fake_cudart::Stream;
using jax_ep::fake_cudart::Thread;

}  // namespace

extern "C" {

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorDeviceUninitialized: return "cudaErrorDeviceUninitialized";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorPeerAccessUnsupported: return "cudaErrorPeerAccessUnsupported";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorPeerAccessAlreadyEnabled: return "cudaErrorPeerAccessAlreadyEnabled";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorUnknown: return "cudaErrorUnknown";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "an error of the fake CUDA runtime";
}

cudaError_t cudaGetLastError() { return std::exchange(Thread::current().last_error, cudaSuccess); }

cudaError_t cudaGetDevice(int* device) {
  Call call("cudaGetDevice", Call::Kind::kQuery);
  if (!call.refused()) *device = Thread::current().device;
  return call.end();
}

// Makes a context, as it does since CUDA 12.
cudaError_t cudaSetDevice(int device) {
  Call call("cudaSetDevice", Call::Kind::kQuery);
  if (call.refused()) return call.end();
  if (!call->has_device(device)) return call.end(cudaErrorInvalidDevice);
  Thread::current().device = device;
  call->contexts.insert(device);
  return call.end();
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  Call call("cudaGetDeviceProperties", Call::Kind::kQuery);
  if (call.refused()) return call.end();
  if (!call->has_device(device)) return call.end(cudaErrorInvalidDevice);
  const Device& of = call->machine.devices[static_cast<size_t>(device)];
  std::memset(static_cast<void*>(properties), 0, sizeof(*properties));
  std::strcpy(properties->name, "fake");
  std::memcpy(&properties->uuid, of.uuid.data(), sizeof(properties->uuid));
  properties->totalGlobalMem = of.bytes;
  properties->major = of.major;
  properties->minor = of.minor;
  properties->multiProcessorCount = of.num_sms;
  return call.end();
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  Call call("cudaDeviceGetAttribute", Call::Kind::kQuery);
  if (call.refused()) return call.end();
  if (!call->has_device(device)) return call.end(cudaErrorInvalidDevice);
  const Device& of = call->machine.devices[static_cast<size_t>(device)];
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = of.num_sms; return call.end();
    case cudaDevAttrComputeCapabilityMajor: *value = of.major; return call.end();
    case cudaDevAttrComputeCapabilityMinor: *value = of.minor; return call.end();
  }
  return call.end(cudaErrorInvalidValue);
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  Call call("cudaDeviceCanAccessPeer", Call::Kind::kQuery);
  if (call.refused()) return call.end();
  if (!call->has_device(device) || !call->has_device(peer)) {
    return call.end(cudaErrorInvalidDevice);
  }
  *can = call->reaches(device, peer) ? 1 : 0;
  return call.end();
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned int flags) {
  Call call("cudaDeviceEnablePeerAccess");
  if (call.refused()) return call.end();
  if (!call->has_device(peer)) return call.end(cudaErrorInvalidDevice);
  if (flags != 0) return call.end(cudaErrorInvalidValue);
  const int device = Thread::current().device;
  if (!call->reaches(device, peer)) return call.end(cudaErrorPeerAccessUnsupported);
  call->contexts.insert(peer);
  const bool added = call->enabled_peers.emplace(device, peer).second;
  return call.end(added ? cudaSuccess : cudaErrorPeerAccessAlreadyEnabled);
}

cudaError_t cudaDeviceSynchronize() {
  Call call("cudaDeviceSynchronize");
  if (call.refused()) return call.end();
  const int device = Thread::current().device;
  call.wait_for_kernels(device);
  for (Stream& stream : call->streams) {
    if (stream.device == device) complete(stream);
  }
  complete(call->default_streams[static_cast<size_t>(device)]);
  return call.end();
}

}  // extern "C"
