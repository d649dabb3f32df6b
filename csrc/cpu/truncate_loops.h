// Loops over a block of elements that share one base quantizer. Each is compiled for three instruction sets (simd.h).
#pragma once
#include <vector>

#include "cpu/blocks.h"
#include "cpu/simd.h"
#include "truncate_math.h"

namespace quantops {

// Elements are read and written as they are stored; codes are floats in a buffer.

template <bool kTanh, class A>
QUANTOPS_INLINE A companded(A w) {
  if constexpr (kTanh)
    return tanh_of(w);
  else
    return w;
}

// kPairs: in the order of kAllPairs, for results that are bfloat16 as the weights are.
template <bool kPairs, bool kTanh, class In, class A>
QUANTOPS_SIMD void code_loop(const In* __restrict w, A* __restrict c, int64_t n, const Quantizer<A>& quantizer,
                             Rule rule) {
  const Quantizer<A> p = quantizer;
  if (rule == kRoundClamp)
    map_lanes<In, kPairs>(
        c, false, n, [&](A x) QUANTOPS_LANES { return base_code(companded<kTanh>(x), kRoundClamp, p); }, w);
  else if (rule == kFloor)
    map_lanes<In, kPairs>(
        c, false, n, [&](A x) QUANTOPS_LANES { return base_code(companded<kTanh>(x), kFloor, p); }, w);
  else
    map_lanes<In, kPairs>(
        c, false, n, [&](A x) QUANTOPS_LANES { return base_code(companded<kTanh>(x), kNearest, p); }, w);
}

template <bool kPairs, class In, class A>
void code_loop(const In* w, A* c, int64_t n, const Quantizer<A>& p, Rule rule, bool tanh) {
  tanh ? code_loop<kPairs, true>(w, c, n, p, rule) : code_loop<kPairs, false>(w, c, n, p, rule);
}

// In: of the weights that the codes come from, which are in the order of kAllPairs where it is that of both.
template <class In, class Out, class A>
QUANTOPS_SIMD void cut_loop(const A* __restrict c, Out* __restrict q, bool streaming, int64_t n,
                            const Width<A>& width) {
  const Width<A> v = width;
  map_lanes<In, kAllPairs<In, Out>>(q, streaming, n, [&](A x) QUANTOPS_LANES { return odd_level(x, v) * v.step; }, c);
}

// Widths of up to this many bits are looked up in a register, where their results are bfloat16 as the weights are: with
// AVX-512. A value then takes three instructions for 32 elements, where arithmetic takes two dozen.
constexpr int kTableWidth = 5;

QUANTOPS_SIMD inline bool nan_loop(const BFloat16* __restrict w, int64_t n) {
  uint16_t most = 0;
  for (int64_t i = 0; i < n; i++) {
    const uint16_t magnitude = w[i].bits & 0x7fff;
    most = magnitude > most ? magnitude : most;
  }
  return most > 0x7f80;  // infinity
}

// Whether they are in a block: a code that is looked up is no NaN, and a table takes as long as a few values.
inline bool looks_up(const BFloat16* w, int64_t n) {
#if defined(__x86_64__)
  return kHasAvx512 && n >= 8 * kLanes && !nan_loop(w, n);
#else
  return false;
#endif
}

#if defined(__x86_64__)
// Codes in the order of kAllPairs as integers in that of storage, up to a multiple of kLanes, which it returns.
__attribute__((target("avx512f,avx512bw"))) inline int64_t numbers_avx512(const float* c, uint16_t* numbers,
                                                                          int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const __m512i first = _mm512_cvttps_epi32(_mm512_loadu_ps(c + i));
    const __m512i second = _mm512_cvttps_epi32(_mm512_loadu_ps(c + i + kLanes / 2));
    _mm512_storeu_si512(numbers + i, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
  }
  return i;
}

// None of float64's, which no table is for.
inline int64_t numbers_avx512(const double*, uint16_t*, int64_t) { return 0; }

// The entry of a table for each code, cut by `shift` bits; n: a multiple of kLanes. Streamed results begin at one of 64
// bytes.
__attribute__((target("avx512f,avx512bw"))) inline void look_up_avx512(const uint16_t* codes, int64_t n, int shift,
                                                                       const BFloat16* table, BFloat16* q,
                                                                       bool streaming) {
  const __m512i entries = _mm512_loadu_si512(table);
  const __m128i by = _mm_cvtsi32_si128(shift);
  for (int64_t i = 0; i < n; i += kLanes) {
    const __m512i v = _mm512_permutexvar_epi16(_mm512_srl_epi16(_mm512_loadu_si512(codes + i), by), entries);
    if (streaming)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(q + i), v);
    else
      _mm512_storeu_si512(q + i, v);
  }
}

// What cut_loop gives for a width of `base - shift` bits, at most kTableWidth, where looks_up. `numbers`: the first
// `whole` codes as numbers_avx512 gives them, the others are in `c`.
template <class A>
void cut_by_table(const A* c, const uint16_t* numbers, int64_t whole, BFloat16* q, bool streaming, int64_t n, int shift,
                  const Width<A>& v) {
  A codes[kLanes];
  alignas(64) BFloat16 table[kLanes];
  for (int j = 0; j < kLanes; j++) codes[j] = A(int64_t(j) << shift);
  cut_loop<A>(codes, table, false, kLanes, v);
  look_up_avx512(numbers, whole, shift, table, q, streaming);
  cut_loop<BFloat16>(c + whole, q + whole, false, n - whole, v);
}
#endif

enum GradKind { kCovered, kInside, kTanhInside };

// dL/dw of one element from the sum of its gradients.
template <GradKind kKind, class A>
QUANTOPS_INLINE A grad_element(A w, A total, const Quantizer<A>& p) {
  if constexpr (kKind == kTanhInside) total = total * tanh_slope(tanh_of(w));
  return inside(w, p) ? total : A(0);
}

constexpr int kSummed = 4;  // gradients that a pass adds up: the paper's widths

// kBlock times -0, in the place of a gradient that is not there: g + -0 is g, also where that is -0.
template <class G>
const G* minus_zeros() {
  static const std::vector<G> block = [] {
    G zero;
    narrow(-widen(G{}), zero);
    return std::vector<G>(kBlock, zero);
  }();
  return block.data();
}

// out = (g[0] + g[1] + g[2] + g[3]) * inside [* slope], added in that order. kCovered: the sum alone, w is not read.
template <GradKind kKind, class In, class G, class A>
QUANTOPS_SIMD void grad_loop(const In* __restrict w, const G* const* g, In* __restrict out, bool streaming, int64_t n,
                             const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  const G* __restrict g0 = g[0], * __restrict g1 = g[1], * __restrict g2 = g[2], * __restrict g3 = g[3];
  map_lanes<G>(
      out, streaming, n,
      [&](A x, A y0, A y1, A y2, A y3) QUANTOPS_LANES {
        const A total = ((y0 + y1) + y2) + y3;
        return kKind == kCovered ? total : grad_element<kKind>(x, total, p);
      },
      w, g0, g1, g2, g3);
}

template <class A>
QUANTOPS_SIMD void add_loop(const A* __restrict g, A* __restrict sum, int64_t n) {
  for (int64_t i = 0; i < n; i++) sum[i] += g[i];
}

// (x/s) * inside
template <bool kTanh, class In, class A>
QUANTOPS_SIMD void inner_loop(const In* __restrict w, A* __restrict inner, int64_t n, const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  for (int64_t i = 0; i < n; i++) inner[i] = inner_term(widen(w[i]), companded<kTanh>(widen(w[i])), p);
}

// Sums of g * q / out_scale, and of g * (x/s) * inside.
struct ScaleSums {
  double level = 0, inner = 0;
};

template <class G, class A>
QUANTOPS_SIMD void scale_loop(const A* __restrict c, const A* __restrict inner, const G* __restrict g, int64_t n,
                              const Width<A>& width, ScaleSums& sums) {
  const Width<A> v = width;
  A level[kLanes] = {}, inners[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; j++) {
      level[j] += widen(g[i + j]) * (odd_level(c[i + j], v) * v.unit_step);
      inners[j] += widen(g[i + j]) * inner[i + j];
    }
  for (int j = 0; i < n; i++, j++) {
    level[j] += widen(g[i]) * (odd_level(c[i], v) * v.unit_step);
    inners[j] += widen(g[i]) * inner[i];
  }
  for (int j = 0; j < kLanes; j++) {
    sums.level += level[j];
    sums.inner += inners[j];
  }
}

}  // namespace quantops
