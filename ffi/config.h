// What is compiled: THE list. The kernels' instantiation, the handlers' dispatch, Python's error
// texts, the README's support matrix and the tests' parametrisation all walk it. A new kind of
// compressor or dtype combination is one line here.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define JAX_DSV4_HD __host__ __device__ __forceinline__
#else
#define JAX_DSV4_HD inline
#endif

namespace jax_dsv4 {

template <class... Ts>
struct TypeList {
  static constexpr int64_t kSize = sizeof...(Ts);
};

// Element types. bf16 holds bits only; its conversions are in numeric.h.
struct bf16 {
  uint16_t bits;
};
using f32 = float;

enum class DType : uint8_t { kF32 = 11, kBF16 = 16 };  // XLA's numbers (operands.h)
template <class Element>
inline constexpr DType kDTypeOf = DType::kF32;
template <>
inline constexpr DType kDTypeOf<bf16> = DType::kBF16;

constexpr int64_t size_of(DType dtype) { return dtype == DType::kBF16 ? 2 : 4; }

// What a row of the state holds: the token's own kv and score, or the prefix of its window up to
// the row (prefix.h). A prefix is rounded once per row, and in less than f32 it would drift.
enum class StateFormat : uint8_t { kRaw, kPrefix };
inline constexpr const char* kStateFormatNames[] = {"raw", "prefix"};  // in their order
constexpr bool may_hold(DType state, StateFormat format) {
  return format == StateFormat::kRaw || state == DType::kF32;
}

// A kind of compressor. Windows that overlap reach back over the window before them.
template <int kHeadDim_, int kRatio_, bool kOverlap_>
struct Kind {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRatio = kRatio_;
  static constexpr bool kOverlap = kOverlap_;
  static constexpr int kStateDim = kOverlap ? 2 * kHeadDim : kHeadDim;
  static constexpr int kReducedRows = kOverlap ? 2 * kRatio : kRatio;  // rows behind one record
  static_assert(kRatio >= 1 && (kRatio & (kRatio - 1)) == 0,
                "compress_ratio: the kernels share a window's rows in halves, and mask positions; "
                "both need a power of two");
  static_assert(kHeadDim % 128 == 0, "head_dim: a warp takes 32 columns, or vectors of 4 of them");
};

template <class KvScore_, class State_, class Out_>
struct DTypes {
  using KvScore = KvScore_;
  using State = State_;
  using Out = Out_;
};

// One of each: what a kernel or a handler is instantiated for. kPlain: the call has kv_score in one
// array, and a state whose layer is known when it is launched. The CUDA kernels exist for such
// calls and for all others: an address that is known when they are compiled costs no register.
template <class Kind, class DTypes, bool kPlain_ = false>
struct Config : Kind, DTypes {
  using KindType = Kind;
  using Plain = Config<Kind, DTypes, true>;
  static constexpr bool kPlain = kPlain_;
};

// ------------------------------------------------------------------------------- the list itself

//                    head_dim, compress_ratio, overlap
using Kinds = TypeList<Kind<512, 4, true>,                           // CSA main
                       Kind<128, 4, true>,                           // CSA indexer
                       Kind<512, 128, false>,                        // HCA
                       Kind<128, 128, false>, Kind<512, 2, false>>;  // the generation after V4

//                          kv_score, state, kv_comp
using DTypesList = TypeList<DTypes<bf16, f32, bf16>,                            //
                            DTypes<bf16, f32, f32>,                             //
                            DTypes<bf16, bf16, bf16>, DTypes<bf16, bf16, f32>,  //
                            DTypes<f32, f32, bf16>,                             //
                            DTypes<f32, f32, f32>,                              //
                            DTypes<f32, bf16, bf16>,                            //
                            DTypes<f32, bf16, f32>>;

// Of records, and of CUDA kernels that know kv_comp's type at run time only.
using InnerDTypesList = TypeList<DTypes<bf16, f32, f32>, DTypes<bf16, bf16, f32>,
                                 DTypes<f32, f32, f32>, DTypes<f32, bf16, f32>>;

// ------------------------------------------------------------------------------------ walking it

// Calls visit(Item) on each until one returns true; false if none did.
template <class Visit, class... Items>
bool visit_any(TypeList<Items...>, Visit&& visit) {
  return (visit(Items{}) || ...);
}

// A configuration named at run time.
struct Selection {
  int64_t head_dim;
  int64_t compress_ratio;
  bool overlap;
  DType kv_score;
  DType state;
  DType out;

  int64_t state_dim() const { return overlap ? 2 * head_dim : head_dim; }

  template <class Kind>
  bool is_of(Kind) const {
    return Kind::kHeadDim == head_dim && Kind::kRatio == compress_ratio &&
           Kind::kOverlap == overlap;
  }
};

template <class Types>
bool is_of(const Selection& selection) {
  return kDTypeOf<typename Types::KvScore> == selection.kv_score &&
         kDTypeOf<typename Types::State> == selection.state &&
         kDTypeOf<typename Types::Out> == selection.out;
}

// Calls visit(Config) for the selected one, of this list of dtypes; false if it is not compiled.
template <class List = DTypesList, class Visit>
bool visit_config(const Selection& selection, Visit&& visit) {
  return visit_any(Kinds{}, [&](auto kind) {
    return selection.is_of(kind) && visit_any(List{}, [&](auto types) {
             using Types = decltype(types);
             if (!is_of<Types>(selection)) return false;
             visit(Config<decltype(kind), Types>{});
             return true;
           });
  });
}

}  // namespace jax_dsv4
