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

// ---------------------------------------------------------------------------------------------------------------- draw

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

  // g dq/dx of an element.
  QUANTOPS_INLINE A add(int lane, A g, const Factors<A>& f) {
    alpha[lane] += g * f.alpha;
    sigma[lane] += g * f.sigma;
    return g * f.x;
  }

  void add_to(ScaleSums& sums) const {
    for (int j = 0; j < kLanes; j++) {
      sums.alpha += alpha[j];
      sums.sigma += sigma[j];
    }
  }
};

// Gradients of the elements, and the sums of those of alpha and sigma; `factors(i)`, marked QUANTOPS_LANES, of one.
template <class A, class F>
QUANTOPS_INLINE void gradient_lanes(const A* __restrict g, A* __restrict out, int64_t n, ScaleSums& sums,
                                    const F& factors) {
  Lanes<A> lanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; j++) out[i + j] = lanes.add(j, g[i + j], factors(i + j));
  for (int j = 0; i < n; i++, j++) out[i] = lanes.add(j, g[i], factors(i));
  lanes.add_to(sums);
}

// The case of one interval, in short loops, of which the processor has more under way at a time than of a long one.
constexpr int64_t kOnePart = 512;

template <class A>
struct OnePart {
  A c[kOnePart], w[kOnePart];
  A b[kOnePart], near[kOnePart], far[kOnePart];
  A rt[kOnePart], rq[kOnePart];
};

template <bool kPlain, class A>
QUANTOPS_SIMD void one_place_loop(const A* __restrict x, OnePart<A>& part, int64_t n, const Bins<A>& bins,
                                  const OneInterval<A>& interval) {
  const Bins<A> p = bins;
  const OneInterval<A> k = interval;
  for (int64_t i = 0; i < n; i++) {
    const A c = nearest_class_or_minus_zero(x[i], p);
    part.c[i] = c;
    part.w[i] = mirrored_offset<kPlain>(x[i], c, p, k);
  }
}

template <bool kPlain, class A>
QUANTOPS_SIMD void edge_power_loop(OnePart<A>& part, int64_t n, const OneInterval<A>& interval) {
  const OneInterval<A> k = interval;
  for (int64_t i = 0; i < n; i++) part.b[i] = edge_power<kPlain>(part.w[i], k);
}

// Whether an end of the grid can be felt.
template <class A>
QUANTOPS_SIMD bool feels_end_loop(const OnePart<A>& part, int64_t n, const OneInterval<A>& interval) {
  const OneInterval<A> k = interval;
  int32_t felt = 0;
  for (int64_t i = 0; i < n; i++)
    felt += decay_exponent(classes_to_near_end(part.c[i], k), k) >= least_decay<A>();
  return felt;
}

template <bool kFar, class A>
QUANTOPS_SIMD void ends_loop(OnePart<A>& part, int64_t n, const OneInterval<A>& interval) {
  const OneInterval<A> k = interval;
  for (int64_t i = 0; i < n; i++) {
    const Ends<A> ends = ends_of<kFar>(part.c[i], k);
    part.near[i] = ends.near;
    if (kFar) part.far[i] = ends.far;
  }
}

// The same of the classes at an end and one, two, three from it, for scales where no class further away feels an end,
// or no class is further away: selecting costs a third of an exponential.
template <class A>
struct EndTable {
  static constexpr int kCount = 4;
  A near[kCount], far[kCount];
};

template <class A>
bool has_end_table(const OneInterval<A>& k) {
  return k.half_classes <= A(4) || decay_of(A(3), k) == A(0);
}

template <class A>
EndTable<A> make_end_table(const OneInterval<A>& k) {
  EndTable<A> table;
  for (int i = 0; i < EndTable<A>::kCount; i++) {
    const Ends<A> ends = ends_of<true>(k.middle + at_least(k.half_classes - A(0.5) - A(i), A(0)), k);
    table.near[i] = ends.near;
    table.far[i] = ends.far;
  }
  return table;
}

template <class A>
QUANTOPS_INLINE A entry_of(A classes_to_end, const A* table) {
  A entry = table[3];
  for (int i = 2; i >= 0; i--) entry = classes_to_end < A(i) + A(0.5) ? table[i] : entry;
  return entry;
}

// Where the ends come from: none are felt, a table, or ends_loop.
enum class From { nowhere, table, loop };

template <From from, bool kFar, class A>
QUANTOPS_SIMD void slopes_loop(OnePart<A>& part, int64_t n, const OneInterval<A>& interval, const EndTable<A>& ends) {
  const OneInterval<A> k = interval;
  const EndTable<A> table = ends;
  for (int64_t i = 0; i < n; i++) {
    const A c = part.c[i];
    Ends<A> e = {A(0), A(0)};
    if (from == From::table) {
      const A away = classes_to_near_end(c, k);
      e.near = entry_of(away, table.near);
      if (kFar) e.far = entry_of(away, table.far);
    } else if (from == From::loop) {
      e.near = part.near[i];
      if (kFar) e.far = part.far[i];
    }
    const Slopes<A> slopes = winner_of_one<from != From::nowhere, kFar>(c, part.b[i], e, k);
    part.rt[i] = slopes.rt;
    part.rq[i] = slopes.rq;
  }
}

// Sums over the lanes of a block that the gradients of alpha and sigma are made of, with u = g c and t = u r T/ratio:
// winner_factors, term by term. 16 lanes, so that all of them are in registers.
constexpr int kOneLanes = 16;

template <class A>
struct OneLanes {
  A u[kOneLanes] = {}, q[kOneLanes] = {}, c[kOneLanes] = {}, w[kOneLanes] = {};

  void add_to(ScaleSums& sums, const Bins<A>& p, const OneInterval<A>& k) const {
    double of_u = 0, of_q = 0, of_c = 0, of_w = 0;
    for (int j = 0; j < kOneLanes; j++) {
      of_u += u[j];
      of_q += q[j];
      of_c += c[j];
      of_w += w[j];
    }
    const double beta = p.beta, scale = beta * k.ratio;
    sums.alpha += of_u + scale * (0.5 * of_q - of_c);
    sums.sigma -= scale * (0.69314718055994531 * of_w + 0.5 * beta * of_q);
  }
};

// kScales: sums for alpha and sigma are wanted.
template <bool kScales, class A>
QUANTOPS_INLINE A winner_of_one_at(const OnePart<A>& part, int64_t i, A g, const OneInterval<A>& k, OneLanes<A>& s,
                                   int j) {
  const A c = part.c[i], u = g * c, v = u * part.rt[i], t = mirrored(v, c, k);
  if (kScales) {
    s.u[j] += u;
    s.q[j] += u * part.rq[i];
    s.c[j] += t * c;
    s.w[j] += v * part.w[i];
  }
  return k.scale * t;
}

template <bool kScales, class A>
QUANTOPS_SIMD void winner_of_one_loop(const OnePart<A>& part, const A* __restrict g, A* __restrict out, int64_t n,
                                      const OneInterval<A>& interval, OneLanes<A>& sums) {
  const OneInterval<A> k = interval;
  OneLanes<A> s = sums;
  int64_t i = 0;
  for (; i + kOneLanes <= n; i += kOneLanes)
    for (int j = 0; j < kOneLanes; j++)
      out[i + j] = winner_of_one_at<kScales>(part, i + j, g[i + j], k, s, j);
  for (int j = 0; i < n; i++, j++) out[i] = winner_of_one_at<kScales>(part, i, g[i], k, s, j);
  sums = s;
}

// What a scale fixes of the loops to run.
template <class A>
struct OneScale {
  OneInterval<A> interval;
  EndTable<A> ends;
  bool plain, table, far;
};

template <class A>
OneScale<A> make_one_scale(const Bins<A>& p) {
  const OneInterval<A> k = make_one_interval(p);
  return {k, make_end_table(k), is_plain(k), has_end_table(k), feels_far_end(k)};
}

template <class A>
void slopes_of_part(OnePart<A>& part, int64_t n, const OneScale<A>& s) {
  const OneInterval<A>& k = s.interval;
  if (k.half_classes > A(4) && !feels_end_loop(part, n, k)) {
    slopes_loop<From::nowhere, false>(part, n, k, s.ends);
  } else if (s.table) {
    if (s.far) slopes_loop<From::table, true>(part, n, k, s.ends);
    else slopes_loop<From::table, false>(part, n, k, s.ends);
  } else if (s.far) {
    ends_loop<true>(part, n, k);
    slopes_loop<From::loop, true>(part, n, k, s.ends);
  } else {
    ends_loop<false>(part, n, k);
    slopes_loop<From::loop, false>(part, n, k, s.ends);
  }
}

// A block of any length.
template <bool kScales, class A>
void winner_of_one_block(const A* x, const A* g, A* out, int64_t size, const Bins<A>& p, const OneScale<A>& s,
                         ScaleSums& sums) {
  OneLanes<A> lanes;
  OnePart<A> part;
  for (int64_t i = 0; i < size; i += kOnePart) {
    const int64_t n = size - i < kOnePart ? size - i : kOnePart;
    if (s.plain) {
      one_place_loop<true>(x + i, part, n, p, s.interval);
      edge_power_loop<true>(part, n, s.interval);
    } else {
      one_place_loop<false>(x + i, part, n, p, s.interval);
      edge_power_loop<false>(part, n, s.interval);
    }
    slopes_of_part(part, n, s);
    winner_of_one_loop<kScales>(part, g + i, out + i, n, s.interval, lanes);
  }
  lanes.add_to(sums, p, s.interval);
}

// The masses of a part's elements, and the classes that won there.
template <class A>
struct alignas(64) WinnerPart {
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
    w.gate[i] = ((j < below) | (j > above)) ? k.weight : before;  // outside the level before
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
QUANTOPS_SIMD void winner_of_many_loop(WinnerPart<A>& w, const A* __restrict g, A* __restrict out, int64_t n, A sharp,
                                       const Bins<A>& bins, ScaleSums& sums) {
  const Bins<A> p = bins;
  gradient_lanes(g, out, n, sums, [&](int64_t i) QUANTOPS_LANES {
    const Masses<A> m = {w.total[i], w.by_x[i], w.by_alpha[i], {}, {}};
    A r;
    const Factors<A> f = winner_of_many(m, w.at.c[i], w.at.z[i], w.j[i], w.gate[i], sharp, p, r);
    w.share[i] = g[i] * (p.alpha * (w.j[i] * r));
    return f;
  });
}

// Sum of share * ([j is in a level above t] - r of those levels), from the highest t down: `tail` collects their
// masses.
template <class A>
QUANTOPS_INLINE A winner_gate_at(const WinnerPart<A>& w, const A* mass, A* tail, int64_t i, A bottom, A top) {
  const A all = tail[i] + mass[i], above = ((w.j[i] < bottom) | (w.j[i] > top)) ? A(1) : A(0);
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

// ---------------------------------------------------------------------------------------------- soft, over the classes

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
  for (int t = 0; t < kSteps; t++) g = ((i > gates.top[t]) | (i < gates.bottom[t])) ? gates.weight[t + 1] : g;
  return g;
}

// The soft sums of a part's elements.
template <class A>
struct alignas(64) SoftPart {
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
    const A up = ((i_up > top) | (i_up < bottom)) ? of_up[i] : A(0);
    const A down = ((i_down > top) | (i_down < bottom)) ? of_down[i] : A(0);
    tail[i] += up + down;
  }
}

template <class A>
QUANTOPS_SIMD void soft_gradient_loop(const SoftPart<A>& s, const A* __restrict g, A* __restrict out, int64_t n,
                                      const Bins<A>& bins, ScaleSums& sums) {
  const Bins<A> p = bins;
  gradient_lanes(g, out, n, sums, [&](int64_t i) QUANTOPS_LANES {
    const SoftSlopes<A> slopes = {s.by_x[i], s.by_width[i]};
    return soft_factors(slopes, s.at.c[i], s.at.z[i], s.first[i], s.weight[i], p);
  });
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
