// SPDX-License-Identifier: Apache-2.0
// What the kernels are launched with. The same for the GPU and for the simulator.
#ifndef JAX_EP_CSRC_CORE_KERNEL_PARAMS_H_
#define JAX_EP_CSRC_CORE_KERNEL_PARAMS_H_

#include <cstddef>
#include <cstdint>

#include "csrc/core/error_record.h"
#include "csrc/core/heap_layout.h"
#include "csrc/core/network_layout.h"
#include "csrc/core/ops.h"
#include "csrc/core/topology.h"

namespace jax_ep {

// A rank of a group, as its kernels see it. Constant while the group lives.
struct RankView {
  HeapLayout layout;
  std::byte* heap[kMaxRanks];  // every rank's heap, as mapped by this rank
  uint32_t* control;           // see Control; never freed, and so are the next two
  ErrorRecord* error;          // in host memory that the device writes
  uint64_t* long_waits;        // [R] likewise: by peer, a LongWait, once there is one
  uint64_t report_ns;          // a wait is reported after this long, and twice, four times ...
  uint64_t timeout_ns;         // at most 2^61
  int32_t rank;
  int32_t num_ranks;
  // The ranks of this one's domain: their heaps are mapped, and others' are not. All ranks, where
  // there is one domain.
  int32_t first_neighbor;
  int32_t num_neighbors;
  // [R] in device memory, of the op: which ranks take part; null: all do. Of the others nothing is
  // expected, and nothing is sent to them: a selection of one of their experts counts as none. The
  // same on all ranks that take part; a rank that does not leaves empty results.
  const uint8_t* rank_mask = nullptr;
  int32_t chunk_target = kChunkTarget;  // see chunk_tokens; the same on all ranks
  // In host memory that the device reads, of a group that goes on without who does not come: by
  // rank, a bit where it is not to be waited for any longer. Null: a group that ends then.
  const uint64_t* given_up = nullptr;
};

// The blocks of a call. Those of its tail are a launch of their own, behind the main one: they join
// it once all rows have been sent, help to receive, and never wait for a peer.
struct CallBlocks {
  int32_t first = 0;     // of this launch, in the call
  int32_t num_main = 1;  // these send, and receive
  int32_t num_tail = 0;
};

// What of an exchange a kernel does: it sends, it receives, or both. Only low-latency ones come in
// halves. What a second half receives was sent by the first half that wrote its ticket.
enum class Half : int32_t { kBoth, kFirst, kSecond };

// What a kernel of an operation is launched with.
template <typename Op>
struct KernelParams {
  RankView view;
  uint32_t call_tag;            // see call_tag_of
  const int32_t* program_rank;  // [1]: this rank, as the program says; must be the view's
  int32_t num_senders = 1;      // of a block's warps, those that send rows before they receive some
  CallBlocks blocks = {};       // filled in by the launch
  Half half = Half::kBoth;
  uint32_t* ticket = nullptr;  // [kTicketWords] out of a first half, in of a second one
  Op op;
};

// The network heaps of a rank's domain, as its kernels see them. Constant while the group lives.
struct NetworkView {
  NetworkLayout layout;
  Topology topology;
  std::byte* heap[kMaxDomainRanks];  // by index in the domain, as mapped by this rank
  uint64_t* phases;  // [kNumChannels] in host memory that the device writes: see KernelPhase
};

// The network heaps of all ranks, where this one maps them: what a transport over mapped memory
// has.
struct MappedHeaps {
  std::byte* heap[kMaxRanks];  // by rank
  int32_t rank;                // this one
};

// The network heaps of all ranks, where they are at one address of symmetric memory, which is this
// rank's as it stands and a peer's with its number: what a transport by RDMA has.
struct SymmetricHeaps {
  std::byte* heap;
  int32_t pe[kMaxRanks];  // by rank, the number of its process
};

// What a kernel of an operation between domains is launched with. `Transport` is one of
// csrc/device/transport/.
template <typename OpOfCall, typename Transport>
struct InternodeParams : KernelParams<OpOfCall> {
  using Op = OpOfCall;

  NetworkView network;
  Transport transport;
  int32_t num_rail_senders = 1;  // of a block's warps, behind the senders
  int32_t num_reducers = 1;      // likewise, behind these; combine alone
};

// The same of a low-latency kernel, whose warps all do the same.
template <typename OpOfCall, typename Transport>
struct InternodeLowLatencyParams : KernelParams<OpOfCall> {
  using Op = OpOfCall;

  NetworkView network;
  Transport transport;
};

using PlanParams = KernelParams<PlanOp>;
using DispatchParams = KernelParams<DispatchOp>;
using CombineParams = KernelParams<CombineOp>;
using PlanDispatchParams = KernelParams<PlanDispatchOp>;

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_KERNEL_PARAMS_H_
