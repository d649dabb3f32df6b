// Family `categorical_activation` on CUDA: the ops of quantops/library.py on one tensor. Forward: one kernel. Backward:
// a small kernel for the table of factors, one for the elements, one that adds up their partial sums. What happens to
// an element is in csrc/categorical_activation_math.h. Values on the GPU are never read back: those out of range give
// NaN.
#include <tuple>

#include "../categorical_activation_math.h"
#include "one_tensor.cuh"

namespace quantops::cuda {
namespace {

// What the places depend on, as it lies on the GPU.
template <class A>
struct Widths {
  const A *alpha, *sigma;
  const int32_t* bits;

  __device__ __forceinline__ Levels levels() const {
    return make_levels(static_cast<const A*>(nullptr), -1, *bits, kMaxSoftBits, false);
  }
  __device__ __forceinline__ Bins<A> bins(const Levels& l) const { return make_bins(*alpha, *sigma, l); }
};

// Elements of a vector: whole bytes of quarters, which move as one number.
template <class X, class G, class O>
constexpr int kVector = std::max(kQuarters, vector_elements<X, G, O>());
template <int kCount>
using Quarters = std::conditional_t<kCount == 8, uint16_t, uint8_t>;

// ------------------------------------------------------------------------------------------------------------- forward

template <class X, class O>
__global__ void __launch_bounds__(kThreads, 2)
    categorical_activation_kernel(const X* x, O* q, uint8_t* quarters, const Extent extent,
                                  const Widths<Acc<X>> widths) {
  using A = Acc<X>;
  constexpr int V = kVector<X, None, O>;
  const int64_t begin = (int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp) * extent.segment;
  if (begin >= extent.numel) return;
  const int n = static_cast<int>(std::min(extent.segment, extent.numel - begin)), lane = threadIdx.x % kWarp;
  const Bins<A> p = widths.bins(widths.levels());
  x += begin;
  q += begin;
  quarters += begin / kQuarters;

  auto apply = [&](X from, O& to) {
    const A v = widen(from);
    to = Narrow<O>::from(p.alpha * nearest_class(v, p));
    return static_cast<uint32_t>(quarter_of(v, static_cast<A>(widen(to)), p, A(-2), A(1)));
  };
  const int vectors = extent.aligned ? n / V : 0;
  for_vectors<V>(lane, vectors, [&](int first, auto count) {
    constexpr int U = decltype(count)::value;
    Pack<X, V> xs[U];
#pragma unroll
    for (int u = 0; u < U; ++u) xs[u] = load_pack<Pack<X, V>>(x + (first + u * kWarp) * V);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      Pack<O, V> qs;
      uint32_t word = 0;
#pragma unroll
      for (int j = 0; j < V; ++j) word |= apply(xs[u].v[j], qs.v[j]) << 2 * j;
      store_pack(q + (first + u * kWarp) * V, qs);
      reinterpret_cast<Quarters<V>*>(quarters)[first + u * kWarp] = static_cast<Quarters<V>>(word);
    }
  });
#pragma unroll 1
  for (int i = vectors * V + lane * kQuarters; i < n; i += kWarp * kQuarters) {
    uint32_t byte = 0;
#pragma unroll 1
    for (int j = 0; j < kQuarters && i + j < n; ++j) byte |= apply(x[i + j], q[i + j]) << 2 * j;
    quarters[i / kQuarters] = static_cast<uint8_t>(byte);
  }
}

// ------------------------------------------------------------------------------------------------------------ backward

template <class A>
struct alignas(16) Row {
  A x, alpha, sigma, none;
};

template <class A>
__device__ __forceinline__ A gate_of(A i, const Bins<A>& p) {
  return i <= p.high && i >= p.low ? A(1) : A(0);
}

template <class A>
__device__ __forceinline__ Factors<A> soft_factors_at(A x, const Bins<A>& p, int reach) {
  const A c = nearest_class(x, p), z = offset_of(x, c, p), sharp = static_cast<A>(one_minus_exp(double(p.beta)));
  const A y = exponential(z - p.half), w = exponential(-z - p.half);
  SoftSums<A> sums = {soft_center(y, w).u, A(0)};
  A inner = A(1);
#pragma unroll 1
  for (int n = 1; n <= reach; ++n) {
    const A step = static_cast<A>(n), outer = exponential(-p.beta * step);
    add_pair(sums, soft_pair(y, w, inner, outer), step, gate_of(c + step, p), gate_of(c - step, p));
    inner = outer;
  }
  const A inv = A(1) / sums.weight, mean = sums.first * inv;
  A up, down;
  SoftSlopes<A> slopes = center_slopes(soft_center(y, w), A(1), mean, sharp, up);
  inner = A(1);
#pragma unroll 1
  for (int n = 1; n <= reach; ++n) {
    const A step = static_cast<A>(n), outer = exponential(-p.beta * step);
    add_slopes(slopes, soft_pair(y, w, inner, outer), step, mean, gate_of(c + step, p), gate_of(c - step, p), sharp, up,
               down);
    inner = outer;
  }
  return soft_factors(slopes, c, z, mean, inv, p);
}

// A thread per place.
constexpr int kTableThreads = 128;
template <class A>
__global__ void __launch_bounds__(kTableThreads) factors_kernel(Row<A>* table, const Widths<A> widths, bool soft) {
  const Levels levels = widths.levels();
  const Bins<A> p = widths.bins(levels);
  const int place = blockIdx.x * kTableThreads + threadIdx.x, count = places_of(levels);
  if (place >= count) return;
  const A x = middle_of(place, count, p.alpha);
  Factors<A> f = soft ? soft_factors_at(x, p, soft_reach(levels, static_cast<const A*>(nullptr), p.beta))
                      : winner_factors_at(x, p, make_one_interval(p));
  if (!(p.alpha == p.alpha)) f = {p.alpha, p.alpha, p.alpha};  // out of range
  table[place] = {f.x, f.alpha, f.sigma, A(0)};
}

struct Sums {
  double alpha, sigma;
};

// Q, G, O: of q, dL/dq and dL/dx. partial: of every item; not written without kSums.
template <class Q, class G, class O, bool kSums>
__global__ void __launch_bounds__(kThreads, 2)
    factor_kernel(const Q* q, const G* g, O* out, const uint8_t* quarters, const Row<Acc<O>>* table, Sums* partial,
                  const Extent extent, const Widths<Acc<O>> widths) {
  using A = Acc<O>;
  constexpr int V = kVector<Q, G, O>;
  __shared__ Row<A> rows[kMostPlaces];
  const Levels levels = widths.levels();
  const Bins<A> p = widths.bins(levels);
  const int count = places_of(levels);
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) rows[i] = table[i];
  __syncthreads();
  const int64_t item = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp, begin = item * extent.segment;
  if (begin >= extent.numel) return;  // whole warps
  const int n = static_cast<int>(std::min(extent.segment, extent.numel - begin)), lane = threadIdx.x % kWarp;
  q += begin;
  g += begin;
  out += begin;
  quarters += begin / kQuarters;

  double alpha = 0, sigma = 0;
  auto apply = [&](Q from, G gradient, uint32_t k, A& of_alpha, A& of_sigma) {
    const A v = static_cast<A>(widen(gradient));
    const Row<A> f = rows[static_cast<int>(place_of(static_cast<A>(widen(from)), static_cast<A>(k), p))];
    of_alpha += v * f.alpha;
    of_sigma += v * f.sigma;
    return Narrow<O>::from(v * f.x);
  };
  const int vectors = extent.aligned ? n / V : 0;
  for_vectors<V>(lane, vectors, [&](int first, auto loads) {
    constexpr int U = decltype(loads)::value;
    Pack<Q, V> qs[U];
    Pack<G, V> gs[U];
    uint32_t words[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      qs[u] = load_pack<Pack<Q, V>>(q + (first + u * kWarp) * V);
      gs[u] = load_pack<Pack<G, V>>(g + (first + u * kWarp) * V);
      words[u] = reinterpret_cast<const Quarters<V>*>(quarters)[first + u * kWarp];
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      Pack<O, V> os;
      A of_alpha = A(0), of_sigma = A(0);
#pragma unroll
      for (int j = 0; j < V; ++j) os.v[j] = apply(qs[u].v[j], gs[u].v[j], quarter_at(words[u], j), of_alpha, of_sigma);
      store_pack(out + (first + u * kWarp) * V, os);
      alpha += static_cast<double>(of_alpha);
      sigma += static_cast<double>(of_sigma);
    }
  });
#pragma unroll 1
  for (int i = vectors * V + lane; i < n; i += kWarp) {
    A of_alpha = A(0), of_sigma = A(0);
    out[i] = apply(q[i], g[i], quarter_at(quarters[i / kQuarters], i % kQuarters), of_alpha, of_sigma);
    alpha += static_cast<double>(of_alpha);
    sigma += static_cast<double>(of_sigma);
  }
  if constexpr (kSums) {
    alpha = warp_reduce<Add>(alpha);
    sigma = warp_reduce<Add>(sigma);
    if (lane == 0) partial[item] = {alpha, sigma};
  }
}

constexpr int kSumThreads = 512;
template <class A>
__global__ void __launch_bounds__(kSumThreads)
    sums_kernel(const Sums* partial, int64_t items, A* grad_alpha, A* grad_sigma) {
  double alpha = 0, sigma = 0;
  for (int64_t i = threadIdx.x; i < items; i += kSumThreads) {
    alpha += partial[i].alpha;
    sigma += partial[i].sigma;
  }
  alpha = block_reduce<Add>(alpha);
  sigma = block_reduce<Add>(sigma);
  if (threadIdx.x != 0) return;
  *grad_alpha = static_cast<A>(alpha);
  *grad_sigma = static_cast<A>(sigma);
}

// ----------------------------------------------------------------------------------------------------------- arguments

// alpha, sigma and bits, checked and kept alive.
struct Parameters {
  Tensors kept;

  Parameters(const Tensor& alpha, const Tensor& sigma, const Tensor& bits, int64_t grad_of, ScalarType acc,
             const Tensor& x) {
    QUANTOPS_CHECK(grad_of == kOfWinner || grad_of == kOfSoft, "grad_of: expected 0 or 1, got ", grad_of);
    kept = {check_per_weight("alpha", alpha, 1, acc, x), check_per_weight("sigma", sigma, 1, acc, x),
            check_per_weight("bits", bits, 1, ScalarType::Int, x)};
  }
  template <class A>
  Widths<A> widths() const {
    return {static_cast<const A*>(kept[0].data_ptr()), static_cast<const A*>(kept[1].data_ptr()),
            static_cast<const int32_t*>(kept[2].data_ptr())};
  }
};

std::tuple<Tensor, Tensor> categorical_activation(Tensor x, Tensor alpha, Tensor sigma, Tensor bits, int64_t grad_of,
                                                  ScalarType dtype) {
  check_float("dtype", dtype);
  const ScalarType from = check_list("x", {x}, kFloats);
  const Parameters parameters(alpha, sigma, bits, grad_of, acc_type(from), x);
  x = dense(x);
  Tensor q = empty_like(x, dtype), quarters = empty_vector(quarter_bytes(x.numel()), ScalarType::Byte, x);
  const Extent extent = extent_of({x, q, quarters});
  if (extent.numel == 0) return {q, quarters};
  OnDevice on(x);
  with_float(from, [&](auto element) {
    with_float(dtype, [&](auto result) {
      using X = decltype(element);
      using O = decltype(result);
      launch(on, categorical_activation_kernel<X, O>, extent.blocks(), kThreads, static_cast<const X*>(x.data_ptr()),
             static_cast<O*>(q.data_ptr()), static_cast<uint8_t*>(quarters.data_ptr()), extent,
             parameters.widths<Acc<X>>());
    });
  });
  return {q, quarters};
}

template <class Q, class G, class O>
void backward_into(const Tensor& q, const Tensor& g, const Tensor& quarters, const Parameters& parameters, bool soft,
                   const Tensor& grad_x, const Tensors& sums) {
  using A = Acc<O>;
  const Extent extent = extent_of({q, g, grad_x, quarters});
  const Widths<A> widths = parameters.widths<A>();
  OnDevice on(q);
  const Tensor table = empty_vector(int64_t(sizeof(Row<A>)) * kMostPlaces, ScalarType::Byte, q);
  const Tensor scratch = empty_vector(extent.items() * int64_t(sizeof(Sums)), ScalarType::Byte, q);
  Row<A>* rows = static_cast<Row<A>*>(table.data_ptr());
  Sums* partial = static_cast<Sums*>(scratch.data_ptr());
  if (extent.numel > 0) {
    launch(on, factors_kernel<A>, dim3(kMostPlaces / kTableThreads), kTableThreads, rows, widths, soft);
    auto run = [&](auto kernel) {
      launch(on, kernel, extent.blocks(), kThreads, static_cast<const Q*>(q.data_ptr()),
             static_cast<const G*>(g.data_ptr()), static_cast<O*>(grad_x.data_ptr()),
             static_cast<const uint8_t*>(quarters.data_ptr()), static_cast<const Row<A>*>(rows), partial, extent,
             widths);
    };
    if (sums.empty())
      run(factor_kernel<Q, G, O, false>);
    else
      run(factor_kernel<Q, G, O, true>);
  }
  if (!sums.empty())
    launch(on, sums_kernel<A>, dim3(1), kSumThreads, static_cast<const Sums*>(partial), extent.items(),
           static_cast<A*>(sums[0].data_ptr()), static_cast<A*>(sums[1].data_ptr()));
}

std::tuple<Tensor, Tensors> categorical_activation_backward(Tensor grad, Tensor q, Tensor quarters, Tensor alpha,
                                                            Tensor sigma, Tensor bits, int64_t grad_of, bool scale_grad,
                                                            ScalarType dtype) {
  check_float("dtype", dtype);
  check_dense("q", q, "as the forward pass gives it");
  const ScalarType acc = acc_type(dtype);
  const Parameters parameters(alpha, sigma, bits, grad_of, acc, q);
  check_like("grad", {grad}, {q}, kFloats);
  const Tensor packed = check_per_weight("quarters", quarters, quarter_bytes(q.numel()), ScalarType::Byte, q);
  // Kernels read q as it is where its arithmetic is that of x; dL/dq, and write dL/dx, as q or in the arithmetic dtype.
  const Tensor g = in_layout_of(grad, q);
  auto read = [](const Tensor& t, ScalarType as) { return t.scalar_type() == as ? t : torch::stable::to(t, as); };
  const ScalarType from = acc == ScalarType::Float && q.scalar_type() != ScalarType::Double ? q.scalar_type() : acc;
  const ScalarType given = g.scalar_type() == from ? from : acc, written = dtype == from ? from : acc;
  Tensor grad_x = empty_like(q, written);
  Tensors sums;
  if (scale_grad) sums = {empty_like(alpha, acc), empty_like(sigma, acc)};
  with_float(from, [&](auto element) {
    using Q = decltype(element);
    using A = Acc<Q>;
    auto run = [&](auto gradient, auto result) {
      backward_into<Q, decltype(gradient), decltype(result)>(read(q, from), read(g, given), packed, parameters,
                                                             grad_of == kOfSoft, grad_x, sums);
    };
    if (given == from)
      written == from ? run(Q(), Q()) : run(Q(), A());
    else
      written == from ? run(A(), Q()) : run(A(), A());
  });
  if (written != dtype) {
    Tensor converted = empty_like(grad_x, dtype);
    torch::stable::copy_(converted, grad_x);
    grad_x = converted;
  }
  return {grad_x, sums};
}

}  // namespace
}  // namespace quantops::cuda

QUANTOPS_REGISTER(QUANTOPS_KEY, m) {
  m.impl("categorical_activation", TORCH_BOX(&quantops::cuda::categorical_activation));
  m.impl("categorical_activation_backward", TORCH_BOX(&quantops::cuda::categorical_activation_backward));
}
