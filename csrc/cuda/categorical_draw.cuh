// Family `categorical` on CUDA: draws.
#pragma once
#include "../categorical_draw.h"
#include "categorical_gates.cuh"

namespace quantops::cuda {

template <class A>
__device__ __forceinline__ A draw(const LevelTable<A>& table, A c, A z, uint64_t seed, uint64_t index,
                                  const Bins<A>& p) {
  const Words words = philox(seed, index);
  A left = A(0);
  if (table.count > 1) {
#pragma unroll 1
    for (int t = 0; t < table.count; ++t)
      if (table.level[t].step > A(0)) left += interval_mass(table.level[t], c, z, p);
  }
  left *= unit_of<A>(words.first);
  int t = 0;
#pragma unroll 1
  for (; t < table.count - 1; ++t) {
    if (!(table.level[t].step > A(0))) continue;
    const A mass = interval_mass(table.level[t], c, z, p);
    if (left < mass) break;
    left -= mass;
  }
  const Level<A> level = table.level[t];
  return draw_inside(words.second, level, c, z, is_narrow(level, p), p);
}

template <class W, class Out>
struct Sample : CategoricalBase {
  static constexpr bool kIndexed = true;
  static constexpr bool kRolled = true;
  static constexpr int kBytesInFlight = 16;
  using X = W;
  using G = None;
  using O = Out;
  using A = Acc<W>;
  struct State {
    Bins<A> p;
    LevelTable<A> table;
    uint64_t seed, first;
    int64_t index;
  };
  Source source;

  __device__ __forceinline__ State begin(const E& e, int64_t row, int which) const {
    const Levels l = source.levels<A>(e, which);
    const Bins<A> p = source.bins<A>(e, row, l);
    return {p, LevelTable<A>(e, l, p.beta), static_cast<uint64_t>(*source.seed), static_cast<uint64_t>(e.first), 0};
  }
  __device__ __forceinline__ O apply(X wide, None, const State& s) const {
    const A x = widen(wide), c = nearest_class(x, s.p), z = offset_of(x, c, s.p);
    return Narrow<O>::from(s.p.alpha * draw(s.table, c, z, s.seed, s.first + s.index, s.p));
  }
};

}  // namespace quantops::cuda
