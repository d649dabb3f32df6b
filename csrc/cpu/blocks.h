// Moves blocks of elements between storage (any dtype) and the arithmetic dtype, so that arithmetic is written once.
#pragma once
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#include "cpu/simd.h"
#include "quant_math.h"

namespace quantops {

enum class Storage { f32, f64, bf16, f16 };

inline int64_t item_size(Storage t) { return t == Storage::f64 ? 8 : t == Storage::f32 ? 4 : 2; }

// Elements: few enough that the blocks of all operands stay in the first-level cache, enough to hide what a loop costs
// before its first element and behind its last.
constexpr int64_t kBlock = 2048;

// An element in storage as the loops see it. Half precision and mixtures with float64 go through buffers instead.
struct BFloat16 {
  uint16_t bits;
};

QUANTOPS_INLINE float widen(float v) { return v; }
QUANTOPS_INLINE double widen(double v) { return v; }
QUANTOPS_INLINE int32_t widen(int32_t v) { return v; }
QUANTOPS_INLINE int32_t widen(uint8_t v) { return v; }
QUANTOPS_INLINE float widen(BFloat16 v) {
  uint32_t u = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

QUANTOPS_INLINE void narrow(int32_t v, int32_t& to) { to = v; }
QUANTOPS_INLINE void narrow(float v, float& to) { to = v; }
QUANTOPS_INLINE void narrow(double v, double& to) { to = v; }
// As bfloat16 in the upper half, to nearest even, of a value whose NaNs have no bits that rounding could carry into the
// exponent: those of bfloat16 and of arithmetic on it.
QUANTOPS_INLINE uint32_t rounded_bits(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  return u + 0x7fff + ((u >> 16) & 1);
}

QUANTOPS_INLINE void narrow(float v, BFloat16& to) {  // NaN to the one that torch writes
  to.bits = uint16_t(v == v ? rounded_bits(v) >> 16 : 0x7fc0);
}

// Whether all operands of a loop are bfloat16. It then takes the first of each two that make a word in front of all
// second ones: a shift or a mask widens them so, where the order in storage takes one instruction more for each, and as
// much less makes words of the results.
template <class... T>
constexpr bool kAllPairs = (std::is_same_v<T, BFloat16> && ...);

// Of a value whose NaNs come from elements of type From or from arithmetic.
template <class From, class A, class To>
QUANTOPS_INLINE void narrow_from(A v, To& to) {
  if constexpr (kAllPairs<From, To>)
    to.bits = uint16_t(rounded_bits(v) >> 16);
  else
    narrow(v, to);
}

// kLanes elements at `from` in the arithmetic dtype, in that order or in the one they have there. What is not bfloat16
// is in a buffer that has the order already.
template <class T, bool kPairs>
struct Elements {
  const T* from;

  QUANTOPS_INLINE explicit Elements(const T* from_) : from(from_) {}
  QUANTOPS_INLINE auto operator[](int j) const { return widen(from[j]); }
};

template <>
struct Elements<BFloat16, true> {
  float at[kLanes];

  QUANTOPS_INLINE explicit Elements(const BFloat16* from) {
    for (int j = 0; j < kLanes / 2; j++) {
      uint32_t word;  // each by itself: of all at once AVX2's clone made copies in halves, and waited for them
      std::memcpy(&word, from + 2 * j, sizeof(word));
      const uint32_t first = word << 16, second = word & 0xffff0000;
      std::memcpy(at + j, &first, 4);
      std::memcpy(at + kLanes / 2 + j, &second, 4);
    }
  }
  QUANTOPS_INLINE float operator[](int j) const { return at[j]; }
};

// kLanes results on their way to storage, in the same order.
template <class From, class T, bool kPairs>
struct Results {
  T* to;

  QUANTOPS_INLINE explicit Results(T* to_) : to(to_) {}
  template <class A>
  QUANTOPS_INLINE void set(int j, A v) {
    narrow_from<From>(v, to[j]);
  }
  QUANTOPS_INLINE void finish() {}
};

template <class From>
struct Results<From, BFloat16, true> {
  BFloat16* to;
  float at[kLanes];

  QUANTOPS_INLINE explicit Results(BFloat16* to_) : to(to_) {}
  QUANTOPS_INLINE void set(int j, float v) { at[j] = v; }
  QUANTOPS_INLINE void finish() {
    uint32_t words[kLanes / 2];
    for (int j = 0; j < kLanes / 2; j++)
      words[j] = rounded_bits(at[j]) >> 16 | (rounded_bits(at[kLanes / 2 + j]) & 0xffff0000);
    std::memcpy(to, words, sizeof(words));
  }
};

#if defined(__x86_64__)
inline const bool kHasAvx2 = __builtin_cpu_supports("avx2");
inline const bool kHasAvx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");

// Past the caches; `to` and `bytes`: multiples of 16. Half a line at a time where that can be: with quarters, ops ran
// at a half to a third of their speed wherever memory happened to lie badly. As text, since clones for older processors
// are compiled from it too.
QUANTOPS_INLINE void stream_lines(char* to, const char* from, int64_t bytes) {
  int64_t i = 0;
  if (kHasAvx2 && reinterpret_cast<intptr_t>(to) % 32 == 0)
    for (; i + 32 <= bytes; i += 32)
      asm volatile("vmovdqu (%1), %%ymm0\n\tvmovntdq %%ymm0, (%0)" : : "r"(to + i), "r"(from + i) : "memory", "xmm0");
  for (; i < bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
}
#endif

// Writes kLanes results. Streaming goes past the caches: what is larger than them is not read again before it is gone,
// and reading lines only to overwrite them would cost a third of the bandwidth. `to` is then a multiple of 16.
template <class T>
QUANTOPS_INLINE void put_lanes(T* to, const T* from, bool streaming) {
#if defined(__x86_64__)
  if (streaming)
    return stream_lines(reinterpret_cast<char*>(to), reinterpret_cast<const char*>(from), kLanes * sizeof(T));
#endif
  std::memcpy(to, from, kLanes * sizeof(T));
}

template <class R, class F, class... L>
QUANTOPS_INLINE void apply_lanes(R&& y, const F& f, const L&... x) {
  for (int j = 0; j < kLanes; j++) y.set(j, f(x[j]...));
  y.finish();
}

// Results are written in runs of this many. A load waits for a store before it to the same place of any page, which is
// each load where an output lies 64 to 256 bytes beyond an input's place in its page, as allocators like to put it.
constexpr int kRun = 8 * kLanes;

// f of the elements of all sources, kLanes at a time, in the arithmetic dtype. From: what their NaNs come from. A loop
// compiled for several instruction sets calls this with a lambda marked QUANTOPS_LANES, which then becomes part of each
// of its clones.
#define QUANTOPS_LANES __attribute__((always_inline))
template <class From, bool kPairs, class Out, class F, class... In>
QUANTOPS_INLINE void map_lanes(Out* to, bool streaming, int64_t n, const F& f, const In*... from) {
  int64_t i = 0;
  for (; i + kRun <= n; i += kRun) {
    alignas(64) Out run[kRun];
    for (int k = 0; k < kRun; k += kLanes)
      apply_lanes(Results<From, Out, kPairs>(run + k), f, Elements<In, kPairs>(from + i + k)...);
    for (int k = 0; k < kRun; k += kLanes) put_lanes(to + i + k, run + k, streaming);
  }
  for (; i + kLanes <= n; i += kLanes) {
    alignas(64) Out lanes[kLanes];
    apply_lanes(Results<From, Out, kPairs>(lanes), f, Elements<In, kPairs>(from + i)...);
    put_lanes(to + i, lanes, streaming);
  }
  for (; i < n; i++) narrow_from<From>(f(widen(from[i])...), to[i]);
}

template <class From, class Out, class F, class... In>
QUANTOPS_INLINE void map_lanes(Out* to, bool streaming, int64_t n, const F& f, const In*... from) {
  map_lanes<From, kAllPairs<Out, In...>>(to, streaming, n, f, from...);
}

template <class A>
inline Storage native();
template <>
inline Storage native<float>() {
  return Storage::f32;
}
template <>
inline Storage native<double>() {
  return Storage::f64;
}

namespace detail {

using torch::headeronly::Half;

template <class From, class To>
QUANTOPS_SIMD void cast(const From* __restrict from, To* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = static_cast<To>(from[i]);
}

QUANTOPS_SIMD inline void bf16_to_float(const BFloat16* __restrict from, float* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = widen(from[i]);
}

QUANTOPS_SIMD inline void float_to_bf16(const float* __restrict from, BFloat16* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; i++) narrow(from[i], to[i]);
}

// Half precision goes through the conversion instructions, which compilers do not vectorize by themselves.
#if defined(__x86_64__)
__attribute__((target("f16c,avx"))) inline int64_t half_to_float_f16c(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  return i;
}
__attribute__((target("f16c,avx"))) inline int64_t float_to_half_f16c(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  return i;
}
// By CPUID itself: clang 14 does not know "f16c" in __builtin_cpu_supports.
inline bool has_f16c() {
  static const bool yes = [] {
    unsigned a, b, c = 0, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) && __builtin_cpu_supports("avx");
  }();
  return yes;
}
#endif

inline void half_to_float(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
#if defined(__x86_64__)
  if (has_f16c()) i = half_to_float_f16c(from, to, n);
#endif
  for (; i < n; i++) {
    Half h;
    std::memcpy(&h, from + i, 2);
    to[i] = static_cast<float>(h);
  }
}

inline void float_to_half(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
#if defined(__x86_64__)
  if (has_f16c()) i = float_to_half_f16c(from, to, n);
#endif
  for (; i < n; i++) {
    Half h = static_cast<Half>(from[i]);
    std::memcpy(to + i, &h, 2);
  }
}

}  // namespace detail

// Elements [i, i + n) of `p` in the arithmetic dtype: in place where that is their storage, else in `buffer`.
template <class A>
const A* load_block(const void* p, Storage t, int64_t i, int64_t n, A* buffer) {
  const char* from = static_cast<const char*>(p) + i * item_size(t);
  if (t == native<A>()) return reinterpret_cast<const A*>(from);
  if (t == Storage::f64) {
    detail::cast(reinterpret_cast<const double*>(from), buffer, n);
  } else if (t == Storage::f32) {
    detail::cast(reinterpret_cast<const float*>(from), buffer, n);
  } else {
    float wide[kBlock];
    float* to = sizeof(A) == 4 ? reinterpret_cast<float*>(buffer) : wide;
    if (t == Storage::bf16)
      detail::bf16_to_float(reinterpret_cast<const BFloat16*>(from), to, n);
    else
      detail::half_to_float(reinterpret_cast<const uint16_t*>(from), to, n);
    if (sizeof(A) != 4) detail::cast(wide, buffer, n);
  }
  return buffer;
}

// Streams a block, see put_lanes.
inline void stream(void* to, const void* from, int64_t bytes) {
  char* d = static_cast<char*>(to);
  const char* s = static_cast<const char*>(from);
#if defined(__x86_64__)
  int64_t head = -reinterpret_cast<intptr_t>(d) & 63;
  if (head > bytes) head = bytes;
  std::memcpy(d, s, head);
  const int64_t lines = (bytes - head) & ~int64_t(63);
  stream_lines(d + head, s + head, lines);
  if (kHasAvx2) asm volatile("vzeroupper");
  std::memcpy(d + head + lines, s + head + lines, bytes - head - lines);
#else
  std::memcpy(d, s, bytes);
#endif
}

inline void end_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Writes a block of elements [i, i + n) of `p` from a buffer.
template <class A>
void store_block(void* p, Storage t, int64_t i, int64_t n, bool streaming, const A* block) {
  char* to = static_cast<char*>(p) + i * item_size(t);
  if (t == native<A>()) {
    streaming ? stream(to, block, n * int64_t(sizeof(A))) : (void)std::memcpy(to, block, n * sizeof(A));
  } else if (t == Storage::f64) {
    detail::cast(block, reinterpret_cast<double*>(to), n);
  } else if (t == Storage::f32) {
    detail::cast(block, reinterpret_cast<float*>(to), n);
  } else {
    float narrow[kBlock];
    uint16_t half[kBlock];
    if (sizeof(A) != 4) detail::cast(block, narrow, n);
    const float* from = sizeof(A) == 4 ? reinterpret_cast<const float*>(block) : narrow;
    uint16_t* out = streaming ? half : reinterpret_cast<uint16_t*>(to);
    if (t == Storage::bf16)
      detail::float_to_bf16(from, reinterpret_cast<BFloat16*>(out), n);
    else
      detail::float_to_half(from, out, n);
    if (streaming) stream(to, half, 2 * n);
  }
}

// f(elements [i, i + n) of `p`): as they are stored where loops take them so, else converted into a buffer.
template <class A, class F>
void with_source(const void* p, Storage t, int64_t i, int64_t n, const F& f) {
  if constexpr (sizeof(A) == 4) {
    if (t == Storage::bf16) return f(static_cast<const BFloat16*>(p) + i);
  }
  A buffer[kBlock];
  f(load_block<A>(p, t, i, n, buffer));
}

// f(where to write elements [i, i + n) of `p` in the arithmetic dtype), in any order; completed by store_block.
template <class A, class F>
void with_block(void* p, Storage t, int64_t i, int64_t n, bool streaming, const F& f) {
  if (t == native<A>() && !streaming) return f(static_cast<A*>(p) + i);
  A buffer[kBlock];
  f(static_cast<A*>(buffer));
  store_block<A>(p, t, i, n, streaming, buffer);
}

// f(where to write elements [i, i + n) of `p`, whether to stream them), completed by a conversion where needed.
template <class A, class F>
void with_target(void* p, Storage t, int64_t i, int64_t n, bool streaming, const F& f) {
  const bool lanes = streaming && (reinterpret_cast<intptr_t>(p) + i * item_size(t)) % 16 == 0;
  if (t == native<A>()) return f(static_cast<A*>(p) + i, lanes);
  if constexpr (sizeof(A) == 4) {
    if (t == Storage::bf16) return f(static_cast<BFloat16*>(p) + i, lanes);
  }
  with_block<A>(p, t, i, n, streaming, [&](A* y) { f(y, false); });
}

}  // namespace quantops
