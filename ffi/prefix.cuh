// The decode operation on a state of prefixes (numeric.h), on an NVIDIA GPU: device code only.
//
// Grid: x = requests x column slices, z = groups. A thread owns kVector channels of D of one
// request, of both halves where windows overlap, and goes through the new tokens in order: merges
// each into the prefix of its window, stores that, and emits the value of a window it completes.
// Every row is merged by the same instructions, whatever the step: its bits do not depend on how
// the tokens came.
// Bytes: 2 S per request for the row before the step, and S more where windows overlap; 4 S per new
// row (half of it read), elements; nothing more where a window is completed.
//
// A step is one chain, kv_len -> page -> row before the step -> one merge per token, on few
// threads: what counts is the number of instructions on it. So the lanes of a warp look up all of
// its rows with one lookup, a row each, and what does not depend on kv_len is loaded before it is
// there.

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
  // CTAs that should fit an SM: for two channels of two halves the compiler would allow but three.
  static constexpr int kMinCtas = kHalves * kVector > 2 ? 4 : 1;
};

template <class Config, int kVector>
__global__ void __launch_bounds__(PrefixTile<Config, kVector>::kThreads,
                                  PrefixTile<Config, kVector>::kMinCtas)
    prefix_kernel(const __grid_constant__ DecodeParams p) {
  using T = PrefixTile<Config, kVector>;
  using Out = typename Config::Out;
  using Floats = Vector<float, kVector>;
  constexpr int R = Config::kRatio, S = Config::kStateDim, D = Config::kHeadDim;
  constexpr int kHalves = T::kHalves, kRows = T::kRowsAtOnce;
  constexpr int kOwn = kHalves - 1;  // the half that a window contributes to its own value
  struct Prefixes {
    Floats lse, mean;
  };
  Prefixes none;
#pragma unroll
  for (int v = 0; v < kVector; ++v) none.lse.x[v] = Prefix{}.lse, none.mean.x[v] = Prefix{}.mean;

  const uint32_t index = blockIdx.x / T::kSlices;
  const int column = (blockIdx.x % T::kSlices * T::kThreads + threadIdx.x) * kVector;
  const Request<Config> r = request_at<Config>(p, blockIdx.z, index);
  float* const kv = static_cast<float*>(p.kv) + column;
  float* const score = static_cast<float*>(p.score) + column;
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
    int position = r.first_position + t0 + (lane < kRows ? lane : -1);
    bool wanted = lane < kRows ? t0 + lane < r.num_new : lane == kRows && start % R != 0;
    if (Config::kOverlap && lane == kRows + 1) position = start - start % R - 1, wanted = true;
    TableEntry kv_entry{~0u, 0}, score_entry{~0u, 0};
    if (wanted && position >= 0) {
      kv_entry = look_up(p.paging, r.kv_table, position);
      score_entry = look_up(p.paging, r.score_table, position);
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        rows[j][half].load_bias(r, r.first_position + t0 + j, half * D + column);
      }
    }
    const uint32_t kv_row = r.row_of(p.paging, kv_entry);
    const uint32_t score_row = r.row_of(p.paging, score_entry);
    const auto row_at = [](float* state, uint32_t row, int half) {
      return state + uint64_t{row} * S + half * D;
    };
    if (t0 == 0) {
      // A row that is nowhere holds no prefix.
      const auto read = [&](Prefixes& prefixes, int number, int half) {
        const uint32_t kv_from = __shfl_sync(~0u, kv_row, number);
        const uint32_t score_from = __shfl_sync(~0u, score_row, number);
        if (kv_from == kNowhere || score_from == kNowhere) return;
        prefixes.lse = load<float, kVector>(row_at(score, score_from, half));
        prefixes.mean = load<float, kVector>(row_at(kv, kv_from, half));
      };
#pragma unroll
      for (int half = 0; half < kHalves; ++half) read(open[half], kRows, half);
      if (Config::kOverlap) read(before, kRows + 1, 0);
    }
    // The merges in one piece, without a branch or a store between them: a token then waits only
    // for the scores before it. A row that is not there merges as one without weight.
    uint32_t kv_to[kRows], score_to[kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      kv_to[j] = __shfl_sync(~0u, kv_row, j);
      score_to[j] = __shfl_sync(~0u, score_row, j);
    }
    Prefixes merged[kRows][kHalves];
    Prefixes value = none, value_before = none;
    bool completes = false;
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int token_position = r.first_position + t0 + j;
      const bool exists = kv_to[j] != kNowhere && score_to[j] != kNowhere;
      const bool starts = static_cast<uint32_t>(token_position) % R == 0;
      if (Config::kOverlap && starts && token_position > start) before = open[0];
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
      static_assert(kRows <= R);  // one window is completed, at most
      if (t0 + j < r.num_new && token_position >= 0 && (token_position + 1) % R == 0) {
        completes = true;
        value = open[kOwn];
        value_before = before;
      }
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        if (kv_to[j] != kNowhere) store(row_at(kv, kv_to[j], half), merged[j][half].mean);
        if (score_to[j] != kNowhere) store(row_at(score, score_to[j], half), merged[j][half].lse);
      }
    }
    if (completes) {
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
  for (int m = max(r.end_window - r.first_window, 0); m < p.num_windows; ++m, out += D) {
    store(out, Vector<Out, kVector>{});
  }
}

}  // namespace jax_dsv4
