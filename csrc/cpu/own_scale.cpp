// Family `own_scale` on CPU: gradients of scales that are functions of their weights.
#include "cpu/list.h"
#include "cpu/simd.h"
#include "own_scale_math.h"

namespace quantops {
namespace {

template <class In, class A>
QUANTOPS_SIMD int64_t carriers_loop(const In* __restrict w, int64_t n, A least) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; i++) count += carries(A(widen(w[i])), least);
  return count;
}

template <class In, class A>
QUANTOPS_SIMD void own_scale_loop(const In* __restrict w, In* __restrict out, bool streaming, int64_t n, A least,
                                  A each) {
  map_lanes<In>(out, streaming, n, [&](A x) QUANTOPS_LANES { return own_scale_grad(x, least, each); }, w);
}

// dL/ds over the number of weights that carry it, of each scale.
template <class A>
std::vector<std::vector<A>> parts_of(const List& list, const Tensors& grad_scale, bool mean) {
  std::vector<std::vector<A>> each;
  std::vector<A*> counts;
  for (const Rows& r : list.rows) each.emplace_back(r.rows, A(r.inner));
  for (auto& v : each) counts.push_back(v.data());
  if (!mean) {
    std::vector<double> parts(list.chunks.size(), 0);
    for_chunks(list.chunks, [&](int64_t chunk) {
      const Chunk& c = list.chunks[chunk];
      for_rows(c, list.rows[c.tensor], [&](int64_t row, int64_t begin, int64_t end) {
        const A least = static_cast<const A*>(list.scale[c.tensor])[row];
        int64_t count = 0;
        for (int64_t i = begin; i < end; i += kBlock) {
          const int64_t n = std::min(kBlock, end - i);
          with_source<A>(list.data[c.tensor], list.type, i, n,
                         [&](const auto* w) { count += carriers_loop(w, n, least); });
        }
        if (row_in_parts(list.rows[c.tensor]))
          parts[chunk] = double(count);
        else
          counts[c.tensor][row] = A(count);
      });
    });
    add_parts(list, parts, counts);
  }
  for (int64_t t = 0; t < list.size(); t++) {
    const A* g = static_cast<const A*>(grad_scale[t].data_ptr());
    for (int64_t row = 0; row < list.rows[t].rows; row++) each[t][row] = g[row] / each[t][row];
  }
  return each;
}

template <class A>
void backward_into(const List& list, const Tensors& grad_scale, bool mean, const Targets& out) {
  const auto each = parts_of<A>(list, grad_scale, mean);
  for_chunks(list.chunks, [&](int64_t chunk) {
    const Chunk& c = list.chunks[chunk];
    for_rows(c, list.rows[c.tensor], [&](int64_t row, int64_t begin, int64_t end) {
      const A least = mean ? A(0) : static_cast<const A*>(list.scale[c.tensor])[row], part = each[c.tensor][row];
      for (int64_t i = begin; i < end; i += kBlock) {
        const int64_t n = std::min(kBlock, end - i);
        with_source<A>(list.data[c.tensor], list.type, i, n, [&](const auto* w) {
          with_target<A>(out.data[c.tensor], out.type, i, n, out.streaming, [&](auto* y, bool streaming) {
            if constexpr (std::is_same_v<decltype(*w), std::add_const_t<std::remove_reference_t<decltype(*y)>>&>)
              own_scale_loop(w, y, streaming, n, least, part);
            else
              __builtin_unreachable();  // the result always has the dtype of w
          });
        });
      }
    });
    end_streaming();
  });
}

Tensors own_scale_backward(Tensors w, Tensors scale, Tensors grad_scale, bool mean) {
  const bool is_double = is_double_list(w);
  List list = make_list(w, is_double);
  check_scales(scale, w, acc_type(is_double));
  check_scales(grad_scale, w, acc_type(is_double), "grad_scale");
  for (size_t i = 0; i < w.size(); i++) {
    QUANTOPS_CHECK(grad_scale[i].numel() == scale[i].numel(), entry_name("grad_scale", i, w.size()),
                   ": expected as many elements as its scale has (", scale[i].numel(), "), got shape ",
                   numbers(grad_scale[i].sizes()));
    list.rows.push_back(rows_of(w[i], scale[i]));
    list.scale.push_back(scale[i].data_ptr());
  }
  list.chunks = make_chunks(list.rows);
  Tensors out = empty_like(list.w, w[0].scalar_type());
  is_double ? backward_into<double>(list, grad_scale, mean, targets(out, list))
            : backward_into<float>(list, grad_scale, mean, targets(out, list));
  return out;
}

}  // namespace
}  // namespace quantops

STABLE_TORCH_LIBRARY_IMPL(quantops, CPU, m) { m.impl("own_scale_backward", TORCH_BOX(&quantops::own_scale_backward)); }
