// A decode step that ends in records, on an NVIDIA GPU: device code only.
//
// The threads that decode are those of decode_raw.cuh and decode_prefix.cuh. A record is made where
// all of its value is, by a thread for four channels: by a CTA that has all channels of a window,
// or by one CTA of a cluster, into whose shared memory the others send theirs. What a record needs
// beside its value is loaded while the value is made. A request that completes no window makes its
// CTAs do nothing of this.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "config.h"
#include "decode_prefix.cuh"
#include "decode_raw.cuh"
#include "decode_records.h"
#include "record_maker.cuh"
#include "tuning.h"
#include "vector.cuh"

namespace jax_dsv4 {

// A CTA's barriers by number: 0 is __syncthreads', 15 a record's.
inline constexpr int kAllBarrier = 1;

// ---------------------------------------------------------- prefixes, for few requests

// A CTA of kThreads has a part of every token's columns, or all columns of one token.
template <class Config, int kThreads_>
struct PrefixRowTile : PrefixTokenTile<Config> {
  static constexpr int kVector = 2, kThreads = kThreads_;
  static constexpr int kLanes = kThreads / PrefixTokenTile<Config>::kTokens;  // of a token
  static constexpr int kSlices = Config::kHeadDim / (kLanes * kVector);
  static constexpr bool kHasValue = false;
};
template <class Config, int kThreads_>
struct PrefixValueTile : PrefixTokenTile<Config> {
  static constexpr int kThreads = kThreads_, kVector = Config::kHeadDim / kThreads;
  static constexpr int kFirstHalf = PrefixTokenTile<Config>::kHalves - 1;
};

// Grid: x = windows of requests, then column slices of requests; z = groups. A CTA of a window
// makes its record, and stores no row; those of column slices store the rows.
template <class Config, bool kStaged, int kThreads_>
struct PrefixTokenRecords {
  using T = PrefixRowTile<Config, kThreads_>;
  using Plan = RecordPlan<Config::kHeadDim>;
  static constexpr int kCluster = 1, kThreads = kThreads_, kMinCtas = 1;
  static constexpr bool kHasWindows = false;  // along y
  static int64_t num_ctas(const DecodeParams& p) {
    return int64_t{p.batch} * (T::kWindows + T::kSlices);
  }
  static constexpr int R = Config::kRatio, D = Config::kHeadDim;

  struct Params {
    PrefixTokenParams step;
    RecordParams records;

    Params(const DecodeRecordsParams& p, const RecordParams& records) : step(p), records(records) {}
  };

  using V = PrefixValueTile<Config, kThreads>;
  using RowStep = PrefixTokenStep<Config, kStaged, T>;
  using ValueStep = PrefixTokenStep<Config, kStaged, V>;
  union SharedPlan {
    typename RowStep::SharedPlan rows;
    struct {
      typename ValueStep::SharedPlan step;
      Plan record;
    } value;
  };

  static __device__ __forceinline__ void store_rows(const Params& p, SharedPlan& smem,
                                                    uint32_t index, int slice) {
    RowStep step(p.step, smem.rows, index,
                 (T::kLanes * slice + threadIdx.x % T::kLanes) * T::kVector,
                 threadIdx.x / T::kLanes);
    step.load_lengths();
    step.copy_tables();
    step.load_new_rows();
    if (step.is_active()) {
      step.look_up_rows();
      step.load_rows_before();
      step.merge_new_rows();
      step.merge_open();
      step.store_row();
    }
    wait_for_copies<0>();
  }

  static __device__ __forceinline__ void make_record(const Params& p, SharedPlan& smem,
                                                     uint32_t index, int m) {
    ValueStep step(p.step, smem.value.step, index, threadIdx.x * V::kVector, 0);
    step.load_lengths();
    step.copy_tables();
    step.load_new_rows();
    if (!step.find_token(m)) {
      wait_for_copies<0>();
      return;
    }
    step.look_up_rows();
    step.load_rows_before();
    const uint32_t window = static_cast<uint32_t>(step.token) / R;
    constexpr bool kAllMake = V::kThreads == Plan::kThreads;  // and have the value's four channels
    const bool makes = kAllMake || threadIdx.x < Plan::kThreads;
    RecordMaker<D> maker(p.records, smem.value.record, threadIdx.x);
    if (makes) {
      maker.start(step.group, index, window, window * R);
    } else {
      commit_copies();  // a group of copies, as the others
    }
    step.template merge_new_rows<1>();
    typename RecordMaker<D>::Ready ready;
    if (makes) {
      ready = maker.prepare(step.group, window);
    } else {
      wait_for_copies<0>();
    }
    step.merge_open();
    if constexpr (kAllMake) {
#pragma unroll
      for (int v = 0; v < V::kVector; ++v) maker.stage.x[0][v] = step.value(v);
    } else {
#pragma unroll
      for (int v = 0; v < V::kVector; ++v) maker.plan.value[step.column + v] = step.value(v);
      __syncthreads();  // the value, before a thread takes its channels
      if (!makes) return;
      maker.stage.take_value(maker.plan.value);
    }
    maker.finish(ready);
  }

  static __device__ __forceinline__ void run(const Params& p, SharedPlan& smem, uint32_t block) {
    // Records take the longest: their CTAs come first.
    const uint32_t makers = p.step.batch * T::kWindows;
    if (threadIdx.x >= kThreads) return;
    if (block >= makers) {
      store_rows(p, smem, (block - makers) / T::kSlices, (block - makers) % T::kSlices);
    } else {
      make_record(p, smem, block / T::kWindows, block % T::kWindows);
    }
  }
};

// ---------------------------------------------------------- prefixes, for more requests

struct PrefixRecordsParams : DecodeParams {
  RecordParams records;

  PrefixRecordsParams(const DecodeRecordsParams& p, const RecordParams& records)
      : DecodeParams(p), records(records) {}
};

// Grid: x = parts of requests, z = groups. A part is a request's rows, or where windows overlap one
// half of them: D / 4 threads, with the four columns that each makes records of. Where windows
// overlap, a step has at most R new rows: what a window needs of the other half is in the state.
template <class Config>
struct PrefixPartRecords {
  using Plan = RecordPlan<Config::kHeadDim>;
  static constexpr int R = Config::kRatio, D = Config::kHeadDim;
  static constexpr int kLanes = Plan::kThreads, kVector = D / kLanes;  // of a part
  static constexpr int kParts = Config::kStateDim / D;                 // of a request
  static constexpr int kThreads = std::max(kLanes, 128), kAtOnce = kThreads / kLanes;
  static constexpr int kCluster = 1, kMinCtas = 3;
  static constexpr bool kHasWindows = false;
  using Step = PrefixStep<Config, kVector, 1>;
  static int64_t num_ctas(const DecodeParams& p) {
    return (int64_t{p.batch} * kParts + kAtOnce - 1) / kAtOnce;
  }

  using Params = PrefixRecordsParams;
  struct SharedPlan {
    Plan plans[kAtOnce][2];  // in turn
  };

  static __device__ __forceinline__ void run(const Params& p, SharedPlan& smem, uint32_t block) {
    if (threadIdx.x >= kThreads) return;
    const int in_cta = threadIdx.x / kLanes, thread = threadIdx.x % kLanes;
    const uint32_t part = block * kAtOnce + in_cta, group = blockIdx.z, index = part / kParts;
    if (kAtOnce > 1 && index >= p.batch) return;
    const int half = kParts - 1 - part % kParts;
    prefetch_tables(p, group, index, thread);
    const Request<Config> r = request_at<Config>(p, group, index);
    Step step(p, r, half * D + thread * kVector);
    step.load_new_rows(0);
    const auto maker_of = [&](int window) {
      return RecordMaker<D>(p.records, smem.plans[in_cta][(window - r.first_window) % 2], thread);
    };
    const bool has_values = half == kParts - 1;
    int window = r.first_window;
#pragma unroll 1
    for (int t0 = 0;;) {
      const auto tokens = step.look_up_rows(t0);
      if (t0 == 0) {
        step.load_rows_before(tokens);
        if (has_values && window < r.end_window) {
          maker_of(window).start(group, index, window, static_cast<uint32_t>(window) * R);
        }
      }
      const auto merged = step.merge_new_rows(t0, tokens);
      step.store_rows(merged);
      if (has_values && merged.last < Step::kRows) {
        auto maker = maker_of(window);
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          maker.stage.x[0][v] = step.value_at(merged.value, merged.value_before, v);
        }
        maker.finish(maker.prepare(group, window));
        if (++window < r.end_window) {
          maker_of(window).start(group, index, window, static_cast<uint32_t>(window) * R);
        }
      }
      if ((t0 += Step::kRows) >= r.num_new) break;
      step.load_new_rows(t0);
    }
  }
};

// --------------------------------------------------------- prefixes, for many requests

// A step whose new rows and biases wait in shared memory, where a request's threads copy them
// together, and which merges and stores them token by token: in so few registers that three CTAs
// fit an SM.
template <class Config>
struct StagedPrefixStep : PrefixStep<Config> {
  using Base = PrefixStep<Config>;
  using typename Base::Tokens;
  struct Merged {
    int last;                                         // the token that completes a window, or kRows
    typename Base::PrefixVector value, value_before;  // of that window
  };
  using KvScore = typename Config::KvScore;
  static constexpr int R = Base::R, S = Base::S, D = Base::D;
  static constexpr int kHalves = Base::kHalves, kRows = Base::kRows, kVector = Base::kVector;
  static constexpr int kThreads = D / kVector;  // of a request
  struct SharedPlan {
    alignas(16) KvScore kv[kRows][kHalves][D], score[kRows][kHalves][D];
    alignas(16) float biases[kRows][kHalves][D];
  };

  using Base::Base;
  SharedPlan* smem;  // to be set before anything else

  // Calls copy(row, half, channel) for this thread's share of kRows rows, kChunk channels each.
  template <int kChunk, class Copy>
  __device__ __forceinline__ void share_rows(Copy&& copy) const {
    constexpr int kChunks = D / kChunk, kAll = kRows * kHalves * kChunks;
    static_assert(kAll % kThreads == 0, "share_rows: as much for each thread");
#pragma unroll
    for (int i = 0; i < kAll; i += kThreads) {
      const int chunk = i + this->column / kVector, part = chunk / kChunks;
      copy(part / kHalves, part % kHalves, chunk % kChunks * kChunk);
    }
  }
  __device__ __forceinline__ void load_new_rows(int t0) const {
    constexpr int kChunk = 16 / sizeof(KvScore);
    const auto& p = this->p;
    const KvScore* const rows = this->r.kv_score + int64_t{t0} * p.row_size;
    share_rows<kChunk>([&](int j, int half, int c) {
      const KvScore* const from = rows + j * p.row_size + half * D + c;
      copy_if<kChunk>(t0 + j < p.next_n, &smem->kv[j][half][c], from);
      copy_if<kChunk>(t0 + j < p.next_n, &smem->score[j][half][c], scores_of<Config>(p, from));
    });
    commit_copies();
  }
  __device__ __forceinline__ Tokens look_up_rows(int t0) {
    const Tokens tokens = Base::look_up_rows(t0);  // its biases are not used, so not loaded
    const float* const ape = this->r.ape;
    share_rows<4>([&](int j, int half, int c) {
      float* const to = &smem->biases[j][half][c];
      copy_if<4>(ape != nullptr, to, ape + ((tokens.phase + j) % R * S + half * D + c));
      if (ape == nullptr) store(to, Vector<float, 4>{-0.0f, -0.0f, -0.0f, -0.0f});
    });
    commit_copies();
    return tokens;
  }

  // As the base's, token by token; and stores the rows.
  __device__ __forceinline__ Merged merge_new_rows(int t0, const Tokens& tokens) {
    const int start = this->first_stored(), column = this->column;
    Merged merged{this->last_of(t0, tokens)};
    merged.value.clear();
    merged.value_before.clear();
#pragma unroll 1
    for (int j = 0; j < kRows; ++j) {
      if ((tokens.phase + j) % R == 0) {
        if (Config::kOverlap && position_of(this->r.first_position, t0 + j) > start) {
          this->before = this->open[0];
        }
#pragma unroll
        for (int half = 0; half < kHalves; ++half) this->open[half].clear();
      }
      const uint32_t kv_to = __shfl_sync(~0u, tokens.kv_row, j);
      const uint32_t score_to = __shfl_sync(~0u, tokens.score_row, j);
      const bool exists = kv_to != kNowhere && score_to != kNowhere;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        NewVector<Config, kVector> row;
        row.kv_in = load<KvScore, kVector>(&smem->kv[j][half][column]);
        row.score_in = load<KvScore, kVector>(&smem->score[j][half][column]);
        row.bias = load<float, kVector>(&smem->biases[j][half][column]);
        Base::merge_row(row, exists, this->open[half]);
      }
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const auto& prefix = this->open[half];
        if (score_to != kNowhere) {
          store(this->score + uint64_t{score_to} * S + half * D, prefix.lse);
        }
        if (kv_to != kNowhere) store(this->kv + uint64_t{kv_to} * S + half * D, prefix.mean);
      }
      if (j == merged.last) {
        merged.value = this->open[kHalves - 1];
        merged.value_before = this->before;
      }
    }
    return merged;
  }
};

// Grid: x = requests, z = groups. A CTA has all columns of a request, or of several; some threads
// of a request make its record while its others go on, with two plans in turn.
template <class Config, int kRequests = 1, bool kStagesRows = false>
struct PrefixRecords {
  using T = PrefixTile<Config, 256>;
  using Step = std::conditional_t<kStagesRows, StagedPrefixStep<Config>, PrefixStep<Config>>;
  using Plan = RecordPlan<Config::kHeadDim>;
  static constexpr int kCluster = 1, kThreads = kRequests * T::kThreads;
  static constexpr int kMinCtas = kStagesRows ? 3 : 2;
  static constexpr bool kHasWindows = false;
  static constexpr int R = Config::kRatio, D = Config::kHeadDim;
  static_assert(T::kSlices == 1 && Plan::kThreads <= T::kThreads, "a CTA has all columns");
  static_assert(kRequests == 1 || Plan::Stage::kWarps == 1, "a barrier for each request's record");
  static int64_t num_ctas(const DecodeParams& p) {
    return (int64_t{p.batch} + kRequests - 1) / kRequests;
  }

  using Params = PrefixRecordsParams;

  struct Plans {
    Plan plans[kRequests][2];
  };
  struct PlansAndRows : Plans {
    typename StagedPrefixStep<Config>::SharedPlan rows[kRequests];
  };
  using SharedPlan = std::conditional_t<kStagesRows, PlansAndRows, Plans>;

  static __device__ __forceinline__ void run(const Params& p, SharedPlan& smem, uint32_t block) {
    if (threadIdx.x >= kThreads) return;
    const int request = threadIdx.x / T::kThreads, thread = threadIdx.x % T::kThreads;
    const uint32_t group = blockIdx.z, index = block * kRequests + request;
    if (kRequests > 1 && index >= p.batch) return;
    const int barrier = kAllBarrier + request;
    Plan(&plans)[2] = smem.plans[request];
    prefetch_tables(p, group, index, thread);
    const Request<Config> r = request_at<Config>(p, group, index);
    const int column = thread * T::kVector;
    Step step(p, r, column);
    if constexpr (kStagesRows) step.smem = &smem.rows[request];
    step.load_new_rows(0);
    const bool makes = thread < Plan::kThreads;
    const auto maker_of = [&](int window) {
      return RecordMaker<D>(p.records, plans[(window - r.first_window) % 2], thread);
    };
    int window = r.first_window;
#pragma unroll 1
    for (int t0 = 0;;) {
      const auto tokens = step.look_up_rows(t0);
      if (t0 == 0) {
        step.load_rows_before(tokens);
        if (makes && window < r.end_window) {
          maker_of(window).start(group, index, window, static_cast<uint32_t>(window) * R);
        } else if (kStagesRows) {
          commit_copies();  // a group of copies, as the others
        }
      }
      if constexpr (kStagesRows) {
        t0 == 0 ? wait_for_copies<1>() : wait_for_copies<0>();
        wait_at_barrier<T::kThreads>(barrier);  // the rows, before any thread takes its columns
      }
      const auto merged = step.merge_new_rows(t0, tokens);
      if constexpr (!kStagesRows) step.store_rows(merged);
      if (merged.last < Step::kRows) {
        auto maker = maker_of(window);
        step.store_value(merged.value, merged.value_before, maker.plan.value + column);
        if (makes) {
          const auto ready = maker.prepare(group, window);
          wait_at_barrier<T::kThreads>(barrier);
          maker.stage.take_value(maker.plan.value);
          maker.finish(ready);
          if (window + 1 < r.end_window) {
            maker_of(window + 1).start(group, index, window + 1, (window + 1u) * R);
          }
        } else {
          wait_at_barrier<T::kThreads>(barrier);
        }
        ++window;
      }
      if ((t0 += Step::kRows) >= r.num_new) break;
      if (kStagesRows) wait_at_barrier<T::kThreads>(barrier);  // before others take the rows' place
      step.load_new_rows(t0);
    }
    if (kStagesRows) wait_for_copies<0>();
  }
};

// ------------------------------------------------------------------------------- raw rows

// A geometry with more lanes than a row has vectors loses the warps, too, that would share the rows
// in their place; but not those that a record takes.
template <class Config, class Geometry_>
struct RecordGeometry {
  static constexpr int kVectors =
      Config::kHeadDim * static_cast<int>(sizeof(typename Config::State)) / 16;
  static constexpr int kLanes = std::min(Geometry_::kLanes, kVectors);
  static constexpr int kWarps =
      std::max(Geometry_::kWarps * kLanes / Geometry_::kLanes, Config::kHeadDim / 128);
  using Type = Geometry<kWarps, kLanes, Geometry_::kRowsInFlight, Geometry_::kMinCtas>;
};

// Grid: x = requests x CTAs, y = windows. Where one CTA reduces all columns of a window, there are
// others that store the remaining rows; those of a cluster store them themselves, each in its own
// columns. kAnyPage: a lane's rows may be on several pages.
template <class Config, class Geometry_, bool kAnyPage>
struct RawRecords {
  using Geometry = typename RecordGeometry<Config, Geometry_>::Type;
  using T = Tile<Config, Geometry>;
  using Reducer = WindowReducer<Config, Geometry>;
  using Plan = RecordPlan<Config::kHeadDim>;
  static constexpr int kCluster = T::kSlices, kThreads = T::kThreads, kMinCtas = T::kMinCtas;
  static constexpr int R = Config::kRatio, D = Config::kHeadDim;
  static constexpr bool kIsCluster = kCluster > 1, kHasWindows = true;
  static_assert(kCluster <= 8, "a cluster has at most 8 CTAs on every chip");
  static_assert(Plan::kThreads <= kThreads, "too few threads for a record");

  static uint32_t ctas_of_request(const DecodeParams& p) {
    return kIsCluster ? kCluster : 1 + (p.next_n + Geometry::kWarps - 1) / Geometry::kWarps;
  }
  static int64_t num_ctas(const DecodeParams& p) { return int64_t{p.batch} * ctas_of_request(p); }

  struct Params : DecodeParams {
    RecordParams records;
    Divisor ctas;  // of a request

    Params(const DecodeRecordsParams& p, const RecordParams& records)
        : DecodeParams(p), records(records), ctas(ctas_of_request(p)) {}
  };

  struct SharedPlan {
    typename Reducer::SharedPlan rows;
    Plan record;
  };

  static __device__ __forceinline__ void run(const Params& p, SharedPlan& smem, uint32_t block) {
    Plan& plan = smem.record;
    if (threadIdx.x >= kThreads) return;
    const uint32_t index = kIsCluster ? block / kCluster : block / p.ctas, group = blockIdx.z;
    const int part = block - index * (kIsCluster ? kCluster : p.ctas.value);
    prefetch_tables(p, group, index, threadIdx.x);
    const Request<Config> r = request_at<Config>(p, group, index);
    if (!kIsCluster && __builtin_expect(part > 0, 0)) {
      const int t = (part - 1) * Geometry::kWarps + threadIdx.x / 32;
      if (t < p.next_n && blockIdx.y == 0)
        write_row<Config, T::kRowVector, false>(p, r, t, nullptr);
      return;
    }
    const int window = r.first_window + blockIdx.y;
    const bool completes = window < r.end_window;
    const int slice_column = kIsCluster ? part * T::kColumns : 0;
    Reducer reducer(p, r, window, slice_column);
    auto stored = reducer.look_up_stored_rows();
    const auto new_row = reducer.load_new_row(reducer.row_group);
    if (!kIsCluster && __builtin_expect(!completes, 0)) return;
    if (!completes) stored.count = 0;
    typename Reducer::Rows rows;
    if constexpr (!kAnyPage) {
      reducer.find_stored_rows(stored);
      rows = reducer.load_rows(stored, 0);
    }
    if (kIsCluster && blockIdx.y == 0) reducer.store_other_rows();
    if (__builtin_expect(!completes, 0)) return;
    const bool makes = part == 0 && threadIdx.x < Plan::kThreads;
    RecordMaker<D> maker(p.records, plan, threadIdx.x);
    if (makes) maker.start(group, index, window, static_cast<uint32_t>(window) * R);
    if (kIsCluster) {
      if (part == 0 && threadIdx.x == 0) expect_bytes(&plan.barrier, sizeof(plan.value));
      __syncwarp();
      arrive_at_cluster();
    }
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
    if constexpr (T::kRowGroups == 1 && T::kVector == 4) {  // a thread has its channels' values
      const auto ready = maker.prepare(group, window);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const float sum = reducer.partial.sum.x[v], weighted = reducer.partial.weighted.x[v];
        maker.stage.x[0][v] = sum == 0 ? 0.0f : fast_quotient(weighted, sum);
      }
      maker.finish(ready);
    } else {
      const auto wait = [] {
        wait_at_barrier<kThreads>(kAllBarrier);
        if (kIsCluster) wait_for_cluster();
      };
      const uint32_t first_rank = kIsCluster ? rank_in_cluster() - part : 0;
      merge_row_groups<T>(smem.rows.partials, reducer.partial, reducer.row_group, wait,
                          [&](int c, float value) {
                            float* const to = &plan.value[slice_column + c];
                            if (kIsCluster) {
                              send(to, value, &plan.barrier, first_rank);
                            } else {
                              *to = value;
                            }
                          });
      if (!makes && kIsCluster) return;
      if (!makes) {
        arrive_at_barrier<kThreads>(kAllBarrier);
        return;
      }
      const auto ready = maker.prepare(group, window);
      if (kIsCluster) {
        wait_for_bytes(&plan.barrier);
      } else {
        wait_at_barrier<kThreads>(kAllBarrier);
      }
      maker.stage.take_value(plan.value);
      maker.finish(ready);
    }
  }
};

// ----------------------------------------------------------------------------- the kernels

template <class Body>
__global__ void __launch_bounds__(Body::kThreads, Body::kMinCtas)
    decode_records_kernel(const __grid_constant__ typename Body::Params p) {
  __shared__ typename Body::SharedPlan smem;
  Body::run(p, smem, blockIdx.x);
}

// Two compressors of the same requests. The first CTAs are the first one's.
template <class First, class Second>
__global__ void __launch_bounds__(std::max(First::kThreads, Second::kThreads),
                                  std::min(First::kMinCtas, Second::kMinCtas))
    decode_two_records_kernel(const __grid_constant__ typename First::Params first,
                              const __grid_constant__ typename Second::Params second,
                              uint32_t first_ctas) {
  __shared__ union {
    typename First::SharedPlan first;
    typename Second::SharedPlan second;
  } smem;
  if (blockIdx.x < first_ctas) {
    First::run(first, smem.first, blockIdx.x);
  } else {
    Second::run(second, smem.second, blockIdx.x - first_ctas);
  }
}

}  // namespace jax_dsv4
