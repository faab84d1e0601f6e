// Work shared among the threads of XLA's pool, for CPU handlers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {

inline ::xla::ffi::Future ready(::xla::ffi::Error error) {
  ::xla::ffi::CountDownPromise promise(1);
  ::xla::ffi::Future future(promise);
  promise.CountDown(error);
  return future;
}

// Runs `run(params, i)` for each i below `count`, in a few tasks per thread, of at least so many;
// the future completes with the last. What is one task only runs at once.
template <class Params>
::xla::ffi::Future share_among_threads(::xla::ffi::ThreadPool pool, const Params& params,
                                       int64_t count, int64_t least,
                                       void (*run)(const Params&, int64_t)) {
  const int64_t most_tasks = (count + least - 1) / least;
  const int64_t num_tasks = std::clamp<int64_t>(4 * pool.num_threads(), 1, most_tasks);
  if (num_tasks == 1 && least > 1) {
    for (int64_t i = 0; i < count; ++i) run(params, i);
    return ready(::xla::ffi::Error::Success());
  }
  ::xla::ffi::CountDownPromise promise(num_tasks);
  ::xla::ffi::Future future(promise);
  for (int64_t task = 0; task < num_tasks; ++task) {
    const int64_t begin = count * task / num_tasks;
    const int64_t end = count * (task + 1) / num_tasks;
    pool.Schedule([params, run, begin, end, promise]() mutable {
      for (int64_t i = begin; i < end; ++i) run(params, i);
      promise.CountDown();
    });
  }
  return future;
}

}  // namespace jax_dsv4
