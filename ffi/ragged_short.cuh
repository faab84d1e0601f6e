// Ragged batches (ragged.cuh), windows of few rows. Device code only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "config.h"
#include "decode_raw.cuh"
#include "ragged_few.cuh"
#include "ragged_rows.cuh"
#include "record_maker.cuh"
#include "tuning.h"
#include "vector.cuh"

namespace jax_dsv4 {

// A walker is D / 4 threads that go through some slots, one after the other: what a window adds to
// the next one's value stays in registers, and the next windows' new rows are on their way. A CTA
// has kWalkers.
template <class Config>
struct ShortTile {
  static constexpr int R = Config::kRatio;
  static constexpr int kLanes = Config::kHeadDim / kRaggedVector;
  static constexpr int kWalkers = std::max(128 / kLanes, 1);
  static constexpr int kThreads = kLanes * kWalkers;
  static constexpr int kHalves = Config::kOverlap ? 2 : 1;
  static constexpr int kOwn = kHalves - 1;  // the half that a window adds to its own value
  // One half of a window's new rows.
  using Unit = StagedRows<typename Config::KvScore, R, kThreads>;
  static_assert(kLanes % 32 == 0, "whole warps look for the request of a slot");
};

// What a CTA has in shared memory. A thread reads only what it has copied itself.
template <class Config, int kUnits_>
struct ShortPlan {
  using T = ShortTile<Config>;
  static constexpr int kUnits = kUnits_;

  typename T::Unit units[kUnits];  // on their way, in the order in which they are added
  // Of a thread's channels. The rows that stream through the L1 would leave none of them there.
  Vector<float, kRaggedVector> biases[T::kHalves][T::R][T::kThreads];

  __device__ __forceinline__ void copy_biases(const RaggedParams& p, uint32_t group, int column) {
    const float* ape = p.ape;
    if (ape != nullptr) ape += uint64_t{group * p.ape_stride} * (T::R * Config::kStateDim) + column;
#pragma unroll
    for (int half = 0; half < T::kHalves; ++half) {
#pragma unroll
      for (int row = 0; row < T::R; ++row) {
        auto& bias = biases[half][row][threadIdx.x];
        if (ape == nullptr) bias = {-0.0f, -0.0f, -0.0f, -0.0f};
        copy_if<kRaggedVector>(ape != nullptr, bias.x,
                               ape + row * Config::kStateDim + half * Config::kHeadDim);
      }
    }
    commit_copies();
  }
};

// The neighbouring windows of one request that a walker has, in one thread's channels.
template <class Config, StateFormat kFormat, class Plan>
struct ShortWindows {
  using T = ShortTile<Config>;
  using Rows = RaggedRows<Config, kFormat>;
  using Own = Neighbours<Rows, Config::kRatio>;
  static constexpr int R = Config::kRatio, kVector = kRaggedVector, kOwn = T::kOwn;
  static constexpr int kHalves = T::kHalves, kUnits = Plan::kUnits;

  Plan& smem;
  const Rows& rows;
  // Windows first <= w < end are completed here. Where windows overlap, the one before them is
  // needed, too; and if `has_end`, the rows of the one after them are stored.
  const int32_t first, end;
  const bool has_end;
  // Of all of these.
  __device__ __forceinline__ int32_t first_needed() const {
    return first - (Config::kOverlap && first > 0 && first < end);
  }
  __device__ __forceinline__ int32_t end_needed() const { return end + has_end; }

  // For each window that is completed here: start(window), early, and emit(window, value).
  template <class Start, class Emit>
  __device__ __forceinline__ void run(Start&& start, Emit&& emit) const {
    Partial<kVector> before;  // what the last window adds to this one's value
    const int32_t begin = first_needed(), stop = end_needed();
#pragma unroll 1
    for (int i = 0; i < kUnits; ++i) copy(begin + i / kHalves, kOwn - i % kHalves, i);
    int32_t plain = begin;  // windows before this one are plain
    int number = 0;         // of the unit that is next
#pragma unroll 1
    for (int32_t window = begin; window < stop; ++window) {
      if (window >= plain) plain = plain_end(window);
      const bool has_own = window >= first && window < end;
      if (has_own) start(window);
      Partial<kVector> partial = before;  // of the value
      if (__builtin_expect(window < plain, 1)) {
        add_plain<0>(number, window, has_own, partial);
        if constexpr (Config::kOverlap) {
          add_plain<1>(number, window, window + 1 < end, before);
        }
      } else {
        add_other(number, window, has_own, partial, before);
      }
      if (has_own) emit(window, value_of(partial));
    }
    wait_for_copies<0>();  // before the units take other windows
  }

 private:
  // Whether any of its rows may have to be stored here.
  __device__ __forceinline__ bool may_store(int32_t window) const {
    return window >= first && rows.may_store(window) && window < rows.first_last();
  }
  // Whether its first half is needed: for the next one, or to be stored.
  __device__ __forceinline__ bool needs_first_half(int32_t window) const {
    return window + 1 < end || may_store(window);
  }
  // From `window` on to this one, all rows of a window are new, and none is stored.
  __device__ __forceinline__ int32_t plain_end(int32_t window) const {
    const StoreRule& rule = rows.p.rule;
    if (rule.all || window * R < rows.start) return window;
    const int32_t end_stored = rows.first_last();
    if (window >= end_stored) return end;
    int64_t next = max(rows.length - rule.max_rewind, 0);  // as in may_store
    if (rule.resumes) {
      const Divisor& every = rule.resume_every;
      next = min(next, (int64_t{window * R / every} + 1) * every.value);
    }
    const int32_t first_stored = static_cast<int32_t>((next - 1) / R) - Config::kOverlap;
    return first_stored < end_stored ? min(first_stored, end) : end;
  }

  // Starts copies of one half of a window's new rows, if there is such a window and they are
  // needed.
  __device__ __forceinline__ void copy(int32_t window, int half, int number) const {
    // Past the last window this may wrap; nothing is copied then.
    const auto base = static_cast<int32_t>(static_cast<uint32_t>(window) * R);
    const bool is_needed =
        window < end_needed() && (half == kOwn ? window >= first : needs_first_half(window));
    auto& unit = smem.units[number];
    const auto* const kv = rows.new_kv(base, half);
    if (is_needed && rows.is_dense() && rows.is_whole(window)) {
      unit.copy(0, R, kv, 2 * Rows::S, Rows::S);  // no tests, and offsets in the instructions
    } else if (is_needed) {
      unit.copy(max(rows.start - base, 0), rows.length - base, kv, rows.p.row_size,
                rows.p.score_offset);
    }
    commit_copies();
  }
  // Adds the unit that is next, the kPosition-th of a plain window, and starts copies of the one
  // that takes its place.
  template <int kPosition>
  __device__ __forceinline__ void add_plain(int& number, int32_t window, bool is_needed,
                                            Partial<kVector>& partial) const {
    constexpr int kHalf = kOwn - kPosition;
    constexpr int kAhead = (kPosition + kUnits) / kHalves;
    constexpr int kHalfAhead = kOwn - (kPosition + kUnits) % kHalves;
    wait_for_copies<kUnits - 1>();
    RowVector<typename Config::KvScore> row[R];
#pragma unroll
    for (int j = 0; j < R; ++j) row[j] = smem.units[number][j];
    copy(window + kAhead, kHalfAhead, number);
    if (is_needed) add_whole<kPosition == 1>(row, kHalf, 0, Place{}, partial);
    if (++number == kUnits) number = 0;
  }
  // Adds all rows of a window, in one half; kAreFirst: to nothing.
  template <bool kAreFirst = false>
  __device__ __forceinline__ void add_whole(const RowVector<typename Config::KvScore> (&row)[R],
                                            int half, uint32_t stored, const Place& place,
                                            Partial<kVector>& partial) const {
    Vector<float, kVector> biases[R];
#pragma unroll
    for (int j = 0; j < R; ++j) biases[j] = smem.biases[half][j][threadIdx.x];
    rows.template add_whole<R, kAreFirst>(row, biases, half, stored, place, partial);
  }

  // Stores the prefixes of all rows of a window; returns the last one, which stands for all of
  // them.
  __device__ __forceinline__ typename Rows::Stored store_prefixes(
      const RowVector<typename Config::KvScore> (&row)[R], int half, const Place& first) const {
    Prefix open[kVector];
#pragma unroll
    for (int j = 0; j < R; ++j) {
      const auto& bias = smem.biases[half][j][threadIdx.x];
      Own::merge_into(open, rows.as_stored(row[j], bias), /*is_first=*/j == 0);
      rows.store_row(first + j, half, Own::as_row(open));
    }
    return Own::as_row(open);
  }

  // Of a window that is not plain: adds its rows to its own value, and stores those that are to be
  // stored; `before`: what it adds to the next one's value.
  __device__ __forceinline__ void add_other(int& number, int32_t window, bool has_own,
                                            Partial<kVector>& partial,
                                            Partial<kVector>& before) const {
    const bool has_next = Config::kOverlap && window + 1 < end;
    const bool may_store = this->may_store(window);
    Own own(rows, window * R);
    if (may_store || own.first_new > 0 || rows.p.rule.all) own.find_places();
    const uint32_t stored = may_store ? own.stored() : 0;
    const bool is_simple =
        rows.is_whole(window) && own.is_simple(may_store || rows.p.rule.all, rows.p.rule.all);
    const uint32_t counted = is_simple ? 0 : own.counted();
#pragma unroll 1
    for (int position = 0; position < kHalves; ++position) {
      const int half = kOwn - position;
      const bool is_for_value = half == kOwn && has_own;
      const bool is_for_next = Config::kOverlap && half == 0 && has_next;
      wait_for_copies<kUnits - 1>();
      const auto& unit = smem.units[number];
      const auto copy_next = [&] {
        copy(window + (position + kUnits) / kHalves, kOwn - (position + kUnits) % kHalves, number);
      };
      Partial<kVector> sum;
      if (Config::kOverlap && is_for_value) sum = partial;
      if (is_simple) {
        RowVector<typename Config::KvScore> row[R];
#pragma unroll
        for (int j = 0; j < R; ++j) row[j] = unit[j];
        copy_next();
        const bool is_added = is_for_value || is_for_next;
        if (kFormat == StateFormat::kPrefix && stored != 0) {
          const auto last = store_prefixes(row, half, own.first);
          if (is_added) Own::template add<1>(&last, sum);
        } else if (is_added || stored != 0) {
          add_whole(row, half, stored, own.first, sum);
        }
      } else {
        if (is_for_value || is_for_next || stored != 0) {
          add_some(
              own, [&](int j, bool) { return unit[j]; }, half, counted, stored,
              is_for_value || is_for_next, sum);
        }
        copy_next();
      }
      if (is_for_value) partial = sum;
      if (is_for_next) before = sum;
      if (++number == kUnits) number = 0;
    }
  }
  // Of a window some of whose rows are old, or not there, or stored one by one. has_value: a value
  // needs them.
  template <class Fetch>
  __device__ __forceinline__ void add_some(const Own& own, Fetch&& fetch, int half,
                                           uint32_t counted, uint32_t stored, bool has_value,
                                           Partial<kVector>& partial) const {
    [[maybe_unused]] Prefix open[kVector];
    if (own.first_new > 0 && (kFormat == StateFormat::kPrefix || has_value)) {
      [[maybe_unused]] const auto row = own.add_old(half, partial);
      if constexpr (kFormat == StateFormat::kPrefix) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          open[v] = {to_f32(row.score.x[v]), to_f32(row.kv.x[v])};
        }
      }
    }
    own.template add_new<R>(fetch, half, counted, stored, partial, [](int) {});
    if constexpr (kFormat == StateFormat::kPrefix) {
      own.store_prefixes(fetch, half, counted, stored, stored, own.first_new, open);
    }
  }
};

// Grid: x = walkers, kWalkers at once, and before or behind them requests, kRequests at once; z =
// groups. CTAs of requests (RaggedFew) have those that bring few rows, and store the last rows of
// others, unless all are stored: then the walker of a request's last slot has the window that it
// leaves open.
template <class Config, StateFormat kFormat, bool kRecords>
struct RaggedShort {
  using T = ShortTile<Config>;
  // The warps of a walker make a record each, of as many windows, whose values wait for the last.
  static constexpr int kWarps = T::kLanes / 32;
  using Values = float[T::kWalkers][kWarps][Config::kHeadDim];
  // What has room beside the biases and those values.
  using Biases = decltype(ShortPlan<Config, 1>::biases);
  static constexpr int kRoom =
      48 * 1024 - sizeof(Biases) - (kRecords && kWarps > 1 ? sizeof(Values) : 0);
  static constexpr int kUnits = std::clamp<int>(kRoom / sizeof(typename T::Unit), 1, 4);
  using Plan = ShortPlan<Config, kUnits>;
  using Windows = ShortWindows<Config, kFormat, Plan>;
  using Rows = typename Windows::Rows;
  static constexpr int R = Config::kRatio, D = Config::kHeadDim;
  static constexpr int kThreads = T::kThreads;
  // On raw states 128 registers are too few: what is spilled costs prompts 4 to 8 %.
  static constexpr int kMinCtas = kRecords || kFormat == StateFormat::kRaw ? 3 : 4;
  static constexpr bool kEndsInRecords = kRecords, kMayBePadded = true;
  struct RecordsPlan : Plan {
    alignas(16) Values values;
  };
  using WalkersPlan = std::conditional_t<kRecords && (kWarps > 1), RecordsPlan, Plan>;
  using Few = RaggedFew<Config, kFormat, kRecords, kThreads>;
  union SharedPlan {
    WalkersPlan walkers;
    typename Few::Plan few;
  };

  struct Params : RaggedParams {
    ResultOf<kRecords> result;
    int32_t slots_per_walker;
    uint32_t first_walkers, walker_ctas;  // CTAs

    Params(const RaggedParams& p, const ResultOf<kRecords>& result, int32_t slots_per_walker)
        : RaggedParams(p), result(result), slots_per_walker(slots_per_walker) {
      const int64_t slots = int64_t{slots_per_walker} * T::kWalkers;  // of a CTA
      walker_ctas = static_cast<uint32_t>((num_windows + slots - 1) / slots);
      first_walkers = slots_per_walker > kFewSlotsOfWalker ? 0 : Few::num_ctas(*this);
    }
    int64_t num_ctas() const { return int64_t{walker_ctas} + Few::num_ctas(*this); }
    int cluster() const { return 1; }
  };

  static __device__ __forceinline__ void run(const Params& p, SharedPlan& smem, uint32_t block) {
    const uint32_t of_walkers = block - p.first_walkers;  // or more than they are
    if (of_walkers < p.walker_ctas) {
      walk(p, smem.walkers, of_walkers);
    } else {
      Few::run(p, p.result, smem.few, block < p.first_walkers ? block : block - p.walker_ctas);
    }
  }

 private:
  static __device__ __forceinline__ void walk(const Params& p, WalkersPlan& smem, uint32_t block) {
    const uint32_t group = blockIdx.z;
    const int in_cta = threadIdx.x / T::kLanes, lane = threadIdx.x % T::kLanes;
    const uint32_t walker = block * T::kWalkers + in_cta;
    const int column = lane * kRaggedVector;
    const int32_t end_slot = static_cast<int32_t>(
        min(int64_t{p.num_windows}, (int64_t{walker} + 1) * p.slots_per_walker));
    int64_t from = int64_t{walker} * p.slots_per_walker;
    if (from < end_slot) smem.copy_biases(p, group, column);  // waited for with the first unit
#pragma unroll 1
    while (from < end_slot) {
      const auto slot = static_cast<int32_t>(from);
      const Owner owner = find_owner<Config>(p, group, slot);
      const Rows rows(p, group, p.layer_of(group), owner, column);
      const int32_t own_slot = first_slot<Config>(owner.index, owner.begin);
      const int32_t next_slot =
          owner.index < 0 ? slot + 1 : first_slot<Config>(owner.index + 1, owner.end);
      const int32_t next = min(next_slot, end_slot);
      from = next;
      if (Few::serves(rows.r)) continue;
      const int32_t end_window = rows.r.end_window;
      const int32_t first = min(rows.r.first_window + slot - own_slot, end_window);
      const int32_t end = min(first + next - slot, end_window);
      const bool has_end = next == next_slot && end_window * R < rows.length &&
                           end_window < rows.first_last() && rows.may_store(end_window);
      const Windows windows{smem, rows, first, end, has_end};
      if constexpr (kRecords) {
        // Each warp makes the record of one of kWarps windows, once all of them have their values.
        using Maker = RecordMaker<D, RecordOfWarp<D>>;
        RecordOfWarp<D> alone;
        const auto settings = Maker::settings_of(p.result);
        const int warp = lane / 32;
        const auto new_maker = [&] { return Maker(p.result, alone, lane % 32); };
        const auto meet = [&] { wait_at_barrier<T::kLanes>(1 + in_cta); };
        typename Maker::Loaded loaded = {};
        windows.run(
            [&](int32_t window) {
              if ((window - first) % kWarps != 0) return;
              const int32_t own = window + warp;
              loaded = new_maker().template load_all<kWarps == 1>(
                  own < end, group, owner.index, own, static_cast<uint32_t>(own) * R);
            },
            [&](int32_t window, const Vector<float, kRaggedVector>& value) {
              const int place = (window - first) % kWarps;
              Maker maker = new_maker();
              if constexpr (kWarps > 1) {
                auto& values = smem.values[in_cta];
                if (place == 0) meet();  // all reads of the values before
                store(values[place] + column, value);
                if (place + 1 < kWarps && window + 1 < end) return;
                meet();  // the values, before they are read
                if (warp > place) return;
                maker.stage.take_value(values[warp]);
                maker.load_weight(group, loaded);
              } else {
#pragma unroll
                for (int v = 0; v < kRaggedVector; ++v) maker.stage.x[0][v] = value.x[v];
              }
              maker.finish(
                  maker.take(loaded, group, window - place + warp, [&] { return settings; }));
            });
      } else {
        const int64_t out = (int64_t{group} * p.num_windows + slot) * D + column;
        windows.run([](int32_t) {},
                    [&](int32_t window, const Vector<float, kRaggedVector>& value) {
                      p.result.store_vector(out + int64_t{window - first} * D, value);
                    });
#pragma unroll 1
        for (int32_t empty = slot + end - first; empty < next; ++empty) {
          p.result.store_vector((int64_t{group} * p.num_windows + empty) * D + column,
                                Vector<float, kRaggedVector>{});
        }
      }
    }
    wait_for_copies<0>();  // of biases, where nothing was walked
  }
};

}  // namespace jax_dsv4
