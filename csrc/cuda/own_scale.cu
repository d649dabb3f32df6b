// Family `own_scale` on CUDA: gradients of scales that are functions of their weights, one launch for means, two for
// maxima, whose ties are counted first.
#include "../own_scale_math.h"
#include "table.cuh"

namespace quantops::cuda {
namespace {

// How many weights of a scale carry its gradient; entry.result is that gradient over their number.
template <class W>
struct Carriers : SumOp<int64_t, Add, true> {
  using X = W;
  using G = None;
  using O = None;
  using A = Acc<W>;
  struct State {
    A least;
    int32_t count;
  };

  __device__ __forceinline__ State begin(const Entry& e, int64_t row, int) const {
    return {static_cast<const A*>(e.scale)[row], 0};
  }
  __device__ __forceinline__ None apply(X w, None, State& s) const {
    s.count += carries(A(widen(w)), s.least);
    return {};
  }
  __device__ __forceinline__ int64_t total(const State& s) const { return s.count; }
  __device__ __forceinline__ void write(const Entry& e, int64_t row, int, int64_t count) const {
    static_cast<A*>(e.result)[row] = static_cast<const A*>(e.grad)[row] / static_cast<A>(count);
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
    if (!mean) run(w[0], entries, Carriers<W>{});
    for (size_t i = 0; i < w.size(); ++i) entries[i].out = out[i].data_ptr();
    run(w[0], entries, OwnScale<W>{{}, mean});
  });
  return out;
}

}  // namespace
}  // namespace quantops::cuda

QUANTOPS_REGISTER(QUANTOPS_KEY, m) { m.impl("own_scale_backward", TORCH_BOX(&quantops::cuda::own_scale_backward)); }
