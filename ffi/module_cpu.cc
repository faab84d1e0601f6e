// jax_dsv4._cpu: the CPU handler, and the list of configurations as Python reads it.

#include <iterator>

#include "config.h"
#include "module.h"

XLA_FFI_DECLARE_HANDLER_SYMBOL(PagedKvCompressCpu);

namespace jax_dsv4 {
namespace {

const char* name_of(DType dtype) { return dtype == DType::kBF16 ? "bfloat16" : "float32"; }

template <class Shape>
nb::list geometries_of() {
  nb::list out;
  visit_any(typename GeometriesOf<Shape::kRatio>::List{}, [&](auto g) {
    using G = decltype(g);
    out.append(nb::make_tuple(G::kWarps, G::kLanes, G::kRowsPerStep, G::kMinCtas, G::kBaseline));
    return false;
  });
  return out;
}

}  // namespace

NB_MODULE(_cpu, m) {
  export_handler(m, &PagedKvCompressCpu);

  nb::list shapes, dtypes;
  visit_any(Shapes{}, [&](auto s) {
    using S = decltype(s);
    shapes.append(nb::make_tuple(S::kHeadDim, S::kRatio, S::kOverlap, geometries_of<S>()));
    return false;
  });
  visit_any(DTypesList{}, [&](auto t) {
    using T = decltype(t);
    dtypes.append(nb::make_tuple(name_of(kDTypeOf<typename T::KvScore>),
                                 name_of(kDTypeOf<typename T::State>),
                                 name_of(kDTypeOf<typename T::Out>)));
    return false;
  });
  nb::list formats;
  for (size_t i = 0; i < std::size(kStateFormatNames); ++i) {
    nb::list states;
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      if (may_hold(dtype, static_cast<StateFormat>(i))) states.append(name_of(dtype));
    }
    formats.append(nb::make_tuple(kStateFormatNames[i], states));
  }
  m.attr("STATE_FORMATS") = formats;  // (name, dtypes of the state), by value of the attribute
  m.attr("SHAPES") = shapes;          // (head_dim, compress_ratio, overlap, geometries)
  m.attr("DTYPES") = dtypes;          // (kv_score, state, kv_comp)
}

}  // namespace jax_dsv4
