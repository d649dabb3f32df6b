// Family `packing` on CUDA: the ops of quantops/library.py over lists of tensors, one launch each. What happens to
// eight codes in a row is in csrc/packing_math.h. Values on the GPU are never read back: of a code out of range the low
// bits are packed; bits to be read that are out of range give kInvalid, or NaN, for that tensor.
//
// A warp takes tiles of 1024 codes. Codes are read and written 16 bytes per lane, 128 codes per warp at once; packed
// bytes too, through shared memory, where a lane finds the bytes of its octet. A lane has four codes of a group of 128,
// half an octet: so neighbours take two groups together and exchange halves, and the even lane has an octet of the
// first group, the odd lane one of the second.
#include "../grid_argument.h"
#include "../packed_tensor.h"
#include "table.cuh"

namespace quantops::cuda {
namespace {

constexpr int kGroup = 128;               // codes that a warp moves at once
constexpr int kGroups = 8;                // of a tile
constexpr int kTile = kGroup * kGroups;   // codes
constexpr int kTileBytes = kTile / 8;     // of one bit plane
constexpr int kChunks = kTileBytes / 16;  // 16 bytes each

struct PackedEntry {
  const void* from;
  void* to;
  const void* scale;  // decode: one for each `inner` codes
  int64_t numel, inner;
  int32_t stored;  // bits of each code
};

template <int kCapacity>
struct PackedTable {
  int64_t segment;  // codes per item: tiles of one warp
  int32_t count;    // of entries
  int32_t base;     // the place in the whole list of entry 0
  int64_t first_item[kCapacity + 1];
  PackedEntry entry[kCapacity];
};

static_assert(sizeof(PackedTable<kSmallTable<PackedEntry>>) <= 4096 - 192 &&
                  sizeof(PackedTable<kLargeTable<PackedEntry>>) <= 32764 - 192,
              "a table and 192 bytes of other arguments must fit the kernel parameters");

// What a warp works on.
struct Item {
  int which, lane;
  int64_t begin, end;
};

template <int N>
__device__ __forceinline__ Item item_of(const PackedTable<N>& table) {
  const int64_t item = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (item >= table.first_item[table.count]) return {0, lane, 0, 0};
  const int which = find_entry(table, item);
  const int64_t begin = (item - table.first_item[which]) * table.segment, numel = table.entry[which].numel;
  return {which, lane, begin, begin + table.segment < numel ? begin + table.segment : numel};
}

__device__ __forceinline__ bool aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

struct alignas(16) Four {
  uint32_t v[4];
};

// Between neighbours: the even lane gives its second four and gets the first of the odd one.
__device__ __forceinline__ Four exchange(const Four& first, const Four& second, bool odd) {
  Four got;
#pragma unroll
  for (int i = 0; i < 4; ++i) got.v[i] = __shfl_xor_sync(kAllLanes, odd ? first.v[i] : second.v[i], 1);
  return got;
}

// ------------------------------------------------------------------------------------------------------------ pack

template <bool kDenseLayout, int N>
__global__ void __launch_bounds__(kThreads, 2) pack_kernel(const __grid_constant__ PackedTable<N> table) {
  __shared__ uint4 staged[kWarpsPerBlock][kMaxBits * kChunks];
  const Item item = item_of(table);
  const PackedEntry& entry = table.entry[item.which];
  const uint32_t* codes = static_cast<const uint32_t*>(entry.from);
  uint8_t* out = static_cast<uint8_t*>(entry.to);
  const int n = entry.stored, lane = item.lane;
  const bool odd = lane & 1, wide = aligned(codes);
  const uint32_t mask = (1u << n) - 1;
  const int64_t stride = plane_bytes(entry.numel), total = (entry.numel * n + 7) / 8;
  uint4* chunk = staged[threadIdx.x / kWarp];
  uint8_t* bytes = reinterpret_cast<uint8_t*>(chunk);

  for (int64_t tile = item.begin; tile < item.end; tile += kTile) {
    Four group[kGroups];
    if (wide && tile + kTile <= entry.numel) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) group[g] = load_pack<Four>(codes + tile + g * kGroup + 4 * lane);
    } else {
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int64_t i = tile + g * kGroup + 4 * lane + j;
          group[g].v[j] = i < entry.numel ? codes[i] : 0;
        }
    }
#pragma unroll
    for (int g = 0; g < kGroups; g += 2) {
      const Four got = exchange(group[g], group[g + 1], odd);
      uint32_t octet[kOctet];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        octet[i] = (odd ? got.v[i] : group[g].v[i]) & mask;
        octet[4 + i] = (odd ? group[g + 1].v[i] : got.v[i]) & mask;
      }
      const int place = (g + odd) * (kGroup / kOctet) + lane / 2;
      Bytes b = kDenseLayout ? dense_of(octet, n) : planes_of(octet, n);
      uint8_t* to = kDenseLayout ? bytes + place * n : bytes + (n - 1) * kTileBytes + place;
      for (int p = 0; p < n; ++p, to += kDenseLayout ? 1 : -kTileBytes) *to = pop_byte(b);
    }
    __syncwarp();
    uint8_t* tile_out = out + tile / 8 * (kDenseLayout ? n : 1);
    if (kDenseLayout && tile + kTile > entry.numel) {
#pragma unroll 1
      for (int64_t i = lane; i < total - (tile_out - out); i += kWarp) tile_out[i] = bytes[i];
    } else {
      for (int c = lane; c < n * kChunks; c += kWarp) {
        const int64_t at = kDenseLayout ? 16 * c : c / kChunks * stride + c % kChunks * 16;
        if (kDenseLayout || tile / 8 + c % kChunks * 16 < stride) store_pack(tile_out + at, chunk[c]);
      }
    }
    __syncwarp();
  }
}

// ---------------------------------------------------------------------------------------------------------- unpack

// What becomes of the codes that are read:
//   O                              type of the elements that are written
//   State begin(entry, m)          what a lane keeps; m: bits that are read, -1 where they are out of range
//   void seek(i, entry, m, state)  the next element is i, which is beyond the one before
//   O apply(code, state)

struct Codes {
  static constexpr GridKind grid = kDyadic;
  using O = int32_t;
  struct State {
    bool valid;
  };
  __device__ __forceinline__ State begin(const PackedEntry&, int m) const { return {m >= 0}; }
  __device__ __forceinline__ void seek(int64_t, const PackedEntry&, int, State&) const {}
  __device__ __forceinline__ O apply(uint32_t code, const State& s) const {
    return s.valid ? static_cast<O>(code) : kInvalid;
  }
};

template <class A, class Out>
struct Values {
  using O = Out;
  struct State {
    Quantizer<A> p;
    int64_t end;  // of the elements that have its scale
  };
  GridKind grid;
  bool is_signed;

  __device__ __forceinline__ Quantizer<A> quantizer(const PackedEntry& e, int64_t row, int m) const {
    const int n = grid == kSign && m > 0 ? m - 1 : m;  // the first bit is the sign
    return make_quantizer<A>(static_cast<const A*>(e.scale)[row], n, 0, grid, is_signed);
  }
  __device__ __forceinline__ State begin(const PackedEntry& e, int m) const { return {quantizer(e, 0, m), e.inner}; }
  __device__ __forceinline__ void seek(int64_t i, const PackedEntry& e, int m, State& s) const {
    if (i < s.end || i >= e.numel) return;
    const int64_t row = divide(i, e.inner);
    s = {quantizer(e, row, m), (row + 1) * e.inner};
  }
  __device__ __forceinline__ O apply(uint32_t code, const State& s) const {
    return Narrow<O>::from(level(code_of_stored(static_cast<A>(code), s.p), s.p) * s.p.step);
  }
};

// Writes kCount elements in a row, from element i on.
template <class Op, int kCount>
__device__ __forceinline__ void write(const Op& op, typename Op::State& state, const uint32_t (&code)[kCount],
                                      int64_t i, const PackedEntry& entry, int m, bool wide) {
  using O = typename Op::O;
  Pack<O, kCount> values;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    op.seek(i + j, entry, m, state);
    values.v[j] = op.apply(code[j], state);
  }
  O* out = static_cast<O*>(entry.to) + i;
  if (wide) {
    store_pack(out, values);
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      if (i + j < entry.numel) out[j] = values.v[j];
  }
}

template <bool kDenseLayout, class Op, int N>
__global__ void __launch_bounds__(kThreads, 2)
    unpack_kernel(const __grid_constant__ PackedTable<N> table, const int32_t* bits, const __grid_constant__ Op op) {
  using O = typename Op::O;
  __shared__ uint4 staged[kWarpsPerBlock][kMaxBits * kChunks];
  const Item item = item_of(table);
  if (item.begin >= item.end) return;  // whole warps
  const PackedEntry& entry = table.entry[item.which];
  const uint8_t* in = static_cast<const uint8_t*>(entry.from);
  const int n = entry.stored, lane = item.lane;
  const int asked = static_cast<int>(code_bits(bits[table.base + item.which], op.grid));
  const bool odd = lane & 1, valid = asked >= 0 && asked <= n;
  const int m = valid ? asked : 0, rows = kDenseLayout ? n : m;
  const int64_t stride = plane_bytes(entry.numel), total = (entry.numel * n + 7) / 8;
  uint4* chunk = staged[threadIdx.x / kWarp];
  uint8_t* bytes = reinterpret_cast<uint8_t*>(chunk);
  typename Op::State state = op.begin(entry, valid ? m : -1);

  for (int64_t tile = item.begin; tile < item.end; tile += kTile) {
    const uint8_t* tile_in = in + tile / 8 * (kDenseLayout ? n : 1);
    if (aligned(in) && (!kDenseLayout || tile + kTile <= entry.numel)) {
      uint4 word[kMaxBits * kChunks / kWarp];
#pragma unroll
      for (int k = 0; k < kMaxBits * kChunks / kWarp; ++k) {
        const int c = k * kWarp + lane;
        const int64_t at = kDenseLayout ? 16 * c : c / kChunks * stride + c % kChunks * 16;
        if (c < rows * kChunks && (kDenseLayout || tile / 8 + c % kChunks * 16 < stride))
          word[k] = load_pack<uint4>(tile_in + at);
      }
#pragma unroll
      for (int k = 0; k < kMaxBits * kChunks / kWarp; ++k)
        if (k * kWarp + lane < rows * kChunks) chunk[k * kWarp + lane] = word[k];
    } else {
#pragma unroll 1
      for (int i = lane; i < rows * kTileBytes; i += kWarp) {
        const int64_t at = kDenseLayout ? i : i / kTileBytes * stride + i % kTileBytes;
        const bool there = kDenseLayout ? tile_in - in + i < total : tile / 8 + i % kTileBytes < stride;
        bytes[i] = there ? tile_in[at] : 0;
      }
    }
    __syncwarp();
    const bool wide = tile + kTile <= entry.numel && aligned(entry.to);
#pragma unroll 1
    for (int g = 0; g < kGroups; g += 2) {
      const int place = (g + odd) * (kGroup / kOctet) + lane / 2;
      Bytes b = {0, 0};
      uint32_t octet[kOctet];
      if constexpr (kDenseLayout) {
        for (int p = n - 1; p >= 0; --p) push_byte(b, bytes[place * n + p]);
        codes_of_dense(b, n, octet);
#pragma unroll
        for (int i = 0; i < kOctet; ++i) octet[i] >>= n - m;
      } else {
        for (int p = 0; p < m; ++p) push_byte(b, bytes[p * kTileBytes + place]);
        codes_of_planes(b, m, octet);
      }
      if constexpr (sizeof(O) == 2) {
        write<Op, kOctet>(op, state, octet, tile + place * kOctet, entry, m, wide);
      } else {
        Four low, high, group[2];
#pragma unroll
        for (int i = 0; i < 4; ++i) low.v[i] = octet[i], high.v[i] = octet[4 + i];
        const Four got = exchange(low, high, odd);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          group[0].v[i] = odd ? got.v[i] : low.v[i];
          group[1].v[i] = odd ? high.v[i] : got.v[i];
        }
        const int64_t at = tile + g * kGroup + 4 * lane;
        write<Op, 4>(op, state, group[0].v, at, entry, m, wide);
        write<Op, 4>(op, state, group[1].v, at + kGroup, entry, m, wide);
      }
    }
    __syncwarp();
  }
}

// ------------------------------------------------------------------------------------------------------------ host

// Calls launch_table(on, table, blocks) for each part of the list that fits a table.
template <int N, class Launch>
void for_tables(const OnDevice& on, const std::vector<PackedEntry>& entries, int64_t segment,
                const Launch& launch_table) {
  for (size_t base = 0; base < entries.size(); base += N) {
    PackedTable<N> table;
    table.segment = segment;
    table.base = static_cast<int32_t>(base);
    table.count = static_cast<int32_t>(std::min<size_t>(N, entries.size() - base));
    int64_t items = 0;
    for (int i = 0; i < table.count; ++i) {
      table.entry[i] = entries[base + i];
      table.first_item[i] = items;
      items += (entries[base + i].numel + segment - 1) / segment;
    }
    table.first_item[table.count] = items;
    if (items > 0) launch_table(on, table, dim3(static_cast<unsigned>((items + kWarpsPerBlock - 1) / kWarpsPerBlock)));
  }
}

template <class Launch>
void for_tables(const Tensor& like, const std::vector<PackedEntry>& entries, const Launch& launch_table) {
  OnDevice on(like);
  int64_t elements = 0;
  for (const PackedEntry& e : entries) elements += e.numel;
  const int64_t segment = std::max<int64_t>(segment_rule(elements), kTile);
  if (entries.size() <= kSmallTable<PackedEntry>)
    for_tables<kSmallTable<PackedEntry>>(on, entries, segment, launch_table);
  else
    for_tables<kLargeTable<PackedEntry>>(on, entries, segment, launch_table);
}

Tensors pack(Tensors codes, std::vector<int64_t> bits, int64_t layout) {
  check_codes_to_pack(codes, bits, layout);
  Tensors in, out;
  std::vector<PackedEntry> entries;
  for (size_t i = 0; i < codes.size(); ++i) {
    in.push_back(torch::stable::contiguous(codes[i]));
    out.push_back(empty_packed(codes[i].numel(), bits[i], layout, codes[i]));
    entries.push_back({in[i].data_ptr(), out[i].data_ptr(), nullptr, bits[i] ? codes[i].numel() : 0, 0,
                       static_cast<int32_t>(bits[i])});
  }
  for_tables(codes[0], entries, [&](const OnDevice& on, const auto& table, dim3 blocks) {
    using T = std::decay_t<decltype(table)>;
    auto go = [&](auto dense) {
      launch(on, pack_kernel<decltype(dense)::value, sizeof(T::entry) / sizeof(PackedEntry)>, blocks, kThreads, table);
    };
    layout == kDense ? go(std::true_type()) : go(std::false_type());
  });
  return out;
}

template <class Op>
void unpack_into(const Tensor& like, const std::vector<PackedEntry>& entries, const Tensor& bits, int64_t layout,
                 Op op) {
  const int32_t* m = static_cast<const int32_t*>(bits.data_ptr());
  for_tables(like, entries, [&](const OnDevice& on, const auto& table, dim3 blocks) {
    using T = std::decay_t<decltype(table)>;
    auto go = [&](auto dense) {
      launch(on, unpack_kernel<decltype(dense)::value, Op, sizeof(T::entry) / sizeof(PackedEntry)>, blocks, kThreads,
             table, m, op);
    };
    layout == kDense ? go(std::true_type()) : go(std::false_type());
  });
}

// What is read of packed data and written to `out`.
std::vector<PackedEntry> make_entries(const PackedShapes& list, const Tensors& data, const Tensors& out) {
  std::vector<PackedEntry> entries;
  for (size_t i = 0; i < data.size(); ++i)
    entries.push_back({data[i].data_ptr(), out[i].data_ptr(), nullptr, list.numel[i], list.numel[i],
                       static_cast<int32_t>(list.stored[i])});
  return entries;
}

Tensors unpack(Tensors data, std::vector<int64_t> sizes, std::vector<int64_t> dims, std::vector<int64_t> stored,
               Tensor bits, int64_t layout) {
  const PackedShapes list(data, sizes, dims, stored, layout);
  const Tensor m = check_per_weight("bits", bits, list.size(), ScalarType::Int, data[0]);
  const Tensors out = list.empty_list(ScalarType::Int, data[0]);
  unpack_into(data[0], make_entries(list, data, out), m, layout, Codes{});
  return out;
}

Tensors decode_packed(Tensors data, std::vector<int64_t> sizes, std::vector<int64_t> dims, std::vector<int64_t> stored,
                      Tensors scale, Tensor bits, int64_t layout, int64_t grid_index, bool is_signed,
                      ScalarType dtype) {
  const GridKind grid = check_grid(grid_index, is_signed);
  const PackedShapes list(data, sizes, dims, stored, layout);
  check_float("dtype", dtype);
  const Tensor m = check_per_weight("bits", bits, list.size(), ScalarType::Int, data[0]);
  const bool is_double = list.check_scales(scale, data[0]) == ScalarType::Double;
  const Tensors out = list.empty_list(dtype, data[0]);
  std::vector<PackedEntry> entries = make_entries(list, data, out);
  for (size_t i = 0; i < entries.size(); ++i) {
    entries[i].scale = scale[i].data_ptr();
    if (scale[i].numel()) entries[i].inner = list.numel[i] / scale[i].numel();
  }
  with_float(dtype, [&](auto element) {
    using O = decltype(element);
    if (is_double)
      unpack_into(data[0], entries, m, layout, Values<double, O>{grid, is_signed});
    else
      unpack_into(data[0], entries, m, layout, Values<float, O>{grid, is_signed});
  });
  return out;
}

}  // namespace
}  // namespace quantops::cuda

QUANTOPS_REGISTER(QUANTOPS_KEY, m) {
  using namespace quantops::cuda;
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("decode_packed", TORCH_BOX(&decode_packed));
}
