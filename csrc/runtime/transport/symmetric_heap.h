// SPDX-License-Identifier: Apache-2.0
// A rank's part of the symmetric heap: its memory, and how other ranks come to map it. What reaches
// ranks of other domains, NVSHMEM for one, is behind internode_kernels.h.
#ifndef JAX_EP_CSRC_RUNTIME_TRANSPORT_SYMMETRIC_HEAP_H_
#define JAX_EP_CSRC_RUNTIME_TRANSPORT_SYMMETRIC_HEAP_H_

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>

#include "csrc/core/heap_layout.h"
#include "csrc/core/limits.h"
#include "csrc/core/network_layout.h"
#include "csrc/core/status.h"

namespace jax_ep {

// A number that the processes of a group, and nobody else, agree on.
using GroupNonce = uint64_t;

// Who a heap belongs to.
struct HeapOwner {
  GroupNonce nonce;     // of the group
  int32_t group_index;  // of the EP group among the mesh's other axes
  int32_t rank;         // in the EP group
};

// What a rank tells its peers, so that they can map its heap. Goes from process to process as
// bytes.
struct HeapHandle {
  HeapOwner owner;
  HeapLayout layout;
  NetworkLayout network;  // of the network heap behind it; zeros if there is none
  cudaIpcMemHandle_t ipc;
  std::byte* base;                    // in the process that exported it
  std::array<std::byte, 16> process;  // of that process: a random number, and
  int64_t pid;                        // its id, for messages
  std::array<std::byte, 16> device;   // its device's UUID
  int32_t device_ordinal;             // ... and its number there

  [[nodiscard]] std::string to_bytes() const;
  // InvalidArgument if these are not the bytes of a handle of this version of the library.
  static Status from_bytes(std::string_view bytes, HeapHandle& handle);
  [[nodiscard]] bool in_this_process() const;
};
static_assert(std::is_trivially_copyable_v<HeapHandle>);

// Where a rank's network heap lies behind its heap, in bytes.
constexpr int64_t network_offset(const HeapLayout& layout) {
  constexpr int64_t kAlignment = 256;
  return align_up(layout.total_bytes, kAlignment);
}

// What joins the domains of a group that spans some.
enum class DomainLink : int32_t {
  kMappedMemory,  // all ranks are on one host, and map each other's network heaps
  kRdma,          // network heaps are in memory of the library for RDMA (rdma.h)
};

// Device memory for one rank's heap, and behind it, if mapped memory joins domains of its group,
// for its network heap. Freed with the object; move-only.
class SymmetricHeap {
 public:
  SymmetricHeap() = default;
  ~SymmetricHeap();
  SymmetricHeap(SymmetricHeap&& other) noexcept;
  SymmetricHeap& operator=(SymmetricHeap&& other) noexcept;

  // Allocates on the device and zeroes. ResourceExhausted if it does not fit: says how much is
  // needed, for what and what to lower.
  static Status allocate(const HeapShape& shape,
                         DomainLink link,
                         int32_t device,
                         SymmetricHeap& heap);

  [[nodiscard]] std::byte* base() const { return base_; }
  [[nodiscard]] const HeapLayout& layout() const { return layout_; }
  [[nodiscard]] const NetworkLayout& network() const { return network_; }
  [[nodiscard]] int32_t device() const { return device_; }

  Status export_handle(const HeapOwner& owner, HeapHandle& handle) const;
  // Gives the memory up without freeing it: a peer may still map it.
  void leave() { base_ = nullptr; }

 private:
  void free();

  std::byte* base_ = nullptr;
  HeapLayout layout_{};
  NetworkLayout network_{};
  int32_t device_ = -1;
};

// A peer's heap, mapped for one device. Unmapped with the object; move-only.
class PeerMapping {
 public:
  PeerMapping() = default;
  ~PeerMapping();
  PeerMapping(PeerMapping&& other) noexcept;
  PeerMapping& operator=(PeerMapping&& other) noexcept;

  // Maps the heap behind `handle` for kernels of `device`. FailedPrecondition if the two devices
  // cannot reach each other's memory.
  static Status map(const HeapHandle& handle, int32_t device, PeerMapping& mapping);

  [[nodiscard]] std::byte* base() const { return base_; }
  // Stays mapped, for good.
  void leave() { opened_ = false; }

 private:
  void unmap();

  std::byte* base_ = nullptr;
  int32_t device_ = -1;
  bool opened_ = false;  // through IPC, and so to be closed
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_RUNTIME_TRANSPORT_SYMMETRIC_HEAP_H_
