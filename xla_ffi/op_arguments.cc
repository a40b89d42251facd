// SPDX-License-Identifier: Apache-2.0
#include "xla_ffi/op_arguments.h"

#include <string>

#include "csrc/core/heap_layout.h"

namespace jax_ep {
namespace {

using enum xla::ffi::DataType;

Status bad_attribute(std::string_view name, int64_t value, std::string_view allowed) {
  return Status::invalid_argument("attribute ep." + std::string(name) + " is " +
                                  std::to_string(value) + "; allowed: " + std::string(allowed));
}

// Sizes that all buffers of a call agree with, from its attributes.
Status make_shape(const EpAttrs& attrs, int64_t num_tokens, int64_t capacity, EpShape& shape) {
  if (attrs.num_ranks < 1) return bad_attribute("num_ranks", attrs.num_ranks, "1 or more");
  if (attrs.num_experts < 1 || attrs.num_experts % attrs.num_ranks != 0) {
    return bad_attribute("num_experts", attrs.num_experts, "a positive multiple of num_ranks");
  }
  if (attrs.num_topk < 1) return bad_attribute("num_topk", attrs.num_topk, "1 or more");
  if (attrs.expert_alignment < 1) {
    return bad_attribute("expert_alignment", attrs.expert_alignment, "1 or more");
  }
  if (attrs.layout != static_cast<int32_t>(Layout::kExpert) &&
      attrs.layout != static_cast<int32_t>(Layout::kRank)) {
    return bad_attribute("layout", attrs.layout, "0 (expert), 1 (rank)");
  }
  // Rows and sources are int32 on the wire between plan and dispatch.
  constexpr int64_t kInt32Max = 2147483647;
  if (capacity > kInt32Max || num_tokens * attrs.num_ranks > kInt32Max) {
    return Status::invalid_argument(
        "a receive buffer of " + std::to_string(capacity) + " rows for " +
        std::to_string(attrs.num_ranks) + " ranks of " + std::to_string(num_tokens) +
        " tokens is too large; allowed: up to 2147483647 rows and tokens in all");
  }
  shape = EpShape{.num_ranks = attrs.num_ranks,
                  .num_experts = attrs.num_experts,
                  .num_topk = attrs.num_topk,
                  .num_tokens = num_tokens,
                  .recv_capacity = capacity,
                  .expert_alignment = attrs.expert_alignment,
                  .layout = static_cast<Layout>(attrs.layout)};
  return {};
}

// float32 with a received row's scalars: [C], or [C, K] in layout "rank".
Status check_row_scalars(const Buffer& buffer, const EpShape& shape) {
  if (shape.layout == Layout::kExpert) return buffer.check(F32, {shape.recv_capacity});
  return buffer.check(F32, {shape.recv_capacity, shape.num_topk});
}

Status check_selections(const Buffer& topk_idx, const Buffer& slot, const EpShape& shape) {
  JAX_EP_RETURN_IF_ERROR(topk_idx.check(S32, {shape.num_tokens, shape.num_topk}));
  return slot.check(S32, {shape.num_tokens, shape.num_topk});
}

// Rows go in and out in one dtype.
Status check_rows_out(const Buffer& out,
                      std::string_view out_name,
                      std::string_view in_name,
                      std::initializer_list<int64_t> dims,
                      DType in_dtype) {
  DType dtype;
  JAX_EP_RETURN_IF_ERROR(out.check_rows(dims, dtype));
  if (dtype == in_dtype) return {};
  return Status::invalid_argument("buffer '" + std::string(out_name) + "' is " +
                                  std::string(name(dtype)) + "; expected the dtype of '" +
                                  std::string(in_name) + "', " + std::string(name(in_dtype)));
}

Status check_program_rank(const Buffer& program_rank) { return program_rank.check(S32, {1}); }

}  // namespace

Status check_plan(const EpAttrs& attrs,
                  const PlanBuffers& buffers,
                  SourceSlot source_slot,
                  PlanArguments& arguments) {
  JAX_EP_RETURN_IF_ERROR(buffers.row_source.check(S32, {kAny}));
  EpShape& shape = arguments.shape;
  JAX_EP_RETURN_IF_ERROR(
      make_shape(attrs, buffers.topk_idx.dim(0), buffers.row_source.dim(0), shape));
  JAX_EP_RETURN_IF_ERROR(check_selections(buffers.topk_idx, buffers.slot, shape));
  if (shape.layout == Layout::kRank) {
    JAX_EP_RETURN_IF_ERROR(buffers.row_topk_idx.check(S32, {shape.recv_capacity, shape.num_topk}));
  } else {
    JAX_EP_RETURN_IF_ERROR(buffers.row_topk_idx.check(S32, {0}));
  }
  if (source_slot == SourceSlot::kPresent) {
    JAX_EP_RETURN_IF_ERROR(check_source_slot(buffers.source_slot, shape));
  } else {
    JAX_EP_RETURN_IF_ERROR(buffers.source_slot.check(S32, {0}));
  }
  JAX_EP_RETURN_IF_ERROR(buffers.group_sizes.check(S32, {shape.num_row_groups()}));
  JAX_EP_RETURN_IF_ERROR(buffers.tokens_per_expert.check(S32, {shape.num_local_experts()}));
  JAX_EP_RETURN_IF_ERROR(buffers.num_dropped.check(S32, {}));
  return check_program_rank(buffers.program_rank);
}

Status check_dispatch(const EpAttrs& attrs,
                      int32_t wire,
                      const DispatchBuffers& buffers,
                      DispatchArguments& arguments) {
  JAX_EP_RETURN_IF_ERROR(buffers.row_source.check(S32, {kAny}));
  const Buffer& x = buffers.x;
  JAX_EP_RETURN_IF_ERROR(x.check_rows({kAny, kAny}, arguments.dtype));
  EpShape& shape = arguments.shape;
  JAX_EP_RETURN_IF_ERROR(make_shape(attrs, x.dim(0), buffers.row_source.dim(0), shape));
  JAX_EP_RETURN_IF_ERROR(
      check_rows_out(buffers.rows, "rows", "x", {shape.recv_capacity, x.dim(1)}, arguments.dtype));
  JAX_EP_RETURN_IF_ERROR(check_selections(buffers.topk_idx, buffers.slot, shape));
  const bool with_scalars = !buffers.token_scalars.absent();
  if (with_scalars) {
    JAX_EP_RETURN_IF_ERROR(buffers.token_scalars.check(F32, {shape.num_tokens, shape.num_topk}));
    JAX_EP_RETURN_IF_ERROR(check_row_scalars(buffers.row_scalars, shape));
  } else {
    JAX_EP_RETURN_IF_ERROR(buffers.row_scalars.check(F32, {0}));
  }
  if (wire != static_cast<int32_t>(Wire::kSame) &&
      wire != static_cast<int32_t>(Wire::kFloat8E4M3)) {
    return Status::invalid_argument("attribute wire is " + std::to_string(wire) +
                                    "; allowed: 0 (same), 1 (float8_e4m3fn)");
  }
  arguments.hidden = x.dim(1);
  arguments.scalars = with_scalars ? shape.num_topk : 0;
  arguments.wire = static_cast<Wire>(wire);
  return check_program_rank(buffers.program_rank);
}

Status check_combine(const EpAttrs& attrs,
                     const CombineBuffers& buffers,
                     CombineArguments& arguments) {
  const Buffer& y = buffers.y;
  JAX_EP_RETURN_IF_ERROR(y.check_rows({kAny, kAny}, arguments.dtype));
  EpShape& shape = arguments.shape;
  JAX_EP_RETURN_IF_ERROR(make_shape(attrs, buffers.topk_idx.dim(0), y.dim(0), shape));
  JAX_EP_RETURN_IF_ERROR(
      check_rows_out(buffers.out, "out", "y", {shape.num_tokens, y.dim(1)}, arguments.dtype));
  JAX_EP_RETURN_IF_ERROR(check_selections(buffers.topk_idx, buffers.slot, shape));
  arguments.weighted = !buffers.weights.absent();
  if (arguments.weighted) JAX_EP_RETURN_IF_ERROR(check_row_scalars(buffers.weights, shape));
  const bool with_scalars = !buffers.row_scalars.absent();
  if (with_scalars) {
    JAX_EP_RETURN_IF_ERROR(check_row_scalars(buffers.row_scalars, shape));
    JAX_EP_RETURN_IF_ERROR(buffers.token_scalars.check(F32, {shape.num_tokens, shape.num_topk}));
  } else {
    JAX_EP_RETURN_IF_ERROR(buffers.token_scalars.check(F32, {0}));
  }
  arguments.hidden = y.dim(1);
  arguments.scalars = with_scalars ? shape.num_topk : 0;
  return check_program_rank(buffers.program_rank);
}

Status check_source_slot(const Buffer& buffer, const EpShape& shape) {
  return buffer.check(
      S32,
      {shape.num_tokens * shape.num_ranks,
       max_rows_per_token(shape.layout, shape.num_topk, shape.num_local_experts())});
}

Failure::operator xla::ffi::Error() const { return to_error(status); }

Failure::operator xla::ffi::Future() const {
  xla::ffi::Promise promise;
  promise.SetError(to_error(status));
  return xla::ffi::Future(promise);
}

xla::ffi::Error to_error(const Status& status) {
  if (status.ok()) return xla::ffi::Error::Success();
  return {static_cast<xla::ffi::ErrorCode>(status.code()), status.message()};
}

}  // namespace jax_ep
