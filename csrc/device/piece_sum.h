// SPDX-License-Identifier: Apache-2.0
// A warp sums rows without a ring of loads, a piece of each lane at a time: rows that are no
// multiple of 16 bytes, and sums over domains, whose two levels a SumStream does not have.
#ifndef JAX_EP_CSRC_DEVICE_PIECE_SUM_H_
#define JAX_EP_CSRC_DEVICE_PIECE_SUM_H_

#include <type_traits>

#include "csrc/device/row_sum.h"

namespace jax_ep::dev {

// A sum of `Piece`s of a row, 16 bytes or an element, while it grows.
template <typename RowType, typename Piece>
class PieceSum {
 public:
  JAX_EP_DEVICE void add(float weight, const Piece& piece) {
    float numbers[kCount];
    if constexpr (kIsVector) {
      JAX_EP_UNROLL
      for (int w = 0; w < 4; ++w) RowType::unpack(piece.word[w], numbers + w * RowType::kPerWord);
    } else {
      numbers[0] = RowType::to_float(piece);
    }
    JAX_EP_UNROLL
    for (int i = 0; i < kCount; ++i) value_[i] = fused_multiply_add(weight, numbers[i], value_[i]);
  }
  JAX_EP_DEVICE Piece rounded() const {
    if constexpr (kIsVector) {
      Piece piece;
      JAX_EP_UNROLL
      for (int w = 0; w < 4; ++w) piece.word[w] = RowType::pack(value_ + w * RowType::kPerWord);
      return piece;
    } else {
      return RowType::from_float(value_[0]);
    }
  }
  // Rounds the sum, and begins the next.
  JAX_EP_DEVICE Piece take() {
    const Piece piece = rounded();
    *this = {};
    return piece;
  }

 private:
  static constexpr bool kIsVector = std::is_same_v<Piece, Vec16>;
  static constexpr int kCount = kIsVector ? 4 * RowType::kPerWord : 1;

  float value_[kCount] = {};
};

// The terms of one token, summed in pieces [first, last) of their rows, to `out`. Without
// kHasOthers all rows are this rank's own. Where the others are of several domains, the sum of each
// is rounded before it is added to those of the domains before it; see CombineOp. All lanes.
//
// own_domain: of this rank.
template <typename RowType, bool kHasOthers, typename Piece>
JAX_EP_DEVICE void sum_pieces(
    const SumTerms& terms, i32 own_domain, i64 first, i64 last, Ptr<std::byte> out) {
  for (i64 at = first + lane_id(); at - lane_id() < last; at += kWarpSize) {
    const auto load = [&](i32 term) {
      const Ptr<const Piece> row = as<const Piece>(shfl_pointer(terms.row, term));
      return at < last ? ld(row + at) : Piece{};
    };
    PieceSum<RowType, Piece> sum;
    for (i32 term = 0; term < (kHasOthers ? terms.own() : terms.count()); ++term) {
      const Piece row = load(term);
      sum.add(shfl_float(terms.weight, term), row);
      for (i32 weight = 1; weight < terms.weights_per_row(); ++weight) {
        sum.add(shfl_float(terms.weight, weight), row);
      }
    }
    if constexpr (kHasOthers) {
      const Piece own = sum.take();
      PieceSum<RowType, Piece> of_domain;
      i32 domain = -1;
      const auto add = [&](i32 of, const Piece& of_rank) {
        if (of != domain) sum.add(1.0F, of_domain.take());  // of none: zeros
        domain = of;
        of_domain.add(1.0F, of_rank);
      };
      for (i32 term = terms.own(); term <= terms.count(); ++term) {
        if (term == terms.own_sum_at()) add(own_domain, own);
        if (term == terms.count()) break;
        add(static_cast<i32>(warp_shfl(static_cast<u32>(terms.domain), static_cast<u32>(term))),
            load(term));
      }
      sum.add(1.0F, of_domain.take());
    }
    if (at < last) st(as<Piece>(out) + at, sum.rounded());
  }
}

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_PIECE_SUM_H_
