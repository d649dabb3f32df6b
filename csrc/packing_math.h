// Packed codes per octet, eight codes in a row, which take whole bytes in every layout: n bytes for n bits. One inline
// statement for the CPU and the CUDA kernels; the layouts are those of quantops/reference/packing.py.
#pragma once
#include <cstdint>

#include "quant_math.h"

namespace quantops {

enum Layout : int64_t { kPlanes = 0, kDense = 1 };  // the order of LAYOUTS in the reference

constexpr int kOctet = 8;
constexpr int64_t kPlaneAlignment = 16;  // bytes

QUANTOPS_INLINE int64_t octets_of(int64_t numel) { return (numel + kOctet - 1) / kOctet; }

// Bytes of one bit plane.
QUANTOPS_INLINE int64_t plane_bytes(int64_t numel) {
  return (octets_of(numel) + kPlaneAlignment - 1) / kPlaneAlignment * kPlaneAlignment;
}

// Up to 16 bytes, byte 0 lowest.
struct Bytes {
  uint64_t low, high;
};

// Appends a byte below, at place 0.
QUANTOPS_INLINE void push_byte(Bytes& b, uint8_t byte) {
  b.high = b.high << 8 | b.low >> 56;
  b.low = b.low << 8 | byte;
}

// Takes the byte at place 0 away.
QUANTOPS_INLINE uint8_t pop_byte(Bytes& b) {
  uint8_t byte = static_cast<uint8_t>(b.low);
  b.low = b.low >> 8 | b.high << 56;
  b.high >>= 8;
  return byte;
}

// The 8 x 8 bits with rows and columns exchanged: bit j of byte i becomes bit i of byte j. By exchanging the
// off-diagonal bits of 2 x 2 blocks, then 2 x 2 blocks in those of 4 x 4, then 4 x 4 ones (Warren, Hacker's Delight,
// 7-3).
QUANTOPS_INLINE uint64_t transpose_bits(uint64_t x) {
  uint64_t t = (x ^ x >> 7) & 0x00aa00aa00aa00aaull;
  x ^= t ^ t << 7;
  t = (x ^ x >> 14) & 0x0000cccc0000ccccull;
  x ^= t ^ t << 14;
  t = (x ^ x >> 28) & 0x00000000f0f0f0f0ull;
  return x ^ t ^ t << 28;
}

// Byte p has bit p of each of the codes of n bits: their bytes of the planes, least significant first.
QUANTOPS_INLINE Bytes planes_of(const uint32_t (&code)[kOctet], int n) {
  Bytes b = {0, 0};
  for (int i = 0; i < kOctet; ++i) b.low |= static_cast<uint64_t>(code[i] & 255) << 8 * i;
  b.low = transpose_bits(b.low);
  if (n > 8) {
    for (int i = 0; i < kOctet; ++i) b.high |= static_cast<uint64_t>(code[i] >> 8 & 255) << 8 * i;
    b.high = transpose_bits(b.high);
  }
  return b;
}

QUANTOPS_INLINE void codes_of_planes(Bytes b, int n, uint32_t (&code)[kOctet]) {
  b.low = transpose_bits(b.low);
  for (int i = 0; i < kOctet; ++i) code[i] = static_cast<uint32_t>(b.low >> 8 * i & 255);
  if (n > 8) {
    b.high = transpose_bits(b.high);
    for (int i = 0; i < kOctet; ++i) code[i] |= static_cast<uint32_t>(b.high >> 8 * i & 255) << 8;
  }
}

// The codes' bits one after another: 8n bits, of codes below 2^n.
QUANTOPS_INLINE Bytes dense_of(const uint32_t (&code)[kOctet], int n) {
  uint64_t half[2] = {0, 0};
  for (int i = 0; i < kOctet; ++i) half[i / 4] |= static_cast<uint64_t>(code[i]) << n * (i % 4);
  if (n == 16) return {half[0], half[1]};
  return {half[0] | half[1] << 4 * n, half[1] >> 1 >> (63 - 4 * n)};
}

QUANTOPS_INLINE void codes_of_dense(const Bytes& b, int n, uint32_t (&code)[kOctet]) {
  const uint32_t mask = (1u << n) - 1;
  const uint64_t second = n == 16 ? b.high : b.low >> 4 * n | b.high << 1 << (63 - 4 * n);
  for (int i = 0; i < kOctet; ++i) code[i] = static_cast<uint32_t>((i < 4 ? b.low : second) >> n * (i % 4)) & mask;
}

}  // namespace quantops
