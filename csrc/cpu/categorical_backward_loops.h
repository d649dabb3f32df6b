// Loops over a part of a row: the winner's backward. Each is compiled for three instruction sets (simd.h).
#pragma once
#include "categorical_backward.h"
#include "cpu/categorical_soft_loops.h"

namespace quantops {

// The case of one interval, in short loops, of which the processor has more under way at a time than of a long one.
constexpr int64_t kOnePart = 512;

template <class A>
struct OnePart {
  A c[kOnePart], w[kOnePart];  // places up to the next multiple of 16 elements are read, whatever is there
  A b[kOnePart], near[kOnePart], near_slope[kOnePart], far[kOnePart];
};

template <bool kPlain, class A>
QUANTOPS_FUSED_SIMD void one_place_loop(const A* __restrict x, OnePart<A>& part, int64_t n, const Bins<A>& bins,
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
QUANTOPS_FUSED_SIMD void edge_power_loop(OnePart<A>& part, int64_t n, const OneInterval<A>& interval) {
  const OneInterval<A> k = interval;
  for (int64_t i = 0; i < n; i++) part.b[i] = edge_power<kPlain>(part.w[i], k);
}

// Whether an end of the grid can be felt.
template <class A>
QUANTOPS_SIMD bool feels_end_loop(const OnePart<A>& part, int64_t n, const OneInterval<A>& interval) {
  const OneInterval<A> k = interval;
  int32_t felt = 0;
  for (int64_t i = 0; i < n; i++) felt += decay_exponent(classes_to_near_end(part.c[i], k), k) >= least_decay<A>();
  return felt;
}

template <bool kFar, class A>
QUANTOPS_FUSED_SIMD void ends_loop(OnePart<A>& part, int64_t n, const OneInterval<A>& interval) {
  const OneInterval<A> k = interval;
  for (int64_t i = 0; i < n; i++) {
    const Ends<A> ends = ends_of<kFar>(part.c[i], k);
    part.near[i] = ends.near;
    part.near_slope[i] = ends.near_slope;
    if (kFar) part.far[i] = ends.far;
  }
}

// The same of the classes at an end and up to 15 from it, for scales where no class further away feels an end, or no
// class is further away. Selecting one of four costs a third of an exponential; with AVX-512, all are in a register.
constexpr int kSelected = 4, kLookedUp = 16;
template <class A>
struct EndTable {
  A near[kLookedUp], near_slope[kLookedUp], far[kLookedUp];
};

template <class A>
bool serves_all(int count, const OneInterval<A>& k) {
  return k.half_classes <= A(count) || decay_of(A(count - 1), k) == A(0);
}

template <class A>
QUANTOPS_SIMD void end_table_loop(EndTable<A>& table, const OneInterval<A>& interval) {
  const OneInterval<A> k = interval;
  for (int i = 0; i < kLookedUp; i++) {
    const Ends<A> ends = ends_of<true>(class_from_end(A(i), k), k);
    table.near[i] = ends.near;
    table.near_slope[i] = ends.near_slope;
    table.far[i] = ends.far;
  }
}

#if defined(__x86_64__)
// What ends_loop gives, up to the next multiple of 16 elements.
template <bool kFar>
__attribute__((target("avx512f,avx512bw"))) void look_up_ends_avx512(OnePart<float>& part, int64_t n,
                                                                     const OneInterval<float>& k,
                                                                     const EndTable<float>& table) {
  const __m512 near = _mm512_loadu_ps(table.near), far = _mm512_loadu_ps(table.far);
  const __m512 near_slope = _mm512_loadu_ps(table.near_slope);
  const __m512 middle = _mm512_set1_ps(k.middle), most = _mm512_set1_ps(k.half_classes - 0.5f);
  const __m512i last = _mm512_set1_epi32(kLookedUp - 1);
  for (int64_t i = 0; i < n; i += kLookedUp) {
    const __m512 away = _mm512_abs_ps(_mm512_sub_ps(_mm512_loadu_ps(part.c + i), middle));
    const __m512i classes = _mm512_min_epi32(_mm512_cvttps_epi32(_mm512_sub_ps(most, away)), last);
    _mm512_storeu_ps(part.near + i, _mm512_permutexvar_ps(classes, near));
    _mm512_storeu_ps(part.near_slope + i, _mm512_permutexvar_ps(classes, near_slope));
    if (kFar) _mm512_storeu_ps(part.far + i, _mm512_permutexvar_ps(classes, far));
  }
}
#endif

template <class A>
QUANTOPS_INLINE A entry_of(A classes_to_end, const A* table) {
  A entry = table[kSelected - 1];
  for (int i = kSelected - 2; i >= 0; i--) entry = classes_to_end < A(i) + A(0.5) ? table[i] : entry;
  return entry;
}

// Where the ends come from: none are felt, a table, or ends_loop.
enum class From { nowhere, table, loop };

// Those of an element.
template <From from, bool kFar, class A>
QUANTOPS_INLINE Ends<A> ends_at(const OnePart<A>& part, int64_t i, const OneInterval<A>& k, const EndTable<A>& table) {
  if (from == From::nowhere) return {};
  const A away = from_middle(part.c[i], k);
  if (from == From::table) {
    const A classes = classes_to_near_end(part.c[i], k);
    return make_ends(entry_of(classes, table.near), kFar ? entry_of(classes, table.far) : A(0), away, k);
  }
  Ends<A> ends = make_ends(part.near[i], kFar ? part.far[i] : A(0), away, k);
  ends.near_slope = part.near_slope[i];
  return ends;
}

// The sums of add_winner over the lanes of a block: 16, so that all of them are in registers.
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
    sums.alpha += winner_alpha<double>(of_u, of_q, of_c, p.beta, k.ratio);
    sums.sigma += winner_sigma<double>(of_q, of_w, p.beta, k.ratio);
  }
};

// kScales: sums for alpha and sigma are wanted.
template <bool kScales, From from, bool kFar, class A>
QUANTOPS_INLINE A winner_of_one_at(const OnePart<A>& part, int64_t i, A g, const OneInterval<A>& k,
                                   const EndTable<A>& table, OneLanes<A>& s, int j) {
  const Ends<A> ends = ends_at<from, kFar>(part, i, k, table);
  const Slopes<A> slopes = winner_of_one<from != From::nowhere, kFar>(part.b[i], ends, k);
  return add_winner<kScales>(g, part.c[i], part.w[i], slopes, k, s.u[j], s.q[j], s.c[j], s.w[j]);
}

template <bool kScales, From from, bool kFar, class A>
QUANTOPS_FUSED_SIMD void winner_of_one_loop(const OnePart<A>& part, const A* __restrict g, A* __restrict out, int64_t n,
                                            const OneInterval<A>& interval, const EndTable<A>& ends,
                                            OneLanes<A>& sums) {
  const OneInterval<A> k = interval;
  const EndTable<A> table = ends;
  OneLanes<A> s = sums;
  int64_t i = 0;
  for (; i + kOneLanes <= n; i += kOneLanes)
    for (int j = 0; j < kOneLanes; j++)
      out[i + j] = winner_of_one_at<kScales, from, kFar>(part, i + j, g[i + j], k, table, s, j);
  for (int j = 0; i < n; i++, j++) out[i] = winner_of_one_at<kScales, from, kFar>(part, i, g[i], k, table, s, j);
  sums = s;
}

// What a scale fixes of the loops to run.
template <class A>
struct OneScale {
  OneInterval<A> interval;
  EndTable<A> ends;
  bool plain, selected, looked_up, far;
};

template <class A>
OneScale<A> make_one_scale(const Bins<A>& p) {
  OneScale<A> s;
  s.interval = make_one_interval(p);
  end_table_loop(s.ends, s.interval);
  s.plain = is_plain(s.interval);
  s.selected = serves_all(kSelected, s.interval);
  s.looked_up = false;
#if defined(__x86_64__)
  s.looked_up = sizeof(A) == 4 && kHasAvx512 && serves_all(kLookedUp, s.interval);
#endif
  s.far = feels_far_end(s.interval);
  return s;
}

// near and far of a part.
template <bool kFar, class A>
void ends_of_part(OnePart<A>& part, int64_t n, const OneScale<A>& s) {
#if defined(__x86_64__)
  if constexpr (sizeof(A) == 4)
    if (s.looked_up) return look_up_ends_avx512<kFar>(part, n, s.interval, s.ends);
#endif
  ends_loop<kFar>(part, n, s.interval);
}

template <bool kScales, class A>
void winner_of_one_part(OnePart<A>& part, const A* g, A* out, int64_t n, const OneScale<A>& s, OneLanes<A>& sums) {
  const OneInterval<A>& k = s.interval;
  if (!s.looked_up && k.half_classes > A(kSelected) && !feels_end_loop(part, n, k)) {
    winner_of_one_loop<kScales, From::nowhere, false>(part, g, out, n, k, s.ends, sums);
  } else if (s.selected && !s.looked_up) {
    if (s.far)
      winner_of_one_loop<kScales, From::table, true>(part, g, out, n, k, s.ends, sums);
    else
      winner_of_one_loop<kScales, From::table, false>(part, g, out, n, k, s.ends, sums);
  } else if (s.far) {
    ends_of_part<true>(part, n, s);
    winner_of_one_loop<kScales, From::loop, true>(part, g, out, n, k, s.ends, sums);
  } else {
    ends_of_part<false>(part, n, s);
    winner_of_one_loop<kScales, From::loop, false>(part, g, out, n, k, s.ends, sums);
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
    winner_of_one_part<kScales>(part, g + i, out + i, n, s, lanes);
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
    if (!kFirst) m = {w.total[i], w.by_x[i], w.by_alpha[i], {w.top_s[i], w.top_n[i]}, {w.bottom_s[i], w.bottom_n[i]}};
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
  if (t == 0)
    level_loop<true, true>(w, w.mass[t], n, k, below, above, p);
  else if (is_signed)
    level_loop<false, true>(w, w.mass[t], n, k, below, above, p);
  else
    level_loop<false, false>(w, w.mass[t], n, k, below, above, p);
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

}  // namespace quantops
