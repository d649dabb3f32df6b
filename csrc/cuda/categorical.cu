// Family `categorical` on CUDA: the ops of quantops/library.py over lists of tensors, one launch each; one more where
// hard classes have gates, one or two where sums are wanted. What happens to an element is in csrc/categorical_math.h
// and csrc/soft_edges.h, how a list is walked in table.cuh. Values on the GPU are never read back: those out of range
// give NaN for that tensor.
#include <optional>
#include <tuple>

#include "../soft_edges.h"
#include "table.cuh"

namespace quantops::cuda {
namespace {

constexpr int kMaxLevels = kMaxBits;

// The scale is alpha, and where the gradient of alpha is written is `result`.
struct CategoricalEntry : Entry {
  const void* sigma;
  const void* gates;  // or null
  void* bounds;       // kMaxLevels per scale, or null
  void* sigma_result;
  void* gates_result;
  int64_t gate_count;  // -1 without
  int64_t first;      // the place of element 0 in the list
};

// What fixes the levels of a tensor.
struct Source {
  const int32_t* bits;
  const int64_t* seed;
  int32_t most_bits;
  bool is_signed;

  template <class A>
  __device__ __forceinline__ Levels levels(const CategoricalEntry& e, int which) const {
    return make_levels(static_cast<const A*>(e.gates), e.gate_count, bits[which], most_bits, is_signed);
  }
  template <class A>
  __device__ __forceinline__ Bins<A> bins(const CategoricalEntry& e, int64_t row, const Levels& l) const {
    return make_bins(static_cast<const A*>(e.scale)[row], static_cast<const A*>(e.sigma)[row], l);
  }
};

struct CategoricalBase : OpBase {
  using E = CategoricalEntry;
};

__device__ __forceinline__ int lane_index() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / kWarp; }

// ---------------------------------------------------------------------------------------------------------- hard

template <class W, class Out>
struct Nearest : CategoricalBase {
  using X = W;
  using G = None;
  using O = Out;
  using State = Bins<Acc<W>>;
  Source source;

  __device__ __forceinline__ State begin(const E& e, int64_t row, int which) const {
    return source.bins<Acc<W>>(e, row, source.levels<Acc<W>>(e, which));
  }
  __device__ __forceinline__ O apply(X x, None, const State& p) const {
    return Narrow<O>::from(p.alpha * nearest_class(widen(x), p));
  }
};

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

// ------------------------------------------------------------------------------------------ tables that a warp shares

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

// exp(-beta n) of a scale, and G by level.
template <class A>
struct SoftTable {
  const A *decay, *weight;
  int reach;

  __device__ __forceinline__ SoftTable(const CategoricalEntry& e, const Levels& l, A beta) {
    __shared__ A shared[kWarpsPerBlock][(1 << kMaxSoftBits) + kMaxSoftBits];
    const A* gates = static_cast<const A*>(e.gates);
    A* mine = shared[warp_index()];
    reach = soft_reach(l, gates, beta);
    for (int n = lane_index(); n <= reach; n += kWarp) mine[n] = exponential(-beta * static_cast<A>(n));
    for (int t = lane_index(); t < l.count; t += kWarp)
      mine[(1 << kMaxSoftBits) + t] = static_cast<A>(cumulative_gate(gates, t + 1));
    decay = mine;
    weight = mine + (1 << kMaxSoftBits);
    __syncwarp();
  }

  // G of class i, 0 where it is not in.
  __device__ __forceinline__ A gate(A i, const Bins<A>& p, bool is_signed) const {
    const int32_t index = i >= p.low && i <= p.high ? static_cast<int32_t>(i) : 0;
    return i >= p.low && i <= p.high ? weight[level_of(index, is_signed) - 1] : A(0);
  }
};

// The edges of a scale, if the soft sum is taken over them.
template <class A>
struct SharedEdges {
  const EdgeTable<A>* table;  // or null

  __device__ __forceinline__ SharedEdges(const CategoricalEntry& e, int64_t row, const Levels& l) {
    __shared__ EdgeTable<A> shared[kWarpsPerBlock];
    const A alpha = static_cast<const A*>(e.scale)[row], sigma = static_cast<const A*>(e.sigma)[row];
    EdgeTable<A>* mine = &shared[warp_index()];
    table = nullptr;
    if (!e.gates && has_soft_edges(alpha, sigma, l)) {
      fill_edge_table(*mine, alpha, sigma, l, lane_index());
      table = mine;
    }
    __syncwarp();
  }
};

struct NoSharedEdges {
  __device__ __forceinline__ NoSharedEdges(const CategoricalEntry&, int64_t, const Levels&) {}
};

// ---------------------------------------------------------------------------------------------------------- draws

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
  return draw_inside(words.second, table.level[t], c, z, p);
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

// ----------------------------------------------------------------------------------------------------------- soft

// The sums of the first pass over the classes that are felt.
template <class A>
__device__ __forceinline__ SoftSums<A> soft_sums(A c, A y, A w, const SoftTable<A>& table, const Bins<A>& p,
                                                 bool is_signed) {
  SoftSums<A> sums = {table.gate(c, p, is_signed) * soft_center(y, w).u, A(0)};
#pragma unroll 1
  for (int n = 1; n <= table.reach; ++n) {
    const A step = static_cast<A>(n);
    add_pair(sums, soft_pair(y, w, table.decay[n - 1], table.decay[n]), step, table.gate(c + step, p, is_signed),
             table.gate(c - step, p, is_signed));
  }
  return sums;
}

template <class W, class Out>
struct SoftValue : CategoricalBase {
  static constexpr bool kRolled = true;
  static constexpr int kBytesInFlight = 16;
  using X = W;
  using G = None;
  using O = Out;
  using A = Acc<W>;
  struct State {
    Bins<A> p;
    SharedEdges<A> edges;
    SoftTable<A> table;
  };
  Source source;

  __device__ __forceinline__ State begin(const E& e, int64_t row, int which) const {
    const Levels l = source.levels<A>(e, which);
    const Bins<A> p = source.bins<A>(e, row, l);
    return {p, SharedEdges<A>(e, row, l), SoftTable<A>(e, l, p.beta)};
  }
  __device__ __forceinline__ O apply(X wide, None, const State& s) const {
    const A x = widen(wide);
    if (s.edges.table) return Narrow<O>::from(edge_value(x, *s.edges.table, s.p));
    const A c = nearest_class(x, s.p), z = offset_of(x, c, s.p);
    const SoftSums<A> sums = soft_sums(c, exponential(z - s.p.half), exponential(-z - s.p.half), s.table, s.p,
                                       source.is_signed);
    return Narrow<O>::from(s.p.alpha * (c + sums.first / sums.weight));
  }
};

// -------------------------------------------------------------------------------------------------------- backward

// The sums of an item for the gradients of alpha, sigma and, where there are kGates, gates times their gates.
template <bool kGates>
struct Partial {
  double alpha, sigma, gate[kMaxLevels];
};
template <>
struct Partial<false> {
  double alpha, sigma;
};

struct ScaleSums {
  double alpha, sigma;

  template <class A>
  __device__ __forceinline__ void add(A g, const Factors<A>& f) {
    alpha += static_cast<double>(g * f.alpha);
    sigma += static_cast<double>(g * f.sigma);
  }
  template <class P>
  __device__ __forceinline__ void write(P* partial, int64_t item, int lane) const {
    const double a = warp_reduce<Add>(alpha), s = warp_reduce<Add>(sigma);
    if (lane == 0) {
      partial[item].alpha = a;
      partial[item].sigma = s;
    }
  }
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
  template <class P>
  __device__ __forceinline__ void write(P* partial, int64_t item, int lane) const {
#pragma unroll 1
    for (int t = 1; t < kCount; ++t) {
      const double total = warp_reduce<Add>(static_cast<double>(sum[t * kThreads]));
      if (lane == 0) partial[item].gate[t] = total;
    }
  }
};
template <class A>
struct GateSums<A, 0> {
  __device__ __forceinline__ void add(int, A) const {}
  template <class P>
  __device__ __forceinline__ void write(P*, int64_t, int) const {}
};

// Hard classes without gates. kScales: with the gradients of alpha and sigma.
template <class W, class Grad, bool kScales>
struct WinnerOne : CategoricalBase {
  static constexpr int kBytesInFlight = 32;
  using X = W;
  using G = Grad;
  using O = W;
  using A = Acc<W>;
  struct State {
    Bins<A> p;
    OneInterval<A> k;
    bool far;
    ScaleSums sums;
  };
  Source source;
  Partial<false>* partial;

  __device__ __forceinline__ State begin(const E& e, int64_t row, int which) const {
    const Bins<A> p = source.bins<A>(e, row, source.levels<A>(e, which));
    const OneInterval<A> k = make_one_interval(p);
    return {p, k, feels_far_end(k), {0.0, 0.0}};
  }
  __device__ __forceinline__ O apply(X wide, G gx, State& s) const {
    const A x = widen(wide), g = static_cast<A>(widen(gx)), c = nearest_class(x, s.p);
    const A w = mirrored_offset<false>(x, c, s.p, s.k), b = edge_power<false>(w, s.k);
    const Slopes<A> slopes = s.far ? winner_of_one<true, true>(c, b, ends_of<true>(c, s.k), s.k)
                                   : winner_of_one<true, false>(c, b, ends_of<false>(c, s.k), s.k);
    if constexpr (kScales) s.sums.add(g, factors_of_one(c, w, slopes, s.p, s.k));
    return Narrow<O>::from(s.k.scale * mirrored((g * c) * slopes.rt, c, s.k));
  }
  __device__ __forceinline__ void end(State& s, int64_t item, int lane) const {
    if constexpr (kScales) s.sums.write(partial, item, lane);
  }
};

// Classes with gates, or drawn.
template <class W, class Grad, bool kGates>
struct WinnerMany : CategoricalBase {
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
    ScaleSums sums;
    GateSums<A, kGates ? kMaxLevels : 0> gates;
  };
  Source source;
  bool sample;
  Partial<kGates>* partial;

  __device__ __forceinline__ State begin(const E& e, int64_t row, int which) const {
    const Levels l = source.levels<A>(e, which);
    const Bins<A> p = source.bins<A>(e, row, l);
    return {p, LevelTable<A>(e, l, p.beta), static_cast<A>(one_minus_exp(static_cast<double>(p.beta))),
            lowest_value(p),
            sample ? nullptr : bounds_of<A>(e, row),
            sample ? static_cast<uint64_t>(*source.seed) : 0, static_cast<uint64_t>(e.first), 0, {0.0, 0.0}, {}};
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
      if (source.is_signed) add_level<false, true>(m, k, c, z, j, s.p);
      else add_level<false, false>(m, k, c, z, j, s.p);
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

  __device__ __forceinline__ void end(State& s, int64_t item, int lane) const {
    s.sums.write(partial, item, lane);
    s.gates.write(partial, item, lane);
  }
};

// The soft sum.
template <class W, class Grad, bool kGates>
struct SoftBackward : CategoricalBase {
  static constexpr bool kRolled = true;
  static constexpr int kBytesInFlight = 16;
  using X = W;
  using G = Grad;
  using O = W;
  using A = Acc<W>;
  using Edges = std::conditional_t<kGates, NoSharedEdges, SharedEdges<A>>;
  struct State {
    Bins<A> p;
    Edges edges;
    SoftTable<A> table;
    A sharp;
    ScaleSums sums;
    GateSums<A, kGates ? kMaxSoftBits : 0> gates;
  };
  Source source;
  Partial<kGates>* partial;

  __device__ __forceinline__ State begin(const E& e, int64_t row, int which) const {
    const Levels l = source.levels<A>(e, which);
    const Bins<A> p = source.bins<A>(e, row, l);
    return {p, Edges(e, row, l), SoftTable<A>(e, l, p.beta),
            static_cast<A>(one_minus_exp(static_cast<double>(p.beta))), {0.0, 0.0}, {}};
  }

  __device__ __forceinline__ O apply(X wide, G gx, State& s) const {
    const A x = widen(wide), g = static_cast<A>(widen(gx));
    if constexpr (!kGates) {
      if (s.edges.table) {
        const Factors<A> f = edge_gradients(x, *s.edges.table, s.p);
        s.sums.add(g, f);
        return Narrow<O>::from(g * f.x);
      }
    }
    const A c = nearest_class(x, s.p), z = offset_of(x, c, s.p);
    const A y = exponential(z - s.p.half), w = exponential(-z - s.p.half);
    const SoftSums<A> sums = soft_sums(c, y, w, s.table, s.p, source.is_signed);
    const A inv = A(1) / sums.weight, mean = sums.first * inv, scale = (g * s.p.alpha) * inv;
    A up, down;
    SoftSlopes<A> slopes = center_slopes(soft_center(y, w), s.table.gate(c, s.p, source.is_signed), mean, s.sharp, up);
    if constexpr (kGates) add_gate(s, c, scale * up);
#pragma unroll 1
    for (int n = 1; n <= s.table.reach; ++n) {
      const A step = static_cast<A>(n);
      const A up_gate = s.table.gate(c + step, s.p, source.is_signed);
      const A down_gate = s.table.gate(c - step, s.p, source.is_signed);
      add_slopes(slopes, soft_pair(y, w, s.table.decay[n - 1], s.table.decay[n]), step, mean, up_gate, down_gate,
                 s.sharp, up, down);
      if constexpr (kGates) {
        add_gate(s, c + step, scale * up);
        add_gate(s, c - step, scale * down);
      }
    }
    const Factors<A> f = soft_factors(slopes, c, z, mean, inv, s.p);
    s.sums.add(g, f);
    return Narrow<O>::from(g * f.x);
  }

  // To the sum of class i's own level; `end` makes sums over the levels above.
  __device__ __forceinline__ void add_gate(State& s, A i, A v) const {
    if (i >= s.p.low && i <= s.p.high) s.gates.add(level_of(static_cast<int32_t>(i), source.is_signed) - 1, v);
    else if (i != i) s.gates.add(kMaxSoftBits - 1, i);  // NaN goes to all
  }

  __device__ __forceinline__ void end(State& s, int64_t item, int lane) const {
    s.sums.write(partial, item, lane);
    if constexpr (kGates) {
#pragma unroll 1
      for (int t = kMaxSoftBits - 2; t > 0; --t) s.gates.add(t, s.gates.sum[(t + 1) * kThreads]);
      s.gates.write(partial, item, lane);
    }
  }
};

// dL/dalpha and dL/dsigma of every scale.
template <class A, class P>
struct FinishWidths {
  using E = CategoricalEntry;
  static constexpr bool kPerScale = true;
  const P* partial;

  __device__ void run(const E& e, int64_t row, int64_t first, int64_t items, int) const {
    double alpha = 0, sigma = 0;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < items; i += blockDim.x) {
      alpha += partial[first + i].alpha;
      sigma += partial[first + i].sigma;
    }
    alpha = block_reduce<Add>(alpha);
    sigma = block_reduce<Add>(sigma);
    if (threadIdx.x != 0) return;
    static_cast<A*>(e.result)[row] = static_cast<A>(alpha);
    static_cast<A*>(e.sigma_result)[row] = static_cast<A>(sigma);
  }
};

// dL/dgates of every tensor.
template <class A>
struct FinishGates {
  using E = CategoricalEntry;
  static constexpr bool kPerScale = false;
  Source source;
  const Partial<true>* partial;

  __device__ void run(const E& e, int64_t, int64_t first, int64_t items, int which) const {
    const Levels levels = source.levels<A>(e, which);
    A* result = static_cast<A*>(e.gates_result);
#pragma unroll 1
    for (int t = 0; t < e.gate_count; ++t) {
      double sum = 0;
      if (t > 0 && t < kMaxLevels)
        for (int64_t i = threadIdx.x; i < items; i += blockDim.x) sum += partial[first + i].gate[t];
      sum = block_reduce<Add>(sum);
      if (threadIdx.x != 0) continue;
      const bool in = t > 0 && t < levels.count;
      result[t] = !levels.valid ? quiet_nan<A>()
                  : in          ? static_cast<A>(sum / static_cast<double>(static_cast<const A*>(e.gates)[t]))
                                : A(0);
    }
  }
};

// ---------------------------------------------------------------------------------------------------------- arguments

// A list of tensors with its widths, bits and gates, checked and in the shape that kernels take.
struct Problem {
  Tensors x, kept;  // x dense
  ScalarType dtype, acc;
  Mode mode;
  bool soft, has_gates;
  int64_t most_gates = 0;
  Source source;
  std::vector<CategoricalEntry> entries;

  Problem(const Tensors& tensors, const Tensors& alpha, const Tensors& sigma, const Tensor& bits, const Tensors& gates,
          const std::optional<Tensor>& seed, int64_t mode_, int64_t grad_of, bool is_signed)
      : dtype(check_list("x", tensors, kFloats)), acc(acc_type(dtype)), has_gates(!gates.empty()) {
    QUANTOPS_CHECK(mode_ >= kHard && mode_ <= kSample, "mode: expected 0, 1 or 2, got ", mode_);
    QUANTOPS_CHECK(grad_of == kOfWinner || grad_of == kOfSoft, "grad_of: expected 0 or 1, got ", grad_of);
    mode = static_cast<Mode>(mode_);
    soft = mode == kSoft || grad_of == kOfSoft;
    const size_t count = tensors.size();
    check_scales(alpha, tensors, acc, "alpha");
    check_scales(sigma, tensors, acc, "sigma");
    if (has_gates) {
      check_list("gates", gates, {acc});
      QUANTOPS_CHECK(gates.size() == count, "gates: expected a list with one entry per tensor (", count, "), got ",
                     gates.size());
      QUANTOPS_CHECK(device_of(gates[0]) == device_of(tensors[0]), "gates: expected device ", device_name(tensors[0]),
                     ", where x is, got ", device_name(gates[0]));
    }
    kept.push_back(check_per_weight("bits", bits, static_cast<int64_t>(count), ScalarType::Int, tensors[0]));
    source = {static_cast<const int32_t*>(kept[0].data_ptr()), nullptr, soft ? kMaxSoftBits : kMaxBits, is_signed};
    if (mode == kSample) {
      QUANTOPS_CHECK(seed.has_value(), "seed: expected an int64 tensor of one element for mode sample, got none");
      kept.push_back(check_per_weight("seed", *seed, 1, ScalarType::Long, tensors[0]));
      source.seed = static_cast<const int64_t*>(kept[1].data_ptr());
    }
    x = dense(tensors);
    int64_t first = 0;
    for (size_t i = 0; i < count; ++i) {
      QUANTOPS_CHECK(alpha[i].numel() == sigma[i].numel(), entry_name("sigma", i, count),
                     ": expected as many elements as alpha (", alpha[i].numel(), "), got ", sigma[i].numel());
      const Rows r = rows_of(x[i], alpha[i]);
      CategoricalEntry e{};
      e.w = x[i].data_ptr();
      e.scale = alpha[i].data_ptr();
      e.sigma = sigma[i].data_ptr();
      e.rows = r.rows;
      e.inner = r.inner;
      e.first = first;
      e.gate_count = -1;
      first += x[i].numel();
      if (has_gates) {
        kept.push_back(gates[i].is_contiguous() ? gates[i] : torch::stable::contiguous(gates[i]));
        e.gates = kept.back().data_ptr();
        e.gate_count = gates[i].numel();
        most_gates = std::max(most_gates, e.gate_count);
      }
      entries.push_back(e);
    }
  }

  void write_to(const Tensors& out) {
    for (size_t i = 0; i < out.size(); ++i) entries[i].out = out[i].data_ptr();
  }

  // Where the T_t of hard classes with gates go, and the launch that computes them.
  template <class A>
  void make_bounds() {
    int64_t scales = 0, most_rows = 0;
    for (const CategoricalEntry& e : entries) {
      scales += e.rows;
      most_rows = std::max(most_rows, e.rows);
    }
    kept.push_back(empty_vector(scales * kMaxLevels, acc, x[0]));
    A* place = static_cast<A*>(kept.back().data_ptr());
    for (CategoricalEntry& e : entries) {
      e.bounds = place;
      place += e.rows * kMaxLevels;
    }
    if (most_rows == 0) return;
    constexpr int N = kLargeTable<CategoricalEntry>;
    OnDevice on(x[0]);
    for (size_t base = 0; base < entries.size(); base += N) {
      Table<N, CategoricalEntry> table;
      table.base = static_cast<int32_t>(base);
      table.count = static_cast<int32_t>(std::min<size_t>(N, entries.size() - base));
      std::copy_n(entries.begin() + base, table.count, table.entry);
      const dim3 blocks(static_cast<unsigned>((most_rows + 63) / 64), table.count);
      launch(on, bounds_kernel<A, N>, blocks, 64, table, source);
    }
  }
};

Tensors categorical(Tensors x, Tensors alpha, Tensors sigma, Tensor bits, Tensors gates, std::optional<Tensor> seed,
                    int64_t mode, int64_t grad_of, bool is_signed, ScalarType dtype) {
  check_float("dtype", dtype);
  Problem p(x, alpha, sigma, bits, gates, seed, mode, grad_of, is_signed);
  const ScalarType written = reads_grad(p.dtype, dtype) ? dtype : p.acc;
  Tensors q = empty_like(p.x, written);
  p.write_to(q);
  with_float(p.dtype, [&](auto element) {
    using W = decltype(element);
    if (p.mode == kHard && p.has_gates) p.make_bounds<Acc<W>>();
    with_grad<W>(written, [&](auto out) {
      using O = decltype(out);
      if (p.mode == kSoft) run(p.x[0], p.entries, SoftValue<W, O>{{}, p.source});
      else if (p.mode == kSample) run(p.x[0], p.entries, Sample<W, O>{{}, p.source});
      else if (!p.has_gates) run(p.x[0], p.entries, Nearest<W, O>{{}, p.source});
      else if (p.most_gates <= 8) run(p.x[0], p.entries, Bounded<W, O, 7>{{}, p.source});
      else run(p.x[0], p.entries, Bounded<W, O, kMaxLevels - 1>{{}, p.source});
    });
  });
  if (written != dtype)
    for (Tensor& t : q) {
      Tensor converted = empty_like(t, dtype);
      torch::stable::copy_(converted, t);
      t = converted;
    }
  return q;
}

// Runs an op and its second stage: sums for alpha and sigma,
template <class A, class Op>
void run_with_widths(const Problem& p, Op op) {
  using P = Partial<false>;
  using Finish = FinishWidths<A, P>;
  run(p.x[0], p.entries, sizeof(P), op, Finish{},
      [](Op& o, Finish& finish, void* scratch) { finish.partial = o.partial = static_cast<P*>(scratch); });
}

// and for gates, too.
template <class A, class Op>
void run_with_gates(const Problem& p, Op op) {
  using P = Partial<true>;
  using Finish = Finishes<FinishWidths<A, P>, FinishGates<A>>;
  run(p.x[0], p.entries, sizeof(P), op, Finish{{nullptr}, {p.source, nullptr}},
      [](Op& o, Finish& finish, void* scratch) {
        finish.first.partial = finish.second.partial = o.partial = static_cast<P*>(scratch);
      });
}

std::tuple<Tensors, Tensors, Tensors, Tensors> categorical_backward(
    Tensors grad, Tensors x, Tensors alpha, Tensors sigma, Tensor bits, Tensors gates, std::optional<Tensor> seed,
    int64_t mode, int64_t grad_of, bool is_signed, bool scale_grad, bool gate_grad) {
  Problem p(x, alpha, sigma, bits, gates, seed, mode, grad_of, is_signed);
  gate_grad = gate_grad && p.has_gates;
  const ScalarType given = check_like("grad", grad, p.x, kFloats);
  const ScalarType read = reads_grad(p.dtype, given) ? given : p.acc;
  Tensors grad_x = empty_like(p.x, p.dtype), grad_alpha, grad_sigma, grad_gates, laid_out;
  p.write_to(grad_x);
  for (size_t i = 0; i < x.size(); ++i) {
    CategoricalEntry& e = p.entries[i];
    laid_out.push_back(in_layout_of(given == read ? grad[i] : torch::stable::to(grad[i], read), p.x[i]));
    e.grad = laid_out[i].data_ptr();
    // The kernels that sum anything sum for alpha and sigma: results that are not wanted are dropped.
    grad_alpha.push_back(empty_like(alpha[i], p.acc));
    grad_sigma.push_back(empty_like(sigma[i], p.acc));
    e.result = grad_alpha[i].data_ptr();
    e.sigma_result = grad_sigma[i].data_ptr();
    if (gate_grad) {
      grad_gates.push_back(empty_vector(gates[i].numel(), p.acc, p.x[0]));
      e.gates_result = grad_gates[i].data_ptr();
    }
  }
  with_float(p.dtype, [&](auto element) {
    using W = decltype(element);
    using A = Acc<W>;
    if (!p.soft && p.mode == kHard && p.has_gates) p.make_bounds<A>();
    with_grad<W>(read, [&](auto grad_element) {
      using G = decltype(grad_element);
      const bool sample = p.mode == kSample;
      if (p.soft && gate_grad) run_with_gates<A>(p, SoftBackward<W, G, true>{{}, p.source, nullptr});
      else if (p.soft) run_with_widths<A>(p, SoftBackward<W, G, false>{{}, p.source, nullptr});
      else if (gate_grad) run_with_gates<A>(p, WinnerMany<W, G, true>{{}, p.source, sample, nullptr});
      else if (p.has_gates || sample) run_with_widths<A>(p, WinnerMany<W, G, false>{{}, p.source, sample, nullptr});
      else if (scale_grad) run_with_widths<A>(p, WinnerOne<W, G, true>{{}, p.source, nullptr});
      else run(p.x[0], p.entries, WinnerOne<W, G, false>{{}, p.source, nullptr});
    });
  });
  if (!scale_grad) grad_alpha = grad_sigma = {};
  return {grad_x, grad_alpha, grad_sigma, grad_gates};
}

}  // namespace
}  // namespace quantops::cuda

QUANTOPS_REGISTER(QUANTOPS_KEY, m) {
  m.impl("categorical", TORCH_BOX(&quantops::cuda::categorical));
  m.impl("categorical_backward", TORCH_BOX(&quantops::cuda::categorical_backward));
}
