// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_RUNTIME_RANK_CONTEXT_H_
#define JAX_EP_CSRC_RUNTIME_RANK_CONTEXT_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "csrc/core/error_record.h"
#include "csrc/core/heap_layout.h"
#include "csrc/core/status.h"
#include "csrc/kernels/params.h"
#include "csrc/runtime/symmetric_heap.h"
#include "csrc/runtime/tuning.h"

namespace jax_ep {

// An ErrorRecord in pinned host memory that a device can write. Freed with the object; move-only.
class PinnedRecord {
 public:
  PinnedRecord() = default;
  ~PinnedRecord();
  PinnedRecord(PinnedRecord&& other) noexcept;
  PinnedRecord& operator=(PinnedRecord&& other) noexcept;

  // For the current device; zeroed.
  static Status allocate(PinnedRecord& record);

  [[nodiscard]] ErrorRecord* on_device() const { return on_device_; }
  // What a kernel wrote, if one has.
  [[nodiscard]] std::optional<ErrorRecord> read() const;

 private:
  void free();

  ErrorRecord* on_host_ = nullptr;
  ErrorRecord* on_device_ = nullptr;
};

// What a rank's CUDA side is made from.
struct RankConfig {
  HeapShape heap;
  GroupNonce nonce;
  int32_t device = 0;       // ordinal in this process
  int32_t group_index = 0;  // of the EP group among the mesh's other axes
  int32_t rank = 0;         // in the EP group
  double timeout_s = 60;
  int32_t num_sms = 0;  // 0: the default of each operation
};

// One rank of an EP group on a device of this process: its heap, its view of all heaps, and the
// place for its errors. Movable until connected; not thread-safe but for what is const.
class RankContext {
 public:
  // Allocates heap and record and loads the kernels onto the device.
  static Status create(const RankConfig& config, RankContext& context);

  // Maps the heaps of all ranks; `handles[r]` is rank r's. FailedPrecondition if a handle is of
  // another group or of another rank, or if the heaps are laid out differently. On an error
  // nothing stays mapped.
  Status connect(std::span<const HeapHandle> handles);
  // Returns when nothing runs on the device. Errors are of kernels, and have been reported.
  void wait_for_kernels() const;
  // Unmaps the peers' heaps. No kernel of the rank may be running.
  void disconnect();
  [[nodiscard]] bool connected() const { return !peers_.empty(); }

  [[nodiscard]] const RankConfig& config() const { return config_; }
  [[nodiscard]] const HeapHandle& handle() const { return handle_; }
  // For kernels; complete once connected.
  [[nodiscard]] const RankView& view() const { return view_; }
  // SMs that a launch may use: the device's, shared with the group's other ranks on it.
  [[nodiscard]] SmBudget sm_budget() const { return budget_; }

  // Why a kernel of this rank has given up, if one has: DeadlineExceeded says what it waited for,
  // InvalidArgument and FailedPrecondition what was wrong with the program.
  [[nodiscard]] Status error() const;

 private:
  Status check_handle(const HeapHandle& handle, int32_t rank) const;

  RankConfig config_;
  SymmetricHeap heap_;
  PinnedRecord record_;
  HeapHandle handle_{};
  std::vector<PeerMapping> peers_;
  RankView view_{};
  int32_t device_sms_ = 0;
  SmBudget budget_{};
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_RUNTIME_RANK_CONTEXT_H_
