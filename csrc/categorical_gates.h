// What gates do, per weight and per element: which levels are in and with which weight, the hard class, and the masses
// of levels that draws and gradients are made of.
#pragma once
#include "categorical_quantizer.h"

namespace quantops {

constexpr double kLeastGate = 1.0 / 18446744073709551616.0;  // 2^-64: a cumulative gate below counts as 0

QUANTOPS_INLINE int32_t top_of_level(int t, bool is_signed) { return (int32_t(1) << (is_signed ? t - 1 : t)) - 1; }

// G_t = gates[1] ... gates[t-1], in double; 0 below 2^-64. Without gates 1.
template <class A>
QUANTOPS_INLINE double cumulative_gate(const A* gates, int t) {
  double g = 1;
  if (gates) QUANTOPS_ROLLED
  for (int i = 1; i < t; ++i) g *= static_cast<double>(gates[i]);
  return g < kLeastGate ? 0 : g;
}

// gate_count: -1 without gates.
template <class A>
QUANTOPS_INLINE Levels make_levels(const A* gates, int64_t gate_count, int64_t bits, int most_bits, bool is_signed) {
  Levels l{1, 0, 0, is_signed, bits >= 0 && bits <= most_bits && (gate_count < 0 || gate_count == bits)};
  if (l.valid && gates) QUANTOPS_ROLLED
  for (int i = 0; i < bits; ++i) l.valid = l.valid && gates[i] >= A(0) && gates[i] <= A(1);
  if (!l.valid || bits == 0) return l;
  QUANTOPS_ROLLED
  while (l.count < bits && cumulative_gate(gates, l.count + 1) > 0) ++l.count;
  l.high = top_of_level(l.count, is_signed);
  l.low = is_signed ? -l.high - 1 : 0;
  return l;
}

// The level, counted from 1, of class i.
QUANTOPS_INLINE int level_of(int32_t i, bool is_signed) {
  const uint32_t m = static_cast<uint32_t>(i < 0 ? ~i : i);
#if defined(__CUDA_ARCH__)
  const int width = 32 - __clz(static_cast<int>(m));
#else
  int width = 0;
  for (uint32_t v = m; v; v >>= 1) ++width;
#endif
  return is_signed ? width + 1 : width > 0 ? width : 1;
}

// ------------------------------------------------------------------------------------------------------ the hard class

// The hard class with gates. A class is 1/(cosh(beta/2) + cosh(beta (i - v))) likely, which is log-concave in v, so the
// winner never falls while v rises: the top class of level t, or one below it, wins exactly up to some v = T_t, and
// where none of these bounds holds, the nearest class does. Below 0 the same is true of -1 - v, the mirrored value.

// Where, going up, the classes first..last, 1/ratio as likely by their gate, begin to win against class `top` below
// them.
QUANTOPS_INLINE double crossing(double ratio, double beta, double top, double first, double last) {
  if (ratio == 1 && first == top + 1) return top + 0.5;
  const double h = 0.5 * beta, inverse = 1 / ratio;
  // Half way between two of its classes a level is least likely. It wins there from `reach`/beta above `top` on, which
  // is cosh(reach) = cosh(h) (2 ratio - 1); the first point where it wins belongs to that class or the one below.
  const double x = log(2 * ratio - 1) + (h + log(0.5 + 0.5 * exp(-2 * h)));
  const double reach = x > 30 ? x + 0.69314718055994531 : log(exp(x) + sqrt(exp(2 * x) - 1));
  double i = rint(top + reach / beta), best = std::numeric_limits<double>::infinity();
  i = !(i > first) ? first : i > last ? last : i;
  for (int n = 0; n < 2; ++n) {
    const double delta = 0.5 * beta * (i - top), e = exp(-2 * delta), a = inverse - e;  // a y^2 - 2 b y = c
    const double b = 0.5 * (1 - inverse) * (exp(h - delta) + exp(-h - delta)), c = 1 - e * inverse;
    if (a > 0) {
      const double at = 0.5 * (i + top) + log((b + sqrt(b * b + a * c)) / a) / beta;
      if (at < best) best = at;
    }
    if (i > first) i -= 1;
  }
  return best;
}

// The least number of type A that is not below v.
QUANTOPS_INLINE float round_up(double v, float) {
  const float r = static_cast<float>(v);
  return static_cast<double>(r) < v ? bits_of<float>(bits_of<uint32_t>(r) + 1) : r;
}
QUANTOPS_INLINE double round_up(double v, double) { return v; }

// T_1..T_(count-1) into bound[0..]. Levels enter from the lowest; a new one cuts off what is above its first win.
template <class A>
QUANTOPS_INLINE void hard_bounds(const A* gates, const Levels& levels, A alpha, A sigma, A* bound) {
  const double beta = beta_of(static_cast<double>(alpha), static_cast<double>(sigma));
  for (int u = 2; u <= levels.count; ++u) {
    const double first = top_of_level(u - 1, levels.is_signed) + 1, last = top_of_level(u, levels.is_signed);
    const double weight = cumulative_gate(gates, u);
    int s = u - 1;
    A at = A(0);
    for (;; --s) {  // down to the level that level u first wins against
      const double ratio = cumulative_gate(gates, s) / weight;
      at = round_up(crossing(ratio, beta, top_of_level(s, levels.is_signed), first, last), A());
      if (s == 1 || at > bound[s - 2]) break;
    }
    for (; s < u; ++s) bound[s - 1] = at;
  }
}

// The mirrored value and class of x, class c >= 0 being itself and c < 0 being -1 - c; `below` = 1 for those, else 0.
template <class A>
struct Mirrored {
  A value, c, below;
};

// Where x begins to count: at 0 without classes below.
template <class A>
QUANTOPS_INLINE A lowest_value(const Bins<A>& p) {
  return p.low < A(0) ? std::numeric_limits<A>::lowest() : A(0);
}

// `lowest`: lowest_value(p).
template <class A>
QUANTOPS_INLINE Mirrored<A> mirror(A x, const Bins<A>& p, A lowest) {
  const A v = at_least(x * p.inv_alpha, lowest), below = v < A(0) ? A(1) : A(0);
  const A size = v < A(0) ? -v : v + A(0);  // not -0
  // size - below is exact where it matters: from 1/2 up. Infinity counts as the largest number, below an infinite
  // bound.
  const A value = at_most(size - below, std::numeric_limits<A>::max());
  return {value, rint_small(at_most(size, p.high + below)) - below, below};
}

// Applies T_t: the class is at most `top` below it. Called from the highest t to the lowest, so that the least counts;
// `most` is infinite before.
template <class A>
QUANTOPS_INLINE A bounded(A value, A most, A bound, A top) {
  return value < bound ? top : most;
}

template <class A>
QUANTOPS_INLINE A unmirrored(A c, A below) {
  return c * (A(1) - A(2) * below) - below;
}

// ------------------------------------------------------------------------------------------------- masses of the
// levels

// S at an edge and at minus that edge.
template <class A>
struct Edge {
  A s, n;
};

template <class A>
QUANTOPS_INLINE Edge<A> edge_at(A a) {
  const A e = exponential(a < A(0) ? a : -a), inv = A(1) / (A(1) + e), other = e * inv;
  return {a < A(0) ? other : inv, a < A(0) ? inv : other};
}

// Constants of level t. Its own classes are those above the level before it and, signed, those below.
template <class A>
struct Level {
  A top, bottom, weight, step;  // weight = G_t, step = G_t - G_(t+1)
  A own, whole;                 // 1 - exp(-beta n) of the n classes of its own on one side, of all from bottom to top
};

template <class A>
QUANTOPS_INLINE Level<A> make_level(const A* gates, const Levels& l, int t, A beta) {
  const int32_t top = top_of_level(t, l.is_signed), before = t > 1 ? top_of_level(t - 1, l.is_signed) : 0;
  const A weight = static_cast<A>(cumulative_gate(gates, t));
  const A next = t < l.count ? static_cast<A>(cumulative_gate(gates, t + 1)) : A(0);
  const double width = static_cast<double>(beta), classes = l.is_signed ? 2.0 * top + 2 : top + 1.0;
  const A whole = static_cast<A>(one_minus_exp(width * classes));
  return {static_cast<A>(top),
          l.is_signed ? static_cast<A>(-top - 1) : A(0),
          weight,
          weight - next,
          t == 1 ? whole : static_cast<A>(one_minus_exp(width * (top - before))),
          whole};
}

// All classes as one level: what there is without gates.
template <class A>
QUANTOPS_INLINE Level<A> make_only_level(const Levels& l, A beta) {
  const A whole = static_cast<A>(one_minus_exp(static_cast<double>(beta) * (l.high - l.low + 1.0)));
  return {static_cast<A>(l.high), static_cast<A>(l.low), A(1), A(1), whole, whole};
}

}  // namespace quantops
