// Elements in registers and in memory: widened and narrowed, moved as words, many to a vector.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "launch.cuh"

namespace quantops::cuda {

struct None {};  // in the place of an element type: there is no such tensor

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
// By a shift, which the compiler joins with what takes a word apart.
__device__ __forceinline__ float widen(__nv_bfloat16 v) {
  return __uint_as_float(static_cast<unsigned>(__bfloat16_as_ushort(v)) << 16);
}
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ int32_t widen(int32_t v) { return v; }

// float64 goes to 16 bits through float32, as it does in torch.
template <class T>
struct Narrow {
  template <class A>
  static __device__ __forceinline__ T from(A v) {
    return static_cast<T>(v);
  }
};
template <>
struct Narrow<__nv_bfloat16> {
  template <class A>
  static __device__ __forceinline__ __nv_bfloat16 from(A v) {
    return __float2bfloat16_rn(static_cast<float>(v));
  }
};
template <>
struct Narrow<__half> {
  template <class A>
  static __device__ __forceinline__ __half from(A v) {
    return __float2half_rn(static_cast<float>(v));
  }
};

// The dtype of the arithmetic.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// kCount elements that are loaded and stored as words of up to 16 bytes.
template <class T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Pack {
  T v[kCount];
};
template <int kCount>
struct Pack<None, kCount> {};

// Moved as words, and stored by what is one instruction: else the compiler may make one store per element.
template <class P>
using Word = std::conditional_t<sizeof(P) % 16 == 0, uint4, std::conditional_t<sizeof(P) == 8, uint2, unsigned>>;

// A Pack whose elements are not yet wanted: taken apart, elements of 16 bits have a register each.
template <class P>
struct Raw {
  Word<P> v[sizeof(P) / sizeof(Word<P>)];
};

template <class P>
__device__ __forceinline__ Raw<P> load_raw(const void* from) {
  Raw<P> words;
  static_assert(sizeof(words) == sizeof(P));
#pragma unroll
  for (int i = 0; i < int(sizeof(P) / sizeof(Word<P>)); ++i) words.v[i] = static_cast<const Word<P>*>(from)[i];
  return words;
}

template <class P>
__device__ __forceinline__ P elements_of(const Raw<P>& words) {
  P pack;
  memcpy(&pack, &words, sizeof(P));
  return pack;
}

template <class P>
__device__ __forceinline__ P load_pack(const void* from) {
  return elements_of(load_raw<P>(from));
}

template <class T>
__device__ __forceinline__ void store_word(T* to, const T& v) {
#if QUANTOPS_STORES == 2
  __stcs(to, v);
#elif QUANTOPS_STORES == 1 && defined(__CUDA_ARCH__)
  const auto at = __cvta_generic_to_global(to);
  if constexpr (sizeof(T) == 16)
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" : : "l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w));
  else if constexpr (sizeof(T) == 8)
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" : : "l"(at), "r"(v.x), "r"(v.y));
  else
    asm volatile("st.global.b32 [%0], %1;" : : "l"(at), "r"(v));
#else
  __stwb(to, v);
#endif
}

template <class P>
__device__ __forceinline__ void store_pack(void* to, const P& pack) {
  constexpr int kWords = sizeof(P) / sizeof(Word<P>);
  Word<P> words[kWords];
  memcpy(words, &pack, sizeof(P));
#pragma unroll
  for (int i = 0; i < kWords; ++i) store_word(static_cast<Word<P>*>(to) + i, words[i]);
}

template <class T>
constexpr int size_of = std::is_same_v<T, None> ? 0 : int(sizeof(T));

// A vector is as many elements as fill 16 bytes of the smallest type, but of the largest no more than 32, for the sake
// of registers.
template <class X, class G, class O>
constexpr int vector_elements() {
  constexpr int g = size_of<G> ? size_of<G> : size_of<X>, o = size_of<O> ? size_of<O> : size_of<X>;
  constexpr int smallest = std::min({size_of<X>, g, o}), largest = std::max({size_of<X>, g, o});
  return std::min(16 / smallest, 32 / largest);
}

}  // namespace quantops::cuda
