// The time of one call with nothing of XLA around it: the launches that the handler makes, captured
// in a CUDA graph by hand. A check on benchmarks/decode.py, which measures inside a jitted program;
// the same points, the same rotation through the pool. The same with one table for all calls, each
// of which has a state of its own, as the layers of a model do: the state alone is cold. And what
// bounds the largest of them: a plain streaming read of as many bytes, with and without a few bytes
// written beside it.
//
//     nvcc -std=c++17 -O3 -arch=native -Iffi benchmarks/graph.cu -o graph && ./graph [batch ...]
//
// Prints JSON lines, of these batches or of all: R, D, next_n 4, kv_score bf16, state f32, kv_comp
// bf16, page 32.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#include "launch.cuh"

using namespace jax_dsv4;

namespace {

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  std::exit(1);
}

// Normal enough: the time does not depend on the values.
template <class T>
__global__ void fill(T* x, size_t size) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < size;
       i += size_t{gridDim.x} * blockDim.x) {
    x[i] = round_to<T>(static_cast<float>((i * 2654435761u >> 8) % 4096) / 1024 - 2);
  }
}

// Reads every vector, and writes one block of 8 KiB of `every` of those read; none if 0.
__global__ void __launch_bounds__(512)
    stream_kernel(const float4* from, size_t size, float4* to, int every, float* sink) {
  constexpr int kUnroll = 8, kThreads = 512;
  float sum = 0;
  for (size_t block = blockIdx.x; block * kUnroll * kThreads < size; block += gridDim.x) {
    float4 x[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) x[i] = from[(block * kUnroll + i) * kThreads + threadIdx.x];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) sum += x[i].x + x[i].y + x[i].z + x[i].w;
    const size_t writes = every == 0 ? 0 : block * kUnroll / every;
    if (every != 0 && block * kUnroll % every == 0) to[writes * kThreads + threadIdx.x] = x[0];
  }
  if (sum == 1.2345f) *sink = sum;
}

template <class T>
class Buffer {
 public:
  explicit Buffer(size_t size) {
    check(cudaMalloc(&data_, size * sizeof(T)));
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, bf16>) {
      fill<<<1024, 256>>>(data_, size);
    }
  }
  explicit Buffer(const std::vector<T>& from) : Buffer(from.size()) {
    check(cudaMemcpy(data_, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

float4* vectors(const Buffer<float>& buffer) { return reinterpret_cast<float4*>(buffer.get()); }

constexpr int kPageSize = 32, kNextN = 4;
constexpr int64_t kPoolBytes = int64_t{1} << 30, kColdBytes = int64_t{256} << 20;

// Microseconds of what `work` puts into a stream, as one graph: the median.
template <class Work>
double time_of(Work work) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cudaEvent_t begin, end;
  check(cudaStreamCreate(&stream));
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  work(stream);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&executable, graph, 0));
  std::vector<double> us;
  for (int round = 0; round < 7; ++round) {  // the first two warm up
    constexpr int kLaunches = 5;
    check(cudaEventRecord(begin, stream));
    for (int i = 0; i < kLaunches; ++i) check(cudaGraphLaunch(executable, stream));
    check(cudaEventRecord(end, stream));
    check(cudaStreamSynchronize(stream));
    float milliseconds;
    check(cudaEventElapsedTime(&milliseconds, begin, end));
    if (round >= 2) us.push_back(1e3 * milliseconds / kLaunches);
  }
  std::sort(us.begin(), us.end());
  check(cudaGetLastError());
  check(cudaGraphExecDestroy(executable));
  check(cudaGraphDestroy(graph));
  check(cudaStreamDestroy(stream));
  return us[us.size() / 2];
}

void measure_stream(size_t mib) {
  constexpr int kCalls = 64;
  const size_t size = (mib << 20) / sizeof(float4);
  const size_t slots = std::max<size_t>(2, kPoolBytes / (mib << 20));
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

template <class Config>
void measure(const char* regime, int batch, StateFormat format, bool one_table) {
  constexpr int R = Config::kRatio, S = Config::kStateDim, D = Config::kHeadDim;
  constexpr int kLast = Config::kReducedRows;  // the length at which a window is complete
  std::vector<int32_t> lens(batch);
  double stored_rows = 0;
  for (int b = 0; b < batch; ++b) {
    lens[b] = regime[0] == 'a'   ? kLast
              : regime[0] == 'n' ? kLast - 1
                                 : kLast - kNextN * (b % std::max(1, R / kNextN));
    const bool emits = lens[b] / R > (lens[b] - kNextN) / R;
    stored_rows += format == StateFormat::kPrefix ? 1
                   : emits ? (kLast - kNextN) / (Config::kOverlap ? 2.0 : 1.0)
                           : 0;
  }
  const double bytes = (stored_rows + batch * kNextN) * 2 * S * sizeof(float) +
                       batch * kNextN * 2 * S * sizeof(bf16) + batch * D * sizeof(bf16);
  const int pages_each = (kLast + kPageSize - 1) / kPageSize;
  const int64_t page_bytes = int64_t{2} * kPageSize * S * sizeof(float);
  const int calls = std::clamp<int64_t>(static_cast<int64_t>(kColdBytes / bytes), 64, 512);
  const int64_t wanted = std::min<int64_t>(calls, static_cast<int64_t>(kColdBytes / bytes) + 1);
  const int num_pages =
      static_cast<int>(std::max<int64_t>(kPoolBytes / page_bytes, wanted * batch * pages_each));
  const int num_tables = std::min(num_pages / (batch * pages_each), calls);
  std::vector<int32_t> pages(num_pages);
  std::iota(pages.begin(), pages.end(), 0);
  std::shuffle(pages.begin(), pages.end(), std::mt19937(0));
  // Every call's tables have cache lines of their own, as a buffer of XLA's has.
  const size_t used = size_t(batch) * pages_each, stride = (used + 63) / 64 * 64;
  std::vector<int32_t> all_tables(num_tables * stride);
  for (int i = 0; i < num_tables; ++i) {
    std::copy_n(pages.begin() + i * used, used, all_tables.begin() + i * stride);
  }
  if (one_table) {  // of the pages of a call's own state
    std::iota(all_tables.begin(), all_tables.begin() + used, 0);
    std::shuffle(all_tables.begin(), all_tables.begin() + used, std::mt19937(0));
  }

  const size_t pool = static_cast<size_t>(num_pages) * kPageSize * S;
  const int state_pages = one_table ? static_cast<int>(used) : num_pages;
  const Buffer<float> kv(pool), score(pool), ape(R * S);
  const Buffer<bf16> kv_score(size_t(batch) * kNextN * 2 * S);
  const Buffer<bf16> kv_comp(size_t(batch) * D);
  const Buffer<int32_t> tables(all_tables), kv_lens(lens);
  DecodeParams p = {};
  p.kv_score = kv_score.get(), p.ape = ape.get();
  p.kv_lens = kv_lens.get(), p.kv_comp = kv_comp.get();
  p.num_groups = 1, p.batch = batch, p.next_n = kNextN, p.num_windows = 1;
  p.rows_per_pool = static_cast<uint32_t>(state_pages) * kPageSize;
  p.paging = {static_cast<uint32_t>(pages_each), static_cast<uint32_t>(state_pages),
              Divisor(kPageSize)};

  // Between two launches of the graph all that the L2 holds is replaced.
  const Buffer<float> cold(kColdBytes / sizeof(float)), sink(1);
  const auto flush = [&](cudaStream_t stream) {
    stream_kernel<<<4 * 132, 512, 0, stream>>>(vectors(cold), kColdBytes / sizeof(float4), nullptr,
                                               0, sink.get());
  };
  const double all = time_of([&](cudaStream_t stream) {
    for (int i = 0; i < calls; ++i) {
      const int place = i % num_tables;
      const size_t state = one_table ? place * used * kPageSize * S : 0;
      p.kv = kv.get() + state, p.score = score.get() + state;
      p.kv_tables = p.score_tables = tables.get() + (one_table ? 0 : place * stride);
      const char* problem = launch<Config>(stream, p, format, choose_geometry<Config>(p));
      if (problem != nullptr) std::fprintf(stderr, "%s\n", problem), std::exit(1);
    }
    flush(stream);
  });
  const double us = (all - time_of(flush)) / calls;
  std::printf(
      "{\"regime\": \"%s\", \"batch\": %d, \"ratio\": %d, \"head_dim\": %d, \"format\": \"%s\", "
      "\"variant\": \"graph by hand%s\", \"us\": %.3f}\n",
      regime, batch, R, D, kStateFormatNames[static_cast<int>(format)],
      one_table ? ", one table" : "", us);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  using Types = DTypes<bf16, f32, bf16>;
  using Hca = Config<Shape<512, 128, false>, Types>;
  using Csa = Config<Shape<512, 4, true>, Types>;
  std::vector<int> wanted;
  for (int i = 1; i < argc; ++i) wanted.push_back(std::atoi(argv[i]));
  const auto measure_batches = [&](auto config, const char* regime, StateFormat format,
                                   std::initializer_list<int> batches) {
    for (int batch : batches) {
      if (wanted.empty() || std::find(wanted.begin(), wanted.end(), batch) != wanted.end()) {
        for (bool one_table : {false, true}) {
          measure<decltype(config)>(regime, batch, format, one_table);
        }
      }
    }
  };
  for (StateFormat format : {StateFormat::kRaw, StateFormat::kPrefix}) {
    measure_batches(Hca{}, "all emit", format, {1, 16, 32, 64, 128, 256, 512});
    measure_batches(Hca{}, "distributed", format, {32, 64, 128, 256});
    measure_batches(Hca{}, "no hit", format, {1, 16, 128, 256});
    measure_batches(Csa{}, "all emit", format, {1, 16, 64, 256});
  }
  if (wanted.empty()) {
    for (size_t mib : {64, 128, 256}) measure_stream(mib);
  }
}
