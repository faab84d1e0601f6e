// jax_dsv4._cpu: the CPU handlers, and the list of configurations as Python reads it.

#include <algorithm>
#include <iterator>

#include "config.h"
#include "module.h"
#include "record_pool.h"
#include "tuning.h"
#include "vectorized.h"

XLA_FFI_DECLARE_HANDLER_SYMBOL(PagedKvCompressCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(StoreRecordsCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(DequantizeRecordsCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(DecodeRecordsCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(RaggedKvCompressCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(RaggedRecordsCpu);

namespace jax_dsv4 {

NB_MODULE(_cpu, m) {
  export_handlers(m, &PagedKvCompressCpu, &StoreRecordsCpu, &DequantizeRecordsCpu,
                  &DecodeRecordsCpu, &RaggedKvCompressCpu, &RaggedRecordsCpu);

  const auto name_of = [](DType dtype) { return dtype == DType::kBF16 ? "bfloat16" : "float32"; };
  nb::list kinds, dtypes, formats;
  visit_any(Kinds{}, [&](auto kind) {
    using K = decltype(kind);
    nb::list geometries;
    visit_any(typename GeometriesOf<K>::List{}, [&](auto geometry) {
      using G = decltype(geometry);
      geometries.append(nb::make_tuple(G::kWarps, G::kLanes, G::kRowsInFlight, G::kMinCtas));
      return false;
    });
    kinds.append(nb::make_tuple(K::kHeadDim, K::kRatio, K::kOverlap, geometries));
    return false;
  });
  visit_any(DTypesList{}, [&](auto types) {
    using Types = decltype(types);
    dtypes.append(nb::make_tuple(name_of(kDTypeOf<typename Types::KvScore>),
                                 name_of(kDTypeOf<typename Types::State>),
                                 name_of(kDTypeOf<typename Types::Out>)));
    return false;
  });
  for (size_t i = 0; i < std::size(kStateFormatNames); ++i) {
    nb::list states;
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      if (may_hold(dtype, static_cast<StateFormat>(i))) states.append(name_of(dtype));
    }
    formats.append(nb::make_tuple(kStateFormatNames[i], states));
  }
  nb::list records;
  visit_any(Records{}, [&](auto record) {
    records.append(
        nb::make_tuple(kRecordFormatNames[static_cast<int>(record.kFormat)], record.kHeadDim));
    return false;
  });
  nb::list levels;
  for (int level = 0; level <= static_cast<int>(best_vector_level()); ++level) {
    levels.append(kVectorLevelNames[level]);
  }
  // By index of VECTOR_LEVELS. For tests: every level gives the same bits.
  m.def("set_vector_level", [](int level) {
    const int best = static_cast<int>(best_vector_level());
    vector_level() = static_cast<VectorLevel>(std::clamp(level, 0, best));
  });
  m.attr("VECTOR_LEVELS") = levels;   // that this processor has, the lowest first
  m.attr("RECORDS") = records;        // (format, head_dim) of the compiled kernels
  m.attr("STATE_FORMATS") = formats;  // (name, dtypes of the state), by value of the attribute
  m.attr("KINDS") = kinds;            // (head_dim, compress_ratio, overlap, geometries)
  m.attr("DTYPES") = dtypes;          // (kv_score, state, kv_comp)
}

}  // namespace jax_dsv4
