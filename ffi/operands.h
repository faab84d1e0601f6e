// Checks on a custom call's operands and results, whatever the operation. The Python wrapper checks
// the same at trace time with friendlier texts, but the calls are also reachable without it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <ostream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "config.h"
#include "xla/ffi/api/ffi.h"

XLA_FFI_REGISTER_ENUM_ATTR_DECODING(::jax_dsv4::DType);
XLA_FFI_REGISTER_ENUM_ATTR_DECODING(::jax_dsv4::StateFormat);

namespace jax_dsv4 {

namespace ffi = ::xla::ffi;

using Dims = std::vector<int64_t>;

inline constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();

inline Dims dims_of(ffi::AnyBuffer x) { return {x.dimensions().begin(), x.dimensions().end()}; }

inline Dims concatenate(Dims first, const Dims& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

// Or the largest int64 where that is less: an array of size 0 may have dimensions of any product.
inline int64_t product_of(const Dims& dims) {
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  int64_t product = 1;
  for (int64_t dim : dims) {
    if (dim == 0) return 0;
    product = product > kMax / dim ? kMax : product * dim;
  }
  return product;
}

inline std::ostream& operator<<(std::ostream& text, const Dims& dims) {
  text << '[';
  for (size_t i = 0; i < dims.size(); ++i) text << (i == 0 ? "" : ",") << dims[i];
  return text << ']';
}

constexpr ffi::DataType data_type_of(DType dtype) { return static_cast<ffi::DataType>(dtype); }
static_assert(data_type_of(DType::kBF16) == ffi::DataType::BF16 &&
              data_type_of(DType::kF32) == ffi::DataType::F32);

// An attribute may hold any number, also one that is no DType.
inline std::ostream& operator<<(std::ostream& text, DType dtype) {
  if (dtype == DType::kBF16) return text << "BF16";
  if (dtype == DType::kF32) return text << "F32";
  return text << "data type " << static_cast<int>(dtype);
}

// Checks a call's operands and results, each by the name that errors have for it, and keeps the
// first thing that is wrong. *G: any number of leading group dimensions.
class OperandChecker {
 public:
  explicit OperandChecker(const char* operation) : operation_(operation) {}

  // Whose operands are checked from here on, in front of errors: one of several that a call is for.
  void set_owner(std::string owner) { owner_ = std::move(owner); }

  // The text comes in parts, and is put together for an error only.
  template <class... Parts>
  void require(bool condition, const Parts&... parts) {
    if (condition || !ok()) return;
    std::ostringstream text;
    text << owner_;
    (text << ... << parts);
    error_ = text.str();
  }
  bool ok() const { return error_.empty(); }
  ffi::Error error() const { return ffi::Error::InvalidArgument(operation_ + ": " + error_); }

  void require_counts(ffi::RemainingArgs operands, size_t num_operands, ffi::RemainingRets results,
                      size_t num_results) {
    require(operands.size() == num_operands && results.size() == num_results, "expected ",
            num_operands, " operands and ", num_results, " results, got ", operands.size(), " and ",
            results.size());
  }

  // `x` must have a rank of at least that of `core`, the text of its dimensions.
  void require_rank(const char* name, ffi::AnyBuffer x, size_t rank, const char* core) {
    if (x.dimensions().size() >= rank) return;
    require(false, name, ": expected [..., ", core, "], got ", dims_of(x));
  }

  // The group dimensions, *G.
  void set_groups(Dims groups) { groups_ = std::move(groups); }
  int64_t num_groups() const { return product_of(groups_); }

  // `x` must be dtype[*G, *core].
  void per_group(const char* name, ffi::AnyBuffer x, ffi::DataType dtype, const Dims& core) {
    if (is_per_group(x, core) && x.element_type() == dtype) return;
    require(false, name, ": expected ", dtype, concatenate(groups_, core), ", got ",
            x.element_type(), dims_of(x));
  }

  // `x` must be dtype[*G, *core], or dtype[*1, *core] shared by the groups. Returns which.
  bool maybe_shared(const char* name, ffi::AnyBuffer x, ffi::DataType dtype, const Dims& core) {
    const bool per_group = is_per_group(x, core);
    if ((per_group || is_shared(x, core)) && x.element_type() == dtype) return per_group;
    require(false, name, ": expected ", dtype, concatenate(groups_, core), " or ",
            concatenate(Dims(groups_.size(), 1), core), ", got ", x.element_type(), dims_of(x));
    return per_group;
  }

  // A result that updates an operand must be the same memory.
  void aliases(const char* name, ffi::AnyBuffer operand, ffi::AnyBuffer result) {
    require(operand.untyped_data() == result.untyped_data(), name,
            ": the results must alias the operands (input_output_aliases)");
  }

 private:
  // In place: vectors of dimensions took half of the time of a check, which every call pays.
  bool ends_in(ffi::AnyBuffer x, const Dims& core) const {
    const auto dims = x.dimensions();
    return dims.size() == groups_.size() + core.size() &&
           std::equal(core.begin(), core.end(), dims.begin() + groups_.size());
  }
  bool is_per_group(ffi::AnyBuffer x, const Dims& core) const {
    return ends_in(x, core) && std::equal(groups_.begin(), groups_.end(), x.dimensions().begin());
  }
  bool is_shared(ffi::AnyBuffer x, const Dims& core) const {
    const auto begin = x.dimensions().begin();
    return ends_in(x, core) &&
           std::all_of(begin, begin + groups_.size(), [](int64_t dim) { return dim == 1; });
  }

  std::string operation_;
  std::string owner_;
  Dims groups_;
  std::string error_;
};

// The part of a handler's binding that all platforms share; `binding` holds the platform's
// contexts.
template <class Attributes, class Binding>
auto bind_call(Binding binding) {
  return std::move(binding).RemainingArgs().RemainingRets().template Attrs<Attributes>();
}

}  // namespace jax_dsv4
