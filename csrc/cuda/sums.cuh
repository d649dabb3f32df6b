// How numbers are combined: by a warp, by a block, and by the last block of a launch. Orders are fixed, so that sums
// are the same bits every time.
#pragma once
#include <cstring>

#include "launch.cuh"

namespace quantops::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarpsPerBlock = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// Of a number, or of several in a struct.
template <class T>
__device__ __forceinline__ T shuffle_down(const T& v, int lanes) {
  static_assert(sizeof(T) % 4 == 0);
  unsigned words[sizeof(T) / 4];
  memcpy(words, &v, sizeof(T));
#pragma unroll
  for (unsigned& word : words) word = __shfl_down_sync(kAllLanes, word, lanes);
  T result;
  memcpy(&result, words, sizeof(T));
  return result;
}

// The combined value of a warp, in lane 0.
template <class Combine, class T>
__device__ __forceinline__ T warp_reduce(T v) {
#pragma unroll
  for (int d = kWarp / 2; d > 0; d /= 2) v = Combine()(v, shuffle_down(v, d));
  return v;
}

// The combined value of a block of whole warps, in thread 0. T() is neutral: 0 for sums and for max of bit patterns.
template <class Combine, class T>
__device__ __forceinline__ T block_reduce(T v) {
  __shared__ T of_warp[kWarp];
  v = warp_reduce<Combine>(v);
  __syncthreads();  // an earlier call has been read
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = v;
  __syncthreads();
  if (threadIdx.x >= kWarp) return v;
  return warp_reduce<Combine>(threadIdx.x < blockDim.x / kWarp ? of_warp[threadIdx.x] : T());
}

// The counters of blocks that are done, one for each launch that may run at the same time, see take_counter. All are 0
// between launches.
__device__ static unsigned blocks_done[kCounters];

// Whether this block is the last one of the launch to come here. It then sees what all others wrote before. Every
// thread of every block must come.
__device__ __forceinline__ bool is_last_block(int counter) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(&blocks_done[counter], gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  __threadfence();
  return last;
}

}  // namespace quantops::cuda
