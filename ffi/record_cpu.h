// Making a record on a CPU: from a value to its bytes on a page.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "numeric.h"
#include "record.h"
#include "record_pool.h"
#include "vectorized.h"

namespace jax_dsv4 {

template <int D>
void round_all(float (&x)[D]) {
  for (float& value : x) value = to_bf16_and_back(value);
}

template <int D>
void normalize(float (&x)[D], const float* weight, float eps) {
  float squares[8] = {};  // side by side
  for (int c = 0; c < D; c += 8) {
    for (int k = 0; k < 8; ++k) squares[k] += x[c + k] * x[c + k];
  }
  float sum = 0;
  for (float square : squares) sum += square;
  const float factor = 1.0f / std::sqrt(sum / D + eps);
  for (int c = 0; c < D; ++c) x[c] = x[c] * factor * weight[c];
}

template <int D>
void rotate(float (&x)[D], const float* row, bool interleaved) {
  for (int i = 0; i < kRopeDim / 2; ++i) {
    const float cos = interleaved ? row[2 * i] : row[i];
    const float sin = interleaved ? row[2 * i + 1] : row[kRopeDim / 2 + i];
    float& even = x[D - kRopeDim + 2 * i];
    float& odd = x[D - kRopeDim + 2 * i + 1];
    const float rotated = even * cos - odd * sin;
    odd = odd * cos + even * sin;
    even = rotated;
  }
}

// The sums and differences of channels kStep apart, then of those 2 kStep apart, and so on.
template <int kStep, int D>
void add_and_subtract(float (&x)[D]) {
  for (int first = 0; first < D; first += 2 * kStep) {
    for (int c = first; c < first + kStep; ++c) {
      const float low = x[c], high = x[c + kStep];
      x[c] = low + high;
      x[c + kStep] = low - high;
    }
  }
  if constexpr (2 * kStep < D) add_and_subtract<2 * kStep>(x);
}

template <int D>
void transform_hadamard(float (&x)[D]) {
  add_and_subtract<1>(x);
  const float factor = 1.0f / std::sqrt(static_cast<float>(D));
  for (float& value : x) value *= factor;
}

// The largest magnitude; NaN counts for nothing. As integers: compilers vectorise their maximum.
template <int kCount>
float amax_of(const float* x, float least) {
  int32_t amax = bits_of(least);
  for (int c = 0; c < kCount; ++c) {
    const int32_t magnitude = bits_of(x[c]) & 0x7fffffffu;
    amax = std::max(amax, magnitude > 0x7f800000 ? 0 : magnitude);
  }
  return float_of(amax);
}

// The bytes of kCount channels and of their scales.
template <RecordFormat kFormat, int kCount>
void quantize(const float* x, const RecordOptions& options, uint8_t* data, uint8_t* scales) {
  constexpr int kBlock = RecordLayout<kFormat, kCount>::kBlock;
  for (int first = 0; first < kCount; first += kBlock) {
    const float amax = amax_of<kBlock>(x + first, least_amax<kFormat>(options));
    const BlockScale scale = scale_of<kFormat>(amax, options);
    if constexpr (kFormat == RecordFormat::kMxfp4) {
      float quotients[kBlock];
      if (scale.exponent < 105) {  // a denormal value may be more than nothing
        for (int c = 0; c < kBlock; ++c) {
          quotients[c] = divide_by_power_of_two(x[first + c], scale.exponent);
        }
      } else {
        for (int c = 0; c < kBlock; ++c) quotients[c] = x[first + c] * scale.reciprocal;
      }
      uint8_t codes[kBlock];
      for (int c = 0; c < kBlock; ++c) codes[c] = to_e2m1(quotients[c]);
      for (int c = 0; c < kBlock; c += 2) data[(first + c) / 2] = codes[c] | codes[c + 1] << 4;
    } else {
      for (int c = 0; c < kBlock; ++c) {
        data[first + c] = static_cast<uint8_t>(to_e4m3(x[first + c] * scale.reciprocal));
      }
    }
    if constexpr (kFormat == RecordFormat::kFp8Block128) {
      const uint32_t word = scale_word(scale, options.scales);
      std::memcpy(scales + first / kBlock * 4, &word, 4);
    } else {
      scales[first / kBlock] = static_cast<uint8_t>(scale.exponent);
    }
  }
}

template <RecordFormat kFormat, int D>
void encode(const float (&x)[D], const RecordOptions& options, uint8_t* data, uint8_t* scales) {
  const auto store_bf16 = [&](uint8_t* to, const float* from, int count) {
    for (int c = 0; c < count; ++c) {
      const bf16 value = round_to<bf16>(from[c]);
      std::memcpy(to + 2 * c, &value, 2);
    }
  };
  if constexpr (kFormat == RecordFormat::kF32) {
    std::memcpy(data, x, sizeof(x));
  } else if constexpr (kFormat == RecordFormat::kBf16) {
    store_bf16(data, x, D);
  } else if constexpr (kFormat == RecordFormat::kFp8) {
    for (int c = 0; c < D; ++c) data[c] = static_cast<uint8_t>(to_e4m3(x[c]));
  } else if constexpr (kFormat == RecordFormat::kFp8DsMla) {
    constexpr int kPlain = D - kRopeDim;
    quantize<kFormat, kPlain>(x, options, data, scales);
    store_bf16(data + kPlain, x + kPlain, kRopeDim);
    scales[kPlain / 64] = 0;
  } else {
    quantize<kFormat, D>(x, options, data, scales);
  }
}

// What of a record comes before the rotation, and what behind it.
template <int D>
void begin_record(float* value, const float* weight, const RecordOptions* options) {
  float (&x)[D] = *reinterpret_cast<float (*)[D]>(value);
  const bool round_each = options->rounding == Rounding::kModel;
  if (round_each) round_all(x);
  if (weight != nullptr) {
    normalize(x, weight, options->rms_norm_eps);
    if (round_each) round_all(x);
  }
}
template <RecordFormat kFormat, int D>
void end_record(float* value, const RecordOptions* options, RecordBytes row) {
  float (&x)[D] = *reinterpret_cast<float (*)[D]>(value);
  const bool round_each = options->rounding == Rounding::kModel;
  if (round_each) round_all(x);
  if (options->hadamard) {
    transform_hadamard(x);
    if (round_each) round_all(x);
  }
  if (kIsQuantized<kFormat> && options->rounding == Rounding::kOnce) round_all(x);
  encode<kFormat>(x, *options, row.data, row.scales);
}

// The record of `x`, which it works in. `weight` [D]: null: no norm; `rotation` [64]: the row of
// the table; null: none.
template <RecordFormat kFormat, int D>
void make_record(float (&x)[D], const float* weight, const float* rotation,
                 const RecordOptions& options, const RecordRow<RecordLayout<kFormat, D>>& row) {
  vectorized<begin_record<D>>(x + 0, weight, &options);
  // Not vectorised: with AVX-512, GCC 12 makes fused operations of it, whatever -ffp-contract says.
  if (rotation != nullptr) rotate(x, rotation, options.interleaved);
  vectorized<end_record<kFormat, D>>(x + 0, &options, RecordBytes(row));
}

}  // namespace jax_dsv4
