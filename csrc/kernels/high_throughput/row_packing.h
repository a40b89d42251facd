// SPDX-License-Identifier: Apache-2.0
// How a row of x becomes what travels: on the FP8 wire it is quantized, or its scales are put
// behind its numbers. Senders to a rank of the domain and to another domain share it.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_ROW_PACKING_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_ROW_PACKING_H_

#include "csrc/kernels/high_throughput/dispatch_context.h"

namespace jax_ep::dev {

// All lanes of a warp. `Context` is a DispatchContext.
template <typename Context>
class RowPacking {
 public:
  JAX_EP_DEVICE explicit RowPacking(const Context& context) : c_(context) {}

  // Of this lane's selection.
  JAX_EP_DEVICE float scalar_of_lane(i64 token) const {
    if (lane_id() >= static_cast<u32>(c_.num_topk)) return 0.0F;
    return ld(Ptr<const float>{c_.op.token_scalars} + (token * c_.num_topk + lane_id()));
  }
  // What to load of a segment.
  JAX_EP_DEVICE SegmentSource source(i64 token, i32 segment) const {
    return {c_.x_row(token) + c_.segments.first(segment) * c_.x_bytes,
            static_cast<u32>(c_.segments.size(segment, c_.hidden) * c_.x_bytes)};
  }
  // Makes of a loaded segment what travels, in its stage.
  JAX_EP_DEVICE void pack_segment(i64 token, i32 segment, Ptr<u32> stage) const {
    const i32 num_elements = c_.segments.size(segment, c_.hidden);
    if (c_.quantizes()) {
      quantize_segment<RowType>(stage, num_elements);
    } else if (c_.fp8_wire()) {
      const i64 block = c_.segments.first(segment) / kScaleBlock + lane_id();
      const bool is_block = static_cast<i64>(lane_id()) * kScaleBlock < num_elements;
      const auto scales = Ptr<const float>{c_.op.x_scales} + token * c_.num_scale_blocks;
      complete_segment(stage, num_elements, is_block ? ld(scales + block) : 0.0F);
    }
  }
  // Of a row that is no multiple of 16 bytes: element by element.
  JAX_EP_DEVICE void pack_elements(i64 token, Ptr<std::byte> to) const {
    if (c_.quantizes()) {
      quantize_elements(token, to);
    } else if (c_.fp8_wire()) {
      c_.copy_elements(as<u8>(to), as<const u8>(c_.x_row(token)));
      c_.copy_scales(c_.scales_behind(to),
                     Ptr<const float>{c_.op.x_scales} + token * c_.num_scale_blocks);
    } else {
      c_.copy_elements(as<Element>(to), as<const Element>(c_.x_row(token)));
    }
  }

 private:
  using RowType = typename Context::RowType;
  using Element = typename Context::Element;

  JAX_EP_DEVICE void quantize_elements(i64 token, Ptr<std::byte> to) const {
    for (i64 block = 0; block < c_.num_scale_blocks; ++block) {
      const BlockOfElements<RowType> elements(as<const Element>(c_.x_row(token)), block, c_.hidden);
      const Divider scaled(elements.scale);
      for (int i = 0; i < elements.kPerLane; ++i) {
        const i64 element = elements.element(block, i);
        if (element >= c_.hidden) continue;
        st(as<u8>(to) + element, to_fp8(scaled(elements.value[i])));
      }
      if (lane_id() == 0) st(c_.scales_behind(to) + block, elements.scale);
    }
  }

  const Context& c_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_ROW_PACKING_H_
