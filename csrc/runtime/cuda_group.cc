// SPDX-License-Identifier: Apache-2.0
#include "csrc/runtime/cuda_group.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace jax_ep {
namespace {

// Of a wait for kernels that may have begun when the time was already over.
constexpr double kLeastWaitS = 0.1;

Status check_ranks(const CudaGroupConfig& config) {
  for (const LocalRank& local : config.ranks) {
    if (local.rank < 0 || local.rank >= config.group.heap.num_ranks) {
      return Status::invalid_argument(
          "rank is " + std::to_string(local.rank) +
          "; allowed: 0 to num_ranks - 1 = " + std::to_string(config.group.heap.num_ranks - 1));
    }
    const auto on_device =
        std::count_if(config.ranks.begin(), config.ranks.end(), [&](const LocalRank& other) {
          return other.device == local.device;
        });
    if (on_device > 1) {
      return Status::invalid_argument("CUDA device " + std::to_string(local.device) +
                                      " is given to " + std::to_string(on_device) +
                                      " ranks of one process; allowed: one");
    }
  }
  return {};
}

// The handles of one EP group, by rank.
Status choose_peers(const CudaGroupConfig& config,
                    int32_t group_index,
                    std::span<const HeapHandle> handles,
                    std::vector<HeapHandle>& peers) {
  const auto num_ranks = static_cast<size_t>(config.group.heap.num_ranks);
  std::vector<bool> there(num_ranks);
  peers.resize(num_ranks);
  for (const HeapHandle& handle : handles) {
    const auto rank = static_cast<size_t>(handle.owner.rank);
    if (handle.owner.group_index != group_index || rank >= num_ranks) continue;
    peers[rank] = handle;
    there[rank] = true;
  }
  const auto missing = std::find(there.begin(), there.end(), false);
  if (missing == there.end()) return {};
  return Status::invalid_argument(
      "connect: no handle of rank " + std::to_string(missing - there.begin()) + " of group " +
      std::to_string(group_index) + " among " + std::to_string(handles.size()));
}

}  // namespace

Status CudaGroup::create(CudaGroupConfig config, std::unique_ptr<CudaGroup>& group) {
  JAX_EP_RETURN_IF_ERROR(check_ranks(config));
  std::unique_ptr<CudaGroup> made(new CudaGroup(std::move(config)));
  const CudaGroupConfig& with = made->config_;
  made->ranks_.resize(with.ranks.size());
  for (size_t i = 0; i < with.ranks.size(); ++i) {
    const RankConfig rank{.group = with.group, .local = with.ranks[i]};
    JAX_EP_RETURN_IF_ERROR(RankContext::create(rank, made->ranks_[i]));
  }
  group = std::move(made);
  return {};
}

Status CudaGroup::connect(int32_t group_index,
                          int32_t rank,
                          std::span<const HeapHandle> handles,
                          std::span<const int32_t> pes) {
  const auto it = std::find_if(ranks_.begin(), ranks_.end(), [&](const RankContext& context) {
    return context.config().local.group_index == group_index && context.config().local.rank == rank;
  });
  if (it == ranks_.end()) {
    return Status::invalid_argument("connect: rank " + std::to_string(rank) + " of group " +
                                    std::to_string(group_index) + " is not of this process");
  }
  if (it->connected()) {
    return Status::invalid_argument("connect: rank " + std::to_string(rank) + " of group " +
                                    std::to_string(group_index) + " is connected already");
  }
  std::vector<HeapHandle> peers;
  JAX_EP_RETURN_IF_ERROR(choose_peers(config_, group_index, handles, peers));
  const auto sharing = std::count_if(handles.begin(), handles.end(), [&](const HeapHandle& handle) {
    return handle.device == it->handle().device;
  });
  JAX_EP_RETURN_IF_ERROR(it->connect(peers, static_cast<int32_t>(sharing), pes));
  const bool all = std::all_of(
      ranks_.begin(), ranks_.end(), [](const RankContext& context) { return context.connected(); });
  ready_.store(all, std::memory_order_release);
  return {};
}

Status CudaGroup::disconnect(double limit_s) {
  ready_.store(false, std::memory_order_release);
  const auto begin = std::chrono::steady_clock::now();
  Status status;
  bool running = false;
  const auto note = [&](Status other) {
    if (status.ok()) status = std::move(other);
  };
  const auto wait_for_kernels = [&] {
    for (const RankContext& context : ranks_) {
      if (running) return;
      const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - begin;
      Status waits = context.wait_for_kernels(std::max(limit_s - waited.count(), kLeastWaitS));
      running = waits.code() == StatusCode::kDeadlineExceeded;
      if (running) status = {};  // whatever else there was, this is what matters
      note(std::move(waits));
    }
  };
  // Kernels whose results nobody holds may still be running, and the peers' with them; their
  // deadlines bound the wait. Then no graph's kernel may touch a heap any more, nor one that was
  // launched in between.
  wait_for_kernels();
  for (RankContext& context : ranks_) note(context.close());
  wait_for_kernels();
  for (RankContext& context : ranks_) {
    if (running) {
      context.leave_heap();
      context.leave_peers();
    } else {
      context.disconnect();
    }
  }
  return status;
}

Status CudaGroup::allocate_network_heap(const std::byte*& heap) {
  if (!config_.group.uses_rdma() || ranks_.size() != 1) {
    return {StatusCode::kFailedPrecondition,
            config_.group.name + " has no network heap in memory of the RDMA library"};
  }
  JAX_EP_RETURN_IF_ERROR(ranks_[0].allocate_network_heap());
  heap = ranks_[0].network_heap();
  return {};
}

void CudaGroup::release_network_heap() {
  for (RankContext& context : ranks_) context.release_network_heap();
}

void CudaGroup::leave_heaps() {
  for (RankContext& context : ranks_) context.leave_heap();
}

Status CudaGroup::find(int32_t device, const RankContext*& context) const {
  if (!ready_.load(std::memory_order_acquire)) {
    return {StatusCode::kFailedPrecondition, config_.group.name + " is not connected to its peers"};
  }
  for (const RankContext& candidate : ranks_) {
    if (candidate.config().local.device != device) continue;
    context = &candidate;
    return {};
  }
  return {StatusCode::kFailedPrecondition,
          config_.group.name + " has no rank on CUDA device " + std::to_string(device) +
              "; run the program on the mesh that the group was made for"};
}

Status CudaGroup::set_launches(std::vector<TunedLaunch> tuned) {
  JAX_EP_RETURN_IF_ERROR(check_tuned(tuned));
  const std::lock_guard lock(tuned_mutex_);
  tuned_ = std::move(tuned);
  return {};
}

LaunchChoice CudaGroup::choice_of(OpKind op, bool low_latency, int64_t num_tokens) const {
  const std::lock_guard lock(tuned_mutex_);
  return find_choice(tuned_, op, low_latency, num_tokens);
}

Status CudaGroup::give_up_on(int32_t group_index, std::span<const int32_t> ranks) const {
  uint64_t bits = 0;
  for (const int32_t rank : ranks) {
    if (rank < 0 || rank >= config_.group.heap.num_ranks) {
      return Status::invalid_argument("give_up_on: ranks holds " + std::to_string(rank) +
                                      "; allowed: 0 to " +
                                      std::to_string(config_.group.heap.num_ranks - 1));
    }
    bits |= uint64_t{1} << rank;
  }
  for (const RankContext& context : ranks_) {
    if (context.config().local.group_index == group_index) context.give_up_on(bits);
  }
  return {};
}

Status CudaGroup::error() const {
  for (const RankContext& context : ranks_) JAX_EP_RETURN_IF_ERROR(context.error());
  return {};
}

}  // namespace jax_ep
