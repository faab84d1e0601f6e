// How the work of a CPU handler is cut for threads. No XLA types.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "rows_cpu.h"

namespace jax_dsv4 {

// How many threads so much work is worth: rows times channels that are reduced, or what takes as
// long. To wake a thread takes the time of some 2^14 of them.
inline int64_t threads_worth(int64_t work) { return std::max<int64_t>(work >> 15, 1); }

// How the steps of so many requests are shared among threads: where requests are few, each comes in
// parts, no more than it takes: of its rows, as far as a configuration has such parts, and of its
// channels. Wide ones are read faster.
struct Split {
  int64_t num_threads;
  int num_parts = 1;

  Split(int64_t num_requests, int64_t most_threads, int64_t work, int64_t least_head_dim)
      : num_threads(std::min(most_threads, threads_worth(work))) {
    constexpr int64_t kLeastChannels = 32;
    if (num_threads < 2) return;
    const auto are_uneven = [&](int64_t parts) {
      return parts < num_threads || (parts < 4 * num_threads && parts % num_threads != 0);
    };
    while (are_uneven(num_requests * num_parts) && least_head_dim / num_parts > kLeastChannels) {
      num_parts *= 2;
    }
  }
  // Those of a part, where each of them comes in so many parts of rows, which are neighbours.
  Channels channels(int head_dim, int part, int row_parts) const {
    const int count = head_dim * row_parts / num_parts;
    return {part / row_parts * count, count};
  }
};

// What the threads that share a request leave for the one that is done last, and finishes it.
class SharedRequests {
 public:
  SharedRequests(int64_t num_requests, int64_t floats_each, int num_parts)
      : lines_each_((floats_each + kFloats - 1) / kFloats),
        lines_(new Line[num_requests * lines_each_]),
        parts_left_(num_requests) {
    for (auto& left : parts_left_) left.store(num_parts, std::memory_order_relaxed);
  }
  // Of a request: floats, or what consists of them. Not initialised.
  template <class Part>
  Part* of(int64_t request) {
    return reinterpret_cast<Part*>(lines_[request * lines_each_].x);
  }
  bool was_last_part(int64_t request) { return parts_left_[request].fetch_sub(1) == 1; }

 private:
  static constexpr int kFloats = 16;
  struct alignas(64) Line {
    float x[kFloats];
  };
  int64_t lines_each_;
  std::unique_ptr<Line[]> lines_;
  std::vector<std::atomic<int>> parts_left_;
};

}  // namespace jax_dsv4
