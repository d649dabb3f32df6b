// The gradient of a scale that is max|w| or mean|w| per element: one inline statement for the CPU and the CUDA kernels,
// the arithmetic of quantops/reference/own_scale.py.
#pragma once
#include "quant_math.h"

namespace quantops {

// Whether a weight carries gradient: those of size `least`, the maximum, or from 0 on, all.
template <class A>
QUANTOPS_INLINE bool carries(A w, A least) {
  return absolute_of(w) >= least;
}

// sign(w) * each, where each is dL/ds over the number of weights that carry it.
template <class A>
QUANTOPS_INLINE A own_scale_grad(A w, A least, A each) {
  const A signed_each = w > A(0) ? each : (w < A(0) ? -each : A(0));
  return carries(w, least) ? signed_each : A(0);
}

}  // namespace quantops
