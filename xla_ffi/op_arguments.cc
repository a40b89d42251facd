// SPDX-License-Identifier: Apache-2.0
#include "xla_ffi/op_arguments.h"

#include <initializer_list>
#include <string>
#include <string_view>

#include "csrc/core/limits.h"
#include "csrc/core/shape_check.h"
#include "csrc/core/work_partition.h"

namespace jax_ep {
namespace {

using enum ffi::DataType;

// Sizes that all buffers of a call agree with, from its attributes.
Status make_shape(const EpAttrs& attrs, int64_t num_tokens, int64_t capacity, EpShape& shape) {
  shape = EpShape{.num_ranks = attrs.num_ranks,
                  .num_experts = attrs.num_experts,
                  .num_topk = attrs.num_topk,
                  .num_tokens = num_tokens,
                  .recv_capacity = capacity,
                  .expert_alignment = attrs.expert_alignment,
                  .layout = static_cast<Layout>(attrs.layout)};
  return check_shape(shape);
}

// float32 with a received row's scalars: [C], or [C, K] in layout "rank".
Status check_row_scalars(const Buffer& buffer, const EpShape& shape) {
  if (shape.layout == Layout::kExpert) return buffer.check(F32, {shape.recv_capacity});
  return buffer.check(F32, {shape.recv_capacity, shape.num_topk});
}

Status check_selections(const Buffer& buffer, const EpShape& shape) {
  return buffer.check(S32, {shape.num_tokens, shape.num_topk});
}

Status check_source_slot(const Buffer& buffer, const EpShape& shape) {
  const int64_t rows = max_rows_per_token(shape.layout, shape.num_topk, shape.num_local_experts());
  return buffer.check(S32, {shape.num_tokens * shape.num_ranks, rows});
}

// The ranks that take part; a call in which all do may have no such operand.
Status check_rank_mask(const Buffer& buffer, const EpShape& shape) {
  return buffer.absent() ? Status() : buffer.check(PRED, {shape.num_ranks});
}

// Where the call says who was missing; one of a group in which that is an error has no such result.
Status set_missing_ranks(const Buffer& buffer, const EpShape& shape, uint8_t*& missing_ranks) {
  missing_ranks = buffer.data<uint8_t>();
  return missing_ranks == nullptr ? Status() : buffer.check(PRED, {shape.num_ranks});
}

// All rows of a call that are not quantized have one dtype.
Status check_same_dtype(std::string_view buffer,
                        DType dtype,
                        std::string_view other,
                        DType of_other) {
  if (dtype == of_other) return {};
  return Status::invalid_argument("buffer '" + std::string(buffer) + "' is " +
                                  std::string(name(dtype)) + "; expected the dtype of '" +
                                  std::string(other) + "', " + std::string(name(of_other)));
}

// The scales of quantized rows; of others they are absent.
Status check_scales(const Buffer& scales, RowFormat format, int64_t num_rows, int64_t hidden) {
  if (format == RowFormat::kDType) return scales.check(F32, {0});
  return scales.check(F32, {num_rows, ceil_div(hidden, kScaleBlock)});
}

Status read_attributes(const DispatchAttrs& attrs, DispatchOp& op) {
  if (attrs.dtype < 0 || attrs.dtype > static_cast<int32_t>(DType::kFloat16)) {
    return out_of_range("attribute dtype", attrs.dtype, "0 (float32), 1 (bfloat16), 2 (float16)");
  }
  if (attrs.wire != static_cast<int32_t>(Wire::kSame) &&
      attrs.wire != static_cast<int32_t>(Wire::kFloat8E4M3)) {
    return out_of_range("attribute wire", attrs.wire, "0 (same), 1 (float8_e4m3fn)");
  }
  op.dtype = static_cast<DType>(attrs.dtype);
  op.wire = static_cast<Wire>(attrs.wire);
  op.zero_fill = attrs.zero_fill;
  return {};
}

// Factors of received rows, the same rows of another array, and their dot products: what of them is
// absent has no elements.
Status check_product_buffers(const Buffer& row_weights,
                             const Buffer& y,
                             const Buffer& row_dots,
                             DispatchOp& op) {
  const int64_t capacity = op.shape.recv_capacity;
  op.weighted = !row_weights.absent();
  JAX_EP_RETURN_IF_ERROR(row_weights.check(F32, {op.weighted ? capacity : 0}));
  op.with_dots = op.hidden > 0 ? y.dim(1) != 0 : !row_dots.absent();
  DType dtype;
  JAX_EP_RETURN_IF_ERROR(y.check_rows({capacity, op.with_dots ? op.hidden : 0}, dtype));
  JAX_EP_RETURN_IF_ERROR(check_same_dtype("y", dtype, "x", op.dtype));
  JAX_EP_RETURN_IF_ERROR(row_dots.check(F32, {op.with_dots ? capacity : 0}));
  return check_products(op);
}

// A scalar for each selection travels, or none does: then both buffers are absent.
Status check_token_scalars(const Buffer& buffer, bool travel, const EpShape& shape) {
  if (travel) return buffer.check(F32, {shape.num_tokens, shape.num_topk});
  return buffer.check(F32, {0});
}
Status check_carried_scalars(const Buffer& buffer, bool travel, const EpShape& shape) {
  if (travel) return check_row_scalars(buffer, shape);
  return buffer.check(F32, {0});
}

// What a plan gives.
struct PlanResults {
  explicit PlanResults(BufferReader& reader)
      : slot(reader.result("slot")),
        row_source(reader.result("row_source")),
        row_topk_idx(reader.result("row_topk_idx")),
        source_slot(reader.result("source_slot")),
        group_sizes(reader.result("group_sizes")),
        tokens_per_expert(reader.result("tokens_per_expert")),
        num_dropped(reader.result("num_dropped")) {}

  const Buffer slot;
  const Buffer row_source;
  const Buffer row_topk_idx;
  const Buffer source_slot;
  const Buffer group_sizes;
  const Buffer tokens_per_expert;
  const Buffer num_dropped;
};

// Of an op that has its shape: checks the routing and the results, and sets the pointers to them.
Status set_plan(const Buffer& topk_idx,
                const Buffer& rank_mask,
                const PlanResults& results,
                Platform platform,
                PlanOp& op) {
  const EpShape& shape = op.shape;
  JAX_EP_RETURN_IF_ERROR(check_selections(topk_idx, shape));
  JAX_EP_RETURN_IF_ERROR(check_rank_mask(rank_mask, shape));
  JAX_EP_RETURN_IF_ERROR(check_selections(results.slot, shape));
  if (shape.layout == Layout::kRank) {
    JAX_EP_RETURN_IF_ERROR(results.row_topk_idx.check(S32, {shape.recv_capacity, shape.num_topk}));
  } else {
    JAX_EP_RETURN_IF_ERROR(results.row_topk_idx.check(S32, {0}));
  }
  if (platform == Platform::kCuda) {
    JAX_EP_RETURN_IF_ERROR(check_source_slot(results.source_slot, shape));
  } else {
    JAX_EP_RETURN_IF_ERROR(results.source_slot.check(S32, {0}));
  }
  JAX_EP_RETURN_IF_ERROR(results.group_sizes.check(S32, {shape.num_row_groups()}));
  JAX_EP_RETURN_IF_ERROR(results.tokens_per_expert.check(S32, {shape.num_local_experts()}));
  op.topk_idx = topk_idx.data<const int32_t>();
  op.rank_mask = rank_mask.data<const uint8_t>();
  op.slot = results.slot.data<int32_t>();
  op.row_source = results.row_source.data<int32_t>();
  op.row_topk_idx = results.row_topk_idx.data<int32_t>();
  op.source_slot = results.source_slot.data<int32_t>();
  op.group_sizes = results.group_sizes.data<int32_t>();
  op.tokens_per_expert = results.tokens_per_expert.data<int32_t>();
  op.num_dropped = results.num_dropped.data<int32_t>();
  return results.num_dropped.check(S32, {});
}

// What a dispatch is given besides its plan.
struct DispatchOperands {
  explicit DispatchOperands(BufferReader& reader)
      : x(reader.operand("x")),
        x_scales(reader.operand("x_scales")),
        token_scalars(reader.operand("token_scalars")) {}

  const Buffer x;
  const Buffer x_scales;
  const Buffer token_scalars;
};

struct DispatchResults {
  explicit DispatchResults(BufferReader& reader)
      : rows(reader.result("rows")),
        rows_scales(reader.result("rows_scales")),
        row_scalars(reader.result("row_scalars")) {}

  const Buffer rows;
  const Buffer rows_scales;
  const Buffer row_scalars;
};

// Checks what is sent, and sets of the op all that it says.
Status set_sent(const DispatchOperands& operands,
                const EpAttrs& attrs,
                const DispatchAttrs& own,
                int64_t capacity,
                DispatchOp& op) {
  const EpShape& shape = op.shape;
  JAX_EP_RETURN_IF_ERROR(read_attributes(own, op));
  JAX_EP_RETURN_IF_ERROR(operands.x.check_rows_or_fp8(op.dtype, {kAny, kAny}, op.x_format));
  JAX_EP_RETURN_IF_ERROR(make_shape(attrs, operands.x.dim(0), capacity, op.shape));
  op.hidden = operands.x.dim(1);
  JAX_EP_RETURN_IF_ERROR(check_scales(operands.x_scales, op.x_format, shape.num_tokens, op.hidden));
  const bool with_scalars = !operands.token_scalars.absent();
  JAX_EP_RETURN_IF_ERROR(check_token_scalars(operands.token_scalars, with_scalars, shape));
  op.num_scalars = with_scalars ? shape.num_topk : 0;
  op.x = operands.x.data<const void>();
  op.x_scales = operands.x_scales.data<const float>();
  op.token_scalars = operands.token_scalars.data<const float>();
  return check_row_formats(op);
}

// Checks what is no plan's, and sets of the op all but the pointers to a plan's.
Status set_dispatch(const DispatchOperands& operands,
                    const DispatchResults& results,
                    const EpAttrs& attrs,
                    const DispatchAttrs& own,
                    int64_t capacity,
                    DispatchOp& op) {
  const EpShape& shape = op.shape;
  JAX_EP_RETURN_IF_ERROR(set_sent(operands, attrs, own, capacity, op));
  JAX_EP_RETURN_IF_ERROR(
      results.rows.check_rows_or_fp8(op.dtype, {shape.recv_capacity, op.hidden}, op.rows_format));
  JAX_EP_RETURN_IF_ERROR(
      check_scales(results.rows_scales, op.rows_format, shape.recv_capacity, op.hidden));
  JAX_EP_RETURN_IF_ERROR(check_carried_scalars(results.row_scalars, op.num_scalars > 0, shape));
  op.rows = results.rows.data<void>();
  op.rows_scales = results.rows_scales.data<float>();
  op.row_scalars = results.row_scalars.data<float>();
  return check_row_formats(op);
}

// What a combine is given; on CPU without what is for GPUs only.
struct CombineOperands {
  CombineOperands(BufferReader& reader, bool on_gpu)
      : y(reader.operand("y")),
        weights(reader.operand("weights")),
        row_scalars(reader.operand("row_scalars")),
        topk_idx(reader.operand("topk_idx")),
        slot(reader.operand("slot")),
        row_topk_idx(on_gpu ? reader.operand("row_topk_idx") : Buffer("row_topk_idx")),
        source_slot(on_gpu ? reader.operand("source_slot") : Buffer("source_slot")),
        rank_mask(reader.last_operand("rank_mask")) {}

  const Buffer y;
  const Buffer weights;
  const Buffer row_scalars;
  const Buffer topk_idx;
  const Buffer slot;
  const Buffer row_topk_idx;
  const Buffer source_slot;
  const Buffer rank_mask;
};

// Checks these, and sets of the op all that they say.
Status set_sent(const CombineOperands& operands,
                const EpAttrs& attrs,
                int32_t domain_size,
                bool on_gpu,
                CombineOp& op) {
  const EpShape& shape = op.shape;
  JAX_EP_RETURN_IF_ERROR(operands.y.check_rows({kAny, kAny}, op.dtype));
  JAX_EP_RETURN_IF_ERROR(make_shape(attrs, operands.topk_idx.dim(0), operands.y.dim(0), op.shape));
  op.hidden = operands.y.dim(1);
  op.domain_size = domain_size;
  JAX_EP_RETURN_IF_ERROR(check_domains(op));
  JAX_EP_RETURN_IF_ERROR(check_selections(operands.topk_idx, shape));
  JAX_EP_RETURN_IF_ERROR(check_selections(operands.slot, shape));
  JAX_EP_RETURN_IF_ERROR(check_rank_mask(operands.rank_mask, shape));
  if (on_gpu) JAX_EP_RETURN_IF_ERROR(check_source_slot(operands.source_slot, shape));
  op.weighted = !operands.weights.absent();
  if (op.weighted) JAX_EP_RETURN_IF_ERROR(check_row_scalars(operands.weights, shape));
  if (op.weighted && on_gpu && shape.layout == Layout::kRank) {
    JAX_EP_RETURN_IF_ERROR(operands.row_topk_idx.check(S32, {shape.recv_capacity, shape.num_topk}));
  }
  const bool with_scalars = !operands.row_scalars.absent();
  JAX_EP_RETURN_IF_ERROR(check_carried_scalars(operands.row_scalars, with_scalars, shape));
  op.num_scalars = with_scalars ? shape.num_topk : 0;
  op.y = operands.y.data<const void>();
  op.weights = operands.weights.data<const float>();
  op.row_scalars = operands.row_scalars.data<const float>();
  op.topk_idx = operands.topk_idx.data<const int32_t>();
  op.slot = operands.slot.data<const int32_t>();
  op.row_topk_idx = operands.row_topk_idx.data<const int32_t>();
  op.source_slot = operands.source_slot.data<const int32_t>();
  op.rank_mask = operands.rank_mask.data<const uint8_t>();
  return {};
}

}  // namespace

Status read_plan(const Operands& operands,
                 const ffi::RemainingRets& results,
                 const EpAttrs& attrs,
                 Platform platform,
                 OpArguments<PlanOp>& arguments) {
  BufferReader reader(operands, results);
  const Buffer program_rank = reader.operand("program_rank");
  const Buffer topk_idx = reader.operand("topk_idx");
  const Buffer rank_mask = reader.last_operand("rank_mask");
  const PlanResults given(reader);
  JAX_EP_RETURN_IF_ERROR(reader.finish());
  JAX_EP_RETURN_IF_ERROR(given.row_source.check(S32, {kAny}));
  PlanOp& op = arguments.op;
  JAX_EP_RETURN_IF_ERROR(make_shape(attrs, topk_idx.dim(0), given.row_source.dim(0), op.shape));
  JAX_EP_RETURN_IF_ERROR(set_plan(topk_idx, rank_mask, given, platform, op));
  arguments.program_rank = program_rank.data<const int32_t>();
  return program_rank.check(S32, {1});
}

Status read_dispatch(const Operands& operands,
                     const ffi::RemainingRets& results,
                     const EpAttrs& attrs,
                     const DispatchAttrs& own,
                     Platform platform,
                     OpArguments<DispatchOp>& arguments) {
  const bool on_gpu = platform == Platform::kCuda;
  BufferReader reader(operands, results);
  const Buffer program_rank = reader.operand("program_rank");
  const DispatchOperands taken(reader);
  const Buffer row_weights = reader.operand("row_weights");
  const Buffer y = reader.operand("y");
  const Buffer topk_idx = reader.operand("topk_idx");
  const Buffer slot = reader.operand("slot");
  const Buffer row_source = reader.operand("row_source");
  const Buffer source_slot = on_gpu ? reader.operand("source_slot") : Buffer("source_slot");
  const Buffer rank_mask = reader.last_operand("rank_mask");
  const DispatchResults given(reader);
  const Buffer row_dots = reader.result("row_dots");
  JAX_EP_RETURN_IF_ERROR(reader.finish());
  JAX_EP_RETURN_IF_ERROR(row_source.check(S32, {kAny}));
  DispatchOp& op = arguments.op;
  const EpShape& shape = op.shape;
  JAX_EP_RETURN_IF_ERROR(set_dispatch(taken, given, attrs, own, row_source.dim(0), op));
  JAX_EP_RETURN_IF_ERROR(check_selections(topk_idx, shape));
  JAX_EP_RETURN_IF_ERROR(check_selections(slot, shape));
  JAX_EP_RETURN_IF_ERROR(check_rank_mask(rank_mask, shape));
  if (on_gpu) JAX_EP_RETURN_IF_ERROR(check_source_slot(source_slot, shape));
  JAX_EP_RETURN_IF_ERROR(check_product_buffers(row_weights, y, row_dots, op));
  arguments.program_rank = program_rank.data<const int32_t>();
  op.row_weights = row_weights.data<const float>();
  op.y = y.data<const void>();
  op.topk_idx = topk_idx.data<const int32_t>();
  op.slot = slot.data<const int32_t>();
  op.row_source = row_source.data<const int32_t>();
  op.source_slot = source_slot.data<const int32_t>();
  op.rank_mask = rank_mask.data<const uint8_t>();
  op.row_dots = row_dots.data<float>();
  return program_rank.check(S32, {1});
}

Status read_plan_dispatch(const Operands& operands,
                          const ffi::RemainingRets& results,
                          const EpAttrs& attrs,
                          const DispatchAttrs& own,
                          Platform platform,
                          OpArguments<PlanDispatchOp>& arguments) {
  BufferReader reader(operands, results);
  const Buffer program_rank = reader.operand("program_rank");
  const DispatchOperands taken(reader);
  const Buffer topk_idx = reader.operand("topk_idx");
  const Buffer rank_mask = reader.last_operand("rank_mask");
  const PlanResults plan_given(reader);
  const DispatchResults given(reader);
  const Buffer missing_ranks = reader.last_result("missing_ranks");
  JAX_EP_RETURN_IF_ERROR(reader.finish());
  JAX_EP_RETURN_IF_ERROR(plan_given.row_source.check(S32, {kAny}));
  PlanOp plan;
  DispatchOp dispatch;
  const int64_t capacity = plan_given.row_source.dim(0);
  JAX_EP_RETURN_IF_ERROR(set_dispatch(taken, given, attrs, own, capacity, dispatch));
  plan.shape = dispatch.shape;
  JAX_EP_RETURN_IF_ERROR(set_plan(topk_idx, rank_mask, plan_given, platform, plan));
  JAX_EP_RETURN_IF_ERROR(set_missing_ranks(missing_ranks, plan.shape, dispatch.missing_ranks));
  arguments.program_rank = program_rank.data<const int32_t>();
  arguments.op = plan_dispatch_op(plan, dispatch);
  return program_rank.check(S32, {1});
}

Status read_combine(const Operands& operands,
                    const ffi::RemainingRets& results,
                    const EpAttrs& attrs,
                    int32_t domain_size,
                    Platform platform,
                    OpArguments<CombineOp>& arguments) {
  const bool on_gpu = platform == Platform::kCuda;
  BufferReader reader(operands, results);
  const Buffer program_rank = reader.operand("program_rank");
  const CombineOperands taken(reader, on_gpu);
  const Buffer out = reader.result("out");
  const Buffer token_scalars = reader.result("token_scalars");
  const Buffer missing_ranks = reader.last_result("missing_ranks");
  JAX_EP_RETURN_IF_ERROR(reader.finish());
  CombineOp& op = arguments.op;
  const EpShape& shape = op.shape;
  JAX_EP_RETURN_IF_ERROR(set_sent(taken, attrs, domain_size, on_gpu, op));
  DType out_dtype;
  JAX_EP_RETURN_IF_ERROR(out.check_rows({shape.num_tokens, op.hidden}, out_dtype));
  JAX_EP_RETURN_IF_ERROR(check_same_dtype("out", out_dtype, "y", op.dtype));
  JAX_EP_RETURN_IF_ERROR(check_token_scalars(token_scalars, op.num_scalars > 0, shape));
  JAX_EP_RETURN_IF_ERROR(set_missing_ranks(missing_ranks, shape, op.missing_ranks));
  arguments.program_rank = program_rank.data<const int32_t>();
  op.out = out.data<void>();
  op.token_scalars = token_scalars.data<float>();
  return program_rank.check(S32, {1});
}

Status read_dispatch_start(const Operands& operands,
                           const ffi::RemainingRets& results,
                           const EpAttrs& attrs,
                           const DispatchAttrs& own,
                           int64_t recv_capacity,
                           OpArguments<PlanDispatchOp>& arguments,
                           uint32_t*& ticket) {
  BufferReader reader(operands, results);
  const Buffer program_rank = reader.operand("program_rank");
  const DispatchOperands taken(reader);
  const Buffer topk_idx = reader.operand("topk_idx");
  const Buffer rank_mask = reader.last_operand("rank_mask");
  const Buffer given = reader.result("ticket");
  JAX_EP_RETURN_IF_ERROR(reader.finish());
  PlanOp plan;
  DispatchOp dispatch;
  JAX_EP_RETURN_IF_ERROR(set_sent(taken, attrs, own, recv_capacity, dispatch));
  plan.shape = dispatch.shape;
  JAX_EP_RETURN_IF_ERROR(check_selections(topk_idx, plan.shape));
  JAX_EP_RETURN_IF_ERROR(check_rank_mask(rank_mask, plan.shape));
  JAX_EP_RETURN_IF_ERROR(given.check(U32, {kTicketWords}));
  plan.topk_idx = topk_idx.data<const int32_t>();
  plan.rank_mask = rank_mask.data<const uint8_t>();
  arguments.program_rank = program_rank.data<const int32_t>();
  arguments.op = plan_dispatch_op(plan, dispatch);
  ticket = given.data<uint32_t>();
  return program_rank.check(S32, {1});
}

Status read_combine_start(const Operands& operands,
                          const ffi::RemainingRets& results,
                          const EpAttrs& attrs,
                          int32_t domain_size,
                          OpArguments<CombineOp>& arguments,
                          uint32_t*& ticket) {
  BufferReader reader(operands, results);
  const Buffer program_rank = reader.operand("program_rank");
  const CombineOperands taken(reader, true);
  const Buffer given = reader.result("ticket");
  JAX_EP_RETURN_IF_ERROR(reader.finish());
  JAX_EP_RETURN_IF_ERROR(set_sent(taken, attrs, domain_size, true, arguments.op));
  JAX_EP_RETURN_IF_ERROR(given.check(U32, {kTicketWords}));
  arguments.program_rank = program_rank.data<const int32_t>();
  ticket = given.data<uint32_t>();
  return program_rank.check(S32, {1});
}

Failure::operator ffi::Error() const { return to_error(status); }

Failure::operator ffi::Future() const {
  ffi::Promise promise;
  promise.SetError(to_error(status));
  return ffi::Future(promise);
}

ffi::Error to_error(const Status& status) {
  if (status.ok()) return ffi::Error::Success();
  return {static_cast<ffi::ErrorCode>(status.code()), status.message()};
}

}  // namespace jax_ep
