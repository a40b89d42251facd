// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_RUNTIME_RANK_CONTEXT_H_
#define JAX_EP_CSRC_RUNTIME_RANK_CONTEXT_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "csrc/core/error_record.h"
#include "csrc/core/heap_layout.h"
#include "csrc/core/kernel_params.h"
#include "csrc/core/protocol.h"
#include "csrc/core/status.h"
#include "csrc/runtime/rank_words.h"
#include "csrc/runtime/transport/internode_kernels.h"
#include "csrc/runtime/transport/rdma.h"
#include "csrc/runtime/transport/symmetric_heap.h"
#include "csrc/tuning/heuristics.h"

namespace jax_ep {

// What the ranks of a group have in common.
struct GroupSettings {
  std::string name;  // for messages
  GroupNonce nonce;
  double warn_after_s;
  double timeout_s;
  int32_t max_num_sms;   // 0: the default of each operation
  int32_t tail_num_sms;  // -1: all that idle
  HeapShape heap;
  DomainLink link = DomainLink::kMappedMemory;  // if the heap's ranks are in several domains
  bool masks_missing_ranks = false;  // it goes on without who does not come, where kernels can

  [[nodiscard]] bool uses_rdma() const { return heap.spans_domains() && link == DomainLink::kRdma; }
};

// A rank of this process.
struct LocalRank {
  int32_t device;       // ordinal in this process
  int32_t group_index;  // of the EP group among the mesh's other axes
  int32_t rank;         // in the EP group
};

// What a rank's CUDA side is made from.
struct RankConfig {
  GroupSettings group;
  LocalRank local;
};

// One rank of an EP group on a device of this process: its heap, its view of all heaps, and the
// place for its errors. Movable until connected; not thread-safe but for what is const.
class RankContext {
 public:
  // Allocates heap and record and loads the kernels onto the device.
  static Status create(const RankConfig& config, RankContext& context);

  // Maps the heaps of all ranks, of which kernels get those of this one's domain; `handles[r]` is
  // rank r's. `sharing` ranks of the mesh, in whatever
  // EP group, are on this rank's device. FailedPrecondition if a handle is of another group or of
  // another rank, or if the heaps are laid out differently. On an error nothing stays mapped.
  // `pes[r]` is the number of rank r's process in the job of RDMA, if that joins domains: then only
  // heaps of this rank's domain are mapped.
  Status connect(std::span<const HeapHandle> handles,
                 int32_t sharing,
                 std::span<const int32_t> pes = {});
  // Returns when nothing runs on the device. An error is of a kernel; DeadlineExceeded if something
  // still runs after `limit_s`.
  Status wait_for_kernels(double limit_s) const;
  // Tells kernels that start from now on, of recorded graphs, that the group is closed.
  Status close() { return words_.close(); }
  // Tells the rank's kernels that a rank has given up, as one of its domain would by a store into
  // the heap: they do so, too. While the group lives, from any thread.
  [[nodiscard]] Status tell(const Aborted& aborted) const;
  // The ranks on this one's rail, ascending, that have not read all that this one has sent to them,
  // or is about to send: what is known of whom a kernel cannot reach. Reads device memory while
  // kernels run. While the group lives, from any thread.
  [[nodiscard]] Status find_unread(std::vector<int32_t>& ranks) const;
  // As RankWords::give_up_on.
  void give_up_on(uint64_t ranks) const { words_.give_up_on(ranks); }
  // Unmaps the peers' heaps. No kernel of the rank may be running.
  void disconnect();
  // Leaves the heap as it is, for good: a peer may still map it.
  void leave_heap() { heap_.leave(); }
  // Likewise the peers': a kernel of this rank still runs.
  void leave_peers();
  // The network heap in memory of the library for RDMA: in all processes of its job, after create
  // and before connect; and after disconnect, or never.
  Status allocate_network_heap();
  void release_network_heap();
  [[nodiscard]] const std::byte* network_heap() const { return rdma_heap_.base(); }
  [[nodiscard]] bool connected() const { return !peers_.empty(); }

  [[nodiscard]] const RankConfig& config() const { return config_; }
  [[nodiscard]] const HeapHandle& handle() const { return handle_; }
  // For kernels; complete once connected.
  [[nodiscard]] const RankView& view() const { return view_; }
  // What serves its calls, once connected, where the group spans domains; else null.
  [[nodiscard]] const InternodeKernels* internode_kernels() const { return internode_.get(); }
  // SMs that a launch may use: the device's, shared with the mesh's other ranks on it.
  [[nodiscard]] SmBudget sm_budget() const { return budget_; }

  // Why a kernel of this rank has given up, if one has: DeadlineExceeded says what it waited for,
  // InvalidArgument and FailedPrecondition what was wrong with the program.
  [[nodiscard]] Status error() const;

 private:
  Status check_handle(const HeapHandle& handle, int32_t rank) const;
  [[nodiscard]] bool is_neighbor(int32_t rank) const {
    return rank >= view_.first_neighbor && rank < view_.first_neighbor + view_.num_neighbors;
  }
  [[nodiscard]] NetworkView network_view() const;
  [[nodiscard]] LoopbackNetwork loopback_network(std::span<const PeerMapping> peers) const;
  Status rdma_network(std::span<const int32_t> pes, RdmaNetwork& found) const;

  RankConfig config_;
  SymmetricHeap heap_;
  RdmaHeap rdma_heap_;
  RankWords words_;
  HeapHandle handle_{};
  std::vector<PeerMapping> peers_;
  RankView view_{};
  std::unique_ptr<const InternodeKernels> internode_;
  int32_t device_sms_ = 0;
  SmBudget budget_{};
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_RUNTIME_RANK_CONTEXT_H_
