// Ragged batches (ragged.cuh), windows of many rows. Device code only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "config.h"
#include "decode_raw.cuh"
#include "ragged_few.cuh"
#include "ragged_rows.cuh"
#include "record_maker.cuh"
#include "vector.cuh"

namespace jax_dsv4 {

// What follows from a configuration: a CTA reduces one window over a slice of kColumns channels, by
// kRowGroups of kLanes threads with kRows neighbours each.
template <class Config>
struct LongTile {
  static constexpr int kThreads = 128, kMinCtas = 4, kVector = kRaggedVector;
  static constexpr int kColumns = 64, kLanes = kColumns / kVector;
  static constexpr int kSlices = Config::kHeadDim / kColumns;
  static constexpr int kRowGroups = kThreads / kLanes;
  static constexpr int kRows = Config::kRatio / kRowGroups;
  // New rows that a thread has on their way, in 64 registers.
  static constexpr int kRowsAtOnce =
      std::min<int>(kRows, 256 / sizeof(RowVector<typename Config::KvScore>));
  static constexpr int kMergers = std::min(kThreads / kColumns, 4);
  static constexpr int kPartialStride = 3 * kColumns + std::max(32 / kMergers, 4);
  static_assert(!Config::kOverlap, "long windows that overlap: no kernel");
  static_assert(kColumns * kSlices == Config::kHeadDim && kRows * kRowGroups == Config::kRatio,
                "slices must fill head_dim, and row groups share the rows evenly");
};

// One thread's part of one window. kStoresAll: all new rows of the call are stored, as prefixes.
template <class Config, StateFormat kFormat, bool kStoresAll>
struct LongWindow {
  using T = LongTile<Config>;
  using Rows = RaggedRows<Config, kFormat>;
  static constexpr int R = Config::kRatio, kVector = kRaggedVector;

  struct SharedPlan {
    // Of a thread's rows of a window. A thread reads only what it has copied itself.
    Vector<float, kVector> biases[T::kRows][T::kThreads];
    alignas(16) float partials[T::kRowGroups][T::kPartialStride];

    // Whether they are copied before it is known that a window needs them: not where requests bring
    // so few rows that hardly a window is all new.
    static __device__ __forceinline__ bool has_biases_early(const RaggedParams& p) {
      return static_cast<uint32_t>(p.num_windows) >= 2 * p.batch;
    }
    __device__ __forceinline__ void copy_biases(const RaggedParams& p, uint32_t group, int column) {
      const int row = threadIdx.x / T::kLanes * T::kRows;
      const float* const ape =
          p.ape == nullptr ? nullptr
                           : p.ape + uint64_t{group * p.ape_stride} * (R * Config::kStateDim) +
                                 row * Config::kStateDim + column;
#pragma unroll
      for (int j = 0; j < T::kRows; ++j) {
        auto& bias = biases[j][threadIdx.x];
        if (ape == nullptr) bias = {-0.0f, -0.0f, -0.0f, -0.0f};
        copy_if<kVector>(ape != nullptr, bias.x, ape + j * Config::kStateDim);
      }
      commit_copies();
    }
  };

  SharedPlan& smem;
  const Rows& rows;
  const int row_group = threadIdx.x / T::kLanes;
  Partial<kVector> partial;

  __device__ __forceinline__ LongWindow(SharedPlan& smem, const Rows& rows)
      : smem(smem), rows(rows) {}

  using Own = Neighbours<Rows, T::kRows>;
  // Adds all rows of the window, and stores the new ones that are to be stored. The whole CTA calls
  // it.
  __device__ __forceinline__ void add_rows(int32_t window) {
    const bool may_store = rows.may_store(window);
    // On a raw state the new rows of a window that is left open are stored, and no more.
    const bool needs_old = kFormat == StateFormat::kPrefix || window < rows.r.end_window;
    const bool has_old = needs_old && window * R < rows.start;
    Own own(rows, window * R + row_group * T::kRows);
    const auto* const kv = rows.new_kv(own.base, 0);
    if (__builtin_expect(rows.is_whole(window), 1)) {
      using KvScore = typename Config::KvScore;
      constexpr int kAtOnce = T::kRowsAtOnce;
      RowVector<KvScore> loaded[kAtOnce];
      const auto load = [&](int first, int64_t row_size, int64_t score_offset) {
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          loaded[j] = rows.load_new(kv + (first + j) * row_size, score_offset);
        }
      };
      const auto load_from = [&](int first) {
        if (rows.is_dense()) {
          load(first, 2 * Config::kStateDim, Config::kStateDim);  // offsets are in the instructions
        } else {
          load(first, rows.p.row_size, rows.p.score_offset);
        }
      };
      load_from(0);
      if (may_store) own.find_places();
      const bool stores_all = kFormat == StateFormat::kRaw ? rows.p.rule.all : kStoresAll;
      if (own.is_simple(may_store, stores_all)) {
        if (!smem.has_biases_early(rows.p)) smem.copy_biases(rows.p, blockIdx.z, rows.column);
        const uint32_t stored = may_store ? own.stored() : 0;
        wait_for_copies<0>();  // of the biases
#pragma unroll
        for (int first = 0; first < T::kRows; first += kAtOnce) {
          if (first > 0) load_from(first);
#pragma unroll
          for (int j = 0; j < kAtOnce; j += 4) {
            Vector<float, kVector> biases[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) biases[i] = smem.biases[first + j + i][threadIdx.x];
            rows.template add_whole<4>(loaded + j, biases, 0, stored >> (first + j) & 15,
                                       own.first + (first + j), partial);
          }
        }
        if constexpr (kStoresAll) {
          if (stored != 0) {
            Prefix open[kVector];
            find_prefix({}, open);  // keeps `partial`, which has no registers meanwhile
#pragma unroll
            for (int first = 0; first < T::kRows; first += kAtOnce) {
              if (kAtOnce < T::kRows) load_from(first);
#pragma unroll
              for (int j = 0; j < kAtOnce; ++j) {
                const auto& bias = smem.biases[first + j][threadIdx.x];
                Own::merge_into(open, rows.as_stored(loaded[j], bias));
                rows.store_row(own.first + (first + j), 0, Own::as_row(open));
              }
            }
            partial = load_partial<T>(smem.partials, row_group);
            __syncthreads();  // all reads, before other partial results take the same memory
          }
        }
        return;
      }
    } else if (may_store || has_old) {
      own.find_places();
    }
    const auto fetch = [&](int j, bool exists) {
      return rows.load_new_if(exists, kv + int64_t{j} * rows.p.row_size);
    };
    uint32_t counted = own.all_new(), stored = 0;
    if (may_store) {
      counted = own.counted();
      stored = own.stored();
    }
    if (kFormat == StateFormat::kRaw && has_old && own.has_new()) {
      // Asked for behind old rows, they would be waited for once more.
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool is_new = own.first_new + j < own.end;
        const auto* const from = kv + int64_t{own.first_new + j} * rows.p.row_size;
        prefetch_l2_if(is_new, from);
        prefetch_l2_if(is_new, from + rows.p.score_offset);
      }
    }
    if (has_old) {
      if (kFormat == StateFormat::kRaw) {
        own.add_old(0, partial);
      } else if (row_group == 0) {  // one row stands for all of them
        const auto row = rows.load_row(rows.find(rows.start - 1), 0);
        Own::template add<1>(&row, partial);
      }
    }
    // Of the thread's rows, those before the first one that is stored, or few less.
    [[maybe_unused]] Partial<kVector> before = partial;
    [[maybe_unused]] const int first_open = (__ffs(stored) - 1) / Own::kBatch * Own::kBatch;
    own.template add_new<8>(fetch, 0, counted, stored, partial, [&](int j) {
      if (kFormat == StateFormat::kPrefix && j == first_open) before = partial;
    });
    if constexpr (kFormat == StateFormat::kPrefix) {
      if (may_store) {
        store_prefixes(own, fetch, counted, stored, max(first_open, own.first_new), before);
      }
    }
    wait_for_copies<0>();  // of the biases, before they are copied again
  }

  // Adds row after row to what the row groups before this one hold, and stores the rows that are to
  // be stored. `before`: of its own rows, those before the first of these.
  template <class Fetch>
  __device__ __forceinline__ void store_prefixes(const Own& own, Fetch&& fetch, uint32_t counted,
                                                 uint32_t stored, int first_open,
                                                 const Partial<kVector>& before) const {
    Prefix open[kVector];
    find_prefix(before, open);
    own.store_prefixes(fetch, 0, counted, stored, stored, first_open, open);
    __syncthreads();  // all reads, before other partial results take the same memory
  }
  // The prefix of what the row groups before this one hold, and of these rows of its own.
  __device__ __forceinline__ void find_prefix(const Partial<kVector>& before,
                                              Prefix (&prefix)[kVector]) const {
    store_partial<T>(smem.partials, row_group, partial);
    __syncthreads();  // all row groups' rows, before they are added
    Partial<kVector> open;
#pragma unroll
    for (int g = 0; g < T::kRowGroups - 1; ++g) {
      open.add(g < row_group ? load_partial<T>(smem.partials, g) : Partial<kVector>{});
    }
    open.add(before);
#pragma unroll
    for (int v = 0; v < kVector; ++v) prefix[v] = prefix_of(open, v);
  }
};

// Grid: x = requests that may bring few rows, in whole clusters, then slots x slices; z = groups.
// The CTAs of a request's last slot also store the rows of the window that it leaves open. A record
// is made by the first CTA of the slot's cluster, to which the others send their values; or, if
// `slices_per_cta` is all of them, by one CTA after it went through them.
//
// kStoresAll, on a state of prefixes, is a kernel of its own: the other one would be slower for it.
template <class Config, StateFormat kFormat, bool kRecords, bool kStoresAll>
struct RaggedLong {
  using Window = LongWindow<Config, kFormat, kStoresAll>;
  using T = typename Window::T;
  using Rows = typename Window::Rows;
  static constexpr int R = Config::kRatio, D = Config::kHeadDim;
  static constexpr int kThreads = T::kThreads, kMinCtas = T::kMinCtas;
  static constexpr bool kMayBePadded = false;
  using Plan = RecordPlan<D>;
  using Few = RaggedFew<Config, kFormat, kRecords, kThreads>;
  static_assert(!kRecords || (T::kSlices <= 8 && Plan::kThreads <= kThreads),
                "a cluster has at most 8 CTAs on every chip, and a record D / 4 threads");

  struct Params : RaggedParams {
    ResultOf<kRecords> result;
    int32_t slices_per_cta;  // 1, or kSlices: then there are no clusters

    Params(const RaggedParams& p, const ResultOf<kRecords>& result, int32_t slices_per_cta)
        : RaggedParams(p), result(result), slices_per_cta(slices_per_cta) {}
    int64_t num_ctas() const {
      return few_ctas(*this) + int64_t{num_windows} * (T::kSlices / slices_per_cta);
    }
    int cluster() const { return kRecords && slices_per_cta == 1 ? T::kSlices : 1; }
  };
  struct ValuePlan {
    typename Window::SharedPlan window;
  };
  struct RecordsPlan : ValuePlan {
    Plan record;
  };
  using SlotsPlan = std::conditional_t<kRecords, RecordsPlan, ValuePlan>;
  union SharedPlan {
    SlotsPlan slots;
    typename Few::Plan few;
  };

  static __device__ __forceinline__ void run(const Params& p, SharedPlan& smem, uint32_t block) {
    const uint32_t few = few_ctas(p);
    if (block < few) {
      Few::run(p, p.result, smem.few, block);
    } else {
      run_slot(p, smem.slots, block - few);
    }
  }

 private:
  // Whole clusters. Of what a CTA loads first: another parameter would be another wait.
  static JAX_DSV4_HD uint32_t few_ctas(const RaggedParams& p) {
    constexpr int kCluster = kRecords ? T::kSlices : 1;
    return (Few::num_ctas(p) + kCluster - 1) / kCluster * kCluster;
  }
  static constexpr int kRecordThreads = Plan::kThreads;
  static __device__ __forceinline__ RecordMaker<D> maker_of(const Params& p, SlotsPlan& smem) {
    return RecordMaker<D>(p.result, smem.record, threadIdx.x);
  }

  static __device__ __forceinline__ void run_slot(const Params& p, SlotsPlan& smem,
                                                  uint32_t block) {
    const uint32_t group = blockIdx.z;
    const bool is_alone = kRecords && p.slices_per_cta != 1;
    const int32_t slot = is_alone ? block : block / T::kSlices;
    // Early; but where CTAs end in records it would be a register too many.
    const uint32_t layer = kRecords ? 0 : p.layer_of(group);
    const Owner owner = find_owner<Config>(p, group, slot);
    const int32_t own_slot = first_slot<Config>(owner.index, owner.begin);
    const bool is_last = slot + 1 == first_slot<Config>(owner.index + 1, owner.end);
#pragma unroll 1
    for (int slice = is_alone ? 0 : block % T::kSlices;;) {
      const int slice_column = slice * T::kColumns;
      const int column = slice_column + threadIdx.x % T::kLanes * kRaggedVector;
      const Rows rows(p, group, kRecords ? p.layer_of(group) : layer, owner, column);
      if constexpr (Few::kHasValues) {
        if (Few::serves(rows.r)) return;
      }
      const int32_t end = rows.r.end_window;
      const bool has_end = is_last && end * R < rows.length && rows.may_store(end);
      const int64_t out = (int64_t{group} * p.num_windows + slot) * D + slice_column;
      int32_t window = rows.r.first_window + slot - own_slot;
      if (window >= end) {
        window = end;
        if constexpr (!kRecords) {
          if (threadIdx.x < T::kLanes) {
            p.result.store_vector(out + threadIdx.x * kRaggedVector,
                                  Vector<float, kRaggedVector>{});
          }
        }
      }
#pragma unroll 1
      for (; window < end || has_end; window = end) {
        if constexpr (!Few::kHasValues) {
          // Asked before the loop, it would make long prompts slower.
          if (window == end && Few::serves(rows.r)) break;
        }
        const bool is_maker = kRecords && window < end && threadIdx.x < kRecordThreads &&
                              slice == (is_alone ? T::kSlices - 1 : 0);
        if constexpr (kRecords) {
          if (is_maker) maker_of(p, smem).start(group, owner.index, window, uint32_t{R} * window);
          if (window < end && !is_alone) {
            if (slice == 0 && threadIdx.x == 0) {
              expect_bytes(&smem.record.barrier, sizeof(smem.record.value));
            }
            __syncwarp();
            arrive_at_cluster();
          }
        }
        if (smem.window.has_biases_early(p)) smem.window.copy_biases(p, group, column);
        Window part(smem.window, rows);
        part.add_rows(window);
        if (window == end) break;
        const auto wait = [&] {
          __syncthreads();
          if (kRecords && !is_alone) wait_for_cluster();
        };
        const uint32_t first_rank = kRecords ? rank_in_cluster() - slice : 0;
        merge_row_groups<T>(smem.window.partials, part.partial, part.row_group, wait,
                            [&](int c, float value) {
                              if constexpr (kRecords) {
                                float* const to = &smem.record.value[slice_column + c];
                                if (is_alone) {
                                  *to = value;
                                } else {
                                  send(to, value, &smem.record.barrier, first_rank);
                                }
                              } else {
                                p.result.store_one(out + c, value);
                              }
                            });
        if constexpr (kRecords) {
          if (is_alone) __syncthreads();  // the value, before it is read
          if (is_maker) {
            auto maker = maker_of(p, smem);
            const auto ready = maker.prepare(group, window);
            if (!is_alone) wait_for_bytes(&smem.record.barrier);
            maker.stage.take_value(smem.record.value);
            maker.finish(ready);
          }
        }
        if (!has_end) break;
        __syncthreads();  // all reads, before the shared memory takes another window's
      }
      if (!is_alone || ++slice == T::kSlices) return;
      __syncthreads();  // as above
    }
  }
};

}  // namespace jax_dsv4
