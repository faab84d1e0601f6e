// The time of one call with nothing of XLA around it: the launches that the handler makes, captured
// in a CUDA graph by hand. A check on benchmarks/decode.py, which measures inside a jitted program:
// the same points, in the same rotation through the pool.
//
//     nvcc -std=c++17 -O3 -arch=native -Iffi {benchmarks/graph,ffi/decode_launch}.cu -o graph
//     python benchmarks/points.py --points raw prefix | ./graph /dev/stdin
//     ./graph streams
//
// Reads points, one a line, as points.py prints them, and prints JSON lines with the keys of
// decode.py's. Points of a configuration that is not in Measured below are skipped, and named on
// stderr. `streams` measures what bounds the largest points instead: a plain streaming read of as
// many bytes, with and without a few bytes written beside it.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "baseline.cuh"
#include "config.h"
#include "graph.cuh"
#include "kernels.h"

using namespace jax_dsv4;

namespace {

using Hca = Kind<512, 128, false>;
using Shipped = DTypes<bf16, f32, bf16>;
using Measured = TypeList<Config<Hca, Shipped>,                    //
                          Config<Kind<512, 4, true>, Shipped>,     //
                          Config<Kind<128, 4, true>, Shipped>,     //
                          Config<Kind<128, 128, false>, Shipped>,  //
                          Config<Hca, DTypes<bf16, bf16, bf16>>,   //
                          Config<Hca, DTypes<f32, bf16, bf16>>>;

void measure_stream(size_t mib) {
  constexpr int kCalls = 64;
  constexpr size_t kPoolMib = 1024;
  const size_t size = (mib << 20) / sizeof(float4);
  const size_t slots = std::max<size_t>(2, kPoolMib / mib);
  const Buffer<float> from(4 * slots * size), to(4 * kCalls * size / 16);
  const Buffer<float> sink(1);
  for (int every : {0, 128, 32}) {
    const double us = time_of([&](cudaStream_t stream) {
      for (int i = 0; i < kCalls; ++i) {
        stream_kernel<<<4 * 132, 512, 0, stream>>>(vectors(from) + i % slots * size, size,
                                                   vectors(to) + i * (size / 16), every,
                                                   sink.get());
      }
    });
    std::printf(
        "{\"variant\": \"streaming read\", \"mib\": %zu, \"mib_written\": %.1f, \"us\": %.3f}\n",
        mib, every == 0 ? 0.0 : double(mib) / every, us / kCalls);
    std::fflush(stdout);
  }
}

// A line of points.py: its values by name, and what a record of its result begins with.
struct Point {
  std::map<std::string, std::string> values;
  std::string record;

  explicit Point(const std::string& line) {
    const size_t tab = line.find('\t');
    if (tab != std::string::npos) record = line.substr(tab + 1);
    std::istringstream words(line.substr(0, tab));
    for (std::string word; words >> word;) {
      const size_t equals = word.find('=');
      values[word.substr(0, equals)] = equals == std::string::npos ? "" : word.substr(equals + 1);
    }
  }

  const std::string& text(const char* name) const {
    const auto found = values.find(name);
    if (found != values.end()) return found->second;
    std::fprintf(stderr, "no value %s in a point: expected the output of points.py\n", name);
    std::exit(1);
  }
  int64_t number(const char* name) const { return std::stoll(text(name)); }
  std::vector<int32_t> numbers(const char* name) const {
    std::vector<int32_t> found;
    std::istringstream list(text(name));
    for (std::string item; std::getline(list, item, ',');) found.push_back(std::stoi(item));
    return found;
  }

  template <class Config>
  bool is_of() const {
    return number("head_dim") == Config::kHeadDim && number("ratio") == Config::kRatio &&
           number("overlap") == Config::kOverlap &&
           number("kv_score_bytes") == sizeof(typename Config::KvScore) &&
           number("state_bytes") == sizeof(typename Config::State);
  }
};

// Numbers that no two calls share, in an order that no prefetcher knows.
std::vector<int32_t> shuffled(int64_t size) {
  std::vector<int32_t> numbers(size);
  std::iota(numbers.begin(), numbers.end(), 0);
  std::shuffle(numbers.begin(), numbers.end(), std::mt19937(0));
  return numbers;
}

template <class Config>
void measure(const Point& point) {
  constexpr int64_t S = Config::kStateDim;
  using KvScore = typename Config::KvScore;
  using State = typename Config::State;
  const int64_t batch = point.number("batch"), next_n = point.number("next_n");
  const int64_t page_size = point.number("page_size"), num_pages = point.number("pages");
  const int64_t pages_each = point.number("pages_each"), max_pages = point.number("max_pages");
  const int64_t calls = point.number("calls"), num_states = point.number("states");
  const int64_t num_tables = point.number("tables");
  const int64_t num_windows = (next_n + Config::kRatio - 1) / Config::kRatio;
  const auto format = static_cast<StateFormat>(point.number("prefix"));

  // Every call's tables have cache lines of their own, as a buffer of XLA's has.
  const int64_t table_stride = (batch * max_pages + 63) / 64 * 64;
  const std::vector<int32_t> pages = shuffled(num_pages);
  std::vector<int32_t> all_tables(num_tables * table_stride);
  for (int64_t row = 0; row < num_tables * batch; ++row) {
    std::copy_n(pages.begin() + row * pages_each, pages_each,
                all_tables.begin() + row / batch * table_stride + row % batch * max_pages);
  }

  const int64_t state_size = num_pages * page_size * S;
  const Buffer<State> kv(num_states * state_size), score(num_states * state_size);
  const Buffer<KvScore> kv_score(batch * next_n * 2 * S);
  const Buffer<float> ape(Config::kRatio * S);
  const Buffer<typename Config::Out> kv_comp(batch * num_windows * Config::kHeadDim);
  const Buffer<int32_t> tables(all_tables), kv_lens(point.numbers("kv_lens"));
  DecodeParams p = {};
  p.kv_score = kv_score.get(), p.row_size = 2 * S, p.score_offset = S;
  p.ape = ape.get(), p.kv_lens = kv_lens.get(), p.kv_comp = kv_comp.get();
  p.num_groups = 1, p.batch = batch, p.next_n = next_n, p.num_windows = num_windows;
  p.num_layers = 1, p.rows_per_layer = p.rows_per_group = num_pages * page_size;
  p.paging = {static_cast<uint32_t>(max_pages), static_cast<uint32_t>(num_pages),
              Divisor(page_size)};

  // Between two launches of the graph all that the L2 holds is replaced, unless calls are warm.
  const size_t flushed = point.number("flushed_bytes");
  const Buffer<float> cold(flushed / sizeof(float)), sink(1);
  const auto flush = [&](cudaStream_t stream) {
    stream_kernel<<<4 * 132, 512, 0, stream>>>(vectors(cold), flushed / sizeof(float4), nullptr, 0,
                                               sink.get());
  };
  const double flush_us = time_of(flush);
  const auto report = [&](const char* variant, auto call) {
    const double all = time_of([&](cudaStream_t stream) {
      for (int64_t i = 0; i < calls; ++i) {
        p.kv = kv.get() + i % num_states * state_size;
        p.score = score.get() + i % num_states * state_size;
        p.kv_tables = p.score_tables = tables.get() + i % num_tables * table_stride;
        call(stream);
      }
      flush(stream);
    });
    std::printf("{%s, \"variant\": \"%s\", \"us\": %.3f}\n", point.record.c_str(), variant,
                (all - flush_us) / calls);
    std::fflush(stdout);
  };

  report("graph by hand", [&](cudaStream_t stream) {
    constexpr int64_t kOurChoice = -1;
    constexpr Selection kSelection = {Config::kHeadDim, Config::kRatio,
                                      Config::kOverlap, kDTypeOf<KvScore>,
                                      kDTypeOf<State>,  kDTypeOf<typename Config::Out>};
    const char* problem = launch_decode(stream, p, kSelection, format, kOurChoice);
    if (problem == nullptr) return;
    std::fprintf(stderr, "%s\n", problem);
    std::exit(1);
  });
  if constexpr (std::is_same_v<Config, jax_dsv4::Config<Hca, Shipped>>) {
    if (point.number("baselines") == 0) return;
    report("row at a time, 1 warps, graph by hand",
           [&](cudaStream_t stream) { launch_row_at_a_time<Config, 1>(stream, p); });
    report("row at a time, 4 warps, graph by hand",
           [&](cudaStream_t stream) { launch_row_at_a_time<Config, 4>(stream, p); });
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s FILE, points as points.py prints them, or %s streams\n",
                 argv[0], argv[0]);
    return 2;
  }
  if (std::strcmp(argv[1], "streams") == 0) {
    for (size_t mib : {64, 128, 256}) measure_stream(mib);
    return 0;
  }
  std::ifstream points(argv[1]);
  if (!points) {
    std::fprintf(stderr, "cannot read %s\n", argv[1]);
    return 1;
  }
  for (std::string line; std::getline(points, line);) {
    const Point point(line);
    const bool is_measured = visit_any(Measured{}, [&](auto config) {
      using Config = decltype(config);
      if (!point.is_of<Config>()) return false;
      measure<Config>(point);
      return true;
    });
    if (!is_measured) std::fprintf(stderr, "skipped, not compiled: %s\n", point.record.c_str());
  }
}
