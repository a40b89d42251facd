// SPDX-License-Identifier: Apache-2.0
// Elements of token rows as float32 and back, one type per dtype. The values are those of
// csrc/core/float_formats.h, which the simulator uses; only the payload of NaNs may differ.
#ifndef JAX_EP_CSRC_DEVICE_CONVERT_H_
#define JAX_EP_CSRC_DEVICE_CONVERT_H_

#include "csrc/core/float_formats.h"
#include "csrc/device/primitives.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#endif

namespace jax_ep::dev {

JAX_EP_DEVICE float as_float(u32 bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}
JAX_EP_DEVICE u32 as_bits(float value) {
#ifdef __CUDACC__
  return __float_as_uint(value);
#else
  return std::bit_cast<u32>(value);
#endif
}

// a * b + c, rounded once.
JAX_EP_DEVICE float fused_multiply_add(float a, float b, float c) {
#ifdef __CUDACC__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// Bits of magnitudes, sign bit 0, are ordered as the numbers are; those of NaNs come last.
JAX_EP_DEVICE u32 larger_magnitude(u32 a, u32 b) { return a > b ? a : b; }
// The same in each half of a word, for 16-bit formats.
JAX_EP_DEVICE u32 larger_magnitude_pairs(u32 a, u32 b) {
#ifdef __CUDACC__
  return __vmaxu2(a, b);
#else
  return larger_magnitude(a & 0xFFFF, b & 0xFFFF) | larger_magnitude(a >> 16, b >> 16) << 16;
#endif
}

// A dtype's rows. `larger_magnitudes` folds a word into the largest magnitudes so far, one for each
// place of a word; `largest_magnitude` is the largest of those, as the bits of a float32.
struct Float32Rows {
  using Element = u32;
  static constexpr int kPerWord = 1;
  JAX_EP_DEVICE static float to_float(u32 element) { return as_float(element); }
  JAX_EP_DEVICE static u32 from_float(float value) { return as_bits(value); }
  JAX_EP_DEVICE static void unpack(u32 word, float* values) { values[0] = as_float(word); }
  JAX_EP_DEVICE static u32 pack(const float* values) { return as_bits(values[0]); }
  JAX_EP_DEVICE static u32 larger_magnitudes(u32 word, u32 largest) {
    return larger_magnitude(word & 0x7FFF'FFFF, largest);
  }
  JAX_EP_DEVICE static u32 largest_magnitude(u32 largest) { return largest; }
};

struct BFloat16Rows {
  using Element = u16;
  static constexpr int kPerWord = 2;
  JAX_EP_DEVICE static float to_float(u16 element) { return as_float(u32{element} << 16); }
  JAX_EP_DEVICE static u16 from_float(float value) {
#ifdef __CUDACC__
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
    return float_to_bfloat16(value);
#endif
  }
  JAX_EP_DEVICE static void unpack(u32 word, float* values) {
    values[0] = as_float(word << 16);
    values[1] = as_float(word & 0xFFFF'0000);
  }
  JAX_EP_DEVICE static u32 pack(const float* values) {
#ifdef __CUDACC__
    const __nv_bfloat162 pair = __floats2bfloat162_rn(values[0], values[1]);
    return u32{__bfloat16_as_ushort(pair.x)} | u32{__bfloat16_as_ushort(pair.y)} << 16;
#else
    return u32{from_float(values[0])} | u32{from_float(values[1])} << 16;
#endif
  }
  JAX_EP_DEVICE static u32 larger_magnitudes(u32 word, u32 largest) {
    return larger_magnitude_pairs(word & 0x7FFF'7FFF, largest);
  }
  JAX_EP_DEVICE static u32 largest_magnitude(u32 largest) {
    return as_bits(to_float(static_cast<u16>(larger_magnitude(largest & 0xFFFF, largest >> 16))));
  }
};

struct Float16Rows {
  using Element = u16;
  static constexpr int kPerWord = 2;
  JAX_EP_DEVICE static float to_float(u16 element) {
#ifdef __CUDACC__
    return __half2float(__ushort_as_half(element));
#else
    return float16_to_float(element);
#endif
  }
  JAX_EP_DEVICE static u16 from_float(float value) {
#ifdef __CUDACC__
    return __half_as_ushort(__float2half_rn(value));
#else
    return float_to_float16(value);
#endif
  }
  JAX_EP_DEVICE static void unpack(u32 word, float* values) {
    values[0] = to_float(static_cast<u16>(word));
    values[1] = to_float(static_cast<u16>(word >> 16));
  }
  JAX_EP_DEVICE static u32 pack(const float* values) {
    return u32{from_float(values[0])} | u32{from_float(values[1])} << 16;
  }
  JAX_EP_DEVICE static u32 larger_magnitudes(u32 word, u32 largest) {
    return larger_magnitude_pairs(word & 0x7FFF'7FFF, largest);
  }
  JAX_EP_DEVICE static u32 largest_magnitude(u32 largest) {
    return as_bits(to_float(static_cast<u16>(larger_magnitude(largest & 0xFFFF, largest >> 16))));
  }
};

// float8_e4m3fn. What is out of range becomes NaN in the one and the largest value in the other
// implementation, but scaled values never are out of range.
JAX_EP_DEVICE u8 to_fp8(float value) {
#ifdef __CUDACC__
  return static_cast<u8>(__nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3));
#else
  return float_to_float8_e4m3fn(value);
#endif
}
JAX_EP_DEVICE float from_fp8(u8 element) {
#ifdef __CUDACC__
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(element, __NV_E4M3)));
#else
  return float8_e4m3fn_to_float(element);
#endif
}
// Two at once, which the hardware converts as fast as one. The first is in the low byte.
JAX_EP_DEVICE u32 to_fp8_pair(float first, float second) {
#ifdef __CUDACC__
  return __nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, __NV_E4M3);
#else
  return u32{to_fp8(first)} | u32{to_fp8(second)} << 8;
#endif
}
JAX_EP_DEVICE void from_fp8_pair(u32 pair, float* values) {
#ifdef __CUDACC__
  const __half2 halves(
      __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3));
  values[0] = __low2float(halves);
  values[1] = __high2float(halves);
#else
  values[0] = from_fp8(static_cast<u8>(pair));
  values[1] = from_fp8(static_cast<u8>(pair >> 8));
#endif
}

// The scale of a block of elements whose largest magnitude is `amax`; a NaN stays one. From
// DeepSeek-V3 (arXiv:2412.19437, section 3.3).
JAX_EP_DEVICE float fp8_scale(float amax) {
  const float clamped = amax < kMinAmax ? kMinAmax : amax;
#ifdef __CUDACC__
  return __fdiv_rn(clamped, kMaxFloat8);
#else
  return clamped / kMaxFloat8;
#endif
}
JAX_EP_DEVICE float reciprocal(float value) {
#ifdef __CUDACC__
  return __frcp_rn(value);
#else
  return 1.0F / value;
#endif
}

// Divides many numbers by one scale. After rounding to FP8 the quotients are those of an IEEE
// division, which takes three times as many instructions, and a detour for zeros.
//
// The quotient by the rounded reciprocal is corrected once, by its remainder (P. Markstein,
// "Computation of elementary functions on the IBM RISC System/6000 processor", 1990). It then
// may still miss the correctly rounded one, by a unit in the last place, if it lies next to the
// middle between two numbers; divider_test.cc searches the places where FP8 could see that.
class Divider {
 public:
  JAX_EP_DEVICE explicit Divider(float scale)
      : reciprocal_(reciprocal(scale)),
        // By infinity: 0 of what is finite, and NaN of infinity, by a remainder that is neither.
        scale_(reciprocal_ == 0 ? 1.0F : scale) {}
  JAX_EP_DEVICE float operator()(float value) const {
    const float quotient = value * reciprocal_;
    // Negated, so that the quotient of -0 remains -0.
    const float remainder = fused_multiply_add(quotient, scale_, -value);
    return fused_multiply_add(remainder, -reciprocal_, quotient);
  }

 private:
  float reciprocal_;
  float scale_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_CONVERT_H_
