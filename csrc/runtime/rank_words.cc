// SPDX-License-Identifier: Apache-2.0
#include "csrc/runtime/rank_words.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#include "csrc/runtime/cuda_status.h"
#include "csrc/runtime/own_stream.h"

namespace jax_ep {

// A place in the pools: free, or of a rank.
struct WordsSlot {
  WordsOwner owner;
  uint32_t* control = nullptr;     // on the device
  HostMailbox* mailbox = nullptr;  // on the host
  HostMailbox* mailbox_on_device = nullptr;
  bool published = false;
};

// All slots of the process. Never destroyed: the watch may read while the process exits.
struct RankWordsPool {
  std::mutex mutex;
  std::map<int32_t, std::vector<WordsSlot*>> free;  // by device
  std::vector<std::unique_ptr<WordsSlot>> slots;

  static RankWordsPool& instance() {
    static auto* const pool = new RankWordsPool;
    return *pool;
  }

  // With the mutex held. Slots for the current device.
  Status grow(int32_t device) {
    void* control = nullptr;
    JAX_EP_RETURN_IF_ERROR(JAX_EP_CUDA_STATUS(cudaMalloc(&control, kWordsAtOnce * kControlBytes)));
    void* host = nullptr;
    void* host_on_device = nullptr;
    Status status = JAX_EP_CUDA_STATUS(
        cudaHostAlloc(&host, kWordsAtOnce * sizeof(HostMailbox), cudaHostAllocMapped));
    if (status.ok()) {
      status = JAX_EP_CUDA_STATUS(cudaHostGetDevicePointer(&host_on_device, host, 0));
    }
    if (!status.ok()) {
      if (host != nullptr) static_cast<void>(JAX_EP_CUDA_STATUS(cudaFreeHost(host)));
      static_cast<void>(JAX_EP_CUDA_STATUS(cudaFree(control)));
      return status;
    }
    auto* const mailboxes = static_cast<HostMailbox*>(host);
    auto* const on_device = static_cast<HostMailbox*>(host_on_device);
    for (size_t i = 0; i < kWordsAtOnce; ++i) {
      auto slot = std::make_unique<WordsSlot>();
      slot->control = static_cast<uint32_t*>(control) + i * (kControlBytes / 4);
      slot->mailbox = mailboxes + i;
      slot->mailbox_on_device = on_device + i;
      free[device].push_back(slot.get());
      slots.push_back(std::move(slot));
    }
    return {};
  }
};

Status RankWords::allocate(WordsOwner owner, RankWords& words) {
  RankWordsPool& pool = RankWordsPool::instance();
  const int32_t device = owner.device;
  RankWords made;
  {
    const std::lock_guard lock(pool.mutex);
    std::vector<WordsSlot*>& free = pool.free[device];
    if (free.empty()) JAX_EP_RETURN_IF_ERROR(pool.grow(device));
    made.slot_ = free.back();
    free.pop_back();
    made.slot_->owner = std::move(owner);
    made.slot_->published = false;
    new (made.slot_->mailbox) HostMailbox{};
  }
  uint32_t* const control = made.slot_->control;
  JAX_EP_RETURN_IF_ERROR(on_own_stream([control](cudaStream_t stream) {
    return JAX_EP_CUDA_STATUS(cudaMemsetAsync(control, 0, kControlBytes, stream));
  }));
  words = std::move(made);
  return {};
}

RankWords::~RankWords() { release(); }

RankWords::RankWords(RankWords&& other) noexcept : slot_(std::exchange(other.slot_, nullptr)) {}

RankWords& RankWords::operator=(RankWords&& other) noexcept {
  if (this == &other) return *this;
  release();
  slot_ = std::exchange(other.slot_, nullptr);
  return *this;
}

void RankWords::release() {
  WordsSlot* const slot = std::exchange(slot_, nullptr);
  if (slot == nullptr) return;
  RankWordsPool& pool = RankWordsPool::instance();
  const std::lock_guard lock(pool.mutex);
  if (!slot->published) pool.free[slot->owner.device].push_back(slot);
}

uint32_t* RankWords::control() const { return slot_->control; }

ErrorRecord* RankWords::error_on_device() const { return &slot_->mailbox_on_device->error; }

uint64_t* RankWords::long_waits_on_device() const { return slot_->mailbox_on_device->long_waits; }

uint64_t* RankWords::phases_on_device() const { return slot_->mailbox_on_device->phases; }

const uint64_t* RankWords::given_up_on_device() const {
  return &slot_->mailbox_on_device->given_up;
}

void RankWords::give_up_on(uint64_t ranks) const {
  // It says when a wait ends, and nothing of what there is to read.
  std::atomic_ref<uint64_t>(slot_->mailbox->given_up).fetch_or(ranks, std::memory_order_relaxed);
}

void RankWords::publish() {
  const std::lock_guard lock(RankWordsPool::instance().mutex);
  slot_->published = true;
}

Status RankWords::close() {
  if (slot_ == nullptr) return {};
  const DeviceGuard guard(slot_->owner.device);
  JAX_EP_RETURN_IF_ERROR(guard.status());
  uint32_t* const closed = slot_->control + control_index(Control::kClosed);
  return on_own_stream([closed](cudaStream_t stream) {
    return JAX_EP_CUDA_STATUS(cudaMemsetAsync(closed, 1, sizeof *closed, stream));
  });
}

namespace {

std::optional<ErrorRecord> read_error(HostMailbox& mailbox) {
  // ACQUIRE(error): the record that the kernel which gave up has published.
  const std::atomic_ref<uint32_t> written(mailbox.error.written);
  if (written.load(std::memory_order_acquire) == 0) return std::nullopt;
  return mailbox.error;
}

}  // namespace

std::optional<ErrorRecord> RankWords::error() const {
  return slot_ == nullptr ? std::nullopt : read_error(*slot_->mailbox);
}

std::vector<RankStatus> rank_statuses() {
  RankWordsPool& pool = RankWordsPool::instance();
  const std::lock_guard lock(pool.mutex);
  std::vector<RankStatus> statuses;
  for (const auto& slot : pool.slots) {
    if (!slot->published) continue;
    RankStatus status{.owner = slot->owner, .error = read_error(*slot->mailbox), .waits = {}};
    for (int32_t peer = 0; peer < slot->owner.num_ranks; ++peer) {
      const std::atomic_ref<uint64_t> word(slot->mailbox->long_waits[peer]);
      const uint64_t seen = word.load(std::memory_order_relaxed);
      if (seen != 0) status.waits.push_back({.peer = peer, .wait = unpack_long_wait(seen)});
    }
    if (status.error.has_value() || !status.waits.empty()) statuses.push_back(std::move(status));
  }
  return statuses;
}

std::vector<RunningKernel> running_kernels() {
  RankWordsPool& pool = RankWordsPool::instance();
  const std::lock_guard lock(pool.mutex);
  std::vector<RunningKernel> kernels;
  for (const auto& slot : pool.slots) {
    if (!slot->published) continue;
    for (uint64_t& phase : slot->mailbox->phases) {
      const std::atomic_ref<uint64_t> word(phase);
      const KernelPhase seen = unpack_kernel_phase(word.load(std::memory_order_relaxed));
      if (seen.running) kernels.push_back({.owner = slot->owner, .phase = seen});
    }
  }
  return kernels;
}

}  // namespace jax_ep
