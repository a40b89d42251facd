// SPDX-License-Identifier: Apache-2.0
// Dispatch is driven by the sources: each token's row is read once and copied to every slot it
// has. The rows that hold no token are cleared from the destinations' side. Slots are distinct,
// so no two tasks write the same bytes.
//
// As the backward of a weighted combine it makes the products meanwhile, while the token's row is
// in the cache: so y is read once, the rows are written once, and nothing else of their size is.
//
// Extra memory, per thread: one row (FP8 wire, unless x and rows are both in FP8; or products) and
// 8 R bytes (rank layout).
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "csrc/core/limits.h"
#include "csrc/core/topology.h"
#include "csrc/cpu/calls.h"
#include "csrc/cpu/check_selections.h"
#include "csrc/cpu/chunks.h"
#include "csrc/cpu/first_error.h"
#include "csrc/cpu/huge_pages.h"
#include "csrc/cpu/row_arithmetic.h"
#include "csrc/cpu/row_writer.h"

namespace jax_ep {
namespace {

int64_t element_bytes(RowFormat format, DType dtype) {
  return format == RowFormat::kFloat8E4M3 ? 1 : size_bytes(dtype);
}

// A row as its destinations get it.
struct Traveler {
  const std::byte* values = nullptr;
  const std::byte* scales = nullptr;  // rows_format kFloat8E4M3 only
};

class Dispatcher {
 public:
  Dispatcher(std::span<const DispatchOp> ops, WorkerPool& workers)
      : ops_(ops),
        workers_(workers),
        first_(first_present(ops)),
        shape_(first_.shape),
        num_topk_(shape_.num_topk),
        num_local_(shape_.num_local_experts()),
        has_absent_(
            std::any_of(ops.begin(), ops.end(), [](const auto& op) { return is_absent(op); })),
        quantized_in_(first_.x_format == RowFormat::kFloat8E4M3),
        quantized_out_(first_.rows_format == RowFormat::kFloat8E4M3),
        x_bytes_(first_.hidden * element_bytes(first_.x_format, first_.dtype)),
        row_bytes_(first_.hidden * element_bytes(first_.rows_format, first_.dtype)),
        num_scales_(ceil_div(first_.hidden, kScaleBlock)),
        scale_bytes_(quantized_out_ ? num_scales_ * int64_t{sizeof(float)} : 0),
        scalars_per_row_(first_.num_scalars > 0 ? shape_.scalars_per_row() : 0),
        streaming_(bytes_written() > kStreamBytes),
        arithmetic_(row_arithmetic(first_.dtype)) {}

  Status run() {
    for (const DispatchOp& op : ops_) {
      if (is_absent(op)) continue;
      advise_huge_pages(op.rows, shape_.recv_capacity * row_bytes_);
    }
    // kRank copies a row less often than K times, but that is known only when it is done.
    const int64_t moved_bytes = row_bytes_ * (first_.with_dots ? 2 : 1);
    const int64_t token_bytes =
        num_topk_ * (moved_bytes + scale_bytes_ + 4 * scalars_per_row_ + 16);
    workers_.parallel_for(shape_.num_ranks * shape_.num_tokens,
                          items_per_chunk(token_bytes),
                          [this](int64_t begin, int64_t end) { copy_tokens(begin, end); });
    const int64_t cleared_bytes = (first_.zero_fill ? row_bytes_ + scale_bytes_ : 0) +
                                  4 * scalars_per_row_ + (first_.with_dots ? 4 : 0);
    if (cleared_bytes == 0) return first_error_.take();
    workers_.parallel_for(shape_.num_ranks * shape_.recv_capacity,
                          items_per_chunk(cleared_bytes),
                          [this](int64_t begin, int64_t end) { clear_empty_rows(begin, end); });
    return first_error_.take();
  }

 private:
  // At most, in rows, on all ranks.
  [[nodiscard]] int64_t bytes_written() const {
    const int64_t per_rank = first_.zero_fill
                                 ? shape_.recv_capacity
                                 : std::min(shape_.recv_capacity, shape_.num_tokens * num_topk_);
    return shape_.num_ranks * per_rank * (row_bytes_ + scale_bytes_);
  }

  const DispatchOp& op_of(int64_t rank) const { return ops_[static_cast<size_t>(rank)]; }

  // Tokens are numbered through all ranks.
  void copy_tokens(int64_t begin, int64_t end) {
    const RowWriter writer(streaming_);
    const bool once_per_rank = shape_.layout == Layout::kRank;
    // The last token that was copied to the rank.
    std::vector<int64_t> copied(once_per_rank ? static_cast<size_t>(shape_.num_ranks) : 0, -1);
    const bool converts = first_.wire != Wire::kSame && !(quantized_in_ && quantized_out_);
    // A row that is not x's own: as it was converted, or as it is multiplied.
    std::vector<std::byte> scratch(
        converts || first_.weighted ? static_cast<size_t>(scale_bytes_ + row_bytes_) : 0);
    for (int64_t token = begin; token < end; ++token) {
      const DispatchOp& source = op_of(token / shape_.num_tokens);
      if (is_absent(source)) continue;
      const int64_t first = token % shape_.num_tokens * num_topk_;
      Traveler row;
      for (int32_t k = 0; k < num_topk_; ++k) {
        const int32_t expert = source.topk_idx[first + k];
        const int32_t slot = source.slot[first + k];
        if (!is_valid_selection(shape_, expert, slot)) return report(token, k, expert, slot);
        if (slot < 0) continue;
        const int32_t dest = owner_of(expert, num_local_);
        if (is_absent(op_of(dest))) continue;
        if (row.values == nullptr) row = traveler(source, token, scratch.data());
        if (once_per_rank) {
          int64_t& last = copied[static_cast<size_t>(dest)];
          const bool is_new = last != token;
          last = token;
          if (is_new) put(writer, row, dest, slot, scratch.data());
          copy_rank_major_scalar(source, first, k, dest, slot, is_new);
        } else {
          put(writer, row, dest, slot, scratch.data());
          if (scalars_per_row_ > 0) op_of(dest).row_scalars[slot] = source.token_scalars[first + k];
        }
      }
    }
  }

  // The token's row as it reaches its destinations; `scratch` holds one that is not x's own: its
  // scales, which come first because they are aligned there, and its values.
  Traveler traveler(const DispatchOp& source, int64_t token, std::byte* scratch) const {
    const int64_t index = token % shape_.num_tokens;
    const auto* const x = static_cast<const std::byte*>(source.x) + index * x_bytes_;
    if (first_.wire == Wire::kSame || x_bytes_ == 0) return {.values = x};
    const float* const scales = quantized_in_ ? source.x_scales + index * num_scales_ : nullptr;
    if (quantized_in_ && quantized_out_) {
      return {.values = x, .scales = reinterpret_cast<const std::byte*>(scales)};
    }
    std::byte* const values = scratch + scale_bytes_;
    if (quantized_in_) {
      arithmetic_.restore(reinterpret_cast<const uint8_t*>(x), scales, first_.hidden, values);
    } else if (quantized_out_) {
      arithmetic_.quantize(
          x, first_.hidden, reinterpret_cast<uint8_t*>(values), reinterpret_cast<float*>(scratch));
    } else {
      arithmetic_.round_to_fp8(x, first_.hidden, values);
    }
    return {.values = values, .scales = scratch};
  }

  // `scratch` holds a row that is multiplied.
  void put(const RowWriter& writer,
           const Traveler& row,
           int32_t dest,
           int64_t slot,
           std::byte* scratch) const {
    const DispatchOp& to = op_of(dest);
    const std::byte* values = row.values;
    if (first_.with_dots) {
      const auto* const y = static_cast<const std::byte*>(to.y) + slot * row_bytes_;
      to.row_dots[slot] = arithmetic_.dot(values, y, first_.hidden);
    }
    if (first_.weighted) {
      arithmetic_.scale(values, to.row_weights[slot], first_.hidden, scratch);
      values = scratch;
    }
    writer.copy(static_cast<std::byte*>(to.rows) + slot * row_bytes_, values, row_bytes_);
    if (scale_bytes_ == 0) return;
    writer.copy(reinterpret_cast<std::byte*>(to.rows_scales + slot * num_scales_),
                row.scales,
                scale_bytes_);
  }

  void copy_rank_major_scalar(const DispatchOp& source,
                              int64_t first,
                              int32_t k,
                              int32_t dest,
                              int32_t slot,
                              bool is_new) const {
    if (scalars_per_row_ == 0) return;
    float* const scalars = op_of(dest).row_scalars + int64_t{slot} * num_topk_;
    if (is_new) std::fill_n(scalars, num_topk_, 0.0F);
    scalars[k] = source.token_scalars[first + k];
  }

  // Whether a row gets no token: it holds none, or that of a rank that takes no part, as in a
  // handle that no dispatch made.
  [[nodiscard]] bool is_empty(int32_t row_source) const {
    if (row_source == -1) return true;
    if (!has_absent_ || !in_range_or_none(row_source, shape_.num_ranks * shape_.num_tokens)) {
      return false;
    }
    return is_absent(op_of(row_source / shape_.num_tokens));
  }

  // Rows are numbered through all ranks.
  void clear_empty_rows(int64_t begin, int64_t end) {
    const RowWriter writer(streaming_);
    const int64_t capacity = shape_.recv_capacity;
    const int64_t num_sources = shape_.num_ranks * shape_.num_tokens;
    for (int64_t i = begin; i < end;) {
      const int64_t dest = i / capacity;
      const int32_t* const row_source = op_of(dest).row_source;
      const int64_t row = i % capacity;
      const int64_t last_row = std::min(capacity, row + end - i);
      if (is_absent(op_of(dest))) {
        i += last_row - row;
        continue;
      }
      int64_t next = row;
      while (next < last_row && is_empty(row_source[next])) ++next;
      clear_rows(op_of(dest), row, next, writer);
      if (next < last_row && !in_range_or_none(row_source[next], num_sources)) {
        return report_row_source(dest, next);
      }
      while (next < last_row && row_source[next] >= 0 && row_source[next] < num_sources &&
             !is_empty(row_source[next])) {
        ++next;
      }
      i += next - row;
    }
  }

  void clear_rows(const DispatchOp& dest,
                  int64_t begin,
                  int64_t end,
                  const RowWriter& writer) const {
    if (begin == end) return;
    if (first_.zero_fill) {
      auto* const rows = static_cast<std::byte*>(dest.rows);
      writer.clear(rows + begin * row_bytes_, (end - begin) * row_bytes_);
      if (scale_bytes_ > 0) {
        writer.clear(reinterpret_cast<std::byte*>(dest.rows_scales + begin * num_scales_),
                     (end - begin) * scale_bytes_);
      }
    }
    if (scalars_per_row_ > 0) {
      std::fill_n(
          dest.row_scalars + begin * scalars_per_row_, (end - begin) * scalars_per_row_, 0.0F);
    }
    if (first_.with_dots) std::fill_n(dest.row_dots + begin, end - begin, 0.0F);
  }

  void report(int64_t token, int32_t k, int32_t expert, int32_t slot) {
    const auto rank = static_cast<int32_t>(token / shape_.num_tokens);
    first_error_.report(
        token * num_topk_ + k,
        invalid_selection(shape_, rank, token % shape_.num_tokens, k, expert, slot));
  }

  void report_row_source(int64_t rank, int64_t row) {
    // After all selections, which are the likelier cause.
    const int64_t position =
        shape_.num_ranks * shape_.num_tokens * num_topk_ + rank * shape_.recv_capacity + row;
    first_error_.report(position,
                        Status::invalid_argument(
                            "rank " + std::to_string(rank) + ": row_source[" + std::to_string(row) +
                            "] is " + std::to_string(op_of(rank).row_source[row]) +
                            ", but must be -1 (no token) or a token of all ranks in [0, " +
                            std::to_string(shape_.num_ranks * shape_.num_tokens) + ")"));
  }

  const std::span<const DispatchOp> ops_;
  WorkerPool& workers_;
  const DispatchOp& first_;  // all ranks have the same parameters
  const EpShape& shape_;
  const int32_t num_topk_;
  const int32_t num_local_;
  const bool has_absent_;  // ranks that take no part
  const bool quantized_in_;
  const bool quantized_out_;
  const int64_t x_bytes_;          // of a row of x, without its scales
  const int64_t row_bytes_;        // of a row of rows, without its scales
  const int64_t num_scales_;       // of a row
  const int64_t scale_bytes_;      // of a row of rows: 0 where they are not quantized
  const int64_t scalars_per_row_;  // 0: no scalars travel
  const bool streaming_;
  const RowArithmetic& arithmetic_;
  FirstError first_error_;
};

}  // namespace

Status run_dispatch(std::span<const DispatchOp> ops, WorkerPool& workers) {
  return Dispatcher(ops, workers).run();
}

}  // namespace jax_ep
