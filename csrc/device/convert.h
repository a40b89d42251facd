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

struct Float32Rows {
  using Element = u32;
  static constexpr int kPerWord = 1;
  JAX_EP_DEVICE static float to_float(u32 element) { return as_float(element); }
  JAX_EP_DEVICE static u32 from_float(float value) { return as_bits(value); }
  JAX_EP_DEVICE static void unpack(u32 word, float* values) { values[0] = as_float(word); }
  JAX_EP_DEVICE static u32 pack(const float* values) { return as_bits(values[0]); }
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

// The scale of a block of channels whose largest magnitude is `amax`; a NaN stays one. From
// DeepSeek-V3 (arXiv:2412.19437, section 3.3).
JAX_EP_DEVICE float fp8_scale(float amax) {
  constexpr float kLargest = 448.0F;
  constexpr float kLeastAmax = 1e-4F;
  const float clamped = amax < kLeastAmax ? kLeastAmax : amax;
#ifdef __CUDACC__
  return __fdiv_rn(clamped, kLargest);
#else
  return clamped / kLargest;
#endif
}
JAX_EP_DEVICE float scaled(float value, float scale) {
#ifdef __CUDACC__
  return __fdiv_rn(value, scale);
#else
  return value / scale;
#endif
}

// The larger of two magnitudes; NaN if one of them is.
JAX_EP_DEVICE float larger_or_nan(float a, float b) { return a > b || a != a ? a : b; }
JAX_EP_DEVICE float magnitude(float value) { return as_float(as_bits(value) & 0x7FFF'FFFF); }

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_CONVERT_H_
