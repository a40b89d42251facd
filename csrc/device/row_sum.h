// SPDX-License-Identifier: Apache-2.0
// A warp sums rows: acc = fma(weight, row, acc) in float32, in the order of the terms, starting
// from 0, rounded once. Segments of the rows come through a ring of async loads to shared memory,
// which run ahead across terms, segments and tokens. So enough bytes are in flight, and what binds
// is instructions: most terms are added in a loop that has no branch (SumStream::add_terms).
#ifndef JAX_EP_CSRC_DEVICE_ROW_SUM_H_
#define JAX_EP_CSRC_DEVICE_ROW_SUM_H_

#include <limits>
#include <utility>

#include "csrc/device/convert.h"
#include "csrc/device/segment_ring.h"

namespace jax_ep::dev {

// What is summed for one token, spread over a warp: lane i holds the i-th row, and the i-th weight.
// This rank's own rows come first; after them the rows that other ranks have summed and rounded, in
// the order of their ranks.
struct SumTerms {
  Ptr<const std::byte> row;
  float weight = 0;  // of own rows; the others' is 1
  i32 domain = 0;    // of the others; of no use where there is one
  // Of all lanes: four numbers of a byte each, none above kWarpSize, because registers are short.
  u32 numbers = 0;

  // own, others: how many rows of each. weights_per_row: of the only own row, if more than 1: it is
  // a term once with each. before: how many of the others come before the rounded sum of the own.
  JAX_EP_DEVICE void set(i32 own, i32 weights_per_row, i32 others = 0, i32 before = 0) {
    numbers = static_cast<u32>(own + others) | static_cast<u32>(own) << 8 |
              static_cast<u32>(weights_per_row) << 16 | static_cast<u32>(own + before) << 24;
  }
  JAX_EP_DEVICE i32 count() const { return static_cast<i32>(numbers & 0xFF); }
  JAX_EP_DEVICE i32 own() const { return static_cast<i32>(numbers >> 8 & 0xFF); }
  JAX_EP_DEVICE i32 weights_per_row() const { return static_cast<i32>(numbers >> 16 & 0xFF); }
  // The term before which the rounded sum of the own rows is added.
  JAX_EP_DEVICE i32 own_sum_at() const { return static_cast<i32>(numbers >> 24); }
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

// The lane that has each position: lane p gets the number of the lane whose `position` is p; -1 if
// there is none. Only the first `num_lanes` lanes are asked.
JAX_EP_DEVICE i32 lane_with_position(i32 position, i32 num_lanes) {
  i32 found = -1;
  JAX_EP_NO_UNROLL
  for (i32 lane = 0; lane < num_lanes; ++lane) {
    const auto of_lane =
        static_cast<i32>(warp_shfl(static_cast<u32>(position), static_cast<u32>(lane)));
    if (of_lane == static_cast<i32>(lane_id())) found = lane;
  }
  return found;
}

// The shared memory of a TermRing, one per warp.
template <int kStageCount, int kBytes>
struct TermStages {
  static constexpr int kStages = kStageCount;
  static constexpr int kSegmentBytes = kBytes;
  static constexpr int kVectors = kBytes / 16 / static_cast<int>(kWarpSize);  // of a lane
  static_assert(kStages >= 2 && (kStages & (kStages - 1)) == 0, "stages are remainders");
  static_assert(kBytes % (16 * kWarpSize) == 0);

  alignas(128) Shared<u32> stage[kStages][kBytes / 4];
  Shared<u32> own_sum[kBytes / 4];  // rounded, of this rank's own rows
};

// Loads of terms' segments, in the order in which they are summed. Each lane copies what it will
// read itself, so nothing is said between lanes, and a load is one instruction for each vector.
// (A bulk copy costs a warp some thirty: the addresses of its lanes go one by one to the engine.)
template <typename Stages>
class TermRing {
 public:
  JAX_EP_DEVICE explicit TermRing(Stages& stages) : stages_(stages) {}

  JAX_EP_DEVICE bool is_full() const { return loads_ - uses_ == kStages; }

  // Forgets what has not been waited for: it is nothing.
  JAX_EP_DEVICE void restart() { uses_ = loads_; }

  // Loads a segment of `num_vectors` vectors of 16 bytes. Lanes for which it has nothing load its
  // last vector.
  JAX_EP_DEVICE void load(Ptr<const Vec16> from, i32 num_vectors) {
    const Ptr<Vec16> to = stage_of(loads_++);
    const i32 spare = num_vectors - 1 - static_cast<i32>(lane_id());
    from = from + lane_id();
    JAX_EP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      async_load(to + v * kLanes, from + (v * kLanes < spare ? v * kLanes : spare));
    }
    async_commit();
  }
  // In place of a load, after the last: so that the others are waited for one by one, too.
  JAX_EP_DEVICE void load_nothing() {
    ++loads_;
    async_commit();
  }

  // Until what this lane has of the oldest segment is there.
  JAX_EP_DEVICE void wait() const {
    if (is_full()) {
      async_wait<kStages - 1>();
    } else {
      async_wait<0>();
    }
  }
  // In a ring that is full: waits for the oldest segment, reads it, and, if `loads`, loads a
  // segment of all its vectors in its place.
  JAX_EP_DEVICE void exchange(Ptr<const Vec16> from, bool loads, Vec16 (&row)[Stages::kVectors]) {
    async_wait<kStages - 1>();
    const Ptr<Vec16> at = stage_of(uses_++);
    ++loads_;
    JAX_EP_UNROLL
    for (int v = 0; v < kVectors; ++v) row[v] = ld(at + v * kLanes);
    from = from + lane_id();
    if (loads) load_vectors(at, from, std::make_integer_sequence<int, kVectors>());
    async_commit();
  }
  // This lane's vectors of the oldest segment, which has been waited for.
  JAX_EP_DEVICE void read(Vec16 (&row)[Stages::kVectors]) const {
    const Ptr<Vec16> from = stage_of(uses_);
    JAX_EP_UNROLL
    for (int v = 0; v < kVectors; ++v) row[v] = ld(from + v * kLanes);
  }
  // It has been read.
  JAX_EP_DEVICE void release() { ++uses_; }

  // A lane's part of the rounded sum of this rank's own rows: registers are short.
  JAX_EP_DEVICE void keep_own_sum(const Vec16 (&sum)[Stages::kVectors]) {
    JAX_EP_UNROLL
    for (int v = 0; v < kVectors; ++v) st(own_sum() + v * kLanes, sum[v]);
  }
  JAX_EP_DEVICE void read_own_sum(Vec16 (&sum)[Stages::kVectors]) const {
    JAX_EP_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[v] = ld(own_sum() + v * kLanes);
  }

 private:
  static constexpr u32 kStages = Stages::kStages;
  static constexpr int kVectors = Stages::kVectors;
  static constexpr i32 kLanes = static_cast<i32>(kWarpSize);

  JAX_EP_DEVICE Ptr<Vec16> own_sum() const {
    return as<Vec16>(address_of(stages_.own_sum[0])) + lane_id();
  }
  // Constant offsets are part of the instructions.
  template <int... kVector>
  JAX_EP_DEVICE static void load_vectors(Ptr<Vec16> to,
                                         Ptr<const Vec16> from,
                                         std::integer_sequence<int, kVector...>) {
    (async_load<kVector * kLanes>(to, from), ...);
  }
  JAX_EP_DEVICE Ptr<Vec16> stage_of(u32 load) const {
    return as<Vec16>(address_of(stages_.stage[load % kStages][0])) + lane_id();
  }

  Stages& stages_;
  u32 loads_ = 0;
  u32 uses_ = 0;
};

// A segment's sum, while it grows: lane l holds vectors l, l + 32, ... of 16 bytes.
template <typename RowType, int kVectors>
class SegmentSum {
 public:
  static constexpr int kPerVector = 4 * RowType::kPerWord;

  JAX_EP_DEVICE void add(float weight, const Vec16 (&row)[kVectors]) {
    JAX_EP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float values[kPerVector];
      unpack(row[v], values);
      add(weight, values, value[v]);
    }
  }
  // Once with each of so many weights. Half of the row at a time: registers are short.
  template <typename WeightOf>
  JAX_EP_DEVICE void add(const Vec16 (&row)[kVectors], i32 num_weights, const WeightOf& weight_of) {
    constexpr int kAtOnce = (kVectors + 1) / 2;
    JAX_EP_UNROLL
    for (int first = 0; first < kVectors; first += kAtOnce) {
      float values[kAtOnce][kPerVector];
      JAX_EP_UNROLL
      for (int v = 0; v < kAtOnce && first + v < kVectors; ++v) unpack(row[first + v], values[v]);
      JAX_EP_NO_UNROLL
      for (i32 i = 0; i < num_weights; ++i) {
        const float weight = weight_of(i);
        JAX_EP_UNROLL
        for (int v = 0; v < kAtOnce && first + v < kVectors; ++v) {
          add(weight, values[v], value[first + v]);
        }
      }
    }
  }
  // Rounds the sum, and begins the next.
  JAX_EP_DEVICE void take(Vec16 (&row)[kVectors]) {
    JAX_EP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      for (int w = 0; w < 4; ++w) {
        row[v].word[w] = RowType::pack(value[v] + w * RowType::kPerWord);
      }
    }
    *this = {};
  }

 private:
  float value[kVectors][kPerVector] = {};

  JAX_EP_DEVICE static void unpack(const Vec16& vector, float (&values)[kPerVector]) {
    for (int w = 0; w < 4; ++w) RowType::unpack(vector.word[w], values + w * RowType::kPerWord);
  }
  JAX_EP_DEVICE static void add(float weight,
                                const float (&values)[kPerVector],
                                float (&sum)[kPerVector]) {
    for (int c = 0; c < kPerVector; ++c) sum[c] = fused_multiply_add(weight, values[c], sum[c]);
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
        last_vectors_(segments.size(segments.count - 1, hidden) * kElementBytes / 16),
        terms_of_(terms_of),
        out_of_(out_of) {}

  JAX_EP_DEVICE void run(i64 first, i64 last, i32 first_segment, i32 last_segment) {
    first_ = first;
    num_tokens_ = static_cast<i32>(last - first);
    first_segment_ = first_segment;
    last_segment_ = last_segment;
    ring_.restart();
    ahead_.token = at_token_ = -1;
    ahead_.segment = last_segment;
    SumTerms terms;
    i32 segment = last_segment;
    i32 term = 0;
    // One loop and not three, so that what it calls is compiled once.
    while (true) {
      load_ahead();
      if (segment == last_segment) {
        if (ahead_.token == num_tokens_) return;
        at_token_ = ahead_.token;
        terms = ahead_terms_;
        segment = first_segment;
      }
      begin(terms, term);
      if (term < terms.count()) {
        term += add_terms(terms, term);
        continue;
      }
      write_sum(num_vectors(segment),
                as<Vec16>(out_of_(first_ + at_token_) + i64{segment} * Stages::kSegmentBytes));
      ++segment;
      term = 0;
    }
  }

 private:
  static constexpr int kVectors = Stages::kVectors;
  static constexpr i32 kElementBytes = sizeof(typename RowType::Element);
  using Sum = SegmentSum<RowType, kVectors>;

  JAX_EP_DEVICE void to_next_token() {
    do {
      if (++ahead_.token == num_tokens_) return;
      ahead_terms_ = terms_of_(first_ + ahead_.token);
    } while (ahead_terms_.count() == 0);
    ahead_.segment = first_segment_;
    ahead_.term = 0;
    ahead_.from = ahead_terms_.row + segments_.first(first_segment_) * kElementBytes;
  }

  // Starts as many loads as there is room for, at most to the end of the next token: so when the
  // last term of a token is waited for, the terms of the next one are known.
  JAX_EP_DEVICE void load_ahead() {
    while (!ring_.is_full()) {
      if (ahead_.token == num_tokens_) {
        ring_.load_nothing();
        continue;
      }
      if (ahead_.segment == last_segment_) {
        if (ahead_.token != at_token_) return;
        to_next_token();
        continue;
      }
      ring_.load(as<const Vec16>(shfl_pointer(ahead_.from, ahead_.term)),
                 num_vectors(ahead_.segment));
      step_ahead();
    }
  }
  // Without branches.
  JAX_EP_DEVICE void step_ahead() {
    const bool wraps = ++ahead_.term == ahead_terms_.count();
    ahead_.term = wraps ? 0 : ahead_.term;
    ahead_.segment += static_cast<i32>(wraps);
    ahead_.from = ahead_.from + (wraps ? Stages::kSegmentBytes : 0);
  }
  // How many of the next loads are of full segments of one token, or are none.
  JAX_EP_DEVICE i32 num_full_loads() const {
    if (ahead_.token == num_tokens_) return std::numeric_limits<i32>::max();
    const bool has_last = last_segment_ == segments_.count && last_vectors_ != kFullVectors;
    const i32 end = last_segment_ - static_cast<i32>(has_last);
    return (end - ahead_.segment) * ahead_terms_.count() - ahead_.term;
  }

  JAX_EP_DEVICE i32 num_vectors(i32 segment) const {
    return segment + 1 < segments_.count ? kFullVectors : last_vectors_;
  }

  // What comes before a term, or after the last.
  JAX_EP_DEVICE void begin(const SumTerms& terms, i32 term) {
    Vec16 own[kVectors];
    if (kHasOthers && term == terms.own()) {
      sum_.take(own);
      ring_.keep_own_sum(own);
    }
    if (kHasOthers && term == terms.own_sum_at()) {
      ring_.read_own_sum(own);
      sum_.add(1.0F, own);
    }
  }

  // Adds as many terms as nothing comes between. Returns how many.
  JAX_EP_DEVICE i32 add_terms(const SumTerms& terms, i32 term) {
    Vec16 row[kVectors];
    const bool is_own = !kHasOthers || term < terms.own();
    const i32 end =
        is_own ? terms.own() : (term < terms.own_sum_at() ? terms.own_sum_at() : terms.count());
    const float weight_of_lane = is_own ? terms.weight : 1.0F;
    const i32 full_loads = ring_.is_full() && terms.weights_per_row() == 1 ? num_full_loads() : 0;
    const i32 count = end - term < full_loads ? end - term : full_loads;
    if (count > 0) {
      const bool loads = ahead_.token != num_tokens_;
      JAX_EP_NO_UNROLL
      for (i32 i = term; i < term + count; ++i) {
        ring_.exchange(as<const Vec16>(shfl_pointer(ahead_.from, ahead_.term)), loads, row);
        step_ahead();
        sum_.add(shfl_float(weight_of_lane, i), row);
      }
      return count;
    }
    ring_.wait();
    ring_.read(row);
    ring_.release();
    const i32 num_weights = is_own ? terms.weights_per_row() : 1;
    sum_.add(row, num_weights, [&](i32 weight) {
      return shfl_float(weight_of_lane, num_weights > 1 ? weight : term);
    });
    return 1;
  }

  // Begins the next sum.
  JAX_EP_DEVICE void write_sum(i32 num_vectors, Ptr<Vec16> to) {
    Vec16 row[kVectors];
    sum_.take(row);
    JAX_EP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const i32 at = static_cast<i32>(lane_id()) + v * static_cast<i32>(kWarpSize);
      if (at < num_vectors) st(to + at, row[v]);
    }
  }

  struct Position {
    i32 token;
    i32 segment;
    i32 term;
    Ptr<const std::byte> from;  // of each lane's row: the segment
  };
  static constexpr i32 kFullVectors = kVectors * static_cast<i32>(kWarpSize);

  TermRing<Stages>& ring_;
  const Segments& segments_;
  const i32 last_vectors_;
  const TermsOf& terms_of_;
  const OutOf& out_of_;
  i64 first_ = 0;
  i32 num_tokens_ = 0;
  i32 first_segment_ = 0;
  i32 last_segment_ = 0;
  i32 at_token_ = -1;  // counted from the first, as `ahead_.token`
  Position ahead_{};
  SumTerms ahead_terms_{};
  Sum sum_{};
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_ROW_SUM_H_
