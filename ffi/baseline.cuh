// The reduction of R = 128 that this project started from, kept to be measured against: a warp
// takes one row after another, looks up its page, loads it and updates a running softmax (two exps
// per element); new rows go through memory and a barrier. With one warp, and shared by four.

#pragma once

#include "decode.cuh"

namespace jax_dsv4 {

template <class Config, class Geometry>
__global__ void __launch_bounds__(Tile<Config, Geometry>::kThreads)
    row_at_a_time_kernel(const __grid_constant__ DecodeParams p) {
  using T = Tile<Config, Geometry>;
  using State = typename Config::State;
  using Out = typename Config::Out;
  __shared__ SharedPlan<Config, Geometry> smem;

  const uint32_t index = blockIdx.x / T::kSlices;
  const int slice_column = static_cast<int>(blockIdx.x % T::kSlices) * T::kColumns;
  const int m = blockIdx.z * gridDim.y + blockIdx.y;
  if (m >= p.num_windows) return;
  const Request<Config> r = request_at<Config>(p, index);
  Out* out = static_cast<Out*>(p.kv_comp) +
             (int64_t{index} * p.num_windows + m) * Config::kHeadDim + slice_column;
  const int window = r.first_window + m;

  RowWriter<Config, Geometry>(p, r, m, slice_column).write(p);
  if (window >= r.end_window) {
    for (int c = threadIdx.x; c < T::kColumns; c += T::kThreads) out[c] = round_to<Out>(0.0f);
    return;
  }
  __syncthreads();  // the new rows, before any warp reads them back

  const int column = slice_column + threadIdx.x % T::kLanes * T::kVector;
  const int begin = (window + 1) * Config::kRatio - Config::kReducedRows;
  Partial<T::kVector> partial;
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < Config::kReducedRows; i += Geometry::kWarps) {
    if (begin + i < 0) continue;
    const int64_t kv_row = r.find_row(p.paging, r.kv_table, begin + i);
    const int64_t score_row = r.find_row(p.paging, r.score_table, begin + i);
    if (kv_row == kNowhere || score_row == kNowhere) continue;
    const int from = Config::kOverlap && i >= Config::kRatio ? Config::kHeadDim + column : column;
    const auto score = load<State, T::kVector>(static_cast<const State*>(p.score) +
                                               score_row * Config::kStateDim + from);
    const auto kv = load<State, T::kVector>(static_cast<const State*>(p.kv) +
                                            kv_row * Config::kStateDim + from);
#pragma unroll
    for (int v = 0; v < T::kVector; ++v) {
      partial.raise_max(v, fmaxf(partial.max[v], to_f32(score.x[v])));
      const float weight = exp_fast(to_f32(score.x[v]) - finite_or_zero(partial.max[v]));
      partial.sum[v] += weight;
      partial.weighted[v] += weight * to_f32(kv.x[v]);
    }
  }
  store_merged<Config, Geometry>(smem, partial, out);
}

}  // namespace jax_dsv4
