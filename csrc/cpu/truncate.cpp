// Family `truncate` on CPU: the ops of quantops/library.py over lists of weights.
#include "cpu/list.h"
#include "cpu/truncate_loops.h"
#include "truncate_arguments.h"

namespace quantops {
namespace {

// A list of weights with the widths that each is cut to.
struct Widths {
  List list;            // its bits are the base widths
  Tensors parameters;   // kept alive
  int64_t count;        // of widths
  const int32_t* bits;  // (widths, weights)
  std::vector<const void*> out_scale;
  Rule rule;
  bool tanh;

  int64_t at(int64_t width, int64_t tensor) const { return width * list.size() + tensor; }
};

// On CPU the values are read, and those out of range raise before any work is done.
Widths make_widths(const Tensors& w, const Tensors& scale, const Tensors& out_scale, const Tensor& bits,
                   const Tensor& base_bits, int64_t rule, bool tanh, bool is_double) {
  check_rule(rule);
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
  check_count("scale", scale, w);  // of which one for all, as in family uniform, is none
  Widths widths{make_list(w, scale, base, nullptr, is_double), {base, dense_bits}, count, n, {}, Rule(rule), tanh};
  check_out_scales(out_scale, scale, w, acc_type(is_double));
  for (const Tensor& s : out_scale.empty() ? scale : out_scale) widths.out_scale.push_back(s.data_ptr());
  is_double ? check_scale_values<double>(widths.list, widths.out_scale, "out_scale")
            : check_scale_values<float>(widths.list, widths.out_scale, "out_scale");
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
    A codes[kBlock];
    [[maybe_unused]] bool narrow = false;  // whether a width fits a table
    for (int64_t j = 0; j < widths.count; j++) narrow |= widths.bits[widths.at(j, t)] <= kTableWidth;
    for_rows(c, list.rows[t], [&](int64_t row, int64_t begin, int64_t end) {
      const Row<A> r(widths, t, row);
      for (int64_t i = begin; i < end; i += kBlock) {
        const int64_t n = std::min(kBlock, end - i);
        with_source<A>(list.data[t], list.type, i, n, [&](const auto* w) {
          using In = std::remove_const_t<std::remove_pointer_t<decltype(w)>>;
          if (q.type == Storage::bf16)
            code_loop<kAllPairs<In>>(w, codes, n, r.p, widths.rule, widths.tanh);
          else
            code_loop<false>(w, codes, n, r.p, widths.rule, widths.tanh);
          [[maybe_unused]] uint16_t numbers[kBlock];
          [[maybe_unused]] int64_t whole = 0;  // of them, 0: none are looked up
#if defined(__x86_64__)
          if constexpr (std::is_same_v<In, BFloat16>)
            if (q.type == Storage::bf16 && narrow && looks_up(w, n)) whole = numbers_avx512(codes, numbers, n);
#endif
          for (int64_t j = 0; j < widths.count; j++)
            with_target<A>(q.data[widths.at(j, t)], q.type, i, n, q.streaming, [&](auto* y, bool streaming) {
#if defined(__x86_64__)
              if constexpr (std::is_same_v<In, BFloat16> && std::is_same_v<decltype(y), BFloat16*>) {
                const int m = widths.bits[widths.at(j, t)];
                if (whole > 0 && m <= kTableWidth && (!streaming || reinterpret_cast<intptr_t>(y) % 64 == 0))
                  return cut_by_table(codes, numbers, whole, y, streaming, n, int(list.bits[t]) - m, r.width[j]);
              }
#endif
              cut_loop<In>(codes, y, streaming, n, r.width[j]);
            });
        });
      }
    });
    end_streaming();
  });
}

Tensors truncate(Tensors w, Tensors scale, std::optional<Tensors> out_scale, Tensor bits, Tensor base_bits,
                 int64_t rule, bool tanh, bool /*covered*/, bool /*exact*/, ScalarType dtype) {
  bool is_double = is_double_list(w);
  check_float("dtype", dtype);
  Widths widths = make_widths(w, scale, out_scale.value_or(Tensors{}), bits, base_bits, rule, tanh, is_double);
  Tensors q;
  for (int64_t j = 0; j < widths.count; j++)
    for (const Tensor& t : widths.list.w) q.push_back(empty_like(t, dtype));
  Targets to = targets(q, widths.list);
  to.streaming = widths.count * widths.list.numel() * item_size(to.type) > kStreamBytes;
  is_double ? truncate_into<double>(widths, to) : truncate_into<float>(widths, to);
  return q;
}

// The gradients of all widths of all weights, null where there is none.
struct Gradients {
  std::vector<const void*> data;
  Storage type;
};

// Calls f(kSummed pointers) with elements [i, i + n) of the gradients of one weight that are there, in their order: as
// they are stored where there are few and loops take them so, else with their sum. Without any the sum is zero.
template <class A, class F>
void with_gradients(const Widths& widths, const Gradients& g, int64_t t, int64_t i, int64_t n, const F& f) {
  const void* used[kMaxBits];
  int64_t count = 0;
  for (int64_t j = 0; j < widths.count; j++)
    if (const void* data = g.data[widths.at(j, t)]) used[count++] = data;
  auto as_stored = [&](auto element) {
    using G = decltype(element);
    const G* each[kSummed];
    for (int64_t j = 0; j < kSummed; j++) each[j] = j < count ? static_cast<const G*>(used[j]) + i : minus_zeros<G>();
    f(each);
  };
  if (count >= 1 && count <= kSummed) {
    if (g.type == native<A>()) return as_stored(A());
    if constexpr (sizeof(A) == 4) {
      if (g.type == Storage::bf16) return as_stored(BFloat16());
    }
  }
  A sum[kBlock], buffer[kBlock];
  std::fill(sum, sum + n, count ? A(-0.0) : A(0));
  for (int64_t j = 0; j < count; j++) add_loop(load_block<A>(used[j], g.type, i, n, buffer), sum, n);
  const A* each[kSummed] = {sum, minus_zeros<A>(), minus_zeros<A>(), minus_zeros<A>()};
  f(each);
}

template <class A>
void add_scale_sums(const Widths& widths, const Gradients& g, const Row<A>& r, int64_t t, int64_t i, int64_t n,
                    ScaleSums& sums) {
  const List& list = widths.list;
  A codes[kBlock], inner[kBlock];
  with_source<A>(list.data[t], list.type, i, n, [&](const auto* w) {
    code_loop<false>(w, codes, n, r.p, widths.rule, widths.tanh);
    widths.tanh ? inner_loop<true>(w, inner, n, r.p) : inner_loop<false>(w, inner, n, r.p);
  });
  for (int64_t j = 0; j < widths.count; j++)
    if (const void* data = g.data[widths.at(j, t)])
      with_source<A>(data, g.type, i, n, [&](const auto* v) { scale_loop(codes, inner, v, n, r.width[j], sums); });
}

template <class A>
void backward_into(const Widths& widths, const Gradients& g, bool covered, const Targets& out,
                   const std::vector<A*>& grad_scale, const std::vector<A*>& grad_out_scale) {
  const List& list = widths.list;
  const bool own_out = !grad_out_scale.empty();
  std::vector<double> of_scale(list.chunks.size(), 0), of_out_scale(list.chunks.size(), 0);
  for_chunks(list.chunks, [&](int64_t chunk) {
    const Chunk& c = list.chunks[chunk];
    const int64_t t = c.tensor;
    for_rows(c, list.rows[t], [&](int64_t row, int64_t begin, int64_t end) {
      const Row<A> r(widths, t, row);
      ScaleSums sums;
      for (int64_t i = begin; i < end; i += kBlock) {
        const int64_t n = std::min(kBlock, end - i);
        with_gradients<A>(widths, g, t, i, n, [&](const auto* const* gradients) {
          auto write = [&](const auto* w) {
            with_target<A>(out.data[t], out.type, i, n, out.streaming, [&](auto* y, bool streaming) {
              if constexpr (std::is_same_v<decltype(*w), std::add_const_t<std::remove_reference_t<decltype(*y)>>&>) {
                if (covered)
                  grad_loop<kCovered>(w, gradients, y, streaming, n, r.p);
                else if (widths.tanh)
                  grad_loop<kTanhInside>(w, gradients, y, streaming, n, r.p);
                else
                  grad_loop<kInside>(w, gradients, y, streaming, n, r.p);
              } else {
                __builtin_unreachable();  // the result always has the dtype of w
              }
            });
          };
          with_source<A>(list.data[t], list.type, i, n, write);
        });
        if (!grad_scale.empty()) add_scale_sums<A>(widths, g, r, t, i, n, sums);
      }
      if (grad_scale.empty()) return;
      const double s = own_out ? -sums.inner : sums.level - sums.inner;
      if (row_in_parts(list.rows[t])) {
        of_scale[chunk] = s;
        of_out_scale[chunk] = sums.level;
      } else {
        grad_scale[t][row] = A(s);
        if (own_out) grad_out_scale[t][row] = A(sums.level);
      }
    });
    end_streaming();
  });
  if (!grad_scale.empty()) add_parts(list, of_scale, grad_scale);
  if (own_out) add_parts(list, of_out_scale, grad_out_scale);
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
