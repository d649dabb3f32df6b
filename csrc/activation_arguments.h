// Checks of arguments that the CPU and the CUDA library of family `activation` share.
#pragma once
#include <optional>

#include "activation_front.h"
#include "grid_argument.h"
#include "stable_tensor.h"

namespace quantops {

using MaybeTensor = std::optional<Tensor>;

inline void check_options(int64_t rule, bool is_signed, int64_t front, int64_t keep, int64_t learn,
                          const MaybeTensor& offset) {
  auto check = [](const char* name, int64_t value, int64_t most) {
    QUANTOPS_CHECK(value >= 0 && value <= most, name, ": expected 0..", most, ", got ", value);
  };
  check_rule(rule);
  check("front", front, kSilu);
  check("keep", keep, kResidual);
  check("learn", learn, kLearnStep);
  QUANTOPS_CHECK(front != kRelu || (!is_signed && !offset),
                 "front: expected unsigned codes without an offset behind 'relu', got ",
                 is_signed ? "signed codes" : "an offset");
  QUANTOPS_CHECK(!is_smooth(front) || keep == kInput, "keep: expected 0 with front ", front,
                 ", whose derivative is taken from x, got ", keep);
  QUANTOPS_CHECK(learn == kLearnNone || keep == kInput || (keep == kBits) == (learn == kLearnClip),
                 "keep: expected 0 or ", int(learn == kLearnClip ? kBits : kResidual), " for learn ", learn, ", got ",
                 keep);
}

// One scale, or one per channel (dim 1), of a dense x.
inline Channels channels_of(const char* name, const Tensor& scale, const Tensor& x) {
  if (scale.numel() == 1) return {1, std::max<int64_t>(x.numel(), 1)};
  const int64_t count = x.dim() > 1 ? x.size(1) : 1;
  QUANTOPS_CHECK(scale.numel() == count, name, ": expected one element or one per channel (", count,
                 ", dim 1) of x of shape ", numbers(x.sizes()), ", got shape ", numbers(scale.sizes()));
  return {std::max<int64_t>(count, 1), std::max<int64_t>(x.strides()[1], 1)};
}

// x or q beside a dense gradient, in its layout; the gradient itself where it is not needed.
inline Tensor other_of(const Tensor& grad, const MaybeTensor& other, const char* name, bool needed) {
  if (!needed) return grad;
  QUANTOPS_CHECK(other.has_value(), name, ": expected a tensor, got none");
  check_like(name, {*other}, {grad}, kFloats);
  return in_layout_of(*other, grad);
}

}  // namespace quantops
