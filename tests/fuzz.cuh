// What the fuzzes of the kernels share: drawing, operands, and comparing. Host code.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "config.h"
#include "numeric.h"

namespace jax_dsv4::fuzz {

// ------------------------------------------------------------------------------------- drawing

struct Draw {
  std::mt19937_64 engine;

  int64_t between(int64_t least, int64_t most) {
    return least + static_cast<int64_t>(engine() % static_cast<uint64_t>(most - least + 1));
  }
  bool chance(double p) { return static_cast<double>(engine() >> 11) * 0x1p-53 < p; }
  template <class T>
  T one_of(std::initializer_list<T> items) {
    return items.begin()[between(0, static_cast<int64_t>(items.size()) - 1)];
  }
};

// Numbers to copy from: to draw each anew would take most of the time.
class Noise {
 public:
  template <class Make>
  explicit Noise(Make make) : f32s_(kSize), bf16s_(kSize) {
    std::mt19937 engine(0);
    for (size_t i = 0; i < kSize; ++i) {
      f32s_[i] = make(engine);
      bf16s_[i] = round_to<bf16>(f32s_[i]);
    }
  }

  void fill(DType dtype, void* to, size_t count, Draw& draw) const {
    const size_t size = size_of(dtype);
    const void* const from = dtype == DType::kBF16 ? static_cast<const void*>(bf16s_.data())
                                                   : static_cast<const void*>(f32s_.data());
    size_t at = draw.between(0, kSize - 1);
    for (size_t done = 0; done < count; at = 0) {
      const size_t part = std::min(count - done, kSize - at);
      std::memcpy(static_cast<char*>(to) + done * size, static_cast<const char*>(from) + at * size,
                  part * size);
      done += part;
    }
  }

 private:
  static constexpr size_t kSize = (size_t{1} << 18) + 7;
  std::vector<float> f32s_;
  std::vector<bf16> bf16s_;
};

inline Noise normal(float scale, float mean = 0) {
  return Noise([=](auto& e) { return std::normal_distribution<float>(mean, scale)(e); });
}
// Of which so many are -inf.
inline Noise scores(float scale, double none) {
  return Noise([=](auto& e) {
    const float score = std::normal_distribution<float>(0, scale)(e);
    return std::uniform_real_distribution<>()(e) < none ? kNegInf : score;
  });
}

inline constexpr float kKvScales[] = {1.0f, 100.0f, 1e-3f};

struct RowNoises {
  Noise kv[3] = {normal(kKvScales[0]), normal(kKvScales[1]), normal(kKvScales[2])};
  Noise score[4] = {scores(1, 0), scores(6, 0), scores(1, 0.6), scores(1, 0.97)};
};

// An id that is no page; some of them are one if their rows or elements are counted in 32 bits.
inline int32_t bad_page(int64_t num_pages, int64_t page_size, int64_t row, Draw& draw) {
  const int64_t wraps = int64_t{1} << 32;
  for (;;) {
    const auto id = static_cast<int32_t>(draw.one_of<int64_t>(
        {-1, num_pages, num_pages + draw.between(0, 9), INT32_MAX, INT32_MIN,
         draw.between(INT32_MIN, INT32_MAX), wraps / page_size + draw.between(0, 2),
         wraps / (page_size * row) + draw.between(0, 2), wraps / 2 / page_size + 1}));
    if (id < 0 || id >= num_pages) return id;
  }
}

// So many entries as a table needs; or more, or fewer.
inline int64_t draw_max_pages(int64_t needed, Draw& draw) {
  const int64_t kind = draw.between(0, 99);
  if (kind < 65) return needed;
  if (kind < 78) return needed + draw.between(1, 20);
  if (kind < 86) return needed + draw.between(400, 700);  // no longer staged
  if (kind < 91) return draw.between(0, 1);
  return draw.between(0, needed);
}

inline Selection draw_selection(Draw& draw, int64_t index) {
  Selection s = {};
  int64_t i = 0;
  visit_any(Kinds{}, [&](auto kind) {
    if (i++ != index) return false;
    s = {kind.kHeadDim, kind.kRatio, kind.kOverlap, DType::kF32, DType::kF32, DType::kF32};
    return true;
  });
  s.kv_score = draw.one_of({DType::kBF16, DType::kF32});
  s.state = draw.one_of({DType::kBF16, DType::kF32, DType::kF32});
  return s;
}

// ---------------------------------------------------------------------------------------- operands

[[noreturn]] inline void stop(const std::string& problem) {
  std::printf("%s\n", problem.c_str());
  std::fflush(stdout);
  std::_Exit(1);
}

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) stop(std::string(what) + ": " + cudaGetErrorString(status));
}

// On the host and on the GPU.
class Operand {
 public:
  Operand() = default;
  Operand(const Operand&) = delete;
  ~Operand() { check(cudaFree(device_), "cudaFree"); }

  template <class T>
  T* make(size_t count) {
    host_.reserve(1);  // an address, even of nothing
    host_.resize(count * sizeof(T));
    return at<T>(false);
  }
  template <class T>
  T* at(bool on_gpu) {
    return static_cast<T*>(on_gpu ? device_ : host_.data());
  }
  size_t size() const { return host_.size(); }

  void upload() {
    if (host_.empty()) return;
    check(cudaMalloc(&device_, host_.size()), "cudaMalloc");
    check(cudaMemcpy(device_, host_.data(), host_.size(), cudaMemcpyHostToDevice), "upload");
  }
  std::vector<uint8_t> download() const {
    std::vector<uint8_t> bytes;
    bytes.reserve(1);
    bytes.resize(host_.size());
    if (!bytes.empty()) {
      check(cudaMemcpy(bytes.data(), device_, bytes.size(), cudaMemcpyDeviceToHost), "download");
    }
    return bytes;
  }

 private:
  std::vector<uint8_t> host_;
  void* device_ = nullptr;
};

inline void set_element(DType dtype, uint8_t* to, float x) {
  const bf16 rounded = round_to<bf16>(x);
  dtype == DType::kBF16 ? std::memcpy(to, &rounded, 2) : std::memcpy(to, &x, 4);
}
inline float element_at(DType dtype, const uint8_t* from) {
  if (dtype == DType::kBF16) {
    bf16 x;
    std::memcpy(&x, from, 2);
    return to_f32(x);
  }
  float x;
  std::memcpy(&x, from, 4);
  return x;
}

// A value that is not finite. Where it is in a row of kv, that row has a weight: else what becomes
// of it is not specified.
inline void add_special(DType dtype, int64_t S, uint8_t* kv, uint8_t* score, Draw& draw) {
  const float inf = -kNegInf, special = draw.one_of({std::nanf(""), inf, -inf});
  const int64_t at = draw.between(0, S - 1) * size_of(dtype);
  const bool in_kv = draw.chance(0.5);
  set_element(dtype, (in_kv ? kv : score) + at, special);
  if (in_kv && element_at(dtype, score + at) == kNegInf) set_element(dtype, score + at, 0);
}

// ------------------------------------------------------------------------------------------- names

template <class... Parts>
std::string text_of(const Parts&... parts) {
  std::ostringstream out;
  out.precision(9);
  (out << ... << parts);
  return out.str();
}

inline std::string name_of(const Selection& s) {
  const auto dtype = [](DType d) { return d == DType::kBF16 ? "bf16" : "f32"; };
  std::ostringstream out;
  out << s.head_dim << "/" << s.compress_ratio << (s.overlap ? " overlapping" : "") << " "
      << dtype(s.kv_score) << " -> " << dtype(s.state);
  return out.str();
}

template <class T>
std::string list_of(const std::vector<T>& items) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < items.size() && i < 40; ++i) out << (i == 0 ? "" : " ") << items[i];
  out << (items.size() > 40 ? " ...]" : "]");
  return out.str();
}

// --------------------------------------------------------------------------------------- comparing

inline bool both_finite(double x, double y) { return std::isfinite(x) && std::isfinite(y); }

// How far two values are apart over a tolerance: at most 1 is right. `lenient`: of values that are
// not finite, any may meet any.
inline double ratio_of(float got, float want, double tolerance, bool lenient) {
  if (got == want || (std::isnan(got) && std::isnan(want))) return 0;
  if (both_finite(got, want)) {
    const double difference = std::fabs(double{got} - double{want});
    return tolerance > 0 ? difference / tolerance : HUGE_VAL;
  }
  return lenient && !std::isfinite(got) && !std::isfinite(want) ? 0 : HUGE_VAL;
}

// ----------------------------------------------------------------------------------------- running

inline void wait(const std::string& title) {
  const auto start = std::chrono::steady_clock::now();
  for (;;) {
    const cudaError_t status = cudaStreamQuery(nullptr);
    if (status == cudaSuccess) return;
    if (status != cudaErrorNotReady) stop(title + "\n  " + cudaGetErrorString(status));
    if (std::chrono::steady_clock::now() - start > std::chrono::seconds(60)) {
      stop(title + "\n  the kernel does not end");
    }
  }
}

// Runs so many cases, or until some have failed: `[cases=5000] [seed=0]`. `run`(seed) says what is
// wrong, or nothing. Returns how many ran, and how many failed.
template <class Run>
std::pair<int64_t, int64_t> run_cases(int argc, char** argv, Run&& run) {
  const int64_t count = argc > 1 ? std::atoll(argv[1]) : 5000;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  constexpr int64_t kMostFailures = 10;
  int64_t failures = 0, done = 0;
  for (; done < count && failures < kMostFailures; ++done) {
    const std::string problem = run(seed + done);
    if (problem.empty()) continue;
    ++failures;
    std::printf("%s\n", problem.c_str());
    std::fflush(stdout);
  }
  return {done, failures};
}

}  // namespace jax_dsv4::fuzz
