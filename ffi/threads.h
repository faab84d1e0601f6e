// Work shared among the threads of XLA's pool, for CPU handlers.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>

#include "split_cpu.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {

inline ::xla::ffi::Future ready(::xla::ffi::Error error) {
  ::xla::ffi::CountDownPromise promise(1);
  ::xla::ffi::Future future(promise);
  promise.CountDown(error);
  return future;
}

// Runs `run(params, i)` for each i below `count`, in any order, by up to `most_threads` threads;
// the future completes with the last. The calling thread is one of them: what it has done before
// another one is awake costs nothing, and little work is done at once.
template <class Params>
::xla::ffi::Future share_among_threads(::xla::ffi::ThreadPool pool, const Params& params,
                                       int64_t count, int64_t most_threads,
                                       void (*run)(const Params&, int64_t)) {
  const int64_t num_threads = std::min({pool.num_threads(), most_threads, count});
  if (num_threads <= 1) {
    for (int64_t i = 0; i < count; ++i) run(params, i);
    return ready(::xla::ffi::Error::Success());
  }
  // Threads may come when all is done, and the call has returned.
  struct Work {
    Params params;
    int64_t count, at_once;
    void (*run)(const Params&, int64_t);
    ::xla::ffi::CountDownPromise promise;
    std::atomic<int64_t> next{0}, done{0};

    void take() {
      for (int64_t begin; (begin = next.fetch_add(at_once)) < count;) {
        const int64_t end = std::min(begin + at_once, count);
        for (int64_t i = begin; i < end; ++i) run(params, i);
        promise.CountDown(end - begin);  // before the caller may return with the future
        done.fetch_add(end - begin, std::memory_order_release);
      }
    }
  };
  const int64_t at_once = std::max<int64_t>(count / (16 * num_threads), 1);
  const std::shared_ptr<Work> work(
      new Work{params, count, at_once, run, ::xla::ffi::CountDownPromise(count)});
  ::xla::ffi::Future future(work->promise);
  for (int64_t thread = 1; thread < num_threads; ++thread) {
    pool.Schedule([work] { work->take(); });
  }
  work->take();
  // What others are at is soon done. Without the wait one of them would go on with the program, and
  // would have to wake a third one for the next call: twice the time of a small one.
  constexpr std::chrono::microseconds kLongestWait{50};
  const auto end = std::chrono::steady_clock::now() + kLongestWait;
  while (work->done.load(std::memory_order_acquire) < count &&
         std::chrono::steady_clock::now() < end) {
  }
  return future;
}

}  // namespace jax_dsv4
