// Loops over a block of elements that share one quantizer. Each is compiled for three instruction sets (simd.h).
#pragma once
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

// |B| is below 2^16 and a lane sees 128 elements of a block, so an int32 holds its sum; blocks add up in double.
template <class A>
QUANTOPS_SIMD void msq_loop(const A* __restrict w, A* __restrict q, int64_t n, const Quantizer<A>& quantizer,
                            LsbSums& sums) {
  const Quantizer<A> p = quantizer;
  A error[kLanes] = {};
  int32_t total[kLanes] = {}, nonzero[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; j++) {
      A x = w[i + j], u = round_clamp_unit(x, p), c = round_clamp_code(u, p.mul, p.top), y = level(c, p) * p.step;
      A size = magnitude(lsb_residual(u, c, p));
      int32_t whole = static_cast<int32_t>(size);
      q[i + j] = y;
      total[j] += whole;
      nonzero[j] += whole != 0;
      error[j] += (y - x) * (y - x);
    }
  }
  for (int j = 0; i < n; i++, j++) {
    A x = w[i], u = round_clamp_unit(x, p), c = round_clamp_code(u, p.mul, p.top), y = level(c, p) * p.step;
    A size = magnitude(lsb_residual(u, c, p));
    int32_t whole = static_cast<int32_t>(size);
    q[i] = y;
    total[j] += whole;
    nonzero[j] += whole != 0;
    error[j] += (y - x) * (y - x);
  }
  double b = 0;
  for (int j = 0; j < kLanes; j++) {
    b += total[j];
    sums.nonzero += nonzero[j];
    sums.sq_error += error[j];
  }
  sums.penalty += b * double(p.step);
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
  for (int64_t i = 0; i < n; i++) out[i] = grad_weight(w[i], g[i], r, p);
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
