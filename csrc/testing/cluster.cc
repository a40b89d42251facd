// SPDX-License-Identifier: Apache-2.0
#include "csrc/testing/cluster.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>

#include "csrc/core/float_formats.h"
#include "csrc/core/topology.h"

namespace jax_ep {
namespace {

size_t at(int64_t index) { return static_cast<size_t>(index); }

}  // namespace

std::string describe(const ClusterOptions& options) {
  const EpShape& shape = options.shape;
  std::string text =
      "R" + std::to_string(shape.num_ranks) + "_E" + std::to_string(shape.num_experts) + "_K" +
      std::to_string(shape.num_topk) + "_T" + std::to_string(shape.num_tokens) + "_C" +
      std::to_string(shape.recv_capacity) + "_a" + std::to_string(shape.expert_alignment) + "_";
  text += std::string(name(shape.layout)) + "_H" + std::to_string(options.hidden) + "_";
  text += name(options.dtype);
  if (options.wire == Wire::kFloat8E4M3) text += "_fp8";
  if (!options.zero_fill) text += "_nofill";
  if (!options.scalars) text += "_noscalars";
  if (options.sitting_out != 0) text += "_without" + std::to_string(options.sitting_out);
  if (options.masked) text += "_masked";
  if (options.absent_rank >= 0) text += "_absent" + std::to_string(options.absent_rank);
  if (!options.weighted) text += "_unweighted";
  if (options.row_weights) text += "_rowweights";
  if (options.row_dots) text += "_rowdots";
  if (options.domain_size != 0) text += "_D" + std::to_string(options.domain_size);
  return text;
}

int64_t worst_case_capacity(const EpShape& shape) {
  const int64_t tokens = shape.num_ranks * shape.num_tokens;
  if (shape.layout == Layout::kRank) return tokens;
  const int64_t num_local = shape.num_local_experts();
  const int64_t alignment = shape.expert_alignment;
  const int64_t rows = tokens * std::min<int64_t>(shape.num_topk, num_local);
  return (rows + std::min(num_local, rows) * (alignment - 1)) / alignment * alignment;
}

Cluster::Cluster(const ClusterOptions& options) : options_(options), random_(options.seed) {
  const EpShape& shape = options.shape;
  ranks_.resize(at(shape.num_ranks));
  for (RankBuffers& rank : ranks_) {
    const int64_t selections = shape.num_tokens * shape.num_topk;
    const int64_t row_scalars = shape.recv_capacity * shape.scalars_per_row();
    choose_experts(rank);
    rank.slot.assign(at(selections), kUntouched);
    rank.row_source.assign(at(shape.recv_capacity), kUntouched);
    if (shape.layout == Layout::kRank) {
      rank.row_topk_idx.assign(at(shape.recv_capacity * shape.num_topk), kUntouched);
    }
    rank.group_sizes.assign(at(shape.num_row_groups()), kUntouched);
    rank.tokens_per_expert.assign(at(shape.num_local_experts()), kUntouched);
    rank.x = encode(random_floats(shape.num_tokens * options.hidden));
    rank.y = encode(random_floats(shape.recv_capacity * options.hidden));
    rank.rows.assign(rank.y.size(), kUntouchedByte);
    rank.out.assign(rank.x.size(), kUntouchedByte);
    rank.weights = random_floats(row_scalars);
    if (options.scalars) {
      rank.token_scalars = random_floats(selections);
      rank.row_scalars.assign(at(row_scalars), kUntouched);
      rank.returned_scalars.assign(at(selections), kUntouched);
    }
    if (options.row_weights) rank.row_weights = random_floats(shape.recv_capacity);
    if (options.row_dots) rank.row_dots.assign(at(shape.recv_capacity), kUntouched);
  }
}

void Cluster::choose_experts(RankBuffers& rank) {
  const EpShape& shape = options_.shape;
  std::vector<int32_t> experts(at(shape.num_experts));
  std::iota(experts.begin(), experts.end(), 0);
  std::uniform_int_distribution<int> percent(0, 99);
  const bool takes_part = options_.takes_part(static_cast<int32_t>(&rank - ranks_.data()));
  for (int64_t token = 0; token < shape.num_tokens; ++token) {
    std::shuffle(experts.begin(), experts.end(), random_);
    const bool none = percent(random_) < 10;
    for (int32_t k = 0; k < shape.num_topk; ++k) {
      const bool skipped =
          none || percent(random_) < 15 || !takes_part ||
          !options_.takes_part(owner_of(experts[at(k)], shape.num_local_experts()));
      rank.topk_idx.push_back(skipped ? -1 : experts[at(k)]);
    }
  }
}

// Numbers of many magnitudes, 2^-8 to 2^7, so that every rounding shows; and zeros of both signs.
std::vector<float> Cluster::random_floats(int64_t size) {
  std::vector<float> values(at(size));
  for (float& value : values) {
    const auto bits = static_cast<uint32_t>(random_());
    const uint32_t exponent = 127 - 8 + (bits >> 23) % 16;
    const bool is_zero = (bits & 0xF) == 0;
    value = std::bit_cast<float>((bits & 0x807F'FFFF) | exponent << 23);
    if (is_zero) value = std::copysign(0.0F, value);
  }
  return values;
}

std::vector<float> Cluster::decode(const std::vector<std::byte>& rows) const {
  if (options_.dtype == DType::kFloat32) {
    std::vector<float> values(rows.size() / 4);
    if (!rows.empty()) std::memcpy(values.data(), rows.data(), rows.size());
    return values;
  }
  std::vector<float> values;
  for (size_t i = 0; i < rows.size(); i += 2) {
    uint16_t code;
    std::memcpy(&code, &rows[i], 2);
    values.push_back(
        static_cast<float>(reference::decode(reference::format_of(options_.dtype), code)));
  }
  return values;
}

std::vector<std::byte> Cluster::encode(const std::vector<float>& values) const {
  const auto size = at(size_bytes(options_.dtype));
  std::vector<std::byte> rows(values.size() * size);
  for (size_t i = 0; i < values.size(); ++i) {
    if (options_.dtype == DType::kFloat32) {
      std::memcpy(&rows[i * size], &values[i], size);
      continue;
    }
    const uint16_t code = options_.dtype == DType::kBFloat16 ? float_to_bfloat16(values[i])
                                                             : float_to_float16(values[i]);
    std::memcpy(&rows[i * size], &code, size);
  }
  return rows;
}

reference::PerRank<float> Cluster::all(std::vector<std::byte> RankBuffers::* rows) const {
  reference::PerRank<float> result;
  for (const RankBuffers& rank : ranks_) result.push_back(decode(rank.*rows));
  return result;
}

reference::Plan Cluster::planned() const {
  reference::Plan plan;
  plan.slot = all(&RankBuffers::slot);
  plan.row_source = all(&RankBuffers::row_source);
  plan.row_topk_idx = all(&RankBuffers::row_topk_idx);
  plan.group_sizes = all(&RankBuffers::group_sizes);
  plan.tokens_per_expert = all(&RankBuffers::tokens_per_expert);
  for (const RankBuffers& rank : ranks_) plan.num_dropped.push_back(rank.num_dropped);
  return plan;
}

std::vector<Call> Cluster::plan_calls() {
  std::vector<Call> calls;
  for (RankBuffers& rank : ranks_) {
    calls.push_back(PlanOp{.shape = options_.shape,
                           .topk_idx = rank.topk_idx.data(),
                           .slot = rank.slot.data(),
                           .row_source = rank.row_source.data(),
                           .row_topk_idx = rank.row_topk_idx.data(),
                           .group_sizes = rank.group_sizes.data(),
                           .tokens_per_expert = rank.tokens_per_expert.data(),
                           .num_dropped = &rank.num_dropped});
  }
  return calls;
}

std::vector<Call> Cluster::dispatch_calls() {
  std::vector<Call> calls;
  for (RankBuffers& rank : ranks_) {
    calls.push_back(DispatchOp{.shape = options_.shape,
                               .hidden = options_.hidden,
                               .num_scalars = options_.scalars ? options_.shape.num_topk : 0,
                               .dtype = options_.dtype,
                               .wire = options_.wire,
                               .zero_fill = options_.zero_fill,
                               .weighted = options_.row_weights,
                               .with_dots = options_.row_dots,
                               .x = rank.x.data(),
                               .token_scalars = rank.token_scalars.data(),
                               .row_weights = rank.row_weights.data(),
                               .y = options_.row_dots ? rank.y.data() : nullptr,
                               .topk_idx = rank.topk_idx.data(),
                               .slot = rank.slot.data(),
                               .row_source = rank.row_source.data(),
                               .rows = rank.rows.data(),
                               .row_scalars = rank.row_scalars.data(),
                               .row_dots = rank.row_dots.data()});
  }
  return calls;
}

std::vector<Call> Cluster::combine_calls() {
  std::vector<Call> calls;
  for (RankBuffers& rank : ranks_) {
    calls.push_back(CombineOp{.shape = options_.shape,
                              .hidden = options_.hidden,
                              .weighted = options_.weighted,
                              .num_scalars = options_.scalars ? options_.shape.num_topk : 0,
                              .domain_size = options_.domain_size,
                              .dtype = options_.dtype,
                              .y = rank.y.data(),
                              .weights = rank.weights.data(),
                              .row_scalars = rank.weights.data(),
                              .topk_idx = rank.topk_idx.data(),
                              .slot = rank.slot.data(),
                              .out = rank.out.data(),
                              .token_scalars = rank.returned_scalars.data()});
  }
  return calls;
}

Status Cluster::plan() { return execute(plan_calls(), *workers_); }
Status Cluster::dispatch() { return execute(dispatch_calls(), *workers_); }
Status Cluster::combine() { return execute(combine_calls(), *workers_); }

}  // namespace jax_ep
