// The record of one value, made by one warp that holds it: norm, rotation, Hadamard transform,
// quantiser, and the bytes of the row. Nothing but shuffles between its lanes. Device code only.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "numeric.h"
#include "record.h"
#include "vector.cuh"

namespace jax_dsv4 {

inline constexpr uint32_t kWholeWarp = ~0u;

// One record's row on its page.
struct RecordRow {
  bool exists;          // else nothing is stored
  bool is_16b_aligned;  // data; else, as scales, 4 bytes
  uint8_t* data;
  uint8_t* scales;
};

__device__ __forceinline__ uint32_t to_bf16x2(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ uint32_t to_e4m3x4(const float (&x)[4], float factor) {
#if __CUDA_ARCH__ >= 890
  const auto pair = [&](float low, float high) -> uint32_t {
    const float2 scaled = make_float2(low * factor, high * factor);
    return __nv_cvt_float2_to_fp8x2(scaled, __NV_SATFINITE, __NV_E4M3);
  };
  return pair(x[0], x[1]) | pair(x[2], x[3]) << 16;
#else
  uint32_t word = 0;
  for (int v = 0; v < 4; ++v) word |= to_e4m3(x[v] * factor) << 8 * v;
  return word;
#endif
}

// Four channels side by side in each lane, 128 in a warp; group j of them starts at channel 128 j.
// So every load and store of a warp is of neighbours.
template <RecordFormat kFormat, int kHeadDim>
struct RecordStage {
  static constexpr int kGroups = kHeadDim / 128;
  static_assert(kHeadDim == 128 || kHeadDim == 512, "RecordStage: one group of channels, or four");
  static constexpr int kFirstRotated = 16;  // lane, of the last group
  using Layout = RecordLayout<kFormat, kHeadDim>;

  float x[kGroups][4];

  template <class Element>
  __device__ __forceinline__ void load_value(const Element* value, int lane) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const auto part = load<Element, 4>(value + j * 128 + lane * 4);
#pragma unroll
      for (int v = 0; v < 4; ++v) x[j][v] = to_f32(part.x[v]);
    }
  }

  // What a lane needs of the weight and of the table, loaded before anything waits for it.
  struct Operands {
    Vector<float, 4> weight[kGroups];
    float cos[2], sin[2];
  };

  static __device__ __forceinline__ void load_weight(const float* weight, int lane, Operands& o) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) o.weight[j] = load<float, 4>(weight + j * 128 + lane * 4);
  }

  // `row`: of the table, 8-byte aligned; both halves of the warp load the same pairs.
  static __device__ __forceinline__ void load_rotation(const float* row, bool interleaved, int lane,
                                                       Operands& o) {
    const int first = lane % 16 * 2;  // of 32 pairs
    const auto low = load<float, 2>(row + (interleaved ? 2 * first : first));
    const auto high = load<float, 2>(row + (interleaved ? 2 * first + 2 : first + kRopeDim / 2));
    o.cos[0] = low.x[0], o.cos[1] = interleaved ? high.x[0] : low.x[1];
    o.sin[0] = interleaved ? low.x[1] : high.x[0], o.sin[1] = high.x[1];
  }

  template <class Visit>
  __device__ __forceinline__ void for_each(Visit&& visit) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll
      for (int v = 0; v < 4; ++v) visit(x[j][v]);
    }
  }

  __device__ __forceinline__ void round_all() {
    for_each([](float& value) { value = to_bf16_and_back(value); });
  }

  __device__ __forceinline__ void normalize(const Operands& o, float eps) {
    float sums[4] = {};  // side by side
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll
      for (int v = 0; v < 4; ++v) sums[v] += x[j][v] * x[j][v];
    }
    float sum = sums[0] + sums[1] + (sums[2] + sums[3]);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(kWholeWarp, sum, offset);
    }
    const float factor = __frsqrt_rn(sum / kHeadDim + eps);
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll
      for (int v = 0; v < 4; ++v) x[j][v] = x[j][v] * factor * o.weight[j].x[v];
    }
  }

  __device__ __forceinline__ void rotate(const Operands& o, int lane) {
    if (lane < kFirstRotated) return;
    float (&last)[4] = x[kGroups - 1];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float even = last[2 * i], odd = last[2 * i + 1];
      last[2 * i] = even * o.cos[i] - odd * o.sin[i];
      last[2 * i + 1] = odd * o.cos[i] + even * o.sin[i];
    }
  }

  __device__ __forceinline__ void transform_hadamard(int lane) {
    const auto butterfly = [](float& low, float& high) {
      const float sum = low + high;
      high = low - high;
      low = sum;
    };
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      butterfly(x[j][0], x[j][1]), butterfly(x[j][2], x[j][3]);
      butterfly(x[j][0], x[j][2]), butterfly(x[j][1], x[j][3]);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const float sign = (lane & step) != 0 ? -1.0f : 1.0f;
      for_each([&](float& value) {
        value = fmaf(value, sign, __shfl_xor_sync(kWholeWarp, value, step));
      });
    }
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      if constexpr (kGroups == 4) {
        butterfly(x[0][v], x[1][v]), butterfly(x[2][v], x[3][v]);
        butterfly(x[0][v], x[2][v]), butterfly(x[1][v], x[3][v]);
      }
    }
    const float factor = 1.0f / sqrtf(static_cast<float>(kHeadDim));
    for_each([&](float& value) { value *= factor; });
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
    if (kFormat != RecordFormat::kFp8DsMla && options.hadamard) {
      transform_hadamard(lane);
      if (round_each) round_all();
    }
    if (kIsQuantized<kFormat> && options.rounding == Rounding::kOnce) round_all();
    store(options, lane, row);
  }

 private:
  // Stores a lane's words, which are side by side.
  template <int kWords>
  static __device__ __forceinline__ void store_words(uint8_t* to, const uint32_t (&words)[kWords],
                                                     bool together) {
    if (kWords > 1 && together) {
      Vector<uint32_t, kWords> vector;
#pragma unroll
      for (int i = 0; i < kWords; ++i) vector.x[i] = words[i];
      jax_dsv4::store(reinterpret_cast<uint32_t*>(to), vector);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) reinterpret_cast<uint32_t*>(to)[i] = words[i];
    }
  }

  static __device__ __forceinline__ void store_bf16(uint8_t* to, const float (&group)[4],
                                                    bool together) {
    store_words<2>(to, {to_bf16x2(group[0], group[1]), to_bf16x2(group[2], group[3])}, together);
  }

  // The largest magnitude of a lane's block of each group.
  __device__ __forceinline__ void find_amax(const RecordOptions& options,
                                            float (&amax)[kGroups]) const {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      amax[j] = least_amax<kFormat>(options);
#pragma unroll
      for (int v = 0; v < 4; ++v) amax[j] = larger_magnitude(amax[j], x[j][v]);
    }
#pragma unroll
    for (int offset = Layout::kBlock / 8; offset > 0; offset /= 2) {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        amax[j] = fmaxf(amax[j], __shfl_xor_sync(kWholeWarp, amax[j], offset));
      }
    }
  }

  __device__ __forceinline__ void store(const RecordOptions& options, int lane,
                                        RecordRow row) const {
    using F = RecordFormat;
    float amax[kGroups];
    if constexpr (Layout::kBlock > 0) find_amax(options, amax);
    if (!row.exists) return;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const int first = j * 128 + lane * 4;  // channel
      if constexpr (kFormat == F::kF32) {
        const uint32_t words[4] = {bits_of(x[j][0]), bits_of(x[j][1]), bits_of(x[j][2]),
                                   bits_of(x[j][3])};
        store_words(row.data + 4 * first, words, row.is_16b_aligned);
      } else if constexpr (kFormat == F::kBf16) {
        store_bf16(row.data + 2 * first, x[j], row.is_16b_aligned);
      } else if constexpr (kFormat == F::kFp8) {
        store_words<1>(row.data + first, {to_e4m3x4(x[j], 1.0f)}, true);
      } else {
        const BlockScale scale = scale_of<kFormat>(amax[j], options);
        const bool is_first = lane % (Layout::kBlock / 4) == 0;
        const int block = first / Layout::kBlock;
        if constexpr (kFormat == F::kFp8DsMla) {
          constexpr int kPlain = kHeadDim - kRopeDim;
          const bool is_plain = first < kPlain;
          if (is_first) row.scales[block] = is_plain ? scale.exponent : 0;
          if (is_plain) {
            store_words<1>(row.data + first, {to_e4m3x4(x[j], scale.reciprocal)}, true);
          } else {
            store_bf16(row.data + kPlain + 2 * (first - kPlain), x[j], row.is_16b_aligned);
          }
        } else if constexpr (kFormat == F::kFp8Block128) {
          if (is_first) {
            reinterpret_cast<uint32_t*>(row.scales)[block] = scale_word(scale, options.scales);
          }
          store_words<1>(row.data + first, {to_e4m3x4(x[j], scale.reciprocal)}, true);
        } else {
          if (is_first) row.scales[block] = static_cast<uint8_t>(scale.exponent);
          uint32_t codes = 0;
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            codes |= to_e2m1(divide_by_power_of_two(x[j][v], scale.exponent)) << 4 * v;
          }
          *reinterpret_cast<uint16_t*>(row.data + first / 2) = static_cast<uint16_t>(codes);
        }
      }
    }
  }
};

}  // namespace jax_dsv4
