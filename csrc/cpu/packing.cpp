// Family `packing` on CPU: the ops of quantops/library.py over lists of codes.
#include "cpu/list.h"
#include "cpu/packing_loops.h"
#include "grid_argument.h"
#include "packed_tensor.h"

namespace quantops {
namespace {

std::vector<Chunk> flat_chunks(const std::vector<int64_t>& numel) {
  std::vector<Rows> rows;
  for (int64_t n : numel) rows.push_back({1, n});
  return make_chunks(rows);
}

// A block's piece of one plane. Planes go through a buffer of such rows, since they are often a power of two apart: the
// caches then have room for a few of their lines only, which would be gone before they are whole.
constexpr int64_t kRow = kBlock / 8;

void copy(uint8_t* to, const uint8_t* from, int64_t bytes) {
  if (bytes == kRow)
    std::memcpy(to, from, kRow);  // in line: a call would cost more than the copy
  else if (bytes)
    std::memcpy(to, from, bytes);  // of none the pointers may be null
}

void write(uint8_t* to, const uint8_t* from, int64_t bytes, bool streaming) {
  if (streaming)
    stream(to, from, bytes);
  else
    copy(to, from, bytes);
}

int64_t total_bytes(const Tensors& list) {
  int64_t total = 0;
  for (const Tensor& t : list) total += t.numel() * int64_t(t.element_size());
  return total;
}

[[noreturn]] void fail_outside(const Tensor& codes, int64_t n, const std::string& name) {
  const int32_t* c = static_cast<const int32_t*>(codes.data_ptr());
  int64_t i = 0;
  while (c[i] >= 0 && c[i] < int64_t(1) << n) i++;
  fail(name, ": expected values in 0..2^", n, " - 1, got ", c[i], " at element ", i);
}

Tensors pack(Tensors codes, std::vector<int64_t> bits, int64_t layout) {
  check_codes_to_pack(codes, bits, layout);
  Tensors in, out;
  std::vector<int64_t> numel;
  for (size_t i = 0; i < codes.size(); i++) {
    in.push_back(torch::stable::contiguous(codes[i]));
    numel.push_back(codes[i].numel());
    out.push_back(empty_packed(numel[i], bits[i], layout, codes[i]));
    if (layout == kPlanes && bits[i] && numel[i]) {
      uint8_t* row = static_cast<uint8_t*>(out[i].data_ptr());
      const int64_t bytes = octets_of(numel[i]), stride = plane_bytes(numel[i]);
      for (int64_t q = 0; q < bits[i]; q++, row += stride) std::memset(row + bytes, 0, stride - bytes);
    }
  }
  const bool streaming = total_bytes(out) > kStreamBytes;
  std::vector<Chunk> chunks = flat_chunks(numel);
  std::vector<uint32_t> seen(chunks.size(), 0);
  for_chunks(chunks, [&](int64_t chunk) {
    const auto [t, begin, end] = chunks[chunk];
    const int64_t n = bits[t], stride = plane_bytes(numel[t]);
    const int32_t* c = static_cast<const int32_t*>(in[t].data_ptr());
    uint8_t* data = static_cast<uint8_t*>(out[t].data_ptr());
    alignas(64) uint8_t buffer[kMaxBits * kRow + kSpare];
    for (int64_t i = begin; i < end; i += kBlock) {
      const int64_t count = std::min(kBlock, end - i), bytes = octets_of(count);
      if (layout == kPlanes) {
        seen[chunk] |= pack_planes_loop(c + i, count, int(n), buffer, kRow);
        for (int64_t j = 0; j < n; j++) write(data + j * stride + i / 8, buffer + j * kRow, bytes, streaming);
      } else {
        seen[chunk] |= pack_dense_loop(c + i, count, int(n), buffer);
        write(data + i / 8 * n, buffer, (count * n + 7) / 8, streaming);
      }
    }
    end_streaming();
  });
  for (size_t i = 0; i < chunks.size(); i++) {
    const int64_t t = chunks[i].tensor;
    if (seen[i] >> bits[t]) fail_outside(in[t], bits[t], entry_name("codes", t, codes.size()));
  }
  return out;
}

// A list of packed tensors, the bits m of each code that are read of them, and the chunks that the work is split into.
struct PackedList : PackedShapes {
  std::vector<const uint8_t*> data;
  Tensor bits;
  std::vector<int32_t> m;
  int64_t layout;
  std::vector<Chunk> chunks;

  PackedList(const Tensors& packed, const std::vector<int64_t>& sizes, const std::vector<int64_t>& dims,
             const std::vector<int64_t>& stored_, const Tensor& bits_, int64_t layout_, GridKind grid = kDyadic)
      : PackedShapes(packed, sizes, dims, stored_, layout_), layout(layout_) {
    bits = check_per_weight("bits", bits_, size(), ScalarType::Int, packed[0]);
    for (size_t i = 0; i < packed.size(); i++) {
      const int64_t n = widths()[i], most = std::max<int64_t>(stored[i] - code_bits(1, grid) + 1, 0);
      data.push_back(static_cast<const uint8_t*>(packed[i].data_ptr()));
      QUANTOPS_CHECK(n >= 0 && n <= most, entry_name("bits", i, packed.size()), ": expected 0..", most,
                     ", the bits that are stored, got ", n);
      m.push_back(static_cast<int32_t>(code_bits(n, grid)));
    }
    chunks = flat_chunks(numel);
  }

  // The bit-widths that were asked for, which do not count a sign.
  const int32_t* widths() const { return static_cast<const int32_t*>(bits.data_ptr()); }

  // Codes [i, i + n) of tensor t, at most kBlock of them, where i begins an octet.
  void read(int64_t t, int64_t i, int64_t n, int32_t* codes, bool streaming = false) const {
    streaming = streaming && reinterpret_cast<intptr_t>(codes) % 64 == 0;
    if (layout == kDense) {
      const int64_t at = i / 8 * stored[t], bytes = (numel[t] * stored[t] + 7) / 8;
      return unpack_dense_loop(data[t] + at, bytes - at, n, int(stored[t]), m[t], codes, streaming);
    }
    alignas(64) uint8_t rows[kMaxBits * kRow];
    copy_planes(t, i, n, rows);
    unpack_planes_loop(rows, kRow, n, m[t], codes, streaming);
  }

  bool has_bytes(int64_t t) const { return layout == kPlanes && reads_bytes(m[t]); }

  // The same as bytes; room for kBlock of them.
  void read(int64_t t, int64_t i, int64_t n, uint8_t* codes) const {
    alignas(64) uint8_t rows[kTableBits * kRow];
    copy_planes(t, i, n, rows);
    unpack_bytes_loop(rows, kRow, n, m[t], codes);
  }

  void copy_planes(int64_t t, int64_t i, int64_t n, uint8_t* rows) const {
    const uint8_t* from = data[t] + i / 8;
    for (int j = 0; j < m[t]; j++, from += plane_bytes(numel[t])) copy(rows + j * kRow, from, octets_of(n));
  }
};

Tensors unpack(Tensors data, std::vector<int64_t> sizes, std::vector<int64_t> dims, std::vector<int64_t> stored,
               Tensor bits, int64_t layout) {
  const PackedList list(data, sizes, dims, stored, bits, layout);
  const Tensors out = list.empty_list(ScalarType::Int, data[0]);
  const bool streaming = total_bytes(out) > kStreamBytes;
  for_chunks(list.chunks, [&](int64_t chunk) {
    const auto [t, begin, end] = list.chunks[chunk];
    int32_t* codes = static_cast<int32_t*>(out[t].data_ptr());
    for (int64_t i = begin; i < end; i += kBlock) list.read(t, i, std::min(kBlock, end - i), codes + i, streaming);
    end_streaming();
  });
  return out;
}

// The scales of a packed list in the shape that `quantizer` takes.
List scale_list(const PackedList& packed, const Tensors& scale, bool is_double) {
  List list;
  list.is_double = is_double;
  list.bits = packed.widths();
  list.k = nullptr;
  for (int64_t t = 0; t < packed.size(); t++) {
    const int64_t rows = scale[t].numel();
    list.rows.push_back({rows, rows ? packed.numel[t] / rows : 0});
    list.scale.push_back(scale[t].data_ptr());
  }
  return list;
}

template <class A>
void decode_into(const PackedList& packed, const List& list, GridKind grid, bool is_signed, const Targets& q) {
  for_chunks(packed.chunks, [&](int64_t chunk) {
    const Chunk& c = packed.chunks[chunk];
    alignas(64) int32_t codes[kBlock];
    alignas(64) uint8_t bytes[kBlock];
    const bool has_bytes = packed.has_bytes(c.tensor);
    for (int64_t i = c.begin; i < c.end; i += kBlock) {
      const int64_t n = std::min(kBlock, c.end - i);
      if (has_bytes)
        packed.read(c.tensor, i, n, bytes);
      else
        packed.read(c.tensor, i, n, codes);
      for_rows({c.tensor, i, i + n}, list.rows[c.tensor], [&](int64_t row, int64_t begin, int64_t end) {
        const Quantizer<A> p = quantizer<A>(list, c.tensor, row, grid, is_signed);
        with_target<A>(q.data[c.tensor], q.type, begin, end - begin, q.streaming, [&](auto* y, bool streaming) {
          if (has_bytes)
            decode_bytes_loop(bytes + (begin - i), y, streaming, end - begin, p);
          else
            decode_loop(codes + (begin - i), y, streaming, end - begin, p);
        });
      });
    }
    end_streaming();
  });
}

Tensors decode_packed(Tensors data, std::vector<int64_t> sizes, std::vector<int64_t> dims, std::vector<int64_t> stored,
                      Tensors scale, Tensor bits, int64_t layout, int64_t grid_index, bool is_signed,
                      ScalarType dtype) {
  const GridKind grid = check_grid(grid_index, is_signed);
  const PackedList packed(data, sizes, dims, stored, bits, layout, grid);
  check_float("dtype", dtype);
  const bool is_double = packed.check_scales(scale, data[0]) == ScalarType::Double;
  const List list = scale_list(packed, scale, is_double);
  check_scale_values(list);
  const Tensors q = packed.empty_list(dtype, data[0]);
  Targets to{{}, storage(q[0]), total_bytes(q) > kStreamBytes};
  for (const Tensor& t : q) to.data.push_back(t.data_ptr());
  is_double ? decode_into<double>(packed, list, grid, is_signed, to)
            : decode_into<float>(packed, list, grid, is_signed, to);
  return q;
}

}  // namespace
}  // namespace quantops

STABLE_TORCH_LIBRARY_IMPL(quantops, CPU, m) {
  m.impl("pack", TORCH_BOX(&quantops::pack));
  m.impl("unpack", TORCH_BOX(&quantops::unpack));
  m.impl("decode_packed", TORCH_BOX(&quantops::decode_packed));
}
