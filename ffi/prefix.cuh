// The decode operation on a state of prefixes (numeric.h), on an NVIDIA GPU: device code only.
//
// Grid: x = requests x column slices, z = groups. A thread owns kVector channels of D of one
// request, of both halves where windows overlap, and goes through the new tokens in order: merges
// each into the prefix of its window, stores that, and emits the value of a window it completes.
// Every row is merged by the same instructions, whatever the step: its bits do not depend on how
// the tokens came.
// Bytes: 2 S per request for the row before the step, and S more where windows overlap; 4 S per new
// row (half of it read), elements; nothing more where a window is completed.

#pragma once

#include <cstdint>

#include "config.h"
#include "decode.cuh"
#include "decode.h"
#include "numeric.h"
#include "paging.h"

namespace jax_dsv4 {

template <class Config, int kVector_>
struct PrefixTile {
  static constexpr int kVector = kVector_;  // channels per thread
  static constexpr int kThreads = min_of(128, Config::kHeadDim / kVector);
  static constexpr int kSlices = Config::kHeadDim / (kVector * kThreads);
  static constexpr int kHalves = Config::kStateDim / Config::kHeadDim;
  static constexpr int kRowsAtOnce = 4;  // new rows in flight
};

template <class Config, int kVector>
__global__ void __launch_bounds__(PrefixTile<Config, kVector>::kThreads)
    prefix_kernel(const __grid_constant__ DecodeParams p) {
  using T = PrefixTile<Config, kVector>;
  using Out = typename Config::Out;
  using Floats = Vector<float, T::kVector>;
  constexpr int R = Config::kRatio, S = Config::kStateDim, D = Config::kHeadDim;
  constexpr int kOwn = T::kHalves - 1;  // the half that a window contributes to its own value
  struct Prefixes {
    Floats lse, mean;
  };
  const auto none = [] {
    Prefixes prefixes;
#pragma unroll
    for (int v = 0; v < T::kVector; ++v) prefixes.lse.x[v] = kNegInf, prefixes.mean.x[v] = 0;
    return prefixes;
  };

  const uint32_t index = blockIdx.x / T::kSlices;
  const int column = (blockIdx.x % T::kSlices * T::kThreads + threadIdx.x) * T::kVector;
  const Request<Config> r = request_at<Config>(p, blockIdx.z, index);
  float* const kv = static_cast<float*>(p.kv) + column;
  float* const score = static_cast<float*>(p.score) + column;
  Out* out = static_cast<Out*>(p.kv_comp) +
             (int64_t{blockIdx.z} * p.batch + index) * p.num_windows * D + column;

  const int first = max(0, -r.first_position);  // row of kv_score
  const int start = r.first_position + first;   // its position
  // The row before it, if that is of the same window; where windows overlap, the last of the window
  // before. A row that is nowhere holds no prefix.
  struct Row {
    bool wanted;
    TableEntry kv_entry, score_entry;
  };
  const auto look_up_row = [&](int position, bool wanted) -> Row {
    position = wanted ? position : 0;
    return {wanted, look_up(p.paging, r.kv_table, position),
            look_up(p.paging, r.score_table, position)};
  };
  const auto read = [&](const Row& row, int half) {
    Prefixes prefixes = none();
    const uint32_t kv_row = r.row_of(p.paging, row.kv_entry);
    const uint32_t score_row = r.row_of(p.paging, row.score_entry);
    if (row.wanted && kv_row != kNowhere && score_row != kNowhere) {
      prefixes.lse = load<float, T::kVector>(score + uint64_t{score_row} * S + half * D);
      prefixes.mean = load<float, T::kVector>(kv + uint64_t{kv_row} * S + half * D);
    }
    return prefixes;
  };
  const Row open_row = look_up_row(start - 1, start % R != 0);
  Row before_row;
  if (Config::kOverlap) before_row = look_up_row(start - start % R - 1, start >= R);
  Prefixes open[T::kHalves];  // of the window that the last token is in
  Prefixes before;            // first half of the window before it

#pragma unroll 1
  for (int t0 = first; t0 < r.num_new; t0 += T::kRowsAtOnce) {
    NewVector<Config, T::kVector> rows[T::kRowsAtOnce][T::kHalves];
    TableEntry kv_entries[T::kRowsAtOnce], score_entries[T::kRowsAtOnce];
#pragma unroll
    for (int j = 0; j < T::kRowsAtOnce; ++j) {
      if (t0 + j >= r.num_new) break;
      const int position = r.first_position + t0 + j;
      kv_entries[j] = look_up(p.paging, r.kv_table, position);
      score_entries[j] = look_up(p.paging, r.score_table, position);
#pragma unroll
      for (int half = 0; half < T::kHalves; ++half) {
        rows[j][half] = NewVector<Config, T::kVector>(r, position, half * D + column);
      }
    }
    if (t0 == first) {  // with the new rows on their way
#pragma unroll
      for (int half = 0; half < T::kHalves; ++half) open[half] = read(open_row, half);
      if (Config::kOverlap) before = read(before_row, 0);
    }
#pragma unroll
    for (int j = 0; j < T::kRowsAtOnce; ++j) {
      if (t0 + j >= r.num_new) break;
      const int position = r.first_position + t0 + j;
      if (position % R == 0) {
        if (Config::kOverlap && t0 + j > first) before = open[0];
#pragma unroll
        for (int half = 0; half < T::kHalves; ++half) open[half] = none();
      }
      const uint32_t kv_row = r.row_of(p.paging, kv_entries[j]);
      const uint32_t score_row = r.row_of(p.paging, score_entries[j]);
#pragma unroll
      for (int half = 0; half < T::kHalves; ++half) {
        Prefixes& prefix = open[half];
        if (kv_row != kNowhere && score_row != kNowhere) {
          const Floats new_kv = rows[j][half].kv(), new_score = rows[j][half].score();
#pragma unroll
          for (int v = 0; v < T::kVector; ++v) {
            const Prefix merged =
                merge({prefix.lse.x[v], prefix.mean.x[v]}, {new_score.x[v], new_kv.x[v]});
            prefix.lse.x[v] = merged.lse;
            prefix.mean.x[v] = merged.mean;
          }
        }
        if (kv_row != kNowhere) store(kv + uint64_t{kv_row} * S + half * D, prefix.mean);
        if (score_row != kNowhere) store(score + uint64_t{score_row} * S + half * D, prefix.lse);
      }
      if (position % R != R - 1) continue;
      Vector<Out, T::kVector> value;
#pragma unroll
      for (int v = 0; v < T::kVector; ++v) {
        Prefix window{open[kOwn].lse.x[v], open[kOwn].mean.x[v]};
        if (Config::kOverlap) window = merge({before.lse.x[v], before.mean.x[v]}, window);
        value.x[v] = round_to<Out>(value_of(window));
      }
      store(out, value);
      out += D;
    }
  }
#pragma unroll 1
  for (int m = max(r.end_window - r.first_window, 0); m < p.num_windows; ++m, out += D) {
    store(out, Vector<Out, T::kVector>{});
  }
}

}  // namespace jax_dsv4
