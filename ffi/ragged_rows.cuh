// One thread's view of a ragged batch (ragged.h) on an NVIDIA GPU: whose a slot is, where rows come
// from and go, and what becomes of values. Device code only.
#pragma once

#include <cstdint>
#include <type_traits>

#include "config.h"
#include "decode_raw.cuh"
#include "numeric.h"
#include "paging.h"
#include "prefix.h"
#include "ragged.h"
#include "record_maker.cuh"
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

// Request `index`, which is below `batch`; nobody, where there is none. Called by whole warps,
// which call meanwhile() while lengths are on their way.
template <class Meanwhile>
__device__ __forceinline__ Owner find_request(const RaggedParams& p, uint32_t group, uint32_t index,
                                              Meanwhile&& meanwhile) {
  constexpr int kAtOnce = 4;  // entries of a lane
  const int32_t* const entries = p.cu_q_lens + group * p.cu_q_lens_stride;
  uint32_t first = threadIdx.x % 32;
  int entry[kAtOnce];
  const auto load_entries = [&] {
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      entry[k] = load_if(first + 32 * k <= index + 1, entries + first + 32 * k, 0);
    }
  };
  load_entries();
  const int32_t length = load_if(true, p.kv_lens + group * p.kv_lens_stride + index, 0);
  const int32_t num_seqs =
      load_if(p.num_seqs != nullptr, p.num_seqs + group * p.num_seqs_stride, 0);
  meanwhile();
  int begin = 0, end = 0;  // running maxima
#pragma unroll 1
  while (true) {
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int clamped = p.clamped(entry[k]);
      if (first + 32 * k <= index) begin = max(begin, clamped);
      end = max(end, clamped);
    }
    first += 32 * kAtOnce;
    if (first - threadIdx.x % 32 > index + 1) break;
    load_entries();
  }
  begin = __reduce_max_sync(~0u, begin);
  end = __reduce_max_sync(~0u, end);
  if (static_cast<int32_t>(index) >= p.clamped_num_seqs(num_seqs)) return {};
  return {static_cast<int32_t>(index), begin, end, length};
}

inline constexpr int kRaggedVector = 4;  // channels of a thread, as a rule

// Some channels of a row, as projected or as stored.
template <class Element, int kVector = kRaggedVector>
struct RowVector {
  Vector<Element, kVector> kv, score;
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
template <class KvScore, int kRows, int kThreads, int kVector = kRaggedVector>
struct StagedRows {
  Vector<KvScore, kVector> parts[kRows][2][kThreads];

  // Starts copies of rows begin <= row < end; `kv`: of row 0.
  __device__ __forceinline__ void copy(int begin, int end, const KvScore* kv, int64_t row_size,
                                       int64_t score_offset) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const bool exists = row >= begin && row < end;
      const KvScore* const from = kv + row * row_size;
      copy_if<kVector>(exists, parts[row][0][threadIdx.x].x, from);
      copy_if<kVector>(exists, parts[row][1][threadIdx.x].x, from + score_offset);
    }
  }
  __device__ __forceinline__ RowVector<KvScore, kVector> operator[](int row) const {
    return {load<KvScore, kVector>(parts[row][0][threadIdx.x].x),
            load<KvScore, kVector>(parts[row][1][threadIdx.x].x)};
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

template <int kSize>
__device__ __forceinline__ Prefix prefix_of(const Partial<kSize>& partial, int v) {
  // The logarithm is one of 1 <= mantissa < 2. Without a branch: what is chosen between is
  // computed.
  const float sum = partial.sum.x[v];
  const uint32_t bits = bits_of(sum);
  const float mantissa = float_of((bits & 0x7fffff) | 0x3f800000);
  const float exponent = static_cast<float>(static_cast<int32_t>(bits >> 23) - 127);
  const float nan_or_zero = 0.0f * sum;
  const float lse =
      add_log1p(mantissa - 1.0f, multiply_add(exponent, 0.69314718f, partial.max.x[v]));
  const float mean = fast_quotient(partial.weighted.x[v], sum);
  return {lse + nan_or_zero, sum == 0 ? 0.0f : mean};
}
template <int kSize>
__device__ __forceinline__ Vector<float, kSize> value_of(const Partial<kSize>& partial) {
  Vector<float, kSize> value;
#pragma unroll
  for (int v = 0; v < kSize; ++v) {
    const float sum = partial.sum.x[v];
    value.x[v] = sum == 0 ? 0.0f : fast_quotient(partial.weighted.x[v], sum);
  }
  return value;
}

// One thread's view of a request's rows, in some of its channels.
template <class Config, StateFormat kFormat_, int kVector_ = kRaggedVector>
struct RaggedRows {
  using KvScore = typename Config::KvScore;
  using State = typename Config::State;
  static constexpr StateFormat kFormat = kFormat_;
  static constexpr int kVector = kVector_;
  using Projected = RowVector<KvScore, kVector>;
  using Stored = RowVector<State, kVector>;
  using Bias = Vector<float, kVector>;
  static constexpr int R = Config::kRatio, S = Config::kStateDim, D = Config::kHeadDim;
  static constexpr bool kOverlap = Config::kOverlap;

  const RaggedParams& p;
  const Request<Config> r;
  const int32_t length, start;  // new rows are at start <= position < length
  const int column;             // of D

  // `layer`: p.layer_of(group).
  __device__ __forceinline__ RaggedRows(const RaggedParams& p, uint32_t group, uint32_t layer,
                                        const Owner& owner, int column)
      : p(p),
        r(ragged_request_at<Config>(p, group, owner.index, owner.length, owner.begin, owner.end,
                                    layer)),
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
  // The rows of a request's last windows, the one that is left open among them, are stored by CTAs
  // that know the request (RaggedFew), where windows are short and not all rows are stored: from
  // this window on.
  static constexpr int kLastWindows = R <= 4 ? 4 : 0;
  __device__ __forceinline__ int32_t first_last() const {
    const auto end = static_cast<int32_t>(r.end_window) + (length % R != 0);
    if (kLastWindows == 0 || p.rule.all) return end;
    return max(end - kLastWindows, static_cast<int32_t>(r.first_window));
  }
  // Whether all rows of a window are new.
  __device__ __forceinline__ bool is_whole(int32_t window) const {
    return window * R >= start && window * R + (R - 1) < length;
  }
  __device__ __forceinline__ bool stores(int32_t position) const {
    return is_stored<Config, kFormat>(p.rule, position, length);
  }

  // A new row.
  __device__ __forceinline__ const KvScore* new_kv(int32_t position, int half) const {
    return r.kv_score + int64_t{position - r.first_position} * p.row_size + half * D + column;
  }
  __device__ __forceinline__ Stored as_stored(const Projected& row, const Bias& bias) const {
    Stored stored;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      stored.kv.x[v] = round_to<State>(jax_dsv4::to_f32(row.kv.x[v]));
      stored.score.x[v] = round_to<State>(jax_dsv4::to_f32(row.score.x[v]) + bias.x[v]);
    }
    return stored;
  }
  __device__ __forceinline__ static Bias no_bias() {
    Bias bias;
#pragma unroll
    for (int v = 0; v < kVector; ++v) bias.x[v] = -0.0f;
    return bias;
  }
  // Of row `row` of a window.
  __device__ __forceinline__ Bias bias_at(int row, int half) const {
    Bias bias = no_bias();
    if (r.ape != nullptr) bias = load<float, kVector>(r.ape + row * S + half * D + column);
    return bias;
  }
  // Adds kCount rows as they are stored; those of the bits in `stored` are. `biases`: of each row;
  // `place`: of the first one.
  template <int kCount, bool kAreFirst = false>
  __device__ __forceinline__ void add_whole(const Projected* loaded, const Bias (&biases)[kCount],
                                            int half, uint32_t stored, const Place& place,
                                            Partial<kVector>& partial) const {
    Vector<float, kVector> kv[kCount], score[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const auto& bias = biases[i];
      kv[i] = jax_dsv4::to_f32(loaded[i].kv);
      score[i] = jax_dsv4::to_f32(loaded[i].score);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        kv[i].x[v] = jax_dsv4::to_f32(round_to<State>(kv[i].x[v]));
        score[i].x[v] = jax_dsv4::to_f32(round_to<State>(score[i].x[v] + bias.x[v]));
      }
    }
    if (kFormat == StateFormat::kRaw && stored != 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        Stored row;
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          row.kv.x[v] = round_to<State>(kv[i].x[v]);
          row.score.x[v] = round_to<State>(score[i].x[v]);
        }
        if (stored >> i & 1) store_row(place + i, half, row);
      }
    }
    if constexpr (kAreFirst) {
      partial = Partial<kVector>::of(kv, score);
    } else {
      partial.add(kv, score);
    }
  }
  __device__ __forceinline__ Projected load_new_if(bool condition, const KvScore* kv) const {
    return {load_once_if(condition, kv, Vector<KvScore, kVector>{}),
            load_once_if(condition, kv + p.score_offset, Vector<KvScore, kVector>{})};
  }
  __device__ __forceinline__ static Projected load_new(const KvScore* kv, int64_t score_offset) {
    return {load_once<KvScore, kVector>(kv), load_once<KvScore, kVector>(kv + score_offset)};
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
  __device__ __forceinline__ Place find_if(bool wanted, int32_t position) const {
    const TableEntry kv = look_up_if(wanted, p.paging, r.kv_table, position);
    const TableEntry score = look_up_if(wanted, p.paging, r.score_table, position);
    return {r.row_at(p.paging, kv), r.row_at(p.paging, score)};
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
    for (int v = 0; v < kVector; ++v) {
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
        one_page(fits_pages(rows.p.paging)) {}

  // Whether neighbours are always on one page.
  static __device__ __forceinline__ bool fits_pages(const Paging& paging) {
    return paging.page_size.value % kRows == 0;
  }
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
  // to store some side by side; on a state of prefixes, if all rows of the call are stored.
  __device__ __forceinline__ bool is_simple(bool may_store, bool stores_all) const {
    if (!may_store) return true;
    if (Rows::kFormat == StateFormat::kPrefix && !stores_all) return false;
    return one_page && (!stores_all || first.exists());
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
  // them are on their way at once. before(j): the rows before j have been added, for every
  // kBatch-th.
  template <int kAtOnce, class Fetch, class Before>
  __device__ __forceinline__ void add_new(Fetch&& fetch, int half, uint32_t counted,
                                          uint32_t stored, Partial<kRaggedVector>& partial,
                                          Before&& before) const {
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
        before(from + k);
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
  // On a state of prefixes: merges the rows that count, from `first_open` up to the last one of the
  // bits in `merged`, into the prefix before them, and stores it as the rows that are stored.
  template <class Fetch>
  __device__ __forceinline__ void store_prefixes(Fetch&& fetch, int half, uint32_t counted,
                                                 uint32_t stored, uint32_t merged, int first_open,
                                                 Prefix (&open)[kRaggedVector]) const {
    if (merged == 0) return;
    auto next = fetch(first_open, true);
    auto next_bias = bias_at(first_open, half);
#pragma unroll 1
    for (int j = first_open; merged >> j != 0; ++j) {
      const Stored row = rows.as_stored(next, next_bias);
      next = fetch(min(j + 1, end - 1), j + 1 < end);
      next_bias = bias_at(min(j + 1, end - 1), half);
      if (counted >> j & 1) merge_into(open, row);
      if (stored >> j & 1) rows.store_row(place_of(j), half, as_row(open));
    }
  }
  // Merges a row into the prefix of those before it, if there are any.
  static __device__ __forceinline__ void merge_into(Prefix (&open)[kRaggedVector],
                                                    const Stored& row, bool is_first = false) {
#pragma unroll
    for (int v = 0; v < kRaggedVector; ++v) {
      const Prefix own = {to_f32(row.score.x[v]), to_f32(row.kv.x[v])};
      open[v] = is_first ? merge_first(own) : merge(open[v], own);
    }
  }
  static __device__ __forceinline__ Stored as_row(const Prefix (&open)[kRaggedVector]) {
    Stored row;
#pragma unroll
    for (int v = 0; v < kRaggedVector; ++v) {
      row.score.x[v] = round_to<typename Rows::State>(open[v].lse);
      row.kv.x[v] = round_to<typename Rows::State>(open[v].mean);
    }
    return row;
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
  template <int kVector>
  __device__ __forceinline__ void store_vector(int64_t at,
                                               const Vector<float, kVector>& value) const {
    if (is_bf16) {
      Vector<bf16, kVector> rounded;
#pragma unroll
      for (int v = 0; v < kVector; ++v) rounded.x[v] = round_to<bf16>(value.x[v]);
      store(static_cast<bf16*>(kv_comp) + at, rounded);
    } else {
      store(static_cast<float*>(kv_comp) + at, value);
    }
  }
};

// What becomes of values.
template <bool kRecords>
using ResultOf = std::conditional_t<kRecords, RecordParams, ValueTarget>;

}  // namespace jax_dsv4
