// Loops that pack and unpack a block of codes, which begins at a whole octet. Bit planes go through the instructions
// that move a bit of each byte of a register to a mask and back, which compilers do not find by themselves.
#pragma once
#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/blocks.h"
#include "cpu/simd.h"
#include "cpu/uniform_loops.h"
#include "packing_math.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bytes are written as words, the lowest first");

namespace quantops {
namespace detail {

// Each function below returns how many codes it did, from the first: those that fill its registers. Planes are `stride`
// bytes apart, the most significant first. `seen` collects the bits of all codes. Streamed codes begin at a multiple of
// 64 bytes.
#if defined(__x86_64__)
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // of GCC 12's own headers (its bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// The low bytes of 64 codes, in order.
__attribute__((target("avx512f,avx512bw"), always_inline)) inline __m512i low_bytes(const __m512i (&code)[4]) {
  __m512i bytes = _mm512_castsi128_si512(_mm512_cvtepi32_epi8(code[0]));
  bytes = _mm512_inserti32x4(bytes, _mm512_cvtepi32_epi8(code[1]), 1);
  bytes = _mm512_inserti32x4(bytes, _mm512_cvtepi32_epi8(code[2]), 2);
  return _mm512_inserti32x4(bytes, _mm512_cvtepi32_epi8(code[3]), 3);
}

__attribute__((target("avx512f,avx512bw"))) inline int64_t pack_planes_avx512(const int32_t* codes, int64_t count,
                                                                              int n, uint8_t* data, int64_t stride,
                                                                              uint32_t& seen) {
  __m512i all = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    __m512i code[4];
    for (int j = 0; j < 4; j++) {
      code[j] = _mm512_loadu_si512(codes + i + 16 * j);
      all = _mm512_or_si512(all, code[j]);
    }
    uint8_t* to = data + i / 8;
    auto planes = [&](__m512i bytes, int rows) __attribute__((target("avx512f,avx512bw"), always_inline)) {
      bytes = _mm512_sll_epi16(bytes, _mm_cvtsi32_si128(8 - rows));  // no bit leaves its byte
      for (int j = 0; j < rows; j++, to += stride) {
        const uint64_t plane = _mm512_movepi8_mask(bytes);
        std::memcpy(to, &plane, 8);
        bytes = _mm512_add_epi8(bytes, bytes);
      }
    };
    const __m512i low = low_bytes(code);
    if (n > 8) {
      for (__m512i& c : code) c = _mm512_srli_epi32(c, 8);
      planes(low_bytes(code), n - 8);
    }
    planes(low, std::min(n, 8));
  }
  seen |= static_cast<uint32_t>(_mm512_reduce_or_epi32(all));
  return i;
}

// Octets [i / 8, i / 8 + 8) of up to 8 planes as codes, one in each byte.
__attribute__((target("avx512f,avx512bw"), always_inline)) inline __m512i bytes_of_planes(const uint8_t* from,
                                                                                          int64_t stride, int rows) {
  const __m512i minus_one = _mm512_set1_epi8(-1);
  __m512i b = _mm512_setzero_si512();
  for (int j = 0; j < rows; j++, from += stride) {
    uint64_t plane;
    std::memcpy(&plane, from, 8);
    b = _mm512_add_epi8(b, b);
    b = _mm512_mask_sub_epi8(b, plane, b, minus_one);
  }
  return b;
}

__attribute__((target("avx512f,avx512bw"))) inline int64_t unpack_planes_avx512(const uint8_t* data, int64_t stride,
                                                                                int64_t count, int m, int32_t* codes,
                                                                                bool streaming) {
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    const uint8_t* from = data + i / 8;
    alignas(64) uint8_t low[64], high[64];
    if (m > 8) _mm512_store_si512(high, bytes_of_planes(from, stride, m - 8));
    _mm512_store_si512(low, bytes_of_planes(from + std::max(m - 8, 0) * stride, stride, std::min(m, 8)));
    for (int j = 0; j < 64; j += 16) {
      __m512i c = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(low + j)));
      if (m > 8) {
        const __m512i h = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(high + j)));
        c = _mm512_or_si512(c, _mm512_slli_epi32(h, 8));
      }
      if (streaming)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(codes + i + j), c);
      else
        _mm512_storeu_si512(codes + i + j, c);
    }
  }
  return i;
}

__attribute__((target("avx512f,avx512bw"))) inline void unpack_bytes_avx512(const uint8_t* data, int64_t stride,
                                                                            int64_t count, int m, uint8_t* codes) {
  for (int64_t i = 0; i < count; i += 64) _mm512_store_si512(codes + i, bytes_of_planes(data + i / 8, stride, m));
}

// The entry of a table that a register holds, for each code.
__attribute__((target("avx512f,avx512bw"))) inline int64_t look_up_avx512(const uint8_t* codes, int64_t count,
                                                                          const float* table, float* to,
                                                                          bool streaming) {
  const __m512 entries = _mm512_loadu_ps(table);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m512i c = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
    const __m512 v = _mm512_permutexvar_ps(c, entries);
    if (streaming)
      _mm512_stream_ps(to + i, v);
    else
      _mm512_storeu_ps(to + i, v);
  }
  return i;
}
__attribute__((target("avx512f,avx512bw"))) inline int64_t look_up_avx512(const uint8_t* codes, int64_t count,
                                                                          const BFloat16* table, BFloat16* to,
                                                                          bool streaming) {
  const __m512i entries = _mm512_loadu_si512(table);
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m512i c = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i)));
    const __m512i v = _mm512_permutexvar_epi16(c, entries);
    if (streaming)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), v);
    else
      _mm512_storeu_si512(to + i, v);
  }
  return i;
}

__attribute__((target("avx2"), always_inline)) inline void store(int32_t* codes, __m256i c, bool streaming) {
  if (streaming)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(codes), c);
  else
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), c);
}

// The low bytes of 32 codes, in order.
__attribute__((target("avx2"), always_inline)) inline __m256i low_bytes(const __m256i (&code)[4]) {
  const __m256i byte = _mm256_set1_epi32(255), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i a = _mm256_packus_epi32(_mm256_and_si256(code[0], byte), _mm256_and_si256(code[1], byte));
  const __m256i b = _mm256_packus_epi32(_mm256_and_si256(code[2], byte), _mm256_and_si256(code[3], byte));
  return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), order);
}

__attribute__((target("avx2"))) inline int64_t pack_planes_avx2(const int32_t* codes, int64_t count, int n,
                                                                uint8_t* data, int64_t stride, uint32_t& seen) {
  __m256i all = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    __m256i code[4];
    for (int j = 0; j < 4; j++) {
      code[j] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i + 8 * j));
      all = _mm256_or_si256(all, code[j]);
    }
    uint8_t* to = data + i / 8;
    auto planes = [&](__m256i bytes, int rows) __attribute__((target("avx2"), always_inline)) {
      bytes = _mm256_sll_epi16(bytes, _mm_cvtsi32_si128(8 - rows));
      for (int j = 0; j < rows; j++, to += stride) {
        const int plane = _mm256_movemask_epi8(bytes);
        std::memcpy(to, &plane, 4);
        bytes = _mm256_add_epi8(bytes, bytes);
      }
    };
    const __m256i low = low_bytes(code);
    if (n > 8) {
      for (__m256i& c : code) c = _mm256_srli_epi32(c, 8);
      planes(low_bytes(code), n - 8);
    }
    planes(low, std::min(n, 8));
  }
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), all);
  for (uint32_t lane : lanes) seen |= lane;
  return i;
}

__attribute__((target("avx2"))) inline int64_t unpack_planes_avx2(const uint8_t* data, int64_t stride, int64_t count,
                                                                  int m, int32_t* codes, bool streaming) {
  const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i select = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const uint8_t* from = data + i / 8;
    auto bytes = [&](int rows) __attribute__((target("avx2"), always_inline)) {
      __m256i b = _mm256_setzero_si256();
      for (int j = 0; j < rows; j++, from += stride) {
        int plane;
        std::memcpy(&plane, from, 4);
        const __m256i bits = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(plane), spread), select);
        b = _mm256_sub_epi8(_mm256_add_epi8(b, b), _mm256_cmpeq_epi8(bits, select));  // true is -1
      }
      return b;
    };
    alignas(32) uint8_t low[32], high[32];
    if (m > 8) _mm256_store_si256(reinterpret_cast<__m256i*>(high), bytes(m - 8));
    _mm256_store_si256(reinterpret_cast<__m256i*>(low), bytes(std::min(m, 8)));
    for (int j = 0; j < 32; j += 8) {
      __m256i c = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(low + j)));
      if (m > 8) {
        const __m256i h = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(high + j)));
        c = _mm256_or_si256(c, _mm256_slli_epi32(h, 8));
      }
      store(codes + i + j, c, streaming);
    }
  }
  return i;
}

// Each lane takes the four bytes in which its code begins, and shifts and masks it out of them: a code of up to 16 bits
// ends in the third of them at the latest.
__attribute__((target("avx2"))) inline int64_t unpack_dense_avx2(const uint8_t* data, int64_t bytes, int64_t count,
                                                                 int n, int m, int32_t* codes, bool streaming) {
  alignas(32) uint8_t bytes_of[kOctet][4];
  alignas(32) int32_t shift_of[kOctet];
  for (int i = 0; i < kOctet; i++) {
    for (int j = 0; j < 4; j++) bytes_of[i][j] = n * i / 8 + j < 16 ? n * i / 8 + j : 0x80;  // 0x80: a zero
    shift_of[i] = n * i % 8 + n - m;
  }
  const __m256i taken = _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes_of));
  const __m256i shift = _mm256_load_si256(reinterpret_cast<const __m256i*>(shift_of));
  const __m256i mask = _mm256_set1_epi32((1 << m) - 1);
  int64_t i = 0;
  for (int64_t at = 0; i + kOctet <= count && at + 16 <= bytes; i += kOctet, at += n) {
    const __m256i octet = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data + at)));
    const __m256i c = _mm256_srlv_epi32(_mm256_shuffle_epi8(octet, taken), shift);
    store(codes + i, _mm256_and_si256(c, mask), streaming);
  }
  return i;
}

#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

// The octet that begins at `codes`, of which `count` are there; zeros in the place of others.
inline void load_octet(const int32_t* codes, int64_t count, uint32_t (&octet)[kOctet]) {
  for (int j = 0; j < kOctet; j++) octet[j] = j < count ? static_cast<uint32_t>(codes[j]) : 0;
}

inline void store_octet(const uint32_t (&octet)[kOctet], int shift, int64_t count, int32_t* codes) {
  for (int j = 0; j < std::min<int64_t>(count, kOctet); j++) codes[j] = static_cast<int32_t>(octet[j] >> shift);
}

}  // namespace detail

// Packs `count` codes of n bits into planes that are `stride` bytes apart; returns the union of the bits of all codes.
inline uint32_t pack_planes_loop(const int32_t* codes, int64_t count, int n, uint8_t* data, int64_t stride) {
  uint32_t seen = 0, octet[kOctet];
  int64_t i = 0;
#if defined(__x86_64__)
  if (kHasAvx512)
    i = detail::pack_planes_avx512(codes, count, n, data, stride, seen);
  else if (kHasAvx2)
    i = detail::pack_planes_avx2(codes, count, n, data, stride, seen);
#endif
  for (; i < count; i += kOctet) {
    detail::load_octet(codes + i, count - i, octet);
    for (uint32_t c : octet) seen |= c;
    Bytes b = planes_of(octet, n);
    for (int p = 0; p < n; p++) data[(n - 1 - p) * stride + i / 8] = pop_byte(b);
  }
  return seen;
}

// The first m planes as codes of m bits.
inline void unpack_planes_loop(const uint8_t* data, int64_t stride, int64_t count, int m, int32_t* codes,
                               bool streaming) {
  int64_t i = 0;
#if defined(__x86_64__)
  if (kHasAvx512)
    i = detail::unpack_planes_avx512(data, stride, count, m, codes, streaming);
  else if (kHasAvx2)
    i = detail::unpack_planes_avx2(data, stride, count, m, codes, streaming);
#endif
  for (; i < count; i += kOctet) {
    Bytes b = {0, 0};
    for (int j = 0; j < m; j++) push_byte(b, data[j * stride + i / 8]);
    uint32_t octet[kOctet];
    codes_of_planes(b, m, octet);
    detail::store_octet(octet, 0, count - i, codes + i);
  }
}

// Whether codes of m bits are read as bytes, to look their values up in a register: with AVX-512.
constexpr int kTableBits = 4;

inline bool reads_bytes(int m) {
#if defined(__x86_64__)
  return m <= kTableBits && kHasAvx512;
#else
  return false;
#endif
}

// As unpack_planes_loop where reads_bytes(m). Planes and codes go up to the next multiple of 64, to whatever is there.
inline void unpack_bytes_loop(const uint8_t* data, int64_t stride, int64_t count, int m, uint8_t* codes) {
#if defined(__x86_64__)
  detail::unpack_bytes_avx512(data, stride, count, m, codes);
#endif
}

// What decode_loop gives, for codes of up to kTableBits bits.
template <class T, class A>
void decode_bytes_loop(const uint8_t* codes, T* q, bool streaming, int64_t n, const Quantizer<A>& p) {
  int64_t i = 0;
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, BFloat16>) {
    if (n >= 8 * kLanes) {  // else a table is not worth making
      alignas(64) uint8_t all[kLanes];
      alignas(64) T table[kLanes];
      for (int j = 0; j < kLanes; j++) all[j] = uint8_t(j);
      decode_loop(all, table, false, kLanes, p);
      i = detail::look_up_avx512(codes, n, table, q, streaming && reinterpret_cast<intptr_t>(q) % 64 == 0);
    }
  }
#endif
  decode_loop(codes + i, q + i, streaming && reinterpret_cast<intptr_t>(q + i) % 16 == 0, n - i, p);
}

namespace detail {

// Two codes as one word.
typedef uint64_t CodePair __attribute__((may_alias, aligned(4)));

// The 8n bits of each octet of codes of n bits, n > 0, in 16 bytes: pairs of codes are joined first, then pairs of
// those, then the halves. Returns the union of the bits of all codes.
QUANTOPS_SIMD inline uint32_t join_octets(const CodePair* __restrict pairs, int64_t octets, int n,
                                          uint64_t* __restrict low, uint64_t* __restrict high) {
  uint64_t seen = 0, quad[kBlock / 4];
  const uint64_t mask = (uint64_t(1) << 2 * n) - 1;
  for (int64_t i = 0; i < 2 * octets; i++) {
    const uint64_t a = pairs[2 * i], b = pairs[2 * i + 1];
    seen |= a | b;
    quad[i] = ((a | a >> (32 - n)) & mask) | ((b | b >> (32 - n)) & mask) << 2 * n;
  }
  if (n == 16) {
    for (int64_t i = 0; i < octets; i++) low[i] = quad[2 * i], high[i] = quad[2 * i + 1];
  } else {
    for (int64_t i = 0; i < octets; i++) {
      low[i] = quad[2 * i] | quad[2 * i + 1] << 4 * n;
      high[i] = quad[2 * i + 1] >> (64 - 4 * n);
    }
  }
  return static_cast<uint32_t>(seen | seen >> 32);
}

}  // namespace detail

// Packs up to kBlock codes of n bits one after another; returns the union of the bits of all codes. `data` has room for
// kSpare bytes more than they take, which may be written too.
constexpr int64_t kSpare = 16;

inline uint32_t pack_dense_loop(const int32_t* codes, int64_t count, int n, uint8_t* data) {
  uint32_t seen = 0;
  const int64_t octets = count / kOctet;
  if (n == 0) {
    for (int64_t i = 0; i < count; i++) seen |= static_cast<uint32_t>(codes[i]);
    return seen;
  }
  uint64_t low[kBlock / kOctet], high[kBlock / kOctet];
  seen = detail::join_octets(reinterpret_cast<const detail::CodePair*>(codes), octets, n, low, high);
  for (int64_t i = 0; i < octets; i++, data += n) {  // whole words: what is too much, the next octet writes over
    std::memcpy(data, low + i, 8);
    if (n > 8) std::memcpy(data + 8, high + i, 8);
  }
  if (octets * kOctet < count) {
    uint32_t octet[kOctet];
    detail::load_octet(codes + octets * kOctet, count - octets * kOctet, octet);
    for (uint32_t c : octet) seen |= c;
    const Bytes b = dense_of(octet, n);
    std::memcpy(data, &b, 16);
  }
  return seen;
}

// The m most significant of n bits of each code. From `data` on, `bytes` can be read.
inline void unpack_dense_loop(const uint8_t* data, int64_t bytes, int64_t count, int n, int m, int32_t* codes,
                              bool streaming) {
  int64_t i = 0;
#if defined(__x86_64__)
  if (kHasAvx2) i = detail::unpack_dense_avx2(data, bytes, count, n, m, codes, streaming);
#endif
  for (; i < count; i += kOctet) {
    const int64_t at = i / kOctet * n;
    Bytes b = {0, 0};
    if (n != 0) std::memcpy(&b, data + at, std::min<int64_t>(n, bytes - at));  // of no bytes the pointer may be null
    uint32_t octet[kOctet];
    codes_of_dense(b, n, octet);
    detail::store_octet(octet, n - m, count - i, codes + i);
  }
}

}  // namespace quantops
