// Ragged batches (ragged.cuh), windows of many rows where they are many. Device code only.
//
// Where there are about as many of them as SMs, or more, a CTA has all channels of one: rows are
// read whole, and a record is made where its value is, without a cluster.
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

// What follows from a configuration: kRowGroups of kLanes threads share a window's rows, kRows
// neighbours each.
template <class Config, int kRowGroups_>
struct WideTile {
  static constexpr int kVector = kRaggedVector, kColumns = Config::kHeadDim;
  static constexpr int kLanes = kColumns / kVector;
  static constexpr int kRowGroups = kRowGroups_, kThreads = kLanes * kRowGroups;
  static constexpr int kMinCtas = std::max(512 / kThreads, 1);  // 128 registers a thread
  static constexpr int kRows = Config::kRatio / kRowGroups;
  static constexpr int kBlockRows = 16;  // whose places are looked up at once
  // New rows that a thread has on their way. More of fewer threads: measured.
  static constexpr int kRowsAtOnce = kRowGroups > 2 ||
                                             sizeof(RowVector<typename Config::KvScore>) > 16
                                         ? 4
                                         : 8;
  static constexpr int kMergers = std::clamp(kThreads / kColumns, 1, 4);
  static constexpr int kPartialStride = 3 * kColumns + std::max(32 / kMergers, 4);
  static_assert(!Config::kOverlap, "long windows that overlap: no kernel");
  static_assert(kRows % kBlockRows == 0 && kLanes % 32 == 0,
                "row groups share the rows evenly, and whole warps look for a request");
};

// One thread's part of one window.
template <class Config, StateFormat kFormat, int kRowGroups>
struct WideWindow {
  using T = WideTile<Config, kRowGroups>;
  using Rows = RaggedRows<Config, kFormat>;
  using Own = Neighbours<Rows, T::kBlockRows>;
  static constexpr int R = Config::kRatio, S = Config::kStateDim, kVector = kRaggedVector;

  struct SharedPlan {
    alignas(16) float partials[T::kRowGroups][T::kPartialStride];
  };

  SharedPlan& smem;
  const Rows& rows;
  const int row_group = threadIdx.x / T::kLanes;
  Partial<kVector> partial;

  __device__ __forceinline__ WideWindow(SharedPlan& smem, const Rows& rows)
      : smem(smem), rows(rows) {}

  // Adds all rows of the window, and stores the new ones that are to be stored. The whole CTA calls
  // it.
  __device__ __forceinline__ void add_rows(int32_t window) {
    const bool may_store = rows.may_store(window);
    const int32_t base = window * R + row_group * T::kRows;
    if (rows.is_whole(window)) {
      if (!may_store) return add_whole<false>(base);
      if (kFormat == StateFormat::kRaw && !rows.p.rule.all && Own::fits_pages(rows.p.paging)) {
        return add_whole<true>(base);
      }
    }
    const bool has_old = window * R < rows.start;
    if (kFormat == StateFormat::kPrefix && has_old && row_group == 0) {
      const auto row = rows.load_row(rows.find(rows.start - 1), 0);  // it stands for all of them
      Own::template add<1>(&row, partial);
    }
    [[maybe_unused]] Open open;
#pragma unroll 1
    for (int first = 0; first < T::kRows; first += T::kBlockRows) {
      Own own(rows, base + first);
      if (may_store || has_old) own.find_places();
      const uint32_t stored = may_store ? own.stored() : 0;
      const uint32_t counted = may_store ? own.counted() : own.all_new();
      if (kFormat == StateFormat::kRaw && has_old) own.add_old(0, partial);
      [[maybe_unused]] const bool opens = stored != 0 && open.first < 0;
      [[maybe_unused]] const int first_open = (__ffs(stored) - 1) / Own::kBatch * Own::kBatch;
      own.template add_new<8>(fetch_from(own.base), 0, counted, stored, partial, [&](int j) {
        if (kFormat == StateFormat::kPrefix && opens && j == first_open) open.before = partial;
      });
      if constexpr (kFormat == StateFormat::kPrefix) {
        if (opens) open.first = first + first_open;
        if (stored != 0) open.last = first;
      }
    }
    if constexpr (kFormat == StateFormat::kPrefix) {
      if (may_store) store_prefixes(base, open);
    }
  }

  // The same of a window that is left open: on a raw state its rows are stored, and no more.
  __device__ __forceinline__ void store_rows(int32_t window) {
    if constexpr (kFormat == StateFormat::kPrefix) return add_rows(window);
    constexpr int kAtOnce = 8, kLanesOfLine = 128 / (kVector * sizeof(typename Config::KvScore));
    // All of them are asked for before the first is waited for.
#pragma unroll 4
    for (int j = 0; j < T::kRows; ++j) {
      const int32_t position = window * R + row_group * T::kRows + j;
      const bool is_new = position >= rows.start && position < rows.length;
      const auto* const from = rows.new_kv(position, 0);
      prefetch_l2_if(is_new && threadIdx.x % kLanesOfLine == 0, from);
      prefetch_l2_if(is_new && threadIdx.x % kLanesOfLine == 0, from + rows.p.score_offset);
    }
#pragma unroll 1
    for (int first = 0; first < T::kRows; first += T::kBlockRows) {
      const int row = row_group * T::kRows + first;
      Own own(rows, window * R + row);
      if (!own.has_new()) continue;
      own.find_places();
      const uint32_t stored = own.stored();
      const auto fetch = fetch_from(own.base);
#pragma unroll 1
      for (int from = 0; from < T::kBlockRows; from += kAtOnce) {
        typename Rows::Projected loaded[kAtOnce];
        typename Rows::Bias biases[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) loaded[j] = fetch(from + j, stored >> (from + j) & 1);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) biases[j] = rows.bias_at(row + from + j, 0);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          if (stored >> (from + j) & 1) {
            rows.store_row(own.place_of(from + j), 0, rows.as_stored(loaded[j], biases[j]));
          }
        }
      }
    }
  }

 private:
  // Of a thread's rows, on a state of prefixes: the first one that is stored, or few less, all rows
  // before it, and the last block that has a stored one.
  struct Open {
    int first = -1, last = -1;
    Partial<kVector> before;
  };

  __device__ __forceinline__ auto fetch_from(int32_t position) const {
    const auto* const kv = rows.new_kv(position, 0);
    return [this, kv](int j, bool exists) {
      return rows.load_new_if(exists, kv + int64_t{j} * rows.p.row_size);
    };
  }

  // Adds a thread's rows, all of them new, from position `base` on. kMayStore: on a raw state, some
  // of them may be stored, side by side.
  template <bool kMayStore>
  __device__ __forceinline__ void add_whole(int32_t base) {
    constexpr int kAtOnce = T::kRowsAtOnce;
    const bool has_ape = rows.r.ape != nullptr;
    const auto add = [&](int64_t row_size, int64_t score_offset) {
      const auto* kv = rows.new_kv(base, 0);
      const float* ape = rows.r.ape + row_group * (T::kRows * S) + rows.column;
      uint32_t stored = 0;
      Place place;
#pragma unroll 1
      for (int first = 0; first < T::kRows; first += kAtOnce) {
        typename Rows::Projected loaded[kAtOnce];
        typename Rows::Bias biases[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          loaded[j] = rows.load_new(kv + j * row_size, score_offset);
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          biases[j] = Rows::no_bias();
          if (has_ape) biases[j] = load<float, kVector>(ape + j * S);
        }
        if (kMayStore && first % T::kBlockRows == 0) {
          Own own(rows, base + first);
          own.find_places();
          stored = own.stored();
          place = own.first;
        }
        rows.template add_whole<kAtOnce>(loaded, biases, 0, stored & ((1u << kAtOnce) - 1), place,
                                         partial);
        stored >>= kAtOnce;
        place = place + kAtOnce;
        kv += kAtOnce * row_size;
        ape += kAtOnce * S;
      }
    };
    if (rows.is_dense()) {
      add(2 * S, S);  // offsets are in the instructions
    } else {
      add(rows.p.row_size, rows.p.score_offset);
    }
  }

  // Adds row after row to what the row groups before this one hold, and stores the rows that are to
  // be stored.
  __device__ __forceinline__ void store_prefixes(int32_t base, const Open& open) const {
    store_partial<T>(smem.partials, row_group, partial);
    __syncthreads();  // all row groups' rows, before they are added
    if (open.first >= 0) {
      Partial<kVector> before = open.before;
#pragma unroll
      for (int g = 0; g < T::kRowGroups - 1; ++g) {
        if (g >= row_group) break;
        before.add(load_partial<T>(smem.partials, g));
      }
      Prefix prefix[kVector];
#pragma unroll
      for (int v = 0; v < kVector; ++v) prefix[v] = prefix_of(before, v);
      int first = open.first;
#pragma unroll 1
      for (int block = first / T::kBlockRows * T::kBlockRows; block <= open.last;
           block += T::kBlockRows) {
        Own own(rows, base + block);
        own.find_places();
        const uint32_t stored = own.stored();
        const uint32_t merged = block < open.last ? own.all_new() : stored;
        own.store_prefixes(fetch_from(own.base), 0, own.counted(), stored, merged,
                           max(first - block, own.first_new), prefix);
        first = block + T::kBlockRows;
      }
    }
    __syncthreads();  // all reads, before other partial results take the same memory
  }
};

// Grid: x = requests that may bring few rows, then slots; z = groups. The CTA of a request's last
// slot also stores the rows of the window that it leaves open.
template <class Config, StateFormat kFormat, bool kRecords, int kRowGroups>
struct RaggedWide {
  using Window = WideWindow<Config, kFormat, kRowGroups>;
  using T = typename Window::T;
  using Rows = typename Window::Rows;
  static constexpr int R = Config::kRatio, D = Config::kHeadDim;
  static constexpr int kThreads = T::kThreads, kMinCtas = T::kMinCtas;
  static constexpr int kFewThreads = std::min(kThreads, 128);  // the others of their CTAs leave
  static constexpr bool kMayBePadded = false;
  using Few = RaggedFew<Config, kFormat, kRecords, kFewThreads>;
  struct RecordsPlan : Window::SharedPlan {
    alignas(16) float value[D];
    RecordExchange<D> record;
  };
  using SlotsPlan = std::conditional_t<kRecords, RecordsPlan, typename Window::SharedPlan>;
  union SharedPlan {
    SlotsPlan slots;
    typename Few::Plan few;
  };

  struct Params : RaggedParams {
    ResultOf<kRecords> result;

    Params(const RaggedParams& p, const ResultOf<kRecords>& result)
        : RaggedParams(p), result(result) {}
    int64_t num_ctas() const { return int64_t{Few::num_ctas(*this)} + num_windows; }
    int cluster() const { return 1; }
  };

  static __device__ __forceinline__ void run(const Params& p, SharedPlan& smem, uint32_t block) {
    const uint32_t few = Few::num_ctas(p);
    if (block >= few) {
      run_slot(p, smem.slots, block - few);
    } else if (threadIdx.x < kFewThreads) {
      Few::run(p, p.result, smem.few, block);
    }
  }

 private:
  static __device__ __forceinline__ void run_slot(const Params& p, SlotsPlan& smem,
                                                  uint32_t block) {
    const uint32_t group = blockIdx.z;
    const int lane = threadIdx.x % T::kLanes;
    // Backwards: rows that are stored, which take longer, are the last ones of a prompt.
    const int32_t slot = p.num_windows - 1 - static_cast<int32_t>(block);
    const Owner owner = find_owner<Config>(p, group, slot);
    const int32_t own_slot = first_slot<Config>(owner.index, owner.begin);
    const bool is_last = slot + 1 == first_slot<Config>(owner.index + 1, owner.end);
    const Rows rows(p, group, p.layer_of(group), owner, lane * kRaggedVector);
    const bool is_few = Few::serves(rows.r);
    if (Few::kHasValues && is_few) return;
    const int32_t end = rows.r.end_window;
    const bool has_end = is_last && !is_few && end * R < rows.length && rows.may_store(end);
    const int32_t window = rows.r.first_window + slot - own_slot;
    const int64_t out = (int64_t{group} * p.num_windows + slot) * D;
    if (window < end) {
      if constexpr (kRecords) {
        const bool is_maker = threadIdx.x < T::kLanes;
        RecordMaker<D, RecordExchange<D>> maker(p.result, smem.record, lane);
        const auto loaded =
            maker.load_all(is_maker, group, owner.index, window, static_cast<uint32_t>(window) * R);
        reduce(smem, rows, window, [&](int c, float value) { smem.value[c] = value; });
        __syncthreads();  // the value, before it is read
        if (is_maker) {
          maker.stage.take_value(smem.value);
          maker.finish(maker.take(loaded, group, window));
        }
      } else {
        reduce(smem, rows, window, [&](int c, float value) { p.result.store_one(out + c, value); });
      }
    } else if constexpr (!kRecords) {
      if (threadIdx.x < T::kLanes) {
        p.result.store_vector(out + lane * kRaggedVector, Vector<float, kRaggedVector>{});
      }
    }
    if (!has_end) return;
    __syncthreads();  // all reads, before the shared memory takes another window's
    Window(smem, rows).store_rows(end);
  }

  template <class Emit>
  static __device__ __forceinline__ void reduce(SlotsPlan& smem, const Rows& rows, int32_t window,
                                                Emit&& emit) {
    Window part(smem, rows);
    part.add_rows(window);
    merge_row_groups<T>(smem.partials, part.partial, part.row_group, [] { __syncthreads(); }, emit);
  }
};

}  // namespace jax_dsv4
