// Loops over a part of a row, elements that share one scale. Each is compiled for three instruction sets (simd.h).
#pragma once
#include "categorical_math.h"
#include "cpu/blocks.h"
#include "cpu/simd.h"

namespace quantops {

constexpr int64_t kPart = 256;  // elements: what is kept of each of them stays in the first-level cache
constexpr int kMaxLevels = kMaxBits;

// ------------------------------------------------------------------------------------------------------------- forward

// The hard class without gates, from and to elements as they are stored.
template <class In, class Out, class A>
QUANTOPS_SIMD void nearest_loop(const In* __restrict x, Out* __restrict q, bool streaming, int64_t n,
                                const Bins<A>& bins) {
  const Bins<A> p = bins;
  map_lanes<In>(q, streaming, n, [&](A v) QUANTOPS_LANES { return p.alpha * nearest_class(v, p); }, x);
}

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
  if (levels.count <= 4) bounded_loop<3>(x, j, n, p, b, lowest);
  else if (levels.count <= 8) bounded_loop<7>(x, j, n, p, b, lowest);
  else bounded_loop<15>(x, j, n, p, b, lowest);
}

template <class A>
QUANTOPS_SIMD void scale_loop(const A* __restrict j, A* __restrict q, int64_t n, A alpha) {
  for (int64_t i = 0; i < n; i++) q[i] = alpha * j[i];
}

// ------------------------------------------------------------------------------------ the place of x among the classes

template <class A>
struct Places {
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

// ---------------------------------------------------------------------------------------------------------------- draw

struct Draws {
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
template <class A>
QUANTOPS_SIMD void draw_loop(const Places<A>& at, const Draws& draws, const A* __restrict mass, A* __restrict left,
                             A* __restrict j, int64_t n, const Level<A>& level, const Bins<A>& bins, bool last) {
  const Bins<A> p = bins;
  const Level<A> k = level;
  const A none = std::numeric_limits<A>::infinity(), add = last ? none : A(0);
  for (int64_t i = 0; i < n; i++) {
    const A drawn = draw_inside(draws.second[i], k, at.c[i], at.z[i], p);
    const A part = mass[i] + add, rest = left[i] - mass[i];
    const bool here = left[i] < part;
    j[i] = here ? drawn : j[i];
    left[i] = here ? none : rest;
  }
}

// --------------------------------------------------------------------------------------------------- winner's backward

// What a run of elements adds to the gradients of alpha and sigma.
struct ScaleSums {
  double alpha = 0, sigma = 0;
};

template <class A>
struct Lanes {
  A alpha[kLanes] = {}, sigma[kLanes] = {};

  void add_to(ScaleSums& sums) const {
    for (int j = 0; j < kLanes; j++) {
      sums.alpha += alpha[j];
      sums.sigma += sigma[j];
    }
  }
};

// The case of one interval, in short loops, of which the processor has more under way at a time than of a long one.
template <class A>
struct OnePart {
  Places<A> at;
  A inner[kPart], outer[kPart];  // b and B; in the place of B its exponent first
};

// Returns whether an end of the grid can be felt.
template <class A>
QUANTOPS_SIMD bool one_place_loop(const A* __restrict x, OnePart<A>& w, int64_t n, const Bins<A>& bins,
                                  const OneInterval<A>& interval) {
  const Bins<A> p = bins;
  const OneInterval<A> k = interval;
  for (int64_t i = 0; i < n; i++) {
    const A c = nearest_class(x[i], p), z = offset_of(x[i], c, p), e = outer_exponent(c, z, p, k);
    w.at.c[i] = c;
    w.at.z[i] = z;
    w.outer[i] = e;
  }
  int32_t felt = 0;
  for (int64_t i = 0; i < n; i++) felt += w.outer[i] >= outer_limit<A>();
  return felt;
}

template <class A>
QUANTOPS_SIMD void inner_exponential_loop(OnePart<A>& w, int64_t n, const Bins<A>& bins) {
  const Bins<A> p = bins;
  for (int64_t i = 0; i < n; i++) w.inner[i] = inner_exponential(inner_exponent(w.at.z[i], p));
}

template <class A>
QUANTOPS_SIMD void outer_exponential_loop(OnePart<A>& w, int64_t n) {
  for (int64_t i = 0; i < n; i++) w.outer[i] = outer_exponential(w.outer[i]);
}

// Sums over the lanes of a block that the gradients of alpha and sigma are made of, with u = g c: winner_factors, term
// by term.
template <class A>
struct OneLanes {
  A u[kLanes] = {}, q[kLanes] = {}, c[kLanes] = {}, z[kLanes] = {};

  void add_to(ScaleSums& sums, A beta) const {
    double of_u = 0, of_q = 0, of_c = 0, of_z = 0;
    for (int j = 0; j < kLanes; j++) {
      of_u += u[j];
      of_q += q[j];
      of_c += c[j];
      of_z += z[j];
    }
    const double b = beta;
    sums.alpha += of_u + b * (of_q - of_c);
    sums.sigma -= b * (of_z + b * of_q);
  }
};

// kScales: sums for alpha and sigma are wanted.
template <bool kOuter, bool kFar, bool kScales, class A>
QUANTOPS_INLINE A winner_of_one_at(const OnePart<A>& w, int64_t i, A g, const OneInterval<A>& k, A beta, OneLanes<A>& s,
                                   int j) {
  const A c = w.at.c[i], z = w.at.z[i];
  const Slopes<A> slopes = winner_of_one<kOuter, kFar>(c, z, w.inner[i], w.outer[i], k);
  const A u = g * c, t = u * slopes.rt;
  if (kScales) {
    s.u[j] += u;
    s.q[j] += u * slopes.rq;
    s.c[j] += t * c;
    s.z[j] += t * z;
  }
  return beta * t;
}

template <bool kOuter, bool kFar, bool kScales, class A>
QUANTOPS_SIMD void winner_of_one_loop(const OnePart<A>& w, const A* __restrict g, A* __restrict out, int64_t n, A beta,
                                      const OneInterval<A>& interval, OneLanes<A>& sums) {
  const OneInterval<A> k = interval;
  OneLanes<A> s = sums;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; j++)
      out[i + j] = winner_of_one_at<kOuter, kFar, kScales>(w, i + j, g[i + j], k, beta, s, j);
  for (int j = 0; i < n; i++, j++) out[i] = winner_of_one_at<kOuter, kFar, kScales>(w, i, g[i], k, beta, s, j);
  sums = s;
}

// A block of any length.
template <bool kScales, class A>
void winner_of_one_block(const A* x, const A* g, A* out, int64_t size, const Bins<A>& p, const OneInterval<A>& k,
                         ScaleSums& sums) {
  OneLanes<A> lanes;
  OnePart<A> w;
  for (int64_t i = 0; i < size; i += kPart) {
    const int64_t n = size - i < kPart ? size - i : kPart;
    const bool outer = one_place_loop(x + i, w, n, p, k);
    inner_exponential_loop(w, n, p);
    if (outer) {
      outer_exponential_loop(w, n);
      if (k.theta > A(0)) winner_of_one_loop<true, true, kScales>(w, g + i, out + i, n, p.beta, k, lanes);
      else winner_of_one_loop<true, false, kScales>(w, g + i, out + i, n, p.beta, k, lanes);
    } else {
      winner_of_one_loop<false, false, kScales>(w, g + i, out + i, n, p.beta, k, lanes);
    }
  }
  lanes.add_to(sums, p.beta);
}

// The masses of a part's elements, and the classes that won there.
template <class A>
struct WinnerPart {
  Places<A> at;
  A j[kPart], gate[kPart];  // gate = G of j's level
  A total[kPart], by_x[kPart], by_alpha[kPart], top_s[kPart], top_n[kPart], bottom_s[kPart], bottom_n[kPart];
  A mass[kMaxLevels][kPart];  // of each level's own classes, times G_t
  A share[kPart];             // g alpha j r
};

template <bool kFirst, bool kSigned, class A>
QUANTOPS_SIMD void level_loop(WinnerPart<A>& w, A* __restrict mass, int64_t n, const Level<A>& level, A below, A above,
                              const Bins<A>& bins) {
  const Bins<A> p = bins;
  const Level<A> k = level;
  for (int64_t i = 0; i < n; i++) {
    const A j = w.j[i];
    Masses<A> m = no_masses<A>();
    if (!kFirst)
      m = {w.total[i], w.by_x[i], w.by_alpha[i], {w.top_s[i], w.top_n[i]}, {w.bottom_s[i], w.bottom_n[i]}};
    mass[i] = add_level<kFirst, kSigned>(m, k, w.at.c[i], w.at.z[i], j, p);
    w.total[i] = m.total;
    w.by_x[i] = m.by_x;
    w.by_alpha[i] = m.by_alpha;
    w.top_s[i] = m.top.s;
    w.top_n[i] = m.top.n;
    w.bottom_s[i] = m.bottom.s;
    w.bottom_n[i] = m.bottom.n;
    const A before = kFirst ? k.weight : w.gate[i];
    w.gate[i] = (j < below) | (j > above) ? k.weight : before;  // outside the level before
  }
}

template <class A>
void level_loop(WinnerPart<A>& w, int t, int64_t n, const Level<A>& k, A below, A above, const Bins<A>& p,
                bool is_signed) {
  if (t == 0) level_loop<true, true>(w, w.mass[t], n, k, below, above, p);
  else if (is_signed) level_loop<false, true>(w, w.mass[t], n, k, below, above, p);
  else level_loop<false, false>(w, w.mass[t], n, k, below, above, p);
}

template <class A>
QUANTOPS_INLINE A winner_of_many_at(WinnerPart<A>& w, int64_t i, A g, A sharp, const Bins<A>& p, A& alpha, A& sigma) {
  const Masses<A> m = {w.total[i], w.by_x[i], w.by_alpha[i], {}, {}};
  A r;
  const Factors<A> f = winner_of_many(m, w.at.c[i], w.at.z[i], w.j[i], w.gate[i], sharp, p, r);
  w.share[i] = g * (p.alpha * (w.j[i] * r));
  alpha += g * f.alpha;
  sigma += g * f.sigma;
  return g * f.x;
}

template <class A>
QUANTOPS_SIMD void winner_of_many_loop(WinnerPart<A>& w, const A* __restrict g, A* __restrict out, int64_t n, A sharp,
                                       const Bins<A>& bins, ScaleSums& sums) {
  const Bins<A> p = bins;
  Lanes<A> s;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; j++)
      out[i + j] = winner_of_many_at(w, i + j, g[i + j], sharp, p, s.alpha[j], s.sigma[j]);
  for (int j = 0; i < n; i++, j++) out[i] = winner_of_many_at(w, i, g[i], sharp, p, s.alpha[j], s.sigma[j]);
  s.add_to(sums);
}

// Sum of share * ([j is in a level above t] - r of those levels), from the highest t down: `tail` collects their
// masses.
template <class A>
QUANTOPS_INLINE A winner_gate_at(const WinnerPart<A>& w, const A* mass, A* tail, int64_t i, A bottom, A top) {
  const A all = tail[i] + mass[i], above = (w.j[i] < bottom) | (w.j[i] > top) ? A(1) : A(0);
  tail[i] = all;
  return w.share[i] * (above - all / w.total[i]);
}

template <class A>
QUANTOPS_SIMD double winner_gate_loop(const WinnerPart<A>& w, const A* __restrict mass, A* __restrict tail, int64_t n,
                                      A bottom, A top) {
  A sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; j++) sum[j] += winner_gate_at(w, mass, tail, i + j, bottom, top);
  for (int j = 0; i < n; i++, j++) sum[j] += winner_gate_at(w, mass, tail, i, bottom, top);
  double total = 0;
  for (int j = 0; j < kLanes; j++) total += sum[j];
  return total;
}

// ---------------------------------------------------------------------------------------------------------------- soft

// G of a class: weight[0] in the lowest of kMaxSoftBits nested intervals, weight[t] outside of the t lowest; so of
// levels, and 0 outside of all.
template <class A>
struct GateSteps {
  A bottom[kMaxSoftBits], top[kMaxSoftBits], weight[kMaxSoftBits + 1];
};

// Of the kSteps lowest intervals.
template <int kSteps, class A>
QUANTOPS_INLINE A gate_of(A i, const GateSteps<A>& gates) {
  if (kSteps == 1) return A((i <= gates.top[0]) & (i >= gates.bottom[0]));  // G_1 = 1; a ternary would become a branch
  A g = gates.weight[0];
  for (int t = 0; t < kSteps; t++) g = (i > gates.top[t]) | (i < gates.bottom[t]) ? gates.weight[t + 1] : g;
  return g;
}

// The soft sums of a part's elements.
template <class A>
struct SoftPart {
  Places<A> at;
  A y[kPart], w[kPart];
  A weight[kPart], first[kPart];       // after the first pass: 1/weight and the mean
  A by_x[kPart], by_width[kPart];
  A gate[kPart];                       // G of c
  A up[kPart], down[kPart];            // deviations of the pair at hand
  A tail[kMaxSoftBits][kPart];         // sums of deviations over the levels above t
};

template <int kSteps, class A>
QUANTOPS_SIMD void soft_start_loop(SoftPart<A>& s, int64_t n, const GateSteps<A>& gates, const Bins<A>& bins) {
  const Bins<A> p = bins;
  const GateSteps<A> steps = gates;
  for (int64_t i = 0; i < n; i++) {
    s.y[i] = exponential(s.at.z[i] - p.half);
    s.w[i] = exponential(-s.at.z[i] - p.half);
  }
  for (int64_t i = 0; i < n; i++) {
    s.gate[i] = gate_of<kSteps>(s.at.c[i], steps);
    s.weight[i] = s.gate[i] * soft_center(s.y[i], s.w[i]).u;
    s.first[i] = A(0);
  }
}

// Adds the classes `step` up and down.
template <int kSteps, class A>
QUANTOPS_SIMD void soft_pair_loop(SoftPart<A>& s, int64_t n, A step, A inner, A outer, const GateSteps<A>& gates) {
  const GateSteps<A> steps = gates;
  for (int64_t i = 0; i < n; i++) {
    SoftSums<A> sums = {s.weight[i], s.first[i]};
    add_pair(sums, soft_pair(s.y[i], s.w[i], inner, outer), step, gate_of<kSteps>(s.at.c[i] + step, steps),
             gate_of<kSteps>(s.at.c[i] - step, steps));
    s.weight[i] = sums.weight;
    s.first[i] = sums.first;
  }
}

template <class A>
QUANTOPS_SIMD void soft_value_loop(const SoftPart<A>& s, A* __restrict q, int64_t n, A alpha) {
  for (int64_t i = 0; i < n; i++) q[i] = alpha * (s.at.c[i] + s.first[i] / s.weight[i]);
}

// Between the passes.
template <class A>
QUANTOPS_SIMD void soft_mean_loop(SoftPart<A>& s, int64_t n, A sharp) {
  for (int64_t i = 0; i < n; i++) {
    const A inv = A(1) / s.weight[i], mean = s.first[i] * inv;
    A deviation;
    const SoftSlopes<A> slopes = center_slopes(soft_center(s.y[i], s.w[i]), s.gate[i], mean, sharp, deviation);
    s.by_x[i] = slopes.by_x;
    s.by_width[i] = slopes.by_width;
    s.up[i] = deviation;
    s.down[i] = A(0);
    s.weight[i] = inv;
    s.first[i] = mean;
  }
}

template <int kSteps, class A>
QUANTOPS_SIMD void soft_slope_loop(SoftPart<A>& s, int64_t n, A step, A inner, A outer, const GateSteps<A>& gates,
                                   A sharp) {
  const GateSteps<A> steps = gates;
  for (int64_t i = 0; i < n; i++) {
    SoftSlopes<A> slopes = {s.by_x[i], s.by_width[i]};
    A up, down;
    add_slopes(slopes, soft_pair(s.y[i], s.w[i], inner, outer), step, s.first[i],
               gate_of<kSteps>(s.at.c[i] + step, steps), gate_of<kSteps>(s.at.c[i] - step, steps), sharp, up, down);
    s.by_x[i] = slopes.by_x;
    s.by_width[i] = slopes.by_width;
    if (kSteps > 1) {
      s.up[i] = up;
      s.down[i] = down;
    }
  }
}

// Adds the deviations of the pair at hand to the sums over the levels above t, whose classes are beyond bottom..top.
template <class A>
QUANTOPS_SIMD void soft_tail_loop(const A* __restrict c, const A* __restrict of_up, const A* __restrict of_down,
                                  A* __restrict tail, int64_t n, A step, A bottom, A top) {
  for (int64_t i = 0; i < n; i++) {
    const A i_up = c[i] + step, i_down = c[i] - step;
    const A up = (i_up > top) | (i_up < bottom) ? of_up[i] : A(0);
    const A down = (i_down > top) | (i_down < bottom) ? of_down[i] : A(0);
    tail[i] += up + down;
  }
}

template <class A>
QUANTOPS_INLINE A soft_gradient_at(const SoftPart<A>& s, int64_t i, A g, const Bins<A>& p, A& alpha, A& sigma) {
  const SoftSlopes<A> slopes = {s.by_x[i], s.by_width[i]};
  const Factors<A> f = soft_factors(slopes, s.at.c[i], s.at.z[i], s.first[i], s.weight[i], p);
  alpha += g * f.alpha;
  sigma += g * f.sigma;
  return g * f.x;
}

template <class A>
QUANTOPS_SIMD void soft_gradient_loop(const SoftPart<A>& s, const A* __restrict g, A* __restrict out, int64_t n,
                                      const Bins<A>& bins, ScaleSums& sums) {
  const Bins<A> p = bins;
  Lanes<A> lanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; j++)
      out[i + j] = soft_gradient_at(s, i + j, g[i + j], p, lanes.alpha[j], lanes.sigma[j]);
  for (int j = 0; i < n; i++, j++) out[i] = soft_gradient_at(s, i, g[i], p, lanes.alpha[j], lanes.sigma[j]);
  lanes.add_to(sums);
}

// The sum of g dq/dG over the levels above t, times G.
template <class A>
QUANTOPS_SIMD double soft_gate_loop(const SoftPart<A>& s, const A* __restrict tail, const A* __restrict g, int64_t n,
                                    A alpha) {
  A sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; j++) sum[j] += (g[i + j] * alpha) * (tail[i + j] * s.weight[i + j]);
  for (int j = 0; i < n; i++, j++) sum[j] += (g[i] * alpha) * (tail[i] * s.weight[i]);
  double total = 0;
  for (int j = 0; j < kLanes; j++) total += sum[j];
  return total;
}

}  // namespace quantops
