// A ragged batch (ragged.h) on an NVIDIA GPU: device code only.
//
// The work is cut into slots: a slot is a row of `kv_comp` and the window that goes there, if there
// is one; and a request's last slot also has the rows of the window that it leaves open. Nobody has
// counted anything before: the threads of a slot find whose it is in `cu_q_lens`.
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
#include "record.h"
#include "record_maker.cuh"
#include "tuning.h"
#include "vector.cuh"

namespace jax_dsv4 {

// The request of a slot, and its new rows, begin <= row < end of kv_score. Negative index:
// nobody's.
struct Owner {
  int32_t index = -1, begin = 0, end = 0, length = 0;
};

// The request whose window, if it completes one, has this slot: the last one whose first slot is
// not behind it. Called by whole warps.
template <class Config>
__device__ __forceinline__ Owner find_owner(const RaggedParams& p, uint32_t group, int32_t slot) {
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
    const bool is_before = i <= count && first_slot<Config>(i, begin) <= slot;
    const int number = __popc(__ballot_sync(~0u, is_before));
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

inline constexpr int kRaggedVector = 4;  // channels of a thread

// Four channels of a row, as projected or as stored.
template <class Element>
struct RowVector {
  Vector<Element, kRaggedVector> kv, score;
};

// Where a row is in each of the state's arrays.
struct Place {
  uint32_t kv = kNowhere, score = kNowhere;

  __device__ __forceinline__ bool exists() const { return kv != kNowhere && score != kNowhere; }
  // So many rows on, on the same page.
  __device__ __forceinline__ Place operator+(uint32_t rows) const {
    return {kv == kNowhere ? kNowhere : kv + rows, score == kNowhere ? kNowhere : score + rows};
  }
};

// New rows in shared memory, of which each thread has its own channels: it waits for nobody but
// itself.
template <class KvScore, int kRows, int kThreads>
struct StagedRows {
  Vector<KvScore, kRaggedVector> parts[kRows][2][kThreads];

  // Starts copies of rows begin <= row < end; `kv`: of row 0.
  __device__ __forceinline__ void copy(int begin, int end, const KvScore* kv, int64_t row_size,
                                       int64_t score_offset) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const bool exists = row >= begin && row < end;
      const KvScore* const from = kv + row * row_size;
      copy_if<kRaggedVector>(exists, parts[row][0][threadIdx.x].x, from);
      copy_if<kRaggedVector>(exists, parts[row][1][threadIdx.x].x, from + score_offset);
    }
  }
  __device__ __forceinline__ RowVector<KvScore> operator[](int row) const {
    return {load<KvScore, kRaggedVector>(parts[row][0][threadIdx.x].x),
            load<KvScore, kRaggedVector>(parts[row][1][threadIdx.x].x)};
  }
};

__device__ __forceinline__ Vector<float, kRaggedVector> to_f32(
    const Vector<float, kRaggedVector>& x) {
  return x;
}
__device__ __forceinline__ Vector<float, kRaggedVector> to_f32(
    const Vector<bf16, kRaggedVector>& x) {
  const auto words = reinterpret_cast<const uint32_t (&)[2]>(x);
  return {{float_of(words[0] << 16), float_of(words[0] & 0xffff0000u), float_of(words[1] << 16),
           float_of(words[1] & 0xffff0000u)}};
}

// One thread's view of a request's rows, in some of its channels.
template <class Config, StateFormat kFormat_>
struct RaggedRows {
  using KvScore = typename Config::KvScore;
  using State = typename Config::State;
  using Stored = RowVector<State>;
  static constexpr StateFormat kFormat = kFormat_;
  static constexpr int R = Config::kRatio, S = Config::kStateDim, D = Config::kHeadDim;
  static constexpr bool kOverlap = Config::kOverlap;

  const RaggedParams& p;
  const Request<Config> r;
  const int32_t length, start;  // new rows are at start <= position < length
  const int column;             // of D

  __device__ __forceinline__ RaggedRows(const RaggedParams& p, uint32_t group, const Owner& owner,
                                        int column)
      : p(p),
        r(ragged_request_at<Config>(p, group, owner.index, owner.length, owner.begin, owner.end)),
        length(r.num_new > 0 ? owner.length : 0),
        start(max(r.first_position, 0)),
        column(column) {}

  // Whether any new row of a window may have to be stored.
  __device__ __forceinline__ bool may_store(int32_t window) const {
    if (p.rule.all) return true;
    const int64_t reach = (int64_t{window} + 1 + Config::kOverlap) * R;  // of steps that read it
    if (reach >= length - p.rule.max_rewind) return true;
    if (!p.rule.resumes) return false;
    const Divisor& every = p.rule.resume_every;
    return reach >= (int64_t{window * R / every} + 1) * every.value;
  }
  // Whether all rows of a window are new.
  __device__ __forceinline__ bool is_whole(int32_t window) const {
    return window * R >= start && window * R + (R - 1) < length;
  }
  __device__ __forceinline__ bool is_new(int32_t position) const {
    return position >= start && position < length;
  }
  __device__ __forceinline__ bool stores(int32_t position) const {
    return is_stored<Config, kFormat>(p.rule, position, length);
  }

  // A new row.
  __device__ __forceinline__ const KvScore* new_kv(int32_t position, int half) const {
    return r.kv_score + int64_t{position - r.first_position} * p.row_size + half * D + column;
  }
  __device__ __forceinline__ Stored as_stored(const RowVector<KvScore>& row,
                                              const Vector<float, kRaggedVector>& bias) const {
    Stored stored;
#pragma unroll
    for (int v = 0; v < kRaggedVector; ++v) {
      stored.kv.x[v] = round_to<State>(jax_dsv4::to_f32(row.kv.x[v]));
      stored.score.x[v] = round_to<State>(jax_dsv4::to_f32(row.score.x[v]) + bias.x[v]);
    }
    return stored;
  }
  // Of row `row` of a window.
  __device__ __forceinline__ Vector<float, kRaggedVector> bias_at(int row, int half) const {
    Vector<float, kRaggedVector> bias;
#pragma unroll
    for (int v = 0; v < kRaggedVector; ++v) bias.x[v] = -0.0f;
    if (r.ape != nullptr) bias = load<float, kRaggedVector>(r.ape + row * S + half * D + column);
    return bias;
  }
  // Adds kCount rows as they are stored; those of the bits in `stored` are. `biases`: of each row;
  // `place`: of the first one.
  template <int kCount, bool kAreFirst = false>
  __device__ __forceinline__ void add_whole(const RowVector<KvScore>* loaded,
                                            const Vector<float, kRaggedVector> (&biases)[kCount],
                                            int half, uint32_t stored, const Place& place,
                                            Partial<kRaggedVector>& partial) const {
    Vector<float, kRaggedVector> kv[kCount], score[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const auto& bias = biases[i];
      kv[i] = jax_dsv4::to_f32(loaded[i].kv);
      score[i] = jax_dsv4::to_f32(loaded[i].score);
#pragma unroll
      for (int v = 0; v < kRaggedVector; ++v) {
        kv[i].x[v] = jax_dsv4::to_f32(round_to<State>(kv[i].x[v]));
        score[i].x[v] = jax_dsv4::to_f32(round_to<State>(score[i].x[v] + bias.x[v]));
      }
    }
    if (kFormat == StateFormat::kRaw && stored != 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        Stored row;
#pragma unroll
        for (int v = 0; v < kRaggedVector; ++v) {
          row.kv.x[v] = round_to<State>(kv[i].x[v]);
          row.score.x[v] = round_to<State>(score[i].x[v]);
        }
        if (stored >> i & 1) store_row(place + i, half, row);
      }
    }
    if constexpr (kAreFirst) {
      partial = Partial<kRaggedVector>::of(kv, score);
    } else {
      partial.add(kv, score);
    }
  }
  __device__ __forceinline__ RowVector<KvScore> load_new_if(bool condition,
                                                            const KvScore* kv) const {
    return {load_once_if(condition, kv, Vector<KvScore, kRaggedVector>{}),
            load_once_if(condition, kv + p.score_offset, Vector<KvScore, kRaggedVector>{})};
  }
  __device__ __forceinline__ static RowVector<KvScore> load_new(const KvScore* kv,
                                                                int64_t score_offset) {
    return {load_once<KvScore, kRaggedVector>(kv),
            load_once<KvScore, kRaggedVector>(kv + score_offset)};
  }
  // Whether the rows of kv_score are side by side.
  __device__ __forceinline__ bool is_dense() const {
    return p.row_size == 2 * S && p.score_offset == S;
  }

  // Rows of the state.
  __device__ __forceinline__ Place find(int32_t position) const {
    return {r.row_at(p.paging, look_up(p.paging, r.kv_table, position)),
            r.row_at(p.paging, look_up(p.paging, r.score_table, position))};
  }
  __device__ __forceinline__ State* kv_at(uint32_t row, int half) const {
    return static_cast<State*>(p.kv) + uint64_t{row} * S + half * D + column;
  }
  __device__ __forceinline__ State* score_at(uint32_t row, int half) const {
    return static_cast<State*>(p.score) + uint64_t{row} * S + half * D + column;
  }
  __device__ __forceinline__ static Stored no_row() {
    Stored none;
#pragma unroll
    for (int v = 0; v < kRaggedVector; ++v) {
      none.kv.x[v] = round_to<State>(0);
      none.score.x[v] = round_to<State>(kNegInf);
    }
    return none;
  }
  // A row either of whose parts is nowhere is none.
  __device__ __forceinline__ Stored load_row(const Place& place, int half) const {
    const bool exists = place.exists();
    const Stored none = no_row();
    return {load_once_if(exists, kv_at(place.kv, half), none.kv),
            load_once_if(exists, score_at(place.score, half), none.score)};
  }
  __device__ __forceinline__ void store_row(const Place& place, int half, const Stored& row) const {
    if (place.kv != kNowhere) store(kv_at(place.kv, half), row.kv);
    if (place.score != kNowhere) store(score_at(place.score, half), row.score);
  }
};

// kRows neighbours of one request, the first at `base`, which is a multiple of kRows: those of one
// window that a thread has. The first `first_new` of them are from before the call; those from
// `end` on are not there yet.
template <class Rows, int kRows>
struct Neighbours {
  using Stored = typename Rows::Stored;
  static constexpr int kBatch = kRows < 4 ? kRows : 4;  // rows that are added at once

  const Rows& rows;
  const int32_t base;
  const int first_new, end;
  const bool one_page;
  Place first;  // of the first one, where all are on one page

  __device__ __forceinline__ Neighbours(const Rows& rows, int32_t base)
      : rows(rows),
        base(base),
        first_new(min(max(rows.start - base, 0), kRows)),
        end(min(max(rows.length - base, 0), kRows)),
        one_page(rows.p.paging.page_size.value % kRows == 0) {}

  // Before anything else that asks for their places.
  __device__ __forceinline__ void find_places() {
    if (one_page && end > 0) first = rows.find(base);
  }
  __device__ __forceinline__ Place place_of(int j) const {
    return one_page ? first + j : rows.find(base + j);
  }
  __device__ __forceinline__ bool has_new() const { return first_new < end; }

  // Of the new rows, one bit each: those that are stored, and those that count in values.
  __device__ __forceinline__ uint32_t all_new() const {
    return has_new() ? (1u << end) - (1u << first_new) : 0;
  }
  __device__ __forceinline__ uint32_t stored() const {
    constexpr int R = Rows::R;
    constexpr bool kOverlap = Rows::kOverlap;
    const StoreRule& rule = rows.p.rule;
    if (rule.all) return all_new();
    uint32_t bits = 0;
    if (__builtin_expect(rule.resumes, 0)) {
#pragma unroll 1
      for (int j = first_new; j < end; ++j) bits |= uint32_t{rows.stores(base + j)} << j;
      return bits;
    }
    // The same as is_stored of each.
    const int32_t shortest = max(rows.length - rule.max_rewind, 0);
    const uint32_t last = (base + kRows) % R == 0 ? 1u << (kRows - 1) : 0;  // of its window
    if (Rows::kFormat == StateFormat::kRaw) {
      if (base / R >= shortest / R - kOverlap) bits = kOverlap ? ~0u : ~last;
    } else {
      bits = ~0u << min(max(shortest - 1 - base, 0), kRows) & ~last;
      if (kOverlap && base + (kRows - 1 + R) >= shortest) bits |= last;
    }
    return bits & all_new();
  }
  __device__ __forceinline__ uint32_t counted() const {
    if (!rows.p.rule.all) return all_new();
    if (one_page) return first.exists() ? all_new() : 0;
    uint32_t bits = 0;
#pragma unroll 1
    for (int j = first_new; j < end; ++j) bits |= uint32_t{rows.find(base + j).exists()} << j;
    return bits;
  }

  // Of a window all of whose rows are new: whether there is no more to them than to add them, and
  // on a raw state to store some side by side.
  __device__ __forceinline__ bool is_simple(bool may_store) const {
    if (!may_store) return true;
    return Rows::kFormat == StateFormat::kRaw && one_page && (!rows.p.rule.all || first.exists());
  }

  template <int kCount>
  static __device__ __forceinline__ void add(const Stored* row, Partial<kRaggedVector>& partial) {
    Vector<typename Rows::State, kRaggedVector> kv[kCount], score[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) kv[i] = row[i].kv, score[i] = row[i].score;
    partial.add(kv, score);
  }

  // Adds the rows from before the call. On a state of prefixes the last one of them stands for all
  // of its window; returns it.
  __device__ __forceinline__ Stored add_old(int half, Partial<kRaggedVector>& partial) const {
    if constexpr (Rows::kFormat == StateFormat::kPrefix) {
      const Stored row = rows.load_row(place_of(first_new - 1), half);
      add<1>(&row, partial);
      return row;
    }
    if (__builtin_expect(one_page, 1)) {
      constexpr int kAtOnce = kRows < 8 ? kRows : 8;
#pragma unroll 1
      for (int from = 0; from < first_new; from += kAtOnce) {
        Stored row[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          row[i] = rows.load_row(from + i < first_new ? first + (from + i) : Place{}, half);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; i += kBatch) add<kBatch>(row + i, partial);
      }
    } else {
#pragma unroll 1
      for (int j = 0; j < first_new; ++j) {
        const Stored row = rows.load_row(rows.find(base + j), half);
        add<1>(&row, partial);
      }
    }
    return Rows::no_row();
  }
  // Adds the new rows that count, and on a raw state stores some; fetch(j): new row j. kAtOnce of
  // them are on their way at once.
  template <int kAtOnce, class Fetch>
  __device__ __forceinline__ void add_new(Fetch&& fetch, int half, uint32_t counted,
                                          uint32_t stored, Partial<kRaggedVector>& partial) const {
    const uint32_t needed = counted | stored;
#pragma unroll 1
    for (int from = 0; from < kRows; from += kAtOnce) {
      if ((needed >> from & ((1u << kAtOnce) - 1)) == 0) continue;
      RowVector<typename Rows::KvScore> fetched[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        fetched[i] = fetch(from + i, (needed >> (from + i) & 1) != 0);
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; k += kBatch) {
        Stored row[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          row[i] = rows.as_stored(fetched[k + i], bias_at(from + k + i, half));
        }
        const uint32_t stored_here = stored >> (from + k), counted_here = counted >> (from + k);
        if (Rows::kFormat == StateFormat::kRaw && (stored_here & kOfBatch) != 0) {
          if (__builtin_expect(one_page, 1)) {
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
              if (stored_here >> i & 1) rows.store_row(first + (from + k + i), half, row[i]);
            }
          } else {
            store_one_by_one(fetch, half, stored & kOfBatch << (from + k));
          }
        }
        if ((counted_here & kOfBatch) != kOfBatch) {
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            if (!(counted_here >> i & 1)) row[i] = Rows::no_row();
          }
        }
        add<kBatch>(row, partial);
      }
    }
  }
  // On a state of prefixes: merges the rows that count into the prefix before them, and stores it
  // as the rows that are stored.
  template <class Fetch>
  __device__ __forceinline__ void store_prefixes(Fetch&& fetch, int half, uint32_t counted,
                                                 uint32_t stored,
                                                 Prefix (&open)[kRaggedVector]) const {
    if (stored == 0) return;
    auto next = fetch(first_new, true);
    auto next_bias = bias_at(first_new, half);
#pragma unroll 1
    for (int j = first_new; stored >> j != 0; ++j) {
      Stored row = rows.as_stored(next, next_bias);
      next = fetch(min(j + 1, end - 1), j + 1 < end);
      next_bias = bias_at(min(j + 1, end - 1), half);
#pragma unroll
      for (int v = 0; v < kRaggedVector; ++v) {
        if (counted >> j & 1) {
          open[v] = merge(open[v], {to_f32(row.score.x[v]), to_f32(row.kv.x[v])});
        }
        row.score.x[v] = round_to<typename Rows::State>(open[v].lse);
        row.kv.x[v] = round_to<typename Rows::State>(open[v].mean);
      }
      if (stored >> j & 1) rows.store_row(place_of(j), half, row);
    }
  }

 private:
  static constexpr uint32_t kOfBatch = (1u << kBatch) - 1;

  __device__ __forceinline__ auto bias_at(int j, int half) const {
    return rows.bias_at((base + j) % Rows::R, half);
  }

  template <class Fetch>
  __device__ __forceinline__ void store_one_by_one(Fetch&& fetch, int half, uint32_t stored) const {
#pragma unroll 1
    for (int j = 0; j < kRows; ++j) {
      if ((stored >> j & 1) == 0) continue;
      rows.store_row(rows.find(base + j), half, rows.as_stored(fetch(j, true), bias_at(j, half)));
    }
  }
};

__device__ __forceinline__ Prefix prefix_of(const Partial<kRaggedVector>& partial, int v) {
  const float sum = partial.sum.x[v];
  if (sum == 0) return {};
  return {partial.max.x[v] + logf(sum), fast_quotient(partial.weighted.x[v], sum)};
}
__device__ __forceinline__ Vector<float, kRaggedVector> value_of(
    const Partial<kRaggedVector>& partial) {
  Vector<float, kRaggedVector> value;
#pragma unroll
  for (int v = 0; v < kRaggedVector; ++v) {
    const float sum = partial.sum.x[v];
    value.x[v] = sum == 0 ? 0.0f : fast_quotient(partial.weighted.x[v], sum);
  }
  return value;
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

// What becomes of values.
template <bool kRecords>
using ResultOf = std::conditional_t<kRecords, RecordParams, ValueTarget>;

// ------------------------------------------------------------------------------ long windows

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

// One thread's part of one window.
template <class Config, StateFormat kFormat>
struct LongWindow {
  using T = LongTile<Config>;
  using Rows = RaggedRows<Config, kFormat>;
  static constexpr int R = Config::kRatio, kVector = kRaggedVector;

  struct SharedPlan {
    // Of a thread's rows of a window. A thread reads only what it has copied itself.
    Vector<float, kVector> biases[T::kRows][T::kThreads];
    union {
      alignas(16) float partials[T::kRowGroups][T::kPartialStride];
      // Of the rows of each row group, then of those before it: logsumexps and means.
      alignas(16) float prefixes[T::kRowGroups][2][T::kColumns];
    };

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
  const int lane_column = threadIdx.x % T::kLanes * kVector;
  Partial<kVector> partial;

  __device__ __forceinline__ LongWindow(SharedPlan& smem, const Rows& rows)
      : smem(smem), rows(rows) {}

  using Own = Neighbours<Rows, T::kRows>;
  // Adds all rows of the window, and stores the new ones that are to be stored. The whole CTA calls
  // it.
  __device__ __forceinline__ void add_rows(int32_t window) {
    const bool may_store = rows.may_store(window), has_old = window * R < rows.start;
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
      if (own.is_simple(may_store)) {
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
    if (has_old) {
      if (kFormat == StateFormat::kRaw) {
        own.add_old(0, partial);
      } else if (row_group == 0) {  // one row stands for all of them
        const auto row = rows.load_row(rows.find(rows.start - 1), 0);
        Own::template add<1>(&row, partial);
      }
    }
    [[maybe_unused]] Prefix open[kVector];  // before the thread's rows
    if (kFormat == StateFormat::kPrefix && may_store) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) open[v] = prefix_of(partial, v);
    }
    own.template add_new<8>(fetch, 0, counted, stored, partial);
    if constexpr (kFormat == StateFormat::kPrefix) {
      if (may_store) store_prefixes(own, fetch, counted, stored, open);
    }
    wait_for_copies<0>();  // of the biases, before they are copied again
  }

  // Merges row after row what the row groups hold, and stores the rows that are to be stored.
  template <class Fetch>
  __device__ __forceinline__ void store_prefixes(const Own& own, Fetch&& fetch, uint32_t counted,
                                                 uint32_t stored, Prefix (&open)[kVector]) const {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const Prefix all = prefix_of(partial, v);
      smem.prefixes[row_group][0][lane_column + v] = all.lse;
      smem.prefixes[row_group][1][lane_column + v] = all.mean;
    }
    __syncthreads();  // all row groups' prefixes, before they are merged
    if (threadIdx.x < T::kColumns) {
      Prefix before;
#pragma unroll 1
      for (int g = 0; g < T::kRowGroups; ++g) {
        float &lse = smem.prefixes[g][0][threadIdx.x], &mean = smem.prefixes[g][1][threadIdx.x];
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
        open[v] = {smem.prefixes[row_group][0][lane_column + v],
                   smem.prefixes[row_group][1][lane_column + v]};
      }
    }
    own.store_prefixes(fetch, 0, counted, stored, open);
    __syncthreads();  // all reads, before the partial results take the same memory
  }
};

// Grid: x = slots x slices, z = groups. The CTAs of a request's last slot also store the rows of
// the window that it leaves open. A record is made by the first CTA of the slot's cluster, to which
// the others send their values; or, if `slices_per_cta` is all of them, by one CTA after it went
// through them.
template <class Config, StateFormat kFormat, bool kRecords>
struct RaggedLong {
  using Window = LongWindow<Config, kFormat>;
  using T = typename Window::T;
  using Rows = typename Window::Rows;
  static constexpr int R = Config::kRatio, D = Config::kHeadDim;
  static constexpr int kThreads = T::kThreads, kMinCtas = T::kMinCtas;
  using Plan = RecordPlan<D>;
  static_assert(!kRecords || (T::kSlices <= 8 && Plan::kThreads <= kThreads),
                "a cluster has at most 8 CTAs on every chip, and a record D / 4 threads");

  struct Params : RaggedParams {
    ResultOf<kRecords> result;
    int32_t slices_per_cta;  // 1, or kSlices: then there are no clusters

    Params(const RaggedParams& p, const ResultOf<kRecords>& result, int32_t slices_per_cta)
        : RaggedParams(p), result(result), slices_per_cta(slices_per_cta) {}
    int64_t num_ctas() const { return int64_t{num_windows} * (T::kSlices / slices_per_cta); }
    int cluster() const { return kRecords && slices_per_cta == 1 ? T::kSlices : 1; }
  };
  struct ValuePlan {
    typename Window::SharedPlan window;
  };
  struct RecordsPlan : ValuePlan {
    Plan record;
  };
  using SharedPlan = std::conditional_t<kRecords, RecordsPlan, ValuePlan>;

  static __device__ __forceinline__ void run(const Params& p, SharedPlan& smem, uint32_t block) {
    const uint32_t group = blockIdx.z;
    const bool is_alone = kRecords && p.slices_per_cta != 1;
    const int32_t slot = is_alone ? block : block / T::kSlices;
    const Owner owner = find_owner<Config>(p, group, slot);
    const int32_t own_slot = first_slot<Config>(owner.index, owner.begin);
    const bool is_last = slot + 1 == first_slot<Config>(owner.index + 1, owner.end);
#pragma unroll 1
    for (int slice = is_alone ? 0 : block % T::kSlices;;) {
      const int slice_column = slice * T::kColumns;
      const int column = slice_column + threadIdx.x % T::kLanes * kRaggedVector;
      const Rows rows(p, group, owner, column);
      const int32_t end = rows.r.end_window;
      const bool has_end = is_last && end * R < rows.length && rows.may_store(end);
      const int64_t out = (int64_t{group} * p.num_windows + slot) * D + slice_column;
      int32_t window = rows.r.first_window + slot - own_slot;
      if (window >= end) {
        window = end;
        if constexpr (!kRecords) {
          if (threadIdx.x < T::kLanes) {
            p.result.store_four(out + threadIdx.x * kRaggedVector, {});
          }
        }
      }
#pragma unroll 1
      for (; window < end || has_end; window = end) {
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

 private:
  static constexpr int kRecordThreads = Plan::kThreads;
  static __device__ __forceinline__ RecordMaker<D> maker_of(const Params& p, SharedPlan& smem) {
    return RecordMaker<D>(p.result, smem.record, threadIdx.x);
  }
};

// ----------------------------------------------------------------------------- short windows

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

  // For each window: has = start(whether it is completed here, window), early, and if it is,
  // emit(has, window, value).
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
      const auto has = start(has_own, window);
      Partial<kVector> partial = before;  // of the value
      if (__builtin_expect(window < plain, 1)) {
        add_plain<0>(number, window, has_own, partial);
        if constexpr (Config::kOverlap) {
          add_plain<1>(number, window, window + 1 < end, before);
        }
      } else {
        add_other(number, window, has_own, partial, before);
      }
      if (has_own) emit(has, window, value_of(partial));
    }
    wait_for_copies<0>();  // before the units take other windows
  }

 private:
  // Whether its first half is needed: for the next one, or to be stored.
  __device__ __forceinline__ bool needs_first_half(int32_t window) const {
    return window + 1 < end || (window >= first && rows.may_store(window));
  }
  // From `window` on to this one, all rows of a window are new, and none is stored.
  __device__ __forceinline__ int32_t plain_end(int32_t window) const {
    const StoreRule& rule = rows.p.rule;
    if (rule.all || window * R < rows.start) return window;
    int64_t next = max(rows.length - rule.max_rewind, 0);  // as in may_store
    if (rule.resumes) {
      const Divisor& every = rule.resume_every;
      next = min(next, (int64_t{window * R / every} + 1) * every.value);
    }
    return min(static_cast<int32_t>((next - 1) / R) - Config::kOverlap, end);
  }

  // Starts copies of one half of a window's new rows, if there is such a window and they are
  // needed.
  __device__ __forceinline__ void copy(int32_t window, int half, int number) const {
    // Past the last window this may wrap; nothing is copied then.
    const auto base = static_cast<int32_t>(static_cast<uint32_t>(window) * R);
    const bool is_needed =
        window < end_needed() && (half == kOwn ? window >= first : needs_first_half(window));
    smem.units[number].copy(max(rows.start - base, 0), is_needed ? rows.length - base : 0,
                            rows.new_kv(base, half), rows.p.row_size, rows.p.score_offset);
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

  // Of a window that is not plain: adds its rows to its own value, and stores those that are to be
  // stored; `before`: what it adds to the next one's value.
  __device__ __forceinline__ void add_other(int& number, int32_t window, bool has_own,
                                            Partial<kVector>& partial,
                                            Partial<kVector>& before) const {
    const bool has_next = Config::kOverlap && window + 1 < end;
    const bool may_store = window >= first && rows.may_store(window);
    Own own(rows, window * R);
    if (may_store || own.first_new > 0 || rows.p.rule.all) own.find_places();
    const uint32_t stored = may_store ? own.stored() : 0;
    const bool is_simple = rows.is_whole(window) && own.is_simple(may_store || rows.p.rule.all);
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
        if (is_for_value || is_for_next || stored != 0) {
          add_whole(row, half, stored, own.first, sum);
        }
      } else {
        if (is_for_value || is_for_next || stored != 0) {
          add_some(own, [&](int j, bool) { return unit[j]; }, half, counted, stored, sum);
        }
        copy_next();
      }
      if (is_for_value) partial = sum;
      if (is_for_next) before = sum;
      if (++number == kUnits) number = 0;
    }
  }
  // Of a window some of whose rows are old, or not there, or stored one by one.
  template <class Fetch>
  __device__ __forceinline__ void add_some(const Own& own, Fetch&& fetch, int half,
                                           uint32_t counted, uint32_t stored,
                                           Partial<kVector>& partial) const {
    [[maybe_unused]] Prefix open[kVector];
    if (own.first_new > 0) {
      [[maybe_unused]] const auto row = own.add_old(half, partial);
      if constexpr (kFormat == StateFormat::kPrefix) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          open[v] = {to_f32(row.score.x[v]), to_f32(row.kv.x[v])};
        }
      }
    }
    own.template add_new<R>(fetch, half, counted, stored, partial);
    if constexpr (kFormat == StateFormat::kPrefix) {
      own.store_prefixes(fetch, half, counted, stored, open);
    }
  }
};

// Grid: x = walkers, kWalkers at once; z = groups. The walker of a request's last slot also stores
// the rows of the window that it leaves open.
template <class Config, StateFormat kFormat, bool kRecords>
struct RaggedShort {
  using T = ShortTile<Config>;
  // What has room beside the biases, and records' exchange.
  using Biases = decltype(ShortPlan<Config, 1>::biases);
  static constexpr int kUnits = std::clamp<int>(
      ((kRecords ? 47 : 48) * 1024 - sizeof(Biases)) / sizeof(typename T::Unit), 1, 4);
  using Plan = ShortPlan<Config, kUnits>;
  using Windows = ShortWindows<Config, kFormat, Plan>;
  using Rows = typename Windows::Rows;
  static constexpr int R = Config::kRatio, D = Config::kHeadDim;
  static constexpr int kThreads = T::kThreads, kMinCtas = kRecords ? 3 : 4;
  using Exchange = RecordExchange<D>;

  struct Params : RaggedParams {
    ResultOf<kRecords> result;
    int32_t slots_per_walker;

    Params(const RaggedParams& p, const ResultOf<kRecords>& result, int32_t slots_per_walker)
        : RaggedParams(p), result(result), slots_per_walker(slots_per_walker) {}
    int64_t num_ctas() const {
      const int64_t slots = int64_t{slots_per_walker} * T::kWalkers;  // of a CTA
      return (num_windows + slots - 1) / slots;
    }
    int cluster() const { return 1; }
  };
  struct RecordsPlan : Plan {
    Exchange records[T::kWalkers];
  };
  using SharedPlan = std::conditional_t<kRecords, RecordsPlan, Plan>;

  static __device__ __forceinline__ void run(const Params& p, SharedPlan& smem, uint32_t block) {
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
      const Rows rows(p, group, owner, column);
      const int32_t own_slot = first_slot<Config>(owner.index, owner.begin);
      const int32_t next_slot =
          owner.index < 0 ? slot + 1 : first_slot<Config>(owner.index + 1, owner.end);
      const int32_t next = min(next_slot, end_slot);
      const int32_t end_window = rows.r.end_window;
      const int32_t first = min(rows.r.first_window + slot - own_slot, end_window);
      const int32_t end = min(first + next - slot, end_window);
      const bool has_end =
          next == next_slot && end_window * R < rows.length && rows.may_store(end_window);
      const Windows windows{smem, rows, first, end, has_end};
      if constexpr (kRecords) {
        RecordMaker<D, Exchange> maker(p.result, smem.records[in_cta], lane);
        windows.run(
            [&](bool wanted, int32_t window) {
              return maker.load_all(wanted, group, owner.index, window,
                                    static_cast<uint32_t>(window) * R);
            },
            [&](const auto& loaded, int32_t window, const Vector<float, kRaggedVector>& value) {
#pragma unroll
              for (int v = 0; v < kRaggedVector; ++v) maker.stage.x[0][v] = value.x[v];
              maker.finish(maker.take(loaded, group, window));
            });
      } else {
        const int64_t out = (int64_t{group} * p.num_windows + slot) * D + column;
        windows.run([](bool, int32_t) { return 0; },
                    [&](int, int32_t window, const Vector<float, kRaggedVector>& value) {
                      p.result.store_four(out + int64_t{window - first} * D, value);
                    });
#pragma unroll 1
        for (int32_t empty = slot + end - first; empty < next; ++empty) {
          p.result.store_four((int64_t{group} * p.num_windows + empty) * D + column, {});
        }
      }
      from = next;
    }
  }
};

// -------------------------------------------------------------------------------- the kernels

template <class Body>
__global__ void __launch_bounds__(Body::kThreads, Body::kMinCtas)
    ragged_kernel(const __grid_constant__ typename Body::Params p) {
  __shared__ typename Body::SharedPlan smem;
  Body::run(p, smem, blockIdx.x);
}

// Two compressors of the same requests. The first CTAs are the first one's.
template <class First, class Second>
__global__ void __launch_bounds__(std::max(First::kThreads, Second::kThreads),
                                  std::min(First::kMinCtas, Second::kMinCtas))
    ragged_two_kernel(const __grid_constant__ typename First::Params first,
                      const __grid_constant__ typename Second::Params second, uint32_t first_ctas) {
  __shared__ union {
    typename First::SharedPlan first;
    typename Second::SharedPlan second;
  } smem;
  static_assert(First::kThreads == Second::kThreads, "two that run together: as many threads");
  if (blockIdx.x < first_ctas) {
    First::run(first, smem.first, blockIdx.x);
  } else {
    Second::run(second, smem.second, blockIdx.x - first_ctas);
  }
}

}  // namespace jax_dsv4
