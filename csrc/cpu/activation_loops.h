// Loops over blocks of activations. Each is compiled for three instruction sets (simd.h). A block begins at a whole
// byte of what is kept; of its last byte the rest is zero.
#pragma once
#include "activation_math.h"
#include "cpu/blocks.h"
#include "cpu/simd.h"

namespace quantops {

// The place in memory of lane j, which Elements may have put in another order.
template <bool kPairs>
QUANTOPS_INLINE constexpr int place_of_lane(int j) {
  return !kPairs ? j : j < kLanes / 2 ? 2 * j : 2 * (j - kLanes / 2) + 1;
}

// kLanes numbers of 8 bits in the order of memory, lane by lane.
template <bool kPairs>
QUANTOPS_INLINE void get_numbers(const uint8_t* from, int32_t* lanes) {
  if constexpr (kPairs) {
    for (int j = 0; j < kLanes / 2; j++) {
      uint16_t word;
      std::memcpy(&word, from + 2 * j, sizeof(word));
      lanes[j] = word & 0xff;
      lanes[j + kLanes / 2] = word >> 8;
    }
  } else {
    for (int j = 0; j < kLanes; j++) lanes[j] = from[j];
  }
}

// ------------------------------------------------------------------------------------------------------------- forward

// kLanes elements: their q in `y`, what is kept of them in `kept`. kPlain: by round_clamp, without an offset.
template <Keep kKeep, bool kPlain, bool kPairs, class In, class R, class A>
QUANTOPS_INLINE void quantize_lanes(const In* x, R&& y, uint8_t* kept, const Grid<A>& p) {
  const Elements<In, kPairs> from(x);
  int32_t lanes[kLanes];
  for (int j = 0; j < kLanes; j++) {
    const A v = kPlain ? from[j] : from[j] - p.offset, value = grid_level<kPlain>(v, p) * p.step;
    y.set(j, kPlain ? value : value + p.offset);
    if constexpr (kKeep == kBits) lanes[j] = inside(v, p) ? int32_t(uint32_t(1) << place_of_lane<kPairs>(j)) : 0;
    if constexpr (kKeep == kResidual) lanes[j] = static_cast<int32_t>(residual_number(value, v, p));
  }
  y.finish();
  if constexpr (kKeep == kBits) {
    uint32_t word = 0;
    for (int j = 0; j < kLanes; j++) word |= static_cast<uint32_t>(lanes[j]);
    std::memcpy(kept, &word, sizeof(word));
  }
  if constexpr (kKeep == kResidual)
    for (int j = 0; j < kLanes; j++) kept[j] = static_cast<uint8_t>(lanes[j]);
}

template <Keep kKeep>
constexpr int kKeptOfLanes = kKeep == kInput  ? 0
                             : kKeep == kBits ? kLanes / 8
                                              : kLanes;

template <Keep kKeep, bool kPlain, class In, class Out, class A>
QUANTOPS_SIMD void activation_loop(const In* __restrict x, Out* __restrict q, bool streaming, uint8_t* __restrict kept,
                                   int64_t n, const Grid<A>& grid) {
  constexpr bool kPairs = kKeep != kResidual && kAllPairs<In, Out>;  // numbers are written in the order of memory
  const Grid<A> p = grid;
  int64_t i = 0;
  for (; i + kRun <= n; i += kRun) {
    alignas(64) Out run[kRun];
    for (int k = 0; k < kRun; k += kLanes, kept += kKeptOfLanes<kKeep>)
      quantize_lanes<kKeep, kPlain, kPairs>(x + i + k, Results<In, Out, kPairs>(run + k), kept, p);
    for (int k = 0; k < kRun; k += kLanes) put_lanes(q + i + k, run + k, streaming);
  }
  for (; i + kLanes <= n; i += kLanes, kept += kKeptOfLanes<kKeep>) {
    alignas(64) Out lanes[kLanes];
    quantize_lanes<kKeep, kPlain, kPairs>(x + i, Results<In, Out, kPairs>(lanes), kept, p);
    put_lanes(q + i, lanes, streaming);
  }
  for (int j = 0; i < n; i++, j++) {
    const A v = A(widen(x[i])) - p.offset, value = grid_level<false>(v, p) * p.step;
    narrow_from<In>(value + p.offset, q[i]);
    if constexpr (kKeep == kBits) {
      if (j % 8 == 0) kept[j / 8] = 0;
      kept[j / 8] |= static_cast<uint8_t>(inside(v, p) << j % 8);
    }
    if constexpr (kKeep == kResidual) kept[j] = static_cast<uint8_t>(residual_number(value, v, p));
  }
}

// ------------------------------------------------------------------------------------------------------------ backward

// Where an element lies, from what is known of it: x (kInput), q and a bit (kBits), or a number.
template <Keep kKeep, class A>
QUANTOPS_INLINE bool known_inside(A x, int32_t kept, const Grid<A>& p) {
  if constexpr (kKeep == kInput)
    return inside(x - p.offset, p);
  else if constexpr (kKeep == kBits)
    return kept != 0;
  else
    return (kept > kBelow) & (kept < kAbove);
}

template <Keep kKeep, class A>
QUANTOPS_INLINE bool known_above(A xq, int32_t kept, A middle, const Grid<A>& p) {
  if constexpr (kKeep == kInput)
    return xq - p.offset > p.high;
  else if constexpr (kKeep == kBits)
    return xq > middle;
  else
    return kept >= kAbove;
}

template <Keep kKeep, class A>
QUANTOPS_INLINE A known_residual(A x, int32_t kept, const Grid<A>& p) {
  if constexpr (kKeep == kInput) {
    const A v = x - p.offset;
    return residual_of(grid_level<false>(v, p) * p.step, v, p);
  } else {
    return A(kept - kMiddle);
  }
}

template <Keep kKeep, Learn kLearn>
constexpr bool kReadsOther = kKeep == kInput || (kKeep == kBits && kLearn != kLearnNone);

// Sums of g over elements, lane by lane.
template <class A>
struct LaneSums {
  A inside[kLanes] = {}, above[kLanes] = {}, below[kLanes] = {};
};

// kLanes elements: their dL/dx in `y`; xq: x or q, where it is needed. Outside, g is counted as above or not; what is
// below is what is left. A loop for each condition: of two of them in one loop the compiler makes branches.
template <Keep kKeep, Learn kLearn, bool kPairs, class T, class R, class A>
QUANTOPS_INLINE void gradient_lanes(const T* g, const T* xq, const uint8_t* kept, R&& y, A middle, const Grid<A>& p,
                                    LaneSums<A>& sums) {
  int32_t known[kLanes] = {};
  if constexpr (kKeep == kBits) {
    uint32_t word;
    std::memcpy(&word, kept, sizeof(word));
    for (int j = 0; j < kLanes; j++) known[j] = int32_t(word & (uint32_t(1) << place_of_lane<kPairs>(j)));
  }
  if constexpr (kKeep == kResidual) get_numbers<kPairs>(kept, known);
  const Elements<T, kPairs> from(g), other(xq);
  A outside[kLanes];
  for (int j = 0; j < kLanes; j++) {
    const A v = from[j];
    const bool in = known_inside<kKeep>(A(other[j]), known[j], p);
    y.set(j, in ? v : A(0));
    outside[j] = in ? A(0) : v;
  }
  y.finish();
  if constexpr (kLearn != kLearnNone)
    for (int j = 0; j < kLanes; j++) {
      const bool above = known_above<kKeep>(A(other[j]), known[j], middle, p);
      sums.above[j] += above ? outside[j] : A(0);
      sums.below[j] += above ? A(0) : outside[j];
    }
  if constexpr (kLearn == kLearnStep)
    for (int j = 0; j < kLanes; j++) {
      const A v = from[j], t = other[j], term = v * known_residual<kKeep>(t, known[j], p);
      sums.inside[j] += known_inside<kKeep>(t, known[j], p) ? term : A(0);
    }
}

// g: dL/dq; xq: x or q, where it is needed; both and the result as they are stored. Written in runs: while lanes are,
// sums cannot stay in registers.
template <Keep kKeep, Learn kLearn, class T, class A>
QUANTOPS_SIMD void activation_grad_loop(const T* __restrict g, const T* __restrict xq, const uint8_t* __restrict kept,
                                        T* __restrict out, bool streaming, int64_t n, const Grid<A>& grid,
                                        SideSums& total) {
  constexpr bool kPairs = kAllPairs<T>;
  constexpr int kBytes = kKeptOfLanes<kKeep>;
  const Grid<A> p = grid;
  const A middle = middle_of(p);
  const T* second = kReadsOther<kKeep, kLearn> ? xq : g;
  LaneSums<A> sums;
  int64_t i = 0;
  for (; i + kRun <= n; i += kRun) {
    alignas(64) T run[kRun];
    for (int k = 0; k < kRun; k += kLanes, kept += kBytes)
      gradient_lanes<kKeep, kLearn, kPairs>(g + i + k, second + i + k, kept, Results<T, T, kPairs>(run + k), middle, p,
                                            sums);
    for (int k = 0; k < kRun; k += kLanes) put_lanes(out + i + k, run + k, streaming);
  }
  for (; i + kLanes <= n; i += kLanes, kept += kBytes) {
    alignas(64) T lanes[kLanes];
    gradient_lanes<kKeep, kLearn, kPairs>(g + i, second + i, kept, Results<T, T, kPairs>(lanes), middle, p, sums);
    put_lanes(out + i, lanes, streaming);
  }
  for (int j = 0; i < n; i++, j++) {
    const int32_t known = kKeep == kBits ? kept[j / 8] >> j % 8 & 1 : kKeep == kResidual ? kept[j] : 0;
    const A v = widen(g[i]), t = kReadsOther<kKeep, kLearn> ? A(widen(xq[i])) : A(0);
    const bool in = known_inside<kKeep>(t, known, p);
    narrow_from<T>(in ? v : A(0), out[i]);
    if constexpr (kLearn != kLearnNone) {
      (known_above<kKeep>(t, known, middle, p) ? sums.above : sums.below)[j] += in ? A(0) : v;
      if constexpr (kLearn == kLearnStep) sums.inside[j] += in ? v * known_residual<kKeep>(t, known, p) : A(0);
    }
  }
  for (int j = 0; j < kLanes; j++) {
    total.inside += sums.inside[j];
    total.above += sums.above[j];
    total.below += sums.below[j];
  }
}

// -------------------------------------------------------------------------------------------------- scales per channel

// What differs from channel to channel in a Grid, element by element of a block.
template <class A>
struct OfElements {
  A offset[kBlock], mul[kBlock], step[kBlock], low[kBlock], high[kBlock], per_code[kBlock];

  QUANTOPS_INLINE void set(int64_t i, const Grid<A>& p) {
    offset[i] = p.offset;
    mul[i] = p.mul;
    step[i] = p.step;
    low[i] = p.low;
    high[i] = p.high;
    per_code[i] = p.per_code;
  }
  QUANTOPS_INLINE Grid<A> at(int64_t i, Grid<A> p) const {
    p.offset = offset[i];
    p.mul = mul[i];
    p.step = step[i];
    p.low = low[i];
    p.high = high[i];
    p.per_code = per_code[i];
    return p;
  }
};

// q and what is kept, an integer per element.
template <Keep kKeep, class A>
QUANTOPS_SIMD void activation_channels_loop(const A* __restrict x, A* __restrict q, int32_t* __restrict kept, int64_t n,
                                            const Grid<A>& grid, const OfElements<A>& each) {
  const Grid<A> common = grid;
  for (int64_t i = 0; i < n; i++) {
    const Grid<A> p = each.at(i, common);
    const A v = x[i] - p.offset, value = grid_level<false>(v, p) * p.step;
    q[i] = value + p.offset;
    if constexpr (kKeep == kBits) kept[i] = inside(v, p) ? 1 : 0;
    if constexpr (kKeep == kResidual) kept[i] = static_cast<int32_t>(residual_number(value, v, p));
  }
}

// The terms of the sums of an element.
template <class A>
struct Terms {
  A inside[kBlock], above[kBlock], below[kBlock];
};

template <Keep kKeep, class A>
QUANTOPS_SIMD void activation_grad_channels_loop(const A* __restrict g, const A* __restrict xq,
                                                 const int32_t* __restrict kept, A* __restrict out, int64_t n,
                                                 const Grid<A>& grid, const OfElements<A>& each,
                                                 Terms<A>& __restrict terms) {
  const Grid<A> common = grid;
  for (int64_t i = 0; i < n; i++) {
    const Grid<A> p = each.at(i, common);
    const bool in = known_inside<kKeep>(xq[i], kept[i], p), above = known_above<kKeep>(xq[i], kept[i], middle_of(p), p);
    const A v = g[i], outside = in ? A(0) : v;
    out[i] = in ? v : A(0);
    terms.inside[i] = in ? v * known_residual<kKeep>(xq[i], kept[i], p) : A(0);
    terms.above[i] = above ? outside : A(0);
    terms.below[i] = above ? A(0) : outside;
  }
}

}  // namespace quantops
