// Loops over a block of elements that share one base quantizer. Each is compiled for three instruction sets (simd.h).
#pragma once
#include "cpu/simd.h"
#include "truncate_math.h"

namespace quantops {

template <class A>
QUANTOPS_SIMD void tanh_loop(const A* __restrict w, A* __restrict t, int64_t n) {
  for (int64_t i = 0; i < n; i++) t[i] = tanh_of(w[i]);
}

// Codes of the base width, as floats.
template <class A>
QUANTOPS_SIMD void code_loop(const A* __restrict x, A* __restrict c, int64_t n, const Quantizer<A>& quantizer,
                             Rule rule) {
  const Quantizer<A> p = quantizer;
  if (rule == kRoundClamp) {
    for (int64_t i = 0; i < n; i++) c[i] = base_code(x[i], kRoundClamp, p);
  } else if (rule == kFloor) {
    for (int64_t i = 0; i < n; i++) c[i] = base_code(x[i], kFloor, p);
  } else {
    for (int64_t i = 0; i < n; i++) c[i] = base_code(x[i], kNearest, p);
  }
}

template <class A>
QUANTOPS_SIMD void cut_loop(const A* __restrict c, A* __restrict q, int64_t n, const Width<A>& width) {
  const Width<A> v = width;
  for (int64_t i = 0; i < n; i++) q[i] = odd_level(c[i], v) * v.step;
}

constexpr int kSummed = 4;  // tensors that one pass adds up: as many streams as the paper's widths

// sum = ((g[0] + g[1]) + g[2]) + ..., of 2 to 4.
template <int kCount, class A>
QUANTOPS_SIMD void sum_loop(const A* const* g, A* __restrict sum, int64_t n) {
  const A* __restrict a = g[0];
  const A* __restrict b = g[1];
  const A* __restrict c = g[kCount > 2 ? 2 : 0];
  const A* __restrict d = g[kCount > 3 ? 3 : 0];
  for (int64_t i = 0; i < n; i++) {
    A v = a[i] + b[i];
    if (kCount > 2) v = v + c[i];
    if (kCount > 3) v = v + d[i];
    sum[i] = v;
  }
}

template <class A>
QUANTOPS_SIMD void add_loop(const A* __restrict g, A* __restrict sum, int64_t n) {
  for (int64_t i = 0; i < n; i++) sum[i] += g[i];
}

template <class A>
QUANTOPS_SIMD void inside_loop(const A* __restrict w, const A* __restrict g, A* __restrict out, int64_t n,
                               const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  for (int64_t i = 0; i < n; i++) out[i] = inside(w[i], p) ? g[i] : A(0);
}

// As inside_loop, times the slope of t = tanh(w).
template <class A>
QUANTOPS_SIMD void inside_tanh_loop(const A* __restrict w, const A* __restrict t, const A* __restrict g,
                                    A* __restrict out, int64_t n, const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  for (int64_t i = 0; i < n; i++) {
    A v = g[i] * tanh_slope(t[i]);
    out[i] = inside(w[i], p) ? v : A(0);
  }
}

// sum g * q / out_scale
template <class A>
QUANTOPS_SIMD double level_dot_loop(const A* __restrict c, const A* __restrict g, int64_t n, const Width<A>& width) {
  const Width<A> v = width;
  A sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; j++) sum[j] += g[i + j] * (odd_level(c[i + j], v) * v.unit_step);
  for (int j = 0; i < n; i++, j++) sum[j] += g[i] * (odd_level(c[i], v) * v.unit_step);
  double total = 0;
  for (int j = 0; j < kLanes; j++) total += sum[j];
  return total;
}

// sum g * (x / s) * inside, where x is w, or tanh(w) under companding
template <class A>
QUANTOPS_SIMD double inner_dot_loop(const A* w, const A* x, const A* __restrict g, int64_t n,
                                    const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  A sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; j++) sum[j] += g[i + j] * inner_term(w[i + j], x[i + j], p);
  for (int j = 0; i < n; i++, j++) sum[j] += g[i] * inner_term(w[i], x[i], p);
  double total = 0;
  for (int j = 0; j < kLanes; j++) total += sum[j];
  return total;
}

}  // namespace quantops
