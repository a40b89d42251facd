// SPDX-License-Identifier: Apache-2.0
#include "csrc/runtime/rank_context.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <utility>

#include "csrc/core/heap_regions.h"
#include "csrc/kernels/launch.h"
#include "csrc/runtime/cuda_status.h"

namespace jax_ep {
namespace {

// As on the CPU, where ranks that disagree get InvalidArgument.
StatusCode code_of(WaitTag tag) {
  switch (tag) {
    case WaitTag::kWrongOp: return StatusCode::kInvalidArgument;
    case WaitTag::kWrongRank: return StatusCode::kFailedPrecondition;
    default: return StatusCode::kDeadlineExceeded;
  }
}

Status bad_handle(const std::string& what) { return {StatusCode::kFailedPrecondition, what}; }

}  // namespace

PinnedRecord::~PinnedRecord() { free(); }

PinnedRecord::PinnedRecord(PinnedRecord&& other) noexcept
    : on_host_(std::exchange(other.on_host_, nullptr)),
      on_device_(std::exchange(other.on_device_, nullptr)) {}

PinnedRecord& PinnedRecord::operator=(PinnedRecord&& other) noexcept {
  if (this == &other) return *this;
  free();
  on_host_ = std::exchange(other.on_host_, nullptr);
  on_device_ = std::exchange(other.on_device_, nullptr);
  return *this;
}

void PinnedRecord::free() {
  if (on_host_ == nullptr) return;
  static_cast<void>(JAX_EP_CUDA_STATUS(cudaFreeHost(std::exchange(on_host_, nullptr))));
}

Status PinnedRecord::allocate(PinnedRecord& record) {
  PinnedRecord made;
  void* host = nullptr;
  JAX_EP_RETURN_IF_ERROR(JAX_EP_CUDA_STATUS(
      cudaHostAlloc(&host, sizeof(ErrorRecord), cudaHostAllocMapped | cudaHostAllocPortable)));
  made.on_host_ = new (host) ErrorRecord{};
  void* device = nullptr;
  JAX_EP_RETURN_IF_ERROR(JAX_EP_CUDA_STATUS(cudaHostGetDevicePointer(&device, host, 0)));
  made.on_device_ = static_cast<ErrorRecord*>(device);
  record = std::move(made);
  return {};
}

std::optional<ErrorRecord> PinnedRecord::read() const {
  if (on_host_ == nullptr) return std::nullopt;
  // ACQUIRE(error): the record that the kernel which gave up has published.
  const std::atomic_ref<uint32_t> written(on_host_->written);
  if (written.load(std::memory_order_acquire) == 0) return std::nullopt;
  return *on_host_;
}

Status RankContext::create(const RankConfig& config, RankContext& context) {
  const DeviceGuard guard(config.device);
  JAX_EP_RETURN_IF_ERROR(guard.status());
  RankContext made;
  made.config_ = config;
  // First: on a GPU that the kernels were not compiled for, nothing is to be allocated.
  JAX_EP_RETURN_IF_ERROR(JAX_EP_CUDA_STATUS(load_kernels()));
  JAX_EP_RETURN_IF_ERROR(SymmetricHeap::allocate(config.heap, config.device, made.heap_));
  JAX_EP_RETURN_IF_ERROR(PinnedRecord::allocate(made.record_));
  JAX_EP_RETURN_IF_ERROR(JAX_EP_CUDA_STATUS(
      cudaDeviceGetAttribute(&made.device_sms_, cudaDevAttrMultiProcessorCount, config.device)));
  const HeapOwner owner{
      .nonce = config.nonce, .group_index = config.group_index, .rank = config.rank};
  JAX_EP_RETURN_IF_ERROR(made.heap_.export_handle(owner, made.handle_));
  made.view_.layout = made.heap_.layout();
  made.view_.error = made.record_.on_device();
  made.view_.timeout_ns = static_cast<uint64_t>(std::ceil(config.timeout_s * 1e9));
  made.view_.rank = config.rank;
  made.view_.num_ranks = config.heap.num_ranks;
  context = std::move(made);
  return {};
}

Status RankContext::check_handle(const HeapHandle& handle, int32_t rank) const {
  const std::string who = "the handle of rank " + std::to_string(rank);
  if (handle.owner.nonce != config_.nonce) return bad_handle(who + " is of another EpGroup");
  if (handle.owner.group_index != config_.group_index || handle.owner.rank != rank) {
    return bad_handle(who + " of group " + std::to_string(config_.group_index) +
                      " is that of rank " + std::to_string(handle.owner.rank) + " of group " +
                      std::to_string(handle.owner.group_index));
  }
  if (std::memcmp(&handle.layout, &view_.layout, sizeof(HeapLayout)) != 0) {
    return bad_handle("the heap of rank " + std::to_string(rank) + " has " +
                      bytes_text(handle.layout.total_bytes) + ", laid out otherwise than the " +
                      bytes_text(view_.layout.total_bytes) + " of rank " +
                      std::to_string(config_.rank) +
                      "; every process must make the EpGroup with the same EpConfig");
  }
  return {};
}

Status RankContext::connect(std::span<const HeapHandle> handles) {
  if (handles.size() != static_cast<size_t>(view_.num_ranks)) {
    return Status::invalid_argument("connect: " + std::to_string(handles.size()) + " handles for " +
                                    std::to_string(view_.num_ranks) + " ranks");
  }
  std::vector<PeerMapping> peers(handles.size());
  RankView view = view_;
  for (int32_t rank = 0; rank < view.num_ranks; ++rank) {
    const auto index = static_cast<size_t>(rank);
    JAX_EP_RETURN_IF_ERROR(check_handle(handles[index], rank));
    JAX_EP_RETURN_IF_ERROR(PeerMapping::map(handles[index], config_.device, peers[index]));
    view.heap[rank] = peers[index].base();
  }
  // Ranks that share a device wait for each other: all their blocks must fit on it at once.
  const auto sharing = std::count_if(handles.begin(), handles.end(), [&](const auto& handle) {
    return handle.device == handle_.device;
  });
  budget_ = {.available = std::max(device_sms_ / static_cast<int32_t>(sharing), 1),
             .wanted = config_.num_sms};
  peers_ = std::move(peers);
  view_ = view;
  return {};
}

void RankContext::wait_for_kernels() const {
  const DeviceGuard guard(config_.device);
  if (guard.status().ok()) static_cast<void>(JAX_EP_CUDA_STATUS(cudaDeviceSynchronize()));
}

void RankContext::disconnect() { peers_.clear(); }

Status RankContext::error() const {
  const std::optional<ErrorRecord> record = record_.read();
  if (!record.has_value()) return {};
  return {code_of(static_cast<WaitTag>(record->tag)), describe(*record, config_.timeout_s)};
}

}  // namespace jax_ep
