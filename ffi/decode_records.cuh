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

#ifdef TRACE
static __device__ long long trace_of[16];
#define MARK(n) do { if (threadIdx.x % 32 == 0 && blockIdx.x == 0) { long long c; asm volatile("mov.u64 %0, %%clock64;" : "=l"(c) :: "memory"); trace_of[n] = c; } } while (0)
#else
#define MARK(n)
#endif
namespace jax_dsv4 {

// What the threads that make a record share: the value, on its way from the CTAs of a cluster, and
// what else the record needs.
template <int kHeadDim>
struct RecordPlan {
  static constexpr int kThreads = kHeadDim / 4, kRotating = kRopeDim / 4;
  alignas(16) float value[kHeadDim];
  alignas(16) float weight[kHeadDim];       // a thread reads what it has copied, here and below
  alignas(8) float rotation[kRotating][4];  // of the threads that rotate: two pairs of floats
  int32_t page[kThreads];
  typename RecordStage<kHeadDim, kThreads>::Exchange exchange;
  uint64_t barrier;  // for the value
};

// One thread's part of a record: four channels.
template <int kHeadDim>
struct RecordMaker {
  using Plan = RecordPlan<kHeadDim>;
  using Stage = RecordStage<kHeadDim, Plan::kThreads>;

  const RecordTarget& target;
  Plan& plan;
  Stage stage;
  uint32_t row_of_page;

  __device__ __forceinline__ RecordMaker(const RecordTarget& target, Plan& plan, int thread)
      : target(target), plan(plan), stage{thread} {}

  __device__ __forceinline__ bool rotates() const {
    return stage.channel(0) >= kHeadDim - kRopeDim;
  }

  // Starts copies of all that the record of a window needs but its value.
  __device__ __forceinline__ void start(uint32_t group, uint32_t index, uint32_t window,
                                        uint32_t position) {
    const int thread = stage.lane;
    const uint32_t logical = window / target.pool.page_size;
    row_of_page = window - logical * target.pool.page_size.value;
    const bool has_position = target.cos_sin == nullptr || position < target.num_positions;
    const bool may_exist = has_position && logical < target.max_pages;
    if (!may_exist) plan.page[thread] = -1;
    copy_if(may_exist, &plan.page[thread],
            target.tables + uint64_t{group * target.tables_stride + index} * target.max_pages +
                logical);
    copy_if<4>(target.norm_weight != nullptr, &plan.weight[stage.channel(0)],
               target.norm_weight + int64_t{group} * target.weight_stride * kHeadDim +
                   stage.channel(0));
    const bool copies = target.cos_sin != nullptr && has_position && rotates();
    const float* const row = target.cos_sin + (group * target.cos_sin_stride + position) * kRopeDim;
    const int first = stage.channel(0) % kRopeDim / 2;  // of 32 pairs
    float* const rotation = plan.rotation[thread % Plan::kRotating];
    const bool interleaved = target.options.interleaved;
    copy_if<2>(copies, rotation, row + (interleaved ? 2 * first : first));
    copy_if<2>(copies, rotation + 2,
               row + (interleaved ? 2 * first + 2 : first + kRopeDim / 2));
    commit_copies();
  }

  // Makes the record, once the value is there.
  __device__ __forceinline__ void finish(uint32_t group, RecordFormat format) {
    MARK(10);
    wait_for_copies<0>();
    typename Stage::Operands operands;
    operands.weight[0] = load<float, 4>(&plan.weight[stage.channel(0)]);
    stage.set_rotation(load<float, 2>(plan.rotation[stage.lane % Plan::kRotating]),
                       load<float, 2>(plan.rotation[stage.lane % Plan::kRotating] + 2),
                       target.options.interleaved, operands, 0);
    stage.take_value(plan.value);
    stage.transform(operands, target.norm_weight != nullptr, target.cos_sin != nullptr,
                    target.options, format > RecordFormat::kBf16, &plan.exchange);
    MARK(11);
    const RecordPages pages = pages_of(target.pool, group);
    const auto page = static_cast<uint32_t>(plan.page[stage.lane]);
    const bool exists = page < pages.count;
    store_in(Records{}, format, pages, {exists, exists ? page : 0, exists ? row_of_page : 0});
    MARK(12);
  }

 private:
  template <class... Compiled>
  __device__ __forceinline__ void store_in(TypeList<Compiled...>, RecordFormat format,
                                           const RecordPages& pages,
                                           const RecordPlace& place) const {
    (store_if<Compiled>(format, pages, place), ...);
  }
  template <class Record>
  __device__ __forceinline__ void store_if(RecordFormat format, const RecordPages& pages,
                                           const RecordPlace& place) const {
    if constexpr (Record::kHeadDim == kHeadDim) {
      if (format == Record::kFormat) {
        stage.template store<Record::kFormat>(target.options, place.exists,
                                              {target.pool, pages, place},
                                              target.pool.is_16b_aligned);
      }
    }
  }
};

// Barriers of a CTA, by number; 0 is __syncthreads', 15 a record's.
enum CtaBarrier : int { kWorkers = 1, kFull = 2 };

// ---------------------------------------------------------- prefixes, for few requests

template <class Config, bool kStaged, int kColumns, int kMinCtas_ = 1>
struct PrefixTokenRecords {
  using T = PrefixTokenTile<Config, kColumns, true>;
  using Step = PrefixTokenStep<Config, kStaged, T>;
  using Plan = RecordPlan<Config::kHeadDim>;
  static constexpr int kSlices = T::kSlices, kThreads = T::kThreads + Plan::kThreads;
  static constexpr int kMinCtas = kMinCtas_;
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
  static __device__ __forceinline__ void make_record(const Params& p, Plan& plan, uint32_t index,
                                                     int m) {
    if (m >= T::kWindows) return;
    const int thread = threadIdx.x - T::kThreads;
    MARK(6);
    if (thread == 0) expect_bytes(&plan.barrier, sizeof(plan.value));
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
    MARK(7);
    RecordMaker<D> maker(p.records, plan, thread);
    maker.start(group, index, window, window * R);
    MARK(9);
    wait_for_cluster();  // for the barrier
    wait_for_bytes(&plan.barrier);
    maker.finish(group, p.format);
  }

  static __device__ __forceinline__ void run(const Params& p, uint32_t block) {
    __shared__ typename Step::SharedPlan smem;
    __shared__ Plan plan;
    const int slice = block % kSlices;
    if (__builtin_expect(threadIdx.x >= T::kThreads, 0)) {  // out of the others' way
      if (threadIdx.x < kThreads) make_record(p, plan, block / kSlices, slice);
      return;
    }
    MARK(0);
    Step step(p.step, smem, block);
    step.load_lengths();
    step.copy_tables();
    step.load_new_rows();
    MARK(1);
    arrive_at_cluster();
    if (!step.is_active()) {
      wait_for_copies<0>();
      return;
    }
    MARK(2);
    step.look_up_rows();
    step.load_rows_before();
    step.merge_new_rows();
    MARK(3);
    step.store_row();
    wait_for_copies<0>();
    if (!step.completes) return;
    const float value = step.value();
    MARK(4);
    wait_for_cluster();
    MARK(5);
    send(&plan.value[step.column], value, &plan.barrier,
         rank_in_cluster() - slice + step.window());
  }
};

// --------------------------------------------------------- prefixes, for many requests

// A CTA has all columns of a request, and some of its threads make a record while the others go on:
// two plans in turn.
template <class Config>
struct PrefixRecords {
  using T = PrefixTile<Config, 256>;
  using Step = PrefixStep<Config>;
  using Plan = RecordPlan<Config::kHeadDim>;
  static constexpr int kSlices = 1, kThreads = T::kThreads, kMinCtas = 2;
  static constexpr int R = Config::kRatio, D = Config::kHeadDim;
  static_assert(T::kSlices == 1 && Plan::kThreads <= kThreads, "a CTA has all columns");

  struct Params : DecodeRecordsParams {
    RecordFormat format;

    explicit Params(const DecodeRecordsParams& p, RecordFormat format)
        : DecodeRecordsParams(p), format(format) {}
  };

  static __device__ __forceinline__ void run(const Params& p, uint32_t index) {
    __shared__ Plan plans[2];
    if (threadIdx.x >= kThreads) return;
    MARK(0);
    const uint32_t group = blockIdx.z;
    prefetch_tables(p, group, index);
    const Request<Config> r = request_at<Config>(p, group, index);
    const int column = threadIdx.x * T::kVector;
    Step step(p, r, column);
    step.load_new_rows(0);
    uint32_t window = r.first_window;
    const bool makes = threadIdx.x < Plan::kThreads;
    if (makes && r.first_window < r.end_window) {
      RecordMaker<D>(p.records, plans[0], threadIdx.x).start(group, index, window, window * R);
    }
#pragma unroll 1
    for (int t0 = 0;;) {
      MARK(1);
      const auto tokens = step.look_up_rows(t0);
      MARK(2);
      if (t0 == 0) step.load_rows_before(tokens);
      const auto merged = step.merge_new_rows(t0, tokens);
      MARK(3);
      step.store_rows(merged);
      MARK(4);
      if (merged.last < Step::kRows) {
        Plan& plan = plans[(window - r.first_window) % 2];
        Step::store_value(merged, plan.value + column);
        wait_at_barrier<kThreads>(kWorkers);
        if (makes) {
          RecordMaker<D> maker(p.records, plan, threadIdx.x);
          maker.row_of_page = window - window / p.records.pool.page_size * p.records.pool.page_size.value;
          maker.finish(group, p.format);
          Plan& next = plans[(window + 1 - r.first_window) % 2];
          if (window + 1 < static_cast<uint32_t>(r.end_window)) {
            RecordMaker<D>(p.records, next, threadIdx.x)
                .start(group, index, window + 1, (window + 1) * R);
          }
        }
        ++window;
      }
      if ((t0 += Step::kRows) >= r.num_new) break;
      step.load_new_rows(t0);
    }
  }
};

// ------------------------------------------------------------------------------- raw rows

// kOwnWarps: warps of the first CTA make the record and do nothing else; otherwise those that reduce.
// kAnyPage: a lane's rows may be on several pages.
template <class Config, class Geometry, bool kOwnWarps, bool kAnyPage>
struct RawRecords {
  using T = Tile<Config, Geometry>;
  using Reducer = WindowReducer<Config, Geometry>;
  using Plan = RecordPlan<Config::kHeadDim>;
  static constexpr int kSlices = T::kSlices, kThreads = T::kThreads + (kOwnWarps ? Plan::kThreads : 0);
  static constexpr int kMinCtas = T::kMinCtas;
  static constexpr int R = Config::kRatio, D = Config::kHeadDim;
  static_assert(kSlices <= 8, "a cluster has at most 8 CTAs on every chip");

  struct Params : DecodeRecordsParams {
    RecordFormat format;

    explicit Params(const DecodeRecordsParams& p, RecordFormat format)
        : DecodeRecordsParams(p), format(format) {}
  };

  static_assert(kOwnWarps || Plan::kThreads <= kThreads, "too few threads for a record");

  static __device__ __forceinline__ void run(const Params& p, uint32_t block) {
    __shared__ typename Reducer::SharedPlan smem;
    __shared__ Plan plan;
    const uint32_t index = block / kSlices, group = blockIdx.z;
    const int slice = block % kSlices;
    MARK(0);
    if (!kOwnWarps && threadIdx.x >= kThreads) return;
    if (kOwnWarps && __builtin_expect(threadIdx.x >= T::kThreads, 0)) {
      if (slice != 0 || threadIdx.x >= kThreads) return;
      const int thread = threadIdx.x - T::kThreads;
      if (kSlices > 1) {
        if (thread == 0) expect_bytes(&plan.barrier, sizeof(plan.value));
        __syncwarp();
        arrive_at_cluster();
      }
      const Request<Config> r = request_at<Config>(p, group, index);
      const int window = r.first_window + blockIdx.y;
      if (window >= r.end_window) return;
      RecordMaker<D> maker(p.records, plan, thread);
      maker.start(group, index, window, static_cast<uint32_t>(window) * R);
      if (kSlices > 1) {
        wait_for_cluster();  // for the barrier
        wait_for_bytes(&plan.barrier);
      } else {
        wait_at_barrier<kThreads>(kFull);
      }
      maker.finish(group, p.format);
      return;
    }
    if (!kOwnWarps && kSlices > 1 && slice == 0 && threadIdx.x == 0) {
      expect_bytes(&plan.barrier, sizeof(plan.value));
    }
    prefetch_tables(p, blockIdx.z, index);
    const Request<Config> r = request_at<Config>(p, blockIdx.z, index);
    if (kSlices > 1) {
      __syncwarp();
      arrive_at_cluster();
    }
    const int window = r.first_window + blockIdx.y;
    const bool completes = window < r.end_window;
    const int slice_column = slice * T::kColumns;
    MARK(1);
    Reducer reducer(p, r, window, slice_column);
    auto stored = reducer.look_up_stored_rows();
    const auto new_row = reducer.load_new_row(reducer.row_group);
    if (!completes) stored.count = 0;
    const bool makes = !kOwnWarps && slice == 0 && threadIdx.x < Plan::kThreads;
    RecordMaker<D> maker(p.records, plan, threadIdx.x);
    if (makes && completes) maker.start(group, index, window, static_cast<uint32_t>(window) * R);
    typename Reducer::Rows rows;
    if constexpr (!kAnyPage) {
      reducer.find_stored_rows(stored);
      rows = reducer.load_rows(stored, 0);
    }
    MARK(2);
    if (blockIdx.y == 0) reducer.store_other_rows();
    MARK(3);
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
    MARK(4);
    const auto wait = [] {
      wait_at_barrier<T::kThreads>(kWorkers);
      if (kSlices > 1) wait_for_cluster();
    };
    const uint32_t first_rank = kSlices > 1 ? rank_in_cluster() - slice : 0;
    reducer.merge_row_groups(smem, wait, [&](int c, float value) {
      float* const to = &plan.value[slice_column + c];
      if (kSlices > 1) {
        send(to, value, &plan.barrier, first_rank);
      } else {
        *to = value;
      }
    });
    MARK(5);
    if (kOwnWarps) {
      if (kSlices == 1) arrive_at_barrier<kThreads>(kFull);
      return;
    }
    if (kSlices == 1) wait_at_barrier<T::kThreads>(kFull);
    if (!makes) return;
    if (kSlices > 1) wait_for_bytes(&plan.barrier);
    maker.finish(group, p.format);
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
