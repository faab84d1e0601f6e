// The decode operation on a state of prefixes (numeric.h), on an NVIDIA GPU: device code only.
//
// A step is one chain, kv_len -> page -> row before the step -> new rows, on few threads: what
// counts is what each of its links waits for besides, and the instructions in between. What does
// not depend on a link is done while the link is on its way. The lanes of a warp look up all of its
// rows with one lookup, a row each. Bytes: 2 S per request for the row before the step, and S more
// where windows overlap; 4 S per new row (half of it read), elements; nothing more where a window
// is completed.
//
// Two kernels, for few requests and for many. A thread of theirs has one column of D, or two, of
// both halves where windows overlap, and merges in the order of the rows; but in the first the new
// rows of a window are merged before the row before the step is there, which rounds differently.

#pragma once

#include <cstdint>
#include <type_traits>

#include "config.h"
#include "decode.cuh"
#include "decode.h"
#include "numeric.h"
#include "paging.h"

namespace jax_dsv4 {

// *from, or `otherwise`, without a branch: a branch is a point at which the compiler has everything
// wait that was loaded before it.
template <class T>
__device__ __forceinline__ T load_if(bool condition, const T* from, T otherwise) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 2);
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  union {
    T value;
    Bits bits;
  } u{otherwise};
  if constexpr (sizeof(T) == 4) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.b32 %0, [%1]; }"
                 : "+r"(u.bits)
                 : "l"(from), "r"(static_cast<int>(condition)));
  } else {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.b16 %0, [%1]; }"
                 : "+h"(u.bits)
                 : "l"(from), "r"(static_cast<int>(condition)));
  }
  return u.value;
}

__device__ __forceinline__ void prefetch_if(bool condition, const void* from) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %1, 0; @p prefetch.global.L2 [%0]; }" ::"l"(from),
               "r"(static_cast<int>(condition)));
}

// *to = *from, in shared memory, on its way. The copies up to a commit_copies() are waited for
// together, by the thread that asked for them.
template <class T>
__device__ __forceinline__ void copy_if(bool condition, T* to, const T* from) {
  static_assert(sizeof(T) == 4);
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %2, 0; @p cp.async.ca.shared.global [%0], [%1], 4; }" ::"r"(
          static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(static_cast<int>(condition))
      : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// For all but the last `kOnTheirWay` commits.
template <int kOnTheirWay>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOnTheirWay) : "memory");
}

// look_up where `wanted`; elsewhere a page that does not exist.
__device__ __forceinline__ TableEntry look_up_if(bool wanted, const Paging& paging,
                                                 const int32_t* table, int32_t position) {
  const uint32_t n = static_cast<uint32_t>(position);
  const uint32_t page = n / paging.page_size;
  return {static_cast<uint32_t>(load_if(wanted && page < paging.max_pages, table + page, -1)),
          n - page * paging.page_size.value};
}

// A base address in global memory that the compiler leaves whole: row * S elements on is then one
// instruction.
template <class T>
__device__ __forceinline__ T* opaque(T* pointer) {
  asm("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// Of row t; where there is no such row, it may have wrapped around.
__device__ __forceinline__ int position_of(int first_position, int t) {
  return static_cast<int>(static_cast<uint32_t>(first_position) + t);
}

// Grid: x = requests x column slices, z = groups. A warp per token, 32 columns: for up to kTokens
// new rows, and for few requests, since later tokens merge what earlier ones have merged already.
template <class Config>
struct PrefixTokenTile {
  static constexpr int kTokens = 4;
  static constexpr int kThreads = 32 * kTokens;
  static constexpr int kSlices = Config::kHeadDim / 32;
  static constexpr int kEntries = 4 * kThreads;  // of the longest table that is copied
  static_assert(kTokens <= Config::kRatio);      // one window is completed, at most
};

// Its parameters (decode.h), in the order of use: a kernel has to wait for them, too, 64 bytes at a
// time, the first 16 of which are not its own.
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
  uint32_t rows_per_pool;

  enum PerGroup : uint32_t {
    kKvLens = 1,
    kQLens = 2,
    kKvTables = 4,
    kScoreTables = 8,
    kKvScore = 16,
    kApe = 32
  };
  explicit PrefixTokenParams(const DecodeParams& p)
      : kv_lens(p.kv_lens),
        q_lens(p.q_lens),
        kv_tables(p.kv_tables),
        score_tables(p.score_tables),
        batch(p.batch),
        next_n(p.next_n),
        per_group((p.kv_lens_stride != 0 ? kKvLens : 0) | (p.q_lens_stride != 0 ? kQLens : 0) |
                  (p.kv_tables_stride != 0 ? kKvTables : 0) |
                  (p.score_tables_stride != 0 ? kScoreTables : 0) |
                  (p.kv_score_stride != 0 ? kKvScore : 0) | (p.ape_stride != 0 ? kApe : 0)),
        paging(p.paging),
        kv_score(p.kv_score),
        ape(p.ape),
        kv(static_cast<float*>(p.kv)),
        score(static_cast<float*>(p.score)),
        kv_comp(p.kv_comp),
        rows_per_pool(p.rows_per_pool) {}
};

// Loads in the order of use: first the lengths, which came as late as a cold table where they were
// asked for behind its copy; then the tables, then what does not depend on the lengths. No load is
// moved across a __syncwarp. Tables of up to kEntries entries are copied while the lengths are on
// their way (kStaged); of longer ones some are brought nearer.
// The compiler has loads into registers share six counters, so that waiting for one may be waiting
// for others, too; at a branch, it waits for copies. What is copied into shared memory is waited
// for by itself.
template <class Config, bool kStaged>
__global__ void __launch_bounds__(PrefixTokenTile<Config>::kThreads, 1)
    prefix_token_kernel(const __grid_constant__ PrefixTokenParams p) {
  using T = PrefixTokenTile<Config>;
  using KvScore = typename Config::KvScore;
  using Out = typename Config::Out;
  constexpr int R = Config::kRatio, S = Config::kStateDim, D = Config::kHeadDim;
  constexpr int kHalves = S / D, kTokens = T::kTokens, kEntries = T::kEntries;
  __shared__ int32_t staged_kv_table[kEntries], staged_score_table[kEntries];
  __shared__ float biases[kTokens][kHalves][T::kThreads];  // a thread reads what it has copied
  __shared__ float before_lse[T::kThreads], before_mean[T::kThreads];

  const uint32_t index = blockIdx.x / T::kSlices, group = blockIdx.z;
  // Not as uniform values: to load such a parameter, a warp halts.
  uint32_t of_group = group * p.batch, per_group = p.per_group;
  asm volatile("" : "+r"(of_group), "+r"(per_group));
  const auto row_in = [&](PrefixTokenParams::PerGroup operand) {
    return (per_group & operand ? of_group : 0) + index;
  };
  const int32_t length = load_if(true, p.kv_lens + row_in(p.kKvLens), 0);
  const int32_t q_len = load_if(p.q_lens != nullptr, p.q_lens + row_in(p.kQLens), p.next_n);
  __syncwarp();
  const int32_t* const kv_table = p.kv_tables + uint64_t{row_in(p.kKvTables)} * p.paging.max_pages;
  const int32_t* const score_table =
      p.score_tables + uint64_t{row_in(p.kScoreTables)} * p.paging.max_pages;
  const bool one_table = p.score_tables == p.kv_tables;
  if constexpr (kStaged) {
#pragma unroll
    for (int i = 0; i < kEntries; i += T::kThreads) {
      const bool exists = i + threadIdx.x < p.paging.max_pages;
      copy_if(exists, &staged_kv_table[i + threadIdx.x], kv_table + threadIdx.x + i);
      copy_if(exists && !one_table, &staged_score_table[i + threadIdx.x],
              score_table + threadIdx.x + i);
    }
  } else {
    const uint32_t entry = 8 * threadIdx.x;  // a sector of 8 entries per thread
    prefetch_if(entry < p.paging.max_pages, kv_table + entry);
    prefetch_if(entry < p.paging.max_pages && !one_table, score_table + entry);
  }
  commit_copies();
  __syncwarp();
  const int lane = threadIdx.x % 32, t = threadIdx.x / 32;
  const int column = blockIdx.x % T::kSlices * 32 + lane;
  const KvScore* const kv_score =
      opaque(static_cast<const KvScore*>(p.kv_score) +
             uint64_t{row_in(p.kKvScore)} * static_cast<uint32_t>(p.next_n) * (2 * S) + column);
  NewVector<Config, 1> rows[kTokens][kHalves];
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const KvScore* const from = kv_score + j * (2 * S) + half * D;
      rows[j][half].kv_in.x[0] = load_if(j < p.next_n, from, KvScore{});
      rows[j][half].score_in.x[0] = load_if(j < p.next_n, from + S, KvScore{});
    }
  }
  float* const kv = opaque(p.kv + column);
  float* const score = opaque(p.score + column);
  const float* const ape =
      opaque(p.ape + uint64_t{per_group & p.kApe ? group : 0} * (R * S) + column);
  const auto out = [&] {
    return static_cast<Out*>(p.kv_comp) + uint64_t{group * p.batch + index} * D + column;
  };
  __syncwarp();

  const int num_new = min(q_len, p.next_n);
  if (min(length, num_new) <= 0) {
    if (t == 0) *out() = round_to<Out>(0);
    wait_for_copies<0>();
    return;
  }
  const int first_position = length - num_new;
  const int token = position_of(first_position, t);
  const int begin = token & -R;  // of its window
  const bool completes = t < num_new && token >= 0 && (token + 1) % R == 0;
  // Lane j looks up the row of token j, and the next lane the row before the step; where windows
  // overlap, the one after that the last row of the window before this token's.
  int position = position_of(first_position, lane < kTokens ? lane : -1);
  if (Config::kOverlap && lane == kTokens + 1) position = begin - 1;
  const uint32_t page = static_cast<uint32_t>(position) / p.paging.page_size;
  const uint32_t slot = position - page * p.paging.page_size.value + group * p.rows_per_pool;
  const bool wanted =
      (lane >= kTokens || lane < num_new) && position >= 0 && page < p.paging.max_pages;
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    const uint32_t phase = static_cast<uint32_t>(position_of(first_position, j)) % R;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      copy_if(p.ape != nullptr, &biases[j][half][threadIdx.x], ape + phase * S + half * D);
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
    const int32_t* const staged_table = one_table ? staged_kv_table : staged_score_table;
    const int32_t staged_kv_page = staged_kv_table[entry];
    const int32_t staged_score_page = staged_table[entry];
    if (wanted) kv_page = staged_kv_page, score_page = staged_score_page;
  }
  const auto row_of = [&](int32_t page) {
    const auto id = static_cast<uint32_t>(page);
    return id < p.paging.num_pages ? slot + id * p.paging.page_size.value : kNowhere;
  };
  const uint32_t kv_row = row_of(kv_page), score_row = row_of(score_page);

  // A row that is nowhere holds no prefix.
  Prefix open[kHalves];
  const uint32_t kv_from = __shfl_sync(~0u, kv_row, kTokens);
  const uint32_t score_from = __shfl_sync(~0u, score_row, kTokens);
  const bool is_open = begin < first_position && kv_from != kNowhere && score_from != kNowhere;
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    open[half].lse = load_if(is_open, score + uint64_t{score_from} * S + half * D, Prefix{}.lse);
    open[half].mean = load_if(is_open, kv + uint64_t{kv_from} * S + half * D, Prefix{}.mean);
  }
  bool has_before = false;
  if (Config::kOverlap) {
    const uint32_t kv_from = __shfl_sync(~0u, kv_row, kTokens + 1);
    const uint32_t score_from = __shfl_sync(~0u, score_row, kTokens + 1);
    has_before = completes && kv_from != kNowhere && score_from != kNowhere;
    copy_if(has_before, &before_lse[threadIdx.x], score + uint64_t{score_from} * S);
    copy_if(has_before, &before_mean[threadIdx.x], kv + uint64_t{kv_from} * S);
    commit_copies();
  }

  // A row that is nowhere merges as one without weight; so does one of another window.
  const uint32_t exist = __ballot_sync(~0u, kv_row != kNowhere && score_row != kNowhere);
  __syncwarp();
  wait_for_copies<Config::kOverlap ? 1 : 0>();
  Prefix merged[kHalves];
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    const bool merges = j <= t && position_of(first_position, j) >= begin && (exist >> j & 1) != 0;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const float bias = biases[j][half][threadIdx.x];
      rows[j][half].bias.x[0] = p.ape != nullptr ? bias : -0.0f;
      const Prefix row{rows[j][half].score().x[0], rows[j][half].kv().x[0]};
      const Prefix next = merges ? row : Prefix{};
      merged[half] = j == 0 ? next : merge(merged[half], next);
    }
  }
  const uint32_t kv_to = __shfl_sync(~0u, kv_row, t);
  const uint32_t score_to = __shfl_sync(~0u, score_row, t);
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    merged[half] = merge(open[half], merged[half]);
    if (score_to != kNowhere) score[uint64_t{score_to} * S + half * D] = merged[half].lse;
    if (kv_to != kNowhere) kv[uint64_t{kv_to} * S + half * D] = merged[half].mean;
  }
  wait_for_copies<0>();
  if (completes) {
    Prefix window = merged[kHalves - 1];
    if (has_before) window = merge({before_lse[threadIdx.x], before_mean[threadIdx.x]}, window);
    *out() = round_to<Out>(value_of(window));
  }
  const int start = max(first_position, 0);  // of the first token that is stored
  if (t == 0 && length / R <= start / R) *out() = round_to<Out>(0);
}

// Grid: as above, in columns of kVector. A thread goes through all tokens in order, kRowsAtOnce of
// them in flight: any number of new rows.
template <class Config>
struct PrefixTile {
  static constexpr int kVector = 2;
  static constexpr int kThreads = min_of(128, Config::kHeadDim / kVector);
  static constexpr int kSlices = Config::kHeadDim / (kVector * kThreads);
  static constexpr int kHalves = Config::kStateDim / Config::kHeadDim;
  static constexpr int kRowsAtOnce = 4;
  // CTAs that should fit an SM: for two halves the compiler would allow but three.
  static constexpr int kMinCtas = kHalves == 2 ? 4 : 1;
  static_assert(kRowsAtOnce <= Config::kRatio);  // one window is completed, at most
};

template <class Config>
__global__ void __launch_bounds__(PrefixTile<Config>::kThreads, PrefixTile<Config>::kMinCtas)
    prefix_kernel(const __grid_constant__ DecodeParams p) {
  using T = PrefixTile<Config>;
  using Out = typename Config::Out;
  constexpr int R = Config::kRatio, S = Config::kStateDim, D = Config::kHeadDim;
  constexpr int kHalves = T::kHalves, kRows = T::kRowsAtOnce, kVector = T::kVector;
  using Floats = Vector<float, kVector>;
  struct Prefixes {
    Floats lse, mean;
  };
  Prefixes none;
#pragma unroll
  for (int v = 0; v < kVector; ++v) none.lse.x[v] = Prefix{}.lse, none.mean.x[v] = Prefix{}.mean;

  const uint32_t index = blockIdx.x / T::kSlices;
  const int column = (blockIdx.x % T::kSlices * T::kThreads + threadIdx.x) * kVector;
  prefetch_tables(p, blockIdx.z, index);
  const Request<Config> r = request_at<Config>(p, blockIdx.z, index);
  float* const kv = opaque(static_cast<float*>(p.kv) + column);
  float* const score = opaque(static_cast<float*>(p.score) + column);
  Out* out = static_cast<Out*>(p.kv_comp) +
             uint64_t{blockIdx.z * p.batch + index} * p.num_windows * D + column;

  NewVector<Config, kVector> rows[kRows][kHalves];
  const auto load_rows = [&](int t0) {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      if (t0 + j >= p.next_n) continue;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        rows[j][half] = NewVector<Config, kVector>(r, t0 + j, half * D + column);
      }
    }
  };
  load_rows(0);

  const int start = max(r.first_position, 0);  // of the first token that is stored
  Prefixes open[kHalves];                      // of the window that the last token is in
#pragma unroll
  for (int half = 0; half < kHalves; ++half) open[half] = none;
  Prefixes before = none;  // first half of the window before it
#pragma unroll 1
  for (int t0 = 0;;) {
    // Lane j looks up the row of token t0 + j, and two lanes the rows before the step: the one
    // before `start`, if of the same window; where windows overlap, the last of the window before.
    const int lane = threadIdx.x % 32;
    const int first = position_of(r.first_position, t0);
    int position = position_of(r.first_position, t0 + lane);
    bool wanted = lane < kRows && t0 + lane < r.num_new;
    if (t0 == 0 && lane == kRows) position = start - 1, wanted = start % R != 0;
    if (Config::kOverlap && t0 == 0 && lane == kRows + 1) {
      position = start - start % R - 1;
      wanted = true;
    }
    wanted = wanted && position >= 0;
    const TableEntry kv_entry = look_up_if(wanted, p.paging, r.kv_table, position);
    const TableEntry score_entry = look_up_if(wanted, p.paging, r.score_table, position);
    const uint32_t phase = static_cast<uint32_t>(first) % R;  // of the first of these tokens
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        rows[j][half].load_bias(r, phase + j, half * D + column);
      }
    }
    const uint32_t kv_row = r.row_of(p.paging, kv_entry);
    const uint32_t score_row = r.row_of(p.paging, score_entry);
    if (t0 == 0) {
      // A row that is nowhere holds no prefix.
      const auto read = [&](Prefixes& prefixes, int number, int half) {
        const uint32_t kv_from = __shfl_sync(~0u, kv_row, number);
        const uint32_t score_from = __shfl_sync(~0u, score_row, number);
        if (kv_from == kNowhere || score_from == kNowhere) return;
        prefixes.lse = load<float, kVector>(score + uint64_t{score_from} * S + half * D);
        prefixes.mean = load<float, kVector>(kv + uint64_t{kv_from} * S + half * D);
      };
#pragma unroll
      for (int half = 0; half < kHalves; ++half) read(open[half], kRows, half);
      if (Config::kOverlap) read(before, kRows + 1, 0);
    }
    int last = R - 1 - static_cast<int>(phase);  // the token that completes a window, or kRows
    if (last >= r.num_new - t0 || first + last < 0) last = kRows;
    // The merges in one piece, without a branch or a store between them: a token then waits only
    // for the scores before it. A row that is nowhere merges as one without weight.
    uint32_t kv_to[kRows], score_to[kRows];
    Prefixes merged[kRows][kHalves];
    Prefixes value = none, value_before = none;
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      kv_to[j] = __shfl_sync(~0u, kv_row, j);
      score_to[j] = __shfl_sync(~0u, score_row, j);
      const bool exists = kv_to[j] != kNowhere && score_to[j] != kNowhere;
      const bool starts = (phase + j) % R == 0;
      if (Config::kOverlap && starts && position_of(r.first_position, t0 + j) > start)
        before = open[0];
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        if (starts) open[half] = none;
        const Floats new_kv = rows[j][half].kv(), new_score = rows[j][half].score();
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          const Prefix row = exists ? Prefix{new_score.x[v], new_kv.x[v]} : Prefix{};
          const Prefix prefix = merge({open[half].lse.x[v], open[half].mean.x[v]}, row);
          open[half].lse.x[v] = prefix.lse;
          open[half].mean.x[v] = prefix.mean;
        }
        merged[j][half] = open[half];
      }
      if (j == last) value = open[kHalves - 1], value_before = before;
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      float* const to_score = score + uint64_t{score_to[j]} * S;
      float* const to_kv = kv + uint64_t{kv_to[j]} * S;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        if (score_to[j] != kNowhere) store(to_score + half * D, merged[j][half].lse);
        if (kv_to[j] != kNowhere) store(to_kv + half * D, merged[j][half].mean);
      }
    }
    if (last < kRows) {
      Vector<Out, kVector> values;
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        Prefix window{value.lse.x[v], value.mean.x[v]};
        if (Config::kOverlap) {
          window = merge({value_before.lse.x[v], value_before.mean.x[v]}, window);
        }
        values.x[v] = round_to<Out>(value_of(window));
      }
      store(out, values);
      out += D;
    }
    if ((t0 += kRows) >= r.num_new) break;
    load_rows(t0);
  }
#pragma unroll 1
  for (int m = r.end_window - r.first_window; m < p.num_windows; ++m, out += D) {
    store(out, Vector<Out, kVector>{});
  }
}

}  // namespace jax_dsv4
