// Loops over a part of a row, elements that share one scale: the hard class without gates, and the place of x among the
// classes. Each is compiled for three instruction sets (simd.h).
#pragma once
#include "categorical_quantizer.h"
#include "cpu/blocks.h"
#include "cpu/simd.h"

namespace quantops {

constexpr int64_t kPart = 256;  // elements: what is kept of each of them stays in the first-level cache
constexpr int kMaxLevels = kMaxBits;

// The hard class without gates, from and to elements as they are stored.
template <class In, class Out, class A>
QUANTOPS_SIMD void nearest_loop(const In* __restrict x, Out* __restrict q, bool streaming, int64_t n,
                                const Bins<A>& bins) {
  const Bins<A> p = bins;
  map_lanes<In>(q, streaming, n, [&](A v) QUANTOPS_LANES { return p.alpha * nearest_class(v, p); }, x);
}

template <class A>
QUANTOPS_SIMD void scale_loop(const A* __restrict j, A* __restrict q, int64_t n, A alpha) {
  for (int64_t i = 0; i < n; i++) q[i] = alpha * j[i];
}

template <class A>
struct alignas(64) Places {
  A c[kPart], z[kPart];
};

template <class A>
QUANTOPS_SIMD void place_loop(const A* __restrict x, Places<A>& at, int64_t n, const Bins<A>& bins) {
  const Bins<A> p = bins;
  for (int64_t i = 0; i < n; i++) {
    at.c[i] = nearest_class(x[i], p);
    at.z[i] = offset_of(x[i], at.c[i], p);
  }
}

}  // namespace quantops
