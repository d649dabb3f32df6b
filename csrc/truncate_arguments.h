// Checks of the arguments that only family `truncate` has. Nothing here knows a device, as in stable_tensor.h.
#pragma once
#include "grid_argument.h"
#include "quant_math.h"
#include "stable_tensor.h"

namespace quantops {

// Widths to truncate to, of shape (widths, weights); gives back how many.
inline int64_t check_widths(const Tensor& bits, const Tensors& w) {
  const int64_t weights = static_cast<int64_t>(w.size());
  QUANTOPS_CHECK(bits.scalar_type() == ScalarType::Int, "bits: expected dtype int32, got ",
                 dtype_name(bits.scalar_type()));
  QUANTOPS_CHECK(bits.dim() == 2 && bits.size(0) >= 1 && bits.size(0) <= kMaxBits && bits.size(1) == weights,
                 "bits: expected shape (widths, weights) = (1..16, ", weights, "), got ", numbers(bits.sizes()));
  QUANTOPS_CHECK(device_of(bits) == device_of(w[0]), "bits: expected device ", device_name(w[0]),
                 ", where the weights are, got ", device_name(bits));
  return bits.size(0);
}

// The scales of truncated weights: none, or one per weight with as many elements as its scale.
inline void check_out_scales(const Tensors& out_scale, const Tensors& scale, const Tensors& w, ScalarType dtype) {
  if (out_scale.empty()) return;
  check_scales(out_scale, w, dtype, "out_scale");
  for (size_t i = 0; i < w.size(); ++i)
    QUANTOPS_CHECK(out_scale[i].numel() == scale[i].numel(), entry_name("out_scale", i, w.size()),
                   ": expected as many elements as its scale has (", scale[i].numel(), "), got shape ",
                   numbers(out_scale[i].sizes()));
}

// Gradients of several widths of each weight, width by width; empty ones are not used.
inline bool is_used(const Tensor& grad, const Tensor& w) { return grad.numel() != 0 || w.numel() == 0; }

inline ScalarType check_gradients(const Tensors& grads, const Tensors& w, int64_t widths) {
  QUANTOPS_CHECK(grads.size() == w.size() * widths, "grads: expected a list with one entry per width and weight (",
                 widths, " x ", w.size(), "), got ", grads.size());
  const ScalarType dtype = check_list("grads", grads, kFloats);
  QUANTOPS_CHECK(device_of(grads[0]) == device_of(w[0]), "grads: expected device ", device_name(w[0]),
                 ", where the weights are, got ", device_name(grads[0]));
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor& like = w[i % w.size()];
    QUANTOPS_CHECK(!is_used(grads[i], like) || like.numel() == 0 || same_shape(grads[i], like), "grads[", i,
                   "]: expected the weight's shape ", numbers(like.sizes()), ", or no elements, got ",
                   numbers(grads[i].sizes()));
  }
  return dtype;
}

}  // namespace quantops
