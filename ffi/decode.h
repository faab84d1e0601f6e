// What a decode step works on, once checked: the operands as raw pointers, and one request's view
// of them. Shared by the CPU handler and the CUDA kernels; no XLA types.
#pragma once

#include <cstdint>
#include <type_traits>

#include "config.h"
#include "paging.h"

namespace jax_dsv4 {

// The operands of a plain call (config.h), and all that a kernel for such calls is given: a kernel
// waits for its parameters, 64 bytes at a time.
//
// G groups (any leading dimensions, folded) of B requests each; every group has a pool of its own,
// of one layer or of several. An operand of shape [G or 1, ...] is one per group, or one that all
// groups share.
struct PlainParams {
  void* kv;                     // [G, layers, num_pages, page_size, S] state, updated in place
  void* score;                  // [G, layers, num_pages, page_size, S] state, updated in place
  const void* kv_score;         // [G or 1, B, next_n, 2 S]
  const float* ape;             // [G or 1, R, S]; null: no bias
  const int32_t* kv_tables;     // [G or 1, B, max_pages]
  const int32_t* score_tables;  // [G or 1, B, max_pages]
  const int32_t* kv_lens;       // [G or 1, B]
  const int32_t* q_lens;        // [G or 1, B]; null: next_n for every request
  void* kv_comp;                // [G, B, num_windows, D], every element written

  uint32_t num_groups;  // G
  uint32_t batch;       // B; G B < 2^31
  int32_t next_n;
  uint32_t rows_per_group;  // of the state: layers * num_pages * page_size
  int32_t num_windows;      // ceil(next_n / R), the most that one step can complete
  Paging paging;

  // From one group to the next, in requests: B, or 0 where all groups share the operand.
  uint32_t kv_score_stride, kv_tables_stride, score_tables_stride, kv_lens_stride, q_lens_stride;
  uint32_t ape_stride;  // in arrays [R, S]: 1 or 0
};

// The operands of any call. Where `layer` is null, `kv` and `score` are at the layer already.
struct DecodeParams : PlainParams {
  uint32_t row_size;        // of kv_score, in elements: 2 S, or S where the scores are apart
  int64_t score_offset;     // from a row of kv to its scores, in elements: S, or to another array
  const int32_t* layer;     // [G or 1], or null
  uint32_t layer_stride;    // 1 or 0
  uint32_t num_layers;      // in a group
  uint32_t rows_per_layer;  // num_pages * page_size

  bool is_plain(int64_t state_dim) const {
    return layer == nullptr && score_offset == state_dim && row_size == 2 * state_dim;
  }
};

template <class Config>
using ParamsOf = std::conditional_t<Config::kPlain, PlainParams, DecodeParams>;

// From a new row to the next, in elements.
template <class Config>
JAX_DSV4_HD uint32_t row_size(const ParamsOf<Config>& p) {
  if constexpr (Config::kPlain) {
    return 2 * Config::kStateDim;
  } else {
    return p.row_size;
  }
}

// The scores of the row whose kv is here.
template <class Config>
JAX_DSV4_HD const typename Config::KvScore* scores_of(const ParamsOf<Config>& p,
                                                      const typename Config::KvScore* kv) {
  if constexpr (Config::kPlain) {
    return kv + Config::kStateDim;
  } else {
#ifdef __CUDA_ARCH__
    return kv + p.score_offset;  // as a number, the address would not be known to be global
#else
    return reinterpret_cast<const typename Config::KvScore*>(reinterpret_cast<uintptr_t>(kv) +
                                                             p.score_offset * sizeof(*kv));
#endif
  }
}

template <class Config>
struct Request {
  using KvScore = typename Config::KvScore;

  uint32_t pool_row;           // the first row of its group's layer in `kv` and `score`
  const KvScore* kv_score;     // [next_n] rows, row_size apart: S of kv
  const float* ape;            // [R, S] or null
  const int32_t* kv_table;     // [max_pages]
  const int32_t* score_table;  // [max_pages]
  int32_t num_new;             // n: new rows that are real; 0 for an inactive request
  int32_t first_position;      // L - n, the position of row 0; negative where n > L
  int32_t first_window;        // the first window that this step completes
  int32_t end_window;          // one past the last; end == first: none

  // The row behind a table's entry, or kNowhere if there is no such page. No entry leads outside
  // the pool.
  JAX_DSV4_HD uint32_t row_at(const Paging& paging, TableEntry entry) const {
    return entry.page < paging.num_pages
               ? pool_row + entry.page * paging.page_size.value + entry.slot
               : kNowhere;
  }
};

template <class Config>
JAX_DSV4_HD Request<Config> request_at(const ParamsOf<Config>& p, uint32_t group, uint32_t index) {
  using KvScore = typename Config::KvScore;
  const auto index_in = [&](uint32_t stride) { return group * stride + index; };

  Request<Config> r;
  const int32_t length = p.kv_lens[index_in(p.kv_lens_stride)];
  int32_t n = p.next_n;
  if (p.q_lens != nullptr) {
    const int32_t q_len = p.q_lens[index_in(p.q_lens_stride)];
    n = q_len < n ? q_len : n;
  }
  r.pool_row = group * p.rows_per_group;
  if constexpr (!Config::kPlain) {
    if (p.layer != nullptr) {
      const uint32_t layer = p.layer[group * p.layer_stride];
      if (layer >= p.num_layers) n = 0;  // a layer that does not exist: nothing is active
      r.pool_row += layer * p.rows_per_layer;
    }
  }
  const bool active = length > 0 && n > 0;
  r.num_new = active ? n : 0;
  r.first_position = active ? length - n : 0;
  const uint32_t start = r.first_position > 0 ? r.first_position : 0;
  r.first_window = start / Config::kRatio;
  r.end_window = (active ? static_cast<uint32_t>(length) : 0) / Config::kRatio;

  r.kv_score = static_cast<const KvScore*>(p.kv_score) + uint64_t{index_in(p.kv_score_stride)} *
                                                             static_cast<uint32_t>(p.next_n) *
                                                             row_size<Config>(p);
  r.ape = p.ape;
  if (p.ape != nullptr) {
    r.ape += uint64_t{group * p.ape_stride} * (Config::kRatio * Config::kStateDim);
  }
  r.kv_table = p.kv_tables + uint64_t{index_in(p.kv_tables_stride)} * p.paging.max_pages;
  r.score_table = p.score_tables + uint64_t{index_in(p.score_tables_stride)} * p.paging.max_pages;
  return r;
}

}  // namespace jax_dsv4
