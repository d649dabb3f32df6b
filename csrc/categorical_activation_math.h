// Categorical quantization of activations per element, for the CPU and the CUDA kernels; the equations are in
// quantops/reference/categorical_activation.py.
//
// There are only 4 2^bits places x' in the cells, so that the factors of dL/dq are a table, a row per place. Its
// numbers are computed as the categorical backward does for any x.
#pragma once
#include "categorical_backward.h"

namespace quantops {

constexpr int kQuarters = 4;
constexpr int kMostPlaces = kQuarters << kMaxSoftBits;

QUANTOPS_INLINE int64_t quarter_bytes(int64_t numel) { return (numel + kQuarters - 1) / kQuarters; }

// k of x, whose q is at hand as it is stored; 0 where that is NaN. `least` and `most`: -2 and 1, which the CPU's loops
// hide from the compiler: it would else put masks for constant results in the place of minimum and maximum.
template <class A>
QUANTOPS_INLINE A quarter_of(A x, A q, const Bins<A>& p, A least, A most) {
  const A v = A(4) * (x * p.inv_alpha - nearest_class(q, p));
  return floor_small(at_most(v > least ? v : least, most)) + A(2);
}

// Four of them in a byte, and of a byte the one at place i.
QUANTOPS_INLINE uint32_t join_quarters(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return a | b << 2 | c << 4 | d << 6;
}
QUANTOPS_INLINE uint32_t quarter_at(uint32_t byte, int i) { return byte >> 2 * i & 3; }

// 4 j + k, 0 where q is NaN.
template <class A>
QUANTOPS_INLINE A place_of(A q, A k, const Bins<A>& p) {
  const A place = A(kQuarters) * nearest_class(q, p) + k;
  return place == place ? place : A(0);
}

// x' of a place below `count`.
template <class A>
QUANTOPS_INLINE A middle_of(int place, int count, A alpha) {
  const A infinity = std::numeric_limits<A>::infinity();
  return place == 0 ? -infinity : place == count - 1 ? infinity : (A(place) - A(1.5)) * (A(0.25) * alpha);
}

QUANTOPS_INLINE int places_of(const Levels& l) { return kQuarters * (l.high + 1); }

template <class A>
QUANTOPS_INLINE Factors<A> winner_factors_at(A x, const Bins<A>& p, const OneInterval<A>& k) {
  const A c = nearest_class(x, p), w = mirrored_offset<false>(x, c, p, k);
  const Slopes<A> s = winner_of_one<true, true>(edge_power<false>(w, k), ends_of<true>(c, k), k);
  Factors<A> f = factors_of_one(c, w, s, p, k);
  f.x = k.scale * mirrored(c * s.rt, c, k);  // as the categorical backward rounds it
  return f;
}

}  // namespace quantops
