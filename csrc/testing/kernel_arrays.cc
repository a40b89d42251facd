// SPDX-License-Identifier: Apache-2.0
#include "csrc/testing/kernel_arrays.h"

namespace jax_ep {

KernelArrays::KernelArrays(const ExchangeSizes& sizes, std::byte* memory)
    : sizes_(sizes), memory_(memory) {
  const EpShape& shape = sizes.shape;
  const int64_t tokens = shape.num_tokens;
  const int64_t capacity = shape.recv_capacity;
  const int64_t selections = tokens * shape.num_topk;
  const int64_t scalars = sizes.num_scalars > 0 ? capacity * shape.scalars_per_row() : 0;
  const int64_t blocks = ceil_div(sizes.hidden, kScaleBlock);
  const int64_t row_bytes = sizes.hidden * size_bytes(sizes.dtype);
  const bool x_quantized = sizes.x_format == RowFormat::kFloat8E4M3;
  const bool rows_quantized = sizes.rows_format == RowFormat::kFloat8E4M3;
  const int64_t max_rows =
      max_rows_per_token(shape.layout, shape.num_topk, shape.num_local_experts());
  program_rank = place<int32_t>(1);
  topk_idx = place<int32_t>(selections);
  slot = place<int32_t>(selections);
  row_source = place<int32_t>(capacity);
  row_topk_idx = place<int32_t>(shape.layout == Layout::kRank ? capacity * shape.num_topk : 0);
  source_slot = place<int32_t>(shape.num_ranks * tokens * max_rows);
  group_sizes = place<int32_t>(shape.num_row_groups());
  tokens_per_expert = place<int32_t>(shape.num_local_experts());
  num_dropped = place<int32_t>(1);
  x = place<std::byte>(tokens * (x_quantized ? sizes.hidden : row_bytes));
  x_scales = place<float>(x_quantized ? tokens * blocks : 0);
  token_scalars = place<float>(tokens * sizes.num_scalars);
  rows = place<std::byte>(capacity * (rows_quantized ? sizes.hidden : row_bytes));
  rows_scales = place<float>(rows_quantized ? capacity * blocks : 0);
  row_scalars = place<float>(scalars);
  row_weights = place<float>(sizes.row_weights ? capacity : 0);
  row_dots = place<float>(sizes.row_dots ? capacity : 0);
  y = sizes.y_is_rows ? rows : place<std::byte>(capacity * row_bytes);
  weights = sizes.weights_are_row_scalars ? row_scalars
                                          : place<float>(capacity * shape.scalars_per_row());
  out = place<std::byte>(tokens * row_bytes);
  returned_scalars = place<float>(tokens * sizes.num_scalars);
  tickets = place<uint32_t>(kMaxFlights * kTicketWords);
  // The last, so that the others lie alike with it and without.
  rank_mask = place<uint8_t>(sizes.masked ? align_up(shape.num_ranks, 4) : 0);
}

PlanParams KernelArrays::plan(const RankView& view) const {
  return params<PlanOp>(view,
                        {.shape = sizes_.shape,
                         .topk_idx = topk_idx.data(),
                         .rank_mask = sizes_.masked ? rank_mask.data() : nullptr,
                         .slot = slot.data(),
                         .row_source = row_source.data(),
                         .row_topk_idx = row_topk_idx.data(),
                         .source_slot = source_slot.data(),
                         .group_sizes = group_sizes.data(),
                         .tokens_per_expert = tokens_per_expert.data(),
                         .num_dropped = num_dropped.data()});
}

DispatchParams KernelArrays::dispatch(const RankView& view) const {
  return params<DispatchOp>(view,
                            {.shape = sizes_.shape,
                             .hidden = sizes_.hidden,
                             .num_scalars = sizes_.num_scalars,
                             .dtype = sizes_.dtype,
                             .wire = sizes_.wire,
                             .x_format = sizes_.x_format,
                             .rows_format = sizes_.rows_format,
                             .zero_fill = sizes_.zero_fill,
                             .weighted = sizes_.row_weights,
                             .with_dots = sizes_.row_dots,
                             .x = x.data(),
                             .x_scales = x_scales.data(),
                             .token_scalars = token_scalars.data(),
                             .row_weights = row_weights.data(),
                             .y = y.data(),
                             .topk_idx = topk_idx.data(),
                             .slot = slot.data(),
                             .row_source = row_source.data(),
                             .source_slot = source_slot.data(),
                             .rank_mask = sizes_.masked ? rank_mask.data() : nullptr,
                             .rows = rows.data(),
                             .rows_scales = rows_scales.data(),
                             .row_scalars = row_scalars.data(),
                             .row_dots = row_dots.data()});
}

PlanDispatchParams KernelArrays::plan_dispatch(const RankView& view) const {
  return params<PlanDispatchOp>(view, plan_dispatch_op(plan(view).op, dispatch(view).op));
}

CombineParams KernelArrays::combine(const RankView& view) const {
  return params<CombineOp>(view,
                           {.shape = sizes_.shape,
                            .hidden = sizes_.hidden,
                            .weighted = sizes_.weighted,
                            .num_scalars = sizes_.num_scalars,
                            .domain_size = sizes_.domain_size,
                            .dtype = sizes_.dtype,
                            .y = y.data(),
                            .weights = weights.data(),
                            .row_scalars = weights.data(),
                            .topk_idx = topk_idx.data(),
                            .slot = slot.data(),
                            .row_topk_idx = row_topk_idx.data(),
                            .source_slot = source_slot.data(),
                            .rank_mask = sizes_.masked ? rank_mask.data() : nullptr,
                            .out = out.data(),
                            .token_scalars = returned_scalars.data()});
}

}  // namespace jax_ep
