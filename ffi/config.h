// What is compiled. THE list of configurations: the CUDA kernels' instantiation, both handlers'
// dispatch, the error texts (here and in Python), the README's support matrix and the tests'
// parametrisation all walk it. A new shape, dtype combination or launch geometry is one line here.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define JAX_DSV4_HD __host__ __device__ __forceinline__
#else
#define JAX_DSV4_HD inline
#endif

namespace jax_dsv4 {

template <class... Ts>
struct TypeList {};

// Element types. bf16 holds bits only; its conversions are in numeric.h.
struct bf16 {
  uint16_t bits;
};
using f32 = float;

enum class DType : uint8_t { kBF16, kF32 };
template <class T>
inline constexpr DType kDTypeOf = DType::kF32;
template <>
inline constexpr DType kDTypeOf<bf16> = DType::kBF16;

// What a row of the state holds: the token's own kv and score, or the prefix of its window up to
// the row (numeric.h). A prefix is rounded once per row, and in less than f32 it would drift.
enum class StateFormat : uint8_t { kRaw, kPrefix };
inline constexpr const char* kStateFormatNames[] = {"raw", "prefix"};  // in their order
constexpr bool may_hold(DType state, StateFormat format) {
  return format == StateFormat::kRaw || state == DType::kF32;
}

// A kind of compressor. Overlap is the ratio's for now, but an idea of its own: the windows of an
// overlapping compressor reach back over the window before them.
template <int kHeadDim_, int kRatio_, bool kOverlap_>
struct Shape {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRatio = kRatio_;
  static constexpr bool kOverlap = kOverlap_;
  static constexpr int kStateDim = kOverlap ? 2 * kHeadDim : kHeadDim;
  static constexpr int kReducedRows = kOverlap ? 2 * kRatio : kRatio;  // rows behind one record
};

template <class KvScore_, class State_, class Out_>
struct DTypes {
  using KvScore = KvScore_;
  using State = State_;
  using Out = Out_;
};

// One of each: what a kernel or a handler is instantiated for.
template <class Shape, class DTypes>
struct Config : Shape, DTypes {};

// How one CTA shares the reduction of one window over one slice of columns (CUDA only). A lane
// always holds 16 bytes of a row.
//   kWarps        warps of the CTA
//   kLanes        lanes across the slice's columns; all of a CTA's sets of kLanes share the rows
//   kRowsPerStep  rows a lane has in flight at a time
//   kMinCtas      CTAs that should fit an SM: limits the registers
// A lane's rows must be on one page, so the page size must be a multiple of their number,
// kReducedRows kLanes / (32 kWarps).
template <int kWarps_, int kLanes_, int kRowsPerStep_, int kMinCtas_>
struct Geometry {
  static constexpr int kWarps = kWarps_;
  static constexpr int kLanes = kLanes_;
  static constexpr int kRowsPerStep = kRowsPerStep_;
  static constexpr int kMinCtas = kMinCtas_;
  static constexpr bool kBaseline = false;
};

// The reduction as it was before and after it was shared by four warps: one row at a time, its page
// looked up on the way (baseline.cuh). For benchmarks, to have something to compare with.
template <int kWarps>
struct RowAtATime : Geometry<kWarps, 32, 1, 1> {
  static constexpr bool kBaseline = true;
};

// ------------------------------------------------------------------------------- the list itself

//                    head_dim, compress_ratio, overlap
using Shapes = TypeList<Shape<512, 4, true>,     // CSA main
                        Shape<128, 4, true>,     // CSA indexer
                        Shape<512, 128, false>,  // HCA
                        Shape<128, 128, false>>;

//                          kv_score, state, kv_comp
using DTypesList = TypeList<DTypes<bf16, f32, bf16>,                            //
                            DTypes<bf16, f32, f32>,                             //
                            DTypes<bf16, bf16, bf16>, DTypes<bf16, bf16, f32>,  //
                            DTypes<f32, f32, bf16>,                             //
                            DTypes<f32, f32, f32>,                              //
                            DTypes<f32, bf16, bf16>,                            //
                            DTypes<f32, bf16, f32>>;

// The geometries of a ratio, by measurement on an H200 (benchmarks/notes.md). A call takes the
// first whose page size fits, of all of them, or from kFew on while requests x head_dim is at most
// kFewChannels.
template <int kRatio>
struct GeometriesOf;
template <>
struct GeometriesOf<4> {
  using List = TypeList<Geometry<4, 32, 2, 1>, Geometry<4, 16, 1, 1>>;
  static constexpr int kFew = 0;
  static constexpr int64_t kFewChannels = 0;
};
template <>
struct GeometriesOf<128> {
  using List = TypeList<Geometry<4, 16, 8, 4>, Geometry<8, 8, 4, 3>, Geometry<8, 2, 1, 1>,
                        RowAtATime<1>, RowAtATime<4>>;
  static constexpr int kFew = 1;
  static constexpr int64_t kFewChannels = 64 * 512;
};

// On a state of prefixes, up to so many requests x head_dim a warp takes one token, and beyond all.
inline constexpr int64_t kFewPrefixChannels = 24 * 512;

// ------------------------------------------------------------------------------------ walking it

// Calls visit(Shape) on each shape until one returns true; false if none did.
template <class Visit, class... S>
bool visit_any(TypeList<S...>, Visit&& visit) {
  return (visit(S{}) || ...);
}

template <class... Ts>
constexpr int64_t count_of(TypeList<Ts...>) {
  return sizeof...(Ts);
}

}  // namespace jax_dsv4
