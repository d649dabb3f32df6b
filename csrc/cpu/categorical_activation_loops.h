// Loops over blocks of activations. Each is compiled for three instruction sets (simd.h).
#pragma once
#include "categorical_activation_math.h"
#include "cpu/blocks.h"
#include "cpu/simd.h"

namespace quantops {

// ------------------------------------------------------------------------------------------------------------- forward

// q, and of each element its quarter: among the lanes as wide as q, bytes would halve the registers.
template <class In, class Out, class A>
QUANTOPS_INLINE int32_t categorical_activation_at(In x, Out& q, const Bins<A>& p, A least, A most) {
  const A v = widen(x);
  narrow_from<In>(p.alpha * nearest_class(v, p), q);
  return static_cast<int32_t>(quarter_of(v, A(widen(q)), p, least, most));
}

template <class In, class Out, class A>
QUANTOPS_SIMD void categorical_activation_loop(const In* __restrict x, Out* __restrict q, uint8_t* __restrict k,
                                               bool streaming, int64_t n, const Bins<A>& bins, A least, A most) {
  const Bins<A> p = bins;
  alignas(64) Out lanes[kLanes];
  alignas(64) int32_t quarters[kLanes];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; j++) quarters[j] = categorical_activation_at(x[i + j], lanes[j], p, least, most);
    put_lanes(q + i, lanes, streaming);
    for (int j = 0; j < kLanes; j++) k[i + j] = static_cast<uint8_t>(quarters[j]);
  }
  for (; i < n; i++) k[i] = static_cast<uint8_t>(categorical_activation_at(x[i], q[i], p, least, most));
}

// The quarters alone, of a q that has been stored.
template <class A>
QUANTOPS_SIMD void quarter_loop(const A* __restrict x, const A* __restrict q, uint8_t* __restrict k, int64_t n,
                                const Bins<A>& bins, A least, A most) {
  const Bins<A> p = bins;
  for (int64_t i = 0; i < n; i++)
    k[i] = static_cast<uint8_t>(static_cast<int32_t>(quarter_of(x[i], q[i], p, least, most)));
}

// Four at a time as the bytes of a word, k[i] in byte i.
QUANTOPS_SIMD inline void join_quarters_loop(const uint8_t* __restrict k, uint8_t* __restrict bytes, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t w;
    std::memcpy(&w, k + 4 * i, 4);
    bytes[i] = static_cast<uint8_t>(w | w >> 6 | w >> 12 | w >> 18);
  }
}

// ------------------------------------------------------------------------------------------------------------ backward

QUANTOPS_SIMD inline void split_quarters_loop(const uint8_t* __restrict bytes, uint8_t* __restrict k, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t b = bytes[i], w = (b | b << 6 | b << 12 | b << 18) & 0x03030303u;
    std::memcpy(k + 4 * i, &w, 4);
  }
}

template <class In, class A>
QUANTOPS_SIMD void place_loop(const In* __restrict q, const uint8_t* __restrict k, int32_t* __restrict place, int64_t n,
                              const Bins<A>& bins) {
  const Bins<A> p = bins;
  for (int64_t i = 0; i < n; i++)
    place[i] = static_cast<int32_t>(place_of(A(widen(q[i])), static_cast<A>(static_cast<int32_t>(k[i])), p));
}

// A row of the table: the factors of x, alpha and sigma, and 0. One load brings all of them, which takes about half as
// long as gathering each from a table of its own.
constexpr int kRow = 4;
template <class A>
using Row __attribute__((vector_size(kRow * sizeof(A)))) = A;

// The row of a place times g.
template <class R, class A>
QUANTOPS_INLINE void times_row(R& f, const A* table, int32_t place, A g) {
  std::memcpy(&f, table + kRow * place, sizeof(f));
  f *= g;
}

// dL/dx, and the sums of every fourth element for alpha and sigma, as rows.
template <class A>
QUANTOPS_SIMD void factor_loop(const A* __restrict table, const int32_t* __restrict place, const A* __restrict g,
                               A* __restrict out, int64_t n, A (&sums)[4][kRow]) {
  Row<A> s0 = {}, s1 = {}, s2 = {}, s3 = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    Row<A> f0, f1, f2, f3;
    times_row(f0, table, place[i], g[i]);
    times_row(f1, table, place[i + 1], g[i + 1]);
    times_row(f2, table, place[i + 2], g[i + 2]);
    times_row(f3, table, place[i + 3], g[i + 3]);
    s0 += f0;
    s1 += f1;
    s2 += f2;
    s3 += f3;
    out[i] = f0[0];
    out[i + 1] = f1[0];
    out[i + 2] = f2[0];
    out[i + 3] = f3[0];
  }
  for (; i < n; i++) {
    Row<A> f;
    times_row(f, table, place[i], g[i]);
    s0 += f;
    out[i] = f[0];
  }
  std::memcpy(sums[0], &s0, sizeof(s0));
  std::memcpy(sums[1], &s1, sizeof(s1));
  std::memcpy(sums[2], &s2, sizeof(s2));
  std::memcpy(sums[3], &s3, sizeof(s3));
}

// --------------------------------------------------------------------------------------------------------- the table

constexpr int64_t kTablePart = 64;  // places: all of 4 bits

template <class A>
QUANTOPS_INLINE void put_row(A* row, const Factors<A>& f) {
  row[0] = f.x;
  row[1] = f.alpha;
  row[2] = f.sigma;
  row[3] = A(0);
}

// The soft factors of n places; decay[n] = exp(-beta n), up to the farthest class that is felt.
template <class A>
QUANTOPS_SIMD void soft_factor_loop(const A* __restrict x, A* __restrict rows, int64_t n, const A* __restrict decay,
                                    int reach, A sharp, const Bins<A>& bins) {
  const Bins<A> p = bins;
  A c[kTablePart], z[kTablePart], y[kTablePart], w[kTablePart], weight[kTablePart], first[kTablePart];
  A by_x[kTablePart], by_width[kTablePart];
  auto gate = [&](A i) QUANTOPS_LANES { return A((i <= p.high) & (i >= p.low)); };
  for (int64_t i = 0; i < n; i++) {
    c[i] = nearest_class(x[i], p);
    z[i] = offset_of(x[i], c[i], p);
    y[i] = exponential(z[i] - p.half);
    w[i] = exponential(-z[i] - p.half);
    weight[i] = soft_center(y[i], w[i]).u;
    first[i] = A(0);
  }
  for (int step = 1; step <= reach; step++) {
    const A s = A(step), inner = decay[step - 1], outer = decay[step];
    for (int64_t i = 0; i < n; i++) {
      SoftSums<A> sums = {weight[i], first[i]};
      add_pair(sums, soft_pair(y[i], w[i], inner, outer), s, gate(c[i] + s), gate(c[i] - s));
      weight[i] = sums.weight;
      first[i] = sums.first;
    }
  }
  for (int64_t i = 0; i < n; i++) {
    const A inv = A(1) / weight[i], mean = first[i] * inv;
    A deviation;
    const SoftSlopes<A> slopes = center_slopes(soft_center(y[i], w[i]), A(1), mean, sharp, deviation);
    weight[i] = inv;
    first[i] = mean;
    by_x[i] = slopes.by_x;
    by_width[i] = slopes.by_width;
  }
  for (int step = 1; step <= reach; step++) {
    const A s = A(step), inner = decay[step - 1], outer = decay[step];
    for (int64_t i = 0; i < n; i++) {
      SoftSlopes<A> slopes = {by_x[i], by_width[i]};
      A up, down;
      add_slopes(slopes, soft_pair(y[i], w[i], inner, outer), s, first[i], gate(c[i] + s), gate(c[i] - s), sharp, up,
                 down);
      by_x[i] = slopes.by_x;
      by_width[i] = slopes.by_width;
    }
  }
  for (int64_t i = 0; i < n; i++) {
    const Factors<A> f = soft_factors(SoftSlopes<A>{by_x[i], by_width[i]}, c[i], z[i], first[i], weight[i], p);
    put_row(rows + kRow * i, f);
  }
}

}  // namespace quantops
