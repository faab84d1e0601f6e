// A ragged batch (ragged.h) on an NVIDIA GPU: device code only.
//
// The work is cut into slots: a slot is a row of `kv_comp` and the window that goes there, if there
// is one; and a request's last slot also has the rows of the window that it leaves open. Nobody has
// counted anything before: the threads of a slot find whose it is in `cu_q_lens`. Other CTAs have
// requests (ragged_few.cuh): those that bring few rows, whose slots then do nothing, and where
// windows are short the last rows of others, which are stored.
//
// A thread has four channels, as a rule. It takes new rows from kv_score, rounded as they are
// stored, and those from before the call from the state; nothing waits for a store. Value of a
// window, per channel:
//   sum_i softmax_i(score[i]) kv[i].
// On a state of prefixes (prefix.h) the rows before the call are one row. The new rows of a window
// any of which is stored are merged one after the other; values are a softmax as on raw states, or
// of short windows all of whose rows are stored what the last prefixes hold.
//
// Bytes: 2 S per new row, elements of kv_score, and 2 S per row that is stored, of the state; 2 D
// per row before the call of a window that is completed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ragged_long.cuh"
#include "ragged_short.cuh"
#include "ragged_wide.cuh"

namespace jax_dsv4 {

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
