// Kernels over the elements of one tensor: how warps share them, in vectors that move as words of 16 bytes.
#pragma once
#include "table.cuh"

namespace quantops::cuda {

// The elements of a tensor as items, see table.cuh. aligned: all memory at 16 bytes, so that vectors move as words.
struct Extent {
  int64_t numel, segment;
  bool aligned;

  int64_t items() const { return (numel + segment - 1) / segment; }
  dim3 blocks() const {
    const int64_t blocks = (items() + kWarpsPerBlock - 1) / kWarpsPerBlock;
    QUANTOPS_CHECK(blocks <= INT32_MAX, "x: expected fewer elements, got ", numel);
    return dim3(static_cast<unsigned>(blocks));
  }
};

inline Extent extent_of(const Tensors& moved) {
  const int64_t numel = moved[0].numel();
  uintptr_t bits = 0;
  for (const Tensor& t : moved) bits |= reinterpret_cast<uintptr_t>(t.data_ptr());
  return {numel, segment_rule(numel), (bits & 15) == 0};
}

// Vectors that a lane loads before it needs the first of them: 16 elements.
template <int kCount>
constexpr int kLoads = 16 / kCount;

// Calls f(v...) for the vectors of a lane, kLoads<V> of them at a time, then one at a time.
template <int V, class Many>
__device__ __forceinline__ void for_vectors(int lane, int vectors, const Many& many) {
  constexpr int U = kLoads<V>;
  int v = lane;
  for (; v + (U - 1) * kWarp < vectors; v += U * kWarp) many(v, std::integral_constant<int, U>());
#pragma unroll 1
  for (; v < vectors; v += kWarp) many(v, std::integral_constant<int, 1>());
}

}  // namespace quantops::cuda
