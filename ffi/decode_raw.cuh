// The decode operation on a raw state, on an NVIDIA GPU: device code only.
//
// Grid: x = requests x CTAs of a request, y = windows, z = groups. Of a request's CTAs, the first
// kSlices reduce, each one window over a slice of kColumns channels, and store its new rows unless
// windows overlap; the others store all remaining rows, a warp each, and the zeros of windows that
// the step does not complete.
//
// The threads of a CTA that reduces form kRowGroups, of kLanes lanes; a lane holds 16 bytes of a
// row, or 8. A row group takes one of the window's new rows from kv_score, rounded as it is stored,
// so that nothing waits for a store; then its stored rows, neighbours on one page, kRowsInFlight at
// a time:
//   value[d] = sum_i softmax_i(score[i, d]) kv[i, d].
// The row groups are merged through shared memory.
// Bytes: 2 kReducedRows D per completed window and 4 S per new row (half of it read), elements.
//
// Small batches are latency-bound: kv_len -> page -> row are three dependent loads. Every load of
// one link is issued before any is waited for; instructions are few, with one lookup per lane.

#pragma once

#include <algorithm>
#include <cstdint>

#include "config.h"
#include "decode.h"
#include "numeric.h"
#include "paging.h"
#include "vector.cuh"

namespace jax_dsv4 {

// The position of row t. It wraps around where there is no such row.
__device__ __forceinline__ int position_of(int first_position, int t) {
  return static_cast<int>(static_cast<uint32_t>(first_position) + t);
}

// What follows from a configuration and a geometry, for the kernel and its launch.
template <class Config, class Geometry>
struct Tile {
  using State = typename Config::State;
  static constexpr int kThreads = 32 * Geometry::kWarps;
  static constexpr int kVector = Geometry::kLaneBytes / sizeof(State);  // channels per lane
  static constexpr int kLanes = std::min(Geometry::kLanes, Config::kHeadDim / kVector);
  static constexpr int kColumns = kLanes * kVector;
  static constexpr int kSlices = Config::kHeadDim / kColumns;
  static constexpr int kRowGroups = kThreads / kLanes;
  static constexpr int kRowsPerLane = Config::kReducedRows / kRowGroups;
  static constexpr int kRowsInFlight = std::min(Geometry::kRowsInFlight, kRowsPerLane);
  // More channels per lane take more registers.
  static constexpr int kMinCtas = std::max(Geometry::kMinCtas - (kVector > 4 ? 1 : 0), 1);
  // Channels per lane of a warp that stores a row.
  static constexpr int kRowVector = std::min(kVector, Config::kStateDim / 32);
  // Threads that merge one column, and the distance of the row groups' partial results, such that
  // the threads of a warp read different banks.
  static constexpr int kMergers = std::max(std::min(kThreads / kColumns, 4), 1);
  static constexpr int kPartialStride = 3 * kColumns + std::max(32 / kMergers, 4);

  static_assert(kColumns * kSlices == Config::kHeadDim, "a geometry's slices must fill head_dim");
  static_assert(kRowsPerLane * kRowGroups == Config::kReducedRows,
                "a geometry's row groups must share a window's rows evenly");
  static_assert(kRowsPerLane % kRowsInFlight == 0 && Config::kRatio % kRowsPerLane == 0,
                "a lane's rows must be whole rounds of kRowsInFlight, and of one window");
};

// Prefetches a request's tables while its length is loaded: a sector of 8 entries per thread of it.
// Entries past those sectors are looked up all the same.
__device__ __forceinline__ void prefetch_tables(const PlainParams& p, uint32_t group,
                                                uint32_t index, uint32_t thread) {
  const uint32_t entry = 8 * thread;
  const auto prefetch = [&](const int32_t* tables, uint32_t stride) {
    prefetch_l1(tables + uint64_t{group * stride + index} * p.paging.max_pages + entry);
  };
  if (entry >= p.paging.max_pages) return;
  prefetch(p.kv_tables, p.kv_tables_stride);
  if (p.score_tables != p.kv_tables) prefetch(p.score_tables, p.score_tables_stride);
}

// A softmax-weighted sum over some of a window's rows, per channel, relative to their own maximum.
template <int kSize>
struct Partial {
  Vector<float, kSize> max, sum, weighted;

  __device__ Partial() {
#pragma unroll
    for (int v = 0; v < kSize; ++v) {
      max.x[v] = kNegInf;
      sum.x[v] = weighted.x[v] = 0;
    }
  }

  // Of these rows alone.
  template <class State, int kRows>
  __device__ static Partial of(const Vector<State, kSize> (&kv)[kRows],
                               const Vector<State, kSize> (&score)[kRows]) {
    Partial partial;
#pragma unroll
    for (int v = 0; v < kSize; ++v) {
      float highest = to_f32(score[0].x[v]);
#pragma unroll
      for (int j = 1; j < kRows; ++j) highest = fmaxf(highest, to_f32(score[j].x[v]));
      partial.max.x[v] = highest;
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const float weight = fast_exp(to_f32(score[j].x[v]) - finite(highest));
        partial.sum.x[v] += weight;
        partial.weighted.x[v] += weight * to_f32(kv[j].x[v]);
      }
    }
    return partial;
  }

  template <class State, int kRows>
  __device__ void add(const Vector<State, kSize> (&kv)[kRows],
                      const Vector<State, kSize> (&score)[kRows]) {
#pragma unroll
    for (int v = 0; v < kSize; ++v) {
      float highest = max.x[v];
#pragma unroll
      for (int j = 0; j < kRows; ++j) highest = fmaxf(highest, to_f32(score[j].x[v]));
      const float subtracted = finite(highest);
      const float scale = fast_exp(max.x[v] - subtracted);
      max.x[v] = highest;
      sum.x[v] *= scale;
      weighted.x[v] *= scale;
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const float weight = fast_exp(to_f32(score[j].x[v]) - subtracted);
        sum.x[v] += weight;
        weighted.x[v] += weight * to_f32(kv[j].x[v]);
      }
    }
  }

  // Other rows.
  __device__ void add(const Partial& other) {
#pragma unroll
    for (int v = 0; v < kSize; ++v) {
      const float highest = fmaxf(max.x[v], other.max.x[v]);
      const float scale = fast_exp(max.x[v] - finite(highest));
      const float scale_of_other = fast_exp(other.max.x[v] - finite(highest));
      max.x[v] = highest;
      sum.x[v] = sum.x[v] * scale + other.sum.x[v] * scale_of_other;
      weighted.x[v] = weighted.x[v] * scale + other.weighted.x[v] * scale_of_other;
    }
  }
};

// A vector of a new row, as it was projected and as it is stored.
template <class Config, int kSize>
struct NewVector {
  using State = typename Config::State;
  using KvScore = typename Config::KvScore;
  static constexpr int S = Config::kStateDim;

  Vector<KvScore, kSize> kv_in, score_in;
  Vector<float, kSize> bias;

  NewVector() = default;
  // Loads row t < next_n from channel `from` of the state on. This does not depend on the request's
  // length; the bias does.
  __device__ NewVector(const ParamsOf<Config>& p, const Request<Config>& r, int t, int from) {
    const KvScore* row = r.kv_score + int64_t{t} * row_size<Config>(p) + from;
    kv_in = load<KvScore, kSize>(row);
    score_in = load<KvScore, kSize>(scores_of<Config>(p, row));
#pragma unroll
    for (int v = 0; v < kSize; ++v) bias.x[v] = -0.0f;  // adding +0 would lose a -0
  }
  __device__ void load_bias(const Request<Config>& r, uint32_t position, int from) {
    if (r.ape != nullptr) {
      bias = load<float, kSize>(r.ape + position % Config::kRatio * S + from);
    }
  }

  __device__ Vector<State, kSize> kv() const {
    Vector<State, kSize> out;
#pragma unroll
    for (int v = 0; v < kSize; ++v) out.x[v] = round_to<State>(to_f32(kv_in.x[v]));
    return out;
  }
  __device__ Vector<State, kSize> score() const {
    Vector<State, kSize> out;
#pragma unroll
    for (int v = 0; v < kSize; ++v) out.x[v] = round_to<State>(to_f32(score_in.x[v]) + bias.x[v]);
    return out;
  }
};

// Whether the CTAs that reduce a window also store its new rows, of which each holds its own
// columns. Not where windows overlap: a row then belongs to two windows.
template <class Config>
inline constexpr bool kReducersStore = !Config::kOverlap;

// Stores row t of a request by one warp, unless a reducer does. The warp of every R-th row also
// stores the zeros of one row of the output, if no completed window goes there.
template <class Config, int kVector, bool kHasOut = true>
__device__ void write_row(const ParamsOf<Config>& p, const Request<Config>& r, int t,
                          typename Config::Out* out) {
  using State = typename Config::State;
  using Out = typename Config::Out;
  constexpr int R = Config::kRatio, S = Config::kStateDim, D = Config::kHeadDim;
  constexpr int kVectors = S / (32 * kVector);  // of a lane
  const int lane = threadIdx.x % 32;
  if (kHasOut && t % R == 0 && r.first_window + t / R >= r.end_window) {
    constexpr int kZeros = D / 32;
    store(out + t / R * D + lane * kZeros, Vector<Out, kZeros>{});
  }
  const int position = position_of(r.first_position, t);
  if (t >= r.num_new || position < 0) return;
  if (kReducersStore<Config> && position < r.end_window * R) return;
  const TableEntry kv_entry = look_up(p.paging, r.kv_table, position);
  const TableEntry score_entry = look_up(p.paging, r.score_table, position);
  NewVector<Config, kVector> row[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int column = (32 * i + lane) * kVector;
    row[i] = NewVector<Config, kVector>(p, r, t, column);
    row[i].load_bias(r, position, column);
  }
  const uint32_t kv_row = r.row_at(p.paging, kv_entry);
  const uint32_t score_row = r.row_at(p.paging, score_entry);
  State* kv = static_cast<State*>(p.kv) + uint64_t{kv_row} * S;
  State* score = static_cast<State*>(p.score) + uint64_t{score_row} * S;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int column = (32 * i + lane) * kVector;
    if (kv_row != kNowhere) store(kv + column, row[i].kv());
    if (score_row != kNowhere) store(score + column, row[i].score());
  }
}

// What a row group of a CTA holds of one slice of a window, of a thread's channels, in shared
// memory.
template <class T>
__device__ __forceinline__ void store_partial(float (&partials)[T::kRowGroups][T::kPartialStride],
                                              int row_group, const Partial<T::kVector>& partial) {
  float* const to = partials[row_group] + threadIdx.x % T::kLanes * T::kVector;
  store(to, partial.max);
  store(to + T::kColumns, partial.sum);
  store(to + 2 * T::kColumns, partial.weighted);
}
template <class T>
__device__ __forceinline__ Partial<T::kVector> load_partial(
    const float (&partials)[T::kRowGroups][T::kPartialStride], int row_group) {
  const float* const from = partials[row_group] + threadIdx.x % T::kLanes * T::kVector;
  Partial<T::kVector> partial;
  partial.max = load<float, T::kVector>(from);
  partial.sum = load<float, T::kVector>(from + T::kColumns);
  partial.weighted = load<float, T::kVector>(from + 2 * T::kColumns);
  return partial;
}

// Merges what the row groups of a CTA hold of one slice of a window; emits the slice's values, each
// by one thread. Each is called by every thread with its own part. `wait`: for all of them.
template <class T, class Wait, class Emit>
__device__ __forceinline__ void merge_row_groups(
    float (&partials)[T::kRowGroups][T::kPartialStride], const Partial<T::kVector>& partial,
    int row_group, Wait&& wait, Emit&& emit) {
  store_partial<T>(partials, row_group, partial);
  wait();  // the partial results of every row group, before any thread merges them
  constexpr int kPerThread = T::kRowGroups / T::kMergers;
  const int first = threadIdx.x % T::kMergers;
  for (int c = threadIdx.x / T::kMergers; c < T::kColumns; c += T::kThreads / T::kMergers) {
    float max[kPerThread], highest = kNegInf;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      max[k] = partials[first + k * T::kMergers][c];
      highest = fmaxf(highest, max[k]);
    }
#pragma unroll
    for (int offset = 1; offset < T::kMergers; offset *= 2) {
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, offset));
    }
    const float subtracted = finite(highest);
    float sum = 0, weighted = 0;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const float* from = partials[first + k * T::kMergers] + c;
      const float scale = fast_exp(max[k] - subtracted);
      sum += scale * from[T::kColumns];
      weighted += scale * from[2 * T::kColumns];
    }
#pragma unroll
    for (int offset = 1; offset < T::kMergers; offset *= 2) {
      sum += __shfl_xor_sync(~0u, sum, offset);
      weighted += __shfl_xor_sync(~0u, weighted, offset);
    }
    if (first == 0) emit(c, sum == 0 ? 0.0f : fast_quotient(weighted, sum));
  }
}

// One thread's part of one window.
template <class Config, class Geometry>
struct WindowReducer {
  using T = Tile<Config, Geometry>;
  using State = typename Config::State;
  using StateVector = Vector<State, T::kVector>;
  static constexpr int R = Config::kRatio, S = Config::kStateDim;

  struct SharedPlan {  // the row groups' partial results: max, sum and weighted, [kColumns] each
    alignas(16) float partials[T::kRowGroups][T::kPartialStride];
  };

  const ParamsOf<Config>& p;
  const Request<Config>& r;
  const int window;
  const int begin;  // position of the first reduced row; negative where there is none
  const int row_group;
  const int column;  // of D
  Partial<T::kVector> partial;

  __device__ WindowReducer(const ParamsOf<Config>& p, const Request<Config>& r, int window,
                           int slice_column)
      : p(p),
        r(r),
        window(window),
        begin(static_cast<int>((window + 1u) * R - Config::kReducedRows)),
        row_group(threadIdx.x / T::kLanes),
        column(slice_column + threadIdx.x % T::kLanes * T::kVector) {}

  // Where windows overlap, the window before this one contributes the first half of its rows.
  __device__ int column_at(uint32_t position) const {
    return Config::kOverlap && position >= window * uint32_t{R} ? Config::kHeadDim + column
                                                                : column;
  }

  // One of the window's new rows, and where it is stored.
  struct NewRow {
    bool exists = false;
    NewVector<Config, T::kVector> vector;
    TableEntry kv_entry, score_entry;
  };
  __device__ NewRow load_new_row(int number) const {
    NewRow row;
    const uint32_t position = max(max(begin, r.first_position), 0) + static_cast<uint32_t>(number);
    // The caller ignores rows of a window that is not completed, but these may not exist.
    if (position >= (window + 1u) * R || position - r.first_position >= r.num_new) return row;
    row.exists = true;
    const int from = column_at(position);
    row.vector = NewVector<Config, T::kVector>(p, r, position - r.first_position, from);
    row.vector.load_bias(r, position, from);
    row.kv_entry = look_up(p.paging, r.kv_table, position);
    row.score_entry = look_up(p.paging, r.score_table, position);
    return row;
  }
  __device__ void add(const NewRow& row) {
    if (!row.exists) return;
    const uint32_t kv_row = r.row_at(p.paging, row.kv_entry);
    const uint32_t score_row = r.row_at(p.paging, row.score_entry);
    const StateVector kv[1] = {row.vector.kv()}, score[1] = {row.vector.score()};
    if constexpr (kReducersStore<Config>) {
      if (kv_row != kNowhere)
        store(static_cast<State*>(p.kv) + uint64_t{kv_row} * S + column, kv[0]);
      if (score_row != kNowhere) {
        store(static_cast<State*>(p.score) + uint64_t{score_row} * S + column, score[0]);
      }
    }
    if (kv_row != kNowhere && score_row != kNowhere) partial.add(kv, score);
  }

  // This lane's stored rows: neighbours on one page, which the choice of a geometry ensures.
  struct StoredRows {
    int count;
    TableEntry kv_entry, score_entry;
    const State* kv;
    const State* score;
  };
  __device__ StoredRows look_up_stored_rows() const {
    StoredRows rows;
    const int first = position_of(begin, row_group * T::kRowsPerLane);
    rows.count = first >= 0 ? min(r.first_position - first, T::kRowsPerLane) : 0;
    rows.kv_entry = look_up(p.paging, r.kv_table, max(first, 0));
    rows.score_entry = look_up(p.paging, r.score_table, max(first, 0));
    return rows;
  }
  __device__ void find_stored_rows(StoredRows& rows) const {
    const uint32_t kv_row = r.row_at(p.paging, rows.kv_entry);
    const uint32_t score_row = r.row_at(p.paging, rows.score_entry);
    if (kv_row == kNowhere || score_row == kNowhere) rows.count = 0;
    const int from = column_at(begin + row_group * T::kRowsPerLane);
    rows.kv = static_cast<const State*>(p.kv) + uint64_t{kv_row} * S + from;
    rows.score = static_cast<const State*>(p.score) + uint64_t{score_row} * S + from;
  }

  struct Rows {
    StateVector kv[T::kRowsInFlight];
    StateVector score[T::kRowsInFlight];
  };
  __device__ static Rows load_rows(const StoredRows& rows, int first) {
    Rows loaded;
#pragma unroll
    for (int j = 0; j < T::kRowsInFlight; ++j) {
#pragma unroll
      for (int v = 0; v < T::kVector; ++v) {
        loaded.score[j].x[v] = round_to<State>(kNegInf);
        loaded.kv[j].x[v] = round_to<State>(0);
      }
      if (first + j < rows.count) {
        loaded.score[j] = load_once<State, T::kVector>(rows.score + (first + j) * S);
        loaded.kv[j] = load_once<State, T::kVector>(rows.kv + (first + j) * S);
      }
    }
    return loaded;
  }

  // Adds stored row `i` of this lane, on whichever page it is.
  __device__ void add_stored_row(int i) {
    const int position = begin + row_group * T::kRowsPerLane + i;
    const uint32_t kv_row = r.row_at(p.paging, look_up(p.paging, r.kv_table, position));
    const uint32_t score_row = r.row_at(p.paging, look_up(p.paging, r.score_table, position));
    if (kv_row == kNowhere || score_row == kNowhere) return;
    const int from = column_at(position);
    const StateVector kv[1] = {load_once<State, T::kVector>(static_cast<const State*>(p.kv) +
                                                            uint64_t{kv_row} * S + from)};
    const StateVector score[1] = {load_once<State, T::kVector>(static_cast<const State*>(p.score) +
                                                               uint64_t{score_row} * S + from)};
    partial.add(kv, score);
  }

  // Stores this lane's columns of the new rows that no reducer of a window stores.
  __device__ void store_other_rows() const {
    int t = max(-r.first_position, 0);
    if (kReducersStore<Config>) t = max(t, r.end_window * R - r.first_position);
#pragma unroll 1
    for (t += row_group; t < r.num_new; t += T::kRowGroups) {
      const int position = r.first_position + t;
      const TableEntry kv_entry = look_up(p.paging, r.kv_table, position);
      const TableEntry score_entry = look_up(p.paging, r.score_table, position);
      constexpr int kHalves = S / Config::kHeadDim;
      NewVector<Config, T::kVector> row[kHalves];
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        row[half] = NewVector<Config, T::kVector>(p, r, t, half * Config::kHeadDim + column);
        row[half].load_bias(r, position, half * Config::kHeadDim + column);
      }
      const uint32_t kv_row = r.row_at(p.paging, kv_entry);
      const uint32_t score_row = r.row_at(p.paging, score_entry);
      State* const kv = static_cast<State*>(p.kv) + uint64_t{kv_row} * S + column;
      State* const score = static_cast<State*>(p.score) + uint64_t{score_row} * S + column;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        if (kv_row != kNowhere) store(kv + half * Config::kHeadDim, row[half].kv());
        if (score_row != kNowhere) store(score + half * Config::kHeadDim, row[half].score());
      }
    }
  }
};

template <class Config, class Geometry>
__global__ void __launch_bounds__(Tile<Config, Geometry>::kThreads,
                                  Tile<Config, Geometry>::kMinCtas)
    paged_kv_compress_kernel(const __grid_constant__ ParamsOf<Config> p,
                             const __grid_constant__ Divisor ctas_per_request) {
  using T = Tile<Config, Geometry>;
  using Reducer = WindowReducer<Config, Geometry>;
  using Out = typename Config::Out;
  __shared__ typename Reducer::SharedPlan smem;

  const uint32_t index = blockIdx.x / ctas_per_request;
  const int part = blockIdx.x - index * ctas_per_request.value;
  prefetch_tables(p, blockIdx.z, index, threadIdx.x);
  const Request<Config> r = request_at<Config>(p, blockIdx.z, index);
  Out* out = static_cast<Out*>(p.kv_comp) +
             (int64_t{blockIdx.z} * p.batch + index) * p.num_windows * Config::kHeadDim;
  // The unlikely branches are moved out of line: instructions that are skipped are fetched, too.
  if (__builtin_expect(part >= T::kSlices, 0)) {
    const int t = (part - T::kSlices) * Geometry::kWarps + threadIdx.x / 32;
    if (t < p.next_n && blockIdx.y == 0) write_row<Config, T::kRowVector>(p, r, t, out);
    return;
  }
  const int window = r.first_window + blockIdx.y;
  const int slice_column = part * T::kColumns;
  Reducer reducer(p, r, window, slice_column);
  auto stored = reducer.look_up_stored_rows();
  const auto new_row = reducer.load_new_row(reducer.row_group);
  if (__builtin_expect(window >= r.end_window, 0))
    return;  // the lookups were issued without this wait
  reducer.find_stored_rows(stored);
  auto rows = reducer.load_rows(stored, 0);
  reducer.add(new_row);
#pragma unroll 1
  for (int number = reducer.row_group + T::kRowGroups;; number += T::kRowGroups) {
    const auto another = reducer.load_new_row(number);  // there seldom is one
    if (!another.exists) break;
    reducer.add(another);
  }
#pragma unroll 1
  for (int first = 0;;) {
    reducer.partial.add(rows.kv, rows.score);
    if ((first += T::kRowsInFlight) == T::kRowsPerLane) break;
    rows = reducer.load_rows(stored, first);
  }
  out += int64_t{blockIdx.y} * Config::kHeadDim + slice_column;
  merge_row_groups<T>(
      smem.partials, reducer.partial, reducer.row_group, [] { __syncthreads(); },
      [&](int c, float value) { out[c] = round_to<Out>(value); });
}

}  // namespace jax_dsv4
