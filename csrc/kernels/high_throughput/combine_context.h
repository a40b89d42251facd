// SPDX-License-Identifier: Apache-2.0
// What the senders, the receivers and the layouts of a combine share: the sizes of the call, and
// where rows lie.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_CONTEXT_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_CONTEXT_H_

#include "csrc/device/chunk_parts.h"
#include "csrc/device/exchange.h"
#include "csrc/device/piece_sum.h"
#include "csrc/device/row_sum.h"
#include "csrc/device/token_selections.h"

namespace jax_ep::dev {

// kSumsOverDomains: a kernel of its own, because the other one's registers are short.
template <int kWarpCount, int kStageCount, int kSegmentBytes, bool kSumsOverDomains>
struct CombineConfig {
  static constexpr bool kByDomain = kSumsOverDomains;
  static constexpr int kWarps = kWarpCount;
  static constexpr int kStages = kStageCount;
  using Stages = TermStages<kStages, kSegmentBytes>;

  struct SharedStorage {
    Stages stages[kWarps];
  };
};

template <typename BlockConfig, typename RowTypeOfCall>
struct CombineContext {
  using Config = BlockConfig;
  using RowType = RowTypeOfCall;
  static constexpr i32 kElementBytes = sizeof(typename RowType::Element);

  JAX_EP_DEVICE explicit CombineContext(const CombineParams& params)
      : params(params),
        shape(params.op.shape),
        exchange(exchange_of(params)),
        ring(shared<typename Config::SharedStorage>().stages[warp_id()]),
        hidden(params.op.hidden),
        row_bytes(hidden * kElementBytes),
        bulk(row_bytes % 16 == 0),
        ranks_per_domain(Config::kByDomain ? params.op.domain_size : params.view.num_ranks),
        segments(hidden, Config::Stages::kSegmentBytes / kElementBytes),
        num_senders(static_cast<u32>(params.num_senders)),
        rank(params.view.rank),
        num_ranks(params.view.num_ranks),
        num_topk(shape.num_topk),
        parts(Chunks(OpKind::kCombine, shape.num_tokens, params.view.chunk_target),
              segments.count,
              bulk,
              params.view.chunk_target) {}

  JAX_EP_DEVICE Ptr<const std::byte> y_row(i32 row) const {
    return Ptr<const std::byte>{static_cast<const std::byte*>(params.op.y)} + row * row_bytes;
  }
  JAX_EP_DEVICE Ptr<std::byte> out_row(i64 token) const {
    return Ptr<std::byte>{static_cast<std::byte*>(params.op.out)} + token * row_bytes;
  }
  JAX_EP_DEVICE float row_scalar(i64 at) const {
    return ld(Ptr<const float>{params.op.row_scalars} + at);
  }
  JAX_EP_DEVICE float weight(i64 at) const { return ld(Ptr<const float>{params.op.weights} + at); }
  JAX_EP_DEVICE i32 domain_of(i32 of_rank) const {
    return Config::kByDomain ? of_rank / ranks_per_domain : 0;
  }

  const CombineParams& params;
  const EpShape& shape;
  const Exchange exchange;
  TermRing<typename Config::Stages> ring;
  const i64 hidden;
  const i64 row_bytes;
  const bool bulk;  // rows are moved 16 bytes at a time
  const i32 ranks_per_domain;
  const Segments segments;
  const u32 num_senders;  // of a block's warps
  const i32 rank;
  const i32 num_ranks;
  const i32 num_topk;
  const ChunkParts parts;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_CONTEXT_H_
