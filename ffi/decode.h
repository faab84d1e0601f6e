// What a decode step works on, once checked: the operands as raw pointers, and one request's view
// of them. Shared by the CPU handler and the CUDA kernel; no XLA types.
#pragma once

#include <cstdint>

#include "config.h"
#include "paging.h"

namespace jax_dsv4 {

// G groups (any leading dimensions, folded) of B requests each; every group has a pool of its own.
// An operand of shape [G or 1, ...] is one per group, or one that all groups share.
struct DecodeParams {
  void* kv;                     // [G, num_pages, page_size, S] state, updated in place
  void* score;                  // [G, num_pages, page_size, S] state, updated in place
  const void* kv_score;         // [G or 1, B, next_n, 2 S]
  const float* ape;             // [G or 1, R, S]; null: no bias
  const int32_t* kv_tables;     // [G or 1, B, max_pages]
  const int32_t* score_tables;  // [G or 1, B, max_pages]
  const int32_t* kv_lens;       // [G or 1, B]
  const int32_t* q_lens;        // [G or 1, B]; null: next_n for every request
  void* kv_comp;                // [G, B, num_windows, D], every element written

  int32_t num_requests;  // G * B
  int32_t next_n;
  Divisor batch;          // B
  int64_t rows_per_pool;  // num_pages * page_size
  int32_t num_windows;    // ceil(next_n / R), the most that one step can complete
  Paging paging;

  // Whether the operand is one per group.
  bool kv_score_per_group, ape_per_group, kv_tables_per_group, score_tables_per_group;
  bool kv_lens_per_group, q_lens_per_group;
};

template <class Config>
struct Request {
  using KvScore = typename Config::KvScore;

  int64_t pool_row;            // its group's first row in `kv` and `score`
  const KvScore* kv_score;     // [next_n, 2 S]
  const float* ape;            // [R, S] or null
  const int32_t* kv_table;     // [max_pages]
  const int32_t* score_table;  // [max_pages]
  int32_t num_new;             // n: rows of kv_score that are real; 0 for an inactive request
  int32_t first_position;      // L - n, the position of row 0; negative where n > L
  int32_t first_window;        // the first window that this step completes
  int32_t end_window;          // one past the last; end == first: none

  // The row behind `position`, in units of rows of `kv` or `score`, or kNowhere.
  JAX_DSV4_HD int64_t find_row(const Paging& paging, const int32_t* table, int32_t position) const {
    const int64_t row = jax_dsv4::find_row(paging, table, position);
    return row == kNowhere ? kNowhere : pool_row + row;
  }
};

// The view of request `index` of G * B.
template <class Config>
JAX_DSV4_HD Request<Config> request_at(const DecodeParams& p, uint32_t index) {
  const uint32_t group = index / p.batch;
  const uint32_t in_group = index - group * p.batch.value;
  const auto row_of = [&](bool per_group) -> int64_t { return per_group ? index : in_group; };

  Request<Config> r;
  const int32_t length = p.kv_lens[row_of(p.kv_lens_per_group)];
  int32_t n = p.next_n;
  if (p.q_lens != nullptr) {
    const int32_t q_len = p.q_lens[row_of(p.q_lens_per_group)];
    n = q_len < n ? q_len : n;
  }
  r.num_new = length > 0 && n > 0 ? n : 0;
  r.first_position = r.num_new > 0 ? length - n : 0;
  r.first_window = (r.first_position > 0 ? r.first_position : 0) / Config::kRatio;
  r.end_window = r.num_new > 0 ? length / Config::kRatio : r.first_window;

  r.pool_row = int64_t{group} * p.rows_per_pool;
  r.kv_score = static_cast<const typename Config::KvScore*>(p.kv_score) +
               row_of(p.kv_score_per_group) * p.next_n * (2 * Config::kStateDim);
  r.ape = p.ape;
  if (p.ape != nullptr && p.ape_per_group) {
    r.ape += int64_t{group} * (Config::kRatio * Config::kStateDim);
  }
  r.kv_table = p.kv_tables + row_of(p.kv_tables_per_group) * p.paging.max_pages;
  r.score_table = p.score_tables + row_of(p.score_tables_per_group) * p.paging.max_pages;
  return r;
}

}  // namespace jax_dsv4
