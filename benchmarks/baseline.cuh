// The reduction of R = 128 that this project started from, TensorRT-LLM's, kept to be measured
// against: by one warp per slice of columns, and shared by four. Device code and its launch.
//
// Grid: x = requests x slices of 128 columns, z = groups. A lane holds 4 columns. The first warp
// stores the new rows, which go through memory and a barrier. Then each warp takes the rows of its
// share one after another: it divides the position by the page size, looks up the page, loads the
// row and updates a running softmax, with two expf per element. At the end one warp merges the
// shares. Beyond what is released, rows that are nowhere are left out, without a branch in that
// loop, which would cost a third more.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "config.h"
#include "decode.h"
#include "decode_raw.cuh"
#include "numeric.h"
#include "vector.cuh"

namespace jax_dsv4 {

// One window per step and request at most: it would read back rows that another CTA stores.
template <class Config, int kWarps>
__global__ void __launch_bounds__(32 * kWarps)
    row_at_a_time_kernel(const __grid_constant__ DecodeParams p) {
  using State = typename Config::State;
  using Out = typename Config::Out;
  constexpr int kVector = 4, kSlices = Config::kHeadDim / (32 * kVector);
  constexpr int S = Config::kStateDim, kShare = Config::kReducedRows / kWarps;
  static_assert(!Config::kOverlap && kShare * kWarps == Config::kReducedRows,
                "row at a time: windows are disjoint, and shared evenly");
  using Floats = Vector<float, kVector>;
  __shared__ Floats shared_max[kWarps][32], shared_sum[kWarps][32], shared_weighted[kWarps][32];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t index = blockIdx.x / kSlices;
  const int column = (blockIdx.x % kSlices * 32 + lane) * kVector;
  const Request<Config> r = request_at<Config>(p, blockIdx.z, index);
  State* const kv = static_cast<State*>(p.kv) + column;
  State* const score = static_cast<State*>(p.score) + column;
  Out* const out = static_cast<Out*>(p.kv_comp) +
                   uint64_t{blockIdx.z * p.batch + index} * Config::kHeadDim + column;
  // As an offset into `kv` and `score`, by 32-bit division and 64-bit products, as released.
  const int page_size = p.paging.page_size.value;
  const auto find_row = [&](const int32_t* table, int position) -> int64_t {
    const uint32_t page = position / page_size;
    const uint32_t id = page < p.paging.max_pages ? table[page] : ~0u;
    const int64_t row = int64_t{id} * page_size + position % page_size;
    return id < p.paging.num_pages ? (r.pool_row + row) * S : -1;
  };

  for (int t = 0; t < r.num_new && warp == 0; ++t) {
    const int position = r.first_position + t;
    if (position < 0) continue;
    NewVector<Config, kVector> row(p, r, t, column);
    row.load_bias(r, position, column);
    const int64_t kv_at = find_row(r.kv_table, position);
    const int64_t score_at = find_row(r.score_table, position);
    if (kv_at >= 0) store(kv + kv_at, row.kv());
    if (score_at >= 0) store(score + score_at, row.score());
  }
  __syncthreads();  // the new rows, before any warp reads them back
  Vector<Out, kVector> value = {};
  if (r.first_window >= r.end_window || p.paging.num_pages == 0) {
    if (warp == 0) store(out, value);
    return;
  }

  Floats max, sum, weighted;
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    max.x[v] = kNegInf;
    sum.x[v] = weighted.x[v] = 0;
  }
  const auto add = [&](int v, float other_max, float other_sum, float other_weighted) {
    const float highest = fmaxf(max.x[v], other_max);
    const float scale = expf(max.x[v] - finite(highest));
    const float other_scale = expf(other_max - finite(highest));
    max.x[v] = highest;
    sum.x[v] = sum.x[v] * scale + other_sum * other_scale;
    weighted.x[v] = weighted.x[v] * scale + other_weighted * other_scale;
  };
  const int begin = r.first_window * Config::kRatio + warp * kShare;
  const int end = min(begin + kShare, r.end_window * Config::kRatio);
  for (int position = begin; position < end; ++position) {
    const int64_t kv_at = find_row(r.kv_table, position);
    const int64_t score_at = find_row(r.score_table, position);
    const bool exists = kv_at >= 0 && score_at >= 0;  // else row 0: no branch in this loop, either
    const auto kvs = load<State, kVector>(kv + (exists ? kv_at : 0));
    const auto scores = load<State, kVector>(score + (exists ? score_at : 0));
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      add(v, exists ? to_f32(scores.x[v]) : kNegInf, 1.0f, exists ? to_f32(kvs.x[v]) : 0.0f);
    }
  }
  shared_max[warp][lane] = max;
  shared_sum[warp][lane] = sum;
  shared_weighted[warp][lane] = weighted;
  __syncthreads();  // every warp's share, before the first merges them
  if (warp != 0) return;
  for (int other = 1; other < kWarps; ++other) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      add(v, shared_max[other][lane].x[v], shared_sum[other][lane].x[v],
          shared_weighted[other][lane].x[v]);
    }
  }
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    value.x[v] = round_to<Out>(sum.x[v] == 0 ? 0.0f : weighted.x[v] / sum.x[v]);
  }
  store(out, value);
}

template <class Config, int kWarps>
void launch_row_at_a_time(cudaStream_t stream, const DecodeParams& p) {
  const dim3 grid(p.batch * (Config::kHeadDim / 128), 1, p.num_groups);
  row_at_a_time_kernel<Config, kWarps><<<grid, 32 * kWarps, 0, stream>>>(p);
}

}  // namespace jax_dsv4
