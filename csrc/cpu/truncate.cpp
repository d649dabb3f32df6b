// Family `truncate` on CPU: the ops of quantops/library.py over lists of weights.
#include "cpu/list.h"
#include "cpu/truncate_loops.h"
#include "truncate_arguments.h"

namespace quantops {
namespace {

// A list of weights with the widths that each is cut to.
struct Widths {
  List list;  // its bits are the base widths
  Tensors parameters;  // kept alive
  int64_t count;  // of widths
  const int32_t* bits;  // (widths, weights)
  std::vector<const void*> out_scale;
  Rule rule;
  bool tanh;

  int64_t at(int64_t width, int64_t tensor) const { return width * list.size() + tensor; }
};

// On CPU the values are read, and those out of range raise before any work is done.
Widths make_widths(const Tensors& w, const Tensors& scale, const Tensors& out_scale, const Tensor& bits,
                   const Tensor& base_bits, int64_t rule, bool tanh, bool is_double) {
  QUANTOPS_CHECK(rule >= kRoundClamp && rule <= kNearest, "rule: expected 0, 1 or 2, got ", rule);
  const int64_t count = check_widths(bits, w), size = int64_t(w.size());
  const Tensor base = check_per_weight("base_bits", base_bits, size, ScalarType::Int, w[0]);
  const Tensor dense_bits = bits.is_contiguous() ? bits : torch::stable::contiguous(bits);
  const int32_t* n = static_cast<const int32_t*>(dense_bits.data_ptr());
  for (int64_t i = 0; i < size; i++) {
    const int32_t most = static_cast<const int32_t*>(base.data_ptr())[i];
    if (most < 1 || most > kMaxBits) fail(entry_name("base_bits", i, size), ": expected 1..16, got ", most);
    uint32_t seen = 0;
    for (int64_t j = 0; j < count; j++) {
      const int32_t m = n[j * size + i];
      if (m < 1 || m > most || seen >> m & 1)
        fail("bits[", j, "][", i, "]: expected distinct widths in 1..base_bits = ", most, ", got ", m,
             m < 1 || m > most ? "" : " twice");
      seen |= 1u << m;
    }
  }
  Widths widths{make_list(w, scale, base, nullptr, is_double), {base, dense_bits}, count, n, {}, Rule(rule), tanh};
  check_out_scales(out_scale, scale, w, acc_type(is_double));
  if (!out_scale.empty())
    is_double ? check_scale_values<double>(out_scale, "out_scale") : check_scale_values<float>(out_scale, "out_scale");
  for (const Tensor& s : out_scale.empty() ? scale : out_scale) widths.out_scale.push_back(s.data_ptr());
  return widths;
}

// What all elements of a row share.
template <class A>
struct Row {
  Quantizer<A> p;
  Width<A> width[kMaxBits];

  Row(const Widths& widths, int64_t tensor, int64_t row) {
    const List& list = widths.list;
    if (list.rows[tensor].rows == 1) row = 0;
    const int64_t base = list.bits[tensor];
    p = make_base_quantizer(static_cast<const A*>(list.scale[tensor])[row], base, widths.tanh);
    const A out = static_cast<const A*>(widths.out_scale[tensor])[row];
    for (int64_t j = 0; j < widths.count; j++) width[j] = make_width(out, widths.bits[widths.at(j, tensor)], base);
  }
};

template <class A>
void truncate_into(const Widths& widths, const Targets& q) {
  const List& list = widths.list;
  for_chunks(list.chunks, [&](int64_t chunk) {
    const Chunk& c = list.chunks[chunk];
    const int64_t t = c.tensor;
    A in[kBlock], companded[kBlock], codes[kBlock], out[kBlock];
    for_rows(c, list.rows[t], [&](int64_t row, int64_t begin, int64_t end) {
      const Row<A> r(widths, t, row);
      for (int64_t i = begin; i < end; i += kBlock) {
        const int64_t n = std::min(kBlock, end - i);
        const A* w = load_block<A>(list.data[t], list.type, i, n, in);
        if (widths.tanh) tanh_loop(w, companded, n);
        code_loop(widths.tanh ? companded : w, codes, n, r.p, widths.rule);
        for (int64_t j = 0; j < widths.count; j++) {
          void* to = q.data[widths.at(j, t)];
          A* y = store_target<A>(to, q.type, i, q.streaming, out);
          cut_loop(codes, y, n, r.width[j]);
          store_block<A>(to, q.type, i, n, q.streaming, y, out);
        }
      }
    });
    end_streaming();
  });
}

Tensors truncate(Tensors w, Tensors scale, Tensors out_scale, Tensor bits, Tensor base_bits, int64_t rule, bool tanh,
                 bool covered, ScalarType dtype) {
  bool is_double = is_double_list(w);
  check_float("dtype", dtype);
  Widths widths = make_widths(w, scale, out_scale, bits, base_bits, rule, tanh, is_double);
  Tensors q;
  for (int64_t j = 0; j < widths.count; j++)
    for (const Tensor& t : widths.list.w) q.push_back(empty_like(t, dtype));
  Targets to = targets(q, widths.list);
  to.streaming = widths.count * widths.list.numel() * item_size(to.type) > kStreamBytes;
  is_double ? truncate_into<double>(widths, to) : truncate_into<float>(widths, to);
  return q;
}

// The gradients of one weight, an entry per width, or null where there is none.
struct Gradients {
  std::vector<const void*> data;
  Storage type;
};

// The sum of the gradients that are there, in their order: in `sum`, or the only one where it lies.
template <class A>
const A* add_up(const Widths& widths, const Gradients& g, int64_t t, int64_t i, int64_t n, A* sum,
                A (*buffers)[kBlock]) {
  const A* block[kSummed];
  int64_t j = 0, count = 0;
  for (; j < widths.count && count < kSummed; j++)
    if (const void* data = g.data[widths.at(j, t)]) {
      block[count] = load_block<A>(data, g.type, i, n, buffers[count]);
      count++;
    }
  if (count == 1) return block[0];
  if (count == 0) std::fill(sum, sum + n, A(0));
  if (count == 2) sum_loop<2>(block, sum, n);
  if (count == 3) sum_loop<3>(block, sum, n);
  if (count == 4) sum_loop<4>(block, sum, n);
  for (; j < widths.count; j++)
    if (const void* data = g.data[widths.at(j, t)]) add_loop(load_block<A>(data, g.type, i, n, buffers[0]), sum, n);
  return sum;
}

// Sums of a part of a row: of g * q / out_scale, and of g * (x/s) * inside.
struct ScaleSums {
  double level = 0, inner = 0;
};

template <class A>
void backward_into(const Widths& widths, const Gradients& g, bool covered, const Targets& out,
                   const std::vector<A*>& grad_scale, const std::vector<A*>& grad_out_scale) {
  const List& list = widths.list;
  const bool own_out = !grad_out_scale.empty();
  std::vector<double> levels(list.chunks.size(), 0), inners(list.chunks.size(), 0);
  for_chunks(list.chunks, [&](int64_t chunk) {
    const Chunk& c = list.chunks[chunk];
    const int64_t t = c.tensor;
    A in[kBlock], companded[kBlock], codes[kBlock], sum[kBlock], result[kBlock], buffers[kSummed][kBlock];
    for_rows(c, list.rows[t], [&](int64_t row, int64_t begin, int64_t end) {
      const Row<A> r(widths, t, row);
      ScaleSums sums;
      for (int64_t i = begin; i < end; i += kBlock) {
        const int64_t n = std::min(kBlock, end - i);
        A* y = store_target<A>(out.data[t], out.type, i, out.streaming, result);
        const A* total = add_up(widths, g, t, i, n, covered ? y : sum, buffers);
        if (covered) {
          if (total != y) std::copy(total, total + n, y);
        } else {
          const A* w = load_block<A>(list.data[t], list.type, i, n, in);
          if (widths.tanh) {
            tanh_loop(w, companded, n);
            inside_tanh_loop(w, companded, total, y, n, r.p);
          } else {
            inside_loop(w, total, y, n, r.p);
          }
          if (!grad_scale.empty()) {
            const A* x = widths.tanh ? companded : w;
            code_loop(x, codes, n, r.p, widths.rule);
            sums.inner += inner_dot_loop(w, x, total, n, r.p);
            for (int64_t j = 0; j < widths.count; j++)
              if (const void* data = g.data[widths.at(j, t)])
                sums.level += level_dot_loop(codes, load_block<A>(data, g.type, i, n, buffers[0]), n, r.width[j]);
          }
        }
        store_block<A>(out.data[t], out.type, i, n, out.streaming, y, result);
      }
      if (grad_scale.empty()) return;
      const double of_scale = own_out ? -sums.inner : sums.level - sums.inner;
      if (row_in_parts(list.rows[t])) {
        inners[chunk] = of_scale;
        levels[chunk] = sums.level;
      } else {
        grad_scale[t][row] = A(of_scale);
        if (own_out) grad_out_scale[t][row] = A(sums.level);
      }
    });
    end_streaming();
  });
  if (!grad_scale.empty()) add_parts(list, inners, grad_scale);
  if (own_out) add_parts(list, levels, grad_out_scale);
}

// Results in the shapes of the scales, zero where a weight is empty.
template <class A>
std::vector<A*> zeroed(const Tensors& scale, Tensors& result) {
  std::vector<A*> data;
  for (const Tensor& s : scale) {
    result.push_back(torch::stable::empty_like(s));
    data.push_back(static_cast<A*>(result.back().data_ptr()));
    std::fill(data.back(), data.back() + s.numel(), A(0));
  }
  return data;
}

std::tuple<Tensors, Tensors, Tensors> truncate_backward(Tensors grads, Tensors w, Tensors scale, Tensors out_scale,
                                                        Tensor bits, Tensor base_bits, int64_t rule, bool tanh,
                                                        bool covered, bool scale_grad) {
  bool is_double = is_double_list(w);
  Widths widths = make_widths(w, scale, out_scale, bits, base_bits, rule, tanh, is_double);
  check_gradients(grads, w, widths.count);
  Tensors laid_out;  // kept alive
  Gradients g{{}, storage(grads[0])};
  for (size_t i = 0; i < grads.size(); i++) {
    const Tensor& like = widths.list.w[i % w.size()];
    const bool used = is_used(grads[i], like);
    if (used) laid_out.push_back(in_layout_of(grads[i], like));
    g.data.push_back(used ? laid_out.back().data_ptr() : nullptr);
  }
  Tensors out = empty_like(widths.list.w, w[0].scalar_type()), of_scale, of_out_scale;
  auto run = [&](auto zero) {
    using A = decltype(zero);
    std::vector<A*> s, o;
    if (scale_grad) {
      s = zeroed<A>(scale, of_scale);
      o = zeroed<A>(out_scale, of_out_scale);
    }
    backward_into<A>(widths, g, covered && !tanh && !scale_grad, targets(out, widths.list), s, o);
  };
  is_double ? run(0.0) : run(0.0f);
  return {out, of_scale, of_out_scale};
}

}  // namespace
}  // namespace quantops

STABLE_TORCH_LIBRARY_IMPL(quantops, CPU, m) {
  m.impl("truncate", TORCH_BOX(&quantops::truncate));
  m.impl("truncate_backward", TORCH_BOX(&quantops::truncate_backward));
}
