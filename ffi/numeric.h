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

// A maximum to subtract: with nothing but -inf below it, every weight is exp(-inf) = 0, not NaN.
JAX_DSV4_HD float finite_or_zero(float max) { return max == kNegInf ? 0.0f : max; }

// Some rows of a window, in one channel: the logsumexp of their scores, and the mean of their kv
// weighted by softmax. Of one row: its score and kv; of none: -inf and 0.
struct Prefix {
  float lse = kNegInf;
  float mean = 0.0f;
};

// Of the rows of both. The mean moves from the heavier side towards the other: exact where one has
// no weight, and where both are equal. As in a softmax over the rows, a score of +inf gives NaN,
// and so does an infinite kv of weight 0.
JAX_DSV4_HD Prefix merge(const Prefix& a, const Prefix& b) {
  const bool swap = b.lse > a.lse;
  const float high = swap ? b.lse : a.lse, low = swap ? a.lse : b.lse;
  const float heavy = swap ? b.mean : a.mean, light = swap ? a.mean : b.mean;
  const float ratio = std::exp(low - finite_or_zero(high));  // of their weights: at most 1
  const float weight = high == -kNegInf ? NAN : ratio / (1.0f + ratio);  // of `light`
  const float step = light - heavy;
  const float mean =
      std::isfinite(step) ? heavy + step * weight : heavy * (1.0f - weight) + light * weight;
  return {high + std::log1p(ratio), mean};
}

// The value of a finished window.
JAX_DSV4_HD float value_of(const Prefix& window) {
  return window.lse == kNegInf ? 0.0f : window.mean;
}

}  // namespace jax_dsv4
