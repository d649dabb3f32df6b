// Family `categorical` on CUDA: the soft sum, over the classes or by a spline whose table a warp builds for its run.
#pragma once
#include <algorithm>

#include "../categorical_soft.h"
#include "categorical_quantizer.cuh"

namespace quantops::cuda {

// What the classes of a scale are weighed with: exp(-beta n), and G by level, of which `reach` classes from c are felt.
template <class A>
struct WeighedClasses {
  static constexpr int kNumbers = (1 << kMaxSoftBits) + kMaxSoftBits;
  const A* table;
  int reach;
  bool is_signed;

  __device__ __forceinline__ A decay(int n) const { return table[n]; }
  // G of class i, 0 where it is not in.
  __device__ __forceinline__ A gate(A i, const Bins<A>& p) const {
    const bool in = i >= p.low && i <= p.high;
    return in ? table[(1 << kMaxSoftBits) + level_of(static_cast<int32_t>(i), is_signed) - 1] : A(0);
  }
};

template <class A>
__device__ __forceinline__ int fill_classes(A* table, const CategoricalEntry& e, const Levels& l, A beta) {
  const A* gates = static_cast<const A*>(e.gates);
  const int reach = soft_reach(l, gates, beta);
  for (int n = lane_index(); n <= reach; n += kWarp) table[n] = exponential(-beta * static_cast<A>(n));
  for (int t = lane_index(); t < l.count; t += kWarp)
    table[(1 << kMaxSoftBits) + t] = static_cast<A>(cumulative_gate(gates, t + 1));
  return reach;
}

// The same without gates and without a table.
template <class A>
struct PlainClasses {
  A beta;
  int reach;

  __device__ __forceinline__ A decay(int n) const { return exponential(-beta * static_cast<A>(n)); }
  __device__ __forceinline__ A gate(A i, const Bins<A>& p) const { return i >= p.low && i <= p.high ? A(1) : A(0); }
};

// The sums of the first pass over the classes that are felt.
template <class A, class Classes>
__device__ __forceinline__ SoftSums<A> soft_sums(A c, A y, A w, const Classes& classes, const Bins<A>& p) {
  SoftSums<A> sums = {classes.gate(c, p) * soft_center(y, w).u, A(0)};
  A inner = A(1);
#pragma unroll 1
  for (int n = 1; n <= classes.reach; ++n) {
    const A step = static_cast<A>(n), outer = classes.decay(n);
    add_pair(sums, soft_pair(y, w, inner, outer), step, classes.gate(c + step, p), classes.gate(c - step, p));
    inner = outer;
  }
  return sums;
}

// Those of the second; add(i, the deviation of class i), of every class that is felt.
template <class A, class Classes, class F>
__device__ __forceinline__ SoftSlopes<A> soft_slopes(A c, A y, A w, A mean, A sharp, const Classes& classes,
                                                     const Bins<A>& p, F add) {
  A up, down, inner = A(1);
  SoftSlopes<A> slopes = center_slopes(soft_center(y, w), classes.gate(c, p), mean, sharp, up);
  add(c, up);
#pragma unroll 1
  for (int n = 1; n <= classes.reach; ++n) {
    const A step = static_cast<A>(n), outer = classes.decay(n);
    add_slopes(slopes, soft_pair(y, w, inner, outer), step, mean, classes.gate(c + step, p), classes.gate(c - step, p),
               sharp, up, down);
    add(c + step, up);
    add(c - step, down);
    inner = outer;
  }
  return slopes;
}

// What the spline of a scale interpolates: the mean alone, or gradients by x, alpha and sigma. The table has the
// coefficients of each, in an interval all together.
constexpr int kOfMean = 1, kOfSlopes = 3;

// A lane computes all of an interval.
template <int kFunctions, class A>
__device__ __forceinline__ void fill_spline(A* table, const Spline<A>& k, const Levels& l, const Bins<A>& p) {
  const PlainClasses<A> classes = {p.beta, soft_reach(l, static_cast<const A*>(nullptr), p.beta)};
  const A sharp = static_cast<A>(one_minus_exp(static_cast<double>(p.beta)));
#pragma unroll 1
  for (int interval = lane_index(); interval < k.intervals; interval += kWarp) {
    A* mine = table + interval * (kFunctions * kSplineOrder);
#pragma unroll 1
    for (int j = 0; j < kSplineOrder; ++j) {
      const SplineNode<A> node = spline_node(interval, j, k, p);
      const A y = exponential(node.z - p.half), w = exponential(-node.z - p.half);
      const SoftSums<A> sums = soft_sums(node.c, y, w, classes, p);
      const A inv = A(1) / sums.weight, mean = sums.first * inv;
      if constexpr (kFunctions == kOfMean) {
        mine[j] = mean;
      } else {
        const SoftSlopes<A> slopes = soft_slopes(node.c, y, w, mean, sharp, classes, p, [](A, A) {});
        const SplineValues<A> v = spline_values(slopes, node.z, mean, inv, p);
        mine[j] = v.x;
        mine[kSplineOrder + j] = v.alpha;
        mine[2 * kSplineOrder + j] = v.sigma;
      }
    }
#pragma unroll 1
    for (int f = 0; f < kFunctions; ++f) to_coefficients(mine + f * kSplineOrder);
  }
}

template <class A>
struct alignas(16) Coefficients {
  A v[kSplineOrder];
};

// What a warp has of its scale: the spline or, where that has no intervals, the classes. kFunctions: 0 where there are
// always gates, and so never a spline.
template <class A, int kFunctions>
struct SoftTable {
  static constexpr bool kSplined = sizeof(A) == 4 && kFunctions > 0;
  static constexpr int kRow = kFunctions * kSplineOrder;
  A* table;
  Spline<A> spline;
  int reach;
  bool is_signed;

  __device__ __forceinline__ SoftTable(const CategoricalEntry& e, const Levels& l, const Bins<A>& p) {
    constexpr int kNumbers = std::max(kSplined ? kMostIntervals * kRow : 0, WeighedClasses<A>::kNumbers);
    alignas(16) __shared__ A shared[kWarpsPerBlock][kNumbers];
    table = shared[warp_index()];
    spline = {};
    reach = 0;
    is_signed = l.is_signed;
    if constexpr (kSplined)
      if (!e.gates) spline = make_spline(p, l, e.inner);
    if (!spline.intervals)
      reach = fill_classes(table, e, l, p.beta);
    else if constexpr (kSplined)
      fill_spline<kFunctions>(table, spline, l, p);
    __syncwarp();
  }

  __device__ __forceinline__ WeighedClasses<A> classes() const { return {table, reach, is_signed}; }

  // Function f at a place.
  __device__ __forceinline__ A value(int f, const SplinePlace<A>& at) const {
    const A* row = table + at.interval * kRow + f * kSplineOrder;
    const Coefficients<A> c = *reinterpret_cast<const Coefficients<A>*>(row);
    return spline_value(c.v, at.t);
  }
};

template <class W, class Out>
struct SoftValue : CategoricalBase {
  static constexpr bool kRolled = true;
  static constexpr int kBytesInFlight = 16;
  using X = W;
  using G = None;
  using O = Out;
  using A = Acc<W>;
  using Soft = SoftTable<A, kOfMean>;
  struct State {
    Bins<A> p;
    Soft soft;
  };
  Source source;

  __device__ __forceinline__ State begin(const E& e, int64_t row, int which) const {
    const Levels l = source.levels<A>(e, which);
    const Bins<A> p = source.bins<A>(e, row, l);
    return {p, Soft(e, l, p)};
  }
  __device__ __forceinline__ O apply(X wide, None, const State& s) const {
    const A x = widen(wide), c = nearest_class(x, s.p);
    if (Soft::kSplined && s.soft.spline.intervals) {
      const A side = c - s.soft.spline.middle, z = scaled_offset(x, c, s.p.inv_sigma, s.p);
      const A mean = s.soft.value(0, spline_place(side, z, s.soft.spline));
      return Narrow<O>::from(s.p.alpha * (c + change_sign(mean, side)));
    }
    const A z = offset_of(x, c, s.p);
    const SoftSums<A> sums = soft_sums(c, exponential(z - s.p.half), exponential(-z - s.p.half), s.soft.classes(), s.p);
    return Narrow<O>::from(s.p.alpha * (c + sums.first / sums.weight));
  }
};

}  // namespace quantops::cuda
