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
JAX_DSV4_HD float finite(float max) { return max > -kMaxFloat ? max : -kMaxFloat; }

// Some rows of a window, in one channel: the logsumexp of their scores, and the mean of their kv
// weighted by softmax. Of one row: its score and kv; of none: -inf and 0.
struct Prefix {
  float lse = kNegInf;
  float mean = 0.0f;
};

// The arithmetic below in the fastest form each platform has, to a few ulp. On a GPU without a
// choice of the compiler's whether to contract: the bits must not depend on where it is inlined.
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

JAX_DSV4_HD float max_or_nan(float x, float y) {
#ifdef __CUDA_ARCH__
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
  return result;
#else
  return x > y || x != x ? x : y;
#endif
}

// y + log(1 + x) of 0 <= x <= 1: a polynomial, within 2.7e-7, and within 1e-9 at x below 0.01,
// where a long window's tokens are; in the order that takes the fewest steps one after another.
JAX_DSV4_HD float add_log1p(float x, float y) {
  const float x2 = x * x;
  const float p01 = multiply_add(-0.49997699f, x, 0.99999984f);
  const float p23 = multiply_add(-0.24523585f, x, 0.33280173f);
  const float p45 = multiply_add(-0.10885792f, x, 0.17825505f);
  const float p67 = multiply_add(-0.0087833f, x, 0.04494445f);
  const float p = multiply_add(multiply_add(p67, x2, p45), x2 * x2, multiply_add(p23, x2, p01));
  return multiply_add(p, x, y);
}

// Of the rows of both. The mean moves from the heavier side towards the other: exact where one has
// no weight, and where both are equal. As in a softmax over the rows, a score of +inf gives NaN,
// and so does an infinite kv of weight 0. Little depends on the new logsumexp but the next one:
// from token to token that is all that has to wait.
JAX_DSV4_HD Prefix merge(const Prefix& a, const Prefix& b) {
  constexpr float kFar = 200.0f;  // exp(-kFar) is 0; also the distance from -inf to -inf
  const float difference = b.lse - a.lse, distance = std::fabs(difference);
  const float ratio = fast_exp(-(distance < kFar ? distance : kFar));  // of their weights
  const float high = max_or_nan(a.lse, b.lse);
  const float zero_or_nan = 0.0f * max_or_nan(high, -kMaxFloat);
  const float weight = fast_quotient(ratio, 1.0f + ratio) + zero_or_nan;  // of `light`
  const float heavy = difference > 0 ? b.mean : a.mean, light = difference > 0 ? a.mean : b.mean;
  const float step = light - heavy;
  const float mean = std::isfinite(step) ? multiply_add(step, weight, heavy)
                                         : multiply_add(light, weight, heavy * (1.0f - weight));
  return {add_log1p(ratio, high), mean};
}

// The value of a finished window.
JAX_DSV4_HD float value_of(const Prefix& window) {
  return window.lse == kNegInf ? 0.0f : window.mean;
}

}  // namespace jax_dsv4
