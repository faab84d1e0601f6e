// The decode operation on a state of prefixes (numeric.h), on an NVIDIA GPU: device code only.
//
// A step is one chain, kv_len -> page -> row before the step -> new rows, on few threads: what
// counts is the number of instructions on it, and what does not depend on a link of it is done
// while the link is on its way. The lanes of a warp look up all of its rows with one lookup, a row
// each.
// Bytes: 2 S per request for the row before the step, and S more where windows overlap; 4 S per new
// row (half of it read), elements; nothing more where a window is completed.
//
// Two kernels, for few requests and for many. A thread of theirs has one column of D, or two, of
// both halves where windows overlap, and merges in the order of the rows; but in the first the new
// rows of a window are merged before the row before the step is there, which rounds differently.

#pragma once

#include <cstdint>

#include "config.h"
#include "decode.cuh"
#include "decode.h"
#include "numeric.h"
#include "paging.h"

namespace jax_dsv4 {

// *from, or `otherwise`, without a branch: a branch is a point at which the compiler has everything
// wait that was loaded before it.
template <class T>
__device__ __forceinline__ T load_if(bool condition, const T* from, T otherwise) {
  static_assert(sizeof(T) == 4);
  union {
    T value;
    uint32_t bits;
  } u{otherwise};
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.b32 %0, [%1]; }"
               : "+r"(u.bits)
               : "l"(from), "r"(static_cast<int>(condition)));
  return u.value;
}

// look_up where `wanted`; elsewhere a page that does not exist.
__device__ __forceinline__ TableEntry look_up_if(bool wanted, const Paging& paging,
                                                 const int32_t* table, int32_t position) {
  const uint32_t n = static_cast<uint32_t>(position);
  const uint32_t page = n / paging.page_size;
  return {static_cast<uint32_t>(load_if(wanted && page < paging.max_pages, table + page, -1)),
          n - page * paging.page_size.value};
}

// A base address that the compiler leaves whole: row * S elements on is then one instruction.
template <class T>
__device__ __forceinline__ T* opaque(T* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

// Of row t; where there is no such row, it may have wrapped around.
template <class Config>
__device__ __forceinline__ int position_of(const Request<Config>& r, int t) {
  return static_cast<int>(static_cast<uint32_t>(r.first_position) + t);
}

// Grid: x = requests x column slices, z = groups. A warp per token, 32 columns: for up to kTokens
// new rows, and for few requests, since later tokens merge what earlier ones have merged already.
template <class Config>
struct PrefixTokenTile {
  static constexpr int kTokens = 4;
  static constexpr int kSlices = Config::kHeadDim / 32;
  static_assert(kTokens <= Config::kRatio);  // one window is completed, at most
};

template <class Config>
__global__ void __launch_bounds__(32 * PrefixTokenTile<Config>::kTokens, 1)
    prefix_token_kernel(const __grid_constant__ DecodeParams p) {
  using T = PrefixTokenTile<Config>;
  using Out = typename Config::Out;
  constexpr int R = Config::kRatio, S = Config::kStateDim, D = Config::kHeadDim;
  constexpr int kHalves = S / D, kTokens = T::kTokens;

  const uint32_t index = blockIdx.x / T::kSlices;
  const int lane = threadIdx.x % 32, t = threadIdx.x / 32;
  const int column = blockIdx.x % T::kSlices * 32 + lane;
  prefetch_tables(p, blockIdx.z, index);
  const Request<Config> r = request_at<Config>(p, blockIdx.z, index);
  const int start = max(r.first_position, 0);  // of the first token that is stored
  const int token = position_of(r, t);
  const int begin = token & -R;  // of its window
  // Lane j looks up the row of token j, and two lanes the rows before the step: the one before
  // `start`, if of this token's window; where windows overlap, the last of the window before.
  int position = position_of(r, lane);
  bool wanted = lane < r.num_new && lane < kTokens;
  if (lane == kTokens) position = start - 1, wanted = begin < start;
  if (Config::kOverlap && lane == kTokens + 1) position = begin - 1, wanted = true;
  wanted = wanted && position >= 0;
  const TableEntry kv_entry = look_up_if(wanted, p.paging, r.kv_table, position);
  const TableEntry score_entry = look_up_if(wanted, p.paging, r.score_table, position);
  NewVector<Config, 1> rows[kTokens][kHalves];
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    const uint32_t phase = static_cast<uint32_t>(position_of(r, j)) % R;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int from = half * D + column;
      if (j < p.next_n) rows[j][half] = NewVector<Config, 1>(r, j, from);
      rows[j][half].bias.x[0] = load_if(r.ape != nullptr, r.ape + phase * S + from, -0.0f);
    }
  }

  const uint32_t kv_row = r.row_of(p.paging, kv_entry);
  const uint32_t score_row = r.row_of(p.paging, score_entry);
  float* const kv = static_cast<float*>(p.kv) + column;
  float* const score = static_cast<float*>(p.score) + column;
  const auto read = [&](int number, int half) {  // a row that is nowhere holds no prefix
    const uint32_t kv_from = __shfl_sync(~0u, kv_row, number);
    const uint32_t score_from = __shfl_sync(~0u, score_row, number);
    const bool there = kv_from != kNowhere && score_from != kNowhere;
    return Prefix{
        load_if(there, score + uint64_t{score_from} * S + half * D, Prefix{}.lse),
        load_if(there, kv + uint64_t{kv_from} * S + half * D, Prefix{}.mean),
    };
  };
  Prefix open[kHalves], before;
#pragma unroll
  for (int half = 0; half < kHalves; ++half) open[half] = read(kTokens, half);
  if (Config::kOverlap) before = read(kTokens + 1, 0);

  // A row that is nowhere merges as one without weight; so does one of another window.
  const uint32_t there = __ballot_sync(~0u, kv_row != kNowhere && score_row != kNowhere);
  Prefix merged[kHalves];
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    const bool merges = j <= t && position_of(r, j) >= begin && (there >> j & 1) != 0;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const Prefix row{rows[j][half].score().x[0], rows[j][half].kv().x[0]};
      const Prefix next = merges ? row : Prefix{};
      merged[half] = j == 0 ? next : merge(merged[half], next);
    }
  }
  const uint32_t kv_to = __shfl_sync(~0u, kv_row, t);
  const uint32_t score_to = __shfl_sync(~0u, score_row, t);
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    merged[half] = merge(open[half], merged[half]);
    if (score_to != kNowhere) score[uint64_t{score_to} * S + half * D] = merged[half].lse;
    if (kv_to != kNowhere) kv[uint64_t{kv_to} * S + half * D] = merged[half].mean;
  }
  Out* const out =
      static_cast<Out*>(p.kv_comp) + uint64_t{blockIdx.z * p.batch + index} * D + column;
  if (t < r.num_new && token >= 0 && (token + 1) % R == 0) {
    Prefix window = merged[kHalves - 1];
    if (Config::kOverlap) window = merge(before, window);
    *out = round_to<Out>(value_of(window));
  }
  if (t == 0 && r.end_window <= r.first_window) *out = round_to<Out>(0);
}

// Grid: as above, in columns of kVector. A thread goes through all tokens in order, kRowsAtOnce of
// them in flight: any number of new rows.
template <class Config>
struct PrefixTile {
  static constexpr int kVector = 2;
  static constexpr int kThreads = min_of(128, Config::kHeadDim / kVector);
  static constexpr int kSlices = Config::kHeadDim / (kVector * kThreads);
  static constexpr int kHalves = Config::kStateDim / Config::kHeadDim;
  static constexpr int kRowsAtOnce = 4;
  // CTAs that should fit an SM: for two halves the compiler would allow but three.
  static constexpr int kMinCtas = kHalves == 2 ? 4 : 1;
  static_assert(kRowsAtOnce <= Config::kRatio);  // one window is completed, at most
};

template <class Config>
__global__ void __launch_bounds__(PrefixTile<Config>::kThreads, PrefixTile<Config>::kMinCtas)
    prefix_kernel(const __grid_constant__ DecodeParams p) {
  using T = PrefixTile<Config>;
  using Out = typename Config::Out;
  constexpr int R = Config::kRatio, S = Config::kStateDim, D = Config::kHeadDim;
  constexpr int kHalves = T::kHalves, kRows = T::kRowsAtOnce, kVector = T::kVector;
  using Floats = Vector<float, kVector>;
  struct Prefixes {
    Floats lse, mean;
  };
  Prefixes none;
#pragma unroll
  for (int v = 0; v < kVector; ++v) none.lse.x[v] = Prefix{}.lse, none.mean.x[v] = Prefix{}.mean;

  const uint32_t index = blockIdx.x / T::kSlices;
  const int column = (blockIdx.x % T::kSlices * T::kThreads + threadIdx.x) * kVector;
  prefetch_tables(p, blockIdx.z, index);
  const Request<Config> r = request_at<Config>(p, blockIdx.z, index);
  float* const kv = opaque(static_cast<float*>(p.kv) + column);
  float* const score = opaque(static_cast<float*>(p.score) + column);
  Out* out = static_cast<Out*>(p.kv_comp) +
             uint64_t{blockIdx.z * p.batch + index} * p.num_windows * D + column;

  NewVector<Config, kVector> rows[kRows][kHalves];
  const auto load_rows = [&](int t0) {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      if (t0 + j >= p.next_n) continue;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        rows[j][half] = NewVector<Config, kVector>(r, t0 + j, half * D + column);
      }
    }
  };
  load_rows(0);

  const int start = max(r.first_position, 0);  // of the first token that is stored
  Prefixes open[kHalves];                      // of the window that the last token is in
#pragma unroll
  for (int half = 0; half < kHalves; ++half) open[half] = none;
  Prefixes before = none;  // first half of the window before it
#pragma unroll 1
  for (int t0 = 0;;) {
    // Lane j looks up the row of token t0 + j, and two lanes the rows before the step: the one
    // before `start`, if of the same window; where windows overlap, the last of the window before.
    const int lane = threadIdx.x % 32;
    const int first = position_of(r, t0);
    int position = position_of(r, t0 + lane);
    bool wanted = lane < kRows && t0 + lane < r.num_new;
    if (t0 == 0 && lane == kRows) position = start - 1, wanted = start % R != 0;
    if (Config::kOverlap && t0 == 0 && lane == kRows + 1) {
      position = start - start % R - 1;
      wanted = true;
    }
    wanted = wanted && position >= 0;
    const TableEntry kv_entry = look_up_if(wanted, p.paging, r.kv_table, position);
    const TableEntry score_entry = look_up_if(wanted, p.paging, r.score_table, position);
    const uint32_t phase = static_cast<uint32_t>(first) % R;  // of the first of these tokens
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        rows[j][half].load_bias(r, phase + j, half * D + column);
      }
    }
    const uint32_t kv_row = r.row_of(p.paging, kv_entry);
    const uint32_t score_row = r.row_of(p.paging, score_entry);
    if (t0 == 0) {
      // A row that is nowhere holds no prefix.
      const auto read = [&](Prefixes& prefixes, int number, int half) {
        const uint32_t kv_from = __shfl_sync(~0u, kv_row, number);
        const uint32_t score_from = __shfl_sync(~0u, score_row, number);
        if (kv_from == kNowhere || score_from == kNowhere) return;
        prefixes.lse = load<float, kVector>(score + uint64_t{score_from} * S + half * D);
        prefixes.mean = load<float, kVector>(kv + uint64_t{kv_from} * S + half * D);
      };
#pragma unroll
      for (int half = 0; half < kHalves; ++half) read(open[half], kRows, half);
      if (Config::kOverlap) read(before, kRows + 1, 0);
    }
    int last = R - 1 - static_cast<int>(phase);  // the token that completes a window, or kRows
    if (last >= r.num_new - t0 || first + last < 0) last = kRows;
    // The merges in one piece, without a branch or a store between them: a token then waits only
    // for the scores before it. A row that is nowhere merges as one without weight.
    uint32_t kv_to[kRows], score_to[kRows];
    Prefixes merged[kRows][kHalves];
    Prefixes value = none, value_before = none;
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      kv_to[j] = __shfl_sync(~0u, kv_row, j);
      score_to[j] = __shfl_sync(~0u, score_row, j);
      const bool exists = kv_to[j] != kNowhere && score_to[j] != kNowhere;
      const bool starts = (phase + j) % R == 0;
      if (Config::kOverlap && starts && position_of(r, t0 + j) > start) before = open[0];
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        if (starts) open[half] = none;
        const Floats new_kv = rows[j][half].kv(), new_score = rows[j][half].score();
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          const Prefix row = exists ? Prefix{new_score.x[v], new_kv.x[v]} : Prefix{};
          const Prefix prefix = merge({open[half].lse.x[v], open[half].mean.x[v]}, row);
          open[half].lse.x[v] = prefix.lse;
          open[half].mean.x[v] = prefix.mean;
        }
        merged[j][half] = open[half];
      }
      if (j == last) value = open[kHalves - 1], value_before = before;
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      float* const to_score = score + uint64_t{score_to[j]} * S;
      float* const to_kv = kv + uint64_t{kv_to[j]} * S;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        if (score_to[j] != kNowhere) store(to_score + half * D, merged[j][half].lse);
        if (kv_to[j] != kNowhere) store(to_kv + half * D, merged[j][half].mean);
      }
    }
    if (last < kRows) {
      Vector<Out, kVector> values;
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        Prefix window{value.lse.x[v], value.mean.x[v]};
        if (Config::kOverlap) {
          window = merge({value_before.lse.x[v], value_before.mean.x[v]}, window);
        }
        values.x[v] = round_to<Out>(value_of(window));
      }
      store(out, values);
      out += D;
    }
    if ((t0 += kRows) >= r.num_new) break;
    load_rows(t0);
  }
#pragma unroll 1
  for (int m = r.end_window - r.first_window; m < p.num_windows; ++m, out += D) {
    store(out, Vector<Out, kVector>{});
  }
}

}  // namespace jax_dsv4
