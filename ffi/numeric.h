// Conversions between the element types and f32, and fast arithmetic, on host and device. Rounding
// is to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#endif

#include "config.h"

namespace jax_dsv4 {

JAX_DSV4_HD uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
#endif
}

JAX_DSV4_HD float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}

JAX_DSV4_HD float to_f32(float x) { return x; }
JAX_DSV4_HD float to_f32(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

template <class T>
JAX_DSV4_HD T round_to(float x);

template <>
JAX_DSV4_HD float round_to<float>(float x) {
  return x;
}

template <>
JAX_DSV4_HD bf16 round_to<bf16>(float x) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};  // NaN: rounding could overflow to inf
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

inline constexpr float kNegInf = -__builtin_huge_valf();
inline constexpr float kMaxFloat = 3.402823466e+38f;

// A maximum that may be subtracted from scores. Where all of them are -inf, every weight is then
// exp(-inf) = 0 rather than NaN.
JAX_DSV4_HD float finite(float max) { return max > -kMaxFloat ? max : -kMaxFloat; }

// The fastest form each platform has, to a few ulp. On a GPU each names its instructions, so that
// the bits do not depend on where it is inlined: left to itself, the compiler contracts products
// and sums in one place and not in another.
JAX_DSV4_HD float fast_exp(float x) {  // x <= 0
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
  return result;
#else
  // Within 1.4e-7; 0 below -87. Plain arithmetic without a branch, which compilers vectorise.
  constexpr float kRound = 12582912.0f + 127.0f;  // 1.5 * 2^23: what is added to it loses its
                                                  // fraction; and the bias of an exponent
  const float exponent = x * 1.4426950408889634f;
  const float rounded = exponent + kRound;
  const float r = exponent - (rounded - kRound);
  float p = 1.32647273e-3f;  // 2^r for |r| <= 1/2, within 1.6 * 2^-24 of it
  p = p * r + 9.67151299e-3f;
  p = p * r + 5.55073358e-2f;
  p = p * r + 0.240222424f;
  p = p * r + 0.693147004f;
  p = p * r + 1.0f;
  const float power = float_of(bits_of(rounded) << 23);  // kRound's own bits are shifted out
  const uint32_t keep = x < -87.0f ? 0 : ~0u;
  return float_of(bits_of(p * power) & keep);
#endif
}
JAX_DSV4_HD float fast_quotient(float x, float y) {  // 2^-126 <= |y| <= 2^126
#ifdef __CUDA_ARCH__
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(y));
  return x * inverse;
#else
  return x / y;
#endif
}
JAX_DSV4_HD float multiply_add(float x, float y, float z) {
#ifdef __CUDA_ARCH__
  return fmaf(x, y, z);
#else
  return x * y + z;
#endif
}

}  // namespace jax_dsv4
