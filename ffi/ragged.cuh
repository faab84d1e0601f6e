// A ragged batch (ragged.h) on an NVIDIA GPU: device code only.
//
// There are two kinds of task in one launch: a slot, which is a row of `kv_comp` and the window
// that goes there, if there is one; and the end of a request, the rows of the window that it leaves
// open. Nobody has counted anything before: the threads of a task find whose it is in `cu_q_lens`.
//
// A thread has four channels. It takes new rows from kv_score, rounded as they are stored, and
// those from before the call from the state; nothing waits for a store. Value of a window, per
// channel:
//   sum_i softmax_i(score[i]) kv[i].
// On a state of prefixes (prefix.h) the rows before the call are one row. The new rows of a window
// any of which is stored are merged one after the other; values are a softmax as on raw states.
//
// Bytes: 2 S per new row, elements of kv_score, and 2 S per row that is stored, of the state; 2 D
// per row before the call of a window that is completed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "config.h"
#include "decode_raw.cuh"
#include "numeric.h"
#include "paging.h"
#include "prefix.h"
#include "ragged.h"
#include "vector.cuh"

namespace jax_dsv4 {

// The request of a task, and its new rows, begin <= row < end of kv_score. Negative index:
// nobody's.
struct Owner {
  int32_t index = -1, begin = 0, end = 0, length = 0;
};

// The last request that `starts(index, begin)` holds for, which is so for the first few of all, and
// for none after them. Called by whole warps.
template <class Starts>
__device__ __forceinline__ Owner find_last(const RaggedParams& p, uint32_t group, Starts&& starts) {
  const int32_t* const entries = p.cu_q_lens + group * p.cu_q_lens_stride;
  const int32_t* const lengths = p.kv_lens + group * p.kv_lens_stride;
  const int lane = threadIdx.x % 32, batch = p.batch;
  const int count = p.num_seqs_of(group);
  Owner last;
#pragma unroll 1
  for (int first = 0; first <= batch; first += 32) {
    const int i = first + lane;
    const int entry = load_if(i <= batch, entries + i, 0);
    const int length = load_if(i < batch, lengths + i, 0);
    // A running maximum, which the entries of a sane call are.
    int begin = max(p.clamped(entry), last.end);
    const int before = __shfl_up_sync(~0u, begin, 1);
    if (__any_sync(~0u, lane > 0 && begin < before && i <= count)) {
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(~0u, begin, offset);
        if (lane >= offset) begin = max(begin, other);
      }
    }
    const int number = __popc(__ballot_sync(~0u, i <= count && starts(i, begin)));
    if (number > 0) {
      last.index = first + number - 1;
      last.begin = __shfl_sync(~0u, begin, number - 1);
      last.length = __shfl_sync(~0u, length, number - 1);
    }
    last.end = __shfl_sync(~0u, begin, min(number, 31));  // where the next one begins
    if (number < 32) break;
  }
  return last.index < count ? last : Owner{};
}

// The request whose window, if it completes one, has this slot.
template <class Config>
__device__ __forceinline__ Owner find_owner(const RaggedParams& p, uint32_t group, int32_t slot) {
  return find_last(p, group,
                   [&](int i, int begin) { return first_slot<Config>(i, begin) <= slot; });
}
__device__ __forceinline__ Owner find_request(const RaggedParams& p, uint32_t group,
                                              int32_t index) {
  return find_last(p, group, [&](int i, int) { return i <= index; });
}

inline constexpr int kRaggedVector = 4;  // channels of a thread

// A row's four channels in one half, as they are stored.
template <class Config>
struct StoredVector {
  Vector<typename Config::State, kRaggedVector> kv, score;
};

// One thread's view of a request's rows.
template <class Config, StateFormat kFormat>
struct RaggedRows {
  using KvScore = typename Config::KvScore;
  using State = typename Config::State;
  using NewVector = Vector<KvScore, kRaggedVector>;
  using StateVector = Vector<State, kRaggedVector>;
  using PartialValue = Partial<kRaggedVector>;
  static constexpr int R = Config::kRatio, S = Config::kStateDim, D = Config::kHeadDim;

  const RaggedParams& p;
  Request<Config> r;
  int32_t length, start;  // new rows are at start <= position < length
  int column;             // of D

  __device__ __forceinline__ RaggedRows(const RaggedParams& p, uint32_t group, const Owner& owner,
                                        int column)
      : p(p),
        r(ragged_request_at<Config>(p, group, owner.index, owner.length, owner.begin, owner.end)),
        column(column) {
    length = r.num_new > 0 ? owner.length : 0;
    start = max(r.first_position, 0);
  }

  __device__ __forceinline__ bool is_new(int32_t position) const {
    return position >= start && position < length;
  }
  // Whether any row of a window may have to be stored.
  __device__ __forceinline__ bool may_store(int32_t window) const {
    const int32_t shortest = max(length - p.rule.max_rewind, 0);
    return p.rule.all || p.rule.resumes || (int64_t{window} + 1 + Config::kOverlap) * R >= shortest;
  }
  __device__ __forceinline__ bool stores(int32_t position) const {
    return is_new(position) && is_stored<Config, kFormat>(p.rule, position, length);
  }

  // As projected, where there is such a row.
  __device__ __forceinline__ void load_new(int32_t position, int half, NewVector& kv,
                                           NewVector& score) const {
    const bool exists = is_new(position);
    const KvScore* const row =
        r.kv_score + int64_t{position - r.first_position} * p.row_size + half * D + column;
    kv = load_once_if(exists, row, NewVector{});
    score = load_once_if(exists, row + p.score_offset, NewVector{});
  }
  __device__ __forceinline__ Vector<float, kRaggedVector> load_bias(int32_t position,
                                                                    int half) const {
    Vector<float, kRaggedVector> bias;
#pragma unroll
    for (int v = 0; v < kRaggedVector; ++v) bias.x[v] = -0.0f;  // adding +0 would lose a -0
    if (r.ape != nullptr) {
      bias = load<float, kRaggedVector>(r.ape + position % R * S + half * D + column);
    }
    return bias;
  }
  __device__ __forceinline__ StoredVector<Config> as_stored(
      const NewVector& kv, const NewVector& score, const Vector<float, kRaggedVector>& bias) const {
    StoredVector<Config> row;
#pragma unroll
    for (int v = 0; v < kRaggedVector; ++v) {
      row.kv.x[v] = round_to<State>(to_f32(kv.x[v]));
      row.score.x[v] = round_to<State>(to_f32(score.x[v]) + bias.x[v]);
    }
    return row;
  }

  // Where a row is in each of the state's arrays.
  struct Place {
    uint32_t kv = kNowhere, score = kNowhere;
    __device__ __forceinline__ bool exists() const { return kv != kNowhere && score != kNowhere; }
    __device__ __forceinline__ Place next(int rows) const {
      return {kv == kNowhere ? kNowhere : kv + rows, score == kNowhere ? kNowhere : score + rows};
    }
  };
  __device__ __forceinline__ Place find(bool wanted, int32_t position) const {
    return {r.row_at(p.paging, look_up_if(wanted, p.paging, r.kv_table, position)),
            r.row_at(p.paging, look_up_if(wanted, p.paging, r.score_table, position))};
  }
  __device__ __forceinline__ State* kv_at(uint32_t row, int half) const {
    return static_cast<State*>(p.kv) + uint64_t{row} * S + half * D + column;
  }
  __device__ __forceinline__ State* score_at(uint32_t row, int half) const {
    return static_cast<State*>(p.score) + uint64_t{row} * S + half * D + column;
  }
  __device__ __forceinline__ StoredVector<Config> load_stored(const Place& place, int half) const {
    StoredVector<Config> none;
#pragma unroll
    for (int v = 0; v < kRaggedVector; ++v) {
      none.kv.x[v] = round_to<State>(0);
      none.score.x[v] = round_to<State>(kNegInf);
    }
    const bool exists = place.exists();
    const uint32_t kv = exists ? place.kv : 0, score = exists ? place.score : 0;
    return {load_once_if(exists, kv_at(kv, half), none.kv),
            load_once_if(exists, score_at(score, half), none.score)};
  }
  __device__ __forceinline__ void store_stored(const Place& place, int half,
                                               const StoredVector<Config>& row) const {
    if (place.kv != kNowhere) store(kv_at(place.kv, half), row.kv);
    if (place.score != kNowhere) store(score_at(place.score, half), row.score);
  }

  // A row of a state of prefixes, as what its rows add to a value; and the other way round.
  __device__ __forceinline__ static PartialValue partial_of(const StoredVector<Config>& prefix) {
    PartialValue partial;
#pragma unroll
    for (int v = 0; v < kRaggedVector; ++v) {
      partial.max.x[v] = to_f32(prefix.score.x[v]);
      partial.sum.x[v] = partial.max.x[v] == kNegInf ? 0.0f : 1.0f;
      partial.weighted.x[v] = to_f32(prefix.kv.x[v]);
    }
    return partial;
  }
};

// The value of a channel, of two sets of rows.
__device__ __forceinline__ float value_of(const Partial<kRaggedVector>& a,
                                          const Partial<kRaggedVector>& b, int v) {
  const float subtracted = finite(fmaxf(a.max.x[v], b.max.x[v]));
  const float of_a = fast_exp(a.max.x[v] - subtracted), of_b = fast_exp(b.max.x[v] - subtracted);
  const float sum = of_a * a.sum.x[v] + of_b * b.sum.x[v];
  const float weighted = of_a * a.weighted.x[v] + of_b * b.weighted.x[v];
  return sum == 0 ? 0.0f : fast_quotient(weighted, sum);
}

// Where values go that no record is made of: `kv_comp`, of either type.
struct ValueTarget {
  void* kv_comp;  // [G, T / R + B, D]
  bool is_bf16;

  __device__ __forceinline__ void store_one(int64_t at, float value) const {
    if (is_bf16) {
      static_cast<bf16*>(kv_comp)[at] = round_to<bf16>(value);
    } else {
      static_cast<float*>(kv_comp)[at] = value;
    }
  }
  __device__ __forceinline__ void store_four(int64_t at,
                                             const Vector<float, kRaggedVector>& value) const {
    if (is_bf16) {
      Vector<bf16, kRaggedVector> rounded;
#pragma unroll
      for (int v = 0; v < kRaggedVector; ++v) rounded.x[v] = round_to<bf16>(value.x[v]);
      store(static_cast<bf16*>(kv_comp) + at, rounded);
    } else {
      store(static_cast<float*>(kv_comp) + at, value);
    }
  }
};

// ------------------------------------------------------------------------------ long windows

// What follows from a configuration and a geometry: a CTA reduces one window over a slice of
// kColumns channels, by kRowGroups of kLanes threads with kRows neighbours each.
template <class Config, class Geometry>
struct LongTile {
  static constexpr int kThreads = 32 * Geometry::kWarps;
  static constexpr int kMinCtas = Geometry::kMinCtas;
  static constexpr int kVector = kRaggedVector;
  static constexpr int kLanes = Geometry::kLanes;
  static constexpr int kColumns = kLanes * kVector;
  static constexpr int kSlices = Config::kHeadDim / kColumns;
  static constexpr int kRowGroups = kThreads / kLanes;
  static constexpr int kRows = Config::kRatio / kRowGroups;
  static constexpr int kBatch = 4;  // rows that are added to a partial result at once
  static constexpr int kMergers = std::max(std::min(kThreads / kColumns, 4), 1);
  static constexpr int kPartialStride = 3 * kColumns + std::max(32 / kMergers, 4);
  static_assert(!Config::kOverlap, "long windows that overlap: no kernel");
  static_assert(kColumns * kSlices == Config::kHeadDim && kRows % kBatch == 0 &&
                    kRows * kRowGroups == Config::kRatio && kColumns <= kThreads,
                "a geometry's slices must fill head_dim, and its row groups share the rows evenly");
};

// Grid: x = (slots, then requests) x slices, z = groups.
template <class Config, StateFormat kFormat, class Geometry>
struct LongWindow {
  using T = LongTile<Config, Geometry>;
  using Rows = RaggedRows<Config, kFormat>;
  using Place = typename Rows::Place;
  static constexpr int R = Config::kRatio, D = Config::kHeadDim, kVector = kRaggedVector;

  struct SharedPlan {
    union {
      alignas(16) float partials[T::kRowGroups][T::kPartialStride];
      // Of the rows of each row group, then of those before it.
      alignas(16) float prefixes[T::kRowGroups][2][T::kColumns];
    };
  };

  const RaggedParams& p;
  const Rows rows;
  const int32_t window, base;  // base: position of the thread's first row
  const int row_group, lane_column;
  Partial<kVector> partial;
  Place first_place;  // of the thread's first row, where its rows are on one page

  __device__ __forceinline__ LongWindow(const RaggedParams& p, uint32_t group, const Owner& owner,
                                        int32_t window_, int slice, const Rows& rows)
      : p(p),
        rows(rows),
        window(window_),
        base(window_ * R + threadIdx.x / T::kLanes * T::kRows),
        row_group(threadIdx.x / T::kLanes),
        lane_column(threadIdx.x % T::kLanes * kVector) {}

  __device__ __forceinline__ bool is_on_one_page() const {
    return p.paging.page_size.value % T::kRows == 0;
  }
  __device__ __forceinline__ Place place_of(int j) const {
    return is_on_one_page() ? first_place.next(j) : rows.find(true, position_of(base, j));
  }

  // Adds all rows of the window, and stores the new ones that are to be stored. The whole CTA calls
  // it.
  __device__ __forceinline__ void add_rows(SharedPlan& smem) {
    typename Rows::NewVector kv[T::kRows], score[T::kRows];
#pragma unroll
    for (int j = 0; j < T::kRows; ++j) rows.load_new(position_of(base, j), 0, kv[j], score[j]);
    const bool may_store = rows.may_store(window), has_old = window * R < rows.start;
    const bool reads_old = kFormat == StateFormat::kRaw && base < rows.start;
    if (may_store || has_old) {
      first_place = rows.find(is_on_one_page() && base < rows.length, base);
    }
    if (has_old) add_old_rows(reads_old);
    [[maybe_unused]] Prefix open[kVector];  // before the thread's rows
#pragma unroll
    for (int v = 0; v < kVector; ++v) open[v] = prefix_of(v);
#pragma unroll
    for (int first = 0; first < T::kRows; first += T::kBatch) {
      typename Rows::StateVector stored_kv[T::kBatch], stored_score[T::kBatch];
#pragma unroll
      for (int i = 0; i < T::kBatch; ++i) {
        const int j = first + i;
        const bool is_new = rows.is_new(position_of(base, j));
        const auto row = rows.as_stored(kv[j], score[j], rows.load_bias(position_of(base, j), 0));
        bool counts = is_new;
        if (may_store && is_new) {
          const bool stores = rows.stores(position_of(base, j));
          if (stores) {
            const Place place = place_of(j);
            if (kFormat == StateFormat::kRaw) rows.store_stored(place, 0, row);
            if (p.rule.all) counts = place.exists();
          }
        }
        stored_kv[i] = row.kv;
        stored_score[i] = row.score;
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          if (!counts) {
            stored_kv[i].x[v] = round_to<typename Config::State>(0);
            stored_score[i].x[v] = round_to<typename Config::State>(kNegInf);
          }
        }
      }
      partial.add(stored_kv, stored_score);
    }
    if constexpr (kFormat == StateFormat::kPrefix) {
      if (may_store) store_prefixes(smem, kv, score, open);
    }
  }

  // What the thread's rows before the call add. On a state of prefixes they are one row, and the
  // first row group has it.
  __device__ __forceinline__ void add_old_rows(bool reads) {
    if constexpr (kFormat == StateFormat::kPrefix) {
      const int32_t position = rows.start - 1;
      if (row_group == 0) {
        partial = Rows::partial_of(rows.load_stored(rows.find(true, position), 0));
      }
    } else if (reads) {
#pragma unroll 1
      for (int first = 0; first < T::kRows; first += T::kBatch) {
        typename Rows::StateVector kv[T::kBatch], score[T::kBatch];
#pragma unroll
        for (int i = 0; i < T::kBatch; ++i) {
          Place place = place_of(first + i);
          if (base + first + i >= rows.start) place = Place{};
          const auto row = rows.load_stored(place, 0);
          kv[i] = row.kv;
          score[i] = row.score;
        }
        partial.add(kv, score);
      }
    }
  }

  __device__ __forceinline__ Prefix prefix_of(int v) const {
    const float sum = partial.sum.x[v];
    if (sum == 0) return {};
    return {partial.max.x[v] + logf(sum), partial.weighted.x[v] / sum};
  }

  // Merges row after row what the row groups hold, and stores the rows that are to be stored.
  __device__ __forceinline__ void store_prefixes(SharedPlan& smem,
                                                 const typename Rows::NewVector (&kv)[T::kRows],
                                                 const typename Rows::NewVector (&score)[T::kRows],
                                                 Prefix (&open)[kVector]) const {
    const auto at = [&](int group, int part, int column) -> float& {
      return smem.prefixes[group][part][column];
    };
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const Prefix all = prefix_of(v);
      at(row_group, 0, lane_column + v) = all.lse;
      at(row_group, 1, lane_column + v) = all.mean;
    }
    __syncthreads();  // all row groups' prefixes, before they are merged
    if (threadIdx.x < T::kColumns) {
      Prefix before;
#pragma unroll 1
      for (int g = 0; g < T::kRowGroups; ++g) {
        float &lse = at(g, 0, threadIdx.x), &mean = at(g, 1, threadIdx.x);
        const Prefix own = {lse, mean};
        lse = before.lse;
        mean = before.mean;
        before = merge(before, own);
      }
    }
    __syncthreads();  // what is before each row group, before it is read
    if (row_group > 0) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        open[v] = {at(row_group, 0, lane_column + v), at(row_group, 1, lane_column + v)};
      }
    }
#pragma unroll
    for (int j = 0; j < T::kRows; ++j) {
      if (!rows.is_new(position_of(base, j))) continue;
      const bool stores = rows.stores(position_of(base, j));
      const Place place = stores ? place_of(j) : Place{};
      auto row = rows.as_stored(kv[j], score[j], rows.load_bias(position_of(base, j), 0));
      const bool counts = !p.rule.all || place.exists();
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        if (counts) open[v] = merge(open[v], {to_f32(row.score.x[v]), to_f32(row.kv.x[v])});
        row.score.x[v] = round_to<typename Config::State>(open[v].lse);
        row.kv.x[v] = round_to<typename Config::State>(open[v].mean);
      }
      if (stores) rows.store_stored(place, 0, row);
    }
    __syncthreads();  // all reads, before the partial results take the same memory
  }
};

template <class Config, StateFormat kFormat, class Geometry>
__global__ void __launch_bounds__(LongTile<Config, Geometry>::kThreads,
                                  LongTile<Config, Geometry>::kMinCtas)
    ragged_long_kernel(const __grid_constant__ RaggedParams p,
                       const __grid_constant__ ValueTarget target) {
  using Window = LongWindow<Config, kFormat, Geometry>;
  using T = typename Window::T;
  constexpr int R = Config::kRatio, D = Config::kHeadDim;
  __shared__ typename Window::SharedPlan smem;
  const int32_t task = blockIdx.x / T::kSlices, slice = blockIdx.x % T::kSlices;
  const uint32_t group = blockIdx.z;
  const bool is_end = task >= p.num_windows;
  const Owner owner =
      is_end ? find_request(p, group, task - p.num_windows) : find_owner<Config>(p, group, task);
  const int lane_column = threadIdx.x % T::kLanes * kRaggedVector;
  const typename Window::Rows rows(p, group, owner, slice * T::kColumns + lane_column);
  const int64_t out = (int64_t{group} * p.num_windows + task) * D + slice * T::kColumns;
  const int32_t window =
      is_end ? rows.r.end_window
             : rows.r.first_window + task - first_slot<Config>(owner.index, owner.begin);
  const bool completes = owner.index >= 0 && window < rows.r.end_window;
  if (is_end) {
    if (owner.index < 0 || window * R >= rows.length || !rows.may_store(window)) return;
  } else if (!completes) {
    if (threadIdx.x < T::kLanes) target.store_four(out + lane_column, {});
    return;
  }
  Window w(p, group, owner, window, slice, rows);
  w.add_rows(smem);
  if (is_end) return;
  merge_row_groups<T>(
      smem.partials, w.partial, w.row_group, [] { __syncthreads(); },
      [&](int c, float value) { target.store_one(out + c, value); });
}

// ----------------------------------------------------------------------------- short windows

// A walker is D / 4 threads that go through `slots_per_walker` slots, one after the other: what a
// window adds to the next one's value stays in registers. A CTA has kWalkers.
template <class Config>
struct ShortTile {
  static constexpr int kLanes = Config::kHeadDim / kRaggedVector;
  static constexpr int kWalkers = std::max(128 / kLanes, 1);
  static constexpr int kThreads = kLanes * kWalkers;
  static constexpr int kHalves = Config::kOverlap ? 2 : 1;
  static_assert(kLanes % 32 == 0, "whole warps look for the request of a slot");
};

// One thread's part of the windows of one request.
template <class Config, StateFormat kFormat>
struct ShortWindows {
  using T = ShortTile<Config>;
  using Rows = RaggedRows<Config, kFormat>;
  using Place = typename Rows::Place;
  static constexpr int R = Config::kRatio, D = Config::kHeadDim, kVector = kRaggedVector;
  static constexpr int kOwn = T::kHalves - 1;  // the half that a window adds to its own value

  const RaggedParams& p;
  const Rows& rows;

  __device__ __forceinline__ bool is_on_one_page() const {
    return p.paging.page_size.value % R == 0;
  }
  __device__ __forceinline__ Place place_of(const Place& first, int32_t begin, int j) const {
    return is_on_one_page() ? first.next(j) : rows.find(true, position_of(begin, j));
  }

  // The new rows of a window, in one half.
  struct NewRows {
    typename Rows::NewVector kv[R], score[R];
  };
  __device__ __forceinline__ void load_new(int32_t window, int half, NewRows& loaded) const {
#pragma unroll
    for (int j = 0; j < R; ++j) {
      rows.load_new(position_of(window * R, j), half, loaded.kv[j], loaded.score[j]);
    }
  }

  // What all rows of a window add, in one half. `first`: the place of its first row, where it is
  // needed.
  __device__ __forceinline__ Partial<kVector> add_rows(int32_t window, int half,
                                                       const NewRows& loaded,
                                                       const Place& first) const {
    const int32_t begin = window * R;
    Partial<kVector> partial;
    if (begin < rows.start) {  // before the call
      if constexpr (kFormat == StateFormat::kPrefix) {
        // The row of the last one before the call: or of the last one of all.
        const int32_t last = min(rows.start, begin + R) - 1;
        const Place place = place_of(first, begin, last - begin);
        partial = Rows::partial_of(rows.load_stored(place, half));
      } else {
        typename Rows::StateVector kv[R], score[R];
#pragma unroll
        for (int j = 0; j < R; ++j) {
          Place place = place_of(first, begin, j);
          if (begin + j >= rows.start) place = Place{};
          const auto row = rows.load_stored(place, half);
          kv[j] = row.kv;
          score[j] = row.score;
        }
        partial.add(kv, score);
      }
      if (begin + R <= rows.start) return partial;
    }
    typename Rows::StateVector kv[R], score[R];
#pragma unroll
    for (int j = 0; j < R; ++j) {
      const int32_t position = position_of(begin, j);
      const auto row =
          rows.as_stored(loaded.kv[j], loaded.score[j], rows.load_bias(position, half));
      const bool counts =
          rows.is_new(position) && (!p.rule.all || place_of(first, begin, j).exists());
      kv[j] = row.kv;
      score[j] = row.score;
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        if (!counts) {
          kv[j].x[v] = round_to<typename Config::State>(0);
          score[j].x[v] = round_to<typename Config::State>(kNegInf);
        }
      }
    }
    partial.add(kv, score);
    return partial;
  }

  // Stores the new rows of a window that are to be stored, in one half.
  __device__ __forceinline__ void store_rows(int32_t window, int half, const NewRows& loaded,
                                             const Place& first) const {
    const int32_t begin = window * R;
    [[maybe_unused]] Prefix open[kVector];
    if (kFormat == StateFormat::kPrefix && begin < rows.start) {
      const Place place = place_of(first, begin, rows.start - 1 - begin);
      const auto row = rows.load_stored(place, half);
#pragma unroll
      for (int v = 0; v < kVector; ++v) open[v] = {to_f32(row.score.x[v]), to_f32(row.kv.x[v])};
    }
#pragma unroll
    for (int j = 0; j < R; ++j) {
      const int32_t position = position_of(begin, j);
      if (!rows.is_new(position)) continue;
      const bool stores = rows.stores(position);
      const Place place = stores ? place_of(first, begin, j) : Place{};
      auto row = rows.as_stored(loaded.kv[j], loaded.score[j], rows.load_bias(position, half));
      if constexpr (kFormat == StateFormat::kPrefix) {
        const bool counts = !p.rule.all || place.exists();
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          if (counts) open[v] = merge(open[v], {to_f32(row.score.x[v]), to_f32(row.kv.x[v])});
          row.score.x[v] = round_to<typename Config::State>(open[v].lse);
          row.kv.x[v] = round_to<typename Config::State>(open[v].mean);
        }
      }
      if (stores) rows.store_stored(place, half, row);
    }
  }

  // The place of a window's first row, if any row of it may have a place that matters.
  __device__ __forceinline__ Place find_first(int32_t window, bool may_store) const {
    const int32_t begin = window * R;
    return rows.find(is_on_one_page() && (may_store || begin < rows.start), begin);
  }
};

struct RaggedShortParams : RaggedParams {
  ValueTarget target;
  int32_t slots_per_walker;
  uint32_t num_walkers;  // of slots; one more for each request

  RaggedShortParams(const RaggedParams& p, const ValueTarget& target, int32_t slots_per_walker)
      : RaggedParams(p),
        target(target),
        slots_per_walker(slots_per_walker),
        num_walkers((p.num_windows + slots_per_walker - 1) / slots_per_walker) {}
};

// Grid: x = walkers of slots, then requests, kWalkers at once; z = groups.
template <class Config, StateFormat kFormat>
__global__ void __launch_bounds__(ShortTile<Config>::kThreads)
    ragged_short_kernel(const __grid_constant__ RaggedShortParams p) {
  using Windows = ShortWindows<Config, kFormat>;
  using T = typename Windows::T;
  using Rows = typename Windows::Rows;
  constexpr int R = Config::kRatio, D = Config::kHeadDim, kOwn = Windows::kOwn;
  constexpr bool kOverlap = Config::kOverlap;
  const uint32_t group = blockIdx.z;
  const uint32_t walker = blockIdx.x * T::kWalkers + threadIdx.x / T::kLanes;
  const int column = threadIdx.x % T::kLanes * kRaggedVector;
  if (walker >= p.num_walkers) {  // a request's end
    const uint32_t index = walker - p.num_walkers;
    if (index >= p.batch) return;
    const Owner owner = find_request(p, group, index);
    if (owner.index < 0) return;
    const Rows rows(p, group, owner, column);
    const Windows windows{p, rows};
    const int32_t window = rows.r.end_window;
    if (window * R >= rows.length || !rows.may_store(window)) return;
    typename Windows::NewRows loaded[T::kHalves];
#pragma unroll
    for (int half = 0; half < T::kHalves; ++half) windows.load_new(window, half, loaded[half]);
    const auto first = windows.find_first(window, true);
#pragma unroll
    for (int half = 0; half < T::kHalves; ++half) {
      windows.store_rows(window, half, loaded[half], first);
    }
    return;
  }
  const int32_t first_slot_ = walker * p.slots_per_walker;
  const int32_t end_slot = min(first_slot_ + p.slots_per_walker, p.num_windows);
#pragma unroll 1
  for (int32_t slot = first_slot_; slot < end_slot;) {
    const Owner owner = find_owner<Config>(p, group, slot);
    const Rows rows(p, group, owner, column);
    const Windows windows{p, rows};
    const int32_t own_slot = owner.index < 0 ? slot : first_slot<Config>(owner.index, owner.begin);
    const int32_t next_slot =
        owner.index < 0 ? slot + 1 : min(end_slot, first_slot<Config>(owner.index + 1, owner.end));
    Partial<kRaggedVector> before;
    bool has_before = false;
#pragma unroll 1
    for (; slot < next_slot; ++slot) {
      const int64_t out = (int64_t{group} * p.num_windows + slot) * D + column;
      const int32_t window = rows.r.first_window + slot - own_slot;
      if (owner.index < 0 || window >= rows.r.end_window) {
        p.target.store_four(out, {});
        continue;
      }
      const bool may_store = rows.may_store(window);
      const bool keeps = kOverlap && slot + 1 < next_slot && window + 1 < rows.r.end_window;
      typename Windows::NewRows loaded[T::kHalves];
      windows.load_new(window, kOwn, loaded[kOwn]);
      if (kOverlap && (keeps || may_store)) windows.load_new(window, 0, loaded[0]);
      const auto first = windows.find_first(window, may_store);
      if (kOverlap && !has_before) {
        before = {};
        if (window > 0) {
          typename Windows::NewRows last;
          windows.load_new(window - 1, 0, last);
          const auto place = windows.find_first(window - 1, p.rule.all);
          before = windows.add_rows(window - 1, 0, last, place);
        }
      }
      const auto own = windows.add_rows(window, kOwn, loaded[kOwn], first);
      Vector<float, kRaggedVector> value;
#pragma unroll
      for (int v = 0; v < kRaggedVector; ++v) value.x[v] = value_of(before, own, v);
      p.target.store_four(out, value);
      if (may_store) {
#pragma unroll
        for (int half = 0; half < T::kHalves; ++half) {
          windows.store_rows(window, half, loaded[half], first);
        }
      }
      if (keeps) before = windows.add_rows(window, 0, loaded[0], first);
      has_before = keeps;
    }
  }
}

}  // namespace jax_dsv4
