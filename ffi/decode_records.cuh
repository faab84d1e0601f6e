// A decode step that ends in records, on an NVIDIA GPU: device code only.
//
// The CTAs that decode are those of decode_raw.cuh and decode_prefix.cuh; here a window's value goes
// to one warp instead of memory, and that warp makes the record. It has loaded all but the value by
// then: the record's page, its row of the table, the weight. Where several CTAs share a value they
// are a cluster, and each sends its channels into the shared memory of the CTA whose warp it is.
// Who completes no window pays for a barrier that it does not wait at.

#pragma once

#include <algorithm>
#include <cstdint>

#include "config.h"
#include "decode_prefix.cuh"
#include "decode_raw.cuh"
#include "decode_records.h"
#include "record_stage.cuh"
#include "vector.cuh"

namespace jax_dsv4 {

// One warp's part of a step: the record of a window.
template <int kHeadDim>
struct RecordMaker {
  using Stage = RecordStage<kHeadDim, 32>;

  const RecordTarget& target;
  RecordPages pages;
  RecordPlace place;
  Stage stage;
  typename Stage::Operands operands;

  // Loads all that the record needs but its value.
  __device__ __forceinline__ RecordMaker(const RecordTarget& target, uint32_t group, uint32_t index,
                                         uint32_t window, uint32_t position)
      : target(target), stage{static_cast<int>(threadIdx.x % 32)} {
    const int32_t* const table =
        target.tables + uint64_t{group * target.tables_stride + index} * target.max_pages;
    const uint32_t logical = window / target.pool.page_size;
    const bool has_position = target.cos_sin == nullptr || position < target.num_positions;
    const auto page = static_cast<uint32_t>(
        load_if(has_position && logical < target.max_pages, table + logical, -1));
    if (target.norm_weight != nullptr) {
      stage.load_weight(target.norm_weight + int64_t{group} * target.weight_stride * kHeadDim,
                        operands);
    }
    if (target.cos_sin != nullptr) {
      const int64_t row = group * target.cos_sin_stride + (has_position ? position : 0);
      stage.load_rotation(target.cos_sin + row * kRopeDim, target.options.interleaved, operands);
    }
    pages = pages_of(target.pool, group);
    const bool exists = page < pages.count;
    place = {exists, exists ? page : 0,
             exists ? window - logical * target.pool.page_size.value : 0};
  }

  __device__ __forceinline__ void finish(const float* value, RecordFormat format) {
    stage.take_value(value);
    stage.transform(operands, target.norm_weight != nullptr, target.cos_sin != nullptr,
                    target.options, format > RecordFormat::kBf16);
    store_in(Records{}, format);
  }

 private:
  template <class... Compiled>
  __device__ __forceinline__ void store_in(TypeList<Compiled...>, RecordFormat format) const {
    (store_if<Compiled>(format), ...);
  }
  template <class Record>
  __device__ __forceinline__ void store_if(RecordFormat format) const {
    if constexpr (Record::kHeadDim == kHeadDim) {
      if (format == Record::kFormat) {
        stage.template store<Record::kFormat>(target.options, place.exists,
                                              {target.pool, pages, place},
                                              target.pool.is_16b_aligned);
      }
    }
  }
};

// A value on its way from the CTAs of a cluster to the warp that makes its record.
template <int kHeadDim>
struct ValueBuffer {
  alignas(16) float value[kHeadDim];
  uint64_t barrier;
};

// Barriers of a CTA, by number; 0 is __syncthreads'.
enum CtaBarrier : int { kWorkers = 1, kFull = 2, kEmpty = 4 };

// ---------------------------------------------------------- prefixes, for few requests

template <class Config, bool kStaged, int kColumns>
struct PrefixTokenRecords {
  using T = PrefixTokenTile<Config, kColumns, true>;
  using Step = PrefixTokenStep<Config, kStaged, T>;
  static constexpr int kSlices = T::kSlices, kThreads = T::kThreads + 32, kMinCtas = 1;
  static constexpr int R = Config::kRatio, D = Config::kHeadDim;
  static_assert(kSlices >= T::kWindows && kSlices > 1, "a window's record is made in a CTA");

  struct Params {
    PrefixTokenParams step;
    RecordTarget records;
    RecordFormat format;

    explicit Params(const DecodeRecordsParams& p, RecordFormat format)
        : step(p), records(p.records), format(format) {}
  };

  // CTA m of a request makes the record of window m.
  static __device__ __forceinline__ void make_record(const Params& p, ValueBuffer<D>& buffer,
                                                     uint32_t index, int m) {
    if (m >= T::kWindows) return;
    if (threadIdx.x % 32 == 0) expect_bytes(&buffer.barrier, sizeof(buffer.value));
    __syncwarp();
    arrive_at_cluster();
    const PrefixTokenParams& s = p.step;
    const uint32_t group = blockIdx.z;
    const auto index_in = [&](PrefixTokenParams::PerGroup operand) {
      return (s.per_group & operand ? group * s.batch : 0) + index;
    };
    const int length = s.kv_lens[index_in(s.kKvLens)];
    const int q_len = load_if(s.q_lens != nullptr, s.q_lens + index_in(s.kQLens), s.next_n);
    const uint32_t layer =
        load_if(s.layer != nullptr, s.layer + (s.per_group & s.kLayer ? group : 0), 0);
    const int num_new = min(q_len, s.next_n);
    if (min(length, num_new) <= 0 || layer >= s.num_layers) return;
    const uint32_t window = max(length - num_new, 0) / R + static_cast<uint32_t>(m);
    if (window >= static_cast<uint32_t>(length) / R) return;
    RecordMaker<D> maker(p.records, group, index, window, window * R);
    wait_for_bytes(&buffer.barrier);
    maker.finish(buffer.value, p.format);
  }

  static __device__ __forceinline__ void run(const Params& p, uint32_t block) {
    __shared__ typename Step::SharedPlan smem;
    __shared__ ValueBuffer<D> buffer;
    const int slice = block % kSlices;
    if (threadIdx.x >= T::kThreads) {
      if (threadIdx.x < kThreads) make_record(p, buffer, block / kSlices, slice);
      return;
    }
    Step step(p.step, smem, block);
    step.load_lengths();
    step.copy_tables();
    step.load_new_rows();
    arrive_at_cluster();
    if (!step.is_active()) {
      wait_for_copies<0>();
      return;
    }
    step.look_up_rows();
    step.load_rows_before();
    step.merge_new_rows();
    step.store_row();
    wait_for_copies<0>();
    if (!step.completes) return;
    const float value = step.value();
    wait_for_cluster();
    send(&buffer.value[step.column], value, &buffer.barrier,
         rank_in_cluster() - slice + step.window());
  }
};

// --------------------------------------------------------- prefixes, for many requests

// A CTA has all columns of a request. Two values may be on their way.
template <class Config>
struct PrefixRecords {
  using T = PrefixTile<Config, 256>;
  using Step = PrefixStep<Config>;
  static constexpr int kSlices = 1, kThreads = T::kThreads + 32;
  static constexpr int kMinCtas = 2;
  static constexpr int R = Config::kRatio, D = Config::kHeadDim;
  static_assert(T::kSlices == 1, "a CTA has all columns");
  static constexpr int kBuffers = 2;

  struct Params : DecodeRecordsParams {
    RecordFormat format;

    explicit Params(const DecodeRecordsParams& p, RecordFormat format)
        : DecodeRecordsParams(p), format(format) {}
  };

  static __device__ __forceinline__ void run(const Params& p, uint32_t index) {
    __shared__ float values[kBuffers][D];
    if (threadIdx.x >= kThreads) return;
    prefetch_tables(p, blockIdx.z, index);
    const Request<Config> r = request_at<Config>(p, blockIdx.z, index);
    const int num_windows = r.end_window - r.first_window;
    if (threadIdx.x >= T::kThreads) {
#pragma unroll 1
      for (int m = 0; m < num_windows; ++m) {
        const uint32_t window = r.first_window + m;
        RecordMaker<D> maker(p.records, blockIdx.z, index, window, window * R);
        wait_at_barrier<kThreads>(kFull + m % kBuffers);
        maker.finish(values[m % kBuffers], p.format);
        if (m + kBuffers < num_windows) arrive_at_barrier<kThreads>(kEmpty + m % kBuffers);
      }
      return;
    }
    const int column = threadIdx.x * T::kVector;
    Step step(p, r, column);
    step.load_new_rows(0);
    int m = 0;
#pragma unroll 1
    for (int t0 = 0;;) {
      const auto tokens = step.look_up_rows(t0);
      if (t0 == 0) step.load_rows_before(tokens);
      const auto merged = step.merge_new_rows(t0, tokens);
      if (merged.last < Step::kRows) {
        if (m >= kBuffers) wait_at_barrier<kThreads>(kEmpty + m % kBuffers);
        Step::store_value(merged, values[m % kBuffers] + column);
        arrive_at_barrier<kThreads>(kFull + m % kBuffers);
        ++m;
      }
      step.store_rows(merged);
      if ((t0 += Step::kRows) >= r.num_new) break;
      step.load_new_rows(t0);
    }
  }
};

// ------------------------------------------------------------------------------- raw rows

// kOwnWarp: a warp of the first CTA makes records and nothing else; otherwise one that reduces.
// kAnyPage: a lane's rows may be on several pages.
template <class Config, class Geometry, bool kOwnWarp, bool kAnyPage>
struct RawRecords {
  using T = Tile<Config, Geometry>;
  using Reducer = WindowReducer<Config, Geometry>;
  static constexpr int kSlices = T::kSlices, kThreads = T::kThreads + 32 * kOwnWarp;
  static constexpr int kMinCtas = T::kMinCtas;
  static constexpr int R = Config::kRatio, D = Config::kHeadDim;
  static_assert(kSlices <= 8, "a cluster has at most 8 CTAs on every chip");

  struct Params : DecodeRecordsParams {
    RecordFormat format;

    explicit Params(const DecodeRecordsParams& p, RecordFormat format)
        : DecodeRecordsParams(p), format(format) {}
  };

  static __device__ __forceinline__ void expect_value(ValueBuffer<D>& buffer) {
    if (kSlices > 1) expect_bytes(&buffer.barrier, sizeof(buffer.value));
  }

  static __device__ __forceinline__ void make_record(const Params& p, ValueBuffer<D>& buffer,
                                                     uint32_t index, uint32_t window) {
    RecordMaker<D> maker(p.records, blockIdx.z, index, window, window * R);
    if (kSlices > 1) {
      wait_for_bytes(&buffer.barrier);
    } else if (kOwnWarp) {
      wait_at_barrier<kThreads>(kFull);
    }
    maker.finish(buffer.value, p.format);
  }

  static __device__ __forceinline__ void run(const Params& p, uint32_t block) {
    __shared__ typename Reducer::SharedPlan smem;
    __shared__ ValueBuffer<D> buffer;
    const uint32_t index = block / kSlices;
    const int slice = block % kSlices;
    if (kOwnWarp && threadIdx.x >= T::kThreads) {
      if (slice != 0 || threadIdx.x >= kThreads) return;
      if (threadIdx.x == T::kThreads) expect_value(buffer);
      __syncwarp();
      if (kSlices > 1) arrive_at_cluster();
      const Request<Config> r = request_at<Config>(p, blockIdx.z, index);
      const int window = r.first_window + blockIdx.y;
      if (window < r.end_window) make_record(p, buffer, index, window);
      return;
    }
    if (!kOwnWarp && slice == 0 && threadIdx.x == 0) expect_value(buffer);
    prefetch_tables(p, blockIdx.z, index);
    const Request<Config> r = request_at<Config>(p, blockIdx.z, index);
    if (kSlices > 1) {
      __syncwarp();
      arrive_at_cluster();
    }
    const int window = r.first_window + blockIdx.y;
    const bool completes = window < r.end_window;
    const int slice_column = slice * T::kColumns;
    Reducer reducer(p, r, window, slice_column);
    auto stored = reducer.look_up_stored_rows();
    const auto new_row = reducer.load_new_row(reducer.row_group);
    if (!completes) stored.count = 0;
    typename Reducer::Rows rows;
    if constexpr (!kAnyPage) {
      reducer.find_stored_rows(stored);
      rows = reducer.load_rows(stored, 0);
    }
    if (blockIdx.y == 0) reducer.store_other_rows();
    if (__builtin_expect(!completes, 0)) return;
    reducer.add(new_row);
#pragma unroll 1
    for (int number = reducer.row_group + T::kRowGroups;; number += T::kRowGroups) {
      const auto another = reducer.load_new_row(number);  // there seldom is one
      if (!another.exists) break;
      reducer.add(another);
    }
    if constexpr (kAnyPage) {
#pragma unroll 1
      for (int i = 0; i < stored.count; ++i) reducer.add_stored_row(i);
    } else {
#pragma unroll 1
      for (int first = 0;;) {
        reducer.partial.add(rows.kv, rows.score);
        if ((first += T::kRowsInFlight) == T::kRowsPerLane) break;
        rows = reducer.load_rows(stored, first);
      }
    }
    const auto wait = [] {
      wait_at_barrier<T::kThreads>(kWorkers);
      if (kSlices > 1) wait_for_cluster();
    };
    const uint32_t first_rank = kSlices > 1 ? rank_in_cluster() - slice : 0;
    reducer.merge_row_groups(smem, wait, [&](int c, float value) {
      float* const to = &buffer.value[slice_column + c];
      if (kSlices > 1) {
        send(to, value, &buffer.barrier, first_rank);
      } else {
        *to = value;
      }
    });
    if (kOwnWarp) {
      if (kSlices == 1) arrive_at_barrier<kThreads>(kFull);
      return;
    }
    if (kSlices == 1) wait_at_barrier<T::kThreads>(kFull);
    if (slice == 0 && threadIdx.x < 32) make_record(p, buffer, index, window);
  }
};

// ----------------------------------------------------------------------------- the kernels

template <class Body>
__global__ void __launch_bounds__(Body::kThreads, Body::kMinCtas)
    decode_records_kernel(const __grid_constant__ typename Body::Params p) {
  Body::run(p, blockIdx.x);
}

// Two compressors of the same requests. The first CTAs are the first one's.
template <class First, class Second>
__global__ void __launch_bounds__(std::max(First::kThreads, Second::kThreads),
                                  std::min(First::kMinCtas, Second::kMinCtas))
    decode_two_records_kernel(const __grid_constant__ typename First::Params first,
                              const __grid_constant__ typename Second::Params second,
                              uint32_t first_ctas, uint32_t second_ctas) {
  if (blockIdx.x < first_ctas) {
    First::run(first, blockIdx.x);
  } else if (blockIdx.x - first_ctas < second_ctas) {  // whole clusters are launched
    Second::run(second, blockIdx.x - first_ctas);
  }
}

}  // namespace jax_dsv4
