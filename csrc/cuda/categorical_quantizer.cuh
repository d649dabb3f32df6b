// Family `categorical` on CUDA: what an element of its lists is quantized with, and the hard class without gates.
#pragma once
#include "../categorical_gates.h"
#include "../categorical_quantizer.h"
#include "table.cuh"

namespace quantops::cuda {

constexpr int kMaxLevels = kMaxBits;

// The scale is alpha, and where the gradient of alpha is written is `result`.
struct CategoricalEntry : Entry {
  const void* sigma;
  const void* gates;  // or null
  void* bounds;       // kMaxLevels per scale, or null
  void* sigma_result;
  void* gates_result;
  int64_t gate_count;  // -1 without
  int64_t first;       // the place of element 0 in the list
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

// The hard class without gates.
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

}  // namespace quantops::cuda
