// The record of one value, made by the lanes of a warp that hold it: norm, rotation, Hadamard
// transform, quantiser, and the bytes of the row. Nothing but shuffles between them. Device code
// only.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "numeric.h"
#include "record.h"
#include "record_pool.h"
#include "vector.cuh"

namespace jax_dsv4 {

inline constexpr uint32_t kWholeWarp = ~0u;

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

// 1 / sqrt(x) for x >= 0, within an ulp: the chip's own, and one step of Newton's. That has no
// meaning for 0 and infinity.
__device__ __forceinline__ float inverse_root(float x) {
  float y;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  const float better = y * fmaf(-0.5f * x * y, y, 1.5f);
  return better == better ? better : y;
}

// A value is in kLanes lanes, which call everything together: of a warp, with the warp's others, or
// of whole warps, which meet at a barrier. A lane has four channels side by side of each group, and
// its neighbours the next ones: so every load and store is of neighbours. One group per lane takes
// the least time, four the fewest instructions.
template <int kHeadDim, int kValueLanes>
struct RecordStage {
  static constexpr int kLanes = kValueLanes;
  static constexpr int kWidth = 4 * kLanes;  // channels of a group
  static constexpr int kGroups = kHeadDim / kWidth;
  static constexpr int kWarpLanes = kLanes < 32 ? kLanes : 32;
  static constexpr int kWarps = kLanes / kWarpLanes;
  static_assert(32 % kWarpLanes == 0 && (kGroups == 1 || kGroups == 4) &&
                    (kWarps == 1 || kGroups == 1),
                "RecordStage: unknown lanes");
  // The last groups; of one that is wider than what is rotated, the last lanes.
  static constexpr int kRotated = kRopeDim > kWidth ? kRopeDim / kWidth : 1;

  // Of several warps, in shared memory.
  struct Exchange {
    float sums[kWarps];
    alignas(16) float values[kHeadDim];
  };

  int lane;  // of the value's
  float x[kGroups][4];

  __device__ __forceinline__ int channel(int group) const { return group * kWidth + 4 * lane; }

  // Evicted first: nobody reads a value again.
  __device__ __forceinline__ void load_value(const float* value) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const float4 part = __ldcs(reinterpret_cast<const float4*>(value + channel(j)));
      x[j][0] = part.x, x[j][1] = part.y, x[j][2] = part.z, x[j][3] = part.w;
    }
  }
  __device__ __forceinline__ void load_value(const bf16* value) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const uint2 part = __ldcs(reinterpret_cast<const uint2*>(value + channel(j)));
      x[j][0] = float_of(part.x << 16), x[j][1] = float_of(part.x & 0xffff0000u);
      x[j][2] = float_of(part.y << 16), x[j][3] = float_of(part.y & 0xffff0000u);
    }
  }

  __device__ __forceinline__ void take_value(const float* shared) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const auto part = load<float, 4>(shared + channel(j));
#pragma unroll
      for (int v = 0; v < 4; ++v) x[j][v] = part.x[v];
    }
  }

  // What a lane needs of the weight and of a row of the table, loaded before anything waits for it.
  struct Operands {
    Vector<float, 4> weight[kGroups];
    float cos[kRotated][2], sin[kRotated][2];
  };

  __device__ __forceinline__ void load_weight(const float* weight, Operands& o) const {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) o.weight[j] = load<float, 4>(weight + channel(j));
  }

  // `row`: of the table, 8-byte aligned. Lanes that rotate nothing load what others do.
  __device__ __forceinline__ void load_rotation(const float* row, bool interleaved,
                                                Operands& o) const {
#pragma unroll
    for (int g = 0; g < kRotated; ++g) {
      const int first = channel(kGroups - kRotated + g) % kRopeDim / 2;  // of 32 pairs
      const auto low = load<float, 2>(row + (interleaved ? 2 * first : first));
      const auto high = load<float, 2>(row + (interleaved ? 2 * first + 2 : first + kRopeDim / 2));
      set_rotation(low, high, interleaved, o, g);
    }
  }
  // Of cos, sin, cos, sin; or cos, cos and sin, sin.
  static __device__ __forceinline__ void set_rotation(const Vector<float, 2>& low,
                                                      const Vector<float, 2>& high,
                                                      bool interleaved, Operands& o, int g) {
    o.cos[g][0] = low.x[0], o.cos[g][1] = interleaved ? high.x[0] : low.x[1];
    o.sin[g][0] = interleaved ? low.x[1] : high.x[0], o.sin[g][1] = high.x[1];
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
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll
      for (int v = 0; v < 4; v += 2) {
        const uint32_t pair = to_bf16x2(x[j][v], x[j][v + 1]);
        x[j][v] = float_of(pair << 16), x[j][v + 1] = float_of(pair & 0xffff0000u);
      }
    }
  }

  static __device__ __forceinline__ void wait_for_warps() {
    constexpr int kBarrier = 15;
    wait_at_barrier<kLanes>(kBarrier);
  }

  __device__ __forceinline__ void normalize(const Operands& o, float eps, Exchange* exchange) {
    float sums[4] = {};  // side by side
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll
      for (int v = 0; v < 4; ++v) sums[v] += x[j][v] * x[j][v];
    }
    float sum = sums[0] + sums[1] + (sums[2] + sums[3]);
#pragma unroll
    for (int offset = kWarpLanes / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(kWholeWarp, sum, offset);
    }
    if constexpr (kWarps > 1) {
      if (lane % 32 == 0) exchange->sums[lane / 32] = sum;
      wait_for_warps();
      sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += exchange->sums[w];
    }
    const float factor = inverse_root(sum / kHeadDim + eps);
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll
      for (int v = 0; v < 4; ++v) x[j][v] = x[j][v] * factor * o.weight[j].x[v];
    }
  }

  __device__ __forceinline__ void rotate(const Operands& o) {
    if (channel(kGroups - kRotated) < kHeadDim - kRopeDim) return;
#pragma unroll
    for (int g = 0; g < kRotated; ++g) {
      float (&group)[4] = x[kGroups - kRotated + g];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float even = group[2 * i], odd = group[2 * i + 1];
        group[2 * i] = even * o.cos[g][i] - odd * o.sin[g][i];
        group[2 * i + 1] = odd * o.cos[g][i] + even * o.sin[g][i];
      }
    }
  }

  __device__ __forceinline__ void transform_hadamard(Exchange* exchange) {
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
    for (int step = kLanes / 2; step >= 32; step /= 2) {
      const float sign = (lane & step) != 0 ? -1.0f : 1.0f;
      float* const values = exchange->values;
      wait_for_warps();  // for whoever reads what was here before
      jax_dsv4::store(values + 4 * lane, Vector<float, 4>{x[0][0], x[0][1], x[0][2], x[0][3]});
      wait_for_warps();
      const auto other = load<float, 4>(values + 4 * (lane ^ step));
#pragma unroll
      for (int v = 0; v < 4; ++v) x[0][v] = fmaf(x[0][v], sign, other.x[v]);
    }
#pragma unroll
    for (int step = kWarpLanes / 2; step > 0; step /= 2) {
      const float sign = (lane & step) != 0 ? -1.0f : 1.0f;
      for_each([&](float& value) {
        value = fmaf(value, sign, __shfl_xor_sync(kWholeWarp, value, step));
      });
    }
    if constexpr (kGroups == 4) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        butterfly(x[0][v], x[1][v]), butterfly(x[2][v], x[3][v]);
        butterfly(x[0][v], x[2][v]), butterfly(x[1][v], x[3][v]);
      }
    }
    const float factor = 1.0f / sqrtf(static_cast<float>(kHeadDim));
    for_each([&](float& value) { value *= factor; });
  }

  // From a value to what is quantised, in the order of the contract. `round_each`: after each step,
  // as the model does. `rounds_last`: a quantised format.
  template <bool kMayBeHadamard = true>
  __device__ __forceinline__ void transform(const Operands& o, bool has_norm, bool has_rotation,
                                            const RecordOptions& options, bool round_each,
                                            bool rounds_last, Exchange* exchange = nullptr) {
    if (round_each) round_all();
    if (has_norm) {
      normalize(o, options.rms_norm_eps, exchange);
      if (round_each) round_all();
    }
    if (has_rotation) {
      rotate(o);
      if (round_each) round_all();
    }
    if (kMayBeHadamard && options.hadamard) {
      transform_hadamard(exchange);
      if (round_each) round_all();
    }
    if (rounds_last && options.rounding == Rounding::kOnce) round_all();
  }

  // The quantiser and the bytes of the row. Nothing is stored unless the row exists;
  // `is_16b_aligned`: of its data, else 4 bytes, as of its scales.
  template <RecordFormat kFormat>
  __device__ __forceinline__ void store(const RecordOptions& options, bool exists,
                                        const RecordBytes& row, bool is_16b_aligned) const {
    using F = RecordFormat;
    using Layout = RecordLayout<kFormat, kHeadDim>;
    float amax[kGroups];
    if constexpr (Layout::kBlock > 0) find_amax<kFormat>(options, amax);
    if (!exists) return;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const int first = channel(j);
      if constexpr (kFormat == F::kF32) {
        const uint32_t words[4] = {bits_of(x[j][0]), bits_of(x[j][1]), bits_of(x[j][2]),
                                   bits_of(x[j][3])};
        store_words(row.data + 4 * first, words, is_16b_aligned);
      } else if constexpr (kFormat == F::kBf16) {
        store_bf16(row.data + 2 * first, x[j], is_16b_aligned);
      } else if constexpr (kFormat == F::kFp8) {
        store_words<1>(row.data + first, {to_e4m3x4(x[j], 1.0f)}, true);
      } else {
        const BlockScale scale = scale_of<kFormat>(amax[j], options);
        const bool is_first = first % Layout::kBlock == 0;
        const int block = first / Layout::kBlock;
        if constexpr (kFormat == F::kFp8DsMla) {
          constexpr int kPlain = kHeadDim - kRopeDim;
          const bool is_plain = first < kPlain;
          if (is_first) row.scales[block] = is_plain ? scale.exponent : 0;
          if (is_plain) {
            store_words<1>(row.data + first, {to_e4m3x4(x[j], scale.reciprocal)}, true);
          } else {
            store_bf16(row.data + kPlain + 2 * (first - kPlain), x[j], is_16b_aligned);
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

  // The maximum of magnitudes over so many lanes side by side. As integers they are in the same
  // order; and of a warp or its halves the chip finds that in fewer steps than there are shuffles.
  template <int kBlockLanes>
  __device__ __forceinline__ float max_of_lanes(float x) const {
    static_assert(kBlockLanes <= 32, "RecordStage: a block in several warps");
    if constexpr (kBlockLanes == 32) {
      return float_of(__reduce_max_sync(kWholeWarp, bits_of(x)));
    } else if constexpr (kBlockLanes == 16) {
      const bool is_high = (lane & kBlockLanes) != 0;
      const uint32_t low = __reduce_max_sync(kWholeWarp, is_high ? 0 : bits_of(x));
      const uint32_t high = __reduce_max_sync(kWholeWarp, is_high ? bits_of(x) : 0);
      return float_of(is_high ? high : low);
    } else {
#pragma unroll
      for (int offset = kBlockLanes / 2; offset > 0; offset /= 2) {
        x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, offset));
      }
      return x;
    }
  }

  // The largest magnitude of the block that each group of a lane belongs to; NaN counts for
  // nothing.
  template <RecordFormat kFormat>
  __device__ __forceinline__ void find_amax(const RecordOptions& options,
                                            float (&amax)[kGroups]) const {
    using Layout = RecordLayout<kFormat, kHeadDim>;
    constexpr bool kIsWhole = Layout::kBlock > kWidth;  // all groups are one block
    static_assert(!kIsWhole || Layout::kBlock == kHeadDim, "RecordStage: blocks of groups");
    constexpr int kBlocks = kIsWhole ? 1 : kGroups;
    constexpr int kBlockLanes = kIsWhole ? kLanes : Layout::kBlock / 4;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      float& largest = amax[kIsWhole ? 0 : j];
      if (j < kBlocks) largest = least_amax<kFormat>(options);
#pragma unroll
      for (int v = 0; v < 4; ++v) largest = fmaxf(largest, fabsf(x[j][v]));
    }
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) amax[j] = max_of_lanes<kBlockLanes>(amax[j]);
#pragma unroll
    for (int j = kBlocks; j < kGroups; ++j) amax[j] = amax[0];
  }
};

}  // namespace jax_dsv4
