// Work captured in CUDA graphs by hand, and its time.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "config.h"
#include "numeric.h"

namespace jax_dsv4 {

inline void check(cudaError_t status) {
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
static __global__ void __launch_bounds__(512)
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
    check(cudaMalloc(&data_, std::max<size_t>(size, 1) * sizeof(T)));
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

inline float4* vectors(const Buffer<float>& buffer) {
  return reinterpret_cast<float4*>(buffer.get());
}

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
  check(cudaEventDestroy(begin));
  check(cudaEventDestroy(end));
  check(cudaStreamDestroy(stream));
  return us[us.size() / 2];
}

}  // namespace jax_dsv4
