// Loops over a part of a row: the hard class with gates. Each is compiled for three instruction sets (simd.h).
#pragma once
#include "categorical_gates.h"
#include "cpu/categorical_quantizer_loops.h"

namespace quantops {

// T_t and the top class of each level, kCount of them; those that are not there have a T_t of minus infinity.
template <class A>
struct Bounds {
  A value[kMaxLevels - 1], top[kMaxLevels - 1];
};

// The hard class with gates.
template <int kCount, class A>
QUANTOPS_SIMD void bounded_loop(const A* __restrict x, A* __restrict j, int64_t n, const Bins<A>& bins,
                                const Bounds<A>& bounds, A lowest) {
  const Bins<A> p = bins;
  const Bounds<A> b = bounds;
  for (int64_t i = 0; i < n; i++) {
    const Mirrored<A> m = mirror(x[i], p, lowest);
    A most = std::numeric_limits<A>::infinity();
    for (int t = kCount - 1; t >= 0; t--) most = bounded(m.value, most, b.value[t], b.top[t]);
    j[i] = unmirrored(at_most(m.c, most), m.below);
  }
}

template <class A>
void bounded_loop(const A* x, A* j, int64_t n, const Bins<A>& p, const Bounds<A>& b, const Levels& levels) {
  const A lowest = lowest_value(p);
  if (levels.count <= 4)
    bounded_loop<3>(x, j, n, p, b, lowest);
  else if (levels.count <= 8)
    bounded_loop<7>(x, j, n, p, b, lowest);
  else
    bounded_loop<15>(x, j, n, p, b, lowest);
}

}  // namespace quantops
