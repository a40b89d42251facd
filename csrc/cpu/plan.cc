// SPDX-License-Identifier: Apache-2.0
// The plan counts selections per (source rank, expert), turns the counts into first rows, and
// hands out the rows in token order. It works on all ranks' arrays at once, one rank per task.
//
// Extra memory: at most 8 R (E + R) bytes of counts, then cursors, and while tokens are
// scanned 4 (E + R) bytes per thread.
#include <algorithm>
#include <cstddef>
#include <limits>
#include <string>
#include <vector>

#include "csrc/core/topology.h"
#include "csrc/cpu/calls.h"
#include "csrc/cpu/check_selections.h"
#include "csrc/cpu/chunks.h"
#include "csrc/cpu/first_error.h"

namespace jax_ep {
namespace {

int32_t saturate(int64_t value) {
  return static_cast<int32_t>(std::min<int64_t>(value, std::numeric_limits<int32_t>::max()));
}

class Planner {
 public:
  Planner(std::span<const PlanOp> ops, WorkerPool& workers)
      : ops_(ops),
        workers_(workers),
        shape_(first_present(ops).shape),
        num_ranks_(shape_.num_ranks),
        num_experts_(shape_.num_experts),
        num_topk_(shape_.num_topk),
        num_local_(shape_.num_local_experts()),
        capacity_(shape_.recv_capacity),
        per_expert_(static_cast<size_t>(num_ranks_) * static_cast<size_t>(num_experts_)) {
    if (shape_.layout == Layout::kRank) {
      per_rank_.resize(static_cast<size_t>(num_ranks_) * static_cast<size_t>(num_ranks_));
    }
  }

  Status run() {
    const bool is_expert_major = shape_.layout == Layout::kExpert;
    // About what a selection costs, in the bytes that a copy moves in that time.
    constexpr int64_t kBytesPerSelection = 64;
    const int64_t scan_bytes = shape_.num_tokens * num_topk_ * kBytesPerSelection;
    const int64_t scan_grain = items_per_chunk(scan_bytes);
    for_each_rank(scan_grain, [this](int32_t source) { count(source); });
    if (Status error = first_error_.take(); !error.ok()) return error;

    const int64_t row_bytes = is_expert_major ? 4 : 4 * (1 + num_topk_);
    const int64_t start_bytes = capacity_ * row_bytes + 16LL * num_ranks_ * num_local_;
    for_each_rank(items_per_chunk(start_bytes), [this, is_expert_major](int32_t dest) {
      is_expert_major ? start_experts(dest) : start_sources(dest);
    });
    for_each_rank(scan_grain, [this, is_expert_major](int32_t source) {
      is_expert_major ? assign_expert_major(source) : assign_rank_major(source);
    });
    return {};
  }

 private:
  template <typename Body>
  void for_each_rank(int64_t grain, const Body& body) {
    workers_.parallel_for(num_ranks_, grain, [&body](int64_t begin, int64_t end) {
      for (int64_t rank = begin; rank < end; ++rank) body(static_cast<int32_t>(rank));
    });
  }

  const PlanOp& op_of(int32_t rank) const { return ops_[static_cast<size_t>(rank)]; }

  // Selections of `source` for `expert`; later the row that the next of them gets.
  int64_t& expert_cursor(int32_t source, int32_t expert) {
    return per_expert_[static_cast<size_t>(source) * static_cast<size_t>(num_experts_) +
                       static_cast<size_t>(expert)];
  }

  // kRank: tokens of `source` that go to `dest`; later the row that the next of them gets.
  int64_t& rank_cursor(int32_t source, int32_t dest) {
    return per_rank_[static_cast<size_t>(source) * static_cast<size_t>(num_ranks_) +
                     static_cast<size_t>(dest)];
  }

  [[nodiscard]] bool absent(int32_t rank) const { return is_absent(op_of(rank)); }

  void count(int32_t source) {
    if (absent(source)) return;
    // The last token that named the expert, or went to the rank: finds repeats in O(K).
    std::vector<int32_t> expert_token(static_cast<size_t>(num_experts_), -1);
    std::vector<int32_t> rank_token(per_rank_.empty() ? 0 : static_cast<size_t>(num_ranks_), -1);
    int64_t* const experts = &expert_cursor(source, 0);
    const int32_t* topk_idx = op_of(source).topk_idx;
    const auto num_tokens = static_cast<int32_t>(shape_.num_tokens);
    for (int32_t token = 0; token < num_tokens; ++token, topk_idx += num_topk_) {
      for (int32_t k = 0; k < num_topk_; ++k) {
        const int32_t expert = topk_idx[k];
        if (expert == -1) continue;
        if (!in_range_or_none(expert, num_experts_)) {
          return report(source, token, k, invalid_expert(shape_, source, token, k, expert));
        }
        int32_t& last = expert_token[static_cast<size_t>(expert)];
        if (last == token) return report(source, token, k, repeated(source, token, k));
        last = token;
        const int32_t dest = owner_of(expert, num_local_);
        if (absent(dest)) continue;
        ++experts[expert];
        if (rank_token.empty()) continue;
        if (rank_token[static_cast<size_t>(dest)] == token) continue;
        rank_token[static_cast<size_t>(dest)] = token;
        ++rank_cursor(source, dest);
      }
    }
  }

  void report(int32_t source, int32_t token, int32_t k, Status error) {
    first_error_.report((source * shape_.num_tokens + token) * num_topk_ + k, std::move(error));
  }

  Status repeated(int32_t source, int32_t token, int32_t k) const {
    const int32_t* const topk_idx = op_of(source).topk_idx + int64_t{token} * num_topk_;
    const int64_t before = std::find(topk_idx, topk_idx + k, topk_idx[k]) - topk_idx;
    const auto element = [token](int64_t position) {
      return "topk_idx[" + std::to_string(token) + ", " + std::to_string(position) + "]";
    };
    return Status::invalid_argument("rank " + std::to_string(source) + ": " + element(k) + " is " +
                                    std::to_string(topk_idx[k]) + ", and so is " + element(before) +
                                    ": the experts of a token must be distinct");
  }

  int64_t clip(int64_t row) const { return std::min(row, capacity_); }

  // Marks rows that hold no token.
  void clear_rows(int32_t dest, int64_t begin, int64_t end) {
    std::fill(op_of(dest).row_source + clip(begin), op_of(dest).row_source + clip(end), -1);
    if (shape_.layout == Layout::kExpert) return;
    int32_t* const row_topk_idx = op_of(dest).row_topk_idx;
    std::fill(row_topk_idx + clip(begin) * num_topk_, row_topk_idx + clip(end) * num_topk_, -1);
  }

  void start_experts(int32_t dest) {
    if (absent(dest)) return;
    int64_t start = 0;
    int64_t dropped = 0;
    for (int32_t local = 0; local < num_local_; ++local) {
      const int32_t expert = dest * num_local_ + local;
      int64_t row = start;
      for (int32_t source = 0; source < num_ranks_; ++source) {
        int64_t& cursor = expert_cursor(source, expert);
        const int64_t selections = cursor;
        cursor = row;
        row += selections;
      }
      const int64_t alignment = shape_.expert_alignment;
      const int64_t end = (row + alignment - 1) / alignment * alignment;
      op_of(dest).tokens_per_expert[local] = static_cast<int32_t>(row - start);
      op_of(dest).group_sizes[local] = static_cast<int32_t>(clip(end) - clip(start));
      dropped += (row - clip(row)) - (start - clip(start));
      clear_rows(dest, row, end);
      start = end;
    }
    clear_rows(dest, start, capacity_);
    *op_of(dest).num_dropped = saturate(dropped);
  }

  void start_sources(int32_t dest) {
    if (absent(dest)) return;
    for (int32_t local = 0; local < num_local_; ++local) {
      int64_t selections = 0;
      for (int32_t source = 0; source < num_ranks_; ++source) {
        selections += expert_cursor(source, dest * num_local_ + local);
      }
      op_of(dest).tokens_per_expert[local] = static_cast<int32_t>(selections);
    }
    int64_t row = 0;
    for (int32_t source = 0; source < num_ranks_; ++source) {
      int64_t& cursor = rank_cursor(source, dest);
      const int64_t end = row + cursor;
      cursor = row;
      op_of(dest).group_sizes[source] = static_cast<int32_t>(clip(end) - clip(row));
      row = end;
    }
    clear_rows(dest, row, capacity_);
    *op_of(dest).num_dropped = saturate(row - clip(row));
  }

  void assign_expert_major(int32_t source) {
    if (absent(source)) return;
    int64_t* const cursors = &expert_cursor(source, 0);
    const int64_t num_tokens = shape_.num_tokens;
    const int32_t* topk_idx = op_of(source).topk_idx;
    int32_t* slot = op_of(source).slot;
    for (int64_t token = 0; token < num_tokens; ++token) {
      for (int32_t k = 0; k < num_topk_; ++k, ++topk_idx, ++slot) {
        const int32_t expert = *topk_idx;
        *slot = -1;
        if (expert < 0 || absent(owner_of(expert, num_local_))) continue;
        const int64_t row = cursors[expert]++;
        if (row >= capacity_) continue;
        *slot = static_cast<int32_t>(row);
        op_of(owner_of(expert, num_local_)).row_source[row] =
            static_cast<int32_t>(source * num_tokens + token);
      }
    }
  }

  void assign_rank_major(int32_t source) {
    if (absent(source)) return;
    std::vector<int32_t> rank_token(static_cast<size_t>(num_ranks_), -1);
    const auto num_tokens = static_cast<int32_t>(shape_.num_tokens);
    const int32_t* topk_idx = op_of(source).topk_idx;
    int32_t* slot = op_of(source).slot;
    for (int32_t token = 0; token < num_tokens; ++token) {
      for (int32_t k = 0; k < num_topk_; ++k, ++topk_idx, ++slot) {
        const int32_t expert = *topk_idx;
        *slot = -1;
        if (expert < 0 || absent(owner_of(expert, num_local_))) continue;
        const int32_t dest = owner_of(expert, num_local_);
        int64_t& cursor = rank_cursor(source, dest);
        int32_t& last = rank_token[static_cast<size_t>(dest)];
        const bool is_new = last != token;
        last = token;
        if (is_new) ++cursor;
        const int64_t row = cursor - 1;
        if (row >= capacity_) continue;
        *slot = static_cast<int32_t>(row);
        if (is_new) {
          clear_rows(dest, row, row + 1);
          op_of(dest).row_source[row] = source * num_tokens + token;
        }
        op_of(dest).row_topk_idx[row * num_topk_ + k] = expert - dest * num_local_;
      }
    }
  }

  const std::span<const PlanOp> ops_;
  WorkerPool& workers_;
  const EpShape& shape_;
  const int32_t num_ranks_;
  const int32_t num_experts_;
  const int32_t num_topk_;
  const int32_t num_local_;
  const int64_t capacity_;
  std::vector<int64_t> per_expert_;  // [R, E]
  std::vector<int64_t> per_rank_;    // [R, R], kRank only
  FirstError first_error_;
};

}  // namespace

Status run_plan(std::span<const PlanOp> ops, WorkerPool& workers) {
  return Planner(ops, workers).run();
}

}  // namespace jax_ep
