// The record of one value, made by one warp that holds it: norm, rotation, Hadamard transform,
// quantiser, and the bytes of the row. Nothing but shuffles between its lanes. Device code only.
#pragma once

#include <cstdint>

#include "numeric.h"
#include "record.h"
#include "vector.cuh"

namespace jax_dsv4 {

inline constexpr uint32_t kWholeWarp = ~0u;

// One record's row on its page.
struct RecordRow {
  uint8_t* data;
  uint8_t* scales;
  bool in_words_of_16;  // whether data may be stored 16 bytes at a time; else 4
};

// A lane holds kChannels channels of the value, side by side: lane 0 the first.
template <RecordFormat kFormat, int kHeadDim>
struct RecordStage {
  static constexpr int kChannels = kHeadDim / 32;
  static constexpr int kFirstRotated = (kHeadDim - kRopeDim) / kChannels;  // lane
  static_assert(kHeadDim % 64 == 0 && kChannels * (32 - kFirstRotated) == kRopeDim,
                "RecordStage: a lane holds whole pairs of rotated channels");
  using Layout = RecordLayout<kFormat, kHeadDim>;

  float x[kChannels];

  // What a lane needs of the weight and of the table, loaded before anything waits for it.
  struct Operands {
    float weight[kChannels];
    float cos[kChannels / 2], sin[kChannels / 2];
  };

  static __device__ __forceinline__ void load_weight(const float* weight, int lane, Operands& o) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) o.weight[k] = weight[lane * kChannels + k];
  }

  // `row`: of the table; only lanes that rotate load anything.
  static __device__ __forceinline__ void load_rotation(const float* row, bool interleaved, int lane,
                                                       Operands& o) {
    if (lane < kFirstRotated) return;
    const int first = (lane - kFirstRotated) * (kChannels / 2);  // of 32 pairs
#pragma unroll
    for (int i = 0; i < kChannels / 2; ++i) {
      o.cos[i] = row[interleaved ? 2 * (first + i) : first + i];
      o.sin[i] = row[interleaved ? 2 * (first + i) + 1 : kRopeDim / 2 + first + i];
    }
  }

  __device__ __forceinline__ void round_all() {
#pragma unroll
    for (float& value : x) value = to_bf16_and_back(value);
  }

  __device__ __forceinline__ void normalize(const Operands& o, float eps) {
    float sum = 0;
#pragma unroll
    for (float value : x) sum += value * value;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(kWholeWarp, sum, offset);
    }
    const float factor = 1.0f / sqrtf(sum / kHeadDim + eps);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) x[k] = x[k] * factor * o.weight[k];
  }

  __device__ __forceinline__ void rotate(const Operands& o, int lane) {
    if (lane < kFirstRotated) return;
#pragma unroll
    for (int i = 0; i < kChannels / 2; ++i) {
      const float even = x[2 * i], odd = x[2 * i + 1];
      x[2 * i] = even * o.cos[i] - odd * o.sin[i];
      x[2 * i + 1] = odd * o.cos[i] + even * o.sin[i];
    }
  }

  __device__ __forceinline__ void transform_hadamard(int lane) {
#pragma unroll
    for (int step = 1; step < kChannels; step *= 2) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        if ((k & step) != 0) continue;
        const float low = x[k], high = x[k + step];
        x[k] = low + high;
        x[k + step] = low - high;
      }
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
#pragma unroll
      for (float& value : x) {
        const float other = __shfl_xor_sync(kWholeWarp, value, step);
        value = (lane & step) != 0 ? other - value : value + other;
      }
    }
    const float factor = 1.0f / sqrtf(static_cast<float>(kHeadDim));
#pragma unroll
    for (float& value : x) value *= factor;
  }

  // All steps, in the order of the contract.
  __device__ __forceinline__ void finish(const Operands& o, bool has_norm, bool has_rotation,
                                         const RecordOptions& options, int lane, RecordRow row) {
    const bool round_each = options.rounding == Rounding::kModel;
    if (round_each) round_all();
    if (has_norm) {
      normalize(o, options.rms_norm_eps);
      if (round_each) round_all();
    }
    if (has_rotation) {
      rotate(o, lane);
      if (round_each) round_all();
    }
    if (options.hadamard) {
      transform_hadamard(lane);
      if (round_each) round_all();
    }
    if (kIsQuantized<kFormat> && options.rounding == Rounding::kOnce) round_all();
    store(options, lane, row);
  }

 private:
  // Stores a lane's words of data, which are kWords * 4 bytes.
  template <int kWords>
  static __device__ __forceinline__ void store_words(uint8_t* to, const uint32_t (&words)[kWords],
                                                     bool in_words_of_16) {
    if constexpr (kWords % 4 == 0) {
      if (in_words_of_16) {
#pragma unroll
        for (int i = 0; i < kWords; i += 4) {
          *reinterpret_cast<uint4*>(to + 4 * i) =
              make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
        }
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<uint32_t*>(to)[i] = words[i];
  }

  __device__ __forceinline__ void store_bf16(uint8_t* to, bool in_words_of_16) const {
    uint32_t words[kChannels / 2];
#pragma unroll
    for (int i = 0; i < kChannels / 2; ++i) {
      words[i] = round_to<bf16>(x[2 * i]).bits |
                 static_cast<uint32_t>(round_to<bf16>(x[2 * i + 1]).bits) << 16;
    }
    store_words(to, words, in_words_of_16);
  }

  __device__ __forceinline__ void store_e4m3(uint8_t* to, float factor, bool in_words_of_16) const {
    uint32_t words[kChannels / 4];
#pragma unroll
    for (int i = 0; i < kChannels / 4; ++i) {
      words[i] = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) words[i] |= to_e4m3(x[4 * i + k] * factor) << (8 * k);
    }
    store_words(to, words, in_words_of_16);
  }

  // The scale of the block that a lane's channels belong to.
  __device__ __forceinline__ BlockScale find_scale(const RecordOptions& options) const {
    constexpr int kLanes = Layout::kBlock / kChannels;
    float amax = least_amax<kFormat>(options);
#pragma unroll
    for (float value : x) amax = larger_magnitude(amax, value);
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      amax = fmaxf(amax, __shfl_xor_sync(kWholeWarp, amax, offset));
    }
    return scale_of<kFormat>(amax, options);
  }

  __device__ __forceinline__ void store(const RecordOptions& options, int lane,
                                        RecordRow row) const {
    using F = RecordFormat;
    if constexpr (kFormat == F::kF32) {
      uint32_t words[kChannels];
#pragma unroll
      for (int k = 0; k < kChannels; ++k) words[k] = bits_of(x[k]);
      store_words(row.data + lane * kChannels * 4, words, row.in_words_of_16);
    } else if constexpr (kFormat == F::kBf16) {
      store_bf16(row.data + lane * kChannels * 2, row.in_words_of_16);
    } else if constexpr (kFormat == F::kFp8) {
      store_e4m3(row.data + lane * kChannels, 1.0f, row.in_words_of_16);
    } else {
      constexpr int kLanes = Layout::kBlock / kChannels;
      const BlockScale scale = find_scale(options);
      const int block = lane / kLanes;
      const bool is_first = lane % kLanes == 0;
      if constexpr (kFormat == F::kFp8DsMla) {
        if (lane >= kFirstRotated) {
          const int first = (lane - kFirstRotated) * kChannels;
          store_bf16(row.data + kHeadDim - kRopeDim + 2 * first, row.in_words_of_16);
        } else {
          store_e4m3(row.data + lane * kChannels, scale.reciprocal, row.in_words_of_16);
        }
        if (is_first) row.scales[block] = lane >= kFirstRotated ? 0 : scale.exponent;
      } else if constexpr (kFormat == F::kFp8Block128) {
        store_e4m3(row.data + lane * kChannels, scale.reciprocal, row.in_words_of_16);
        if (is_first) {
          reinterpret_cast<uint32_t*>(row.scales)[block] = scale_word(scale, options.scales);
        }
      } else {
        uint32_t codes[kChannels / 2];  // a byte each
#pragma unroll
        for (int i = 0; i < kChannels / 2; ++i) {
          codes[i] = to_e2m1(divide_by_power_of_two(x[2 * i], scale.exponent)) |
                     to_e2m1(divide_by_power_of_two(x[2 * i + 1], scale.exponent)) << 4;
        }
        uint8_t* const to = row.data + lane * (kChannels / 2);
        if constexpr (kChannels % 8 == 0) {
          uint32_t words[kChannels / 8];
#pragma unroll
          for (int i = 0; i < kChannels / 8; ++i) {
            words[i] = codes[4 * i] | codes[4 * i + 1] << 8 | codes[4 * i + 2] << 16 |
                       codes[4 * i + 3] << 24;
          }
          store_words(to, words, row.in_words_of_16);
        } else {
          static_assert(kChannels == 4, "RecordStage: two bytes of a lane");
          *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(codes[0] | codes[1] << 8);
        }
        if (is_first) row.scales[block] = static_cast<uint8_t>(scale.exponent);
      }
    }
  }
};

}  // namespace jax_dsv4
