// Family `truncate` on CUDA: the ops of quantops/library.py over lists of tensors, one launch each (two with the
// gradients of many scales). What happens to an element is in csrc/truncate_math.h; items, rows and words are those of
// table.cuh. Values on the GPU are never read back: what is out of range gives NaN.
//
// A lane takes the codes of its vectors into registers, from one read of w, and cuts and stores them width by width;
// backward it adds up the gradients of all widths in the same way. The number of widths is a number, not a type.
#include <tuple>

#include "../truncate_arguments.h"
#include "../truncate_math.h"
#include "table.cuh"

namespace quantops::cuda {
namespace {

struct CutEntry {
  const void* w;
  void* grad_w;  // null going forward
  const void* scale;
  const void* out_scale;
  void* grad_scale;  // these two are null where they are not wanted
  void* grad_out_scale;
  int64_t rows, inner;
};

// As Table, with `widths` more pointers for each entry: q going forward, gradients or null going backward.
template <int kEntries, int kPointers>
struct CutTable {
  static constexpr int kMostEntries = kEntries, kMostPointers = kPointers;
  int64_t segment;  // elements per item
  int32_t count;    // of entries
  int32_t base;     // the place in the whole list of entry 0
  int64_t first_item[kEntries + 1];
  CutEntry entry[kEntries];
  void* data[kPointers];
};

using SmallTable = CutTable<36, 156>;
#if CUDART_VERSION >= 12010
using LargeTable = CutTable<300, 1350>;  // the weights of ResNet-50 at 16 widths, or 300 at 4, are one launch
#else
using LargeTable = SmallTable;
#endif
static_assert(sizeof(SmallTable) <= 4096 - 192 && sizeof(LargeTable) <= 32764 - 192,
              "a table and 192 bytes of other arguments must fit the kernel parameters");

// What all tensors of a launch share.
struct Cut {
  const int32_t* bits;  // (widths, weights of the whole list)
  const int32_t* base_bits;
  int64_t weights;
  int32_t widths;
  Rule rule;
  bool tanh;
};

template <class A>
using WarpWidths = Width<A>[kMaxBits];

// The widths of a row, one by each lane, to memory of the warp. All lanes are there.
template <class A>
__device__ __forceinline__ void make_widths(const Cut& cut, const CutEntry& entry, int64_t row, int which, int lane,
                                            WarpWidths<A>& width) {
  if (lane < cut.widths)
    width[lane] = make_width<A>(static_cast<const A*>(entry.out_scale)[row], cut.bits[lane * cut.weights + which],
                                cut.base_bits[which]);
  __syncwarp();
}

template <class A>
__device__ __forceinline__ Quantizer<A> base_quantizer(const Cut& cut, const CutEntry& entry, int64_t row, int which) {
  return make_base_quantizer<A>(static_cast<const A*>(entry.scale)[row], cut.base_bits[which], cut.tanh);
}

// Calls many(first vector, count) for vectors of V elements that a lane takes U or one at a time, and single(place)
// for elements in front of and behind them. `bits`: all addresses at `head`, together.
template <int V, int U, class Many, class Single>
__device__ __forceinline__ void walk(int n, int head, uintptr_t bits, int lane, Many many, Single single) {
  const int vectors = head < n && (bits & 15) == 0 ? (n - head) / V : 0;
  int v = lane;
  for (; v + (U - 1) * kWarp < vectors; v += U * kWarp) many(head + v * V, std::integral_constant<int, U>());
  if constexpr (U > 1) {
#pragma unroll 1
    for (; v < vectors; v += kWarp) many(head + v * V, std::integral_constant<int, 1>());
  }
  const int whole = vectors * V;
  if (vectors == 0) head = n;
#pragma unroll 1
  for (int i = lane; i < n - whole; i += kWarp) single(i < head ? i : i + whole);
}

// Elements up to the first 16-byte boundary.
template <class X>
__device__ __forceinline__ int head_of(const X* x) {
  return static_cast<int>((-reinterpret_cast<uintptr_t>(x) & 15) / sizeof(X));
}

// --------------------------------------------------------------------------------------------------------- forward

template <class W, class O, class T>
__global__ void __launch_bounds__(kThreads, 2)
    truncate_kernel(const __grid_constant__ T table, const __grid_constant__ Cut cut) {
  using A = Acc<W>;
  constexpr int V = vector_elements<W, None, O>(), U = std::max(1, std::min(64 / (V * int(sizeof(W))), 16 / V));
  __shared__ WarpWidths<A> widths_of_warp[kWarpsPerBlock];

  const int64_t item = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (item >= table.first_item[table.count]) return;  // whole warps
  const int lane = threadIdx.x % kWarp;
  const Place at = place_of(table, item);
  const CutEntry& entry = table.entry[at.which];
  WarpWidths<A>& width = widths_of_warp[threadIdx.x / kWarp];
  make_widths(cut, entry, at.row, table.base + at.which, lane, width);
  const Quantizer<A> p = base_quantizer<A>(cut, entry, at.row, table.base + at.which);

  const W* x = static_cast<const W*>(entry.w) + at.begin;
  auto out = [&](int j) { return static_cast<O*>(table.data[at.which * cut.widths + j]) + at.begin; };
  const int head = head_of(x);
  uintptr_t bits = 0;
  for (int j = 0; j < cut.widths; ++j) bits |= reinterpret_cast<uintptr_t>(out(j) + head);

  walk<V, U>(
      at.n, head, bits, lane,
      [&](int i, auto count) {
        constexpr int K = decltype(count)::value;
        Pack<W, V> xs[K];
        A c[K][V];
#pragma unroll
        for (int k = 0; k < K; ++k) xs[k] = load_pack<Pack<W, V>>(x + i + k * kWarp * V);
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
          for (int e = 0; e < V; ++e) c[k][e] = widen(xs[k].v[e]);
        if (cut.tanh) {
#pragma unroll
          for (int k = 0; k < K; ++k)
#pragma unroll
            for (int e = 0; e < V; ++e) c[k][e] = tanh_of(c[k][e]);
        }
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
          for (int e = 0; e < V; ++e) c[k][e] = base_code(c[k][e], cut.rule, p);
#pragma unroll 1
        for (int j = 0; j < cut.widths; ++j) {
          const Width<A> to = width[j];
          O* q = out(j) + i;
#pragma unroll
          for (int k = 0; k < K; ++k) {
            Pack<O, V> os;
#pragma unroll
            for (int e = 0; e < V; ++e) os.v[e] = Narrow<O>::from(odd_level(c[k][e], to) * to.step);
            store_pack(q + k * kWarp * V, os);
          }
        }
      },
      [&](int i) {
        A c = widen(x[i]);
        if (cut.tanh) c = tanh_of(c);
        c = base_code(c, cut.rule, p);
#pragma unroll 1
        for (int j = 0; j < cut.widths; ++j) out(j)[i] = Narrow<O>::from(odd_level(c, width[j]) * width[j].step);
      });
}

// -------------------------------------------------------------------------------------------------------- backward

// What is wanted: the sum of the gradients alone, without w; times inside and the slope of tanh; and the sums for
// scales.
enum { kCovered, kInside, kScales };

// The sums of an item, or of a scale: of g * q / out_scale, and of g * (x/s) * inside.
struct Sums {
  double level, inner;
};
struct AddSums {
  __device__ __forceinline__ Sums operator()(const Sums& a, const Sums& b) const {
    return {a.level + b.level, a.inner + b.inner};
  }
};

// dL/ds and dL/d out_scale of each row.
template <class A>
struct ScaleSums : SumOp<Sums, AddSums, true> {
  __device__ void write(const CutEntry& e, int64_t row, int, const Sums& s) const {
    static_cast<A*>(e.grad_scale)[row] = static_cast<A>(e.grad_out_scale ? -s.inner : s.level - s.inner);
    if (e.grad_out_scale) static_cast<A*>(e.grad_out_scale)[row] = static_cast<A>(s.level);
  }
};

template <class W, class G, int kKind, class T>
__device__ __forceinline__ void backward_item(const T& table, const Cut& cut, const ScaleSums<Acc<W>>& scales,
                                              int64_t item) {
  using A = Acc<W>;
  constexpr int V = vector_elements<W, G, W>();
  constexpr int U = std::max(1, std::min((kKind == kScales ? 32 : 64) / (V * int(sizeof(G))), 16 / V));
  __shared__ WarpWidths<A> widths_of_warp[kWarpsPerBlock];

  const int lane = threadIdx.x % kWarp;
  const Place at = place_of(table, item);
  const CutEntry& entry = table.entry[at.which];
  auto grad = [&](int j) { return static_cast<const G*>(table.data[at.which * cut.widths + j]); };

  WarpWidths<A>& width = widths_of_warp[threadIdx.x / kWarp];
  Quantizer<A> p;
  bool valid = true, used = false;  // of the widths whose gradients are there
  if constexpr (kKind != kCovered) {
    make_widths(cut, entry, at.row, table.base + at.which, lane, width);
    p = base_quantizer<A>(cut, entry, at.row, table.base + at.which);
  }
  W* out = static_cast<W*>(entry.grad_w) + at.begin;
  const W* x = kKind == kCovered ? out : static_cast<const W*>(entry.w) + at.begin;
  const int head = head_of(x);
  uintptr_t bits = reinterpret_cast<uintptr_t>(out + head);
  for (int j = 0; j < cut.widths; ++j) {
    if (!grad(j)) continue;
    bits |= reinterpret_cast<uintptr_t>(grad(j) + at.begin + head);
    used = true;
    if constexpr (kKind != kCovered) valid = valid && p.valid && width[j].step == width[j].step;
  }
  const A nothing = used ? A(-0.0) : A(0);  // what a sum starts from: -0 + g is g, -0 too
  Sums sums = {0.0, 0.0};

  auto finish = [&](A w, A total, [[maybe_unused]] A& inner) {
    if constexpr (kKind == kCovered) {
      return Narrow<W>::from(total);
    } else {
      const A t = cut.tanh ? tanh_of(w) : w;
      if constexpr (kKind == kScales) inner = product_plus(total, inner_term(w, t, p), inner);
      A v = cut.tanh ? total * tanh_slope(t) : total;
      v = inside(w, p) ? v : A(0);
      return Narrow<W>::from(valid ? v : quiet_nan<A>());
    }
  };
  auto code_of = [&](A w) { return base_code(cut.tanh ? tanh_of(w) : w, cut.rule, p); };

  walk<V, U>(
      at.n, head, bits, lane,
      [&](int i, auto count) {
        constexpr int K = decltype(count)::value;
        Pack<W, V> xs[K];
        A total[K][V];
        [[maybe_unused]] A c[kKind == kScales ? K : 1][V];
        if constexpr (kKind != kCovered) {
#pragma unroll
          for (int k = 0; k < K; ++k) xs[k] = load_pack<Pack<W, V>>(x + i + k * kWarp * V);
        }
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
          for (int e = 0; e < V; ++e) {
            total[k][e] = nothing;
            if constexpr (kKind == kScales) c[k][e] = code_of(widen(xs[k].v[e]));
          }
#pragma unroll 1
        for (int j = 0; j < cut.widths; ++j) {
          const G* g = grad(j);
          if (!g) continue;
          g += at.begin + i;
          Pack<G, V> gs[K];
#pragma unroll
          for (int k = 0; k < K; ++k) gs[k] = load_pack<Pack<G, V>>(g + k * kWarp * V);
#pragma unroll
          for (int k = 0; k < K; ++k) {
            [[maybe_unused]] A level = A(0);  // of a vector, so that it is converted once
#pragma unroll
            for (int e = 0; e < V; ++e) {
              const A v = static_cast<A>(widen(gs[k].v[e]));
              total[k][e] = total[k][e] + v;
              if constexpr (kKind == kScales)
                level = product_plus(v, odd_level(c[k][e], width[j]) * width[j].unit_step, level);
            }
            if constexpr (kKind == kScales) sums.level += static_cast<double>(level);
          }
        }
#pragma unroll
        for (int k = 0; k < K; ++k) {
          Pack<W, V> os;
          A inner = A(0);  // of a vector
#pragma unroll
          for (int e = 0; e < V; ++e)
            os.v[e] = finish(kKind == kCovered ? A(0) : static_cast<A>(widen(xs[k].v[e])), total[k][e], inner);
          if constexpr (kKind == kScales) sums.inner += static_cast<double>(inner);
          store_pack(out + i + k * kWarp * V, os);
        }
      },
      [&](int i) {
        A w = A(0), total = nothing;
        [[maybe_unused]] A c = A(0);
        if constexpr (kKind != kCovered) w = widen(x[i]);
        if constexpr (kKind == kScales) c = code_of(w);
#pragma unroll 1
        for (int j = 0; j < cut.widths; ++j) {
          if (!grad(j)) continue;
          const A v = static_cast<A>(widen(grad(j)[at.begin + i]));
          total = total + v;
          if constexpr (kKind == kScales)
            sums.level += static_cast<double>(v * (odd_level(c, width[j]) * width[j].unit_step));
        }
        A inner = A(0);
        out[i] = finish(w, total, inner);
        if constexpr (kKind == kScales) sums.inner += static_cast<double>(inner);
      });

  if constexpr (kKind == kScales) {
    if (!valid) sums = {quiet_nan<double>(), quiet_nan<double>()};
    leave_sum(table, scales, at, item, sums);
  }
}

template <class W, class G, int kKind, class T>
__global__ void __launch_bounds__(kThreads, 2)
    truncate_backward_kernel(const __grid_constant__ T table, const __grid_constant__ Cut cut,
                             const __grid_constant__ ScaleSums<Acc<W>> scales) {
  const int64_t item = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (item < table.first_item[table.count]) backward_item<W, G, kKind>(table, cut, scales, item);  // whole warps
  if constexpr (kKind == kScales) {
    if (scales.counter >= 0 && is_last_block(scales.counter)) finish_all(table, scales);
  }
}

// ------------------------------------------------------------------------------------------------------------ host

// The weights of a list and the widths that they are cut to, checked and in the shape that kernels take.
struct List {
  ScalarType dtype, acc;
  Tensors w;  // dense
  Tensor bits, base_bits;
  Cut cut;
  std::vector<CutEntry> entries;
  std::vector<void*> data;  // `widths` pointers for each entry

  List(const Tensors& weights, const Tensors& scale, const Tensors& out_scale, const Tensor& bits_,
       const Tensor& base_bits_, int64_t rule, bool tanh)
      : dtype(check_list("w", weights, kFloats)), acc(acc_type(dtype)) {
    check_rule(rule);
    const int64_t count = static_cast<int64_t>(weights.size()), widths = check_widths(bits_, weights);
    check_scales(scale, weights, acc);
    check_out_scales(out_scale, scale, weights, acc);
    bits = bits_.is_contiguous() ? bits_ : torch::stable::contiguous(bits_);
    base_bits = check_per_weight("base_bits", base_bits_, count, ScalarType::Int, weights[0]);
    cut = {static_cast<const int32_t*>(bits.data_ptr()),
           static_cast<const int32_t*>(base_bits.data_ptr()),
           count,
           static_cast<int32_t>(widths),
           static_cast<Rule>(rule),
           tanh};
    w = dense(weights);
    data.resize(count * widths, nullptr);
    for (int64_t i = 0; i < count; ++i) {
      const Rows r = rows_of(w[i], scale[i]);
      const Tensor& out = out_scale.empty() ? scale[i] : out_scale[i];
      entries.push_back(
          {w[i].data_ptr(), nullptr, scale[i].data_ptr(), out.data_ptr(), nullptr, nullptr, r.rows, r.inner});
    }
  }

  int64_t size() const { return static_cast<int64_t>(w.size()); }

  // Of width j of weight i, as the ops' lists have them.
  void*& place(int64_t at) { return data[at % size() * cut.widths + at / size()]; }
};

// Calls run(table, items) for the tables of a list.
template <class T, class Run>
void batches(const List& list, Run run) {
  const int64_t widths = list.cut.widths;
  const int64_t most = std::min<int64_t>(T::kMostEntries, T::kMostPointers / widths);
  int64_t elements = 0;
  for (const CutEntry& e : list.entries) elements += e.rows * e.inner;
  for (int64_t base = 0; base < list.size(); base += most) {
    T table;
    table.segment = segment_rule(elements);
    table.base = static_cast<int32_t>(base);
    table.count = static_cast<int32_t>(std::min(most, list.size() - base));
    int64_t items = 0;
    for (int i = 0; i < table.count; ++i) {
      const CutEntry& e = list.entries[base + i];
      table.entry[i] = e;
      table.first_item[i] = items;
      std::copy_n(list.data.begin() + (base + i) * widths, widths, table.data + i * widths);
      items += e.rows * ((e.inner + table.segment - 1) / table.segment);
    }
    table.first_item[table.count] = items;
    QUANTOPS_CHECK(items <= int64_t(INT32_MAX) * kWarpsPerBlock, "w: expected at most 2^34 runs of one scale, got ",
                   items);
    run(table, items);
  }
}

template <class Run>
void with_tables(const List& list, Run run) {
  if (list.size() <= std::min<int64_t>(SmallTable::kMostEntries, SmallTable::kMostPointers / list.cut.widths))
    batches<SmallTable>(list, run);
  else
    batches<LargeTable>(list, run);
}

dim3 blocks_of(int64_t items) { return dim3(static_cast<unsigned>((items + kWarpsPerBlock - 1) / kWarpsPerBlock)); }

Tensors truncate(Tensors w, Tensors scale, std::optional<Tensors> out_scale, Tensor bits, Tensor base_bits,
                 int64_t rule, bool tanh, bool /*covered*/, bool /*exact*/, ScalarType dtype) {
  check_float("dtype", dtype);
  List list(w, scale, out_scale.value_or(Tensors{}), bits, base_bits, rule, tanh);
  Tensors q;
  for (int64_t i = 0; i < list.size() * list.cut.widths; ++i) {
    q.push_back(empty_like(list.w[i % list.size()], dtype));
    list.place(i) = q[i].data_ptr();
  }
  OnDevice on(list.w[0]);
  with_float(list.dtype, [&](auto element) {
    with_float(dtype, [&](auto out) {
      with_tables(list, [&](const auto& table, int64_t items) {
        using T = std::decay_t<decltype(table)>;
        if (items > 0)
          launch(on, truncate_kernel<decltype(element), decltype(out), T>, blocks_of(items), kThreads, table, list.cut);
      });
    });
  });
  return q;
}

template <class W, class G, int kKind>
void backward_into(const List& list) {
  OnDevice on(list.w[0]);
  with_tables(list, [&](const auto& table, int64_t items) {
    using T = std::decay_t<decltype(table)>;
    const auto launch_items = [&](const ScaleSums<Acc<W>>& scales) {
      if (items > 0)
        launch(on, truncate_backward_kernel<W, G, kKind, T>, blocks_of(items), kThreads, table, list.cut, scales);
    };
    if (kKind == kScales)
      launch_with_sums(on, list.w[0], table, items, ScaleSums<Acc<W>>{}, launch_items);
    else
      launch_items({});
  });
}

std::tuple<Tensors, Tensors, Tensors> truncate_backward(Tensors grads, Tensors w, Tensors scale, Tensors out_scale,
                                                        Tensor bits, Tensor base_bits, int64_t rule, bool tanh,
                                                        bool covered, bool scale_grad) {
  List list(w, scale, out_scale, bits, base_bits, rule, tanh);
  ScalarType grad_dtype = check_gradients(grads, list.w, list.cut.widths);
  const bool as_is = reads_grad(list.dtype, grad_dtype);
  if (!as_is) grad_dtype = list.acc;
  Tensors laid_out;  // kept alive
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor& like = list.w[i % w.size()];
    if (!is_used(grads[i], like)) continue;
    laid_out.push_back(in_layout_of(as_is ? grads[i] : torch::stable::to(grads[i], grad_dtype), like));
    list.place(static_cast<int64_t>(i)) = laid_out.back().data_ptr();
  }
  Tensors grad_w = empty_like(list.w, list.dtype), grad_scale, grad_out_scale;
  for (size_t i = 0; i < w.size(); ++i) {
    list.entries[i].grad_w = grad_w[i].data_ptr();
    if (!scale_grad) continue;
    grad_scale.push_back(empty_like(scale[i], list.acc));
    list.entries[i].grad_scale = grad_scale[i].data_ptr();
    if (out_scale.empty()) continue;
    grad_out_scale.push_back(empty_like(out_scale[i], list.acc));
    list.entries[i].grad_out_scale = grad_out_scale[i].data_ptr();
  }
  with_float(list.dtype, [&](auto element) {
    using W = decltype(element);
    with_grad<W>(grad_dtype, [&](auto grad_element) {
      using G = decltype(grad_element);
      if (scale_grad)
        backward_into<W, G, kScales>(list);
      else if (covered && !tanh)
        backward_into<W, G, kCovered>(list);
      else
        backward_into<W, G, kInside>(list);
    });
  });
  return {grad_w, grad_scale, grad_out_scale};
}

}  // namespace
}  // namespace quantops::cuda

QUANTOPS_REGISTER(QUANTOPS_KEY, m) {
  m.impl("truncate", TORCH_BOX(&quantops::cuda::truncate));
  m.impl("truncate_backward", TORCH_BOX(&quantops::cuda::truncate_backward));
}
