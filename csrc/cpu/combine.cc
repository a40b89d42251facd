// SPDX-License-Identifier: Apache-2.0
// Combine is driven by the sources too: each token pulls the rows of its selections from the
// slots where they are, in ascending order of experts, so the order of the sum is that of the
// experts alone, as are the ranks and the domains in which it is rounded. Every output row is
// written by one task.
//
// Extra memory, per thread: 40 K bytes, and the fixed scratch of the row kernels.
#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include "csrc/core/topology.h"
#include "csrc/cpu/calls.h"
#include "csrc/cpu/check_selections.h"
#include "csrc/cpu/chunks.h"
#include "csrc/cpu/first_error.h"
#include "csrc/cpu/huge_pages.h"
#include "csrc/cpu/row_arithmetic.h"

namespace jax_ep {
namespace {

// A selection that has a row, as one number: those of a token, sorted, ascend by expert.
class SortKey {
 public:
  SortKey() = default;
  SortKey(int32_t expert, int32_t k)
      : bits_(static_cast<uint64_t>(expert) << 32 | static_cast<uint32_t>(k)) {}
  [[nodiscard]] int32_t expert() const { return static_cast<int32_t>(bits_ >> 32); }
  [[nodiscard]] int32_t k() const { return static_cast<int32_t>(bits_ & 0xFFFF'FFFF); }
  friend bool operator<(SortKey a, SortKey b) { return a.bits_ < b.bits_; }

 private:
  uint64_t bits_ = 0;
};

void sort(std::span<SortKey> keys) {
  constexpr size_t kInsertionLimit = 32;
  if (keys.size() > kInsertionLimit) {
    std::sort(keys.begin(), keys.end());
    return;
  }
  for (size_t i = 1; i < keys.size(); ++i) {
    const SortKey key = keys[i];
    size_t at = i;
    for (; at > 0 && key < keys[at - 1]; --at) keys[at] = keys[at - 1];
    keys[at] = key;
  }
}

class Combiner {
 public:
  Combiner(std::span<const CombineOp> ops, WorkerPool& workers)
      : ops_(ops),
        workers_(workers),
        first_(first_present(ops)),
        shape_(first_.shape),
        num_topk_(shape_.num_topk),
        num_local_(shape_.num_local_experts()),
        experts_per_domain_(sums_over_domains(first_) ? num_local_ * first_.domain_size
                                                      : shape_.num_experts),
        row_bytes_(first_.hidden * size_bytes(first_.dtype)),
        arithmetic_(row_arithmetic(first_.dtype)) {}

  Status run() {
    for (const CombineOp& op : ops_) {
      if (!is_absent(op)) advise_huge_pages(op.out, shape_.num_tokens * row_bytes_);
    }
    const int64_t token_bytes = (num_topk_ + 1) * row_bytes_ + num_topk_ * 64;
    workers_.parallel_for(shape_.num_ranks * shape_.num_tokens,
                          items_per_chunk(token_bytes),
                          [this](int64_t begin, int64_t end) { combine_tokens(begin, end); });
    return first_error_.take();
  }

 private:
  const CombineOp& op_of(int64_t rank) const { return ops_[static_cast<size_t>(rank)]; }

  // What a token sums, and where to.
  struct TokenSum {
    std::vector<Term> terms;  // the first num_terms of [K]
    size_t num_terms = 0;
    std::byte* out = nullptr;
  };

  // Tokens are numbered through all ranks. A token's rows, which lie anywhere in memory, are
  // fetched while those of the token before it are summed.
  void combine_tokens(int64_t begin, int64_t end) {
    const auto num_topk = static_cast<size_t>(num_topk_);
    std::vector<SortKey> keys(num_topk);
    TokenSum current{std::vector<Term>(num_topk)};
    TokenSum next{std::vector<Term>(num_topk)};
    for (int64_t token = begin; token < end; ++token) {
      if (is_absent(op_of(token / shape_.num_tokens))) continue;
      if (!collect(token, keys, next)) return;
      sum(current, next);
      std::swap(current, next);
    }
    next.num_terms = 0;
    sum(current, next);
  }

  // Brings the token's scalars back, and lists its terms in the order of the sum.
  bool collect(int64_t token, std::vector<SortKey>& keys, TokenSum& result) {
    const CombineOp& source = op_of(token / shape_.num_tokens);
    const int64_t first = token % shape_.num_tokens * num_topk_;
    size_t num_keys = 0;
    for (int32_t k = 0; k < num_topk_; ++k) {
      const int32_t expert = source.topk_idx[first + k];
      const int32_t slot = source.slot[first + k];
      if (!is_valid_selection(shape_, expert, slot)) {
        report(token, k, expert, slot);
        return false;
      }
      const bool has_row = slot >= 0 && !is_absent(op_of(owner_of(expert, num_local_)));
      if (has_row) keys[num_keys++] = SortKey(expert, k);
      if (first_.num_scalars > 0) {
        source.token_scalars[first + k] =
            !has_row ? 0.0F : row_scalar(op_of(owner_of(expert, num_local_)).row_scalars, slot, k);
      }
    }
    if (row_bytes_ == 0) return true;
    const std::span<SortKey> used(keys.data(), num_keys);
    sort(used);
    result.num_terms = collect_terms(source.slot + first, used, result.terms);
    result.out = static_cast<std::byte*>(source.out) + token % shape_.num_tokens * row_bytes_;
    return true;
  }

  void sum(const TokenSum& token, const TokenSum& next) const {
    if (token.out == nullptr) return;  // before the first token, or no rows travel
    arithmetic_.sum_terms({token.terms.data(), token.num_terms},
                          {next.terms.data(), next.num_terms},
                          first_.hidden,
                          token.out);
  }

  // Where a float32 of a row, per selection, lies: [C] or [C, K].
  float row_scalar(const float* scalars, int32_t slot, int32_t k) const {
    return shape_.layout == Layout::kExpert ? scalars[slot]
                                            : scalars[int64_t{slot} * num_topk_ + k];
  }

  // A weight of 1 leaves fma(weight, y, acc) = y + acc.
  size_t collect_terms(const int32_t* slot,
                       std::span<const SortKey> keys,
                       std::vector<Term>& terms) const {
    size_t num_terms = 0;
    for (size_t i = 0; i < keys.size(); ++i) {
      const int32_t rank = owner_of(keys[i].expert(), num_local_);
      const bool is_last = i + 1 == keys.size();
      const bool ends_rank = is_last || owner_of(keys[i + 1].expert(), num_local_) != rank;
      // Without weights a row of the rank layout, which holds the sum of its experts, counts once.
      if (!first_.weighted && shape_.layout == Layout::kRank && !ends_rank) continue;
      const CombineOp& dest = op_of(rank);
      const int32_t k = keys[i].k();
      const int32_t row = slot[k];
      const float weight = first_.weighted ? row_scalar(dest.weights, row, k) : 1.0F;
      const auto* const rows = static_cast<const std::byte*>(dest.y);
      const bool ends_domain =
          sums_over_domains(first_) && (is_last || keys[i + 1].expert() / experts_per_domain_ !=
                                                       keys[i].expert() / experts_per_domain_);
      terms[num_terms++] = {rows + row * row_bytes_, weight, ends_rank, ends_domain};
    }
    return num_terms;
  }

  void report(int64_t token, int32_t k, int32_t expert, int32_t slot) {
    const auto rank = static_cast<int32_t>(token / shape_.num_tokens);
    first_error_.report(
        token * num_topk_ + k,
        invalid_selection(shape_, rank, token % shape_.num_tokens, k, expert, slot));
  }

  const std::span<const CombineOp> ops_;
  WorkerPool& workers_;
  const CombineOp& first_;  // all ranks have the same parameters
  const EpShape& shape_;
  const int32_t num_topk_;
  const int32_t num_local_;
  const int32_t experts_per_domain_;
  const int64_t row_bytes_;
  const RowArithmetic& arithmetic_;
  FirstError first_error_;
};

}  // namespace

Status run_combine(std::span<const CombineOp> ops, WorkerPool& workers) {
  return Combiner(ops, workers).run();
}

}  // namespace jax_ep
