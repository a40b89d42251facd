// SPDX-License-Identifier: Apache-2.0
// Compiled against our cuda_runtime_api.h and, where there is a CUDA toolkit, against NVIDIA's:
// both declare what our code uses alike, and code that was tested with one means the same with the
// other.
#include <cuda_runtime_api.h>

#include <cstddef>
#include <type_traits>

namespace {

template <typename Function, typename Declared>
constexpr bool declared(Declared* /*function*/) {
  return std::is_same_v<Function, Declared>;
}

static_assert(declared<const char*(cudaError_t)>(cudaGetErrorName));
static_assert(declared<const char*(cudaError_t)>(cudaGetErrorString));
static_assert(declared<cudaError_t()>(cudaGetLastError));
static_assert(declared<cudaError_t(int*)>(cudaGetDevice));
static_assert(declared<cudaError_t(int)>(cudaSetDevice));
static_assert(declared<cudaError_t(cudaDeviceProp*, int)>(cudaGetDeviceProperties));
static_assert(declared<cudaError_t(int*, cudaDeviceAttr, int)>(cudaDeviceGetAttribute));
static_assert(declared<cudaError_t(int*, int, int)>(cudaDeviceCanAccessPeer));
static_assert(declared<cudaError_t(int, unsigned)>(cudaDeviceEnablePeerAccess));
static_assert(declared<cudaError_t()>(cudaDeviceSynchronize));
static_assert(declared<cudaError_t(void**, size_t)>(cudaMalloc));
static_assert(declared<cudaError_t(void*)>(cudaFree));
static_assert(declared<cudaError_t(size_t*, size_t*)>(cudaMemGetInfo));
static_assert(declared<cudaError_t(void**, size_t, unsigned)>(cudaHostAlloc));
static_assert(declared<cudaError_t(void**, void*, unsigned)>(cudaHostGetDevicePointer));
static_assert(declared<cudaError_t(void*)>(cudaFreeHost));
static_assert(declared<cudaError_t(void*, int, size_t, cudaStream_t)>(cudaMemsetAsync));
static_assert(declared<cudaError_t(void*, const void*, size_t, cudaMemcpyKind, cudaStream_t)>(
    cudaMemcpyAsync));
static_assert(declared<cudaError_t(cudaIpcMemHandle_t*, void*)>(cudaIpcGetMemHandle));
static_assert(declared<cudaError_t(void**, cudaIpcMemHandle_t, unsigned)>(cudaIpcOpenMemHandle));
static_assert(declared<cudaError_t(void*)>(cudaIpcCloseMemHandle));
static_assert(declared<cudaError_t(cudaStream_t*, unsigned)>(cudaStreamCreateWithFlags));
static_assert(declared<cudaError_t(cudaStream_t)>(cudaStreamSynchronize));
static_assert(declared<cudaError_t(cudaStream_t)>(cudaStreamDestroy));
static_assert(declared<cudaError_t(const void*, cudaFuncAttribute, int)>(cudaFuncSetAttribute));

static_assert(sizeof(cudaIpcMemHandle_t) == 64);
static_assert(std::is_trivially_copyable_v<cudaIpcMemHandle_t>);
static_assert(std::is_pointer_v<cudaStream_t>);
static_assert(sizeof(cudaUUID_t) == 16);
static_assert(std::is_same_v<decltype(cudaDeviceProp::name), char[256]>);
static_assert(std::is_same_v<decltype(cudaDeviceProp::uuid), cudaUUID_t>);
static_assert(std::is_same_v<decltype(cudaDeviceProp::totalGlobalMem), size_t>);
static_assert(std::is_same_v<decltype(cudaDeviceProp::major), int>);
static_assert(std::is_same_v<decltype(cudaDeviceProp::minor), int>);
static_assert(std::is_same_v<decltype(cudaDeviceProp::multiProcessorCount), int>);

static_assert(cudaHostAllocPortable == 1);
static_assert(cudaHostAllocMapped == 2);
static_assert(cudaStreamNonBlocking == 1);
static_assert(cudaIpcMemLazyEnablePeerAccess == 1);
static_assert(cudaDevAttrMultiProcessorCount == 16);
static_assert(cudaDevAttrComputeCapabilityMajor == 75);
static_assert(cudaDevAttrComputeCapabilityMinor == 76);
static_assert(cudaFuncAttributeMaxDynamicSharedMemorySize == 8);

static_assert(cudaSuccess == 0);
static_assert(cudaErrorInvalidValue == 1);
static_assert(cudaErrorMemoryAllocation == 2);
static_assert(cudaErrorInvalidConfiguration == 9);
static_assert(cudaErrorInvalidDevice == 101);
static_assert(cudaErrorDeviceUninitialized == 201);
static_assert(cudaErrorNoKernelImageForDevice == 209);
static_assert(cudaErrorPeerAccessUnsupported == 217);
static_assert(cudaErrorInvalidResourceHandle == 400);
static_assert(cudaErrorPeerAccessAlreadyEnabled == 704);
static_assert(cudaErrorLaunchFailure == 719);
static_assert(cudaErrorUnknown == 999);

}  // namespace
