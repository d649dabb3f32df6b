// Loops over a block of elements that share one quantizer. Each is compiled for three instruction sets (simd.h).
#pragma once
#include <cstdlib>
#include <cstring>

#include "cpu/blocks.h"
#include "cpu/simd.h"
#include "quant_math.h"

namespace quantops {

// What the LSB sums of a part of a weight come to.
struct LsbSums {
  double penalty = 0;   // sum |B| * step
  int64_t nonzero = 0;
  double sq_error = 0;
};

// f(the shortest form of the arithmetic): float32 ones are worth a loop of their own. `covered`: all weights are inside
// the scale.
template <class A, class F>
void with_form(bool short_form, bool covered, const F& f) {
  if constexpr (sizeof(A) == 4) {
    if (short_form && covered) return f(std::integral_constant<Form, kShortInside>());
    if (short_form) return f(std::integral_constant<Form, kShort>());
  }
  f(std::integral_constant<Form, kGeneral>());
}

// Elements are read and written as they are stored.

template <Form form, class In, class Out, class A>
QUANTOPS_SIMD void quantize_loop(const In* __restrict w, Out* __restrict q, bool streaming, int64_t n,
                                 const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  map_lanes(q, streaming, n, [&](int64_t i, Out& y) QUANTOPS_LANES {
    const A c = at_most(rint_small(scaled_unit<form>(widen(w[i]), p)), p.top);
    narrow_from<In>(level_of<form>(c, p) * p.step, y);
  });
}

template <class In, class Out, class A>
void quantize_loop(const In* w, Out* q, bool streaming, int64_t n, const Quantizer<A>& p, bool covered) {
  with_form<A>(has_short_form(p), covered, [&](auto form) { quantize_loop<form.value>(w, q, streaming, n, p); });
}

// One weight of msq: q, |B| and the squared error. With k = 1, the usual case, |B| is the parity of the code: half of
// the work.
template <Form form, bool kOne, class A>
QUANTOPS_INLINE void msq_element(A x, const Quantizer<A>& p, A& q, int32_t& size, A& error) {
  if constexpr (form == kGeneral) {
    A u = round_clamp_unit_of_number(x, p), c = round_clamp_code(u, p.mul, p.top), y = level(c, p) * p.step;
    size = kOne ? static_cast<int32_t>(c) & 1 : std::abs(static_cast<int32_t>(lsb_residual(u, c, p)));
    q = x == x ? y : x;
  } else {
    A c = at_most(rint_small(scaled_unit<form>(x, p)), p.top);
    size = static_cast<int32_t>(c) & 1;  // of NaN too: the machine makes it 0 or a power of two
    q = level_of<form>(c, p) * p.step;
  }
  error = (q - x) * (q - x);
}

// |B| is below 2^16 and a lane sees 32 elements of a block, so an int32 holds its sum; blocks add up in double. q may be
// null: the sums alone. Lanes are written in runs: while they are, sums cannot stay in registers.
template <Form form, bool kOne, class In, class Out, class A>
QUANTOPS_SIMD void msq_loop(const In* __restrict w, Out* __restrict q, bool streaming, int64_t n,
                            const Quantizer<A>& quantizer, LsbSums& sums) {
  const Quantizer<A> p = quantizer;
  constexpr int kRun = 4 * kLanes;
  alignas(64) Out run[kRun];
  A error[kLanes] = {}, y, e;
  int32_t total[kLanes] = {}, nonzero[kLanes] = {}, size;
  int64_t i = 0;
  for (; i + kRun <= n; i += kRun) {
    for (int k = 0; k < kRun; k += kLanes)
      for (int j = 0; j < kLanes; j++) {
        msq_element<form, kOne>(widen(w[i + k + j]), p, y, size, e);
        narrow_from<In>(y, run[k + j]);
        total[j] += size;
        if (!kOne) nonzero[j] += size < 1 ? size : 1;
        error[j] += e;
      }
    if (q)
      for (int k = 0; k < kRun; k += kLanes) put_lanes(q + i + k, run + k, streaming);
  }
  for (int j = 0; i < n; i++, j = (j + 1) % kLanes) {
    msq_element<form, kOne>(widen(w[i]), p, y, size, e);
    if (q) narrow_from<In>(y, q[i]);
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

template <class In, class Out, class A>
void msq_loop(const In* w, Out* q, bool streaming, int64_t n, const Quantizer<A>& p, bool covered, LsbSums& sums) {
  if (p.pow_k != A(2)) return msq_loop<kGeneral, false>(w, q, streaming, n, p, sums);
  with_form<A>(has_short_form(p), covered, [&](auto form) { msq_loop<form.value, true>(w, q, streaming, n, p, sums); });
}

template <Rule rule, class A>
QUANTOPS_INLINE int32_t encode_element(A w, const Quantizer<A>& p) {
  if constexpr (rule == kRoundClamp) return to_int(round_clamp_code(round_clamp_unit(w, p), p.mul, p.top), p.valid);
  else return to_int(code(unit(w, p), rule, p), p.valid);
}

template <Rule rule, class In, class A>
QUANTOPS_SIMD void encode_loop(const In* __restrict w, int32_t* __restrict codes, bool streaming, int64_t n,
                               const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  map_lanes(codes, streaming, n,
            [&](int64_t i, int32_t& c) QUANTOPS_LANES { c = encode_element<rule>(widen(w[i]), p); });
}

template <class In, class A>
QUANTOPS_SIMD void lsb_loop(const In* __restrict w, int32_t* __restrict b, bool streaming, int64_t n,
                            const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  map_lanes(b, streaming, n, [&](int64_t i, int32_t& v) QUANTOPS_LANES {
    A u = round_clamp_unit(widen(w[i]), p);
    v = to_int(lsb_residual(u, round_clamp_code(u, p.mul, p.top), p), p.valid);
  });
}

// No result is NaN: on a CPU, what would make one has raised by now.
template <class Out, class A>
QUANTOPS_SIMD void decode_loop(const int32_t* __restrict codes, Out* __restrict q, bool streaming, int64_t n,
                               const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  map_lanes(q, streaming, n, [&](int64_t i, Out& y) QUANTOPS_LANES {
    narrow_from<Out>(level(static_cast<A>(codes[i]), p) * p.step, y);
  });
}

// The union of the bits of codes: within 2^n - 1 if all of them are.
QUANTOPS_SIMD inline uint32_t union_loop(const int32_t* __restrict codes, int64_t n) {
  uint32_t seen = 0;
  for (int64_t i = 0; i < n; i++) seen |= static_cast<uint32_t>(codes[i]);
  return seen;
}

template <class A>
QUANTOPS_INLINE A grad_element(A w, A g, const Quantizer<A>& p) {
  return inside(w, p) ? g : A(0);
}

template <class In, class G, class A>
QUANTOPS_SIMD void grad_loop(const In* __restrict w, const G* __restrict g, In* __restrict out, bool streaming, int64_t n,
                             const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  map_lanes(out, streaming, n,
            [&](int64_t i, In& y) QUANTOPS_LANES { narrow_from<G>(grad_element(widen(w[i]), widen(g[i]), p), y); });
}

// sign(B) of a weight inside the scale.
template <Form form, class A>
QUANTOPS_INLINE A slope_element(A w, const Quantizer<A>& p) {
  if constexpr (form == kGeneral) return lsb_sign(w, p);
  else return lsb_of(scaled_unit<form>(w, p), p);
}

template <Form form, class In, class G, class A>
QUANTOPS_SIMD void grad_penalty_loop(const In* __restrict w, const G* __restrict g, In* __restrict out, bool streaming,
                                     int64_t n, const Quantizer<A>& quantizer, A strength) {
  const Quantizer<A> p = quantizer;
  const A r = strength == strength ? strength : quiet_nan<A>();
  map_lanes(out, streaming, n, [&](int64_t i, In& y) QUANTOPS_LANES {
    const A x = widen(w[i]);
    narrow_from<G>(grad_element(x, widen(g[i]) + r * slope_element<form>(x, p), p), y);
  });
}

template <class In, class G, class A>
void grad_penalty_loop(const In* w, const G* g, In* out, bool streaming, int64_t n, const Quantizer<A>& p, A r) {
  with_form<A>(has_short_form(p) && p.pow_k == A(2), false,
               [&](auto form) { grad_penalty_loop<form.value>(w, g, out, streaming, n, p, r); });
}

// g += r * sign(B) * inside
template <Form form, class In, class G, class A>
QUANTOPS_SIMD void add_lsb_grad_loop(const In* __restrict w, G* __restrict g, int64_t n, const Quantizer<A>& quantizer,
                                     A strength) {
  const Quantizer<A> p = quantizer;
  const A r = strength == strength ? strength : quiet_nan<A>();
  for (int64_t i = 0; i < n; i++) {
    const A x = widen(w[i]), slope = slope_element<form>(x, p);
    narrow_from<G>(widen(g[i]) + r * (inside(x, p) ? slope : A(0)), g[i]);
  }
}

template <class In, class G, class A>
void add_lsb_grad_loop(const In* w, G* g, int64_t n, const Quantizer<A>& p, A r) {
  with_form<A>(has_short_form(p) && p.pow_k == A(2), false,
               [&](auto form) { add_lsb_grad_loop<form.value>(w, g, n, p, r); });
}

template <class In, class G, class A>
QUANTOPS_SIMD double scale_grad_loop(const In* __restrict w, const G* __restrict g, int64_t n,
                                     const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  A sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; j++) sum[j] += widen(g[i + j]) * scale_grad_term(widen(w[i + j]), p);
  for (int j = 0; i < n; i++, j++) sum[j] += widen(g[i]) * scale_grad_term(widen(w[i]), p);
  double total = 0;
  for (int j = 0; j < kLanes; j++) total += sum[j];
  return total;
}

// The bits of max|w|, NaN if there is one, for any element type: as integers, the bits of magnitudes are in their order
// and NaN stands above infinity.
template <class Bits>
QUANTOPS_SIMD Bits absmax_loop(const char* __restrict w, int64_t n) {
  Bits most = 0;
  constexpr Bits magnitude = static_cast<Bits>(~Bits(0)) >> 1;
  for (int64_t i = 0; i < n; i++) {
    Bits bits;
    std::memcpy(&bits, w + i * int64_t(sizeof(Bits)), sizeof(Bits));
    bits &= magnitude;
    most = bits > most ? bits : most;
  }
  return most;
}

template <class A, class In>
QUANTOPS_SIMD double abs_sum_loop(const In* __restrict w, int64_t n) {
  A sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; j++) sum[j] += widen(w[i + j]) < A(0) ? -widen(w[i + j]) : widen(w[i + j]);
  for (int j = 0; i < n; i++, j++) sum[j] += widen(w[i]) < A(0) ? -widen(w[i]) : widen(w[i]);
  double total = 0;
  for (int j = 0; j < kLanes; j++) total += sum[j];
  return total;
}

}  // namespace quantops
