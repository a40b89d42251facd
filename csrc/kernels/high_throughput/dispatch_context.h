// SPDX-License-Identifier: Apache-2.0
// What the senders, the receivers and the layouts of a dispatch share: the sizes of the call, and
// how rows lie in operands, in staging and in results.
//
// Rows whose bytes are a multiple of 16 travel by bulk copies through shared memory; others element
// by element.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_CONTEXT_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_CONTEXT_H_

#include "csrc/device/chunk_parts.h"
#include "csrc/device/exchange.h"
#include "csrc/device/quantize.h"
#include "csrc/device/segment_ring.h"
#include "csrc/device/token_selections.h"
#include "csrc/kernels/high_throughput/dispatch_block.h"

namespace jax_ep::dev {

template <typename Config, typename RowTypeOfCall>
struct DispatchContext {
  using RowType = RowTypeOfCall;
  using Element = typename RowType::Element;

  // num_senders: of a block's warps, those that send first.
  JAX_EP_DEVICE DispatchContext(const DispatchOp& op, const Exchange& exchange, i32 num_senders)
      : op(op),
        shape(op.shape),
        exchange(exchange),
        ring(shared<typename Config::SharedStorage>().stages[warp_id()]),
        hidden(op.hidden),
        x_bytes(element_bytes(op.x_format == RowFormat::kFloat8E4M3)),
        wire_bytes(element_bytes(op.wire == Wire::kFloat8E4M3)),
        rows_bytes(element_bytes(op.rows_format == RowFormat::kFloat8E4M3)),
        bulk(hidden * min_of(min_of(x_bytes, wire_bytes), rows_bytes) % 16 == 0),
        segments(hidden,
                 Config::Stages::kSegmentBytes / static_cast<i32>(sizeof(Element)),
                 granule(op.wire)),
        num_scale_blocks(ceil_div(hidden, kScaleBlock)),
        // Rows that stay on this rank, and stay as they are, need no staging.
        unstaged_rank(op.wire == Wire::kSame ? exchange.view().rank : -1),
        num_senders(static_cast<u32>(num_senders)),
        rank(exchange.view().rank),
        num_ranks(exchange.view().num_ranks),
        num_topk(shape.num_topk),
        parts(Chunks(OpKind::kDispatch, shape.num_tokens, exchange.view().chunk_target),
              segments.count,
              bulk && !with_dots(),  // a dot product is summed by one warp
              exchange.view().chunk_target) {}

  JAX_EP_DEVICE static i32 element_bytes(bool fp8) {
    return fp8 ? 1 : static_cast<i32>(sizeof(Element));
  }
  // Of a row with its scales, as it travels: a multiple of 16.
  JAX_EP_DEVICE i64 wire_row_bytes() const {
    if (hidden == 0) return 0;
    if (!bulk) {
      const i64 scales = fp8_wire() ? 4 * num_scale_blocks : 0;
      return align_up(align_up(hidden * wire_bytes, 4) + scales, 16);
    }
    const i32 last = segments.count - 1;
    return align_up(staged_at(segments.first(last)) + staged_bytes(segments.size(last, hidden)),
                    16);
  }
  // What segments are multiples of: rows, and the scales behind them, are copied 16 bytes at a
  // time; dot products are summed block by block.
  JAX_EP_DEVICE static i32 granule(Wire wire) {
    if (Config::kProducts) return static_cast<i32>(kDotBlock);
    return wire == Wire::kFloat8E4M3 ? 4 * static_cast<i32>(kScaleBlock)
                                     : 16 / static_cast<i32>(sizeof(Element));
  }
  JAX_EP_DEVICE static i32 min_of(i32 a, i32 b) { return a < b ? a : b; }
  JAX_EP_DEVICE bool fp8_wire() const { return !Config::kProducts && op.wire == Wire::kFloat8E4M3; }
  JAX_EP_DEVICE bool weighted() const { return Config::kProducts && op.weighted; }
  JAX_EP_DEVICE bool with_dots() const { return Config::kProducts && op.with_dots; }
  JAX_EP_DEVICE bool quantizes() const { return fp8_wire() && op.x_format == RowFormat::kDType; }
  JAX_EP_DEVICE bool restores() const { return fp8_wire() && op.rows_format == RowFormat::kDType; }
  JAX_EP_DEVICE Ptr<const std::byte> x_row(i64 token) const {
    return Ptr<const std::byte>{static_cast<const std::byte*>(op.x)} + token * hidden * x_bytes;
  }
  JAX_EP_DEVICE Ptr<std::byte> out_row(i64 row) const {
    return Ptr<std::byte>{static_cast<std::byte*>(op.rows)} + row * hidden * rows_bytes;
  }

  // Where a segment lies in a staged row, and how long it is.
  JAX_EP_DEVICE i64 staged_at(i64 first) const {
    return first * wire_bytes + (fp8_wire() ? first / kScaleBlock * 4 : 0);
  }
  JAX_EP_DEVICE u32 staged_bytes(i32 num_elements) const {
    return static_cast<u32>(num_elements * wire_bytes) +
           (fp8_wire() ? 4 * num_staged_scales(num_elements) : 0);
  }

  template <typename T>
  JAX_EP_DEVICE void copy_elements(Ptr<T> to, Ptr<const T> from) const {
    for (i64 i = lane_id(); i < hidden; i += kWarpSize) st(to + i, ld(from + i));
  }
  JAX_EP_DEVICE void copy_scales(Ptr<float> to, Ptr<const float> from) const {
    for (i64 i = lane_id(); i < num_scale_blocks; i += kWarpSize) st(to + i, ld(from + i));
  }

  // Rows that are copied element by element have all their scales at the end.
  template <typename Byte>
  JAX_EP_DEVICE Ptr<float> scales_behind(Ptr<Byte> row) const {
    return {as<float>(Ptr<std::byte>{const_cast<std::byte*>(row.raw)} + align_up(hidden, 4))};
  }

  const DispatchOp& op;
  const EpShape& shape;
  const Exchange exchange;
  SegmentRing<typename Config::Stages> ring;
  const i64 hidden;
  const i32 x_bytes;  // of an element of x, on the wire, and of rows
  const i32 wire_bytes;
  const i32 rows_bytes;
  const bool bulk;
  const Segments segments;
  const i64 num_scale_blocks;  // of elements that share a scale
  const i32 unstaged_rank;     // the rank whose rows are not staged; -1: none
  const u32 num_senders;       // of a block's warps
  const i32 rank;
  const i32 num_ranks;
  const i32 num_topk;
  const ChunkParts parts;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_CONTEXT_H_
