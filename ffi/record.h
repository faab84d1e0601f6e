// A record: how it lies on a page, and its arithmetic, scalar, on host and device. All bits are
// those of IEEE arithmetic, rounded to nearest even, whatever a thread does with denormal numbers.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#include <cuda_fp8.h>
#endif

#include "config.h"
#include "numeric.h"

namespace jax_dsv4 {

// By value of the attribute.
enum class RecordFormat : uint8_t { kF32, kBf16, kFp8, kFp8DsMla, kFp8Block128, kMxfp4 };
enum class Scales : uint8_t { kF32, kPowerOfTwo, kUe8m0 };  // of kFp8Block128
enum class Rounding : uint8_t { kNone, kOnce, kModel };     // what is rounded to bf16
inline constexpr const char* kRecordFormatNames[] = {"f32",        "bf16",         "fp8",
                                                     "fp8_ds_mla", "fp8_block128", "mxfp4"};

inline constexpr int kRopeDim = 64;  // the last channels, which are rotated

// Of one record, in bytes. All data of a page come first, then all scales.
template <RecordFormat kFormat, int kHeadDim>
struct RecordLayout {
  static constexpr int kData = kFormat == RecordFormat::kF32        ? 4 * kHeadDim
                               : kFormat == RecordFormat::kBf16     ? 2 * kHeadDim
                               : kFormat == RecordFormat::kMxfp4    ? kHeadDim / 2
                               : kFormat == RecordFormat::kFp8DsMla ? kHeadDim + kRopeDim
                                                                    : kHeadDim;
  static constexpr int kScales = kFormat == RecordFormat::kFp8DsMla      ? 8
                                 : kFormat == RecordFormat::kFp8Block128 ? kHeadDim / 128 * 4
                                 : kFormat == RecordFormat::kMxfp4       ? kHeadDim / 32
                                                                         : 0;
  // Channels of a scale; none in the other formats.
  static constexpr int kBlock = kFormat == RecordFormat::kFp8DsMla      ? 64
                                : kFormat == RecordFormat::kFp8Block128 ? 128
                                : kFormat == RecordFormat::kMxfp4       ? 32
                                                                        : 0;
};

// What a compressor does with a value before it is stored.
struct RecordOptions {
  float rms_norm_eps;
  bool interleaved;  // a row of the table: cosine, sine, cosine, ...; else 32 cosines, 32 sines
  bool hadamard;
  bool scale_floor;  // of kFp8DsMla: the scale is floored, instead of amax
  Scales scales;
  Rounding rounding;
};

JAX_DSV4_HD bool is_nan(float x) { return (bits_of(x) & 0x7fffffffu) > 0x7f800000u; }
JAX_DSV4_HD float to_bf16_and_back(float x) { return to_f32(round_to<bf16>(x)); }

// x / 448, correctly rounded, where the quotient is normal (Markstein, 1990: the residual of a
// product with the rounded reciprocal is exact, and its own product corrects the last place).
JAX_DSV4_HD float quotient_by_448(float x) {
#ifdef __CUDA_ARCH__
  constexpr float kReciprocal = 1.0f / 448.0f;
  const float quotient = x * kReciprocal;
  return fmaf(fmaf(-quotient, 448.0f, x), kReciprocal, quotient);
#else
  return x / 448.0f;
#endif
}

JAX_DSV4_HD float exact_reciprocal(float x) {
#ifdef __CUDA_ARCH__
  return __frcp_rn(x);
#else
  return 1.0f / x;
#endif
}

// The code of a small float: saturating, sign kept; of NaN that of the largest. Magnitudes are
// compared as signed integers, and nothing branches: so compilers vectorise it, for SSE2 too.
template <int kMantissaBits, int kBias, int kSignBit>
JAX_DSV4_HD uint32_t to_small_float(float x, float largest) {
  constexpr int kDropped = 23 - kMantissaBits;
  constexpr int32_t kLeast = (128 - kBias) << 23;  // the smallest normal number
  const int32_t magnitude = bits_of(x) & 0x7fffffffu, most = bits_of(largest);
  const int32_t clamped = magnitude < most ? magnitude : most;
  const int32_t own = clamped & 0x7f800000, exponent = own > kLeast ? own : kLeast;
  // So large that its last place is a step between codes at this exponent: a sum is whole steps.
  const int32_t large = exponent + (kDropped << 23);
  const int32_t steps = bits_of(float_of(clamped) + float_of(large)) - large;
  const uint32_t code = steps + ((exponent - kLeast) >> kDropped);
  return code | (bits_of(x) >> 31 << kSignBit);
}

inline constexpr float kMaxE4m3 = 448.0f, kMaxE2m1 = 6.0f;

JAX_DSV4_HD uint32_t to_e4m3(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
#else
  return to_small_float<3, 7, 7>(x, kMaxE4m3) | is_nan(x);  // 0x7f; the largest is 0x7e
#endif
}

// NaN has no code: it becomes the largest number, whatever its sign.
JAX_DSV4_HD uint32_t to_e2m1(float x) {
  return to_small_float<1, 1, 3>(x, kMaxE2m1) & ~(static_cast<uint32_t>(is_nan(x)) << 3);
}

// The biased exponent of the smallest power of two that is not below amax / kLargest, rounded to
// f32. No quotient above a power of two rounds down to it: the least is larger by 2^-23 / 1.75.
template <RecordFormat kFormat>
JAX_DSV4_HD int32_t exponent_above(float amax) {
  constexpr bool kIsMxfp4 = kFormat == RecordFormat::kMxfp4;
  constexpr int32_t kMantissa =
      kIsMxfp4 ? 0x400000 : 0x600000;  // of 6 = 1.5 * 2^2, 448 = 1.75 * 2^8
  return ((static_cast<int32_t>(bits_of(amax)) + 0x7fffff - kMantissa) >> 23) - (kIsMxfp4 ? 2 : 8);
}

// 2^(exponent - 127), for 1 to 254.
JAX_DSV4_HD float power_of_two(uint32_t exponent) { return float_of(exponent << 23); }

// x / 2^(exponent - 127), exactly where the quotient is normal: denormal x counts on every thread.
JAX_DSV4_HD float divide_by_power_of_two(float x, uint32_t exponent) {
#ifndef __CUDA_ARCH__
  const uint32_t bits = bits_of(x);
  if ((bits >> 23 & 0xff) == 0) {
    // Of its last place, 2^-149, whole multiples.
    const float mantissa = static_cast<float>(bits & 0x7fffffu);
    const float quotient = exponent < 105 ? mantissa * power_of_two(105 - exponent) : 0.0f;
    return float_of(bits_of(quotient) | (bits & 0x80000000u));
  }
#endif
  return x * power_of_two(254 - exponent);
}

// The scale of a block whose largest magnitude is `amax`; infinity counts for the largest f32.
struct BlockScale {
  uint32_t exponent;  // of a power of two, biased
  float scale;
  float reciprocal;
};

template <RecordFormat kFormat>
inline constexpr bool kIsQuantized =
    kFormat != RecordFormat::kF32 && kFormat != RecordFormat::kBf16;

// What amax is at least.
template <RecordFormat kFormat>
JAX_DSV4_HD float least_amax(const RecordOptions& options) {
  if (kFormat == RecordFormat::kMxfp4) return float_of(0x01c00000);  // 6 * 2^-126
  return options.scale_floor ? 0.0f : 1e-4f;
}

template <RecordFormat kFormat>
JAX_DSV4_HD BlockScale scale_of(float amax, const RecordOptions& options) {
  amax = amax < kMaxFloat ? amax : kMaxFloat;
  if (kFormat == RecordFormat::kFp8Block128 && options.scales == Scales::kF32) {
    static_assert(kMaxE4m3 == 448.0f, "the scale's divisor");
    const float scale = quotient_by_448(amax);
    return {0, scale, exact_reciprocal(scale)};
  }
  constexpr int32_t kLeastExponent = 127 - 13;
  int32_t exponent = exponent_above<kFormat>(amax);
  if (options.scale_floor && exponent < kLeastExponent) exponent = kLeastExponent;
  const auto e = static_cast<uint32_t>(exponent);
  return {e, power_of_two(e), power_of_two(254 - e)};
}

// The four bytes of a scale of kFp8Block128.
JAX_DSV4_HD uint32_t scale_word(const BlockScale& scale, Scales scales) {
  return scales == Scales::kUe8m0 ? scale.exponent * 0x01010101u : bits_of(scale.scale);
}

// ------------------------------------------------------------------------------------- readers

template <int kMantissaBits, int kBias, int kSignBit>
JAX_DSV4_HD float from_small_float(uint32_t code) {
  const uint32_t magnitude = code & ((1u << kSignBit) - 1);
  const float normal =
      float_of((magnitude << (23 - kMantissaBits)) + (uint32_t{127 - kBias} << 23));
  // Below the smallest normal number codes are multiples of the smallest number.
  const float subnormal = static_cast<float>(magnitude) * power_of_two(128 - kBias - kMantissaBits);
  const float value = magnitude < (1u << kMantissaBits) ? subnormal : normal;
  return float_of(bits_of(value) | (code >> kSignBit & 1) << 31);
}

JAX_DSV4_HD float from_e4m3(uint32_t code) {
  const float value = from_small_float<3, 7, 7>(code);
  return (code & 0x7f) == 0x7f ? float_of(0x7fc00000) : value;
}

// Times 2^(exponent - 127).
JAX_DSV4_HD float from_e2m1(uint32_t code, uint32_t exponent) {
  // The only product that is denormal, for which arithmetic may take 0: half of 2^-126.
  if (exponent == 1 && (code & 7) == 1) return float_of(0x400000 | (code & 8) << 28);
  return from_small_float<1, 1, 3>(code) * power_of_two(exponent);
}

JAX_DSV4_HD uint32_t load_word(const uint8_t* from) {  // 4-byte aligned
#ifdef __CUDA_ARCH__
  return *reinterpret_cast<const uint32_t*>(from);
#else
  uint32_t word;
  std::memcpy(&word, from, sizeof(word));
  return word;
#endif
}

// Channels `first` to `first` + 3, where `first` is a multiple of 4, of a record whose data and
// scales these are.
template <RecordFormat kFormat, int kHeadDim>
JAX_DSV4_HD void read_channels(const uint8_t* data, const uint8_t* scales, Scales kind, int first,
                               float* x) {
  using F = RecordFormat;
  constexpr int kPlain = kFormat == F::kFp8DsMla ? kHeadDim - kRopeDim : kHeadDim;
  if (kFormat == F::kF32) {
    for (int v = 0; v < 4; ++v) x[v] = float_of(load_word(data + 4 * (first + v)));
  } else if (kFormat == F::kBf16 || first >= kPlain) {
    const uint8_t* const from =
        kFormat == F::kBf16 ? data + 2 * first : data + kPlain + 2 * (first - kPlain);
    for (int v = 0; v < 4; v += 2) {
      const uint32_t pair = load_word(from + 2 * v);
      x[v] = float_of(pair << 16), x[v + 1] = float_of(pair & 0xffff0000u);
    }
  } else if (kFormat == F::kMxfp4) {
    const uint32_t exponent = scales[first / 32];
    const uint32_t codes = data[first / 2] | data[first / 2 + 1] << 8;
    for (int v = 0; v < 4; ++v) x[v] = from_e2m1(codes >> 4 * v & 15, exponent);
  } else {
    float scale = 1.0f;
    if (kFormat == F::kFp8DsMla) scale = power_of_two(scales[first / 64]);
    if (kFormat == F::kFp8Block128) {
      const uint32_t word = load_word(scales + first / 128 * 4);
      scale = kind == Scales::kUe8m0 ? power_of_two(word & 0xff) : float_of(word);
    }
    const uint32_t codes = load_word(data + first);
    for (int v = 0; v < 4; ++v) x[v] = from_e4m3(codes >> 8 * v & 0xff) * scale;
  }
}

}  // namespace jax_dsv4
