// One launch over a list of tensors: the table that describes the list, the kernel that walks it, and the reductions.
//
// The unit of scheduling is an item: one warp on a run of at most `segment` elements that share one scale. A tensor is
// `rows` rows of `inner` elements with a scale each (one row where it has one scale), and a row is cut into segments.
// So a warp builds its quantizer once, the items of all tensors of a list form one index range, and any mix of sizes
// fills the GPU. An item that has all of a sum writes it; else partial sums go to scratch memory at the item's place,
// and the last block of the launch, or a second one where there are many, adds them up in a fixed order. No float
// atomics, hence the same bits every time.
//
// The table is a kernel parameter: no copy to the device, nothing to keep alive, safe in CUDA graphs. Parameters hold
// 4 KB, and 32 KB since CUDA 12.1: 60 and 500 tensors of Entry. A list of more takes ceil(length / kLargeTable)
// launches.
#pragma once
#include <algorithm>
#include <type_traits>

#include "../quant_math.h"
#include "elements.cuh"
#include "launch.cuh"
#include "sums.cuh"
#include "switches.cuh"

namespace quantops::cuda {

struct Entry {
  const void* w;     // the tensor that is read
  const void* grad;  // a second one, or null
  void* out;         // written element by element, or null
  const void* scale;
  void* result;  // written once per scale, or null
  int64_t rows, inner;
};

// E: Entry, or what a family makes of it.
template <int kCapacity, class E = Entry>
struct Table {
  int64_t segment;  // elements per item
  int32_t count;    // of entries
  int32_t base;     // the place in the whole list of entry 0
  int64_t first_item[kCapacity + 1];
  E entry[kCapacity];
};

template <class E>
constexpr int kSmallTable = (60 * 64) / (sizeof(E) + 8);  // 4 KB: of Entry 60, the weights of ResNet-50 or DeiT-S
#if CUDART_VERSION >= 12010
template <class E>
constexpr int kLargeTable = (500 * 64) / (sizeof(E) + 8);  // 32 KB
#else
template <class E>
constexpr int kLargeTable = kSmallTable<E>;
#endif
static_assert(sizeof(Table<kSmallTable<Entry>>) <= 4096 - 192 && sizeof(Table<kLargeTable<Entry>>) <= 32764 - 192,
              "a table and 192 bytes of other arguments must fit the kernel parameters");

// ----------------------------------------------------------------------------------------------------------------- ops

// Vectors that a lane loads before it needs the first of them: 64 bytes, and no more elements than registers allow.
template <class Op>
constexpr int loads_in_flight() {
  constexpr int elements = vector_elements<typename Op::X, typename Op::G, typename Op::O>();
  constexpr int bytes = elements * (size_of<typename Op::X> + size_of<typename Op::G>);
  return std::max(1, std::min(Op::kBytesInFlight / bytes, kElementsInFlight / elements));
}

// What every Op has.
struct OpBase {
  using E = Entry;
  static constexpr int kBytesInFlight = 64;  // of loads, per lane
  static constexpr bool kIndexed = false;    // where true, State has the place of the element in its tensor, `index`
  static constexpr int kBlocks = 2;          // at least that many on a multiprocessor: 128 registers
  static constexpr int64_t kItems = 0;       // of a list, in the finer segments of reductions; 0: see segment_rule
  static constexpr bool kRolled = false;     // where true, `apply` is long: its code stands once, in a loop
  static constexpr bool kSums = false;       // see SumOp
  static constexpr bool kLastBlock = true;   // whether the last block may add up sums, which takes shared memory

  template <class State, class X, int kCount>
  __device__ __forceinline__ void flush(State&, const X (&)[kCount]) const {}
  template <class State>
  __device__ __forceinline__ void end(State&, int64_t, int) const {}
};

// An Op that also combines numbers over each group of elements: those of a scale (kScales), or of a tensor.
//   P total(state)                 of a lane; P() is neutral
//   void write(entry, row, which, P)  the results of a group from its total, by one thread
template <class P, class C, bool kScales>
struct SumOp : OpBase {
  static constexpr bool kSums = true, kPerScale = kScales;
  using Partial = P;
  using Combine = C;
  P* partial = nullptr;  // of each item that does not have a group for itself
  int counter = -1;      // of blocks, where the last one adds up; else a launch of sums_kernel does
};

// A vector of each thread of a block, in shared memory, which unlike registers is indexed at run time.
template <class T, int kCount>
struct Staged {
  T v[kCount][kThreads];
};
template <int kCount>
struct Staged<None, kCount> {};

// ----------------------------------------------------------------------------------------------------------- items

template <class AnyTable>
__device__ __forceinline__ int find_entry(const AnyTable& table, int64_t item) {
  int low = 0, high = table.count;  // first_item[low] <= item < first_item[high]; passes over empty tensors
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (table.first_item[middle] <= item)
      low = middle;
    else
      high = middle;
  }
  return low;
}

__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);  // several times faster
  return a / b;
}

__device__ __forceinline__ int64_t segments_of(int64_t inner, int64_t segment) {
  return inner <= segment ? (inner > 0) : divide(inner + segment - 1, segment);
}

// Where an item lies: a run of n elements of row `row` of entry `which`, from element `begin` of the tensor on.
struct Place {
  int which, n;
  int64_t row, begin;
};

template <class T>
__device__ __forceinline__ Place place_of(const T& table, int64_t item) {
  const int which = find_entry(table, item);
  const auto& entry = table.entry[which];
  const int64_t local = item - table.first_item[which];
  int64_t row = 0, part = local;
  if (entry.rows > 1) {
    const int64_t segments = segments_of(entry.inner, table.segment);
    row = divide(local, segments);
    part = local - row * segments;
  }
  const int64_t left = entry.inner - part * table.segment;
  return {which, static_cast<int>(left < table.segment ? left : table.segment), row,
          row * entry.inner + part * table.segment};
}

// ------------------------------------------------------------------------------------------------------------ sums

// Groups of an entry whose items are to be added up: of one item each has written its own, of none nobody has.
template <class Op, class E>
QUANTOPS_INLINE int64_t open_groups(const E& entry, int64_t segment) {
  const int64_t groups = Op::kPerScale ? entry.rows : 1;
  return entry.inner > 0 && entry.inner <= segment && groups == entry.rows ? 0 : groups;
}

// What an item's lanes have for the sums of their group: to its results where there is no other item, else to scratch
// memory. All lanes of the warp are there.
template <class Op, class T>
__device__ __forceinline__ void leave_sum(const T& table, const Op& op, const Place& place, int64_t item,
                                          typename Op::Partial of_lane) {
  const typename Op::Partial sum = warp_reduce<typename Op::Combine>(of_lane);
  if (threadIdx.x % kWarp != 0) return;
  const auto& entry = table.entry[place.which];
  if (open_groups<Op>(entry, table.segment) == 0)
    op.write(entry, place.row, table.base + place.which, sum);
  else
    op.partial[item] = sum;
}

// Adds up the items of open group `group` of the table, by a warp or by the block, and writes its results.
template <class Op, class T>
__device__ __forceinline__ void finish_group(const T& table, const Op& op, int64_t group, bool by_block) {
  int which = 0;
  for (int64_t open; group >= (open = open_groups<Op>(table.entry[which], table.segment)); ++which) group -= open;
  const auto& entry = table.entry[which];
  const int64_t items =
      Op::kPerScale ? segments_of(entry.inner, table.segment) : table.first_item[which + 1] - table.first_item[which];
  const auto* partial = op.partial + table.first_item[which] + group * items;
  const int rank = by_block ? threadIdx.x : threadIdx.x % kWarp, team = by_block ? blockDim.x : kWarp;
  typename Op::Combine combine;
  typename Op::Partial sum{};
  constexpr int kInFlight = 4;  // a thread asks for so many at a time, whether there are as many or not
#pragma unroll 1
  for (int64_t i = rank; i < items; i += kInFlight * team) {
    typename Op::Partial some[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      some[j] = typename Op::Partial();
      if (i + j * team < items) some[j] = partial[i + j * team];
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) sum = combine(sum, some[j]);
  }
  sum = by_block ? block_reduce<typename Op::Combine>(sum) : warp_reduce<typename Op::Combine>(sum);
  if (rank == 0) op.write(entry, group, table.base + which, sum);
}

// All open groups of a table, by one block.
template <class Op, class T>
__device__ __forceinline__ void finish_all(const T& table, const Op& op) {
  int64_t groups = 0;
  for (int i = 0; i < table.count; ++i) groups += open_groups<Op>(table.entry[i], table.segment);
  const bool by_block = groups < kWarpsPerBlock;
#pragma unroll 1
  for (int64_t group = by_block ? 0 : threadIdx.x / kWarp; group < groups; group += by_block ? 1 : kWarpsPerBlock)
    finish_group(table, op, group, by_block);
}

// A warp, or a block, for each open group.
constexpr int kFinishThreads = 1024;
template <class Op, class T>
__global__ void __launch_bounds__(kFinishThreads)
    sums_kernel(const __grid_constant__ T table, const __grid_constant__ Op op, int64_t groups, bool by_block) {
  wait_for_launch_before();
  const int64_t group = by_block ? blockIdx.x : (int64_t(blockIdx.x) * kFinishThreads + threadIdx.x) / kWarp;
  if (group < groups) finish_group(table, op, group, by_block);  // whole warps
}

// ----------------------------------------------------------------------------------------------------------- kernel

// An item is the work of one warp. Op says what happens to an element:
//   X, G, O                        types of w, of a second tensor read (or None), of the tensor written (or None)
//   State begin(entry, row, which) what a lane keeps: the quantizer of the scale `row` of tensor `which`, and its sums
//   O apply(x, g, state)           one element
//   void flush(state, elements)    after each vector, and each element that is not in one
//   void end(state, item, lane)    after all of them; all lanes of the warp are there
template <class Op, class T>
__device__ __forceinline__ void run_item(const T& table, const Op& op, int64_t item) {
  using X = typename Op::X;
  using G = typename Op::G;
  using O = typename Op::O;
  constexpr bool kHasG = !std::is_same_v<G, None>, kHasO = !std::is_same_v<O, None>;
  constexpr int V = vector_elements<X, G, O>(), U = loads_in_flight<Op>();

  const int lane = threadIdx.x % kWarp;
  const Place place = place_of(table, item);
  const auto& entry = table.entry[place.which];
  const int n = place.n;

  // `head` elements up to the first 16-byte boundary of w, where the pointers point, then whole vectors where the other
  // tensors are aligned there too, then the rest. Head and rest, or everything, go element by element.
  const X* x = static_cast<const X*>(entry.w) + place.begin;
  const int head = static_cast<int>((-reinterpret_cast<uintptr_t>(x) & 15) / sizeof(X));
  const int64_t begin = place.begin + head;
  x += head;
  const G* g = nullptr;
  O* out = nullptr;
  uintptr_t bits = 0;
  if constexpr (kHasG) {
    g = entry.grad ? static_cast<const G*>(entry.grad) + begin : nullptr;
    bits |= reinterpret_cast<uintptr_t>(g);
  }
  if constexpr (kHasO) {
    out = static_cast<O*>(entry.out) + begin;
    bits |= reinterpret_cast<uintptr_t>(out);
  }
  const int vectors = head < n && (bits & 15) == 0 ? (n - head) / V : 0;

  using RawX = Raw<Pack<X, V>>;
  using RawG = std::conditional_t<kHasG, Raw<Pack<G, V>>, None>;
  auto load_x = [&](int v) { return load_raw<Pack<X, V>>(x + v * V); };
  auto load_g = [&](int v) {
    RawG words{};
    if constexpr (kHasG) {
      if (g) words = load_raw<Pack<G, V>>(g + v * V);
    }
    return words;
  };
  int v = lane;
  RawX xs[U];
  RawG gs[U];
  auto load = [&] {  // the next U vectors; whether there are so many
    if (v + (U - 1) * kWarp >= vectors) return false;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      xs[u] = load_x(v + u * kWarp);
      gs[u] = load_g(v + u * kWarp);
    }
    return true;
  };
  bool more = kEarlyLoads && load();
  typename Op::State state = op.begin(entry, place.row, table.base + place.which);
  if constexpr (!kEarlyLoads) more = load();

  auto apply_pack = [&](int v, [[maybe_unused]] O* to, const RawX& of_xs, [[maybe_unused]] const RawG& of_gs) {
    const Pack<X, V> xs = elements_of<Pack<X, V>>(of_xs);
    Pack<G, V> gs;
    if constexpr (kHasG) gs = elements_of<Pack<G, V>>(of_gs);
    Pack<O, V> os;
    if constexpr (Op::kRolled) {
      __shared__ Staged<X, V> of_x;
      __shared__ Staged<G, V> of_g;
      __shared__ Staged<std::conditional_t<std::is_same_v<O, X>, None, O>, V> of_out;
      const int thread = threadIdx.x;
      auto result = [&](int j) -> O& {
        if constexpr (std::is_same_v<O, X>)
          return of_x.v[j][thread];
        else
          return of_out.v[j][thread];
      };
#pragma unroll
      for (int j = 0; j < V; ++j) {
        of_x.v[j][thread] = xs.v[j];
        if constexpr (kHasG) of_g.v[j][thread] = gs.v[j];
      }
#pragma unroll 1
      for (int j = 0; j < V; ++j) {
        if constexpr (Op::kIndexed) state.index = begin + v * V + j;
        if constexpr (kHasG)
          result(j) = op.apply(of_x.v[j][thread], of_g.v[j][thread], state);
        else
          result(j) = op.apply(of_x.v[j][thread], None{}, state);
      }
#pragma unroll
      for (int j = 0; j < V; ++j) os.v[j] = result(j);
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if constexpr (Op::kIndexed) state.index = begin + v * V + j;
        if constexpr (kHasG && kHasO)
          os.v[j] = op.apply(xs.v[j], gs.v[j], state);
        else if constexpr (kHasO)
          os.v[j] = op.apply(xs.v[j], None{}, state);
        else
          op.apply(xs.v[j], None{}, state);
      }
    }
    op.flush(state, xs.v);
    if constexpr (kHasO) store_pack(to, os);
  };

  for (; more; more = load()) {
    O* const to = out + v * V;
#pragma unroll
    for (int u = 0; u < U; ++u) apply_pack(v + u * kWarp, to + u * kWarp * V, xs[u], gs[u]);
    v += U * kWarp;
  }
  if constexpr (U > 1) {
#pragma unroll 1
    for (; v < vectors; v += kWarp) apply_pack(v, out + v * V, load_x(v), load_g(v));
  }

  const int whole = vectors * V, single = n - whole;
#pragma unroll 1
  for (int i = lane; i < single; i += kWarp) {
    const int at = (i < head ? i : i + whole) - head;
    if constexpr (Op::kIndexed) state.index = begin + at;
    const X one[1] = {x[at]};
    if constexpr (kHasG && kHasO)
      out[at] = op.apply(one[0], g ? g[at] : G(), state);
    else if constexpr (kHasO)
      out[at] = op.apply(one[0], None{}, state);
    else
      op.apply(one[0], None{}, state);
    op.flush(state, one);
  }

  op.end(state, item, lane);
  if constexpr (Op::kSums) leave_sum(table, op, place, item, op.total(state));
}

template <class Op, int N>
__global__ void __launch_bounds__(kThreads, Op::kBlocks)
    items_kernel(const __grid_constant__ Table<N, typename Op::E> table, const __grid_constant__ Op op) {
  if constexpr (Op::kSums) let_next_launch();
  const int64_t item = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (item < table.first_item[table.count]) run_item(table, op, item);  // whole warps
  if constexpr (Op::kSums && Op::kLastBlock) {
    if (op.counter >= 0 && is_last_block(op.counter)) finish_all(table, op);
  }
}

// ------------------------------------------------------------------------------------------------------------ host

// Elements per item, see switches.cuh. By size alone, so that sums have the same shape on every GPU.
inline int64_t segment_rule(int64_t elements) {
  int64_t segment = kLeastSegment;
  while (segment < kLargestSegment && segment * kWantedItems < elements) segment *= 2;
  return segment;
}

// Finer, so that there are almost as many items as are wanted.
inline int64_t segment_of_reductions(int64_t elements, int64_t items) {
  int64_t segment = kLeastSegment;
  while (segment < kLargestSegment && segment * items < elements) segment += std::min(segment, int64_t(kReductionStep));
  return segment;
}

// f(table, its items) for the tables of a list.
template <int N, class E, class F>
void for_tables(const std::vector<E>& entries, int64_t segment, const F& f) {
  for (size_t base = 0; base < entries.size(); base += N) {
    Table<N, E> table;
    table.segment = segment;
    table.base = static_cast<int32_t>(base);
    table.count = static_cast<int32_t>(std::min<size_t>(N, entries.size() - base));
    int64_t items = 0;
    for (int i = 0; i < table.count; ++i) {
      const E& e = entries[base + i];
      table.entry[i] = e;
      table.first_item[i] = items;
      items += e.rows * ((e.inner + segment - 1) / segment);
    }
    table.first_item[table.count] = items;
    f(table, items);
  }
}

template <int64_t kItems = 0, class E, class F>
void for_tables(const std::vector<E>& entries, const F& f) {
  int64_t elements = 0;
  for (const E& e : entries) elements += e.rows * e.inner;
  const int64_t segment = kItems > 0 ? segment_of_reductions(elements, kItems) : segment_rule(elements);
  if (entries.size() <= kSmallTable<E>)
    for_tables<kSmallTable<E>>(entries, segment, f);
  else
    for_tables<kLargeTable<E>>(entries, segment, f);
}

template <class Op, int N, class E>
void launch_items(const OnDevice& on, const Table<N, E>& table, int64_t items, const Op& op) {
  const int64_t blocks = (items + kWarpsPerBlock - 1) / kWarpsPerBlock;
  QUANTOPS_CHECK(blocks <= INT32_MAX, "w: expected at most 2^34 runs of one scale, got ", items);
  if (items > 0) launch(on, items_kernel<Op, N>, dim3(static_cast<unsigned>(blocks)), kThreads, table, op);
}

// Has items(op) launch what leaves the sums of a table, and all of them added up.
template <class T, class Op, class Items>
void launch_with_sums(const OnDevice& on, const Tensor& like, const T& table, int64_t items, Op op,
                      const Items& launch_op) {
  int64_t groups = 0;
  for (int i = 0; i < table.count; ++i) groups += open_groups<Op>(table.entry[i], table.segment);
  Tensor scratch = like;
  if (groups > 0) {
    scratch = empty_vector(items * int64_t(sizeof(typename Op::Partial)), ScalarType::Byte, like);
    op.partial = static_cast<typename Op::Partial*>(scratch.data_ptr());
  }
  const bool in_last_block =
      Op::kLastBlock && groups > 0 && groups <= kLastBlockGroups && items > 0 && items <= kLastBlockItems;
  op.counter = in_last_block ? take_counter(on.stream) : -1;
  launch_op(op);
  if (groups == 0 || op.counter >= 0) return;
  const bool by_block = items > 2 * kWarp * groups;
  const int64_t blocks = by_block ? groups : (groups * kWarp + kFinishThreads - 1) / kFinishThreads;
  QUANTOPS_CHECK(blocks <= INT32_MAX, "scale: expected at most 2^35 of a list, got ", groups);
  launch_beside(on, sums_kernel<Op, T>, dim3(static_cast<unsigned>(blocks)), kFinishThreads, table, op, groups,
                by_block);
}

// Runs Op over the entries, with its sums where it has them.
template <class E, class Op>
void run(const Tensor& like, const std::vector<E>& entries, Op op) {
  OnDevice on(like);
  for_tables<Op::kItems>(entries, [&](const auto& table, int64_t items) {
    if constexpr (Op::kSums)
      launch_with_sums(on, like, table, items, op, [&](const Op& o) { launch_items(on, table, items, o); });
    else
      launch_items(on, table, items, op);
  });
}

// f(T{}) with the element type of a floating dtype.
template <class F>
void with_float(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::BFloat16:
      return f(__nv_bfloat16());
    case ScalarType::Half:
      return f(__half());
    case ScalarType::Double:
      return f(double());
    default:
      fail("dtype: expected a floating dtype, got ", dtype_name(dtype));
  }
}

// The dtypes in which a gradient is read as it comes, others are made float32 (float64) first; and the dtypes in which
// the kernels of family `categorical` write q.
inline bool reads_grad(ScalarType w, ScalarType g) {
  return g == w || g == acc_type(w) || (w == ScalarType::Float && g != ScalarType::Double);
}

template <class W, class F>
void with_grad(ScalarType dtype, F f) {
  if constexpr (std::is_same_v<W, double>) {
    if (dtype == ScalarType::Double) return f(double());
  } else {
    if (dtype == ScalarType::Float) return f(float());
    if constexpr (!std::is_same_v<W, __half>)
      if (dtype == ScalarType::BFloat16) return f(__nv_bfloat16());
    if constexpr (!std::is_same_v<W, __nv_bfloat16>)
      if (dtype == ScalarType::Half) return f(__half());
  }
  fail("grad: no kernel for dtype ", dtype_name(dtype));
}

}  // namespace quantops::cuda
