// The reduction of R = 128 that this project started from, kept to be measured against: a warp
// takes one row after another, looks up its page, loads it and updates a running softmax (two exps
// per element); new rows go through memory and a barrier. With one warp, and shared by four.

#pragma once

#include "decode.cuh"

namespace jax_dsv4 {

// One window per step and request at most: it would read back rows that another CTA stores.
template <class Config, class Geometry>
__global__ void __launch_bounds__(Tile<Config, Geometry>::kThreads)
    row_at_a_time_kernel(const __grid_constant__ DecodeParams p) {
  using T = Tile<Config, Geometry>;
  using State = typename Config::State;
  using Out = typename Config::Out;
  constexpr int S = Config::kStateDim;
  static_assert(!Config::kOverlap);
  __shared__ SharedPlan<Config, Geometry> smem;

  const uint32_t index = blockIdx.x / T::kSlices;
  const int slice_column = static_cast<int>(blockIdx.x % T::kSlices) * T::kColumns;
  const Request<Config> r = request_at<Config>(p, blockIdx.z, index);
  Out* out = static_cast<Out*>(p.kv_comp) +
             (int64_t{blockIdx.z} * p.batch + index) * Config::kHeadDim + slice_column;
  WindowReducer<Config, Geometry> reducer(p, r, r.first_window, slice_column);
  State* const kv = static_cast<State*>(p.kv) + reducer.column;
  State* const score = static_cast<State*>(p.score) + reducer.column;

  for (int t = reducer.row_group; t < r.num_new; t += T::kRowGroups) {
    const int position = r.first_position + t;
    if (position < 0) continue;
    const NewVector<Config, T::kVector> row(r, position, reducer.column);
    const uint32_t kv_row = r.find_row(p.paging, r.kv_table, position);
    const uint32_t score_row = r.find_row(p.paging, r.score_table, position);
    if (kv_row != kNowhere) store(kv + uint64_t{kv_row} * S, row.kv());
    if (score_row != kNowhere) store(score + uint64_t{score_row} * S, row.score());
  }
  if (r.first_window >= r.end_window) {
    for (int c = threadIdx.x; c < T::kColumns; c += T::kThreads) out[c] = round_to<Out>(0.0f);
    return;
  }
  __syncthreads();  // the new rows, before any warp reads them back
#pragma unroll 1
  for (int i = reducer.row_group; i < Config::kReducedRows; i += T::kRowGroups) {
    const uint32_t kv_row = r.find_row(p.paging, r.kv_table, reducer.begin + i);
    const uint32_t score_row = r.find_row(p.paging, r.score_table, reducer.begin + i);
    if (kv_row == kNowhere || score_row == kNowhere) continue;
    const Vector<State, T::kVector> kvs[1] = {load<State, T::kVector>(kv + uint64_t{kv_row} * S)};
    const Vector<State, T::kVector> scores[1] = {
        load<State, T::kVector>(score + uint64_t{score_row} * S)};
    reducer.partial.add(kvs, scores);
  }
  reducer.store_merged(smem, out);
}

}  // namespace jax_dsv4
