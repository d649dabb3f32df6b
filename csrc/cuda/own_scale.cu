// Family `own_scale` on CUDA: gradients of scales that are functions of their weights, one launch for means, three for
// maxima, whose ties are counted first.
#include "../own_scale_math.h"
#include "table.cuh"

namespace quantops::cuda {
namespace {

// How many weights of a scale carry its gradient. Then entry.result holds that gradient over their number.
template <class W>
struct Carriers : OpBase {
  using X = W;
  using G = None;
  using O = None;
  using A = Acc<W>;
  struct State {
    A least;
    int32_t count;
  };
  int64_t* partial;

  __device__ __forceinline__ State begin(const Entry& e, int64_t row, int) const {
    return {static_cast<const A*>(e.scale)[row], 0};
  }
  __device__ __forceinline__ None apply(X w, None, State& s) const {
    s.count += carries(A(widen(w)), s.least);
    return {};
  }
  __device__ __forceinline__ void end(State& s, int64_t item, int lane) const {
    const int32_t count = warp_reduce<Add>(s.count);
    if (lane == 0) partial[item] = count;
  }
};

template <class A>
struct FinishCarriers {
  static constexpr bool kPerScale = true;
  const int64_t* partial;

  __device__ void run(const Entry& e, int64_t row, int64_t first, int64_t items, int) const {
    int64_t count = 0;
    for (int64_t i = threadIdx.x; i < items; i += blockDim.x) count += partial[first + i];
    count = block_reduce<Add>(count);
    if (threadIdx.x == 0) static_cast<A*>(e.result)[row] = static_cast<const A*>(e.grad)[row] / static_cast<A>(count);
  }
};

template <class W>
struct OwnScale : OpBase {
  using X = W;
  using G = None;
  using O = W;
  using A = Acc<W>;
  struct State {
    A least, each;
  };
  bool mean;

  __device__ __forceinline__ State begin(const Entry& e, int64_t row, int) const {
    if (mean) return {A(0), static_cast<const A*>(e.grad)[row] / static_cast<A>(e.inner)};
    return {static_cast<const A*>(e.scale)[row], static_cast<const A*>(e.result)[row]};
  }
  __device__ __forceinline__ O apply(X w, None, const State& s) const {
    return Narrow<O>::from(own_scale_grad(A(widen(w)), s.least, s.each));
  }
};

Tensors own_scale_backward(Tensors weights, Tensors scale, Tensors grad_scale, bool mean) {
  const ScalarType dtype = check_list("w", weights, kFloats), acc = acc_type(dtype);
  check_scales(scale, weights, acc);
  check_scales(grad_scale, weights, acc, "grad_scale");
  const Tensors w = dense(weights), out = empty_like(w, dtype);
  Tensors each;
  std::vector<Entry> entries;
  for (size_t i = 0; i < w.size(); ++i) {
    QUANTOPS_CHECK(grad_scale[i].numel() == scale[i].numel(), entry_name("grad_scale", i, w.size()),
                   ": expected as many elements as its scale has (", scale[i].numel(), "), got shape ",
                   numbers(grad_scale[i].sizes()));
    each.push_back(empty_like(scale[i], acc));
    const Rows r = rows_of(w[i], scale[i]);
    entries.push_back({w[i].data_ptr(), nullptr, nullptr, scale[i].data_ptr(), each[i].data_ptr(), r.rows, r.inner});
    entries[i].grad = grad_scale[i].data_ptr();
  }
  with_float(dtype, [&](auto element) {
    using W = decltype(element);
    if (!mean)
      run(w[0], entries, sizeof(int64_t), Carriers<W>{{}, nullptr}, FinishCarriers<Acc<W>>{nullptr},
          [](Carriers<W>& op, FinishCarriers<Acc<W>>& finish, void* scratch) {
            finish.partial = op.partial = static_cast<int64_t*>(scratch);
          });
    for (size_t i = 0; i < w.size(); ++i) entries[i].out = out[i].data_ptr();
    run(w[0], entries, OwnScale<W>{{}, mean});
  });
  return out;
}

}  // namespace
}  // namespace quantops::cuda

QUANTOPS_REGISTER(QUANTOPS_KEY, m) {
  m.impl("own_scale_backward", TORCH_BOX(&quantops::cuda::own_scale_backward));
}
