// SPDX-License-Identifier: Apache-2.0
// The groups of this process on CUDA.
#ifndef JAX_EP_CSRC_RUNTIME_CUDA_GROUP_H_
#define JAX_EP_CSRC_RUNTIME_CUDA_GROUP_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "csrc/core/heap_layout.h"
#include "csrc/core/status.h"
#include "csrc/runtime/rank_context.h"
#include "csrc/tuning/tuned_launches.h"

namespace jax_ep {

struct CudaGroupConfig {
  GroupSettings group;
  std::vector<LocalRank> ranks;  // at most one on a device
};

// The ranks of an EpGroup that this process drives. Its life: create; connect each rank, once the
// handles of its EP group's ranks have come from all processes; operations; disconnect, when no
// operation is in flight here; and only when all processes have disconnected, destruction, which
// frees the heaps. Any step may be followed by destruction. Where a process has not come to
// disconnect, leave_heaps() before destruction: it may still map them.
class CudaGroup {
 public:
  // On an error nothing stays allocated.
  static Status create(CudaGroupConfig config, std::unique_ptr<CudaGroup>& group);

  // `handles` are those of all ranks of all EP groups of the mesh, in any order; `pes` as
  // RankContext::connect takes them.
  Status connect(int32_t group_index,
                 int32_t rank,
                 std::span<const HeapHandle> handles,
                 std::span<const int32_t> pes = {});
  // Returns the first error, if there is one: after a kernel's trap, CUDA refuses everything. Goes
  // on nevertheless; but if kernels run on after `limit_s`, it is DeadlineExceeded, and all heaps
  // stay allocated and mapped for good: destruction does not touch them.
  Status disconnect(double limit_s);
  void leave_heaps();
  // As those of RankContext, of a group that RDMA serves; the address is of the rank here.
  Status allocate_network_heap(const std::byte*& heap);
  void release_network_heap();

  [[nodiscard]] const CudaGroupConfig& config() const { return config_; }
  // In the order of config().ranks.
  [[nodiscard]] std::span<const RankContext> ranks() const { return ranks_; }
  // The rank on a device, ready for operations. FailedPrecondition if there is none.
  Status find(int32_t device, const RankContext*& context) const;
  // What later launches are to be like, instead of what was said before: InvalidArgument, and no
  // change, if that cannot be. Recorded graphs keep theirs. Safe from any thread, as choice_of is.
  Status set_launches(std::vector<TunedLaunch> tuned);
  [[nodiscard]] LaunchChoice choice_of(OpKind op, bool low_latency, int64_t num_tokens) const;
  // Ends the waits for these ranks of those of the process that are in the EP group, in operations
  // that say which ranks were missing: InvalidArgument if there is no such rank. From any thread.
  Status give_up_on(int32_t group_index, std::span<const int32_t> ranks) const;
  // The error of the first rank that has one.
  [[nodiscard]] Status error() const;

 private:
  explicit CudaGroup(CudaGroupConfig config) : config_(std::move(config)) {}

  CudaGroupConfig config_;
  std::vector<RankContext> ranks_;
  // Published with release when the last rank is connected: handlers run on other threads.
  std::atomic<bool> ready_ = false;
  mutable std::mutex tuned_mutex_;
  std::vector<TunedLaunch> tuned_;  // guarded by it
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_RUNTIME_CUDA_GROUP_H_
