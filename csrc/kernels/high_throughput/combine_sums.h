// SPDX-License-Identifier: Apache-2.0
// How a warp of a combine sums the rows of some tokens: through a ring of loads where there is one
// level of sums and rows are multiples of 16 bytes, else a piece of each lane at a time.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_SUMS_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_SUMS_H_

#include "csrc/kernels/high_throughput/combine_context.h"

namespace jax_ep::dev {

// Of a row, in front of a segment.
template <typename Piece, typename Context>
JAX_EP_DEVICE i64 pieces_before(const Context& c, i32 segment) {
  const i64 elements = segment < c.segments.count ? c.segments.first(segment) : c.hidden;
  return elements * Context::kElementBytes / static_cast<i64>(sizeof(Piece));
}

// Sums the rows of a part of a chunk; `terms_of(token)` also moves scalars, of the first part.
// Without kHasOthers all rows are of one rank, or are to be summed as if they were. `Context` is a
// CombineContext. All lanes.
template <bool kHasOthers, typename Context, typename TermsOf, typename OutOf>
JAX_EP_DEVICE void sum_rows(Context& c,
                            const ChunkPart& part,
                            const TermsOf& terms_of,
                            const OutOf& out_of) {
  using Config = typename Context::Config;
  using RowType = typename Context::RowType;
  constexpr bool kByDomain = kHasOthers && Config::kByDomain;
  if constexpr (!kByDomain) {
    if (c.bulk && c.hidden > 0) {
      SumStream<RowType, kHasOthers, typename Config::Stages, TermsOf, OutOf>(
          c.ring, c.segments, c.hidden, terms_of, out_of)
          .run(part.first_token, part.last_token, part.first_segment, part.last_segment);
      return;
    }
  }
  for (i64 token = part.first_token; token < part.last_token; ++token) {
    const SumTerms terms = terms_of(token);
    if (terms.count() == 0) continue;
    const auto sum_in = [&]<typename Piece>(Piece /*a piece*/) {
      sum_pieces<RowType, kHasOthers, Piece>(terms,
                                             c.domain_of(c.rank),
                                             pieces_before<Piece>(c, part.first_segment),
                                             pieces_before<Piece>(c, part.last_segment),
                                             out_of(token));
    };
    if constexpr (kByDomain) {
      if (c.bulk) {
        sum_in(Vec16{});
        continue;
      }
    }
    sum_in(typename RowType::Element{});
  }
}

// Lane j gets the j-th row of this rank that holds a token of an owner, or -1.
template <typename RowLayout>
JAX_EP_DEVICE i32 row_held_for(const typename RowLayout::Context& c, i32 owner, i64 token) {
  return row_of_lane(
      c.shape, RowLayout::kLayout, Ptr<const i32>{c.params.op.source_slot}, owner, token);
}

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_SUMS_H_
