// SPDX-License-Identifier: Apache-2.0
// A warp's pipeline of row segments through shared memory: bulk loads run ahead of the bulk stores
// that send each segment on.
#ifndef JAX_EP_CSRC_DEVICE_SEGMENT_RING_H_
#define JAX_EP_CSRC_DEVICE_SEGMENT_RING_H_

#include "csrc/device/heap.h"

namespace jax_ep::dev {

// The pipeline's shared memory, one per warp.
template <int kStageCount, int kBytes>
struct SegmentStages {
  static constexpr int kStages = kStageCount;
  static constexpr int kSegmentBytes = kBytes;
  static_assert(kStages >= 2 && kSegmentBytes % 512 == 0);

  alignas(128) Shared<u32> stage[kStages][kSegmentBytes / 4];
  Mbar loaded[kStages];
};

// What is loaded into a stage.
struct SegmentSource {
  Ptr<const std::byte> from;
  u32 bytes;
};

template <typename Stages>
class SegmentRing {
 public:
  // Segments whose loads run ahead of the one in use. One stage more than these and that one, so
  // that a load need not wait for the stores just issued.
  static constexpr u32 kAhead = Stages::kStages - 2;

  // All lanes. The warp_sync of `load` tells them all of the mbarriers.
  JAX_EP_DEVICE explicit SegmentRing(Stages& stages) : stages_(stages) {
    if (lane_id() != 0) return;
    for (int i = 0; i < Stages::kStages; ++i) mbar_init(&stages_.loaded[i], 1);
    mbar_init_fence();
  }

  JAX_EP_DEVICE bool may_load() const { return loads_ - uses_ <= kAhead; }

  // All lanes: starts to load the next segment.
  JAX_EP_DEVICE void load(const SegmentSource& source) {
    // The stores out of this stage, two uses ago, have been read.
    bulk_wait_read<1>();
    warp_sync();
    const u32 stage = loads_ % Stages::kStages;
    if (lane_id() == 0) {
      mbar_arrive_expect(&stages_.loaded[stage], source.bytes);
      bulk_load(
          address_of(stages_.stage[stage][0]), source.from, source.bytes, &stages_.loaded[stage]);
    }
    ++loads_;
  }

  // All lanes: the oldest segment, once it is there. Follow its use with `used`.
  JAX_EP_DEVICE Ptr<u32> wait() {
    const u32 stage = uses_ % Stages::kStages;
    mbar_wait(&stages_.loaded[stage], uses_ / Stages::kStages % 2);
    return address_of(stages_.stage[stage][0]);
  }

  // All lanes, after their bulk stores of the segment.
  JAX_EP_DEVICE void used() {
    bulk_commit();
    ++uses_;
  }

 private:
  Stages& stages_;
  u32 loads_ = 0;
  u32 uses_ = 0;
};

// How a row is cut into segments, in elements.
struct Segments {
  i32 count;
  i32 num_elements;  // of every segment but the last, which may have fewer

  // Segments of `max_elements` elements.
  JAX_EP_DEVICE Segments(i64 hidden, i32 max_elements)
      : count(static_cast<i32>(ceil_div(hidden, max_elements))), num_elements(max_elements) {}

  // Segments of at most `max_elements` elements, in multiples of `granule`, of about the same size.
  JAX_EP_DEVICE Segments(i64 hidden, i32 max_elements, i32 granule)
      : count(static_cast<i32>(ceil_div(hidden, max_elements / granule * granule))),
        num_elements(count == 0 ? 0
                                : static_cast<i32>(align_up(ceil_div(hidden, count), granule))) {
    // Rounding up may have left nothing for the last.
    if (count != 0) count = static_cast<i32>(ceil_div(hidden, num_elements));
  }
  JAX_EP_DEVICE i64 first(i32 segment) const { return i64{segment} * num_elements; }
  JAX_EP_DEVICE i32 size(i32 segment, i64 hidden) const {
    const i64 left = hidden - first(segment);
    return left < num_elements ? static_cast<i32>(left) : num_elements;
  }
};

// Streams segments [first_segment, last_segment) of the rows of tokens [first, last) through the
// ring. `target_of(token)` is called once for each token, in order: where its row goes from each
// lane, -1 for nowhere; a row that goes nowhere does not travel. `source(token, segment)` is what
// to load, and `use(token, target, segment, stage)` sends a loaded segment on. All lanes.
template <typename Ring, typename TargetOf, typename Source, typename Use>
JAX_EP_DEVICE void stream_segments(Ring& ring,
                                   i64 first,
                                   i64 last,
                                   i32 first_segment,
                                   i32 last_segment,
                                   const TargetOf& target_of,
                                   const Source& source,
                                   const Use& use) {
  struct Position {
    i64 token;
    i32 segment;
    i32 target;
  };
  Position at{first - 1, last_segment, -1};
  Position ahead = at;
  while (true) {
    // At most to the end of the next token: so when a token's last segment is used, the next token
    // is known.
    while (ahead.token < last) {
      if (ahead.segment == last_segment) {
        if (ahead.token != at.token) break;
        do {
          if (++ahead.token == last) break;
          ahead.target = target_of(ahead.token);
        } while (warp_ballot(ahead.target >= 0) == 0);
        ahead.segment = first_segment;
        continue;
      }
      if (!ring.may_load()) break;
      ring.load(source(ahead.token, ahead.segment++));
    }
    if (at.segment == last_segment) {
      if (ahead.token == last) return;
      at = {ahead.token, first_segment, ahead.target};
    }
    use(at.token, at.target, at.segment, ring.wait());
    ring.used();
    ++at.segment;
  }
}

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_SEGMENT_RING_H_
