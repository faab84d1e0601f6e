// The time of one ragged launch, captured in a CUDA graph by hand, beside the least that it can
// take: reading kv_score alone, or with as many values or all rows written; and beside a decode
// launch.
//
//     nvcc -std=c++17 -O3 -arch=native -Iffi -o ragged benchmarks/ragged.cu \
//         ffi/{ragged,ragged_records,decode}_launch.cu
//     ./ragged ["CASES" [GEOMETRY...]]
//
// Cold: every launch of a graph has operands of its own, 2 GiB of them and more. D 512, kv_score
// and values bf16, state f32, pages of 64 rows. Prints JSON lines, in microseconds; `geometry` as
// in ragged_launch.cuh, -1: our choice.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "graph.cuh"
#include "kernels.h"

using namespace jax_dsv4;

namespace {

constexpr int32_t kPageSize = 64;

// A batch: by request its length before the call and its new rows; and how many rows and requests
// there is room for.
struct Batch {
  std::vector<int32_t> starts, counts;
  int32_t rows, requests;
};
Batch batch_of(std::vector<int32_t> starts, std::vector<int32_t> counts, int32_t requests = 0) {
  const int32_t rows = std::accumulate(counts.begin(), counts.end(), 0);
  requests = std::max<int32_t>(requests, counts.size());
  return {std::move(starts), std::move(counts), rows, requests};
}

// Operands of one launch.
template <class Config>
struct Call {
  using KvScore = typename Config::KvScore;
  static constexpr int R = Config::kRatio, S = Config::kStateDim, D = Config::kHeadDim;
  Buffer<KvScore> kv_score;
  Buffer<float> kv, score, ape, kv_comp;
  Buffer<int32_t> tables, kv_lens, cu_q_lens;
  RaggedParams params = {};
  DecodeParams decode = {};

  static std::vector<int32_t> lens_of(const Batch& b) {
    std::vector<int32_t> lens(b.requests, 0);
    for (size_t i = 0; i < b.counts.size(); ++i) lens[i] = b.starts[i] + b.counts[i];
    return lens;
  }
  static std::vector<int32_t> cu_of(const Batch& b) {
    std::vector<int32_t> cu(b.requests + 1, b.rows);
    cu[0] = 0;
    std::partial_sum(b.counts.begin(), b.counts.end(), cu.begin() + 1);
    return cu;
  }
  static int32_t max_pages_of(const Batch& b) {
    const auto lens = lens_of(b);
    return *std::max_element(lens.begin(), lens.end()) / kPageSize + 1;
  }
  // All pages that any length needs; only those exist that have rows.
  static std::vector<int32_t> tables_of(const Batch& b, int64_t& pages) {
    const int32_t max_pages = max_pages_of(b);
    std::vector<int32_t> tables(int64_t{b.requests} * max_pages, -1);
    const auto lens = lens_of(b);
    pages = 0;
    for (int32_t i = 0; i < b.requests; ++i) {
      for (int32_t j = 0; j * kPageSize < lens[i]; ++j) tables[i * max_pages + j] = pages++;
    }
    return tables;
  }
  static int64_t pages_of(const Batch& b) {
    int64_t pages;
    tables_of(b, pages);
    return pages;
  }
  static std::vector<int32_t> tables_of(const Batch& b) {
    int64_t pages;
    return tables_of(b, pages);
  }

  explicit Call(const Batch& b, const float* shared_ape)
      : kv_score(int64_t{b.rows} * 2 * S),
        kv(pages_of(b) * kPageSize * S),
        score(pages_of(b) * kPageSize * S),
        ape(0),
        kv_comp((int64_t{b.rows} / R + b.requests) * D),
        tables(tables_of(b)),
        kv_lens(lens_of(b)),
        cu_q_lens(cu_of(b)) {
    RaggedParams& p = params;
    p.kv = kv.get(), p.score = score.get(), p.kv_score = kv_score.get(), p.ape = shared_ape;
    p.kv_tables = p.score_tables = tables.get();
    p.kv_lens = kv_lens.get(), p.cu_q_lens = cu_q_lens.get(), p.kv_comp = kv_comp.get();
    p.num_groups = 1, p.batch = b.requests, p.next_n = b.rows;
    p.rows_per_group = p.rows_per_layer = pages_of(b) * kPageSize, p.num_layers = 1;
    p.num_windows = b.rows / R + b.requests;
    p.paging = {static_cast<uint32_t>(max_pages_of(b)), static_cast<uint32_t>(pages_of(b)),
                Divisor(kPageSize)};
    p.row_size = 2 * S, p.score_offset = S;
    p.kv_tables_stride = p.score_tables_stride = p.kv_lens_stride = b.requests;
    p.cu_q_lens_stride = b.requests + 1, p.kv_score_stride = p.ape_stride = 1;
    p.rule = {true, false, 0, Divisor(1)};
    decode = p;
    decode.next_n = b.counts[0];
    decode.num_windows = (decode.next_n + R - 1) / R;
    decode.kv_score_stride = b.requests;
  }
  double bytes_of_rows() const { return 2.0 * params.next_n * S * sizeof(float); }
  double bytes_of_input() const { return 2.0 * params.next_n * S * sizeof(KvScore); }
};

// Reads rows of kv_score, four elements of bf16 at a time, and writes all of them in f32: their kv
// to one array, their scores to the other, as many.
__global__ void __launch_bounds__(512)
    copy_rows(const uint2* from, size_t size, float4* kv, float4* score) {
  constexpr int kUnroll = 4;
  const size_t step = size_t{gridDim.x} * blockDim.x;
  for (size_t first = blockIdx.x * size_t{blockDim.x} + threadIdx.x; first < size;
       first += step * kUnroll) {
    uint2 x[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i * step < size) x[i] = __ldcs(from + first + i * step);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const size_t at = first + i * step;
      if (at >= size) continue;
      const auto value = [](uint32_t bits) { return __uint_as_float(bits); };
      const float4 row = {value(x[i].x << 16), value(x[i].x & 0xffff0000u), value(x[i].y << 16),
                          value(x[i].y & 0xffff0000u)};
      // Half of them each, by blocks of 512: which one does not change the time.
      (at / 512 % 2 == 0 ? kv : score)[at / 1024 * 512 + at % 512] = row;
    }
  }
}

// Of a launch: of many of them in one graph, less what fewer take.
template <class Config, class Launch>
double time_of_launch(const std::vector<std::unique_ptr<Call<Config>>>& calls, int64_t repeats,
                      Launch launch) {
  const auto run = [&](int64_t count) {
    return time_of([&](cudaStream_t stream) {
      for (int64_t i = 0; i < count; ++i) launch(stream, *calls[i % calls.size()]);
    });
  };
  const int64_t few = repeats / 4;
  return (run(repeats) - run(few)) / (repeats - few);
}

template <class Config>
void measure(const std::string& name, const Batch& batch, StateFormat format, bool all,
             const std::vector<int64_t>& geometries, bool beside_decode = false) {
  constexpr Selection kSelection = {Config::kHeadDim, Config::kRatio, Config::kOverlap,
                                    DType::kBF16,     DType::kF32,    DType::kBF16};
  const Buffer<float> ape(Config::kRatio * Config::kStateDim), sink(1);
  std::vector<std::unique_ptr<Call<Config>>> calls;
  size_t bytes = 0;
  while (bytes < size_t{2} << 30 && calls.size() < 512) {
    calls.push_back(std::make_unique<Call<Config>>(batch, ape.get()));
    bytes += static_cast<size_t>(calls.back()->bytes_of_input());
    bytes += Call<Config>::pages_of(batch) * kPageSize * 2 * Config::kStateDim * sizeof(float);
  }
  for (auto& call : calls) call->params.rule = {all, false, 3, Divisor(1)};
  const auto repeats = std::max<int64_t>(calls.size(), 16);
  const Call<Config>& one = *calls[0];
  std::string text = "{\"case\": \"" + name + "\", \"ratio\": " + std::to_string(Config::kRatio) +
                     ", \"format\": \"" + kStateFormatNames[static_cast<int>(format)] +
                     "\", \"store\": \"" + (all ? "all" : "live") +
                     "\", \"rows\": " + std::to_string(batch.rows);
  const auto add = [&](const std::string& key, double value) {
    char number[64];
    std::snprintf(number, sizeof(number), ", \"%s\": %.2f", key.c_str(), value);
    text += number;
  };
  const size_t input = static_cast<size_t>(one.bytes_of_input()) / sizeof(float4);
  add("read", time_of_launch<Config>(calls, repeats, [&](cudaStream_t stream, Call<Config>& c) {
        stream_kernel<<<4 * 132, 512, 0, stream>>>(
            reinterpret_cast<const float4*>(c.kv_score.get()), input, nullptr, 0, sink.get());
      }));
  constexpr int kEvery = 2 * Config::kRatio * Config::kStateDim / Config::kHeadDim;
  add("read_values",
      time_of_launch<Config>(calls, repeats, [&](cudaStream_t stream, Call<Config>& c) {
        stream_kernel<<<4 * 132, 512, 0, stream>>>(
            reinterpret_cast<const float4*>(c.kv_score.get()), input,
            reinterpret_cast<float4*>(c.kv_comp.get()), kEvery, sink.get());
      }));
  if (all) {
    add("read_write",
        time_of_launch<Config>(calls, repeats, [&](cudaStream_t stream, Call<Config>& c) {
          copy_rows<<<4 * 132, 512, 0, stream>>>(reinterpret_cast<const uint2*>(c.kv_score.get()),
                                                 2 * input, reinterpret_cast<float4*>(c.kv.get()),
                                                 reinterpret_cast<float4*>(c.score.get()));
        }));
  }
  for (int64_t geometry : geometries) {
    add(geometry < 0 ? "kernel" : "kernel_" + std::to_string(geometry),
        time_of_launch<Config>(
            calls, repeats,
            [&](cudaStream_t stream, Call<Config>& c) {
              const char* problem = launch_ragged(stream, c.params, kSelection, format, geometry);
              if (problem != nullptr) std::printf("%s\n", problem);
            }));
  }
  // Records in fp8_ds_mla, normed and rotated.
  constexpr int64_t kPositions = 1 << 17, kPageBytes = kPageSize * 584;
  const int64_t record_pages = int64_t{Call<Config>::max_pages_of(batch)} / Config::kRatio + 1;
  std::vector<int32_t> record_tables(batch.requests * record_pages);
  std::iota(record_tables.begin(), record_tables.end(), 0);
  const Buffer<int32_t> tables(record_tables);
  const Buffer<uint8_t> pool(record_tables.size() * kPageBytes);
  const Buffer<float> weight(Config::kHeadDim), turns(kPositions * kRopeDim);
  RecordTarget records = {};
  records.tables = tables.get(), records.norm_weight = weight.get(), records.cos_sin = turns.get();
  records.max_pages = record_pages, records.num_positions = kPositions;
  records.tables_stride = batch.requests;
  records.pool.data = pool.get(), records.pool.num_layers = 1;
  records.pool.num_pages = record_tables.size(), records.pool.page_size = Divisor(kPageSize);
  records.pool.page_bytes = kPageBytes, records.pool.is_16b_aligned = kPageBytes % 16 == 0;
  records.options.rms_norm_eps = 1e-6f, records.options.rounding = Rounding::kOnce;
  add("records", time_of_launch<Config>(calls, repeats, [&](cudaStream_t stream, Call<Config>& c) {
        RaggedRecordsCall call = {};
        call.selection = kSelection;
        call.selection.out = DType::kF32;
        call.state_format = format, call.format = RecordFormat::kFp8DsMla;
        static_cast<RaggedParams&>(call.params) = c.params;
        call.params.records = records;
        const char* problem = launch_ragged_records(stream, &call, 1, -1);
        if (problem != nullptr) std::printf("%s\n", problem);
      }));
  if (beside_decode) {
    add("decode", time_of_launch<Config>(calls, repeats, [&](cudaStream_t stream, Call<Config>& c) {
          c.decode.kv_comp = c.kv_comp.get();
          launch_decode(stream, c.decode, kSelection, format, -1);
        }));
  }
  std::printf("%s}\n", text.c_str());
  std::fflush(stdout);
}

template <int R, bool kOverlap>
void measure_all(const std::vector<int64_t>& geometries, const std::string& wanted) {
  using C = Config<Kind<512, R, kOverlap>, DTypes<bf16, f32, f32>>;
  const auto is_wanted = [&](const char* name) {
    return wanted.empty() || wanted.find(name) != std::string::npos;
  };
  const std::vector<int64_t> ours = {-1};
  for (StateFormat format : {StateFormat::kRaw, StateFormat::kPrefix}) {
    for (bool all : {false, true}) {
      for (int32_t rows : {8192, 65536}) {
        if (!is_wanted("prompt")) continue;
        measure<C>("prompt", batch_of({0}, {rows}), format, all, geometries);
      }
    }
    const auto same = [](int32_t count, int32_t value) {
      return std::vector<int32_t>(count, value);
    };
    if (is_wanted("uneven")) {
      std::vector<int32_t> counts = same(8, 100);
      counts[0] = 32768;
      measure<C>("uneven", batch_of(same(8, 0), counts), format, false, ours);
      measure<C>("uneven, as one prompt", batch_of({0}, {33468}, 8), format, false, ours);
    }
    // Requests that bring 4 rows: the last ones of a window of 128, or others of it.
    for (int32_t requests : {16, 64}) {
      if (!is_wanted("decode")) continue;
      measure<C>("decode, all emit", batch_of(same(requests, 1148), same(requests, 4)), format,
                 false, ours, true);
      measure<C>("decode", batch_of(same(requests, 1028), same(requests, 4)), format, false, ours,
                 true);
    }
    if (is_wanted("mixed")) {
      std::vector<int32_t> starts = same(63, 1148), counts = same(63, 4);
      measure<C>("63 of 4 rows", batch_of(starts, counts), format, false, ours);
      measure<C>("a chunk", batch_of({4096}, {2048}), format, false, ours);
      starts.push_back(4096), counts.push_back(2048);
      measure<C>("mixed", batch_of(starts, counts), format, false, ours);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "";
  std::vector<int64_t> geometries = {-1};
  for (int i = 2; i < argc; ++i) geometries.push_back(std::stoll(argv[i]));
  measure_all<128, false>({-1}, wanted);
  measure_all<4, true>(geometries, wanted);
}
