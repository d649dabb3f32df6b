// Family `categorical` on CUDA: the hard class with gates, and the levels of a scale.
#pragma once
#include "categorical_quantizer.cuh"

namespace quantops::cuda {

// T_t of every scale, for the kernels that choose with gates: one thread per scale.
template <class A, int N>
__global__ void __launch_bounds__(64, 1)
    bounds_kernel(const __grid_constant__ Table<N, CategoricalEntry> table, const __grid_constant__ Source source) {
  const CategoricalEntry& e = table.entry[blockIdx.y];
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= e.rows) return;
  const Levels levels = source.levels<A>(e, table.base + blockIdx.y);
  A* bound = static_cast<A*>(e.bounds) + row * kMaxLevels;
  for (int t = 0; t < kMaxLevels; ++t) bound[t] = -std::numeric_limits<A>::infinity();
  hard_bounds(static_cast<const A*>(e.gates), levels, static_cast<const A*>(e.scale)[row],
              static_cast<const A*>(e.sigma)[row], bound);
}

// kCount: of bounds that are looked at.
template <class W, class Out, int kCount>
struct Bounded : CategoricalBase {
  static constexpr int kBytesInFlight = kCount > 7 ? 16 : 32;  // no registers to spare
  using X = W;
  using G = None;
  using O = Out;
  using A = Acc<W>;
  struct State {
    Bins<A> p;
    A lowest, bound[kCount], top[kCount];
  };
  Source source;

  __device__ __forceinline__ State begin(const E& e, int64_t row, int which) const {
    State s;
    s.p = source.bins<A>(e, row, source.levels<A>(e, which));
    s.lowest = lowest_value(s.p);
    const A* bound = static_cast<const A*>(e.bounds) + row * kMaxLevels;
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
      s.bound[t] = bound[t];
      s.top[t] = static_cast<A>(top_of_level(t + 1, source.is_signed));
    }
    return s;
  }
  __device__ __forceinline__ O apply(X x, None, const State& s) const {
    const Mirrored<A> m = mirror(widen(x), s.p, s.lowest);
    A most = std::numeric_limits<A>::infinity();
#pragma unroll
    for (int t = kCount - 1; t >= 0; --t) most = bounded(m.value, most, s.bound[t], s.top[t]);
    return Narrow<O>::from(s.p.alpha * unmirrored(at_most(m.c, most), m.below));
  }
};

// The levels of a scale, computed once by the lanes of a warp.
template <class A>
struct LevelTable {
  const Level<A>* level;
  int count;

  __device__ __forceinline__ LevelTable(const CategoricalEntry& e, const Levels& l, A beta) {
    __shared__ Level<A> shared[kWarpsPerBlock][kMaxLevels];
    const A* gates = static_cast<const A*>(e.gates);
    Level<A>* mine = shared[warp_index()];
    count = gates ? l.count : 1;
    for (int t = lane_index(); t < count; t += kWarp)
      mine[t] = gates ? make_level(gates, l, t + 1, beta) : make_only_level(l, beta);
    level = mine;
    __syncwarp();
  }
};

// T_t of a scale.
template <class A>
__device__ __forceinline__ const A* bounds_of(const CategoricalEntry& e, int64_t row) {
  __shared__ A shared[kWarpsPerBlock][kMaxLevels];
  A* mine = shared[warp_index()];
  if (lane_index() < kMaxLevels) mine[lane_index()] = static_cast<const A*>(e.bounds)[row * kMaxLevels + lane_index()];
  __syncwarp();
  return mine;
}

}  // namespace quantops::cuda
