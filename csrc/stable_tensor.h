// Tensors of torch's stable ABI as the compiled kernels want them: argument checks whose errors name the argument, what
// was expected and what came (std::invalid_argument, in Python a ValueError), and the memory layout of results, the
// same as in quantops/layout.py. Nothing here knows a device; the CPU and the CUDA library both include it.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <iomanip>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace quantops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// ---------------------------------------------------------------------------------------------------------- errors

template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// The parts of the message are evaluated only where the check fails.
#define QUANTOPS_CHECK(ok, ...)               \
  do {                                        \
    if (!(ok)) ::quantops::fail(__VA_ARGS__); \
  } while (0)

inline std::string dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Byte:
      return "uint8";
    default:
      return torch::headeronly::toString(t);
  }
}

inline std::string numbers(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  text << (values.size() == 1 ? ",)" : ")");
  return text.str();
}

struct DeviceId {
  int32_t type, index;
  bool operator==(const DeviceId& o) const { return type == o.type && index == o.index; }
};

inline DeviceId device_of(const Tensor& t) {
  DeviceId d;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &d.type));
  d.index = t.get_device_index();
  return d;
}

inline std::string device_name(const Tensor& t) {
  DeviceId d = device_of(t);
  if (d.type == aoti_torch_device_type_cpu()) return "cpu";
  if (d.type == aoti_torch_device_type_meta()) return "meta";
  return (d.type == aoti_torch_device_type_cuda() ? "cuda:" : "device:") + std::to_string(d.index);
}

// "w[3]", or "w" for the only entry of a list.
inline std::string entry_name(const char* name, size_t i, size_t count) {
  return count == 1 ? name : std::string(name) + "[" + std::to_string(i) + "]";
}

// ---------------------------------------------------------------------------------------------------------- dtypes

constexpr std::initializer_list<ScalarType> kFloats = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half,
                                                       ScalarType::Double};

inline bool is_float(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half || t == ScalarType::Double;
}

// The dtype of all arithmetic on weights of dtype t, and of their scales.
inline ScalarType acc_type(ScalarType t) { return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// ---------------------------------------------------------------------------------------------------------- layout

// True where t fills its memory without gaps or overlaps and dim 0 is outermost, so that a row is one run of memory.
inline bool dense_rows(const Tensor& t) {
  if (t.is_contiguous()) return true;
  auto sizes = t.sizes(), strides = t.strides();
  std::vector<size_t> order;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1) order.push_back(d);
  // Equal strides stay in order. Not std::stable_sort: with libstdc++ 12, clang says that it is deprecated.
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return strides[a] != strides[b] ? strides[a] > strides[b] : a < b; });
  if (order.empty() || (sizes[0] != 1 && order[0] != 0)) return false;
  int64_t expected = 1;
  for (auto d = order.rbegin(); d != order.rend(); ++d) {
    if (strides[*d] != expected) return false;
    expected *= sizes[*d];
  }
  return true;
}

// The same places of memory hold the same elements. Strides of dims of one element say nothing.
inline bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  auto sizes = a.sizes(), sa = a.strides(), sb = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1 && sa[d] != sb[d]) return false;
  return true;
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  auto sa = a.sizes(), sb = b.sizes();
  return sa.size() == sb.size() && std::equal(sa.begin(), sa.end(), sb.begin());
}

inline Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType dtype,
                            const Tensor& device_like) {
  DeviceId d = device_of(device_like);
  int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle result;
  if (aoti_torch_empty_strided(dim, sizes, strides, code, d.type, d.index, &result) != TORCH_SUCCESS) {
    double bytes = aoti_torch_dtype_element_size(code);  // may be more than an integer holds
    for (int64_t d = 0; d < dim; ++d) bytes *= sizes[d];
    std::ostringstream text;
    text << "out of memory: could not allocate " << std::fixed << std::setprecision(0) << bytes
         << " bytes for a result of dtype " << dtype_name(dtype) << " and shape "
         << numbers({sizes, static_cast<size_t>(dim)}) << " on " << device_name(device_like);
    throw std::runtime_error(text.str());
  }
  return Tensor(result);
}

// Uninitialised, one dimension of n elements, on the device of `device_like`.
inline Tensor empty_vector(int64_t n, ScalarType dtype, const Tensor& device_like) {
  int64_t stride = 1;
  return empty_strided(&n, &stride, 1, dtype, device_like);
}

// Uninitialised, of t's shape, in the layout of dense(t).
inline Tensor empty_like(const Tensor& t, ScalarType dtype) {
  auto sizes = t.sizes();
  if (dense_rows(t)) return empty_strided(sizes.data(), t.strides().data(), t.dim(), dtype, t);
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
  return empty_strided(sizes.data(), strides.data(), t.dim(), dtype, t);
}

inline Tensors empty_like(const Tensors& list, ScalarType dtype) {
  Tensors result;
  result.reserve(list.size());
  for (const Tensor& t : list) result.push_back(empty_like(t, dtype));
  return result;
}

// t itself where its rows are dense, else a contiguous copy.
inline Tensor dense(const Tensor& t) {
  if (dense_rows(t)) return t;
  Tensor copy = empty_like(t, t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

inline Tensors dense(const Tensors& list) {
  Tensors result;
  result.reserve(list.size());
  for (const Tensor& t : list) result.push_back(dense(t));
  return result;
}

// t itself where it is laid out as `like`, which is dense, else a copy that is.
inline Tensor in_layout_of(const Tensor& t, const Tensor& like) {
  if (same_layout(t, like)) return t;
  Tensor copy = empty_like(like, t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

// What one scale covers: `rows` scales of `inner` elements each, contiguous runs of the memory of a dense w.
struct Rows {
  int64_t rows, inner;
};

inline Rows rows_of(const Tensor& w, bool per_row) {
  int64_t rows = per_row && w.dim() > 0 ? w.size(0) : 1;
  return {rows, rows ? w.numel() / rows : 0};
}

inline Rows rows_of(const Tensor& w, const Tensor& scale) { return rows_of(w, scale.numel() != 1); }

// ---------------------------------------------------------------------------------------------------------- checks

// A list of tensors that share one of the `allowed` dtypes and a device; gives back the dtype.
inline ScalarType check_list(const char* name, const Tensors& list, std::initializer_list<ScalarType> allowed) {
  QUANTOPS_CHECK(!list.empty(), name, ": expected a non-empty list of tensors, got length 0");
  ScalarType dtype = list[0].scalar_type();
  DeviceId device = device_of(list[0]);
  if (std::find(allowed.begin(), allowed.end(), dtype) == allowed.end()) {
    std::string names;
    for (ScalarType t : allowed) names += (names.empty() ? "" : ", ") + dtype_name(t);
    fail(entry_name(name, 0, list.size()), ": expected dtype ", names, ", got ", dtype_name(dtype));
  }
  for (size_t i = 1; i < list.size(); ++i) {
    QUANTOPS_CHECK(list[i].scalar_type() == dtype, name, ": expected one dtype, got ", dtype_name(dtype),
                   " in entry 0 and ", dtype_name(list[i].scalar_type()), " in entry ", i);
    QUANTOPS_CHECK(device_of(list[i]) == device, name, ": expected one device, got ", device_name(list[0]),
                   " in entry 0 and ", device_name(list[i]), " in entry ", i);
  }
  return dtype;
}

// A tensor of floats whose order of memory another follows; ``why`` it is expected to be dense.
inline void check_dense(const char* name, const Tensor& t, const char* why) {
  check_list(name, {t}, kFloats);
  QUANTOPS_CHECK(dense_rows(t), name, ": expected a dense tensor, ", why, ", got strides ", numbers(t.strides()));
}

// One entry for each weight.
inline void check_count(const char* name, const Tensors& list, const Tensors& w) {
  QUANTOPS_CHECK(list.size() == w.size(), name, ": expected a list with one entry per weight (", w.size(), "), got ",
                 list.size());
}

// One contiguous scale per weight, of one element or one per row.
inline void check_scales(const Tensors& scale, const Tensors& w, ScalarType dtype, const char* argument = "scale") {
  check_count(argument, scale, w);
  DeviceId device = device_of(w[0]);
  for (size_t i = 0; i < w.size(); ++i) {
    const Tensor& s = scale[i];
    auto name = [&] { return entry_name(argument, i, w.size()); };
    QUANTOPS_CHECK(s.scalar_type() == dtype, name(), ": expected dtype ", dtype_name(dtype), ", got ",
                   dtype_name(s.scalar_type()));
    QUANTOPS_CHECK(device_of(s) == device, name(), ": expected device ", device_name(w[0]),
                   ", where the weights are, got ", device_name(s));
    int64_t rows = w[i].dim() ? w[i].size(0) : 1;
    QUANTOPS_CHECK(s.numel() == 1 || (s.numel() == rows && s.size(0) == rows), name(),
                   ": expected one element or one per row (", rows, ") of a weight of shape ", numbers(w[i].sizes()),
                   ", got shape ", numbers(s.sizes()));
    QUANTOPS_CHECK(s.is_contiguous(), name(), ": expected a contiguous tensor, got strides ", numbers(s.strides()));
  }
}

// Whether one tensor holds a scale for each of several weights.
inline bool are_joined(const Tensors& scale, const Tensors& w) {
  return scale.size() == 1 && w.size() > 1 && scale[0].numel() == static_cast<int64_t>(w.size());
}

// `t` as a contiguous tensor with one element for each of `count` weights, on the device of w.
inline Tensor check_per_weight(const char* name, const Tensor& t, int64_t count, ScalarType dtype, const Tensor& w) {
  QUANTOPS_CHECK(t.scalar_type() == dtype, name, ": expected dtype ", dtype_name(dtype), ", got ",
                 dtype_name(t.scalar_type()));
  QUANTOPS_CHECK(t.numel() == count, name, ": expected ", count, " element", count == 1 ? "" : "s, one per weight",
                 ", got shape ", numbers(t.sizes()));
  QUANTOPS_CHECK(device_of(t) == device_of(w), name, ": expected device ", device_name(w),
                 ", where the weights are, got ", device_name(t));
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// As check_per_weight, for a tensor that is written: it must be contiguous as it is.
inline void check_result(const char* name, const Tensor& t, int64_t count, ScalarType dtype, const Tensor& w) {
  QUANTOPS_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor, got strides ", numbers(t.strides()));
  check_per_weight(name, t, count, dtype, w);
}

// What one scale covers, and where a weight's scales are.
struct Scaled {
  Rows rows;
  const void* scale;
};

// The scales of a list, as check_scales expects them or in one tensor for all.
inline std::vector<Scaled> check_scaled(const Tensors& scale, const Tensors& w, ScalarType dtype) {
  std::vector<Scaled> found;
  found.reserve(w.size());
  if (are_joined(scale, w)) {
    check_result("scale", scale[0], static_cast<int64_t>(w.size()), dtype, w[0]);
    const char* at = static_cast<const char*>(scale[0].data_ptr());
    for (const Tensor& t : w) {
      found.push_back({rows_of(t, false), at});
      at += scale[0].element_size();
    }
    return found;
  }
  check_scales(scale, w, dtype);
  for (size_t i = 0; i < w.size(); ++i) found.push_back({rows_of(w[i], scale[i]), scale[i].data_ptr()});
  return found;
}

// A list that matches w one to one in shape and device; gives back its dtype.
inline ScalarType check_like(const char* name, const Tensors& list, const Tensors& w,
                             std::initializer_list<ScalarType> allowed) {
  check_count(name, list, w);
  ScalarType dtype = check_list(name, list, allowed);
  QUANTOPS_CHECK(device_of(list[0]) == device_of(w[0]), name, ": expected device ", device_name(w[0]),
                 ", where the weights are, got ", device_name(list[0]));
  for (size_t i = 0; i < w.size(); ++i)
    QUANTOPS_CHECK(same_shape(list[i], w[i]), entry_name(name, i, w.size()), ": expected the weight's shape ",
                   numbers(w[i].sizes()), ", got ", numbers(list[i].sizes()));
  return dtype;
}

// As check_like, for tensors that are written: each must have the layout that dense(w) has. `dense_w` is that list.
inline ScalarType check_results(const char* name, const Tensors& list, const Tensors& dense_w,
                                std::initializer_list<ScalarType> allowed) {
  ScalarType dtype = check_like(name, list, dense_w, allowed);
  for (size_t i = 0; i < list.size(); ++i)
    QUANTOPS_CHECK(same_layout(list[i], dense_w[i]), entry_name(name, i, list.size()),
                   ": expected a dense tensor with strides ", numbers(dense_w[i].strides()), ", got ",
                   numbers(list[i].strides()));
  return dtype;
}

// Memory that is written may be no other argument's: kernels read and write in no order. `written`: names and lists.
inline void check_own_memory(std::initializer_list<std::pair<const char*, Tensors>> written,
                             std::initializer_list<Tensors> read) {
  struct Span {
    uintptr_t begin, end;
    const char* name;  // null where it is only read
    size_t index, count;
  };
  std::vector<Span> spans;
  auto add = [&](const char* name, const Tensors& list) {
    for (size_t i = 0; i < list.size(); ++i) {
      if (list[i].numel() == 0) continue;
      int64_t last = 0;
      auto sizes = list[i].sizes(), strides = list[i].strides();
      for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
      const auto begin = reinterpret_cast<uintptr_t>(list[i].data_ptr());
      spans.push_back({begin, begin + (last + 1) * list[i].element_size(), name, i, list.size()});
    }
  };
  for (const auto& [name, list] : written) add(name, list);
  for (const Tensors& list : read) add(nullptr, list);
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  const Span* furthest = nullptr;
  for (const Span& s : spans) {
    if (furthest && s.begin < furthest->end) {
      const Span& own = s.name ? s : *furthest;
      QUANTOPS_CHECK(!own.name, entry_name(own.name, own.index, own.count),
                     ": expected memory of its own, got some that another argument has too");
    }
    if (!furthest || s.end > furthest->end) furthest = &s;
  }
}

inline void check_float(const char* name, ScalarType dtype) {
  QUANTOPS_CHECK(is_float(dtype), name, ": expected float32, bfloat16, float16 or float64, got ", dtype_name(dtype));
}

}  // namespace quantops
