// SPDX-License-Identifier: Apache-2.0
#include "csrc/testing/rank_arrays.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>

#include "csrc/core/float_formats.h"
#include "csrc/core/low_latency_fit.h"

namespace jax_ep {
namespace {

size_t as_size(int64_t value) { return static_cast<size_t>(value); }

// Rows of float8_e4m3fn and their scales.
struct Quantized {
  std::vector<std::byte> rows;
  std::vector<float> scales;
};

Quantized quantize(const std::vector<float>& values, int64_t hidden) {
  Quantized result;
  if (hidden == 0) return result;
  for (size_t row = 0; row < values.size(); row += as_size(hidden)) {
    for (int64_t first = 0; first < hidden; first += kScaleBlock) {
      const auto begin = values.begin() + static_cast<int64_t>(row) + first;
      const auto end = begin + std::min(kScaleBlock, hidden - first);
      float amax = kMinAmax;
      std::for_each(begin, end, [&](float value) { amax = std::max(amax, std::fabs(value)); });
      const float scale = amax / kMaxFloat8;
      result.scales.push_back(scale);
      std::for_each(begin, end, [&](float value) {
        result.rows.push_back(std::byte{float_to_float8_e4m3fn(value / scale)});
      });
    }
  }
  return result;
}

// The first difference between a result and what it must be; empty if there is none.
template <typename T>
std::string compare(DeviceMemory& memory,
                    const char* name,
                    std::span<T> on_device,
                    const std::vector<T>& expected,
                    int64_t row_elements) {
  if (on_device.size() != expected.size()) return std::string(name) + " is of another size";
  std::vector<T> got(expected.size());
  if (!got.empty()) memory.read(got.data(), on_device.data(), on_device.size_bytes());
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::memcmp(&got[i], &expected[i], sizeof(T)) == 0) continue;
    const auto row = static_cast<int64_t>(i) / std::max<int64_t>(row_elements, 1);
    const auto column = static_cast<int64_t>(i) % std::max<int64_t>(row_elements, 1);
    const auto text = [](T value) {
      if constexpr (std::is_same_v<T, std::byte>)
        return std::to_string(std::to_integer<int>(value));
      else
        return std::to_string(value);
    };
    return std::string(name) + "[" + std::to_string(row) + ", " + std::to_string(column) +
           (sizeof(T) == 1 ? " (bytes)" : "") + "] is " + text(got[i]) + ", must be " +
           text(expected[i]);
  }
  return {};
}

std::string first_of(std::initializer_list<std::string> errors) {
  for (const std::string& error : errors) {
    if (!error.empty()) return error;
  }
  return {};
}

// A plan takes much as -1: here are experts that do not exist, those of a rank that takes no part,
// and repetitions of an earlier selection of the token. The CPU backend, which refuses them, has
// the -1.
std::vector<int32_t> with_bad_experts(std::vector<int32_t> topk_idx,
                                      const ClusterOptions& options) {
  const EpShape& shape = options.shape;
  int32_t absent = 0;  // the first rank that takes no part, if there is one
  while (absent < shape.num_ranks && options.takes_part(absent)) ++absent;
  const int32_t bad[] = {absent == shape.num_ranks ? -1 : absent * shape.num_local_experts(),
                         shape.num_experts,
                         -7,
                         std::numeric_limits<int32_t>::max()};
  for (size_t i = 0; i < topk_idx.size(); ++i) {
    if (topk_idx[i] != -1) continue;
    const size_t k = i % as_size(shape.num_topk);
    const auto earlier = topk_idx.begin() + static_cast<int64_t>(i - k);
    const int32_t last = k > 0 ? earlier[static_cast<int64_t>(i * 7 % k)] : -1;
    topk_idx[i] = i % 2 == 0 && last >= 0 ? last : bad[i / 2 % 4];
  }
  return topk_idx;
}

ExchangeSizes sizes_of(const Problem& problem) {
  const ClusterOptions& options = problem.cluster.options();
  return {.shape = options.shape,
          .hidden = options.hidden,
          .num_scalars = options.scalars ? options.shape.num_topk : 0,
          .domain_size = options.domain_size,
          .dtype = options.dtype,
          .wire = options.wire,
          .x_format = problem.x_format,
          .rows_format = problem.rows_format,
          .zero_fill = options.zero_fill,
          .weighted = options.weighted,
          .row_weights = options.row_weights,
          .row_dots = options.row_dots,
          .masked = options.masked || options.absent_rank >= 0 || options.sitting_out != 0};
}

}  // namespace

Problem::Problem(const ClusterOptions& options, RowFormat x_format_in, RowFormat rows_format_in)
    : cluster(options), x_format(x_format_in), rows_format(rows_format_in) {
  ok = cluster.plan().ok() && cluster.dispatch().ok() && cluster.combine().ok();
}

RankArrays::RankArrays(Problem& problem, int32_t rank, std::byte* memory)
    : problem_(problem), rank_(rank), arrays_(sizes_of(problem), memory) {
  const EpShape& shape = options().shape;
  const RankBuffers& mine = buffers();
  const int64_t hidden = options().hidden;
  const int64_t blocks = ceil_div(hidden, kScaleBlock);
  x_ = mine.x;
  if (problem_.x_format == RowFormat::kFloat8E4M3) {
    Quantized quantized = quantize(problem_.cluster.decode(mine.x), hidden);
    x_ = std::move(quantized.rows);
    x_scales_ = std::move(quantized.scales);
  }
  expected_rows_ = mine.rows;
  if (problem_.rows_format == RowFormat::kFloat8E4M3) {
    // Rows without a token are zeros, or stay untouched.
    const std::byte fill = options().zero_fill ? std::byte{0} : kUntouchedByte;
    expected_rows_.assign(as_size(shape.recv_capacity * hidden), fill);
    float untouched;
    std::memset(&untouched, std::to_integer<int>(fill), sizeof untouched);
    expected_scales_.assign(as_size(shape.recv_capacity * blocks), untouched);
    std::vector<Quantized> sent_by;
    for (int32_t owner = 0; owner < shape.num_ranks; ++owner) {
      sent_by.push_back(quantize(problem_.cluster.decode(problem_.cluster.rank(owner).x), hidden));
    }
    for (int64_t row = 0; row < shape.recv_capacity; ++row) {
      const int32_t source = mine.row_source[as_size(row)];
      if (source < 0) continue;
      const Quantized& sent = sent_by[as_size(source / shape.num_tokens)];
      const int64_t token = source % shape.num_tokens;
      std::copy_n(
          sent.rows.begin() + token * hidden, hidden, expected_rows_.begin() + row * hidden);
      std::copy_n(
          sent.scales.begin() + token * blocks, blocks, expected_scales_.begin() + row * blocks);
    }
  }
}

void RankArrays::upload(DeviceMemory& memory) const {
  const RankBuffers& mine = buffers();
  const auto put = [&]<typename T>(std::span<T> to, const std::vector<T>& from) {
    if (to.size() != from.size()) throw std::logic_error("an array is not as large as its values");
    if (!from.empty()) memory.write(to.data(), from.data(), from.size() * sizeof(T));
  };
  put(arrays_.program_rank, std::vector{rank_});
  put(arrays_.topk_idx, with_bad_experts(mine.topk_idx, options()));
  std::vector<uint8_t> mask;
  for (size_t rank = 0; rank < arrays_.rank_mask.size(); ++rank) {
    mask.push_back(options().takes_part(static_cast<int32_t>(rank)) ? 1 : 0);
  }
  put(arrays_.rank_mask, mask);
  put(arrays_.x, x_);
  put(arrays_.x_scales, x_scales_);
  put(arrays_.token_scalars, mine.token_scalars);
  put(arrays_.row_weights, mine.row_weights);
  put(arrays_.y, mine.y);
  put(arrays_.weights, mine.weights);
  mark_rows(memory);
}

void RankArrays::mark_rows(DeviceMemory& memory) const {
  memory.fill(arrays_.rows.data(), kUntouchedByte, arrays_.rows.size_bytes());
  memory.fill(arrays_.rows_scales.data(), kUntouchedByte, arrays_.rows_scales.size_bytes());
}

bool RankArrays::has_halves(OpKind op, const RankView& view) const {
  if (view.num_neighbors < view.num_ranks) return false;
  switch (op) {
    case OpKind::kPlan:
    case OpKind::kDispatch: return false;
    case OpKind::kCombine: return fits_low_latency(view.layout, combine(view).op);
    case OpKind::kPlanDispatch: return fits_low_latency(view.layout, plan_dispatch(view).op);
  }
  return false;
}

std::vector<std::span<std::byte>> RankArrays::results_of(OpKind op) const {
  const auto bytes = [](auto array) { return std::as_writable_bytes(array); };
  const KernelArrays& a = arrays_;
  const std::vector<std::span<std::byte>> plan = {bytes(a.slot),
                                                  bytes(a.row_source),
                                                  bytes(a.row_topk_idx),
                                                  bytes(a.source_slot),
                                                  bytes(a.group_sizes),
                                                  bytes(a.tokens_per_expert),
                                                  bytes(a.num_dropped)};
  switch (op) {
    case OpKind::kPlan: return plan;
    case OpKind::kDispatch: return {bytes(a.row_scalars), bytes(a.row_dots)};
    case OpKind::kCombine: return {bytes(a.out), bytes(a.returned_scalars)};
    case OpKind::kPlanDispatch: {
      std::vector<std::span<std::byte>> both = plan;
      both.push_back(bytes(a.row_scalars));
      return both;
    }
  }
  return {};
}

void RankArrays::replace_rank(DeviceMemory& memory, int32_t said) const {
  memory.write(arrays_.program_rank.data(), &said, sizeof said);
}

void RankArrays::replace_mask(DeviceMemory& memory, uint64_t left_out) const {
  std::vector<uint8_t> mask;
  for (size_t rank = 0; rank < arrays_.rank_mask.size(); ++rank) {
    mask.push_back((left_out >> rank & 1) == 0 ? 1 : 0);
  }
  if (!mask.empty()) memory.write(arrays_.rank_mask.data(), mask.data(), mask.size());
}

void RankArrays::replace_handle(DeviceMemory& memory, uint32_t seed) const {
  std::mt19937 random(1000 * options().seed + seed);
  const EpShape& shape = options().shape;
  const auto most_rows = static_cast<int32_t>(shape.recv_capacity);
  const auto replace = [&](std::span<int32_t> array, std::vector<int32_t> values, int32_t limit) {
    const uint32_t kind = random() % 4;
    for (int32_t& value : values) {
      const auto any = static_cast<int32_t>(random() % static_cast<uint32_t>(limit));
      if (kind == 0) value = 0;
      if (kind == 1) value = limit - 1;
      if (kind == 2 && random() % 2 == 0) value = -1;
      if (kind == 3) value = random() % 2 == 0 ? any : static_cast<int32_t>(random());
    }
    if (!values.empty())
      memory.write(array.data(), values.data(), values.size() * sizeof values[0]);
  };
  const RankBuffers& mine = buffers();
  replace(arrays_.slot, mine.slot, most_rows);
  replace(arrays_.row_source,
          mine.row_source,
          shape.num_ranks * static_cast<int32_t>(shape.num_tokens));
  replace(arrays_.row_topk_idx, mine.row_topk_idx, shape.num_local_experts());
  replace(arrays_.source_slot, expected_source_slot(), most_rows);
  replace(arrays_.topk_idx, mine.topk_idx, shape.num_experts);
}

std::vector<int32_t> RankArrays::expected_source_slot() const {
  const EpShape& shape = options().shape;
  const size_t max_rows =
      as_size(max_rows_per_token(shape.layout, shape.num_topk, shape.num_local_experts()));
  const size_t tokens = as_size(shape.num_ranks * shape.num_tokens);
  std::vector<int32_t> expected(tokens * max_rows, -1);
  std::vector<size_t> count(tokens, 0);
  const std::vector<int32_t>& row_source = buffers().row_source;
  for (size_t row = 0; row < row_source.size(); ++row) {
    if (row_source[row] < 0) continue;
    const size_t token = as_size(row_source[row]);
    expected[token * max_rows + count[token]++] = static_cast<int32_t>(row);
  }
  return expected;
}

std::string RankArrays::check_plan(DeviceMemory& memory) const {
  const RankBuffers& mine = buffers();
  const int64_t topk = options().shape.num_topk;
  const std::vector<int32_t> dropped = {mine.num_dropped};
  return first_of(
      {compare(memory, "tokens_per_expert", arrays_.tokens_per_expert, mine.tokens_per_expert, 1),
       compare(memory, "group_sizes", arrays_.group_sizes, mine.group_sizes, 1),
       compare(memory, "slot", arrays_.slot, mine.slot, topk),
       compare(memory, "row_source", arrays_.row_source, mine.row_source, 1),
       compare(memory, "row_topk_idx", arrays_.row_topk_idx, mine.row_topk_idx, topk),
       compare(memory, "source_slot", arrays_.source_slot, expected_source_slot(), 1),
       compare(memory, "num_dropped", arrays_.num_dropped, dropped, 1)});
}

std::string RankArrays::check_dispatch(DeviceMemory& memory) const {
  const int64_t bytes =
      options().hidden *
      (problem_.rows_format == RowFormat::kFloat8E4M3 ? 1 : size_bytes(options().dtype));
  return first_of({compare(memory, "rows", arrays_.rows, expected_rows_, bytes),
                   compare(memory,
                           "rows_scales",
                           arrays_.rows_scales,
                           expected_scales_,
                           ceil_div(options().hidden, kScaleBlock)),
                   compare(memory,
                           "row_scalars",
                           arrays_.row_scalars,
                           buffers().row_scalars,
                           options().shape.scalars_per_row()),
                   compare(memory, "row_dots", arrays_.row_dots, buffers().row_dots, 1)});
}

std::string RankArrays::check_poisoned(OpKind op, DeviceMemory& memory) const {
  const auto ones = [&]<typename T>(const char* name, std::span<T> array) {
    const std::span<std::byte> bytes(std::as_writable_bytes(array));
    return compare(memory, name, bytes, std::vector<std::byte>(bytes.size(), std::byte{0xFF}), 1);
  };
  const auto zeros = [&](const char* name, std::span<int32_t> array) {
    return compare(memory, name, array, std::vector<int32_t>(array.size(), 0), 1);
  };
  switch (op) {
    case OpKind::kPlan:
      return first_of({ones("slot", arrays_.slot),
                       ones("row_source", arrays_.row_source),
                       ones("row_topk_idx", arrays_.row_topk_idx),
                       ones("source_slot", arrays_.source_slot),
                       zeros("group_sizes", arrays_.group_sizes),
                       zeros("tokens_per_expert", arrays_.tokens_per_expert),
                       zeros("num_dropped", arrays_.num_dropped)});
    case OpKind::kDispatch:
      return first_of({ones("rows", arrays_.rows),
                       ones("rows_scales", arrays_.rows_scales),
                       ones("row_scalars", arrays_.row_scalars),
                       ones("row_dots", arrays_.row_dots)});
    case OpKind::kCombine:
      return first_of({ones("out", arrays_.out), ones("token_scalars", arrays_.returned_scalars)});
    case OpKind::kPlanDispatch:
      return first_of(
          {check_poisoned(OpKind::kPlan, memory), check_poisoned(OpKind::kDispatch, memory)});
  }
  return "unknown operation";
}

std::string RankArrays::check_poisoned_ticket(int32_t flight, DeviceMemory& memory) const {
  const std::span<uint32_t> words(ticket(flight), as_size(kTicketWords));
  return compare(memory, "ticket", words, std::vector<uint32_t>(words.size(), ~uint32_t{0}), 1);
}

std::string RankArrays::check_combine(DeviceMemory& memory) const {
  return first_of({compare(memory,
                           "out",
                           arrays_.out,
                           buffers().out,
                           options().hidden * size_bytes(options().dtype)),
                   compare(memory,
                           "token_scalars",
                           arrays_.returned_scalars,
                           buffers().returned_scalars,
                           options().shape.num_topk)});
}

}  // namespace jax_ep
