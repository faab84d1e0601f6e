// Ragged batches (ragged.cuh): requests that bring few new rows, as those do that decode. Device
// code only.
//
// Such a request completes at most one window. Threads have all of its rows, or one half where
// windows overlap, in some channels each, whatever slots it has: they know whose they are before
// anything is loaded, so that tables come while lengths do. Then, as in a decode step, one row is
// looked up by each lane, and all rows that the state has of the window are on their way before any
// is waited for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "config.h"
#include "decode_raw.cuh"
#include "prefix.h"
#include "ragged.h"
#include "ragged_rows.cuh"
#include "record_maker.cuh"
#include "tuning.h"
#include "vector.cuh"

namespace jax_dsv4 {

// At most so many rows are few.
template <class Config>
inline constexpr int kFewRows = std::min(Config::kRatio, 4);

// New rows and their biases, of each thread its own channels: on their way into shared memory, or
// where a thread has one channel into registers.
template <class Config, int kThreads, int kVector>
struct FewPlan {
  StagedRows<typename Config::KvScore, kFewRows<Config>, kThreads, kVector> rows;
  Vector<float, kVector> biases[kFewRows<Config>][kThreads];
};
template <class Config, int kThreads>
struct FewPlan<Config, kThreads, 1> {};

// One thread's part of such a request.
template <class Config, StateFormat kFormat, int kVector, int kThreads>
struct FewRows {
  using Rows = RaggedRows<Config, kFormat, kVector>;
  using Plan = FewPlan<Config, kThreads, kVector>;
  using Stored = typename Rows::Stored;
  static constexpr int R = Config::kRatio;
  static constexpr int kHalves = Config::kOverlap ? 2 : 1, kOwn = kHalves - 1;
  static constexpr int kRows = kFewRows<Config>;
  // On a raw state, of a window of many rows, nothing but the new ones: none that is completed.
  static constexpr bool kHasValues = kFormat == StateFormat::kPrefix || R <= 32;
  // What a raw state has of the window, and where windows overlap of the one before it.
  static constexpr int kOldRows = kHasValues ? kHalves * R - 1 : 0;

  Plan& smem;
  const Rows& rows;
  const int half;
  const int32_t start;  // position of the first row
  const int count;      // of new rows
  const int lane = threadIdx.x % 32;
  const int32_t window = start / R;
  const bool has_value;  // whether the value of that window is made of them
  // Lane j: of new row j, or of a row from before the call.
  Place place;
  uint32_t counted = 0, stored = 0;  // of new rows, one bit each
  static constexpr bool kInRegisters = kVector == 1;
  typename Rows::Projected projected[kRows];  // if so
  typename Rows::Bias biases[kRows];

  // Rows start <= position < end; `completes`: whether that is to complete their window.
  __device__ __forceinline__ FewRows(Plan& smem, const Rows& rows, int half, int32_t start,
                                     int32_t end, bool completes)
      : smem(smem),
        rows(rows),
        half(half),
        start(start),
        count(end - start),
        has_value(kHasValues && half == kOwn && completes) {}

  // has = begin(whether the window has a value, window), early, and if it has,
  // emit(has, window, value).
  template <class Begin, class Emit>
  __device__ __forceinline__ void run(Begin&& begin, Emit&& emit) {
    place = look_up();  // first, as old rows wait for it
    fetch_new();
    const auto has = begin(has_value, window);
    Vector<float, kVector> value;
    if constexpr (kFormat == StateFormat::kPrefix) {
      value = merge_prefixes();
    } else {
      value = reduce_rows();
    }
    if (has_value) emit(has, window, value);
  }

 private:
  // Of its window. The position of a row that does not exist may wrap around.
  __device__ __forceinline__ int row_of(int j) const {
    return static_cast<uint32_t>(position_of(start, j)) % R;
  }
  __device__ __forceinline__ void fetch_new() {
    const bool has_ape = rows.r.ape != nullptr;
    const float* const ape = rows.r.ape + half * Rows::D + rows.column;
    const auto* const kv = rows.new_kv(start, half);
    if constexpr (kInRegisters) {
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        projected[j] = rows.load_new_if(j < count, kv + j * rows.p.row_size);
      }
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        biases[j] = load_if(has_ape, ape + row_of(j) * Rows::S, Rows::no_bias());
      }
    } else {
      smem.rows.copy(0, count, kv, rows.p.row_size, rows.p.score_offset);
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        auto& bias = smem.biases[j][threadIdx.x];
        if (!has_ape) bias = Rows::no_bias();
        copy_if<kVector>(has_ape, bias.x, ape + row_of(j) * Rows::S);
      }
      commit_copies();
    }
  }
  __device__ __forceinline__ void wait_for_new() const {
    if constexpr (!kInRegisters) wait_for_copies<0>();
  }
  // While old rows are on their way.
  __device__ __forceinline__ void find_bits() {
    stored = __ballot_sync(~0u, lane < count && rows.stores(position_of(start, lane)));
    counted = __ballot_sync(~0u, lane < count && (!rows.p.rule.all || place.exists()));
  }
  __device__ __forceinline__ Place look_up() const {
    int32_t position = position_of(start, lane);
    bool wanted = lane < count;
    if constexpr (kFormat == StateFormat::kPrefix) {
      if (lane == kRows) position = start - 1, wanted = start % R != 0;
      if (lane == kRows + 1) {
        position = window * R - 1;
        wanted = Config::kOverlap && has_value && position >= 0;
      }
    } else if (lane >= kRows) {
      position = (window - Config::kOverlap) * R + lane - kRows;
      wanted = has_value && position >= 0 && position < start && lane < kRows + kOldRows;
    }
    return rows.find_if(wanted, position);
  }
  __device__ __forceinline__ Place place_of(int from_lane) const {
    return {__shfl_sync(~0u, place.kv, from_lane), __shfl_sync(~0u, place.score, from_lane)};
  }
  __device__ __forceinline__ Stored new_row(int j) const {
    if constexpr (kInRegisters) {
      return rows.as_stored(projected[j], biases[j]);
    } else {
      return rows.as_stored(smem.rows[j], smem.biases[j][threadIdx.x]);
    }
  }
  // On a raw state: stores new rows, and returns the value of the window, if it has one.
  __device__ __forceinline__ Vector<float, kVector> reduce_rows() {
    static_assert(kRows + kOldRows <= 32, "a lane for each row");
    Stored old[kHasValues ? kOldRows : 1];
#pragma unroll
    for (int i = 0; i < kOldRows; ++i) {
      old[i] = rows.load_row(place_of(kRows + i), Config::kOverlap && i < R ? 0 : kOwn);
    }
    find_bits();
    wait_for_new();
    Stored row[kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const Place to = place_of(j);
      row[j] = new_row(j);
      if (stored >> j & 1) rows.store_row(to, half, row[j]);
      if (!(counted >> j & 1) || row_of(0) + j >= R) row[j] = Rows::no_row();
    }
    if (!has_value) return {};
    Partial<kVector> partial;
    add(row, partial);  // before anything waits for the old ones
    add(old, partial);
    return value_of(partial);
  }
  template <int kCount>
  static __device__ __forceinline__ void add(const Stored (&row)[kCount],
                                             Partial<kVector>& partial) {
    Vector<typename Rows::State, kVector> kv[kCount], score[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) kv[i] = row[i].kv, score[i] = row[i].score;
    partial.add(kv, score);
  }

  // On a state of prefixes: merges new rows into the prefix before them, one after the other, and
  // stores it; returns the value of the window, if it has one.
  __device__ __forceinline__ Vector<float, kVector> merge_prefixes() {
    Prefix open[kVector], before[kVector];
    load_prefix(kRows, half, open);
    if constexpr (Config::kOverlap) load_prefix(kRows + 1, 0, before);
    find_bits();
    wait_for_new();
    Stored merged[kRows];
    Prefix whole[kVector];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      // Without a branch between rows the means of one are computed beside the next logsumexp.
      if (kVector > 1 && j >= count) break;
      const Stored row = new_row(j);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const Prefix next = {to_f32(row.score.x[v]), to_f32(row.kv.x[v])};
        open[v] = merge(row_of(j) == 0 ? Prefix{} : open[v], counted >> j & 1 ? next : Prefix{});
        if (row_of(j) == R - 1) whole[v] = open[v];
        merged[j].score.x[v] = round_to<typename Rows::State>(open[v].lse);
        merged[j].kv.x[v] = round_to<typename Rows::State>(open[v].mean);
      }
    }
    Vector<float, kVector> value;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      value.x[v] = jax_dsv4::value_of(Config::kOverlap ? merge(before[v], whole[v]) : whole[v]);
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const Place to = place_of(j);
      if (stored >> j & 1) rows.store_row(to, half, merged[j]);
    }
    return value;
  }
  __device__ __forceinline__ void load_prefix(int from_lane, int half,
                                              Prefix (&prefix)[kVector]) const {
    const Stored row = rows.load_row(place_of(from_lane), half);
#pragma unroll
    for (int v = 0; v < kVector; ++v) prefix[v] = {to_f32(row.score.x[v]), to_f32(row.kv.x[v])};
  }
};

// The CTAs of a call that have requests, kRequests at once. They have all rows of those that bring
// few. Of others, where windows are short and not all rows are stored, they store the last rows,
// which takes longer than all else that a walker does. Where windows overlap, each half of the rows
// has CTAs of its own.
template <class Config, StateFormat kFormat, bool kRecords, int kThreads, int kVector>
struct FewRequests {
  using Few = FewRows<Config, kFormat, kVector, kThreads>;
  using Rows = typename Few::Rows;
  static constexpr int R = Config::kRatio, D = Config::kHeadDim;
  static constexpr int kLanes = std::min(D / kVector, kThreads);
  static constexpr int kRequests = kThreads / kLanes;
  static constexpr int kSlices = D / (kVector * kLanes);
  static constexpr int kHalves = Few::kHalves;
  struct RecordsPlan : Few::Plan {
    RecordExchange<D> records[kRequests];
  };
  using Plan = std::conditional_t<kRecords, RecordsPlan, typename Few::Plan>;
  static_assert(kLanes % 32 == 0, "whole warps look for a request");
  // Whether these CTAs also have what becomes of values; or only rows.
  static constexpr bool kHasValues = Few::kHasValues;

  // Whether these are all new rows of such a request.
  static __device__ __forceinline__ bool serves(const Request<Config>& r) {
    const bool completes = r.first_window < r.end_window;
    return r.num_new > 0 && r.num_new <= Few::kRows && (kHasValues || !completes);
  }
  static JAX_DSV4_HD uint32_t num_ctas(const RaggedParams& p) {
    return (p.batch + kRequests - 1) / kRequests * (kHalves * kSlices);
  }

  static __device__ __forceinline__ void run(const RaggedParams& p,
                                             const ResultOf<kRecords>& result, Plan& smem,
                                             uint32_t block) {
    const uint32_t group = blockIdx.z;
    const int in_cta = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const uint32_t index = block / (kHalves * kSlices) * kRequests + in_cta;
    const int half = Few::kOwn - block % kHalves, slice = block / kHalves % kSlices;
    if (index >= p.batch) return;
    uint32_t layer = 0;
    const Owner owner = find_request(p, group, index, [&] {
      layer = load_if(p.layer != nullptr, p.layer + group * p.layer_stride, 0);
      prefetch_tables(p, group, index, lane);
    });
    const Rows rows(p, group, layer, owner, (slice * kLanes + lane) * kVector);
    // Behind a branch on a vote the compiler moves instructions past shuffles. Measured: faster,
    // but for one channel a thread where windows do not overlap.
    bool is_few = serves(rows.r);
    if (kVector > 1 || Config::kOverlap) is_few = __any_sync(~0u, is_few);
    if (!is_few) return store_last(rows, smem, half);
    Few few(smem, rows, half, rows.start, rows.length, rows.r.first_window < rows.r.end_window);
    if constexpr (kRecords) {
      RecordMaker<D, RecordExchange<D>> maker(result, smem.records[in_cta], lane);
      few.run(
          [&](bool wanted, int32_t window) {
            return maker.load_all(wanted, group, index, window, static_cast<uint32_t>(window) * R);
          },
          [&](const auto& loaded, int32_t window, const Vector<float, kVector>& value) {
#pragma unroll
            for (int v = 0; v < kVector; ++v) maker.stage.x[0][v] = value.x[v];
            maker.finish(maker.take(loaded, group, window));
          });
    } else {
      int32_t slot = first_slot<Config>(owner.index, owner.begin);
      const int32_t next_slot = first_slot<Config>(owner.index + 1, owner.end);
      const auto store_next = [&](const Vector<float, kVector>& value) {
        result.store_vector((int64_t{group} * p.num_windows + slot++) * D + rows.column, value);
      };
      few.run([](bool, int32_t) { return 0; },
              [&](int, int32_t, const Vector<float, kVector>& value) { store_next(value); });
      while (kHasValues && half == Few::kOwn && slot < next_slot) store_next({});
    }
  }

 private:
  // Stores the rows of a request's last windows that are to be stored, if walkers do not.
  static __device__ __forceinline__ void store_last(const Rows& rows, Plan& smem, int half) {
    if (Rows::kLastWindows == 0 || rows.p.rule.all) return;
    int32_t from = max(rows.first_last() * R, rows.start);
#pragma unroll 1
    for (int32_t to; from < rows.length; from = to) {
      to = from + min(R - from % R, rows.length - from);
      if (!rows.may_store(from / R)) continue;
      Few few(smem, rows, half, from, to, /*completes=*/false);
      few.run([](bool, int32_t) { return 0; }, [](int, int32_t, const auto&) {});
    }
  }
};

// These CTAs, with one channel a thread where few requests are on a state of prefixes, whose rows
// are merged one after the other; but a record's channels are all in one CTA.
template <class Config, StateFormat kFormat, bool kRecords, int kThreads>
struct RaggedFew {
  template <int kVector>
  using Of = FewRequests<Config, kFormat, kRecords, kThreads, kVector>;
  using Wide = Of<kRaggedVector>;
  static constexpr bool kHasNarrow = kFormat == StateFormat::kPrefix && !kRecords;
  using Narrow = Of<kHasNarrow ? 1 : kRaggedVector>;
  static constexpr bool kHasValues = Wide::kHasValues;
  union Plan {
    typename Wide::Plan wide;
    typename Narrow::Plan narrow;
  };

  static __device__ __forceinline__ bool serves(const Request<Config>& r) {
    return Wide::serves(r);
  }
  static JAX_DSV4_HD uint32_t num_ctas(const RaggedParams& p) {
    return is_narrow(p) ? Narrow::num_ctas(p) : Wide::num_ctas(p);
  }
  static __device__ __forceinline__ void run(const RaggedParams& p,
                                             const ResultOf<kRecords>& result, Plan& smem,
                                             uint32_t block) {
    if (is_narrow(p)) {
      Narrow::run(p, result, smem.narrow, block);
    } else {
      Wide::run(p, result, smem.wide, block);
    }
  }

 private:
  // Not where there is room for a prompt: its walkers wait for these CTAs' SMs.
  static JAX_DSV4_HD bool is_narrow(const RaggedParams& p) {
    return kHasNarrow &&
           int64_t{p.num_groups} * p.batch * Config::kStateDim <= kNarrowRaggedChannels &&
           static_cast<uint32_t>(p.next_n) <= kFewRows<Config> * p.batch;
  }
};

}  // namespace jax_dsv4
