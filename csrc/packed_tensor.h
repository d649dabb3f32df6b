// Checks and memory of packed tensors, for the CPU and the CUDA library; the layouts are those of
// quantops/reference/packing.py.
#pragma once
#include <vector>

#include "packing_math.h"
#include "stable_tensor.h"

namespace quantops {

inline void check_layout(int64_t layout) {
  QUANTOPS_CHECK(layout == kPlanes || layout == kDense, "layout: expected 0 or 1, got ", layout);
}

inline void check_counts(const char* name, const std::vector<int64_t>& counts, size_t size, int64_t most) {
  QUANTOPS_CHECK(counts.size() == size, name, ": expected one entry per weight (", size, "), got ", counts.size());
  for (size_t i = 0; i < size; ++i)
    QUANTOPS_CHECK(counts[i] >= 0 && counts[i] <= most, entry_name(name, i, size), ": expected 0..", most, ", got ",
                   counts[i]);
}

inline void check_codes_to_pack(const Tensors& codes, const std::vector<int64_t>& bits, int64_t layout) {
  check_list("codes", codes, {ScalarType::Int});
  check_counts("bits", bits, codes.size(), kMaxBits);
  check_layout(layout);
}

inline std::vector<int64_t> packed_shape(int64_t numel, int64_t bits, int64_t layout) {
  if (layout == kPlanes) return {bits, plane_bytes(numel)};
  return {(numel * bits + 7) / 8};
}

// Uninitialised and contiguous.
inline Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype, const Tensor& device_like) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= std::max<int64_t>(shape[d], 1)) strides[d] = stride;
  return empty_strided(shape.data(), strides.data(), static_cast<int64_t>(shape.size()), dtype, device_like);
}

// Uninitialised packed data.
inline Tensor empty_packed(int64_t numel, int64_t bits, int64_t layout, const Tensor& device_like) {
  return empty(packed_shape(numel, bits, layout), ScalarType::Byte, device_like);
}

// The weights of a packed list: what `sizes`, `dims` and `stored` say of them.
struct PackedShapes {
  std::vector<std::vector<int64_t>> shape;
  std::vector<int64_t> numel;
  const std::vector<int64_t>& stored;

  PackedShapes(const Tensors& data, const std::vector<int64_t>& sizes, const std::vector<int64_t>& dims,
               const std::vector<int64_t>& stored_, int64_t layout)
      : stored(stored_) {
    check_list("data", data, {ScalarType::Byte});
    check_layout(layout);
    check_counts("stored", stored, data.size(), kMaxBits);
    check_counts("dims", dims, data.size(), static_cast<int64_t>(sizes.size()));
    auto size = sizes.begin();
    for (size_t i = 0; i < data.size(); ++i) {
      QUANTOPS_CHECK(dims[i] <= sizes.end() - size, "sizes: expected as many as dims says, got ", sizes.size());
      shape.emplace_back(size, size + dims[i]);
      size += dims[i];
      int64_t n = 1;
      for (int64_t s : shape[i]) {
        QUANTOPS_CHECK(s >= 0 && (s == 0 || n <= INT64_MAX / 32 / s), "sizes: expected those of a tensor, got ", s);
        n *= s;
      }
      numel.push_back(n);
      check_data(data[i], i, data.size(), layout);
    }
  }

  int64_t size() const { return static_cast<int64_t>(shape.size()); }

  Tensors empty_list(ScalarType dtype, const Tensor& device_like) const {
    Tensors list;
    for (const auto& s : shape) list.push_back(empty(s, dtype, device_like));
    return list;
  }

  // One scale per weight, or one for each of its rows; gives back their dtype.
  ScalarType check_scales(const Tensors& scale, const Tensor& data) const {
    QUANTOPS_CHECK(scale.size() == shape.size(), "scale: expected a list with one entry per weight (", shape.size(),
                   "), got ", scale.size());
    const ScalarType dtype = check_list("scale", scale, {ScalarType::Float, ScalarType::Double});
    for (size_t i = 0; i < scale.size(); ++i) {
      const auto name = [&] { return entry_name("scale", i, scale.size()); };
      const int64_t rows = shape[i].empty() ? 1 : shape[i][0];
      QUANTOPS_CHECK(device_of(scale[i]) == device_of(data), name(), ": expected device ", device_name(data),
                     ", where the data is, got ", device_name(scale[i]));
      QUANTOPS_CHECK(scale[i].numel() == 1 || scale[i].numel() == rows, name(),
                     ": expected one element or one per row (", rows, "), got shape ", numbers(scale[i].sizes()));
      QUANTOPS_CHECK(scale[i].is_contiguous(), name(), ": expected a contiguous tensor, got strides ",
                     numbers(scale[i].strides()));
    }
    return dtype;
  }

 private:
  void check_data(const Tensor& data, size_t i, size_t count, int64_t layout) const {
    const std::vector<int64_t> expected = packed_shape(numel[i], stored[i], layout);
    const auto sizes = data.sizes();
    QUANTOPS_CHECK(sizes.size() == expected.size() && std::equal(expected.begin(), expected.end(), sizes.begin()),
                   entry_name("data", i, count), ": expected shape ", numbers({expected.data(), expected.size()}),
                   " for codes of ", stored[i], " bits and of shape ", numbers({shape[i].data(), shape[i].size()}),
                   layout == kPlanes ? " in 'planes', got " : " in 'dense', got ", numbers(sizes));
    QUANTOPS_CHECK(data.is_contiguous(), entry_name("data", i, count), ": expected a contiguous tensor, got strides ",
                   numbers(data.strides()));
  }
};

}  // namespace quantops
