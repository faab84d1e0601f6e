// Conversions between the element types and f32, and the arithmetic of prefixes, on host and
// device. Rounding is to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#endif

#include "config.h"

namespace jax_dsv4 {

JAX_DSV4_HD float to_f32(float x) { return x; }

JAX_DSV4_HD float to_f32(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
#endif
}

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
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};  // NaN: rounding could overflow to inf
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

inline constexpr float kNegInf = -__builtin_huge_valf();
inline constexpr float kMaxFloat = 3.402823466e+38f;

// A maximum to subtract: with nothing but -inf below it, every weight is exp(-inf) = 0, not NaN.
JAX_DSV4_HD float finite_or_zero(float max) { return max == kNegInf ? 0.0f : max; }

// Some rows of a window, in one channel: the logsumexp of their scores, and the mean of their kv
// weighted by softmax. Of one row: its score and kv; of none: -inf and 0.
struct Prefix {
  float lse = kNegInf;
  float mean = 0.0f;
};

// The arithmetic below in the fastest form each platform has: within 2 ulp, and without a choice of
// the compiler's whether to contract, as the bits must not depend on where it is inlined.
JAX_DSV4_HD float fast_exp(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
  return result;
#else
  return std::exp(x);
#endif
}
JAX_DSV4_HD float fast_quotient(float x, float y) {  // 2^-126 <= |y| <= 2^126
#ifdef __CUDA_ARCH__
  return __fdividef(x, y);
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

// log(1 + x) of 0 <= x <= 1: 2 atanh(z) with z = x / (2 + x) <= 1/3. The series after its first
// term is fitted to 2e-9.
JAX_DSV4_HD float log1p_of_ratio(float x) {
  const float z = fast_quotient(x, 2.0f + x), z2 = z * z;
  float tail = multiply_add(0.28447670f, z2, 0.27901918f);
  tail = multiply_add(tail, z2, 0.40028667f);
  tail = multiply_add(tail, z2, 0.66666263f);
  return multiply_add(tail * z2, z, 2.0f * z);
}

// Of the rows of both. The mean moves from the heavier side towards the other: exact where one has
// no weight, and where both are equal. As in a softmax over the rows, a score of +inf gives NaN,
// and so does an infinite kv of weight 0.
JAX_DSV4_HD Prefix merge(const Prefix& a, const Prefix& b) {
  const bool swap = b.lse > a.lse;
  const float high = swap ? b.lse : a.lse, low = swap ? a.lse : b.lse;
  const float heavy = swap ? b.mean : a.mean, light = swap ? a.mean : b.mean;
  const float base = high > -kMaxFloat ? high : -kMaxFloat;
  const float ratio = fast_exp(low - base) + (base - base);  // of their weights: at most 1
  const float weight = fast_quotient(ratio, 1.0f + ratio);   // of `light`
  const float step = light - heavy;
  const float mean = std::isfinite(step) ? multiply_add(step, weight, heavy)
                                         : multiply_add(light, weight, heavy * (1.0f - weight));
  return {high + log1p_of_ratio(ratio), mean};
}

// The value of a finished window.
JAX_DSV4_HD float value_of(const Prefix& window) {
  return window.lse == kNegInf ? 0.0f : window.mean;
}

}  // namespace jax_dsv4
