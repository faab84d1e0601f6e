// The decode operation on a state of prefixes (prefix.h), on an NVIDIA GPU: device code only.
//
// A step is a chain of dependent loads, kv_len -> page -> row before the step, and then the merges,
// on few threads. What does not depend on a load is done before anything waits for that load. The
// lanes of a warp look up one row each. Bytes: 2 S per request for the row before the step, and S
// more where windows overlap; 4 S per new row (half of it read), elements. Completing a window adds
// none.
//
// There are two kernels, for few requests and for many. A thread has one column of D, or two, in
// both halves of a row where windows overlap. It merges in the order of the rows, with one
// exception: the first kernel merges a window's new rows with each other before the row before the
// step has been loaded, which rounds differently.

#pragma once

#include <algorithm>
#include <cstdint>

#include "config.h"
#include "decode.h"
#include "decode_raw.cuh"
#include "numeric.h"
#include "paging.h"
#include "prefix.h"
#include "vector.cuh"

namespace jax_dsv4 {

// ------------------------------------------------------------------------ for few requests

// Grid: x = requests x column slices, z = groups. A warp per token and 32 columns. It serves up to
// kTokens new rows, and few requests only, since later tokens merge again what earlier ones merge.
template <class Config, int kMostTokens = 4>
struct PrefixTokenTile {
  static constexpr int kTokens = kMostTokens;
  static constexpr int kVector = 1;
  static constexpr int kThreads = 32 * kTokens;
  static constexpr int kSlices = Config::kHeadDim / 32;
  static constexpr int kHalves = Config::kStateDim / Config::kHeadDim;
  static constexpr int kFirstHalf = 0;  // of those that are merged
  static constexpr bool kHasValue = true;
  static constexpr int kEntries = 512;  // of the longest table that is copied
  static constexpr int kWindows = (kTokens + Config::kRatio - 1) / Config::kRatio;  // completed
  static_assert(!Config::kOverlap || kTokens <= Config::kRatio,
                "the window before a completed one must have ended before the step");
};

// Its parameters (decode.h), in the order of use. A kernel waits for 64 bytes of them at a time,
// and the first 16 are CUDA's own.
struct PrefixTokenParams {
  const int32_t* kv_lens;
  const int32_t* q_lens;
  const int32_t* kv_tables;
  const int32_t* score_tables;
  uint32_t batch;
  int32_t next_n;
  uint32_t per_group;  // the operands that are one per group
  Paging paging;
  const void* kv_score;
  const float* ape;
  float* kv;
  float* score;
  void* kv_comp;
  uint32_t rows_per_group;
  // For calls that are not plain:
  uint32_t row_size;
  int64_t score_offset;
  const int32_t* layer;
  uint32_t num_layers;
  uint32_t rows_per_layer;

  enum PerGroup : uint32_t {
    kKvLens = 1,
    kQLens = 2,
    kKvTables = 4,
    kScoreTables = 8,
    kKvScore = 16,
    kApe = 32,
    kLayer = 64
  };
  explicit PrefixTokenParams(const DecodeParams& p)
      : kv_lens(p.kv_lens),
        q_lens(p.q_lens),
        kv_tables(p.kv_tables),
        score_tables(p.score_tables),
        batch(p.batch),
        next_n(p.next_n),
        per_group((p.kv_lens_stride != 0) * kKvLens | (p.q_lens_stride != 0) * kQLens |
                  (p.kv_tables_stride != 0) * kKvTables |
                  (p.score_tables_stride != 0) * kScoreTables |
                  (p.kv_score_stride != 0) * kKvScore | (p.ape_stride != 0) * kApe |
                  (p.layer_stride != 0) * kLayer),
        paging(p.paging),
        kv_score(p.kv_score),
        ape(p.ape),
        kv(static_cast<float*>(p.kv)),
        score(static_cast<float*>(p.score)),
        kv_comp(p.kv_comp),
        rows_per_group(p.rows_per_group),
        row_size(p.row_size),
        score_offset(p.score_offset),
        layer(p.layer),
        num_layers(p.num_layers),
        rows_per_layer(p.rows_per_layer) {}
};

// One thread's part of a step: token t of a request, in one column. kStaged: the tables are short
// enough to be copied into shared memory while the lengths are loaded.
template <class Config, bool kStaged, class Tile = PrefixTokenTile<Config>>
struct PrefixTokenStep {
  using T = Tile;
  static constexpr int kVector = T::kVector, kFirstHalf = T::kFirstHalf;
  using KvScore = typename Config::KvScore;
  using Out = typename Config::Out;
  static constexpr int R = Config::kRatio, S = Config::kStateDim, D = Config::kHeadDim;
  static constexpr int kHalves = T::kHalves, kTokens = T::kTokens, kEntries = T::kEntries;

  struct SharedPlan {
    int32_t kv_table[kStaged ? kEntries : 1], score_table[kStaged ? kEntries : 1];
    // A thread reads what it has copied.
    alignas(16) float biases[kTokens][kHalves - kFirstHalf][T::kThreads * kVector];
    alignas(16) float before_lse[T::kThreads * kVector], before_mean[T::kThreads * kVector];
  };

  const PrefixTokenParams& p;
  SharedPlan& smem;
  const uint32_t index, group = blockIdx.z;
  const int lane = threadIdx.x % 32;
  const int at = threadIdx.x * kVector;  // of the thread's part of a shared array
  const int column;
  int t;
  uint32_t of_group, per_group;

  // Set by load_lengths:
  int32_t length, q_len;
  // by copy_tables:
  const int32_t* kv_table;
  const int32_t* score_table;
  bool one_table;
  // by load_new_rows:
  uint32_t layer = 0;
  NewVector<Config, kVector> rows[kTokens][kHalves];
  float *kv, *score;
  const float* ape;
  // by is_active and look_up_rows:
  int num_new, first_position, token, begin;  // begin: of the token's window
  bool completes;
  uint32_t kv_row, score_row;
  // by load_rows_before:
  Prefix open[kHalves][kVector];
  bool has_before = false;
  // by merge_new_rows and merge_open:
  Prefix merged[kHalves][kVector];

  __device__ PrefixTokenStep(const PrefixTokenParams& p, SharedPlan& smem, uint32_t index,
                             int column, int t)
      : p(p), smem(smem), index(index), column(column), t(t) {
    of_group = group * p.batch;
    per_group = p.per_group;
    keep_in_registers(of_group, per_group);
  }

  __device__ uint32_t index_in(PrefixTokenParams::PerGroup operand) const {
    return (per_group & operand ? of_group : 0) + index;
  }
  __device__ Out* out() const {
    const uint32_t request = group * p.batch + index;
    const uint32_t num_windows = T::kWindows == 1 ? 1 : (p.next_n + R - 1u) / R;
    return static_cast<Out*>(p.kv_comp) + uint64_t{request} * num_windows * D + column;
  }
  __device__ void store_zeros(int first) const {
    const int num_windows = T::kWindows == 1 ? 1 : (p.next_n + R - 1) / R;
    for (int m = first; m < num_windows; ++m) out()[m * D] = round_to<Out>(0);
  }

  __device__ void load_lengths() {
    length = load_if(true, p.kv_lens + index_in(p.kKvLens), 0);
    q_len = load_if(p.q_lens != nullptr, p.q_lens + index_in(p.kQLens), p.next_n);
    __syncwarp();
  }

  __device__ void copy_tables() {
    kv_table = p.kv_tables + uint64_t{index_in(p.kKvTables)} * p.paging.max_pages;
    score_table = p.score_tables + uint64_t{index_in(p.kScoreTables)} * p.paging.max_pages;
    one_table = p.score_tables == p.kv_tables;
    if constexpr (kStaged) {
#pragma unroll
      for (int i = 0; i < kEntries; i += T::kThreads) {
        const bool exists = i + threadIdx.x < p.paging.max_pages;
        copy_if(exists, &smem.kv_table[i + threadIdx.x], kv_table + threadIdx.x + i);
        copy_if(exists && !one_table, &smem.score_table[i + threadIdx.x],
                score_table + threadIdx.x + i);
      }
    } else {
      const uint32_t entry = 8 * threadIdx.x;  // a sector of 8 entries per thread
      prefetch_l2_if(entry < p.paging.max_pages, kv_table + entry);
      prefetch_l2_if(entry < p.paging.max_pages && !one_table, score_table + entry);
    }
    commit_copies();
    __syncwarp();
  }

  __device__ void load_new_rows() {
    if (!Config::kPlain) {
      layer = load_if(p.layer != nullptr, p.layer + (per_group & p.kLayer ? group : 0), 0);
    }
    const uint32_t size = Config::kPlain ? 2 * S : p.row_size;
    const KvScore* const kv_score =
        opaque(static_cast<const KvScore*>(p.kv_score) +
               uint64_t{index_in(p.kKvScore)} * static_cast<uint32_t>(p.next_n) * size + column);
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      const KvScore* const row = kv_score + uint64_t{size} * j;
      const KvScore* const scores = row + (Config::kPlain ? S : p.score_offset);
#pragma unroll
      for (int half = kFirstHalf; half < kHalves; ++half) {
        using NewRow = Vector<KvScore, kVector>;
        rows[j][half].kv_in = load_if(j < p.next_n, row + half * D, NewRow{});
        rows[j][half].score_in = load_if(j < p.next_n, scores + half * D, NewRow{});
      }
    }
    kv = opaque(p.kv + column);
    score = opaque(p.score + column);
    ape = opaque(p.ape + uint64_t{per_group & p.kApe ? group : 0} * (R * S) + column);
    __syncwarp();
  }

  __device__ bool is_active() {
    num_new = min(q_len, p.next_n);
    return min(length, num_new) > 0 && (Config::kPlain || layer < p.num_layers);
  }

  // Goes to the token that completes the step's window m; false if there is none.
  __device__ bool find_token(int m) {
    if (!is_active()) return false;
    const int window = max(length - num_new, 0) / R + m;
    t = static_cast<int>((window + 1u) * R - 1 - static_cast<uint32_t>(length - num_new));
    return window < length / R;
  }

  // Lane j looks up the row of token j, and the next lane the row before the step. Where windows
  // overlap, the lane after that looks up the last row of the window before this token's.
  __device__ void look_up_rows() {
    first_position = length - num_new;
    token = position_of(first_position, t);
    begin = token & -R;  // R is a power of two (config.h)
    completes = t < num_new && token >= 0 && (token + 1) % R == 0;
    int position = position_of(first_position, lane < kTokens ? lane : -1);
    if (Config::kOverlap && lane == kTokens + 1) position = position_of(begin, -1);
    const uint32_t page = static_cast<uint32_t>(position) / p.paging.page_size;
    uint32_t slot = position - page * p.paging.page_size.value + group * p.rows_per_group;
    if (!Config::kPlain) slot += layer * p.rows_per_layer;
    const bool wanted =
        (lane >= kTokens || lane < num_new) && position >= 0 && page < p.paging.max_pages;
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      const uint32_t phase = static_cast<uint32_t>(position_of(first_position, j)) % R;
#pragma unroll
      for (int half = kFirstHalf; half < kHalves; ++half) {
        copy_if<kVector>(p.ape != nullptr, &smem.biases[j][half - kFirstHalf][at],
                         ape + phase * S + half * D);
      }
    }
    commit_copies();
    int32_t kv_page = -1, score_page = -1;
    if constexpr (!kStaged) {
      kv_page = load_if(wanted, kv_table + page, -1);
      score_page = load_if(wanted, score_table + page, -1);
    }
    __syncwarp();
    if constexpr (kStaged) {
      wait_for_copies<1>();
      __syncthreads();  // the tables, before any thread looks up a row
      const uint32_t entry = min(page, kEntries - 1u);
      const int32_t* const staged_table = one_table ? smem.kv_table : smem.score_table;
      const int32_t staged_kv_page = smem.kv_table[entry];
      const int32_t staged_score_page = staged_table[entry];
      if (wanted) {
        kv_page = staged_kv_page;
        score_page = staged_score_page;
      }
    }
    const auto row_at = [&](int32_t page) {
      const auto id = static_cast<uint32_t>(page);
      return id < p.paging.num_pages ? slot + id * p.paging.page_size.value : kNowhere;
    };
    kv_row = row_at(kv_page);
    score_row = row_at(score_page);
  }

  // A row that is nowhere holds no prefix.
  __device__ void load_rows_before() {
    const uint32_t kv_from = __shfl_sync(~0u, kv_row, kTokens);
    const uint32_t score_from = __shfl_sync(~0u, score_row, kTokens);
    const bool is_open = begin < first_position && kv_from != kNowhere && score_from != kNowhere;
#pragma unroll
    for (int half = kFirstHalf; half < kHalves; ++half) {
      Vector<float, kVector> none_lse, none_mean;
#pragma unroll
      for (int v = 0; v < kVector; ++v)
        none_lse.x[v] = Prefix{}.lse, none_mean.x[v] = Prefix{}.mean;
      const auto lse = load_if(is_open, score + uint64_t{score_from} * S + half * D, none_lse);
      const auto mean = load_if(is_open, kv + uint64_t{kv_from} * S + half * D, none_mean);
#pragma unroll
      for (int v = 0; v < kVector; ++v) open[half][v] = {lse.x[v], mean.x[v]};
    }
    if (T::kHasValue && Config::kOverlap) {
      const uint32_t kv_from = __shfl_sync(~0u, kv_row, kTokens + 1);
      const uint32_t score_from = __shfl_sync(~0u, score_row, kTokens + 1);
      has_before = completes && kv_from != kNowhere && score_from != kNowhere;
      copy_if<kVector>(has_before, &smem.before_lse[at], score + uint64_t{score_from} * S);
      copy_if<kVector>(has_before, &smem.before_mean[at], kv + uint64_t{kv_from} * S);
      commit_copies();
    }
  }

  // A row that is nowhere merges as one without weight; so does one of another window. kLater: how
  // often copies were asked for after those of rows before the step.
  template <int kLater = 0>
  __device__ void merge_new_rows() {
    const uint32_t exist = __ballot_sync(~0u, kv_row != kNowhere && score_row != kNowhere);
    __syncwarp();
    wait_for_copies<(T::kHasValue && Config::kOverlap ? 1 : 0) + kLater>();
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      const bool merges =
          j <= t && position_of(first_position, j) >= begin && (exist >> j & 1) != 0;
#pragma unroll
      for (int half = kFirstHalf; half < kHalves; ++half) {
        const auto bias = load<float, kVector>(&smem.biases[j][half - kFirstHalf][at]);
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          rows[j][half].bias.x[v] = p.ape != nullptr ? bias.x[v] : -0.0f;
        }
        const auto score = rows[j][half].score(), kv = rows[j][half].kv();
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          const Prefix next = merges ? Prefix{score.x[v], kv.x[v]} : Prefix{};
          merged[half][v] = j == 0 ? next : merge(merged[half][v], next);
        }
      }
    }
  }

  __device__ void merge_open() {
#pragma unroll
    for (int half = kFirstHalf; half < kHalves; ++half) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) merged[half][v] = merge(open[half][v], merged[half][v]);
    }
  }

  __device__ void store_row() const {
    static_assert(kFirstHalf == 0, "store_row: both halves");
    const uint32_t kv_to = __shfl_sync(~0u, kv_row, t);
    const uint32_t score_to = __shfl_sync(~0u, score_row, t);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      Vector<float, kVector> lse, mean;
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        lse.x[v] = merged[half][v].lse;
        mean.x[v] = merged[half][v].mean;
      }
      if (score_to != kNowhere) store(score + uint64_t{score_to} * S + half * D, lse);
      if (kv_to != kNowhere) store(kv + uint64_t{kv_to} * S + half * D, mean);
    }
  }

  // Of the window that this token completes.
  __device__ float value(int v) const {
    Prefix window = merged[kHalves - 1][v];
    if (has_before) window = merge({smem.before_lse[at + v], smem.before_mean[at + v]}, window);
    return value_of(window);
  }
  __device__ int window() const {              // which of the step's
    const int start = max(first_position, 0);  // of the first token that is stored
    return T::kWindows == 1 ? 0 : token / R - start / R;
  }

  __device__ void store_value() {
    wait_for_copies<0>();
    const int start = max(first_position, 0);
    if (completes) {
      const int m = window();
      out()[m * D] = round_to<Out>(value(0));
    }
    if (t == 0 && (T::kWindows > 1 || length / R <= start / R)) {
      store_zeros(T::kWindows == 1 ? 0 : length / R - start / R);
    }
  }
};

template <class Config, class T, bool kStaged>
__global__ void __launch_bounds__(T::kThreads)
    prefix_token_kernel(const __grid_constant__ PrefixTokenParams p) {
  using Step = PrefixTokenStep<Config, kStaged, T>;
  __shared__ typename Step::SharedPlan smem;
  const int slice = blockIdx.x % T::kSlices, lane = threadIdx.x % 32;
  Step step(p, smem, blockIdx.x / T::kSlices, 32 * slice + lane, threadIdx.x / 32);
  step.load_lengths();
  step.copy_tables();
  step.load_new_rows();
  if (!step.is_active()) {
    if (step.t == 0) step.store_zeros(0);
    wait_for_copies<0>();
    return;
  }
  step.look_up_rows();
  step.load_rows_before();
  step.merge_new_rows();
  step.merge_open();
  step.store_row();
  step.store_value();
}

// ------------------------------------------------------------------------ for many requests

// Grid: as above, in columns of kVector. A thread goes through all tokens in order, kRowsAtOnce at
// a time: any number of new rows.
template <class Config, int kMostThreads = 128>
struct PrefixTile {
  static constexpr int kVector = 2;
  static constexpr int kThreads = std::min(kMostThreads, Config::kHeadDim / kVector);
  static constexpr int kSlices = Config::kHeadDim / (kVector * kThreads);
  static constexpr int kHalves = Config::kStateDim / Config::kHeadDim;
  static constexpr int kRowsAtOnce = std::min(4, Config::kRatio);  // they complete one window
  // CTAs that should fit an SM. With two halves the compiler would settle for three.
  static constexpr int kMinCtas = kHalves == 2 ? 4 : 1;
};

// One thread's part of a step: kVector columns of a request, of both halves of its rows or of one.
template <class Config, int kVector_ = PrefixTile<Config>::kVector,
          int kHalves_ = PrefixTile<Config>::kHalves>
struct PrefixStep {
  using Out = typename Config::Out;
  static constexpr int R = Config::kRatio, S = Config::kStateDim, D = Config::kHeadDim;
  static constexpr int kHalves = kHalves_, kVector = kVector_;
  static constexpr int kRows = PrefixTile<Config>::kRowsAtOnce;
  struct PrefixVector {
    Vector<float, kVector> lse, mean;

    __device__ void clear() {
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        lse.x[v] = Prefix{}.lse;
        mean.x[v] = Prefix{}.mean;
      }
    }
  };

  const ParamsOf<Config>& p;
  const Request<Config>& r;
  const int column;  // of a row: of its first half, if this thread has both
  float* const kv;
  float* const score;
  NewVector<Config, kVector> rows[kRows][kHalves];
  PrefixVector open[kHalves];  // of the window that the last token is in
  PrefixVector before;         // the first half of the window before it

  // Tokens t0 to t0 + kRows - 1.
  struct Tokens {
    int first;                   // the position of the first
    uint32_t phase;              // of that position in its window
    uint32_t kv_row, score_row;  // lane j: of token t0 + j, or of a row before the step
  };
  struct Merged {
    uint32_t kv_to[kRows], score_to[kRows];  // where the prefixes are stored
    PrefixVector prefixes[kRows][kHalves];
    int last;                          // the token that completes a window, or kRows
    PrefixVector value, value_before;  // of that window
  };

  __device__ PrefixStep(const ParamsOf<Config>& p, const Request<Config>& r, int column)
      : p(p),
        r(r),
        column(column),
        kv(opaque(static_cast<float*>(p.kv) + column)),
        score(opaque(static_cast<float*>(p.score) + column)) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) open[half].clear();
    before.clear();
  }

  // The position of the first token that is stored. Not a member: kept over all phases, it costs
  // the registers that let stores overlap with merges.
  __device__ int first_stored() const { return max(r.first_position, 0); }

  __device__ void load_new_rows(int t0) {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      if (t0 + j >= p.next_n) continue;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        rows[j][half] = NewVector<Config, kVector>(p, r, t0 + j, half * D + column);
      }
    }
  }

  // Lane j looks up the row of token t0 + j, and two lanes the rows before the step: the one before
  // `start`, if of the same window; where windows overlap, the last of the window before.
  __device__ Tokens look_up_rows(int t0) {
    const int start = first_stored();
    const int lane = threadIdx.x % 32;
    Tokens tokens;
    tokens.first = position_of(r.first_position, t0);
    int position = position_of(r.first_position, t0 + lane);
    bool wanted = lane < kRows && t0 + lane < r.num_new;
    if (t0 == 0 && lane == kRows) {
      position = start - 1;
      wanted = start % R != 0;
    }
    if (Config::kOverlap && t0 == 0 && lane == kRows + 1) {
      position = start - start % R - 1;
      wanted = true;
    }
    wanted = wanted && position >= 0;
    const TableEntry kv_entry = look_up_if(wanted, p.paging, r.kv_table, position);
    const TableEntry score_entry = look_up_if(wanted, p.paging, r.score_table, position);
    tokens.phase = static_cast<uint32_t>(tokens.first) % R;
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        rows[j][half].load_bias(r, tokens.phase + j, half * D + column);
      }
    }
    tokens.kv_row = r.row_at(p.paging, kv_entry);
    tokens.score_row = r.row_at(p.paging, score_entry);
    return tokens;
  }

  // A row that is nowhere holds no prefix.
  __device__ void load_row_before(const Tokens& tokens, PrefixVector& prefix, int from_lane,
                                  int half) {
    const uint32_t kv_from = __shfl_sync(~0u, tokens.kv_row, from_lane);
    const uint32_t score_from = __shfl_sync(~0u, tokens.score_row, from_lane);
    if (kv_from == kNowhere || score_from == kNowhere) return;
    prefix.lse = load<float, kVector>(score + uint64_t{score_from} * S + half * D);
    prefix.mean = load<float, kVector>(kv + uint64_t{kv_from} * S + half * D);
  }
  __device__ void load_rows_before(const Tokens& tokens) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) load_row_before(tokens, open[half], kRows, half);
    if (Config::kOverlap && (kHalves == 2 || column >= D)) {
      load_row_before(tokens, before, kRows + 1, kHalves - 2);  // its first half
    }
  }

  // The token that completes a window, or kRows.
  __device__ int last_of(int t0, const Tokens& tokens) const {
    const int last = R - 1 - static_cast<int>(tokens.phase);
    return last >= r.num_new - t0 || tokens.first + last < 0 ? kRows : last;
  }

  __device__ static void merge_row(const NewVector<Config, kVector>& row, bool exists,
                                   PrefixVector& prefixes) {
    const auto new_kv = row.kv(), new_score = row.score();
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const Prefix next = exists ? Prefix{new_score.x[v], new_kv.x[v]} : Prefix{};
      const Prefix merged = merge({prefixes.lse.x[v], prefixes.mean.x[v]}, next);
      prefixes.lse.x[v] = merged.lse;
      prefixes.mean.x[v] = merged.mean;
    }
  }

  // There is no branch and no store between the merges: a token then waits only for the scores
  // before it. A row that is nowhere merges as one without weight.
  __device__ Merged merge_new_rows(int t0, const Tokens& tokens) {
    const int start = first_stored();
    const int last = last_of(t0, tokens);
    Merged merged;
    merged.last = last;
    merged.value.clear();
    merged.value_before.clear();
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      merged.kv_to[j] = __shfl_sync(~0u, tokens.kv_row, j);
      merged.score_to[j] = __shfl_sync(~0u, tokens.score_row, j);
      const bool exists = merged.kv_to[j] != kNowhere && merged.score_to[j] != kNowhere;
      const bool starts = (tokens.phase + j) % R == 0;
      if (kHalves == 2 && starts && position_of(r.first_position, t0 + j) > start) {
        before = open[0];
      }
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        if (starts) open[half].clear();
        merge_row(rows[j][half], exists, open[half]);
        merged.prefixes[j][half] = open[half];
      }
      if (j == last) {
        merged.value = open[kHalves - 1];
        merged.value_before = before;
      }
    }
    return merged;
  }

  __device__ void store_rows(const Merged& merged) const {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      float* const to_score = score + uint64_t{merged.score_to[j]} * S;
      float* const to_kv = kv + uint64_t{merged.kv_to[j]} * S;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const PrefixVector& prefix = merged.prefixes[j][half];
        if (merged.score_to[j] != kNowhere) store(to_score + half * D, prefix.lse);
        if (merged.kv_to[j] != kNowhere) store(to_kv + half * D, prefix.mean);
      }
    }
  }

  template <class Element>
  __device__ static void store_value(const PrefixVector& value, const PrefixVector& value_before,
                                     Element* out) {
    Vector<Element, kVector> values;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      values.x[v] = round_to<Element>(value_at(value, value_before, v));
    }
    store(out, values);
  }
  __device__ static float value_at(const PrefixVector& value, const PrefixVector& value_before,
                                   int v) {
    Prefix window{value.lse.x[v], value.mean.x[v]};
    if (Config::kOverlap) {
      window = merge({value_before.lse.x[v], value_before.mean.x[v]}, window);
    }
    return value_of(window);
  }
};

template <class Config>
__global__ void __launch_bounds__(PrefixTile<Config>::kThreads, PrefixTile<Config>::kMinCtas)
    prefix_kernel(const __grid_constant__ ParamsOf<Config> p) {
  using T = PrefixTile<Config>;
  using Step = PrefixStep<Config>;
  using Out = typename Config::Out;
  const uint32_t index = blockIdx.x / T::kSlices;
  const int column = (blockIdx.x % T::kSlices * T::kThreads + threadIdx.x) * T::kVector;
  prefetch_tables(p, blockIdx.z, index, threadIdx.x);
  const Request<Config> r = request_at<Config>(p, blockIdx.z, index);
  Out* out = static_cast<Out*>(p.kv_comp) +
             uint64_t{blockIdx.z * p.batch + index} * p.num_windows * Config::kHeadDim + column;
  Step step(p, r, column);
  step.load_new_rows(0);
#pragma unroll 1
  for (int t0 = 0;;) {
    const auto tokens = step.look_up_rows(t0);
    if (t0 == 0) step.load_rows_before(tokens);
    const auto merged = step.merge_new_rows(t0, tokens);
    step.store_rows(merged);
    if (merged.last < Step::kRows) {
      step.store_value(merged.value, merged.value_before, out);
      out += Config::kHeadDim;
    }
    if ((t0 += Step::kRows) >= r.num_new) break;
    step.load_new_rows(t0);
  }
#pragma unroll 1
  for (int m = r.end_window - r.first_window; m < p.num_windows; ++m, out += Config::kHeadDim) {
    store(out, Vector<Out, T::kVector>{});
  }
}

}  // namespace jax_dsv4
