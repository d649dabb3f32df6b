// Family `activation` on CUDA: the ops of quantops/library.py on one tensor. With one scale: a kernel each way, and one
// that adds up partial sums. With a scale per channel elements find theirs, and a second kernel goes through each
// channel for its sums. What happens to an element is in csrc/activation_math.h. Values on the GPU are never read back:
// those out of range give NaN.
#include <tuple>

#include "../activation_arguments.h"
#include "one_tensor.cuh"

namespace quantops::cuda {
namespace {

constexpr int kVector = 8;  // elements, whose bits are a byte
template <class A>
constexpr int kBlocks = sizeof(A) == 8 ? 1 : 2;  // at least that many on a multiprocessor

// What elements are computed from, as it lies on the GPU, and which way.
template <class A>
struct Settings {
  const A *scale, *offset;  // offset: null where there is none
  const int32_t* bits;
  Channels channels;
  int32_t rule, front, keep, learn;
  bool is_signed;

  __device__ __forceinline__ Grid<A> grid(int64_t channel) const {
    return make_grid(scale[channel], offset ? offset[channel] : A(0), *bits, rule, is_signed, front);
  }
};

// The grid of an element: the one that all have, or that of its channel, made anew where the channel changes.
template <bool kChannels, class A>
struct Grids {
  const Settings<A>& settings;
  Grid<A> p;
  int64_t channel;

  __device__ __forceinline__ explicit Grids(const Settings<A>& s) : settings(s), p(s.grid(0)), channel(0) {}
  __device__ __forceinline__ const Grid<A>& at(int64_t i) {
    if constexpr (kChannels) {
      const int64_t of = settings.channels.of(i);
      if (of != channel) p = settings.grid(channel = of);
    }
    return p;
  }
};

// ------------------------------------------------------------------------------------------------------------- forward

// h of an element, and dh/dx; behind no smooth front x and 1.
template <bool kSmooth, class A>
__device__ __forceinline__ FrontValue<A> in_front(A x, int32_t front) {
  if constexpr (kSmooth) {
    const FrontSettings<A> p = front_settings<A>(front);
    return front == kGelu ? front_and_slope<true>(x, p) : front_and_slope<false>(x, p);
  } else {
    return {x, A(1)};
  }
}

// q of an element; what is kept of it in `number`.
template <class A>
__device__ __forceinline__ A quantized(A x, const Grid<A>& p, int32_t keep, uint32_t& number) {
  const A v = x - p.offset, value = grid_level<false>(v, p) * p.step;
  number = inside(v, p) ? 1 : 0;
  if (keep == kResidual) number = static_cast<uint32_t>(static_cast<int32_t>(residual_number(value, v, p)));
  return value + p.offset;
}

template <class X, class O, bool kChannels, bool kSmooth>
__global__ void __launch_bounds__(kThreads, kBlocks<Acc<X>>)
    activation_kernel(const X* x, O* q, uint8_t* kept, const Extent extent, const Settings<Acc<X>> settings) {
  using A = Acc<X>;
  constexpr int V = kVector;
  const int64_t begin = (int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp) * extent.segment;
  if (begin >= extent.numel) return;
  const int n = static_cast<int>(std::min(extent.segment, extent.numel - begin)), lane = threadIdx.x % kWarp;
  const int32_t keep = kSmooth ? int32_t(kInput) : settings.keep;
  Grids<kChannels, A> grids(settings);
  x += begin;
  q += begin;
  kept += kept_bytes(begin, keep);

  const int vectors = extent.aligned ? n / V : 0;
  for_vectors<V>(lane, vectors, [&](int first, auto count) {
    constexpr int U = decltype(count)::value;
    Pack<X, V> xs[U];
#pragma unroll
    for (int u = 0; u < U; ++u) xs[u] = load_pack<Pack<X, V>>(x + (first + u * kWarp) * V);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int v = first + u * kWarp;
      Pack<O, V> qs;
      uint32_t bits = 0, low = 0, high = 0;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        uint32_t number;
        const A h = in_front<kSmooth>(A(widen(xs[u].v[j])), settings.front).h;
        qs.v[j] = Narrow<O>::from(quantized(h, grids.at(begin + int64_t(v) * V + j), keep, number));
        bits |= number << j;
        (j < 4 ? low : high) |= number << 8 * (j % 4);
      }
      store_pack(q + v * V, qs);
      if (keep == kBits) kept[v] = static_cast<uint8_t>(bits);
      if (keep == kResidual) reinterpret_cast<uint2*>(kept)[v] = uint2{low, high};
    }
  });
#pragma unroll 1
  for (int i = vectors * V + lane * V; i < n; i += kWarp * V) {
    uint32_t bits = 0;
#pragma unroll 1
    for (int j = 0; j < V && i + j < n; ++j) {
      uint32_t number;
      const A h = in_front<kSmooth>(A(widen(x[i + j])), settings.front).h;
      q[i + j] = Narrow<O>::from(quantized(h, grids.at(begin + i + j), keep, number));
      bits |= number << j;
      if (keep == kResidual) kept[i + j] = static_cast<uint8_t>(number);
    }
    if (keep == kBits) kept[i / V] = static_cast<uint8_t>(bits);
  }
}

// ------------------------------------------------------------------------------------------------------------ backward

// dL/dx, g inside times dh/dx; adds to the sums that are wanted. other: x or q, where one is read; number: what was
// kept.
template <bool kSmooth, class A>
__device__ __forceinline__ A gradient(A g, A other, uint32_t number, const Grid<A>& p, int32_t keep, int32_t learn,
                                      int32_t front, A& within, A& up, A& down) {
  const FrontValue<A> behind = in_front<kSmooth>(other, front);
  bool in = number > kBelow && number < kAbove, above = number == kAbove;
  A rho = static_cast<A>(static_cast<int32_t>(number)) - A(kMiddle);
  if (keep == kInput) {
    const A v = behind.h - p.offset;
    in = inside(v, p);
    above = v > p.high;
    rho = learn == kLearnStep ? residual_of(grid_level<false>(v, p) * p.step, v, p) : A(0);
  } else if (keep == kBits) {
    above = other > middle_of(p);
  }
  const A outside = in ? A(0) : g;
  within += in ? g * rho : A(0);
  up += above ? outside : A(0);
  down += above ? A(0) : outside;
  const A of_h = in ? g : A(0);
  return (kSmooth ? of_h * behind.slope : of_h) + p.valid_zero;
}

// T: of dL/dq, of x or q, and of dL/dx. partial: of every item, where sums are wanted and there is one scale.
template <class T, bool kChannels, bool kSmooth>
__global__ void __launch_bounds__(kThreads, kBlocks<Acc<T>>)
    gradient_kernel(const T* g, const T* other, const uint8_t* kept, T* out, SideSums* partial, const Extent extent,
                    const Settings<Acc<T>> settings) {
  using A = Acc<T>;
  constexpr int V = kVector;
  const int64_t item = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp, begin = item * extent.segment;
  if (begin >= extent.numel) return;  // whole warps
  const int n = static_cast<int>(std::min(extent.segment, extent.numel - begin)), lane = threadIdx.x % kWarp;
  const int32_t keep = kSmooth ? int32_t(kInput) : settings.keep, learn = settings.learn;
  Grids<kChannels, A> grids(settings);
  g += begin;
  out += begin;
  other = other ? other + begin : nullptr;
  kept += kept_bytes(begin, keep);

  SideSums sums;
  const int vectors = extent.aligned ? n / V : 0;
  for_vectors<V>(lane, vectors, [&](int first, auto loads) {
    constexpr int U = decltype(loads)::value;
    Pack<T, V> gs[U], others[U];
    uint2 words[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int v = first + u * kWarp;
      gs[u] = load_pack<Pack<T, V>>(g + v * V);
      others[u] = gs[u];
      if (other) others[u] = load_pack<Pack<T, V>>(other + v * V);
      words[u] = uint2{0, 0};
      if (keep == kBits) words[u].x = kept[v];
      if (keep == kResidual) words[u] = reinterpret_cast<const uint2*>(kept)[v];
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int v = first + u * kWarp;
      Pack<T, V> os;
      A within = A(0), up = A(0), down = A(0);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const uint32_t byte = (j < 4 ? words[u].x : words[u].y) >> 8 * (j % 4) & 255;
        const uint32_t number = keep == kBits ? words[u].x >> j & 1 : byte;
        os.v[j] = Narrow<T>::from(gradient<kSmooth>(A(widen(gs[u].v[j])), A(widen(others[u].v[j])), number,
                                                    grids.at(begin + int64_t(v) * V + j), keep, learn, settings.front,
                                                    within, up, down));
      }
      store_pack(out + v * V, os);
      if (learn != kLearnNone) sums.add({double(within), double(up), double(down)});
    }
  });
#pragma unroll 1
  for (int i = vectors * V + lane; i < n; i += kWarp) {
    const uint32_t number = keep == kBits ? kept[i / V] >> i % V & 1 : keep == kResidual ? kept[i] : 0;
    A within = A(0), up = A(0), down = A(0);
    out[i] = Narrow<T>::from(gradient<kSmooth>(A(widen(g[i])), A(widen(other ? other[i] : g[i])), number,
                                               grids.at(begin + i), keep, learn, settings.front, within, up, down));
    sums.add({double(within), double(up), double(down)});
  }
  if (partial && learn != kLearnNone) {
    sums = {warp_reduce<Add>(sums.inside), warp_reduce<Add>(sums.above), warp_reduce<Add>(sums.below)};
    if (lane == 0) partial[item] = sums;
  }
}

// A block for one of `parts` runs of `segment` elements of a channel, which has `each` of them.
template <class T, bool kSmooth>
__global__ void __launch_bounds__(kThreads)
    channel_kernel(const T* g, const T* other, const uint8_t* kept, SideSums* partial, int64_t each, int64_t segment,
                   int64_t parts, const Settings<Acc<T>> settings) {
  using A = Acc<T>;
  const int64_t channel = blockIdx.x / parts, first = blockIdx.x % parts * segment;
  const int64_t run = settings.channels.run, end = std::min(first + segment, each);
  const int32_t keep = kSmooth ? int32_t(kInput) : settings.keep;
  const Grid<A> p = settings.grid(channel);
  SideSums sums;
#pragma unroll 1
  for (int64_t j = first + threadIdx.x; j < end; j += kThreads) {
    const int64_t i = (j / run * settings.channels.count + channel) * run + j % run;
    const uint32_t number = keep == kBits ? kept[i / 8] >> i % 8 & 1 : keep == kResidual ? kept[i] : 0;
    A within = A(0), up = A(0), down = A(0);
    gradient<kSmooth>(A(widen(g[i])), A(widen(other ? other[i] : g[i])), number, p, keep, settings.learn,
                      settings.front, within, up, down);
    sums.add({double(within), double(up), double(down)});
  }
  sums.inside = block_reduce<Add>(sums.inside);
  sums.above = block_reduce<Add>(sums.above);
  sums.below = block_reduce<Add>(sums.below);
  if (threadIdx.x == 0) partial[blockIdx.x] = sums;
}

constexpr int kSumThreads = 256;
template <class A>
__global__ void __launch_bounds__(kSumThreads)
    finish_sums_kernel(const SideSums* partial, int64_t parts, int64_t each, A* of_scale, A* of_offset,
                       const Settings<A> settings) {
  const int64_t channel = blockIdx.x;
  SideSums sums;
  for (int64_t i = threadIdx.x; i < parts; i += kSumThreads) sums.add(partial[channel * parts + i]);
  sums.inside = block_reduce<Add>(sums.inside);
  sums.above = block_reduce<Add>(sums.above);
  sums.below = block_reduce<Add>(sums.below);
  if (threadIdx.x == 0)
    finish_sums(sums, each, settings.learn, settings.keep, settings.grid(channel), of_scale[channel],
                of_offset[channel]);
}

// ----------------------------------------------------------------------------------------------------------- arguments

// scale, offset and bits, checked and kept alive.
struct Parameters {
  Tensor scale, bits;
  MaybeTensor offset;
  Channels channels;
  int32_t rule, front, keep, learn;
  bool is_signed;

  Parameters(const Tensor& x, ScalarType acc, const Tensor& scale_, const MaybeTensor& offset_, const Tensor& bits_,
             int64_t rule_, bool is_signed_, int64_t front_, int64_t keep_, int64_t learn_)
      : scale(scale_),
        bits(check_per_weight("bits", bits_, 1, ScalarType::Int, x)),
        rule(int32_t(rule_)),
        front(int32_t(front_)),
        keep(int32_t(keep_)),
        learn(int32_t(learn_)),
        is_signed(is_signed_) {
    check_options(rule_, is_signed_, front_, keep_, learn_, offset_);
    channels = channels_of("scale", scale_, x);
    scale = check_per_weight("scale", scale_, channels.count, acc, x);
    if (offset_) offset = check_per_weight("offset", *offset_, channels.count, acc, x);
  }
  template <class A>
  Settings<A> settings() const {
    return {static_cast<const A*>(scale.data_ptr()),
            offset ? static_cast<const A*>(offset->data_ptr()) : nullptr,
            static_cast<const int32_t*>(bits.data_ptr()),
            channels,
            rule,
            front,
            keep,
            learn,
            is_signed};
  }
};

Tensor converted(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

template <class X, class O>
void forward_into(const Tensor& x, const Tensor& q, const Tensor& kept, const Parameters& parameters) {
  const Extent extent = extent_of({x, q, kept});
  if (extent.numel == 0) return;
  OnDevice on(x);
  auto run = [&](auto kernel) {
    launch(on, kernel, extent.blocks(), kThreads, static_cast<const X*>(x.data_ptr()), static_cast<O*>(q.data_ptr()),
           static_cast<uint8_t*>(kept.data_ptr()), extent, parameters.settings<Acc<X>>());
  };
  if (is_smooth(parameters.front))
    parameters.channels.count == 1 ? run(activation_kernel<X, O, false, true>)
                                   : run(activation_kernel<X, O, true, true>);
  else
    parameters.channels.count == 1 ? run(activation_kernel<X, O, false, false>)
                                   : run(activation_kernel<X, O, true, false>);
}

std::tuple<Tensor, Tensor> activation(Tensor x, Tensor scale, MaybeTensor offset, Tensor bits, int64_t rule,
                                      bool is_signed, int64_t front, int64_t keep, int64_t learn, ScalarType dtype) {
  check_float("dtype", dtype);
  const ScalarType from = check_list("x", {x}, kFloats), acc = acc_type(from);
  x = dense(x);
  const Parameters parameters(x, acc, scale, offset, bits, rule, is_signed, front, keep, learn);
  // Written as x, or as the 16 bits that autocast asks of float32; what is rarer is converted from the arithmetic.
  const bool direct = dtype == from || dtype == acc || (from == ScalarType::Float && dtype != ScalarType::Double);
  Tensor q = empty_like(x, direct ? dtype : acc);
  const Tensor kept = empty_vector(kept_bytes(x.numel(), keep), ScalarType::Byte, x);
  with_float(from, [&](auto element) {
    using X = decltype(element);
    const ScalarType to = q.scalar_type();
    if (to == from) return forward_into<X, X>(x, q, kept, parameters);
    if constexpr (!std::is_same_v<X, double>) {
      if (to == ScalarType::Float) return forward_into<X, float>(x, q, kept, parameters);
      if constexpr (std::is_same_v<X, float>) {
        if (to == ScalarType::BFloat16) return forward_into<X, __nv_bfloat16>(x, q, kept, parameters);
        if (to == ScalarType::Half) return forward_into<X, __half>(x, q, kept, parameters);
      }
    }
  });
  return {converted(q, dtype), kept};
}

template <class T>
void backward_into(const Tensor& g, const Tensor* other, const Tensor& kept, const Tensor& grad_x, const Tensors& sums,
                   const Parameters& parameters) {
  using A = Acc<T>;
  Tensors moved = {g, grad_x, kept};
  if (other) moved.push_back(*other);
  const Extent extent = extent_of(moved);
  const Settings<A> settings = parameters.settings<A>();
  const int64_t count = settings.channels.count, each = extent.numel / count;
  const int64_t segment = segment_rule(each), parts = count == 1 ? extent.items() : (each + segment - 1) / segment;
  QUANTOPS_CHECK(parts * count <= INT32_MAX, "grad: expected fewer elements, got ", extent.numel);
  OnDevice on(g);
  const Tensor scratch =
      empty_vector(sums.empty() ? 0 : parts * count * int64_t(sizeof(SideSums)), ScalarType::Byte, g);
  SideSums* partial = sums.empty() || count > 1 ? nullptr : static_cast<SideSums*>(scratch.data_ptr());
  const T* from = static_cast<const T*>(g.data_ptr());
  const T* second = other ? static_cast<const T*>(other->data_ptr()) : nullptr;
  const uint8_t* numbers = static_cast<const uint8_t*>(kept.data_ptr());
  auto run = [&](auto kernel) {
    launch(on, kernel, extent.blocks(), kThreads, from, second, numbers, static_cast<T*>(grad_x.data_ptr()), partial,
           extent, settings);
  };
  if (extent.numel > 0) {
    const bool smooth = is_smooth(settings.front);
    if (smooth)
      count == 1 ? run(gradient_kernel<T, false, true>) : run(gradient_kernel<T, true, true>);
    else
      count == 1 ? run(gradient_kernel<T, false, false>) : run(gradient_kernel<T, true, false>);
    if (!sums.empty() && count > 1)
      launch(on, smooth ? channel_kernel<T, true> : channel_kernel<T, false>,
             dim3(static_cast<unsigned>(count * parts)), kThreads, from, second, numbers,
             static_cast<SideSums*>(scratch.data_ptr()), each, segment, parts, settings);
  }
  if (!sums.empty())
    launch(on, finish_sums_kernel<A>, dim3(static_cast<unsigned>(count)), kSumThreads,
           static_cast<const SideSums*>(scratch.data_ptr()), extent.numel > 0 ? parts : int64_t(0), each,
           static_cast<A*>(sums[0].data_ptr()), static_cast<A*>(sums[1].data_ptr()), settings);
}

std::tuple<Tensor, Tensors> activation_backward(Tensor grad, MaybeTensor x, MaybeTensor q, Tensor kept, Tensor scale,
                                                MaybeTensor offset, Tensor bits, int64_t rule, bool is_signed,
                                                int64_t front, int64_t keep, int64_t learn, ScalarType dtype) {
  check_float("dtype", dtype);
  check_dense("grad", grad, "laid out as q was");
  const ScalarType acc = acc_type(dtype);
  const Parameters parameters(grad, acc, scale, offset, bits, rule, is_signed, front, keep, learn);
  const bool reads = keep == kInput || (keep == kBits && learn != kLearnNone);
  const Tensor other = other_of(grad, keep == kInput ? x : q, keep == kInput ? "x" : "q", reads);
  const Tensor packed = check_per_weight("kept", kept, kept_bytes(grad.numel(), keep), ScalarType::Byte, grad);
  // All in one dtype: that of the gradient where it is x's and that of what else is read, else that of the arithmetic.
  const bool alike = grad.scalar_type() == dtype && other.scalar_type() == dtype;
  const ScalarType as = alike ? dtype : acc;
  const Tensor g = converted(grad, as), second = converted(other, as), grad_x = empty_like(grad, as);
  Tensors sums;
  if (learn != kLearnNone) sums = {empty_like(parameters.scale, acc), empty_like(parameters.scale, acc)};
  with_float(as, [&](auto element) {
    backward_into<decltype(element)>(g, reads ? &second : nullptr, packed, grad_x, sums, parameters);
  });
  return {converted(grad_x, dtype), sums};
}

}  // namespace
}  // namespace quantops::cuda

QUANTOPS_REGISTER(QUANTOPS_KEY, m) {
  m.impl("activation", TORCH_BOX(&quantops::cuda::activation));
  m.impl("activation_backward", TORCH_BOX(&quantops::cuda::activation_backward));
}
