// Draws of a class, per element: random words, and the inverse of the logistic distribution.
#pragma once
#include "categorical_gates.h"

namespace quantops {

// Philox4x32-10 (Salmon et al. 2011) of a 64-bit key and counter: the first two of its four words.
struct Words {
  uint32_t first, second;
};

QUANTOPS_INLINE Words philox(uint64_t seed, uint64_t index) {
  uint32_t c0 = uint32_t(index), c1 = uint32_t(index >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c1 = uint32_t(b);
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1};
}

// The mass of [lo_t, hi_t] times its step: the part that it has in the mixture r.
template <class A>
QUANTOPS_INLINE A interval_mass(const Level<A>& k, A c, A z, const Bins<A>& p) {
  const Edge<A> top = edge_at(p.beta * (k.top + A(0.5) - c) - z);
  const Edge<A> bottom = edge_at(p.beta * (k.bottom - A(0.5) - c) - z);
  return k.step * ((top.s * bottom.n) * k.whole);
}

template <class A>
QUANTOPS_INLINE A unit_of(uint32_t word) {  // [0, 1)
  return static_cast<A>(static_cast<int32_t>(word >> 8)) * A(1.0 / 16777216);
}

// Whether the classes of an interval are less than a sigma wide together. Then its ends are too near to each other for
// a difference of logarithms.
template <class A>
QUANTOPS_INLINE bool is_narrow(const Level<A>& k, const Bins<A>& p) {
  return p.beta * (k.top - k.bottom + A(1)) < A(1);
}

// A class of [lo_t, hi_t] drawn from pi by inverting the logistic distribution; (c, z) of the element. With u in (0, 1)
// and F = (1 - u) S(B) + u S(A), log(F/(1 - F)) lies between the edges B and A, distributed as it should. It is
// B + log(1 + u (1 - exp(B - A)) S(A)/S(B) / ((1 - u) + u S(-A)/S(-B))), too.
template <class A>
QUANTOPS_INLINE A draw_inside(uint32_t word, const Level<A>& k, A c, A z, bool narrow, const Bins<A>& p) {
  const A half_step = A(1.0 / 33554432);
  const A u = unit_of<A>(word) + half_step, rest = unit_of<A>(~word) + half_step;
  const A near = at_most(at_least(c, k.bottom), k.top);
  const A at = clamp_far(z + p.beta * (c - near), p);
  const Edge<A> a = edge_at(p.beta * (k.top + A(0.5) - near) - at);
  const Edge<A> b = edge_at(p.beta * (k.bottom - A(0.5) - near) - at);
  const A below = rest * b.s + u * a.s, above = rest * b.n + u * a.n;
  A i;
  if (narrow) {
    const A ratio = (u * k.whole) * (a.s / b.s) / (rest + u * (a.n / b.n));
    i = rint_small(k.bottom + (logarithm_above_one(ratio) / p.beta - A(0.5)));
  } else {
    const A steps = ((logarithm(below) - logarithm(above)) + at) / p.beta;
    i = near + rint_small(at_most(at_least(steps, k.bottom - k.top), k.top - k.bottom));
  }
  return at_most(at_least(i, k.bottom), k.top) + A(0);
}

}  // namespace quantops
