// SPDX-License-Identifier: Apache-2.0
// A warp sums rows: acc = fma(weight, row, acc) in float32, in the order of the terms, starting
// from 0, rounded once. Segments of the rows come through a ring of bulk loads in shared memory,
// which run ahead across terms, segments and tokens. So enough bytes are in flight, and what binds
// is instructions: whatever is done for each group of loads counts.
#ifndef JAX_EP_CSRC_DEVICE_ROW_SUM_H_
#define JAX_EP_CSRC_DEVICE_ROW_SUM_H_

#include "csrc/device/convert.h"
#include "csrc/device/segment_ring.h"

namespace jax_ep::dev {

// What is summed for one token, spread over a warp: lane i holds the i-th row, and the i-th weight.
// This rank's own rows come first; after them the rows that other ranks have summed and rounded, in
// the order of their ranks.
struct SumTerms {
  Ptr<const std::byte> row;
  float weight = 0;  // of own rows; the others' is 1
  // Of all lanes:
  i32 count = 0;            // of rows
  i32 own = 0;              // of own rows
  i32 weights_per_row = 1;  // of the only own row, if more: it is a term once with each
  i32 before = 0;           // how many of the others come before the rounded sum of the own rows
};

JAX_EP_DEVICE float shfl_float(float value, i32 lane) {
  return as_float(warp_shfl(as_bits(value), static_cast<u32>(lane)));
}
template <typename T>
JAX_EP_DEVICE Ptr<T> shfl_pointer(Ptr<T> pointer, i32 lane) {
  const auto bits = reinterpret_cast<u64>(pointer.raw);
  const u64 low = warp_shfl(static_cast<u32>(bits), static_cast<u32>(lane));
  const u64 high = warp_shfl(static_cast<u32>(bits >> 32), static_cast<u32>(lane));
  return {reinterpret_cast<T*>(high << 32 | low)};
}

// The lane that `place` sends to each place: lane p gets the number of the lane with place p; -1 if
// there is none. Only the first `num_lanes` lanes are asked.
JAX_EP_DEVICE i32 lane_with_place(i32 place, i32 num_lanes) {
  i32 found = -1;
  for (i32 lane = 0; lane < num_lanes; ++lane) {
    const auto of_lane =
        static_cast<i32>(warp_shfl(static_cast<u32>(place), static_cast<u32>(lane)));
    if (of_lane == static_cast<i32>(lane_id())) found = lane;
  }
  return found;
}

// Loads of terms' segments, in the order in which they are summed, in groups that are waited for
// together. Unlike SegmentRing's, they are read by all lanes, and nothing is stored from them.
template <typename Stages>
class TermRing {
 public:
  // All lanes.
  JAX_EP_DEVICE explicit TermRing(Stages& stages) : stages_(stages) {
    if (lane_id() != 0) return;
    for (u32 i = 0; i < kStages; ++i) mbar_init(&stages_.loaded[i], 1);
    mbar_init_fence();
  }

  // How many loads may be started.
  JAX_EP_DEVICE i32 room() const { return static_cast<i32>(kStages - (loads_ - released_)); }

  // All lanes: lanes [first, first + count) load the segments of their rows, as a group.
  JAX_EP_DEVICE void load(i32 first, i32 count, Ptr<const std::byte> from, u32 bytes) {
    Mbar* const loaded = &stages_.loaded[load_groups_ % kStages];
    if (lane_id() == 0) mbar_arrive_expect(loaded, static_cast<u32>(count) * bytes);
    warp_sync();  // all know of the mbarrier, and that all have read the stages
    const u32 mine = lane_id() - static_cast<u32>(first);
    if (mine < static_cast<u32>(count)) bulk_load(stage(loads_ + mine), from, bytes, loaded);
    loads_ += static_cast<u32>(count);
    ++load_groups_;
    sizes_ |= static_cast<u32>(count) << size_shift_;
    size_shift_ += kSizeBits;
  }

  // All lanes: until the oldest group is there. Returns its size.
  JAX_EP_DEVICE i32 wait_for_group() {
    mbar_wait(&stages_.loaded[use_groups_ % kStages], use_groups_ / kStages % 2);
    ++use_groups_;
    const u32 count = sizes_ % (1 << kSizeBits);
    sizes_ >>= kSizeBits;
    size_shift_ -= kSizeBits;
    return static_cast<i32>(count);
  }
  // The oldest segment of a group that is there, and the step to the next.
  JAX_EP_DEVICE Ptr<u32> current() const { return stage(uses_); }
  JAX_EP_DEVICE void step() { ++uses_; }
  // All lanes, when they have read the segments of a group. The next `load` has the barrier.
  JAX_EP_DEVICE void release() { released_ = uses_; }

 private:
  static constexpr u32 kStages = Stages::kStages;
  static_assert((kStages & (kStages - 1)) == 0, "places are remainders");
  static constexpr u32 kSizeBits = 4;
  static_assert(kStages * kSizeBits <= 32 && kStages < 1 << kSizeBits);

  JAX_EP_DEVICE Ptr<u32> stage(u32 at) const { return address_of(stages_.stage[at % kStages][0]); }

  Stages& stages_;
  u32 loads_ = 0;
  u32 load_groups_ = 0;
  u32 uses_ = 0;
  u32 use_groups_ = 0;
  u32 released_ = 0;
  u32 sizes_ = 0;       // of the groups that are not yet waited for, the oldest one's last
  u32 size_shift_ = 0;  // of the next one's
};

// A segment's sum, while it grows: lane l holds vectors l, l + 32, ... of 16 bytes.
template <typename RowType, int kVectors>
struct SegmentSum {
  static constexpr int kPerVector = 4 * RowType::kPerWord;
  float value[kVectors][kPerVector] = {};

  JAX_EP_DEVICE void add(float weight, const Vec16 (&row)[kVectors]) {
    JAX_EP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float values[kPerVector];
      for (int w = 0; w < 4; ++w) RowType::unpack(row[v].word[w], values + w * RowType::kPerWord);
      for (int c = 0; c < kPerVector; ++c) {
        value[v][c] = fused_multiply_add(weight, values[c], value[v][c]);
      }
    }
  }
  // Rounds the sum, and begins the next.
  JAX_EP_DEVICE void take(Vec16 (&row)[kVectors]) {
    round(row);
    *this = {};
  }
  JAX_EP_DEVICE void round(Vec16 (&row)[kVectors]) const {
    JAX_EP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      for (int w = 0; w < 4; ++w) {
        row[v].word[w] = RowType::pack(value[v] + w * RowType::kPerWord);
      }
    }
  }
};

// Sums segments [first_segment, last_segment) of the rows of tokens [first, last), one token after
// another. `terms_of(token)` is called once for each, in order; a token of no terms is left out.
// `out_of(token)` is where its sum goes. Without kHasOthers all rows are this rank's own. All
// lanes.
template <typename RowType, bool kHasOthers, typename Stages, typename TermsOf, typename OutOf>
class SumStream {
 public:
  JAX_EP_DEVICE SumStream(TermRing<Stages>& ring,
                          const Segments& segments,
                          i64 hidden,
                          const TermsOf& terms_of,
                          const OutOf& out_of)
      : ring_(ring),
        segments_(segments),
        full_bytes_(static_cast<u32>(segments.num_elements * kElementBytes)),
        last_bytes_(static_cast<u32>(segments.size(segments.count - 1, hidden) * kElementBytes)),
        terms_of_(terms_of),
        out_of_(out_of) {}

  JAX_EP_DEVICE void run(i64 first, i64 last, i32 first_segment, i32 last_segment) {
    last_ = last;
    first_segment_ = first_segment;
    last_segment_ = last_segment;
    ahead_.token = first - 1;
    to_next_token();
    while (ahead_.token < last_) {
      at_token_ = ahead_.token;
      const SumTerms terms = ahead_terms_;
      Ptr<std::byte> out = out_of_(at_token_) + segments_.first(first_segment) * kElementBytes;
      for (i32 segment = first_segment; segment < last_segment; ++segment) {
        sum_segment(terms, static_cast<i32>(segment_bytes(segment) / 16), as<Vec16>(out));
        out = out + full_bytes_;
      }
    }
  }

 private:
  static constexpr int kVectors = Stages::kSegmentBytes / 16 / static_cast<int>(kWarpSize);
  static constexpr i32 kElementBytes = sizeof(typename RowType::Element);
  using Sum = SegmentSum<RowType, kVectors>;

  JAX_EP_DEVICE void to_next_token() {
    do {
      if (++ahead_.token >= last_) return;
      ahead_terms_ = terms_of_(ahead_.token);
    } while (ahead_terms_.count == 0);
    ahead_.segment = first_segment_;
    ahead_.term = 0;
    ahead_.from = ahead_terms_.row + segments_.first(first_segment_) * kElementBytes;
  }

  // Starts as many loads as there is room for, at most to the end of the next token: so when the
  // last term of a token is waited for, the terms of the next one are known.
  JAX_EP_DEVICE void load_ahead() {
    while (ahead_.token < last_) {
      if (ahead_.segment == last_segment_) {
        if (ahead_.token != at_token_) return;
        to_next_token();
        continue;
      }
      const i32 room = ring_.room();
      if (room == 0) return;
      const i32 left = ahead_terms_.count - ahead_.term;
      const i32 count = left < room ? left : room;
      ring_.load(ahead_.term, count, ahead_.from, segment_bytes(ahead_.segment));
      ahead_.term += count;
      if (ahead_.term < ahead_terms_.count) return;
      ahead_.term = 0;
      ++ahead_.segment;
      ahead_.from = ahead_.from + full_bytes_;
    }
  }

  JAX_EP_DEVICE u32 segment_bytes(i32 segment) const {
    return segment + 1 < segments_.count ? full_bytes_ : last_bytes_;
  }

  JAX_EP_DEVICE void sum_segment(const SumTerms& terms, i32 num_vectors, Ptr<Vec16> out) {
    Sum sum;
    Vec16 own[kVectors] = {};
    Vec16 row[kVectors];
    for (i32 term = 0; term < terms.count;) {
      load_ahead();
      const i32 end = term + ring_.wait_for_group();
      if (terms.weights_per_row > 1 && term < terms.own) {
        JAX_EP_NO_UNROLL
        for (i32 weight = 0; weight < terms.weights_per_row; ++weight) {
          warp_sync();  // or the compiler keeps the row's numbers, in too many registers
          read(ring_.current(), num_vectors, row);
          sum.add(shfl_float(terms.weight, weight), row);
        }
        ring_.step();
        ++term;
      }
      for (; term < end && (!kHasOthers || term < terms.own); ++term) {
        read(ring_.current(), num_vectors, row);
        sum.add(shfl_float(terms.weight, term), row);
        ring_.step();
      }
      JAX_EP_NO_UNROLL
      for (; kHasOthers && term < end; ++term) {
        if (term == terms.own) sum.take(own);
        if (term - terms.own == terms.before) sum.add(1.0F, own);
        read(ring_.current(), num_vectors, row);
        sum.add(1.0F, row);
        ring_.step();
      }
      ring_.release();
    }
    if (kHasOthers && terms.own == terms.count) sum.take(own);
    if (kHasOthers && terms.before == terms.count - terms.own) sum.add(1.0F, own);
    sum.round(row);
    write(out, num_vectors, row);
  }

  // Lanes for which the segment has nothing read its last vector, which they do not write.
  JAX_EP_DEVICE static void read(Ptr<u32> stage, i32 num_vectors, Vec16 (&row)[kVectors]) {
    JAX_EP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const i32 at = static_cast<i32>(lane_id()) + v * static_cast<i32>(kWarpSize);
      row[v] = ld(as<Vec16>(stage) + (at < num_vectors ? at : num_vectors - 1));
    }
  }
  JAX_EP_DEVICE static void write(Ptr<Vec16> to, i32 num_vectors, const Vec16 (&row)[kVectors]) {
    JAX_EP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const i32 at = static_cast<i32>(lane_id()) + v * static_cast<i32>(kWarpSize);
      if (at < num_vectors) st(to + at, row[v]);
    }
  }

  struct Position {
    i64 token;
    i32 segment;
    i32 term;
    Ptr<const std::byte> from;  // of each lane's row: the segment
  };

  TermRing<Stages>& ring_;
  const Segments& segments_;
  const u32 full_bytes_;  // of each segment but the last
  const u32 last_bytes_;
  const TermsOf& terms_of_;
  const OutOf& out_of_;
  i64 last_ = 0;
  i32 first_segment_ = 0;
  i32 last_segment_ = 0;
  i64 at_token_ = -1;
  Position ahead_{};
  SumTerms ahead_terms_{};
};

// The same sum of one token, element by element, of rows that bulk copies cannot move.
template <typename RowType, bool kHasOthers>
JAX_EP_DEVICE void sum_elements(const SumTerms& terms, i64 hidden, Ptr<std::byte> out) {
  using Element = typename RowType::Element;
  for (i64 first = 0; first < hidden; first += kWarpSize) {
    const i64 c = first + lane_id();
    float sum = 0;
    float own = 0;
    const auto take_own = [&] {
      own = RowType::to_float(RowType::from_float(sum));
      sum = 0;
    };
    for (i32 term = 0; term < terms.count; ++term) {
      const Ptr<const Element> row = as<const Element>(shfl_pointer(terms.row, term));
      const float value = c < hidden ? RowType::to_float(ld(row + c)) : 0.0F;
      if (kHasOthers && term >= terms.own) {
        if (term == terms.own) take_own();
        if (term - terms.own == terms.before) sum = fused_multiply_add(1.0F, own, sum);
        sum = fused_multiply_add(1.0F, value, sum);
        continue;
      }
      sum = fused_multiply_add(shfl_float(terms.weight, term), value, sum);
      for (i32 weight = 1; weight < terms.weights_per_row; ++weight) {
        sum = fused_multiply_add(shfl_float(terms.weight, weight), value, sum);
      }
    }
    if (kHasOthers && terms.own == terms.count) take_own();
    if (kHasOthers && terms.before == terms.count - terms.own) {
      sum = fused_multiply_add(1.0F, own, sum);
    }
    if (c < hidden) st(as<Element>(out) + c, RowType::from_float(sum));
  }
}

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_ROW_SUM_H_
