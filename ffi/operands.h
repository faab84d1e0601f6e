// The custom call's operands, results and attributes, and every check on them: shared by the CPU
// and CUDA handlers. The Python wrapper checks the same at trace time with friendlier texts, but
// the call is also reachable without it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <iterator>
#include <limits>
#include <numeric>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "config.h"
#include "decode.h"
#include "xla/ffi/api/ffi.h"

XLA_FFI_REGISTER_ENUM_ATTR_DECODING(::xla::ffi::DataType);
XLA_FFI_REGISTER_ENUM_ATTR_DECODING(::jax_dsv4::StateFormat);

namespace jax_dsv4 {

namespace ffi = ::xla::ffi;

// In the order of the custom call. *G: any number of leading group dimensions; a read-only operand
// has either the state's, or all ones where the groups share it.
struct Operands {
  ffi::AnyBuffer kv;            // [*G, num_pages, page_size, S]  state
  ffi::AnyBuffer score;         // [*G, num_pages, page_size, S]  state
  ffi::AnyBuffer kv_score;      // [*G, B, next_n, 2 S]
  ffi::AnyBuffer ape;           // [*G, R, S] f32, or [*G, 0, S]: no bias
  ffi::AnyBuffer kv_tables;     // [*G, B, max_pages] i32
  ffi::AnyBuffer score_tables;  // [*G, B, max_pages] i32
  ffi::AnyBuffer kv_lens;       // [*G, B] i32
  ffi::AnyBuffer q_lens;        // [*G, B] i32, or [*G, 0]: next_n for every request
  ffi::AnyBuffer kv_out;        // aliases kv
  ffi::AnyBuffer score_out;     // aliases score
  ffi::AnyBuffer kv_comp;       // [*G, B, ceil(next_n / R), D]
};

struct Attributes {
  int64_t compress_ratio;
  int64_t next_n;
  ffi::DataType kv_score_dtype;
  StateFormat state_format;
  ffi::DataType state_dtype;
  ffi::DataType out_dtype;
  int64_t geometry;  // index into GeometriesOf<compress_ratio>::List; kAutoGeometry: ours to choose
};
inline constexpr int64_t kAutoGeometry = -1;

// The part of a handler's binding that both platforms share; `binding` holds the platform's
// contexts.
template <class Binding>
auto bind_decode(Binding binding) {
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()  // kv
      .template Arg<ffi::AnyBuffer>()  // score
      .template Arg<ffi::AnyBuffer>()  // kv_score
      .template Arg<ffi::AnyBuffer>()  // ape
      .template Arg<ffi::AnyBuffer>()  // kv_tables
      .template Arg<ffi::AnyBuffer>()  // score_tables
      .template Arg<ffi::AnyBuffer>()  // kv_lens
      .template Arg<ffi::AnyBuffer>()  // q_lens
      .template Ret<ffi::AnyBuffer>()  // kv_out
      .template Ret<ffi::AnyBuffer>()  // score_out
      .template Ret<ffi::AnyBuffer>()  // kv_comp
      .template Attr<int64_t>("compress_ratio")
      .template Attr<int64_t>("next_n")
      .template Attr<ffi::DataType>("kv_score_dtype")
      .template Attr<StateFormat>("state_format")
      .template Attr<ffi::DataType>("state_dtype")
      .template Attr<ffi::DataType>("out_dtype")
      .template Attr<int64_t>("geometry");
}

struct DecodeCall {
  Operands operands;
  Attributes attributes;
};

// The arguments of a handler bound so, after the platform's contexts.
inline DecodeCall decode_call(ffi::AnyBuffer kv, ffi::AnyBuffer score, ffi::AnyBuffer kv_score,
                              ffi::AnyBuffer ape, ffi::AnyBuffer kv_tables,
                              ffi::AnyBuffer score_tables, ffi::AnyBuffer kv_lens,
                              ffi::AnyBuffer q_lens, ffi::Result<ffi::AnyBuffer> kv_out,
                              ffi::Result<ffi::AnyBuffer> score_out,
                              ffi::Result<ffi::AnyBuffer> kv_comp, int64_t compress_ratio,
                              int64_t next_n, ffi::DataType kv_score_dtype,
                              StateFormat state_format, ffi::DataType state_dtype,
                              ffi::DataType out_dtype, int64_t geometry) {
  return {{kv, score, kv_score, ape, kv_tables, score_tables, kv_lens, q_lens, *kv_out, *score_out,
           *kv_comp},
          {compress_ratio, next_n, kv_score_dtype, state_format, state_dtype, out_dtype, geometry}};
}

inline std::string dims_text(const std::vector<int64_t>& dims) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < dims.size(); ++i) text << (i ? "," : "") << dims[i];
  text << ']';
  return text.str();
}

// Collects the first thing that is wrong.
class OperandChecker {
 public:
  void require(bool condition, const std::string& text) {
    if (!condition && error_.empty()) error_ = text;
  }

  // The state's group dimensions, *G.
  void set_leading(std::vector<int64_t> leading) { leading_ = std::move(leading); }

  // `x` must be dtype[*G, *core].
  void per_group(const char* name, ffi::AnyBuffer x, ffi::DataType dtype,
                 std::vector<int64_t> core) {
    const std::vector<int64_t> want = with_leading(leading_, core);
    require(x.element_type() == dtype && dims_of(x) == want,
            text_of(name, x, dtype, dims_text(want)));
  }

  // `x` must be dtype[*G, *core], or dtype[*1, *core] shared by the groups. Returns which.
  bool maybe_shared(const char* name, ffi::AnyBuffer x, ffi::DataType dtype,
                    std::vector<int64_t> core) {
    const std::vector<int64_t> want = with_leading(leading_, core);
    const std::vector<int64_t> shared =
        with_leading(std::vector<int64_t>(leading_.size(), 1), core);
    const bool is_per_group = dims_of(x) == want;
    require(x.element_type() == dtype && (is_per_group || dims_of(x) == shared),
            text_of(name, x, dtype, dims_text(want) + " or " + dims_text(shared)));
    return is_per_group;
  }

  bool ok() const { return error_.empty(); }
  ffi::Error error() const { return ffi::Error::InvalidArgument("paged_kv_compress: " + error_); }

 private:
  static std::vector<int64_t> dims_of(ffi::AnyBuffer x) {
    return {x.dimensions().begin(), x.dimensions().end()};
  }
  static std::vector<int64_t> with_leading(std::vector<int64_t> leading,
                                           const std::vector<int64_t>& core) {
    leading.insert(leading.end(), core.begin(), core.end());
    return leading;
  }
  static std::string text_of(const char* name, ffi::AnyBuffer x, ffi::DataType dtype,
                             const std::string& want) {
    std::ostringstream text;
    text << name << ": expected " << dtype << want << ", got " << x.element_type()
         << dims_text(dims_of(x));
    return text.str();
  }

  std::vector<int64_t> leading_;
  std::string error_;
};

inline ffi::DataType data_type_of(DType dtype) {
  return dtype == DType::kBF16 ? ffi::DataType::BF16 : ffi::DataType::F32;
}

// Calls visit(Config) for the compiled configuration that the attributes and D name; false if there
// is none.
template <class Visit>
bool visit_config(const Attributes& a, int64_t head_dim, Visit&& visit) {
  return visit_any(Shapes{}, [&](auto shape) {
    using S = decltype(shape);
    if (S::kHeadDim != head_dim || S::kRatio != a.compress_ratio) return false;
    return visit_any(DTypesList{}, [&](auto dtypes) {
      using T = decltype(dtypes);
      if (data_type_of(kDTypeOf<typename T::KvScore>) != a.kv_score_dtype ||
          data_type_of(kDTypeOf<typename T::State>) != a.state_dtype ||
          data_type_of(kDTypeOf<typename T::Out>) != a.out_dtype) {
        return false;
      }
      visit(Config<S, T>{});
      return true;
    });
  });
}

// XLA's operator<< is undefined for a value that is no DataType, which an attribute may hold.
inline std::string dtype_text(ffi::DataType dtype) {
  if (dtype == ffi::DataType::BF16) return "BF16";
  if (dtype == ffi::DataType::F32) return "F32";
  return "data type " + std::to_string(static_cast<int>(dtype));
}

inline std::string unsupported_text(const Attributes& a, int64_t head_dim) {
  std::ostringstream text;
  text << "no compiled configuration for head_dim " << head_dim << ", compress_ratio "
       << a.compress_ratio << ", kv_score " << dtype_text(a.kv_score_dtype) << ", state "
       << dtype_text(a.state_dtype) << ", kv_comp " << dtype_text(a.out_dtype)
       << "; head_dim/compress_ratio are compiled for";
  visit_any(Shapes{}, [&](auto s) {
    text << ' ' << decltype(s)::kHeadDim << '/' << decltype(s)::kRatio;
    return false;
  });
  text << ", kv_score/state/kv_comp for";
  visit_any(DTypesList{}, [&](auto t) {
    using T = decltype(t);
    text << ' ' << data_type_of(kDTypeOf<typename T::KvScore>) << '/'
         << data_type_of(kDTypeOf<typename T::State>) << '/'
         << data_type_of(kDTypeOf<typename T::Out>);
    return false;
  });
  return text.str();
}

// Checks everything, then calls run(Config, DecodeParams) unless there is no request at all.
template <class Run>
ffi::Error check_and_run(const DecodeCall& call, Run&& run) {
  const Operands& o = call.operands;
  const Attributes& a = call.attributes;
  constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();
  constexpr int64_t kMaxRows = (int64_t{1} << 32) - 16;  // kNowhere is none of them
  const auto dims = o.kv.dimensions();
  const auto rank = [](ffi::AnyBuffer x) { return x.dimensions().size(); };
  OperandChecker check;
  check.require(rank(o.kv) >= 3, "state.kv: expected [..., num_pages, page_size, state_dim]");
  check.require(rank(o.kv_lens) >= 1, "kv_lens: expected [..., batch]");
  check.require(rank(o.kv_tables) >= 2, "kv_tables: expected [..., batch, max_pages]");
  check.require(rank(o.ape) >= 2, "ape: expected [..., compress_ratio, state_dim]");
  check.require(rank(o.q_lens) >= 1, "q_lens: expected [..., batch]");
  check.require(rank(o.kv_comp) >= 2, "kv_comp: expected [..., batch, num_windows, head_dim]");
  check.require(a.next_n >= 1 && a.next_n <= kInt32Max, "next_n: expected 1 to 2^31 - 1");
  check.require(static_cast<size_t>(a.state_format) < std::size(kStateFormatNames),
                "state_format: expected 0 (raw) or 1 (prefix)");
  if (!check.ok()) return check.error();

  check.set_leading({dims.begin(), dims.end() - 3});
  const int64_t num_pages = dims[dims.size() - 3], page_size = dims[dims.size() - 2];
  const int64_t batch = o.kv_lens.dimensions().back();
  const int64_t max_pages = o.kv_tables.dimensions().back();
  const bool has_ape = o.ape.dimensions()[rank(o.ape) - 2] != 0;
  const bool has_q_lens = o.q_lens.dimensions().back() != 0;
  const int64_t groups =
      std::accumulate(dims.begin(), dims.end() - 3, int64_t{1}, std::multiplies<int64_t>());
  ffi::Error outcome;
  const auto check_shapes = [&](auto config) {
    using C = decltype(config);
    constexpr int64_t S = C::kStateDim;
    constexpr auto kI32 = ffi::DataType::S32;
    const int64_t num_windows = (a.next_n + C::kRatio - 1) / C::kRatio;

    DecodeParams p;
    check.require(
        may_hold(kDTypeOf<typename C::State>, a.state_format),
        "state_dtype: expected F32 in this state_format, got " + dtype_text(a.state_dtype));
    check.per_group("state.kv", o.kv, a.state_dtype, {num_pages, page_size, S});
    check.per_group("state.score", o.score, a.state_dtype, {num_pages, page_size, S});
    const auto stride = [&](bool per_group) {
      return per_group ? static_cast<uint32_t>(batch) : 0;
    };
    p.kv_score_stride = stride(
        check.maybe_shared("kv_score", o.kv_score, a.kv_score_dtype, {batch, a.next_n, 2 * S}));
    p.ape_stride =
        check.maybe_shared("ape", o.ape, ffi::DataType::F32, {has_ape ? C::kRatio : 0, S});
    p.kv_tables_stride =
        stride(check.maybe_shared("kv_tables", o.kv_tables, kI32, {batch, max_pages}));
    p.score_tables_stride =
        stride(check.maybe_shared("score_tables", o.score_tables, kI32, {batch, max_pages}));
    p.kv_lens_stride = stride(check.maybe_shared("kv_lens", o.kv_lens, kI32, {batch}));
    p.q_lens_stride =
        stride(check.maybe_shared("q_lens", o.q_lens, kI32, {has_q_lens ? batch : 0}));
    check.per_group("state.kv result", o.kv_out, a.state_dtype, {num_pages, page_size, S});
    check.per_group("state.score result", o.score_out, a.state_dtype, {num_pages, page_size, S});
    check.per_group("kv_comp", o.kv_comp, a.out_dtype, {batch, num_windows, C::kHeadDim});
    check.require(o.kv.untyped_data() == o.kv_out.untyped_data() &&
                      o.score.untyped_data() == o.score_out.untyped_data(),
                  "state: the results must alias the operands (input_output_aliases {0: 0, 1: 1})");
    check.require(a.geometry >= kAutoGeometry &&
                      a.geometry < count_of(typename GeometriesOf<C::kRatio>::List{}),
                  "geometry: expected -1, or the index of one that is compiled");
    check.require(page_size >= 1 && page_size <= kInt32Max, "page_size: expected 1 to 2^31 - 1");
    check.require(groups * batch <= kInt32Max && max_pages <= kInt32Max,
                  "kv_tables: requests and max_pages must be below 2^31");
    check.require(num_pages * page_size <= kMaxRows / std::max<int64_t>(groups, 1),
                  "state: more than 2^32 - 16 rows");
    if (!check.ok() || groups * batch == 0) return;

    p.kv = o.kv.untyped_data();
    p.score = o.score.untyped_data();
    p.kv_score = o.kv_score.untyped_data();
    p.ape = has_ape ? static_cast<const float*>(o.ape.untyped_data()) : nullptr;
    p.kv_tables = static_cast<const int32_t*>(o.kv_tables.untyped_data());
    p.score_tables = static_cast<const int32_t*>(o.score_tables.untyped_data());
    p.kv_lens = static_cast<const int32_t*>(o.kv_lens.untyped_data());
    p.q_lens = has_q_lens ? static_cast<const int32_t*>(o.q_lens.untyped_data()) : nullptr;
    p.kv_comp = o.kv_comp.untyped_data();
    p.num_groups = static_cast<uint32_t>(groups);
    p.batch = static_cast<uint32_t>(batch);
    p.rows_per_pool = static_cast<uint32_t>(num_pages * page_size);
    p.next_n = static_cast<int32_t>(a.next_n);
    p.num_windows = static_cast<int32_t>(num_windows);
    p.paging.page_size = Divisor(static_cast<uint32_t>(page_size));
    p.paging.num_pages = static_cast<uint32_t>(std::min(num_pages, kInt32Max + 1));
    p.paging.max_pages = static_cast<uint32_t>(max_pages);
    outcome = run(config, p);
  };
  const int64_t head_dim = o.kv_comp.dimensions().back();
  check.require(visit_config(a, head_dim, check_shapes), unsupported_text(a, head_dim));
  return check.ok() ? outcome : check.error();
}

}  // namespace jax_dsv4
