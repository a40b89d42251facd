// SPDX-License-Identifier: Apache-2.0
#include "csrc/testing/reference.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <tuple>

namespace jax_ep::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Selection {
  int32_t source;
  int64_t token;
  int32_t k;
  int32_t dest;
  int32_t local_expert;
};

size_t at(int64_t index) { return static_cast<size_t>(index); }

// All selections, sorted by (destination, local expert, source, token).
std::vector<Selection> selections(const EpShape& shape, const PerRank<int32_t>& topk_idx) {
  std::vector<Selection> all;
  for (int32_t source = 0; source < shape.num_ranks; ++source) {
    for (int64_t token = 0; token < shape.num_tokens; ++token) {
      for (int32_t k = 0; k < shape.num_topk; ++k) {
        const int32_t expert = topk_idx[at(source)][at(token * shape.num_topk + k)];
        if (expert < 0) continue;
        const int32_t num_local = shape.num_experts / shape.num_ranks;
        all.push_back({source, token, k, expert / num_local, expert % num_local});
      }
    }
  }
  std::sort(all.begin(), all.end(), [](const Selection& a, const Selection& b) {
    return std::tuple(a.dest, a.local_expert, a.source, a.token) <
           std::tuple(b.dest, b.local_expert, b.source, b.token);
  });
  return all;
}

Plan empty_plan(const EpShape& shape) {
  const size_t ranks = at(shape.num_ranks);
  const auto matrix = [ranks](int64_t size, int32_t value) {
    return PerRank<int32_t>(ranks, std::vector<int32_t>(at(size), value));
  };
  Plan plan;
  plan.slot = matrix(shape.num_tokens * shape.num_topk, -1);
  plan.row_source = matrix(shape.recv_capacity, -1);
  plan.row_topk_idx = matrix(shape.recv_capacity * shape.num_topk, -1);
  plan.group_sizes = matrix(shape.num_row_groups(), 0);
  plan.tokens_per_expert = matrix(shape.num_local_experts(), 0);
  plan.num_dropped.assign(ranks, 0);
  return plan;
}

Plan plan_by_expert(const EpShape& shape, const std::vector<Selection>& all) {
  Plan plan = empty_plan(shape);
  for (int32_t dest = 0; dest < shape.num_ranks; ++dest) {
    int64_t start = 0;
    for (int32_t expert = 0; expert < shape.num_local_experts(); ++expert) {
      int64_t row = start;
      for (const Selection& s : all) {
        if (s.dest != dest || s.local_expert != expert) continue;
        ++plan.tokens_per_expert[at(dest)][at(expert)];
        if (row < shape.recv_capacity) {
          plan.slot[at(s.source)][at(s.token * shape.num_topk + s.k)] = static_cast<int32_t>(row);
          plan.row_source[at(dest)][at(row)] =
              static_cast<int32_t>(s.source * shape.num_tokens + s.token);
        } else {
          ++plan.num_dropped[at(dest)];
        }
        ++row;
      }
      while (row % shape.expert_alignment != 0) ++row;
      plan.group_sizes[at(dest)][at(expert)] = static_cast<int32_t>(
          std::min(row, shape.recv_capacity) - std::min(start, shape.recv_capacity));
      start = row;
    }
  }
  return plan;
}

Plan plan_by_rank(const EpShape& shape, const std::vector<Selection>& all) {
  Plan plan = empty_plan(shape);
  for (int32_t dest = 0; dest < shape.num_ranks; ++dest) {
    int64_t row = 0;
    for (int32_t source = 0; source < shape.num_ranks; ++source) {
      for (int64_t token = 0; token < shape.num_tokens; ++token) {
        bool comes = false;
        for (const Selection& s : all) {
          if (s.dest != dest || s.source != source || s.token != token) continue;
          comes = true;
          ++plan.tokens_per_expert[at(dest)][at(s.local_expert)];
          if (row >= shape.recv_capacity) continue;
          plan.slot[at(source)][at(token * shape.num_topk + s.k)] = static_cast<int32_t>(row);
          plan.row_topk_idx[at(dest)][at(row * shape.num_topk + s.k)] = s.local_expert;
        }
        if (!comes) continue;
        if (row < shape.recv_capacity) {
          plan.row_source[at(dest)][at(row)] =
              static_cast<int32_t>(source * shape.num_tokens + token);
          ++plan.group_sizes[at(dest)][at(source)];
        } else {
          ++plan.num_dropped[at(dest)];
        }
        ++row;
      }
    }
  }
  return plan;
}

int32_t slot_of(const EpShape& shape, const Plan& plan, const Selection& s) {
  return plan.slot[at(s.source)][at(s.token * shape.num_topk + s.k)];
}

// Where the scalar of a selection lies in its row's scalars.
int64_t scalar_index(const EpShape& shape, int32_t slot, int32_t k) {
  return shape.layout == Layout::kExpert ? slot : int64_t{slot} * shape.num_topk + k;
}

}  // namespace

Format format_of(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16: return kBFloat16;
    case DType::kFloat16: return kFloat16;
    default: return kFloat32;
  }
}

double Format::max_finite() const {
  const int codes = 1 << mantissa_bits;
  const double significand = has_infinity ? 2.0 - 1.0 / codes : 2.0 - 2.0 / codes;
  return std::ldexp(significand, (1 << exponent_bits) - (has_infinity ? 2 : 1) - bias());
}

double decode(const Format& format, uint32_t code) {
  const uint32_t mantissa = code & ((1U << format.mantissa_bits) - 1);
  const uint32_t exponent = (code >> format.mantissa_bits) & ((1U << format.exponent_bits) - 1);
  const bool negative = (code >> (format.mantissa_bits + format.exponent_bits)) & 1;
  const bool top = exponent == (1U << format.exponent_bits) - 1;
  double value;
  if (top && format.has_infinity) {
    value = mantissa == 0 ? kInfinity : kNan;
  } else if (top && mantissa == (1U << format.mantissa_bits) - 1) {
    value = kNan;
  } else if (exponent == 0) {
    value = std::ldexp(mantissa, 1 - format.bias() - format.mantissa_bits);
  } else {
    value = std::ldexp(mantissa + (1U << format.mantissa_bits),
                       static_cast<int>(exponent) - format.bias() - format.mantissa_bits);
  }
  return negative ? -value : value;
}

double round_to(const Format& format, double value) {
  const auto past_range = [&] {
    return format.has_infinity ? std::copysign(kInfinity, value) : kNan;
  };
  if (std::isnan(value) || value == 0) return value;
  if (std::isinf(value)) return past_range();
  const int exponent = std::max(std::ilogb(value), 1 - format.bias());
  const double step = std::ldexp(1.0, exponent - format.mantissa_bits);
  const double rounded = std::nearbyint(value / step) * step;  // ties to even
  return std::fabs(rounded) > format.max_finite() ? past_range() : std::copysign(rounded, value);
}

float fused_multiply_add(float a, float b, float c) {
  // The product of two float32 is exact in double. Their sum is not, so round it to odd, which
  // the second rounding, to float32, cannot tell from the exact sum.
  const double product = static_cast<double>(a) * b;
  const double addend = c;
  const double sum = product + addend;
  const double of_addend = sum - product;
  const double error = (product - (sum - of_addend)) + (addend - of_addend);
  if (error == 0 || !std::isfinite(sum)) return static_cast<float>(sum);
  const auto bits = std::bit_cast<uint64_t>(sum);
  if (bits & 1) return static_cast<float>(sum);
  return static_cast<float>(std::nextafter(sum, error > 0 ? kInfinity : -kInfinity));
}

Plan plan(const EpShape& shape, const PerRank<int32_t>& topk_idx) {
  const std::vector<Selection> all = selections(shape, topk_idx);
  return shape.layout == Layout::kExpert ? plan_by_expert(shape, all) : plan_by_rank(shape, all);
}

namespace {

// The code of one of the format's values; any NaN is the largest code.
uint8_t float8_code(double value) {
  for (uint32_t code = 0; code < 256; ++code) {
    const double decoded = decode(kFloat8E4M3, code);
    if (std::isnan(value) ? std::isnan(decoded)
                          : decoded == value && std::signbit(decoded) == std::signbit(value)) {
      return static_cast<uint8_t>(code);
    }
  }
  throw std::logic_error("not a value of float8_e4m3fn");
}

}  // namespace

QuantizedRow fp8_quantize(const std::vector<float>& x) {
  QuantizedRow result;
  for (size_t begin = 0; begin < x.size(); begin += 128) {
    const size_t end = std::min(x.size(), begin + 128);
    float amax = 0;
    for (size_t i = begin; i < end; ++i) {
      if (std::isnan(x[i]) || std::fabs(x[i]) > amax) amax = std::fabs(x[i]);
      if (std::isnan(amax)) break;
    }
    // float32 quotients: the double quotient of two float32 rounds to the same float32.
    const float clamped = amax < 1e-4F ? 1e-4F : amax;
    const auto scale = static_cast<float>(static_cast<double>(clamped) / 448.0);
    result.scales.push_back(scale);
    for (size_t i = begin; i < end; ++i) {
      const auto quotient = static_cast<float>(static_cast<double>(x[i]) / scale);
      result.values.push_back(float8_code(round_to(kFloat8E4M3, quotient)));
    }
  }
  return result;
}

std::vector<float> fp8_restore(const QuantizedRow& row, DType dtype) {
  std::vector<float> result;
  for (size_t i = 0; i < row.values.size(); ++i) {
    const double scale = row.scales[i / 128];
    const auto product = static_cast<float>(decode(kFloat8E4M3, row.values[i]) * scale);
    result.push_back(static_cast<float>(round_to(format_of(dtype), product)));
  }
  return result;
}

std::vector<float> fp8_wire(const std::vector<float>& x, DType dtype) {
  return fp8_restore(fp8_quantize(x), dtype);
}

PerRank<float> dispatch_rows(const EpShape& shape,
                             const PerRank<int32_t>& topk_idx,
                             const Plan& plan,
                             const PerRank<float>& x,
                             int64_t hidden) {
  PerRank<float> rows(
      at(shape.num_ranks),
      std::vector<float>(at(shape.recv_capacity * hidden), static_cast<float>(kNan)));
  for (const Selection& s : selections(shape, topk_idx)) {
    const int32_t slot = slot_of(shape, plan, s);
    if (slot < 0) continue;
    std::copy_n(x[at(s.source)].begin() + s.token * hidden,
                hidden,
                rows[at(s.dest)].begin() + slot * hidden);
  }
  return rows;
}

std::vector<float> scale_rows(const std::vector<float>& rows,
                              const std::vector<float>& row_weights,
                              int64_t hidden,
                              DType dtype) {
  std::vector<float> scaled;
  for (size_t i = 0; i < rows.size(); ++i) {
    // Exact in double, so that this is the product in float32.
    const double weight = row_weights[i / at(hidden)];
    const auto product = static_cast<float>(weight * rows[i]);
    scaled.push_back(static_cast<float>(round_to(format_of(dtype), product)));
  }
  return scaled;
}

std::vector<float> row_dots(const std::vector<float>& rows,
                            const std::vector<float>& y,
                            const std::vector<int32_t>& row_source,
                            int64_t hidden) {
  std::vector<float> dots(row_source.size());
  for (size_t row = 0; row < dots.size(); ++row) {
    if (row_source[row] < 0) continue;
    for (size_t block = 0; block < at(hidden); block += 1024) {
      std::vector<float> sums(256);
      for (size_t h = block; h < std::min(at(hidden), block + 1024); ++h) {
        float& sum = sums[h % sums.size()];
        sum = fused_multiply_add(rows[row * at(hidden) + h], y[row * at(hidden) + h], sum);
      }
      while (sums.size() > 1) {
        std::vector<float> pairs;
        for (size_t i = 0; i < sums.size(); i += 2) pairs.push_back(sums[i] + sums[i + 1]);
        sums = pairs;
      }
      dots[row] += sums[0];
    }
  }
  return dots;
}

PerRank<float> dispatch_scalars(const EpShape& shape,
                                const PerRank<int32_t>& topk_idx,
                                const Plan& plan,
                                const PerRank<float>& token_scalars) {
  PerRank<float> scalars(at(shape.num_ranks),
                         std::vector<float>(at(shape.recv_capacity * shape.scalars_per_row())));
  for (const Selection& s : selections(shape, topk_idx)) {
    const int32_t slot = slot_of(shape, plan, s);
    if (slot < 0) continue;
    scalars[at(s.dest)][at(scalar_index(shape, slot, s.k))] =
        token_scalars[at(s.source)][at(s.token * shape.num_topk + s.k)];
  }
  return scalars;
}

PerRank<float> combine_rows(const EpShape& shape,
                            const PerRank<int32_t>& topk_idx,
                            const Plan& plan,
                            const PerRank<float>& y,
                            const PerRank<float>& weights,
                            int64_t hidden,
                            DType dtype,
                            int32_t domain_size) {
  const Format format = format_of(dtype);
  // partial[dest][source][token, channel]: the sums inside a rank, in order of local experts.
  std::vector<PerRank<float>> partial(
      at(shape.num_ranks),
      PerRank<float>(at(shape.num_ranks), std::vector<float>(at(shape.num_tokens * hidden))));
  std::vector<std::vector<bool>> added(at(shape.num_ranks),
                                       std::vector<bool>(at(shape.num_ranks * shape.num_tokens)));
  for (const Selection& s : selections(shape, topk_idx)) {
    const int32_t slot = slot_of(shape, plan, s);
    if (slot < 0) continue;
    auto is_added = added[at(s.dest)].begin() + s.source * shape.num_tokens + s.token;
    if (weights.empty() && shape.layout == Layout::kRank && *is_added) continue;
    *is_added = true;
    for (int64_t h = 0; h < hidden; ++h) {
      float& acc = partial[at(s.dest)][at(s.source)][at(s.token * hidden + h)];
      const float value = y[at(s.dest)][at(slot * hidden + h)];
      acc = weights.empty()
                ? acc + value
                : fused_multiply_add(
                      weights[at(s.dest)][at(scalar_index(shape, slot, s.k))], value, acc);
    }
  }
  // As it is defined, also where there is one domain, or each rank is one.
  const int32_t ranks_per_domain = domain_size == 0 ? shape.num_ranks : domain_size;
  const auto rounded = [&format](float value) {
    return static_cast<float>(round_to(format, value));
  };
  PerRank<float> out(at(shape.num_ranks), std::vector<float>(at(shape.num_tokens * hidden)));
  for (int32_t source = 0; source < shape.num_ranks; ++source) {
    for (int64_t i = 0; i < shape.num_tokens * hidden; ++i) {
      float sum = 0;
      for (int32_t first = 0; first < shape.num_ranks; first += ranks_per_domain) {
        float of_domain = 0;
        for (int32_t dest = first; dest < first + ranks_per_domain; ++dest) {
          of_domain += rounded(partial[at(dest)][at(source)][at(i)]);
        }
        sum += rounded(of_domain);
      }
      out[at(source)][at(i)] = rounded(sum);
    }
  }
  return out;
}

PerRank<float> combine_scalars(const EpShape& shape,
                               const PerRank<int32_t>& topk_idx,
                               const Plan& plan,
                               const PerRank<float>& row_scalars) {
  PerRank<float> scalars(at(shape.num_ranks),
                         std::vector<float>(at(shape.num_tokens * shape.num_topk)));
  for (const Selection& s : selections(shape, topk_idx)) {
    const int32_t slot = slot_of(shape, plan, s);
    if (slot < 0) continue;
    scalars[at(s.source)][at(s.token * shape.num_topk + s.k)] =
        row_scalars[at(s.dest)][at(scalar_index(shape, slot, s.k))];
  }
  return scalars;
}

}  // namespace jax_ep::reference
