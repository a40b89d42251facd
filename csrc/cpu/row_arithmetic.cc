// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/row_arithmetic.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

#include "csrc/core/float_formats.h"
#include "csrc/core/ops.h"

// The bodies are inlined into one function per instruction set, whose attributes they take on.
#define JAX_EP_INLINE_BODY [[gnu::always_inline]] inline

#ifdef __x86_64__
#define JAX_EP_AVX2 __attribute__((target("avx2,fma")))
#define JAX_EP_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#endif

namespace jax_ep {
namespace {

// Channels that are summed at a time: three such float32 arrays stay in the L1 cache.
constexpr int64_t kSumBlock = 1024;

template <typename Storage>
JAX_EP_INLINE_BODY void prefetch(const Storage* row, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(Storage);
  for (int64_t i = 0; i < count; i += kLine) {
    __builtin_prefetch(row + i, /*rw=*/0, /*locality=*/2);
  }
}

// Where a term stands among the terms of its rank.
template <typename Format, bool kFirst, bool kLast>
JAX_EP_INLINE_BODY void add_term(const typename Format::Storage* __restrict row,
                                 float weight,
                                 int64_t count,
                                 float* __restrict partial,
                                 float* __restrict sum) {
  for (int64_t i = 0; i < count; ++i) {
    const float before = kFirst ? 0.0F : partial[i];
    const float after = std::fma(weight, Format::to_float(row[i]), before);
    if constexpr (kLast) {
      sum[i] += Format::round(after);
    } else {
      partial[i] = after;
    }
  }
}

// A domain's sum is rounded, and added to those of earlier ones; the next begins.
template <typename Format>
JAX_EP_INLINE_BODY void end_domain(int64_t count, float* __restrict sum, float* __restrict total) {
  for (int64_t i = 0; i < count; ++i) {
    total[i] += Format::round(sum[i]);
    sum[i] = 0.0F;
  }
}

template <typename Format>
JAX_EP_INLINE_BODY void sum_terms_body(std::span<const Term> terms,
                                       std::span<const Term> next,
                                       int64_t hidden,
                                       void* out) {
  using Storage = typename Format::Storage;
  float partial[kSumBlock];
  float sum[kSumBlock];
  float total[kSumBlock];  // over domains
  const bool over_domains = !terms.empty() && terms.back().ends_domain;
  for (int64_t begin = 0; begin < hidden; begin += kSumBlock) {
    const int64_t count = std::min(kSumBlock, hidden - begin);
    std::fill_n(sum, count, 0.0F);
    if (over_domains) std::fill_n(total, count, 0.0F);
    bool is_first = true;
    for (size_t i = 0; i < terms.size(); ++i) {
      const Term& term = terms[i];
      const Storage* const row = static_cast<const Storage*>(term.row) + begin;
      if (i < next.size()) prefetch(static_cast<const Storage*>(next[i].row) + begin, count);
      if (is_first && term.ends_rank) {
        add_term<Format, true, true>(row, term.weight, count, partial, sum);
      } else if (is_first) {
        add_term<Format, true, false>(row, term.weight, count, partial, sum);
      } else if (term.ends_rank) {
        add_term<Format, false, true>(row, term.weight, count, partial, sum);
      } else {
        add_term<Format, false, false>(row, term.weight, count, partial, sum);
      }
      is_first = term.ends_rank;
      if (term.ends_domain) end_domain<Format>(count, sum, total);
    }
    const float* const sums = over_domains ? total : sum;
    Storage* const result = static_cast<Storage*>(out) + begin;
    for (int64_t i = 0; i < count; ++i) result[i] = Format::from_float(sums[i]);
  }
}

template <typename Format>
JAX_EP_INLINE_BODY void scale_body(const void* x,
                                   float weight,
                                   int64_t hidden,
                                   void* __restrict out) {
  using Storage = typename Format::Storage;
  const auto* const from = static_cast<const Storage*>(x);
  auto* const to = static_cast<Storage*>(out);
  for (int64_t i = 0; i < hidden; ++i) {
    to[i] = Format::from_float(weight * Format::to_float(from[i]));
  }
}

template <typename Format>
JAX_EP_INLINE_BODY float dot_body(const void* x, const void* y, int64_t hidden) {
  using Storage = typename Format::Storage;
  float dot = 0.0F;
  for (int64_t block = 0; block < hidden; block += kDotBlock) {
    const int64_t end = std::min(block + kDotBlock, hidden);
    alignas(64) float sums[kDotSums] = {};
    for (int64_t begin = block; begin < end; begin += kDotSums) {
      const int64_t count = std::min(kDotSums, end - begin);
      const Storage* const a = static_cast<const Storage*>(x) + begin;
      const Storage* const b = static_cast<const Storage*>(y) + begin;
      for (int64_t i = 0; i < count; ++i) {
        sums[i] = std::fma(Format::to_float(a[i]), Format::to_float(b[i]), sums[i]);
      }
    }
    for (int64_t left = kDotSums / 2; left > 0; left /= 2) {
      for (int64_t i = 0; i < left; ++i) sums[i] = sums[2 * i] + sums[2 * i + 1];
    }
    dot += sums[0];
  }
  return dot;
}

// The scale of one block.
template <typename Format>
JAX_EP_INLINE_BODY float scale_of(const typename Format::Storage* block, int64_t count) {
  // Magnitudes compare as integers like as numbers, and a NaN is above all.
  uint32_t max_bits = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto bits = std::bit_cast<uint32_t>(Format::to_float(block[i])) & ~float32_bits::kSign;
    max_bits = std::max(max_bits, bits);
  }
  const auto amax = std::bit_cast<float>(max_bits);
  return (amax < kMinAmax ? kMinAmax : amax) / kMaxFloat8;
}

template <typename Format>
JAX_EP_INLINE_BODY void quantize_body(const void* x,
                                      int64_t hidden,
                                      uint8_t* __restrict values,
                                      float* __restrict scales) {
  using Storage = typename Format::Storage;
  for (int64_t begin = 0; begin < hidden; begin += kScaleBlock) {
    const int64_t count = std::min(kScaleBlock, hidden - begin);
    const Storage* const from = static_cast<const Storage*>(x) + begin;
    const float scale = scale_of<Format>(from, count);
    scales[begin / kScaleBlock] = scale;
    for (int64_t i = 0; i < count; ++i) {
      values[begin + i] = float_to_float8_e4m3fn(Format::to_float(from[i]) / scale);
    }
  }
}

template <typename Format>
JAX_EP_INLINE_BODY void restore_body(const uint8_t* __restrict values,
                                     const float* __restrict scales,
                                     int64_t hidden,
                                     void* __restrict out) {
  using Storage = typename Format::Storage;
  for (int64_t begin = 0; begin < hidden; begin += kScaleBlock) {
    const int64_t count = std::min(kScaleBlock, hidden - begin);
    Storage* const to = static_cast<Storage*>(out) + begin;
    const float scale = scales[begin / kScaleBlock];
    for (int64_t i = 0; i < count; ++i) {
      to[i] = Format::from_float(float8_e4m3fn_to_float(values[begin + i]) * scale);
    }
  }
}

template <typename Format>
JAX_EP_INLINE_BODY void round_to_fp8_body(const void* x, int64_t hidden, void* out) {
  using Storage = typename Format::Storage;
  for (int64_t begin = 0; begin < hidden; begin += kScaleBlock) {
    const int64_t count = std::min(kScaleBlock, hidden - begin);
    const Storage* const from = static_cast<const Storage*>(x) + begin;
    Storage* const to = static_cast<Storage*>(out) + begin;
    const float scale = scale_of<Format>(from, count);
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t quantized = float_to_float8_e4m3fn(Format::to_float(from[i]) / scale);
      to[i] = Format::from_float(float8_e4m3fn_to_float(quantized) * scale);
    }
  }
}

template <typename Format>
struct Baseline {
  static void sum_terms(std::span<const Term> terms,
                        std::span<const Term> next,
                        int64_t hidden,
                        void* out) {
    sum_terms_body<Format>(terms, next, hidden, out);
  }
  static void scale(const void* x, float weight, int64_t hidden, void* out) {
    scale_body<Format>(x, weight, hidden, out);
  }
  static float dot(const void* x, const void* y, int64_t hidden) {
    return dot_body<Format>(x, y, hidden);
  }
  static void quantize(const void* x, int64_t hidden, uint8_t* values, float* scales) {
    quantize_body<Format>(x, hidden, values, scales);
  }
  static void restore(const uint8_t* values, const float* scales, int64_t hidden, void* out) {
    restore_body<Format>(values, scales, hidden, out);
  }
  static void round_to_fp8(const void* x, int64_t hidden, void* out) {
    round_to_fp8_body<Format>(x, hidden, out);
  }
};

#ifdef __x86_64__
template <typename Format>
struct Avx2 {
  JAX_EP_AVX2 static void sum_terms(std::span<const Term> terms,
                                    std::span<const Term> next,
                                    int64_t hidden,
                                    void* out) {
    sum_terms_body<Format>(terms, next, hidden, out);
  }
  JAX_EP_AVX2 static void scale(const void* x, float weight, int64_t hidden, void* out) {
    scale_body<Format>(x, weight, hidden, out);
  }
  JAX_EP_AVX2 static float dot(const void* x, const void* y, int64_t hidden) {
    return dot_body<Format>(x, y, hidden);
  }
  JAX_EP_AVX2 static void quantize(const void* x, int64_t hidden, uint8_t* values, float* scales) {
    quantize_body<Format>(x, hidden, values, scales);
  }
  JAX_EP_AVX2 static void restore(const uint8_t* values,
                                  const float* scales,
                                  int64_t hidden,
                                  void* out) {
    restore_body<Format>(values, scales, hidden, out);
  }
  JAX_EP_AVX2 static void round_to_fp8(const void* x, int64_t hidden, void* out) {
    round_to_fp8_body<Format>(x, hidden, out);
  }
};

template <typename Format>
struct Avx512 {
  JAX_EP_AVX512 static void sum_terms(std::span<const Term> terms,
                                      std::span<const Term> next,
                                      int64_t hidden,
                                      void* out) {
    sum_terms_body<Format>(terms, next, hidden, out);
  }
  JAX_EP_AVX512 static void scale(const void* x, float weight, int64_t hidden, void* out) {
    scale_body<Format>(x, weight, hidden, out);
  }
  JAX_EP_AVX512 static float dot(const void* x, const void* y, int64_t hidden) {
    return dot_body<Format>(x, y, hidden);
  }
  JAX_EP_AVX512 static void quantize(const void* x,
                                     int64_t hidden,
                                     uint8_t* values,
                                     float* scales) {
    quantize_body<Format>(x, hidden, values, scales);
  }
  JAX_EP_AVX512 static void restore(const uint8_t* values,
                                    const float* scales,
                                    int64_t hidden,
                                    void* out) {
    restore_body<Format>(values, scales, hidden, out);
  }
  JAX_EP_AVX512 static void round_to_fp8(const void* x, int64_t hidden, void* out) {
    round_to_fp8_body<Format>(x, hidden, out);
  }
};
#endif

template <template <typename> class Compiled>
const RowArithmetic& kernels_of(DType dtype) {
  static constexpr RowArithmetic kFloat32{&Compiled<Float32>::sum_terms,
                                          &Compiled<Float32>::scale,
                                          &Compiled<Float32>::dot,
                                          &Compiled<Float32>::quantize,
                                          &Compiled<Float32>::restore,
                                          &Compiled<Float32>::round_to_fp8};
  static constexpr RowArithmetic kBFloat16{&Compiled<BFloat16>::sum_terms,
                                           &Compiled<BFloat16>::scale,
                                           &Compiled<BFloat16>::dot,
                                           &Compiled<BFloat16>::quantize,
                                           &Compiled<BFloat16>::restore,
                                           &Compiled<BFloat16>::round_to_fp8};
  static constexpr RowArithmetic kFloat16{&Compiled<Float16>::sum_terms,
                                          &Compiled<Float16>::scale,
                                          &Compiled<Float16>::dot,
                                          &Compiled<Float16>::quantize,
                                          &Compiled<Float16>::restore,
                                          &Compiled<Float16>::round_to_fp8};
  switch (dtype) {
    case DType::kBFloat16: return kBFloat16;
    case DType::kFloat16: return kFloat16;
    default: return kFloat32;
  }
}

Isa best_isa() {
  constexpr std::array kBestFirst = {Isa::kAvx512, Isa::kAvx2};
  for (const Isa isa : kBestFirst) {
    if (is_supported(isa)) return isa;
  }
  return Isa::kBaseline;
}

}  // namespace

bool is_supported(Isa isa) {
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  switch (isa) {
    case Isa::kBaseline: return true;
    case Isa::kAvx2: return avx2;
    case Isa::kAvx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  return false;
#else
  return isa == Isa::kBaseline;
#endif
}

const RowArithmetic& row_arithmetic(DType dtype) {
  static const Isa isa = best_isa();
  return row_arithmetic(dtype, isa);
}

const RowArithmetic& row_arithmetic(DType dtype, [[maybe_unused]] Isa isa) {
#ifdef __x86_64__
  if (isa == Isa::kAvx512) return kernels_of<Avx512>(dtype);
  if (isa == Isa::kAvx2) return kernels_of<Avx2>(dtype);
#endif
  return kernels_of<Baseline>(dtype);
}

}  // namespace jax_ep
