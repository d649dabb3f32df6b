// Loops over a block of elements that share one quantizer. Each is compiled for three instruction sets (simd.h).
#pragma once
#include <cstdlib>
#include <cstring>

#include "cpu/simd.h"
#include "quant_math.h"

namespace quantops {

// What the LSB sums of a part of a weight come to.
struct LsbSums {
  double penalty = 0;   // sum |B| * step
  int64_t nonzero = 0;
  double sq_error = 0;
};

template <class A>
QUANTOPS_SIMD void quantize_loop(const A* __restrict w, A* __restrict q, int64_t n, const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  for (int64_t i = 0; i < n; i++) q[i] = level(round_clamp_code(round_clamp_unit(w[i], p), p.mul, p.top), p) * p.step;
}

// One weight of msq: q, |B| and the squared error. With k = 1, the usual case, |B| is the parity of the code: half of
// the work.
template <bool kOne, class A>
QUANTOPS_INLINE void msq_element(A x, const Quantizer<A>& p, A& q, int32_t& size, A& error) {
  A u = round_clamp_unit_of_number(x, p), c = round_clamp_code(u, p.mul, p.top), y = level(c, p) * p.step;
  size = kOne ? static_cast<int32_t>(c) & 1 : std::abs(static_cast<int32_t>(lsb_residual(u, c, p)));
  q = x == x ? y : x;
  error = (q - x) * (q - x);
}

// |B| is below 2^16 and a lane sees 64 elements of a block, so an int32 holds its sum; blocks add up in double.
template <bool kOne, class A>
QUANTOPS_SIMD void msq_loop(const A* __restrict w, A* __restrict q, int64_t n, const Quantizer<A>& quantizer,
                            LsbSums& sums) {
  const Quantizer<A> p = quantizer;
  A error[kLanes] = {}, e;
  int32_t total[kLanes] = {}, nonzero[kLanes] = {}, size;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; j++) {
      msq_element<kOne>(w[i + j], p, q[i + j], size, e);
      total[j] += size;
      if (!kOne) nonzero[j] += size < 1 ? size : 1;
      error[j] += e;
    }
  }
  for (int j = 0; i < n; i++, j++) {
    msq_element<kOne>(w[i], p, q[i], size, e);
    total[j] += size;
    if (!kOne) nonzero[j] += size < 1 ? size : 1;
    error[j] += e;
  }
  double b = 0;
  for (int j = 0; j < kLanes; j++) {
    b += total[j];
    sums.nonzero += kOne ? total[j] : nonzero[j];
    sums.sq_error += error[j];
  }
  sums.penalty += b * double(p.step);
}

template <class A>
void msq_loop(const A* w, A* q, int64_t n, const Quantizer<A>& p, LsbSums& sums) {
  p.pow_k == A(2) ? msq_loop<true>(w, q, n, p, sums) : msq_loop<false>(w, q, n, p, sums);
}

template <class A>
QUANTOPS_SIMD void encode_loop(const A* __restrict w, int32_t* __restrict codes, int64_t n,
                               const Quantizer<A>& quantizer, Rule rule) {
  const Quantizer<A> p = quantizer;
  if (rule == kRoundClamp) {
    for (int64_t i = 0; i < n; i++) codes[i] = to_int(round_clamp_code(round_clamp_unit(w[i], p), p.mul, p.top), p.valid);
  } else if (rule == kFloor) {
    for (int64_t i = 0; i < n; i++) codes[i] = to_int(code(unit(w[i], p), kFloor, p), p.valid);
  } else {
    for (int64_t i = 0; i < n; i++) codes[i] = to_int(code(unit(w[i], p), kNearest, p), p.valid);
  }
}

template <class A>
QUANTOPS_SIMD void lsb_loop(const A* __restrict w, int32_t* __restrict b, int64_t n, const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  for (int64_t i = 0; i < n; i++) {
    A u = round_clamp_unit(w[i], p);
    b[i] = to_int(lsb_residual(u, round_clamp_code(u, p.mul, p.top), p), p.valid);
  }
}

// Returns how many codes are outside 0..2^n - 1.
template <class A>
QUANTOPS_SIMD int64_t decode_loop(const int32_t* __restrict codes, A* __restrict q, int64_t n,
                                  const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  const int32_t top = static_cast<int32_t>(p.top);
  int32_t outside = 0;
  for (int64_t i = 0; i < n; i++) {
    q[i] = level(static_cast<A>(codes[i]), p) * p.step;
    outside += (codes[i] < 0) | (codes[i] > top);
  }
  return outside;
}

template <class A>
QUANTOPS_SIMD void grad_loop(const A* __restrict w, const A* __restrict g, A* __restrict out, int64_t n,
                             const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  for (int64_t i = 0; i < n; i++) out[i] = inside(w[i], p) ? g[i] : A(0);
}

template <class A>
QUANTOPS_SIMD void grad_penalty_loop(const A* __restrict w, const A* __restrict g, A* __restrict out, int64_t n,
                                     const Quantizer<A>& quantizer, A r) {
  const Quantizer<A> p = quantizer;
  for (int64_t i = 0; i < n; i++) {
    A v = g[i] + r * lsb_sign(w[i], p);
    out[i] = inside(w[i], p) ? v : A(0);
  }
}

// out = g + r * sign(B) * inside; out may be g.
template <class A>
QUANTOPS_SIMD void add_lsb_grad_loop(const A* __restrict w, const A* g, A* out, int64_t n,
                                     const Quantizer<A>& quantizer, A r) {
  const Quantizer<A> p = quantizer;
  for (int64_t i = 0; i < n; i++) out[i] = g[i] + r * penalty_slope(w[i], p);
}

template <class A>
QUANTOPS_SIMD double scale_grad_loop(const A* __restrict w, const A* __restrict g, int64_t n,
                                     const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  A sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; j++) sum[j] += g[i + j] * scale_grad_term(w[i + j], p);
  for (int j = 0; i < n; i++, j++) sum[j] += g[i] * scale_grad_term(w[i], p);
  double total = 0;
  for (int j = 0; j < kLanes; j++) total += sum[j];
  return total;
}

// max|w|, NaN if there is one: as integers, the bits of magnitudes are in their order and NaN stands above infinity.
template <class A, class Bits>
QUANTOPS_SIMD Bits absmax_loop(const A* __restrict w, int64_t n) {
  Bits most = 0;
  constexpr Bits magnitude = static_cast<Bits>(~Bits(0)) >> 1;
  for (int64_t i = 0; i < n; i++) {
    Bits bits;
    std::memcpy(&bits, w + i, sizeof(A));
    bits &= magnitude;
    most = bits > most ? bits : most;
  }
  return most;
}

template <class A>
QUANTOPS_SIMD double abs_sum_loop(const A* __restrict w, int64_t n) {
  A sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; j++) sum[j] += w[i + j] < A(0) ? -w[i + j] : w[i + j];
  for (int j = 0; i < n; i++, j++) sum[j] += w[i] < A(0) ? -w[i] : w[i];
  double total = 0;
  for (int j = 0; j < kLanes; j++) total += sum[j];
  return total;
}

}  // namespace quantops
