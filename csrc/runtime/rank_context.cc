// SPDX-License-Identifier: Apache-2.0
#include "csrc/runtime/rank_context.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <future>
#include <memory>
#include <thread>
#include <utility>

#include "csrc/core/heap_description.h"
#include "csrc/core/wait_times.h"
#include "csrc/launch/launch.h"
#include "csrc/runtime/cuda_status.h"
#include "csrc/runtime/own_stream.h"

namespace jax_ep {
namespace {

// As on the CPU, where ranks that disagree get InvalidArgument.
StatusCode code_of(WaitTag tag) {
  switch (tag) {
    case WaitTag::kWrongOp:
    case WaitTag::kWrongCall: return StatusCode::kInvalidArgument;
    case WaitTag::kWrongRank:
    case WaitTag::kOverlap:
    case WaitTag::kStaleFlight:
    case WaitTag::kClosed: return StatusCode::kFailedPrecondition;
    default: return StatusCode::kDeadlineExceeded;
  }
}

Status load_internode_kernels(const GroupSettings& group) {
  if (!group.heap.spans_domains()) return {};
  if (!group.uses_rdma()) return JAX_EP_CUDA_STATUS(load_loopback_kernels());
  const RdmaLibrary* const library = rdma_library();
  if (library == nullptr) {
    return {StatusCode::kFailedPrecondition, "no RDMA library has been loaded"};
  }
  return JAX_EP_CUDA_STATUS(library->load_kernels());
}

Status bad_handle(const std::string& what) { return {StatusCode::kFailedPrecondition, what}; }

}  // namespace

Status RankContext::create(const RankConfig& config, RankContext& context) {
  const DeviceGuard guard(config.local.device);
  JAX_EP_RETURN_IF_ERROR(guard.status());
  RankContext made;
  made.config_ = config;
  // First: on a GPU that the kernels were not compiled for, nothing is to be allocated.
  JAX_EP_RETURN_IF_ERROR(JAX_EP_CUDA_STATUS(load_kernels()));
  JAX_EP_RETURN_IF_ERROR(load_internode_kernels(config.group));
  JAX_EP_RETURN_IF_ERROR(SymmetricHeap::allocate(
      config.group.heap, config.group.link, config.local.device, made.heap_));
  const double report_s = first_report_s(config.group.warn_after_s);
  JAX_EP_RETURN_IF_ERROR(RankWords::allocate({.group_name = config.group.name,
                                              .device = config.local.device,
                                              .group_index = config.local.group_index,
                                              .rank = config.local.rank,
                                              .num_ranks = config.group.heap.num_ranks,
                                              .timeout_s = config.group.timeout_s,
                                              .report_s = report_s},
                                             made.words_));
  JAX_EP_RETURN_IF_ERROR(JAX_EP_CUDA_STATUS(cudaDeviceGetAttribute(
      &made.device_sms_, cudaDevAttrMultiProcessorCount, config.local.device)));
  const HeapOwner owner{.nonce = config.group.nonce,
                        .group_index = config.local.group_index,
                        .rank = config.local.rank};
  JAX_EP_RETURN_IF_ERROR(made.heap_.export_handle(owner, made.handle_));
  made.view_.layout = made.heap_.layout();
  made.view_.control = made.words_.control();
  made.view_.error = made.words_.error_on_device();
  made.view_.long_waits = made.words_.long_waits_on_device();
  if (config.group.masks_missing_ranks) made.view_.given_up = made.words_.given_up_on_device();
  made.view_.report_ns = to_wait_ns(report_s);
  made.view_.timeout_ns = to_wait_ns(config.group.timeout_s);
  made.view_.rank = config.local.rank;
  made.view_.num_ranks = config.group.heap.num_ranks;
  const Topology topology = config.group.heap.topology();
  made.view_.first_neighbor = topology.rank_at(topology.domain_of(config.local.rank), 0);
  made.view_.num_neighbors = topology.num_scaleup_ranks;
  context = std::move(made);
  return {};
}

Status RankContext::check_handle(const HeapHandle& handle, int32_t rank) const {
  const std::string who = "the handle of rank " + std::to_string(rank);
  if (handle.owner.nonce != config_.group.nonce) return bad_handle(who + " is of another EpGroup");
  if (handle.owner.group_index != config_.local.group_index || handle.owner.rank != rank) {
    return bad_handle(who + " of group " + std::to_string(config_.local.group_index) +
                      " is that of rank " + std::to_string(handle.owner.rank) + " of group " +
                      std::to_string(handle.owner.group_index));
  }
  if (std::memcmp(&handle.layout, &view_.layout, sizeof(HeapLayout)) != 0 ||
      std::memcmp(&handle.network, &heap_.network(), sizeof(NetworkLayout)) != 0) {
    return bad_handle("the heap of rank " + std::to_string(rank) + " has " +
                      bytes_text(handle.layout.total_bytes) + ", laid out otherwise than the " +
                      bytes_text(view_.layout.total_bytes) + " of rank " +
                      std::to_string(config_.local.rank) +
                      "; every process must make the EpGroup with the same EpConfig");
  }
  return {};
}

Status RankContext::connect(std::span<const HeapHandle> handles,
                            int32_t sharing,
                            std::span<const int32_t> pes) {
  const bool uses_rdma = config_.group.uses_rdma();
  if (handles.size() != static_cast<size_t>(view_.num_ranks)) {
    return Status::invalid_argument("connect: " + std::to_string(handles.size()) + " handles for " +
                                    std::to_string(view_.num_ranks) + " ranks");
  }
  if (uses_rdma && rdma_heap_.base() == nullptr) {
    return {StatusCode::kFailedPrecondition, "connect: there is no network heap yet"};
  }
  if (uses_rdma && pes.size() != handles.size()) {
    return Status::invalid_argument("connect: " + std::to_string(pes.size()) +
                                    " numbers of processes for " + std::to_string(view_.num_ranks) +
                                    " ranks");
  }
  std::vector<PeerMapping> peers(handles.size());
  RankView view = view_;
  for (int32_t rank = 0; rank < view.num_ranks; ++rank) {
    const auto index = static_cast<size_t>(rank);
    JAX_EP_RETURN_IF_ERROR(check_handle(handles[index], rank));
    if (uses_rdma && !is_neighbor(rank)) continue;
    JAX_EP_RETURN_IF_ERROR(PeerMapping::map(handles[index], config_.local.device, peers[index]));
    if (is_neighbor(rank)) view.heap[rank] = peers[index].base();
  }
  // Ranks that share a device wait for each other, or hold what others of them need: the blocks of
  // all must fit on it at once.
  budget_ = {.available = std::max(device_sms_ / std::max(sharing, 1), 1),
             .requested = config_.group.max_num_sms,
             .tail = config_.group.tail_num_sms};
  if (uses_rdma) {
    RdmaNetwork network;
    JAX_EP_RETURN_IF_ERROR(rdma_network(pes, network));
    internode_ = std::make_unique<RdmaKernels>(network);
  } else if (config_.group.heap.spans_domains()) {
    internode_ = std::make_unique<LoopbackKernels>(loopback_network(peers));
  }
  words_.publish();
  peers_ = std::move(peers);
  view_ = view;
  return {};
}

Status RankContext::allocate_network_heap() {
  const DeviceGuard guard(config_.local.device);
  JAX_EP_RETURN_IF_ERROR(guard.status());
  return rdma_heap_.allocate(heap_.network().total_bytes);
}

void RankContext::release_network_heap() {
  const DeviceGuard guard(config_.local.device);
  rdma_heap_.release();
}

// Without heaps.
NetworkView RankContext::network_view() const {
  NetworkView view{};
  view.layout = heap_.network();
  view.topology = config_.group.heap.topology();
  view.phases = words_.phases_on_device();
  return view;
}

LoopbackNetwork RankContext::loopback_network(std::span<const PeerMapping> peers) const {
  LoopbackNetwork found{};
  found.network = network_view();
  found.heaps.rank = config_.local.rank;
  for (int32_t rank = 0; rank < view_.num_ranks; ++rank) {
    std::byte* const heap =
        peers[static_cast<size_t>(rank)].base() + network_offset(heap_.layout());
    found.heaps.heap[rank] = heap;
    if (is_neighbor(rank)) found.network.heap[rank - view_.first_neighbor] = heap;
  }
  return found;
}

Status RankContext::rdma_network(std::span<const int32_t> pes, RdmaNetwork& found) const {
  found = {};
  found.network = network_view();
  found.heaps.heap = rdma_heap_.base();
  for (int32_t rank = 0; rank < view_.num_ranks; ++rank) {
    const int32_t pe = pes[static_cast<size_t>(rank)];
    found.heaps.pe[rank] = pe;
    if (!is_neighbor(rank)) continue;
    std::byte* const heap = rdma_heap_.map(pe);
    found.network.heap[rank - view_.first_neighbor] = heap;
    if (heap == nullptr) {
      return {StatusCode::kFailedPrecondition,
              "NVSHMEM does not map the memory of rank " + std::to_string(rank) +
                  ", which is on this host: is NVSHMEM_DISABLE_P2P set?"};
    }
  }
  return {};
}

Status RankContext::wait_for_kernels(double limit_s) const {
  const auto synchronize = [device = config_.local.device]() -> Status {
    const DeviceGuard guard(device);
    JAX_EP_RETURN_IF_ERROR(guard.status());
    return JAX_EP_CUDA_STATUS(cudaDeviceSynchronize());
  };
  if (std::isinf(limit_s)) return synchronize();
  // CUDA has no wait with a limit for all streams of a device: a thread waits, and is left if it
  // takes too long.
  auto promise = std::make_shared<std::promise<Status>>();
  std::future<Status> done = promise->get_future();
  std::thread([synchronize, promise] { promise->set_value(synchronize()); }).detach();
  if (done.wait_for(std::chrono::duration<double>(limit_s)) == std::future_status::ready) {
    return done.get();
  }
  return {StatusCode::kDeadlineExceeded,
          "kernels still run on CUDA device " + std::to_string(config_.local.device)};
}

Status RankContext::tell(const Aborted& aborted) const {
  const DeviceGuard guard(config_.local.device);
  JAX_EP_RETURN_IF_ERROR(guard.status());
  std::byte* const word = heap_.base() + heap_.layout().at(Region::kAborted);
  const uint32_t value = pack(aborted);
  return on_own_stream([word, &value](cudaStream_t stream) {
    return JAX_EP_CUDA_STATUS(
        cudaMemcpyAsync(word, &value, sizeof value, cudaMemcpyHostToDevice, stream));
  });
}

Status RankContext::find_unread(std::vector<int32_t>& ranks) const {
  ranks.clear();
  const NetworkLayout& layout = heap_.network();
  const Topology topology = config_.group.heap.topology();
  const bool uses_rdma = config_.group.uses_rdma();
  if (!config_.group.heap.spans_domains() || (uses_rdma && rdma_heap_.base() == nullptr)) {
    return {StatusCode::kFailedPrecondition, "the rank has no network heap"};
  }
  const DeviceGuard guard(config_.local.device);
  JAX_EP_RETURN_IF_ERROR(guard.status());
  const std::byte* const heap =
      uses_rdma ? rdma_heap_.base() : heap_.base() + network_offset(heap_.layout());
  const auto count =
      static_cast<size_t>(topology.num_scaleout_ranks) * static_cast<size_t>(layout.window);
  std::vector<uint64_t> sent(count);
  std::vector<uint64_t> read(count);
  JAX_EP_RETURN_IF_ERROR(on_own_stream([&](cudaStream_t stream) -> Status {
    const auto copy = [&](std::vector<uint64_t>& to, NetworkRegion from) {
      return JAX_EP_CUDA_STATUS(
          cudaMemcpyAsync(to.data(), heap + layout.at(from), 8 * count, cudaMemcpyDefault, stream));
    };
    // In this order: what has been read was sent before.
    JAX_EP_RETURN_IF_ERROR(copy(sent, NetworkRegion::kDeliveredSent));
    return copy(read, NetworkRegion::kCredits);
  }));
  const int32_t index = topology.index_in_domain(config_.local.rank);
  for (int32_t domain = 0; domain < topology.num_scaleout_ranks; ++domain) {
    for (int32_t buffer = 0; buffer < layout.window; ++buffer) {
      const auto at = static_cast<size_t>(domain * layout.window + buffer);
      // Words are 0 before their first message, which has the number 0, too.
      if (sent[at] == 0 || (read[at] != 0 && epoch_of(read[at]) == epoch_of(sent[at]))) continue;
      ranks.push_back(topology.rank_at(domain, index));
      break;
    }
  }
  return {};
}

void RankContext::disconnect() { peers_.clear(); }

void RankContext::leave_peers() {
  for (PeerMapping& peer : peers_) peer.leave();
}

Status RankContext::error() const {
  const std::optional<ErrorRecord> record = words_.error();
  if (!record.has_value()) return {};
  return {code_of(static_cast<WaitTag>(record->tag)), describe(*record, config_.group.timeout_s)};
}

}  // namespace jax_ep
