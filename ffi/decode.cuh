// The decode operation on an NVIDIA GPU: device code only.
//
// Grid: x = requests x column slices, (y, z) = windows. A CTA owns one window of one request over
// one slice of kColumns channels, of both halves where windows overlap. It
//   1. stores its share of the new tokens' rows (for window m of the step, R rows from row m R),
//   2. counts the windows that the step completes; if its own is not among them, stores zeros,
//   3. reduces the window: value[d] = sum_i softmax_i(score[i, d]) kv[i, d] over its stored rows.
// Bytes: 2 kReducedRows D per completed window and 4 S per new row (half of it read), elements.
//
// Every lane holds 16 bytes of a state row. Lanes across a slice times rows abreast fill a warp. A
// warp first finds where all its rows are, then loads them with nothing but the loads in the way:
// it pays the chain kv_len -> page -> row once. New rows are taken from kv_score, rounded as they
// are stored, so the reduction waits for no store. One exp per element.

#pragma once

#include <cstdint>

#include "config.h"
#include "decode.h"
#include "numeric.h"
#include "paging.h"

namespace jax_dsv4 {

constexpr int min_of(int a, int b) { return a < b ? a : b; }

// What follows from a configuration and a geometry, for the kernel and its launch.
template <class Config, class Geometry>
struct Tile {
  using State = typename Config::State;
  static constexpr int kThreads = 32 * Geometry::kWarps;
  static constexpr int kVector = 16 / sizeof(State);  // channels per lane
  static constexpr int kLanes = min_of(Geometry::kLanes, Config::kHeadDim / kVector);
  static constexpr int kColumns = kLanes * kVector;
  static constexpr int kSlices = Config::kHeadDim / kColumns;
  static constexpr int kRowsAbreast = 32 / kLanes;                 // of one warp
  static constexpr int kGroups = Geometry::kWarps * kRowsAbreast;  // rows abreast of the CTA
  static constexpr int kRowsPerLane = Config::kReducedRows / kGroups;
  static constexpr int kRowsPerStep = min_of(Geometry::kRowsPerStep, kRowsPerLane);
  static constexpr int kSteps = kRowsPerLane / kRowsPerStep;
  static constexpr int kRowsPerWarp = kRowsPerLane * kRowsAbreast;

  static_assert(kColumns * kSlices == Config::kHeadDim && kRowsAbreast * kLanes == 32);
  static_assert(kGroups * kRowsPerStep * kSteps == Config::kReducedRows);
};

inline constexpr int64_t kNew = -2;  // a row that exists, and that this step brings

// The shared memory of a CTA.
template <class Config, class Geometry>
struct SharedPlan {
  using T = Tile<Config, Geometry>;
  // Where each warp's rows are, kNowhere or kNew; written and read by that warp alone.
  int64_t kv_row[Geometry::kWarps][T::kRowsPerWarp];
  int64_t score_row[Geometry::kWarps][T::kRowsPerWarp];
  // The warps' partial results.
  float max[Geometry::kWarps][T::kColumns];
  float sum[Geometry::kWarps][T::kColumns];
  float weighted[Geometry::kWarps][T::kColumns];
};

template <class T, int kSize>
struct alignas(sizeof(T) * kSize < 16 ? sizeof(T) * kSize : 16) Vector {
  T x[kSize];
};

template <class T, int kSize>
__device__ __forceinline__ Vector<T, kSize> load(const T* source) {
  return *reinterpret_cast<const Vector<T, kSize>*>(source);
}

template <class T, int kSize>
__device__ __forceinline__ void store(T* target, const Vector<T, kSize>& value) {
  *reinterpret_cast<Vector<T, kSize>*>(target) = value;
}

__device__ __forceinline__ float exp_fast(float x) {
  constexpr float kLog2E = 1.4426950408889634f;
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * kLog2E));
  return result;
}

// A softmax-weighted sum over some of the rows, per channel, relative to their own maximum.
template <int kSize>
struct Partial {
  float max[kSize];
  float sum[kSize];
  float weighted[kSize];

  __device__ Partial() {
#pragma unroll
    for (int v = 0; v < kSize; ++v) max[v] = kNegInf, sum[v] = weighted[v] = 0;
  }

  __device__ void raise_max(int v, float to) {
    const float scale = exp_fast(max[v] - finite_or_zero(to));
    max[v] = to;
    sum[v] *= scale;
    weighted[v] *= scale;
  }

  __device__ float value(int v) const { return sum[v] == 0 ? 0.0f : weighted[v] / sum[v]; }
};

// A lane's vector of one new token's row, of one half, as kv_score has it and as it is stored.
template <class Config, int kSize>
struct NewRow {
  using State = typename Config::State;
  using KvScore = typename Config::KvScore;

  Vector<KvScore, kSize> kv_in, score_in;

  NewRow() = default;
  __device__ NewRow(const Request<Config>& r, int t, int column) {
    const KvScore* row = r.kv_score + int64_t{t} * (2 * Config::kStateDim) + column;
    kv_in = load<KvScore, kSize>(row);
    score_in = load<KvScore, kSize>(row + Config::kStateDim);
  }

  __device__ Vector<State, kSize> kv() const {
    Vector<State, kSize> out;
#pragma unroll
    for (int v = 0; v < kSize; ++v) out.x[v] = round_to<State>(to_f32(kv_in.x[v]));
    return out;
  }

  __device__ Vector<State, kSize> score(const Vector<float, kSize>& bias) const {
    Vector<State, kSize> out;
#pragma unroll
    for (int v = 0; v < kSize; ++v) out.x[v] = round_to<State>(to_f32(score_in.x[v]) + bias.x[v]);
    return out;
  }
};

template <class Config, int kSize>
__device__ __forceinline__ Vector<float, kSize> load_bias(const Request<Config>& r, int position,
                                                          int column) {
  if (r.ape == nullptr) {
    Vector<float, kSize> none;
#pragma unroll
    for (int v = 0; v < kSize; ++v) none.x[v] = -0.0f;  // adding +0 would lose a -0
    return none;
  }
  return load<float, kSize>(r.ape + (position % Config::kRatio) * Config::kStateDim + column);
}

// Phase 1: the new rows of one CTA, in its columns. An item is a lane's vector of one row's half.
template <class Config, class Geometry>
struct RowWriter {
  using T = Tile<Config, Geometry>;
  using State = typename Config::State;
  using Row = NewRow<Config, T::kVector>;
  static constexpr int kVectorsPerRow = (Config::kOverlap ? 2 : 1) * T::kLanes;

  const Request<Config>& r;
  const int first_row;
  const int num_items;
  const int slice_column;
  const Row first_item;  // under way while kv_lens and the tables are read

  __device__ RowWriter(const DecodeParams& p, const Request<Config>& r, int m, int slice_column)
      : r(r),
        first_row(m * Config::kRatio),
        num_items(min(p.next_n - first_row, Config::kRatio) * kVectorsPerRow),
        slice_column(slice_column),
        first_item(load_item(min(static_cast<int>(threadIdx.x), num_items - 1))) {}

  __device__ int row_of(int item) const { return first_row + item / kVectorsPerRow; }
  __device__ int column_of(int item) const {
    const int half = item % kVectorsPerRow / T::kLanes;
    return half * Config::kHeadDim + slice_column + item % T::kLanes * T::kVector;
  }
  __device__ Row load_item(int item) const { return Row(r, row_of(item), column_of(item)); }

  __device__ void write(const DecodeParams& p) {
    for (int item = threadIdx.x; item < num_items; item += T::kThreads) {
      const Row row = item == static_cast<int>(threadIdx.x) ? first_item : load_item(item);
      const int t = row_of(item), column = column_of(item);
      if (t >= r.num_new || r.first_position + t < 0) continue;
      const int position = r.first_position + t;
      // Every load before the first store, which they could not pass.
      const int64_t kv_row = r.find_row(p.paging, r.kv_table, position);
      const int64_t score_row = r.find_row(p.paging, r.score_table, position);
      const auto score = row.score(load_bias<Config, T::kVector>(r, position, column));
      if (kv_row != kNowhere) {
        store(static_cast<State*>(p.kv) + kv_row * Config::kStateDim + column, row.kv());
      }
      if (score_row != kNowhere) {
        store(static_cast<State*>(p.score) + score_row * Config::kStateDim + column, score);
      }
    }
  }
};

// Phase 3: a lane's part of the reduction of one window.
template <class Config, class Geometry>
struct WindowReducer {
  using T = Tile<Config, Geometry>;
  using State = typename Config::State;
  using StateVector = Vector<State, T::kVector>;
  struct Step {
    StateVector kv[T::kRowsPerStep];
    StateVector score[T::kRowsPerStep];
  };

  const DecodeParams& p;
  const Request<Config>& r;
  SharedPlan<Config, Geometry>& smem;
  const int warp, abreast;  // this lane's rows are those of its group: abreast in its warp
  const int begin;          // position of the first reduced row; negative where there is none
  const int column;         // of D
  Partial<T::kVector> partial;

  __device__ WindowReducer(const DecodeParams& p, const Request<Config>& r,
                           SharedPlan<Config, Geometry>& smem, int window, int column)
      : p(p),
        r(r),
        smem(smem),
        warp(threadIdx.x / 32),
        abreast(threadIdx.x % 32 / T::kLanes),
        begin(static_cast<int>((window + 1u) * Config::kRatio - Config::kReducedRows)),
        column(column) {}

  // Reduced row i of the window belongs to group i % kGroups.
  __device__ int group() const { return warp * T::kRowsAbreast + abreast; }

  // Where windows overlap, the window before this one contributes the first half of its rows.
  __device__ int column_of(int i) const {
    return Config::kOverlap && i >= Config::kRatio ? Config::kHeadDim + column : column;
  }

  // Looks up this warp's rows, each once. A row exists if both pools have it.
  __device__ void find_rows() {
    for (int s = threadIdx.x % 32; s < T::kRowsPerWarp; s += 32) {
      const int i =
          (s / T::kRowsAbreast * Geometry::kWarps + warp) * T::kRowsAbreast + s % T::kRowsAbreast;
      const int position = begin + i;
      const int looked_up = max(position, 0);  // both loads without a branch between them
      const int64_t kv_row = r.find_row(p.paging, r.kv_table, looked_up);
      const int64_t score_row = r.find_row(p.paging, r.score_table, looked_up);
      const bool exists = (position >= 0) & (kv_row != kNowhere) & (score_row != kNowhere);
      smem.kv_row[warp][s] = !exists ? kNowhere : position < r.first_position ? kv_row : kNew;
      smem.score_row[warp][s] = score_row;
    }
    __syncwarp();  // this warp's rows, before its lanes use them
  }

  __device__ int64_t kv_row(int in_lane) const {
    return smem.kv_row[warp][in_lane * T::kRowsAbreast + abreast];
  }

  __device__ Step load_step(int step) const {
    Step rows;
#pragma unroll
    for (int j = 0; j < T::kRowsPerStep; ++j) {
      const int in_lane = step * T::kRowsPerStep + j;
      const int64_t row = kv_row(in_lane);
      const int64_t score_row = smem.score_row[warp][in_lane * T::kRowsAbreast + abreast];
      const int from = column_of(in_lane * T::kGroups + group());
      if (row >= 0) {
        rows.score[j] = load<State, T::kVector>(static_cast<const State*>(p.score) +
                                                score_row * Config::kStateDim + from);
        rows.kv[j] = load<State, T::kVector>(static_cast<const State*>(p.kv) +
                                             row * Config::kStateDim + from);
      } else {
#pragma unroll
        for (int v = 0; v < T::kVector; ++v) {
          rows.score[j].x[v] = round_to<State>(kNegInf);
          rows.kv[j].x[v] = round_to<State>(0);
        }
      }
    }
    return rows;
  }

  template <int kRows>
  __device__ void reduce(const StateVector (&kv)[kRows], const StateVector (&score)[kRows]) {
#pragma unroll
    for (int v = 0; v < T::kVector; ++v) {
      float max = partial.max[v];
#pragma unroll
      for (int j = 0; j < kRows; ++j) max = fmaxf(max, to_f32(score[j].x[v]));
      partial.raise_max(v, max);
      const float subtracted = finite_or_zero(max);
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const float weight = exp_fast(to_f32(score[j].x[v]) - subtracted);
        partial.sum[v] += weight;
        partial.weighted[v] += weight * to_f32(kv[j].x[v]);
      }
    }
  }

  struct PendingRow {
    int i;  // reduced row; kReducedRows or more: there is none
    NewRow<Config, T::kVector> row;
    Vector<float, T::kVector> bias;
  };

  __device__ PendingRow load_new_row(int i) const {
    PendingRow pending;
    pending.i = i;
    if (i < Config::kReducedRows) {
      pending.row = NewRow<Config, T::kVector>(r, begin + i - r.first_position, column_of(i));
      pending.bias = load_bias<Config, T::kVector>(r, begin + i, column_of(i));
    }
    return pending;
  }

  // A group's first new row is under way while the tables are read.
  __device__ PendingRow load_first_new_row() const {
    const int first = max(max(r.first_position, 0) - begin, 0);
    return load_new_row(first + ((group() - first) & (T::kGroups - 1)));
  }

  __device__ void reduce_new_rows(PendingRow pending) {
    while (pending.i < Config::kReducedRows) {
      if (kv_row(pending.i / T::kGroups) == kNew) {
        const StateVector kv[1] = {pending.row.kv()};
        const StateVector score[1] = {pending.row.score(pending.bias)};
        reduce(kv, score);
      }
      pending = load_new_row(pending.i + T::kGroups);
    }
  }

  __device__ void merge_rows_abreast() {
    if constexpr (T::kRowsAbreast > 1) {
#pragma unroll
      for (int v = 0; v < T::kVector; ++v) {
        float max = partial.max[v];
#pragma unroll
        for (int offset = T::kLanes; offset < 32; offset *= 2) {
          max = fmaxf(max, __shfl_xor_sync(~0u, max, offset));
        }
        partial.raise_max(v, max);
#pragma unroll
        for (int offset = T::kLanes; offset < 32; offset *= 2) {
          partial.sum[v] += __shfl_xor_sync(~0u, partial.sum[v], offset);
          partial.weighted[v] += __shfl_xor_sync(~0u, partial.weighted[v], offset);
        }
      }
    }
  }
};

// Merges the warps' partials, and stores the slice's values.
template <class Config, class Geometry>
__device__ void store_merged(SharedPlan<Config, Geometry>& smem,
                             const Partial<Tile<Config, Geometry>::kVector>& partial,
                             typename Config::Out* out) {
  using T = Tile<Config, Geometry>;
  using Out = typename Config::Out;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int lane_column = lane % T::kLanes * T::kVector;
  if constexpr (Geometry::kWarps == 1) {
    if (lane >= T::kLanes) return;
    Vector<Out, T::kVector> value;
#pragma unroll
    for (int v = 0; v < T::kVector; ++v) value.x[v] = round_to<Out>(partial.value(v));
    store(out + lane_column, value);
  } else {
    if (lane < T::kLanes) {
#pragma unroll
      for (int v = 0; v < T::kVector; ++v) {
        smem.max[warp][lane_column + v] = partial.max[v];
        smem.sum[warp][lane_column + v] = partial.sum[v];
        smem.weighted[warp][lane_column + v] = partial.weighted[v];
      }
    }
    __syncthreads();  // the partials of every warp, before any thread merges them
    for (int c = threadIdx.x; c < T::kColumns; c += T::kThreads) {
      float max = kNegInf;
#pragma unroll
      for (int w = 0; w < Geometry::kWarps; ++w) max = fmaxf(max, smem.max[w][c]);
      Partial<1> all;
#pragma unroll
      for (int w = 0; w < Geometry::kWarps; ++w) {
        const float scale = exp_fast(smem.max[w][c] - finite_or_zero(max));
        all.sum[0] += scale * smem.sum[w][c];
        all.weighted[0] += scale * smem.weighted[w][c];
      }
      out[c] = round_to<Out>(all.value(0));
    }
  }
}

template <class Config, class Geometry>
__global__ void __launch_bounds__(Tile<Config, Geometry>::kThreads)
    paged_kv_compress_kernel(const __grid_constant__ DecodeParams p) {
  using T = Tile<Config, Geometry>;
  using Out = typename Config::Out;
  __shared__ SharedPlan<Config, Geometry> smem;

  const uint32_t index = blockIdx.x / T::kSlices;
  const int slice_column = static_cast<int>(blockIdx.x % T::kSlices) * T::kColumns;
  const int m = blockIdx.z * gridDim.y + blockIdx.y;
  if (m >= p.num_windows) return;
  const Request<Config> r = request_at<Config>(p, index);
  RowWriter<Config, Geometry> writer(p, r, m, slice_column);

  Out* out = static_cast<Out*>(p.kv_comp) +
             (int64_t{index} * p.num_windows + m) * Config::kHeadDim + slice_column;
  const int window = r.first_window + m;
  const int lane_column = threadIdx.x % T::kLanes * T::kVector;
  WindowReducer<Config, Geometry> reducer(p, r, smem, window, slice_column + lane_column);
  typename WindowReducer<Config, Geometry>::PendingRow new_row;
  typename WindowReducer<Config, Geometry>::Step rows;
  const bool completed = window < r.end_window;
  if (completed) {
    new_row = reducer.load_first_new_row();
    reducer.find_rows();
    rows = reducer.load_step(0);
  }
  writer.write(p);
  if (!completed) {
#pragma unroll 1
    for (int c = threadIdx.x; c < T::kColumns; c += T::kThreads) out[c] = round_to<Out>(0.0f);
    return;
  }
  reducer.reduce_new_rows(new_row);  // while the stored ones arrive
  if constexpr (Geometry::kPrefetch) {
    // Two buffers by name: copying one to the other would wait for its loads.
    static_assert(T::kSteps % 2 == 0);
#pragma unroll 1
    for (int step = 0; step < T::kSteps; step += 2) {
      const auto next = reducer.load_step(step + 1);
      reducer.reduce(rows.kv, rows.score);
      if (step + 2 < T::kSteps) rows = reducer.load_step(step + 2);
      reducer.reduce(next.kv, next.score);
    }
  } else {
#pragma unroll 1
    for (int step = 1; step < T::kSteps; ++step) {
      reducer.reduce(rows.kv, rows.score);
      rows = reducer.load_step(step);
    }
    reducer.reduce(rows.kv, rows.score);
  }
  reducer.merge_rows_abreast();

  store_merged<Config, Geometry>(smem, reducer.partial, out);
}

}  // namespace jax_dsv4
