// Conversions between the element types and f32, on host and device. Rounding is to nearest even.
#pragma once

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

}  // namespace jax_dsv4
