// Loops over a part of a row: draws. Each is compiled for three instruction sets (simd.h).
#pragma once
#include "categorical_draw.h"
#include "cpu/categorical_quantizer_loops.h"

namespace quantops {

struct alignas(64) Draws {
  uint32_t first[kPart], second[kPart];
};

QUANTOPS_SIMD inline void philox_loop(Draws& draws, int64_t n, uint64_t seed, uint64_t index) {
  for (int64_t i = 0; i < n; i++) {
    const Words words = philox(seed, index + i);
    draws.first[i] = words.first;
    draws.second[i] = words.second;
  }
}

template <class A>
QUANTOPS_SIMD void interval_loop(const Places<A>& at, A* __restrict mass, A* __restrict total, int64_t n,
                                 const Level<A>& level, const Bins<A>& bins) {
  const Bins<A> p = bins;
  const Level<A> k = level;
  for (int64_t i = 0; i < n; i++) {
    mass[i] = interval_mass(k, at.c[i], at.z[i], p);
    total[i] += mass[i];
  }
}

template <class A>
QUANTOPS_SIMD void first_draw_loop(const Draws& draws, A* __restrict total, int64_t n) {
  for (int64_t i = 0; i < n; i++) total[i] *= unit_of<A>(draws.first[i]);
}

// Takes the class from this interval where what is left is in it, or where it is the last; `left` of none is infinite.
template <bool kNarrow, class A>
QUANTOPS_SIMD void draw_loop(const Places<A>& at, const Draws& draws, const A* __restrict mass, A* __restrict left,
                             A* __restrict j, int64_t n, const Level<A>& level, const Bins<A>& bins, bool last) {
  const Bins<A> p = bins;
  const Level<A> k = level;
  const A none = std::numeric_limits<A>::infinity(), add = last ? none : A(0);
  for (int64_t i = 0; i < n; i++) {
    const A drawn = draw_inside(draws.second[i], k, at.c[i], at.z[i], kNarrow, p);
    const A part = mass[i] + add, rest = left[i] - mass[i];
    const bool here = left[i] < part;
    j[i] = here ? drawn : j[i];
    left[i] = here ? none : rest;
  }
}

}  // namespace quantops
