// Runs kernels on a CPU: errors of logic show there that results on a GPU show now and then, if at
// all. run.py compiles the kernels with this in front of all.
//
// Threads are fibers of one host thread. They take turns where they wait for others, and now and
// then where they load or store: by priorities of warps, drawn at random and anew from time to
// time, so that one may be far ahead of another. A CTA's shared memory starts as NaN. Asynchronous
// copies come at once or when they are waited for; what is sent to a CTA of a cluster, at any time.
//
// A kernel fails by wrong results, and by: a deadlock, or a minute without an end; a warp that is
// not whole, or not at one place, where its lanes meet; a barrier of two numbers of threads; copies
// that nobody waits for; sending to a CTA that is not ready or has ended; an access that is
// misaligned, or behind an array.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <queue>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "numeric.h"

#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx;  // of the thread whose turn it is

namespace emulator {

// Where a kernel calls, as the default of a parameter.
struct Place {
  const char* file = __builtin_FILE();
  int line = __builtin_LINE();
};

struct Cta;
struct Warp;
struct Copy {
  int group;
  std::function<void()> finish;
  Place at;
};
struct Fiber {
  jmp_buf context;
  bool is_started = false;  // its stack serves one thread after another
  Cta* cta;
  Warp* warp;
  unsigned thread, lane;
  bool has_ended, has_arrived;  // at the cluster's barrier
  std::vector<Copy> copies;     // that it has not waited for
  int num_groups;               // of copies
  double shuffled;              // this and the next two: what it has of its warp's last meeting
  double highest;
  uint32_t ballot;
  Place waits_at;
};
struct Warp {
  Fiber* fibers[32];
  uint32_t priority, live = ~0u, arrived = 0;  // lanes
  bool needs_all;                              // the meeting to which some have arrived
  Place at;
  double values[32];  // of u32, i32 or f32
  int from_lanes[32];
};
constexpr unsigned kAllThreads = ~0u;  // that have not ended
struct Barrier {
  unsigned expected, count = 0;
  std::map<std::pair<Warp*, bool>, uint32_t> lanes = {};  // that wait; that only arrive
  std::vector<Fiber*> waiting = {};
};
struct Cluster {
  std::vector<std::unique_ptr<Cta>> ctas;
  unsigned to_come = 0;  // threads that have neither arrived at its barrier nor ended
  std::vector<Fiber*> waiting;
};
struct Cta {
  Cluster* cluster;
  unsigned rank;
  dim3 block;
  unsigned live;  // threads
  std::vector<Warp> warps;
  std::map<int, Barrier> barriers = {};  // to which some have come, and not all
  std::vector<uint32_t> shared = {};
  ptrdiff_t byte_barrier = -1;  // where it is in shared memory
  int64_t bytes_to_come = 0;
  std::vector<Fiber*> waiting_for_bytes = {};
};

constexpr uint32_t kPoison = 0x7fc0dead;                    // NaN, as f32 and as bf16
constexpr size_t kPage = 64 << 10, kStackSize = 2 * kPage;  // multiples of the machine's page

inline std::mt19937_64 dice;
inline uint64_t case_seed;
inline bool has_clusters;
inline unsigned accesses_per_turn;
inline std::string problem;  // the first: nothing goes on after it
inline const std::function<void()>* kernel;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline Fiber* current = nullptr;
inline jmp_buf scheduler;
inline std::priority_queue<std::pair<uint64_t, Fiber*>> ready;
inline std::vector<std::function<void()>> messages;  // between the CTAs of clusters: deliver them
inline std::map<void*, std::pair<void*, size_t>> allocations;  // what is mapped for them

// ----------------------------------------------------------------------------------- taking turns

// So many bytes; what follows them, to 16 bytes, may not be accessed.
inline void* allocate(size_t size) {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  const size_t mapped = (size + kPage - 1) / kPage * kPage;
  void* const begin = mmap(nullptr, mapped + kPage, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  char* const end = static_cast<char*>(begin) + mapped;
  if (begin == MAP_FAILED || mprotect(end, kPage, PROT_NONE) != 0) std::abort();
  void* const data = end - (size + 15) / 16 * 16;
  allocations[data] = {begin, mapped + kPage};
  return data;
}

inline void to_scheduler() {
  if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
}

inline std::string describe_turn() {
  const auto text = [](unsigned x) { return " " + std::to_string(x); };
  return "; turn of block" + text(blockIdx.x) + text(blockIdx.y) + text(blockIdx.z) + ", thread" +
         text(threadIdx.x);
}
inline void fail(const std::string& what, Place at) {
  const std::string where = std::string(", ") + at.file + ":" + std::to_string(at.line);
  if (problem.empty()) problem = what + where + describe_turn();
  if (current != nullptr) to_scheduler();  // for good
}

inline void make_ready(Fiber* fiber) {
  if (dice() % 256 == 0) fiber->warp->priority = dice();
  ready.push({uint64_t{fiber->warp->priority} << 32 | (dice() & 0xffffffff), fiber});
}
inline void make_ready(std::vector<Fiber*>& waiting) {
  for (Fiber* fiber : waiting) make_ready(fiber);
  waiting.clear();
}
inline void wait_among(std::vector<Fiber*>& waiting, Place at) {
  waiting.push_back(current);
  current->waits_at = at;
  to_scheduler();
}

inline void finish_meeting(Warp& warp) {
  uint32_t ballot = 0;
  double highest = -INFINITY;
  for (int i = 0; i < 32; ++i) {
    if (!(warp.arrived >> i & 1)) continue;
    ballot |= uint32_t{warp.values[i] != 0} << i;
    highest = std::max(highest, warp.values[i]);
  }
  for (int i = 0; i < 32; ++i) {
    if (!(warp.arrived >> i & 1)) continue;
    warp.fibers[i]->ballot = ballot;
    warp.fibers[i]->highest = highest;
    warp.fibers[i]->shuffled = warp.values[warp.from_lanes[i] % 32];
    make_ready(warp.fibers[i]);
  }
  warp.arrived = 0;
}

// If all have come to it.
inline void finish_barrier(Cta& cta, int number, Place at) {
  const auto found = cta.barriers.find(number);
  if (found == cta.barriers.end()) return;
  Barrier& barrier = found->second;
  const bool is_of_all = barrier.expected == kAllThreads;
  if (barrier.count != (is_of_all ? cta.live : barrier.expected)) return;
  for (const auto& [warp, lanes] : barrier.lanes) {
    if (lanes != (is_of_all ? warp.first->live : ~0u)) fail("part of a warp at a barrier", at);
  }
  make_ready(barrier.waiting);
  cta.barriers.erase(found);
}

inline void come_to_cluster() {
  Cluster& cluster = *current->cta->cluster;
  current->has_arrived = true;
  if (--cluster.to_come == 0) make_ready(cluster.waiting);
}

inline void end_thread() {
  Cta& cta = *current->cta;
  Warp& warp = *current->warp;
  if (!current->copies.empty()) fail("a thread ends before its copy", current->copies[0].at);
  current->has_ended = true;
  warp.live &= ~(1u << current->lane);
  --cta.live;
  const bool is_awaited = warp.arrived != 0;
  if (is_awaited && warp.needs_all) fail("a lane ends while its warp waits for it", warp.at);
  if (is_awaited && warp.arrived == warp.live) finish_meeting(warp);
  finish_barrier(cta, 0, {});  // ended threads are no longer expected at __syncthreads
  if (cta.live == 0 && !cta.barriers.empty()) fail("a CTA ends with arrivals at a barrier", {});
  if (!current->has_arrived) come_to_cluster();
}

inline void run_threads() {
  for (;;) {
    (*kernel)();
    end_thread();
    to_scheduler();
  }
}

// Until it waits. Only a stack's first thread is started by setcontext: it takes a system call, and
// longjmp a tenth of the time.
inline void run_fiber(Fiber* fiber) {
  current = fiber;
  threadIdx.x = fiber->thread;
  blockIdx = fiber->cta->block;
  if (_setjmp(scheduler) == 0) {
    if (fiber->is_started) _longjmp(fiber->context, 1);
    fiber->is_started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = allocate(kStackSize);
    context.uc_stack.ss_size = kStackSize;
    makecontext(&context, run_threads, 0);
    setcontext(&context);
  }
  current = nullptr;
}

// Starts a CTA's threads in the fibers from this one on. Returns the one behind them.
inline size_t start_cta(Cta& cta, size_t next_fiber) {
  for (Warp& warp : cta.warps) warp.priority = dice();
  for (unsigned i = 0; i < cta.live; ++i, ++next_fiber) {
    if (next_fiber == fibers.size()) fibers.emplace_back(new Fiber);
    Fiber* const fiber = fibers[next_fiber].get();
    fiber->cta = &cta, fiber->warp = &cta.warps[i / 32];
    fiber->thread = i, fiber->lane = i % 32;
    fiber->has_ended = fiber->has_arrived = false;
    fiber->num_groups = 0;
    fiber->warp->fibers[i % 32] = fiber;
    make_ready(fiber);
  }
  cta.cluster->to_come += cta.live;
  return next_fiber;
}

// In clusters of so many CTAs.
inline void run(dim3 grid, unsigned threads, unsigned size, const std::function<void()>& thread) {
  kernel = &thread;
  const uint64_t columns = grid.x / size, count = columns * grid.y * grid.z;
  if (count == 0 || grid.x % size != 0 || threads % 32 != 0) return fail("a bad grid", {});
  std::vector<uint64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), dice);
  for (uint64_t next = 0; next < count && problem.empty();) {
    std::vector<std::unique_ptr<Cluster>> clusters;  // that run together
    size_t num_fibers = 0;
    for (uint64_t end = std::min(count, next + 1 + dice() % 4); next < end; ++next) {
      Cluster* const cluster = clusters.emplace_back(new Cluster).get();
      const uint64_t x = order[next] % columns, yz = order[next] / columns;
      for (unsigned rank = 0; rank < size; ++rank) {
        const dim3 block(x * size + rank, yz % grid.y, yz / grid.y);
        Cta* const cta = new Cta{cluster, rank, block, threads, std::vector<Warp>(threads / 32)};
        cluster->ctas.emplace_back(cta);
        num_fibers = start_cta(*cta, num_fibers);
      }
    }
    while (problem.empty() && !(ready.empty() && messages.empty())) {
      if (!messages.empty() && (ready.empty() || dice() % 8 == 0)) {
        std::swap(messages[dice() % messages.size()], messages.back());
        const auto deliver = std::move(messages.back());
        messages.pop_back();
        deliver();
      } else {
        Fiber* const fiber = ready.top().second;
        ready.pop();
        run_fiber(fiber);
      }
    }
    for (size_t i = 0; i < num_fibers; ++i) {
      threadIdx.x = fibers[i]->thread, blockIdx = fibers[i]->cta->block;
      if (!fibers[i]->has_ended) fail("deadlock: a thread waits", fibers[i]->waits_at);
    }
  }
}

inline void stop_at_signal(int signal) {
  std::printf("case of seed %s: %s%s\n", std::to_string(case_seed).c_str(),
              signal == SIGALRM ? "it does not end" : "a bad access", describe_turn().c_str());
  std::fflush(stdout);
  std::_Exit(1);
}

// Draws a device, and how its threads take turns.
inline void start_case(uint64_t seed) {
  std::signal(SIGSEGV, stop_at_signal);
  std::signal(SIGALRM, stop_at_signal);
  alarm(60);
  case_seed = seed;
  dice.seed(seed);
  has_clusters = dice() % 2 == 0;
  accesses_per_turn = 4u << 3 * (dice() % 3);
}

// ------------------------------------------------------------------------------ what threads call

// A kernel's only __shared__ variable.
template <class T>
T& shared() {
  static_assert(alignof(T) <= 16, "as much as memory of std::vector has");
  std::vector<uint32_t>& words = current->cta->shared;
  if (words.empty()) words.assign((sizeof(T) + 3) / 4, kPoison);
  return *reinterpret_cast<T*>(words.data());
}

// Others may have a turn before.
inline void access(const void* address, size_t alignment, Place at) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) fail("misaligned", at);
  if (dice() % accesses_per_turn != 0) return;
  make_ready(current);
  to_scheduler();
}

// `needs_all`: no lane may have ended.
inline Fiber* meet_warp(bool needs_all, uint32_t mask, double value, int from_lane, Place at) {
  Warp& warp = *current->warp;
  if (mask != ~0u) fail("a mask of part of a warp: the emulator knows none", at);
  if (needs_all && warp.live != ~0u) fail("some lanes of the warp have ended", at);
  if (warp.arrived == 0) warp.needs_all = needs_all, warp.at = at;
  const bool is_same_place = at.line == warp.at.line && at.file == warp.at.file;
  if (!is_same_place) fail("the lanes of a warp are at different places", at);
  warp.values[current->lane] = value;
  warp.from_lanes[current->lane] = from_lane;
  warp.arrived |= 1u << current->lane;
  current->waits_at = at;
  if (warp.arrived == warp.live) finish_meeting(warp);
  to_scheduler();
  return current;
}

// `waits`: or it only arrives.
inline void meet_cta(int number, unsigned threads, bool waits, Place at) {
  Cta& cta = *current->cta;
  Barrier& barrier = cta.barriers.try_emplace(number, Barrier{threads}).first->second;
  if (barrier.expected != threads) fail("a barrier of two numbers of threads", at);
  uint32_t& lanes = barrier.lanes[{current->warp, waits}];
  if (lanes >> current->lane & 1) fail("a thread comes to a barrier again", at);
  lanes |= 1u << current->lane;
  ++barrier.count;
  if (waits) barrier.waiting.push_back(current);
  current->waits_at = at;
  finish_barrier(cta, number, at);
  if (waits) to_scheduler();
}

inline void copy(void* to, const void* from, size_t size, Place at) {
  access(to, size, at);
  access(from, size, at);
  for (size_t i = 0; i < size; i += 4) std::memcpy(static_cast<char*>(to) + i, &kPoison, 4);
  std::function<void()> finish = [=] { std::memcpy(to, from, size); };
  if (dice() % 4 == 0) finish(), finish = [] {};
  current->copies.push_back({current->num_groups, finish, at});
}
inline void wait_for_copies(int pending) {
  auto& copies = current->copies;
  while (!copies.empty() && copies[0].group < current->num_groups - pending) {
    copies[0].finish();
    copies.erase(copies.begin());
  }
}

inline void arrive_at_cluster(Place at) {
  if (current->has_arrived) fail("arrives at a cluster's barrier again: there is one", at);
  come_to_cluster();
}
inline void wait_for_cluster(Place at) {
  Cluster& cluster = *current->cta->cluster;
  if (!current->has_arrived) fail("waits for a cluster before it arrives", at);
  if (cluster.to_come != 0) wait_among(cluster.waiting, at);
}

inline ptrdiff_t place_in_shared(const void* address) {
  return static_cast<const char*>(address) - reinterpret_cast<char*>(current->cta->shared.data());
}
inline void expect_bytes(const uint64_t* barrier, uint32_t bytes, Place at) {
  Cta& cta = *current->cta;
  if (cta.byte_barrier != -1) fail("expects bytes again: a CTA has one such barrier", at);
  cta.byte_barrier = place_in_shared(barrier);
  cta.bytes_to_come = bytes;
}
inline void wait_for_bytes(const uint64_t* barrier, Place at) {
  Cta& cta = *current->cta;
  if (cta.byte_barrier != place_in_shared(barrier)) fail("waits before the barrier is there", at);
  if (cta.bytes_to_come != 0) wait_among(cta.waiting_for_bytes, at);
}
inline void send(const float* to, float x, const uint64_t* barrier, uint32_t rank, Place at) {
  Cta& cta = *current->cta->cluster->ctas.at(rank);
  const ptrdiff_t there = place_in_shared(to), byte_barrier = place_in_shared(barrier);
  messages.push_back([=, &cta] {
    if (cta.live == 0) return fail("sent to a CTA that has ended", at);
    if (cta.byte_barrier != byte_barrier) return fail("sent before the barrier is there", at);
    std::memcpy(reinterpret_cast<char*>(cta.shared.data()) + there, &x, sizeof(x));
    cta.bytes_to_come -= sizeof(x);
    if (cta.bytes_to_come < 0) fail("more is sent than expected", at);
    if (cta.bytes_to_come == 0) make_ready(cta.waiting_for_bytes);
  });
}

}  // namespace emulator

// --------------------------------------------------------------------------- CUDA, in device code

using std::max, std::min;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
template <class T>
T __ldcs(const T* from) {
  return *from;
}
struct __nv_bfloat162 {
  jax_dsv4::bf16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {jax_dsv4::round_to<jax_dsv4::bf16>(low), jax_dsv4::round_to<jax_dsv4::bf16>(high)};
}
inline void __syncthreads(emulator::Place at = {}) {
  emulator::meet_cta(0, emulator::kAllThreads, true, at);
}
inline void __syncwarp(emulator::Place at = {}) { emulator::meet_warp(false, ~0u, 0, 0, at); }
template <class T>
T __shfl_sync(uint32_t mask, T x, int lane, emulator::Place at = {}) {
  return emulator::meet_warp(true, mask, x, lane, at)->shuffled;
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T x, int lanes, emulator::Place at = {}) {
  return emulator::meet_warp(true, mask, x, threadIdx.x ^ lanes, at)->shuffled;
}
template <class T>
T __shfl_up_sync(uint32_t mask, T x, unsigned lanes, emulator::Place at = {}) {
  const unsigned lane = threadIdx.x % 32;
  return emulator::meet_warp(true, mask, x, lane < lanes ? lane : lane - lanes, at)->shuffled;
}
inline int __reduce_max_sync(uint32_t mask, int x, emulator::Place at = {}) {
  return emulator::meet_warp(true, mask, x, 0, at)->highest;
}
inline bool __any_sync(uint32_t mask, bool x, emulator::Place at = {}) {
  return emulator::meet_warp(true, mask, x, 0, at)->ballot != 0;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline uint32_t __ballot_sync(uint32_t mask, bool x, emulator::Place at = {}) {
  return emulator::meet_warp(true, mask, x, 0, at)->ballot;
}

// ----------------------------------------------------------------------------- CUDA, on the host

using cudaStream_t = void*;
using cudaError_t = int;
enum { cudaSuccess, cudaErrorNotReady, cudaErrorUnknown };
enum { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum { cudaLaunchAttributeClusterDimension };
enum cudaDeviceAttr { cudaDevAttrClusterLaunch, cudaDevAttrMultiProcessorCount };
struct cudaLaunchAttribute {
  int id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
template <class... Params, class... Arguments>
void cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                        const Arguments&... arguments) {
  const unsigned cluster = config->numAttrs == 0 ? 1 : config->attrs->val.clusterDim.x;
  const std::tuple<Params...> params(arguments...);
  emulator::run(config->gridDim, config->blockDim.x, cluster, [&] { std::apply(kernel, params); });
}
inline cudaError_t cudaGetLastError() { return emulator::problem.empty() ? 0 : cudaErrorUnknown; }
inline const char* cudaGetErrorString(cudaError_t) { return emulator::problem.c_str(); }
inline cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
inline void cudaGetDevice(int*) {}
inline void cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrClusterLaunch ? emulator::has_clusters : 1;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t size, int) {
  std::memcpy(to, from, size);
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** to, size_t size) {
  *to = emulator::allocate(size);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* data) {
  const auto [begin, size] = emulator::allocations[data];
  if (data != nullptr) munmap(begin, size);
  emulator::allocations.erase(data);
  return cudaSuccess;
}
