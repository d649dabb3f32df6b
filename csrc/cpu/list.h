// A list of weights on CPU: its checked arguments, the walk over its blocks, and where results go. Every family uses
// it.
#pragma once
#include <algorithm>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/chunks.h"
#include "quant_math.h"
#include "stable_tensor.h"

namespace quantops {

// Outputs of a list beyond this size are written past the caches.
constexpr int64_t kStreamBytes = int64_t(16) << 20;

inline Storage storage(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return Storage::f64;
    case ScalarType::BFloat16:
      return Storage::bf16;
    case ScalarType::Half:
      return Storage::f16;
    default:
      return Storage::f32;
  }
}

// The part of a list's arguments that every op has, checked: weights (or codes) in dense rows, scales, bits, k.
struct List {
  Tensors w, parameters;  // parameters: bits and k, kept alive
  std::vector<Rows> rows;
  std::vector<const void*> data, scale;
  Storage type;
  const int32_t *bits, *k;
  bool is_double;
  std::vector<Chunk> chunks;

  int64_t size() const { return int64_t(w.size()); }
  int64_t numel() const {
    int64_t total = 0;
    for (const Rows& r : rows) total += r.rows * r.inner;
    return total;
  }
};

inline bool is_double_list(const Tensors& w) { return check_list("w", w, kFloats) == ScalarType::Double; }

inline ScalarType acc_type(bool is_double) { return is_double ? ScalarType::Double : ScalarType::Float; }

inline List make_list(const Tensors& w, bool is_double) {
  List list;
  list.w = dense(w);
  list.is_double = is_double;
  list.type = storage(w[0]);
  list.bits = list.k = nullptr;
  for (const Tensor& t : list.w) list.data.push_back(t.data_ptr());
  return list;
}

// `scale`: where the scales of each weight are, one for each of its rows.
template <class A>
void check_scale_values(const List& list, const std::vector<const void*>& scale, const char* name = "scale") {
  for (size_t i = 0; i < scale.size(); i++) {
    const A* s = static_cast<const A*>(scale[i]);
    for (int64_t j = 0; j < list.rows[i].rows; j++)
      if (!valid_scale(s[j]))
        fail(entry_name(name, i, scale.size()), ": expected finite values >= 0, got ", s[j], " at element ", j);
  }
}

inline void check_scale_values(const List& list) {
  list.is_double ? check_scale_values<double>(list, list.scale) : check_scale_values<float>(list, list.scale);
}

// On CPU the values of bits, k and scale are read, and those out of range raise before any work is done.
inline List make_list(const Tensors& w, const Tensors& scale, const Tensor& bits, const Tensor* k, bool is_double,
                      GridKind grid = kDyadic) {
  List list = make_list(w, is_double);
  for (const Scaled& s : check_scaled(scale, w, acc_type(is_double))) {
    list.rows.push_back(s.rows);
    list.scale.push_back(s.scale);
  }
  list.parameters.push_back(check_per_weight("bits", bits, list.size(), ScalarType::Int, w[0]));
  if (k) list.parameters.push_back(check_per_weight("k", *k, list.size(), ScalarType::Int, w[0]));
  list.bits = static_cast<const int32_t*>(list.parameters[0].data_ptr());
  list.k = k ? static_cast<const int32_t*>(list.parameters[1].data_ptr()) : nullptr;
  for (int64_t i = 0; i < list.size(); i++) {
    int32_t n = list.bits[i];
    if (n < 0 || n > most_bits(grid))
      fail(entry_name("bits", i, w.size()), ": expected 0..", most_bits(grid), ", got ", n);
    if (list.k && !valid_bits(n, list.k[i], grid))
      fail(entry_name("k", i, w.size()), ": expected 1 <= k < bits = ", n, " (or 0 for no LSBs), got ", list.k[i]);
  }
  check_scale_values(list);
  list.chunks = make_chunks(list.rows);
  return list;
}

template <class A>
Quantizer<A> quantizer(const List& list, int64_t tensor, int64_t row, GridKind grid, bool is_signed) {
  int64_t k = list.k ? list.k[tensor] : 0;
  return make_quantizer(static_cast<const A*>(list.scale[tensor])[list.rows[tensor].rows == 1 ? 0 : row],
                        list.bits[tensor], k, grid, is_signed);
}

// Calls f(chunk index, tensor, row, begin, end, quantizer) for every block of every row.
template <class A, class F>
void for_blocks(const List& list, GridKind grid, bool is_signed, const F& f) {
  for_chunks(list.chunks, [&](int64_t chunk) {
    const Chunk& c = list.chunks[chunk];
    for_rows(c, list.rows[c.tensor], [&](int64_t row, int64_t begin, int64_t end) {
      const Quantizer<A> p = quantizer<A>(list, c.tensor, row, grid, is_signed);
      for (int64_t i = begin; i < end; i += kBlock) f(chunk, c.tensor, row, i, std::min(i + kBlock, end), p);
    });
    end_streaming();
  });
}

// Adds up the parts of rows longer than a chunk; shorter ones have been written by their chunk.
template <class A>
void add_parts(const List& list, const std::vector<double>& parts, const std::vector<A*>& result) {
  for (size_t i = 0; i < list.chunks.size();) {
    const Chunk& c = list.chunks[i];
    const Rows& rows = list.rows[c.tensor];
    int64_t row = c.begin / rows.inner;
    double total = 0;
    size_t first = i;
    for (; i < list.chunks.size() && list.chunks[i].tensor == c.tensor &&
           (i == first || (row_in_parts(rows) && list.chunks[i].begin / rows.inner == row));
         i++)
      total += parts[i];
    if (row_in_parts(rows)) result[c.tensor][row] = A(total);
  }
}

struct Targets {
  std::vector<void*> data;
  Storage type;
  bool streaming;
};

inline Targets targets(const Tensors& out, const List& list) {
  Targets t{{}, storage(out[0]), false};
  for (const Tensor& o : out) t.data.push_back(o.data_ptr());
  t.streaming = list.numel() * item_size(t.type) > kStreamBytes;
  return t;
}

}  // namespace quantops
