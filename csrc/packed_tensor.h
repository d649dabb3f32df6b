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

// Uninitialised packed data.
inline Tensor empty_packed(int64_t numel, int64_t bits, int64_t layout, const Tensor& device_like) {
  const std::vector<int64_t> shape = packed_shape(numel, bits, layout);
  const int64_t strides[] = {std::max<int64_t>(shape.back(), 1), 1};
  return empty_strided(shape.data(), strides + (2 - shape.size()), int64_t(shape.size()), ScalarType::Byte, device_like);
}

inline void check_packed(const Tensors& data, const std::vector<int64_t>& numel, const std::vector<int64_t>& stored,
                         int64_t layout) {
  check_list("data", data, {ScalarType::Byte});
  check_layout(layout);
  check_counts("numel", numel, data.size(), INT64_MAX / 32);
  check_counts("stored", stored, data.size(), kMaxBits);
  for (size_t i = 0; i < data.size(); ++i) {
    const std::vector<int64_t> shape = packed_shape(numel[i], stored[i], layout);
    const auto sizes = data[i].sizes();
    QUANTOPS_CHECK(sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin()),
                   entry_name("data", i, data.size()), ": expected shape ", numbers({shape.data(), shape.size()}), " for ",
                   numel[i], " codes of ", stored[i], " bits, got ", numbers(sizes));
    QUANTOPS_CHECK(data[i].is_contiguous(), entry_name("data", i, data.size()),
                   ": expected a contiguous tensor, got strides ", numbers(data[i].strides()));
  }
}

// One scale, or one for each of as many runs of the same length, per packed tensor; gives back their dtype.
inline ScalarType check_packed_scales(const Tensors& scale, const std::vector<int64_t>& numel, const Tensor& data) {
  QUANTOPS_CHECK(scale.size() == numel.size(), "scale: expected a list with one entry per weight (", numel.size(),
                 "), got ", scale.size());
  const ScalarType dtype = check_list("scale", scale, {ScalarType::Float, ScalarType::Double});
  for (size_t i = 0; i < scale.size(); ++i) {
    const auto name = [&] { return entry_name("scale", i, scale.size()); };
    QUANTOPS_CHECK(device_of(scale[i]) == device_of(data), name(), ": expected device ", device_name(data),
                   ", where the data is, got ", device_name(scale[i]));
    const int64_t rows = scale[i].numel();
    QUANTOPS_CHECK(rows ? numel[i] % rows == 0 : numel[i] == 0, name(), ": expected one element or one per row of ",
                   numel[i], " codes, got shape ", numbers(scale[i].sizes()));
    QUANTOPS_CHECK(scale[i].is_contiguous(), name(), ": expected a contiguous tensor, got strides ",
                   numbers(scale[i].strides()));
  }
  return dtype;
}

}  // namespace quantops
