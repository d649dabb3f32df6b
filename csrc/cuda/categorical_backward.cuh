// Family `categorical` on CUDA: gradients, of the winner and of the soft sum.
#pragma once
#include "../categorical_backward.h"
#include "categorical_draw.cuh"
#include "categorical_soft.cuh"

namespace quantops::cuda {

// What the gradients of alpha and sigma are the sums of.
struct WidthSums {
  double alpha = 0, sigma = 0;
};
struct AddWidths {
  __device__ __forceinline__ WidthSums operator()(const WidthSums& a, const WidthSums& b) const {
    return {a.alpha + b.alpha, a.sigma + b.sigma};
  }
};

// Gradients, and sums for alpha and sigma of every scale. of_gates: of each item for every gate, where those are
// wanted.
template <class A>
struct BackwardBase : SumOp<WidthSums, AddWidths, true> {
  using E = CategoricalEntry;
  double* of_gates = nullptr;

  __device__ __forceinline__ void write(const E& e, int64_t row, int, const WidthSums& s) const {
    static_cast<A*>(e.result)[row] = static_cast<A>(s.alpha);
    static_cast<A*>(e.sigma_result)[row] = static_cast<A>(s.sigma);
  }
};

// A lane's sums for alpha and sigma: of a vector in the dtype of the arithmetic, then in double, of which a GPU for
// anything but computing has few units.
template <class A>
struct ScaleSums {
  A of_alpha, of_sigma;
  double alpha, sigma;

  __device__ __forceinline__ void add(A g, const Factors<A>& f) {
    of_alpha = product_plus(g, f.alpha, of_alpha);
    of_sigma = product_plus(g, f.sigma, of_sigma);
  }
  __device__ __forceinline__ void flush() {
    alpha += static_cast<double>(of_alpha);
    sigma += static_cast<double>(of_sigma);
    of_alpha = of_sigma = A(0);
  }
  __device__ __forceinline__ WidthSums total() const { return {alpha, sigma}; }
};

// A thread's sums for the gates of kCount levels, in shared memory, since the levels are counted at run time.
template <class A, int kCount>
struct GateSums {
  A* sum;

  __device__ __forceinline__ GateSums() {
    __shared__ A shared[kCount][kThreads];
    sum = &shared[0][threadIdx.x];
    for (int t = 0; t < kCount; ++t) sum[t * kThreads] = A(0);
  }
  __device__ __forceinline__ void add(int t, A v) const { sum[t * kThreads] += v; }
  __device__ __forceinline__ void write(double* of_item, int lane) const {
#pragma unroll 1
    for (int t = 1; t < kCount; ++t) {
      const double total = warp_reduce<Add>(static_cast<double>(sum[t * kThreads]));
      if (lane == 0) of_item[t] = total;
    }
  }
};
template <class A>
struct GateSums<A, 0> {
  __device__ __forceinline__ void add(int, A) const {}
};

// What the ends of the grid are for the classes at the nearer one and up to 31 from it: a lane computes one of them.
// It serves grids that have no more, or on which no class further away feels an end.
template <class A>
struct EndTable {
  const Ends<A>* of;  // or null

  __device__ __forceinline__ explicit EndTable(const OneInterval<A>& k) {
    __shared__ Ends<A> shared[kWarpsPerBlock][kWarp];
    Ends<A>* mine = shared[warp_index()];
    const bool fits = k.half_classes <= A(kWarp) || decay_of(A(kWarp - 1), k) == A(0);
    mine[lane_index()] = ends_of<true>(class_from_end(static_cast<A>(lane_index()), k), k);
    of = fits ? mine : nullptr;
    __syncwarp();
  }
  __device__ __forceinline__ Ends<A> ends(A c, const OneInterval<A>& k) const {
    if (!of) return ends_of<true>(c, k);
    const uint32_t i = index_of(classes_to_near_end(c, k));
    return of[i < kWarp - 1 ? i : kWarp - 1];
  }
};

// Hard classes without gates. kScales: with the gradients of alpha and sigma.
template <class W, class Grad, bool kScales>
struct WinnerOne : BackwardBase<Acc<W>> {
  static constexpr bool kSums = kScales;
  static constexpr int kBytesInFlight = 32;
  using E = CategoricalEntry;
  using X = W;
  using G = Grad;
  using O = W;
  using A = Acc<W>;
  struct State {
    Bins<A> p;
    OneInterval<A> k;
    EndTable<A> table;
    A of_u, of_q, of_c, of_w;  // of a vector
    double alpha, sigma;
  };
  Source source;

  __device__ __forceinline__ State begin(const E& e, int64_t row, int which) const {
    const Bins<A> p = source.bins<A>(e, row, source.levels<A>(e, which));
    const OneInterval<A> k = make_one_interval(p);
    return {p, k, EndTable<A>(k), A(0), A(0), A(0), A(0), 0.0, 0.0};
  }
  __device__ __forceinline__ O apply(X wide, G gx, State& s) const {
    const A x = widen(wide), g = static_cast<A>(widen(gx)), c = nearest_class_or_minus_zero(x, s.p);
    const A w = mirrored_offset<false>(x, c, s.p, s.k), b = edge_power<false>(w, s.k);
    const Slopes<A> slopes = winner_of_one<true, true>(b, s.table.ends(c, s.k), s.k);
    return Narrow<O>::from(add_winner<kScales>(g, c, w, slopes, s.k, s.of_u, s.of_q, s.of_c, s.of_w));
  }
  template <int kCount>
  __device__ __forceinline__ void flush(State& s, const X (&)[kCount]) const {
    if constexpr (!kScales) return;
    s.alpha += static_cast<double>(winner_alpha(s.of_u, s.of_q, s.of_c, s.p.beta, s.k.ratio));
    s.sigma += static_cast<double>(winner_sigma(s.of_q, s.of_w, s.p.beta, s.k.ratio));
    s.of_u = s.of_q = s.of_c = s.of_w = A(0);
  }
  __device__ __forceinline__ WidthSums total(const State& s) const { return {s.alpha, s.sigma}; }
};

// Classes with gates, or drawn.
template <class W, class Grad, bool kGates>
struct WinnerMany : BackwardBase<Acc<W>> {
  using E = CategoricalEntry;
  static constexpr bool kIndexed = true;
  static constexpr bool kRolled = true;
  static constexpr int kBytesInFlight = 16;
  static constexpr int kBlocks = sizeof(W) == 8 ? 1 : 2;
  using X = W;
  using G = Grad;
  using O = W;
  using A = Acc<W>;
  struct State {
    Bins<A> p;
    LevelTable<A> table;
    A sharp, lowest;
    const A* bound;  // where a class is hard
    uint64_t seed, first;
    int64_t index;
    ScaleSums<A> sums;
    GateSums<A, kGates ? kMaxLevels : 0> gates;
  };
  Source source;
  bool sample;

  __device__ __forceinline__ State begin(const E& e, int64_t row, int which) const {
    const Levels l = source.levels<A>(e, which);
    const Bins<A> p = source.bins<A>(e, row, l);
    return {p,
            LevelTable<A>(e, l, p.beta),
            static_cast<A>(one_minus_exp(static_cast<double>(p.beta))),
            lowest_value(p),
            sample ? nullptr : bounds_of<A>(e, row),
            sample ? static_cast<uint64_t>(*source.seed) : 0,
            static_cast<uint64_t>(e.first),
            0,
            {},
            {}};
  }

  __device__ __forceinline__ A hard_class(A x, const State& s) const {
    const Mirrored<A> m = mirror(x, s.p, s.lowest);
    A most = std::numeric_limits<A>::infinity();
#pragma unroll 1
    for (int t = s.table.count - 2; t >= 0; --t) most = bounded(m.value, most, s.bound[t], s.table.level[t].top);
    return unmirrored(at_most(m.c, most), m.below);
  }

  __device__ __forceinline__ O apply(X wide, G gx, State& s) const {
    const A x = widen(wide), g = static_cast<A>(widen(gx)), c = nearest_class(x, s.p), z = offset_of(x, c, s.p);
    const A j = sample ? draw(s.table, c, z, s.seed, s.first + s.index, s.p) : hard_class(x, s);
    Masses<A> m = no_masses<A>();
    A weight = s.table.level[0].weight;
    add_level<true, true>(m, s.table.level[0], c, z, j, s.p);
#pragma unroll 1
    for (int t = 1; t < s.table.count; ++t) {
      const Level<A> k = s.table.level[t], before = s.table.level[t - 1];
      if (source.is_signed)
        add_level<false, true>(m, k, c, z, j, s.p);
      else
        add_level<false, false>(m, k, c, z, j, s.p);
      if (j < before.bottom || j > before.top) weight = k.weight;
    }
    A r;
    const Factors<A> f = winner_of_many(m, c, z, j, weight, s.sharp, s.p, r);
    s.sums.add(g, f);
    if constexpr (kGates) add_gates(s, m, c, z, j, g * (s.p.alpha * (j * r)));
    return Narrow<O>::from(g * f.x);
  }

  // share * ([j is in a level above t] - r of those levels) for every t, from the highest down.
  __device__ __forceinline__ void add_gates(State& s, const Masses<A>& m, A c, A z, A j, A share) const {
    Edge<A> top = m.top, bottom = m.bottom;
    A tail = A(0);
#pragma unroll 1
    for (int t = s.table.count - 1; t > 0; --t) {
      const Level<A> k = s.table.level[t], before = s.table.level[t - 1];
      const Edge<A> top_before = edge_at(s.p.beta * (before.top + A(0.5) - c) - z);
      const Edge<A> bottom_before = edge_at(s.p.beta * (before.bottom - A(0.5) - c) - z);
      A mass = (top.s * top_before.n) * k.own;
      if (source.is_signed) mass += (bottom_before.s * bottom.n) * k.own;
      tail += mass * k.weight;
      const A above = j < before.bottom || j > before.top ? A(1) : A(0);
      s.gates.add(t, share * (above - tail / m.total));
      top = top_before;
      bottom = bottom_before;
    }
  }

  template <int kCount>
  __device__ __forceinline__ void flush(State& s, const X (&)[kCount]) const {
    s.sums.flush();
  }
  __device__ __forceinline__ WidthSums total(const State& s) const { return s.sums.total(); }
  __device__ __forceinline__ void end(State& s, int64_t item, int lane) const {
    if constexpr (kGates) s.gates.write(this->of_gates + item * kMaxLevels, lane);
  }
};

// The soft sum.
template <class W, class Grad, bool kGates>
struct SoftBackward : BackwardBase<Acc<W>> {
  static constexpr bool kLastBlock = std::is_same_v<W, Grad>;  // else vectors of three types fill shared memory
  using E = CategoricalEntry;
  static constexpr bool kRolled = true;
  static constexpr int kBytesInFlight = 16;
  using X = W;
  using G = Grad;
  using O = W;
  using A = Acc<W>;
  using Soft = SoftTable<A, kGates ? 0 : kOfSlopes>;
  struct State {
    Bins<A> p;
    Soft soft;
    A sharp;
    ScaleSums<A> sums;
    GateSums<A, kGates ? kMaxSoftBits : 0> gates;
  };
  Source source;

  __device__ __forceinline__ State begin(const E& e, int64_t row, int which) const {
    const Levels l = source.levels<A>(e, which);
    const Bins<A> p = source.bins<A>(e, row, l);
    return {p, Soft(e, l, p), static_cast<A>(one_minus_exp(static_cast<double>(p.beta))), {}, {}};
  }

  __device__ __forceinline__ O apply(X wide, G gx, State& s) const {
    const A x = widen(wide), g = static_cast<A>(widen(gx)), c = nearest_class(x, s.p);
    if (Soft::kSplined && s.soft.spline.intervals) {
      const A side = c - s.soft.spline.middle, z = scaled_offset(x, c, s.p.inv_sigma, s.p);
      const SplinePlace<A> at = spline_place(side, z, s.soft.spline);
      const A out = g * s.soft.value(0, at), mirrored = change_sign(g, side);
      s.sums.of_alpha = product_plus(g - out, c, s.sums.of_alpha);
      s.sums.add(mirrored, {A(0), s.soft.value(1, at), s.soft.value(2, at)});
      return Narrow<O>::from(out);
    }
    const WeighedClasses<A> classes = s.soft.classes();
    const A z = offset_of(x, c, s.p), y = exponential(z - s.p.half), w = exponential(-z - s.p.half);
    const SoftSums<A> sums = soft_sums(c, y, w, classes, s.p);
    const A inv = A(1) / sums.weight, mean = sums.first * inv, scale = (g * s.p.alpha) * inv;
    const SoftSlopes<A> slopes = soft_slopes(c, y, w, mean, s.sharp, classes, s.p, [&](A i, A deviation) {
      if constexpr (kGates) add_gate(s, i, scale * deviation);
    });
    const Factors<A> f = soft_factors(slopes, c, z, mean, inv, s.p);
    s.sums.add(g, f);
    return Narrow<O>::from(g * f.x);
  }

  // To the sum of class i's own level; `end` makes sums over the levels above.
  __device__ __forceinline__ void add_gate(State& s, A i, A v) const {
    if (i >= s.p.low && i <= s.p.high)
      s.gates.add(level_of(static_cast<int32_t>(i), source.is_signed) - 1, v);
    else if (i != i)
      s.gates.add(kMaxSoftBits - 1, i);  // NaN goes to all
  }

  template <int kCount>
  __device__ __forceinline__ void flush(State& s, const X (&)[kCount]) const {
    s.sums.flush();
  }
  __device__ __forceinline__ WidthSums total(const State& s) const { return s.sums.total(); }
  __device__ __forceinline__ void end(State& s, int64_t item, int lane) const {
    if constexpr (kGates) {
#pragma unroll 1
      for (int t = kMaxSoftBits - 2; t > 0; --t) s.gates.add(t, s.gates.sum[(t + 1) * kThreads]);
      s.gates.write(this->of_gates + item * kMaxLevels, lane);
    }
  }
};

// dL/dgates of every tensor from what its items have left, by a block.
constexpr int kGateThreads = 512;
template <class A, class T>
__global__ void __launch_bounds__(kGateThreads)
    gates_kernel(const __grid_constant__ T table, const Source source, const double* of_gates) {
  const int which = blockIdx.x;
  const CategoricalEntry& e = table.entry[which];
  const int64_t first = table.first_item[which], last = table.first_item[which + 1];
  const Levels levels = source.levels<A>(e, table.base + which);
  A* result = static_cast<A*>(e.gates_result);
#pragma unroll 1
  for (int t = 0; t < e.gate_count; ++t) {
    double sum = 0;
    if (t > 0 && t < kMaxLevels)
      for (int64_t i = first + threadIdx.x; i < last; i += kGateThreads) sum += of_gates[i * kMaxLevels + t];
    sum = block_reduce<Add>(sum);
    if (threadIdx.x != 0) continue;
    const bool in = t > 0 && t < levels.count;
    result[t] = !levels.valid ? quiet_nan<A>()
                : in          ? static_cast<A>(sum / static_cast<double>(static_cast<const A*>(e.gates)[t]))
                              : A(0);
  }
}

}  // namespace quantops::cuda
