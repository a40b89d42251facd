// SPDX-License-Identifier: Apache-2.0
#include "csrc/runtime/transport/symmetric_heap.h"

#include <unistd.h>

#include <cstring>
#include <random>
#include <utility>

#include "csrc/core/heap_description.h"
#include "csrc/runtime/cuda_status.h"
#include "csrc/runtime/own_stream.h"

namespace jax_ep {
namespace {

// First in a handle's bytes. Raise the number with every change of HeapHandle or of the layout.
constexpr std::string_view kMagic = "jaxep003";

// The unit in which CUDA allocates: what IPC maps are whole units, and a heap that fills its own
// shows peers nothing else.
constexpr int64_t kAllocationUnit = int64_t{2} << 20;

// Not the pid: processes of different containers may have the same.
const std::array<std::byte, 16>& process_number() {
  static const auto number = [] {
    std::random_device random;
    std::array<std::byte, 16> bytes;
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(random() & 0xFF);
    return bytes;
  }();
  return number;
}

Status does_not_fit(const HeapShape& shape, int64_t bytes, int32_t device) {
  std::string message = "a symmetric heap of " + bytes_text(bytes) +
                        " does not fit on CUDA device " + std::to_string(device);
  size_t available = 0;
  size_t total = 0;
  if (JAX_EP_CUDA_STATUS(cudaMemGetInfo(&available, &total)).ok()) {
    message += ", which has " + bytes_text(static_cast<int64_t>(available)) + " free of " +
               bytes_text(static_cast<int64_t>(total));
  }
  return {StatusCode::kResourceExhausted,
          message + ". It needs: " + heap_needs(shape) +
              ", or leave more memory for it (XLA_PYTHON_CLIENT_MEM_FRACTION)"};
}

Status zero(std::byte* base, int64_t bytes) {
  return on_own_stream([base, bytes](cudaStream_t stream) {
    return JAX_EP_CUDA_STATUS(cudaMemsetAsync(base, 0, static_cast<size_t>(bytes), stream));
  });
}

Status enable_peer_access(int32_t device, int32_t peer) {
  if (device == peer) return {};
  int reachable = 0;
  JAX_EP_RETURN_IF_ERROR(JAX_EP_CUDA_STATUS(cudaDeviceCanAccessPeer(&reachable, device, peer)));
  if (reachable == 0) {
    return {StatusCode::kFailedPrecondition,
            "CUDA device " + std::to_string(device) + " cannot access the memory of device " +
                std::to_string(peer) +
                "; all devices of an EP group must be connected by NVLink or PCIe peer access"};
  }
  const cudaError_t error = cudaDeviceEnablePeerAccess(peer, 0);
  if (error == cudaErrorPeerAccessAlreadyEnabled) {
    static_cast<void>(cudaGetLastError());  // XLA may have done it
    return {};
  }
  return cuda_status(error, "cudaDeviceEnablePeerAccess", __FILE__, __LINE__);
}

}  // namespace

std::string HeapHandle::to_bytes() const {
  std::string bytes(kMagic);
  bytes.append(reinterpret_cast<const char*>(this), sizeof(*this));
  return bytes;
}

Status HeapHandle::from_bytes(std::string_view bytes, HeapHandle& handle) {
  if (bytes.size() != kMagic.size() + sizeof(handle) || !bytes.starts_with(kMagic)) {
    return Status::invalid_argument(
        "a peer's handle is not one of this version of jax_ep; all processes must run the same");
  }
  std::memcpy(&handle, bytes.data() + kMagic.size(), sizeof(handle));
  return {};
}

bool HeapHandle::in_this_process() const { return process == process_number(); }

SymmetricHeap::~SymmetricHeap() { free(); }

SymmetricHeap::SymmetricHeap(SymmetricHeap&& other) noexcept
    : base_(std::exchange(other.base_, nullptr)),
      layout_(other.layout_),
      network_(other.network_),
      device_(other.device_) {}

SymmetricHeap& SymmetricHeap::operator=(SymmetricHeap&& other) noexcept {
  if (this == &other) return *this;
  free();
  base_ = std::exchange(other.base_, nullptr);
  layout_ = other.layout_;
  network_ = other.network_;
  device_ = other.device_;
  return *this;
}

// Errors are of no use here: after a kernel's trap, CUDA refuses everything.
void SymmetricHeap::free() {
  if (base_ == nullptr) return;
  const DeviceGuard guard(device_);
  static_cast<void>(JAX_EP_CUDA_STATUS(cudaFree(std::exchange(base_, nullptr))));
}

Status SymmetricHeap::allocate(const HeapShape& shape,
                               DomainLink link,
                               int32_t device,
                               SymmetricHeap& heap) {
  JAX_EP_RETURN_IF_ERROR(check_heap_shape(shape));
  const DeviceGuard guard(device);
  JAX_EP_RETURN_IF_ERROR(guard.status());
  SymmetricHeap made;
  made.layout_ = make_heap_layout(shape);
  made.network_ = network_layout_of(shape);
  made.device_ = device;
  const int64_t network_bytes = link == DomainLink::kRdma ? 0 : made.network_.total_bytes;
  const int64_t bytes = align_up(network_offset(made.layout_) + network_bytes, kAllocationUnit);
  void* memory = nullptr;
  const cudaError_t error = cudaMalloc(&memory, static_cast<size_t>(bytes));
  if (error == cudaErrorMemoryAllocation) {
    static_cast<void>(cudaGetLastError());
    return does_not_fit(shape, bytes, device);
  }
  JAX_EP_RETURN_IF_ERROR(cuda_status(error, "cudaMalloc", __FILE__, __LINE__));
  made.base_ = static_cast<std::byte*>(memory);
  JAX_EP_RETURN_IF_ERROR(zero(made.base_, bytes));
  heap = std::move(made);
  return {};
}

Status SymmetricHeap::export_handle(const HeapOwner& owner, HeapHandle& handle) const {
  // Zeroed, padding too: the bytes leave the process.
  std::memset(static_cast<void*>(&handle), 0, sizeof(handle));
  const DeviceGuard guard(device_);
  JAX_EP_RETURN_IF_ERROR(guard.status());
  cudaDeviceProp properties;
  JAX_EP_RETURN_IF_ERROR(JAX_EP_CUDA_STATUS(cudaGetDeviceProperties(&properties, device_)));
  JAX_EP_RETURN_IF_ERROR(JAX_EP_CUDA_STATUS(cudaIpcGetMemHandle(&handle.ipc, base_)));
  handle.owner = owner;
  handle.layout = layout_;
  handle.network = network_;
  handle.base = base_;
  handle.process = process_number();
  handle.pid = getpid();
  std::memcpy(handle.device.data(), &properties.uuid, sizeof(handle.device));
  handle.device_ordinal = device_;
  return {};
}

PeerMapping::~PeerMapping() { unmap(); }

PeerMapping::PeerMapping(PeerMapping&& other) noexcept
    : base_(std::exchange(other.base_, nullptr)),
      device_(other.device_),
      opened_(std::exchange(other.opened_, false)) {}

PeerMapping& PeerMapping::operator=(PeerMapping&& other) noexcept {
  if (this == &other) return *this;
  unmap();
  base_ = std::exchange(other.base_, nullptr);
  device_ = other.device_;
  opened_ = std::exchange(other.opened_, false);
  return *this;
}

void PeerMapping::unmap() {
  std::byte* const base = std::exchange(base_, nullptr);
  if (!std::exchange(opened_, false)) return;
  const DeviceGuard guard(device_);
  static_cast<void>(JAX_EP_CUDA_STATUS(cudaIpcCloseMemHandle(base)));
}

Status PeerMapping::map(const HeapHandle& handle, int32_t device, PeerMapping& mapping) {
  const DeviceGuard guard(device);
  JAX_EP_RETURN_IF_ERROR(guard.status());
  PeerMapping made;
  made.device_ = device;
  if (handle.in_this_process()) {
    // CUDA refuses to open a handle in the process that exported it.
    JAX_EP_RETURN_IF_ERROR(enable_peer_access(device, handle.device_ordinal));
    made.base_ = handle.base;
  } else {
    void* memory = nullptr;
    const Status status = JAX_EP_CUDA_STATUS(
        cudaIpcOpenMemHandle(&memory, handle.ipc, cudaIpcMemLazyEnablePeerAccess));
    if (!status.ok()) {
      return {StatusCode::kFailedPrecondition,
              "CUDA device " + std::to_string(device) + " cannot map the heap of rank " +
                  std::to_string(handle.owner.rank) + " in process " + std::to_string(handle.pid) +
                  " (are both on one host, with NVLink or PCIe peer access between their "
                  "devices, and containers that share the IPC namespace?): " +
                  status.message()};
    }
    made.base_ = static_cast<std::byte*>(memory);
    made.opened_ = true;
  }
  mapping = std::move(made);
  return {};
}

}  // namespace jax_ep
