// Loops of CPU handlers, compiled for each level of vector instructions, of which the processor's
// best is taken at run time. Every level gives the same bits: elements do not depend on each other,
// and nothing is contracted into fused operations (-ffp-contract=off).
#pragma once

#include <atomic>

namespace jax_dsv4 {

enum class VectorLevel : int { kBaseline, kX86V3, kX86V4 };
inline constexpr const char* kVectorLevelNames[] = {"baseline", "x86-64-v3", "x86-64-v4"};

inline VectorLevel best_vector_level() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return VectorLevel::kX86V4;
  }
  if (__builtin_cpu_supports("avx2")) return VectorLevel::kX86V3;
#endif
  return VectorLevel::kBaseline;
}

// The level that loops run at. Tests lower it.
inline std::atomic<VectorLevel>& vector_level() {
  static std::atomic<VectorLevel> level{best_vector_level()};
  return level;
}

// A function per level, into which all that the loop calls is inlined. Only these functions have
// the level's instructions: no linker can take one of them, or of what they call, for another.
template <auto kLoop, class... Args>
__attribute__((flatten)) void run_baseline(Args... args) {
  kLoop(args...);
}
#ifdef __x86_64__
template <auto kLoop, class... Args>
__attribute__((flatten, target("avx2"))) void run_x86_v3(Args... args) {
  kLoop(args...);
}
template <auto kLoop, class... Args>
__attribute__((flatten, target("avx512f,avx512bw,avx512dq,avx512vl"))) void run_x86_v4(
    Args... args) {
  kLoop(args...);
}
#endif

// kLoop(args...): a function whose time goes into loops over elements that compilers vectorise:
// without branches, with `__restrict` on what is written.
template <auto kLoop, class... Args>
void vectorized(Args... args) {
#ifdef __x86_64__
  switch (vector_level().load(std::memory_order_relaxed)) {
    case VectorLevel::kX86V4:
      return run_x86_v4<kLoop>(args...);
    case VectorLevel::kX86V3:
      return run_x86_v3<kLoop>(args...);
    default:
      break;
  }
#endif
  run_baseline<kLoop>(args...);
}

}  // namespace jax_dsv4
