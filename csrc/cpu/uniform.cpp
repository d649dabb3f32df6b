// Family `uniform` on CPU: the ops of quantops/library.py over lists of weights.
#include <cmath>
#include <limits>

#include "cpu/list.h"
#include "cpu/uniform_loops.h"
#include "grid_argument.h"

namespace quantops {
namespace {

// --- absmax, absmean -------------------------------------------------------------------------------------------

uint64_t absmax_bits(const void* w, Storage type, int64_t i, int64_t n) {
  const char* from = static_cast<const char*>(w) + i * item_size(type);
  if (type == Storage::f64) return absmax_loop<uint64_t>(from, n);
  return type == Storage::f32 ? absmax_loop<uint32_t>(from, n) : absmax_loop<uint16_t>(from, n);
}

template <class A>
A value_of(uint64_t bits, Storage type) {
  A buffer[kBlock];
  return *load_block<A>(&bits, type, 0, 1, buffer);  // the low bytes come first
}

// mean|w| of elements [begin, end) whose sum is past the largest number.
template <class A>
A scaled_mean(const void* w, Storage type, int64_t begin, int64_t end) {
  double sum = 0;
  A buffer[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = std::min(kBlock, end - i);
    const A* x = load_block<A>(w, type, i, n, buffer);
    for (int64_t j = 0; j < n; j++) sum += std::fabs(double(x[j])) * 0x1p-64;
  }
  return A(sum / double(end - begin) * 0x1p64);
}

template <class A>
Tensor reduce_abs(List& list, bool mean) {
  std::vector<int64_t> first;  // of each weight in the result
  int64_t count = 0;
  for (const Rows& r : list.rows) {
    first.push_back(count);
    count += r.rows;
  }
  Tensor out = empty_vector(count, acc_type(list.is_double), list.w[0]);
  A* result = static_cast<A*>(out.data_ptr());
  std::fill(result, result + count, A(0));
  struct Part {
    uint64_t most = 0;
    double sum = 0;
  };
  std::vector<Part> parts(list.chunks.size());
  auto finish = [&](const Part& p, int64_t t, int64_t row) {
    if (!mean) return value_of<A>(p.most, list.type);
    const int64_t n = list.rows[t].inner;
    const A value = A(p.sum / double(n));
    return value > std::numeric_limits<A>::max() ? scaled_mean<A>(list.data[t], list.type, row * n, row * n + n)
                                                 : value;
  };
  for_chunks(list.chunks, [&](int64_t chunk) {
    const Chunk& c = list.chunks[chunk];
    const Rows& rows = list.rows[c.tensor];
    for_rows(c, rows, [&](int64_t row, int64_t begin, int64_t end) {
      Part part;
      for (int64_t i = begin; i < end; i += kBlock) {
        int64_t n = std::min(kBlock, end - i);
        if (mean)
          with_source<A>(list.data[c.tensor], list.type, i, n,
                         [&](const auto* w) { part.sum += abs_sum_loop<A>(w, n); });
        else
          part.most = std::max(part.most, absmax_bits(list.data[c.tensor], list.type, i, n));
      }
      if (row_in_parts(rows))
        parts[chunk] = part;
      else
        result[first[c.tensor] + row] = finish(part, c.tensor, row);
    });
  });
  for (size_t i = 0; i < list.chunks.size();) {  // rows in parts: their chunks follow one another
    const Chunk& c = list.chunks[i];
    const Rows& rows = list.rows[c.tensor];
    if (!row_in_parts(rows)) {
      i++;
      continue;
    }
    int64_t row = c.begin / rows.inner;
    Part total;
    for (; i < list.chunks.size() && list.chunks[i].tensor == c.tensor && list.chunks[i].begin / rows.inner == row;
         i++) {
      total.most = std::max(total.most, parts[i].most);
      total.sum += parts[i].sum;
    }
    result[first[c.tensor] + row] = finish(total, c.tensor, row);
  }
  return out;
}

Tensor reduce_abs(const Tensors& w, bool per_row, bool mean) {
  bool is_double = is_double_list(w);
  List list = make_list(w, is_double);
  for (size_t i = 0; i < w.size(); i++) {
    QUANTOPS_CHECK(!per_row || w[i].dim(), entry_name("w", i, w.size()), ": expected at least one dimension, got none");
    list.rows.push_back(rows_of(w[i], per_row));
  }
  list.chunks = make_chunks(list.rows);
  return is_double ? reduce_abs<double>(list, mean) : reduce_abs<float>(list, mean);
}

Tensor absmax(Tensors w, bool per_row) { return reduce_abs(w, per_row, false); }
Tensor absmean(Tensors w, bool per_row) { return reduce_abs(w, per_row, true); }

// Either, as a function of the weights whose gradient is in own_scale.cpp.
Tensor own_scale(Tensors w, bool per_row, bool mean) { return reduce_abs(w, per_row, mean); }

// --- forward ---------------------------------------------------------------------------------------------------

template <class A>
void round_clamp_into(const List& list, GridKind grid, bool is_signed, bool covered, const Targets& q) {
  for_blocks<A>(list, grid, is_signed, [&](int64_t, int64_t t, int64_t, int64_t i, int64_t end, const Quantizer<A>& p) {
    with_source<A>(list.data[t], list.type, i, end - i, [&](const auto* w) {
      with_target<A>(q.data[t], q.type, i, end - i, q.streaming,
                     [&](auto* y, bool streaming) { quantize_loop(w, y, streaming, end - i, p, covered); });
    });
  });
}

void round_clamp_out(Tensors w, Tensors scale, Tensor bits, int64_t grid_index, bool is_signed, Tensors q) {
  bool is_double = is_double_list(w);
  const GridKind grid = check_grid(grid_index, is_signed);
  List list = make_list(w, scale, bits, nullptr, is_double, grid);
  check_results("q", q, list.w, kFloats);
  check_own_memory({{"out", q}}, {w, scale, {bits}});
  is_double ? round_clamp_into<double>(list, grid, is_signed, false, targets(q, list))
            : round_clamp_into<float>(list, grid, is_signed, false, targets(q, list));
}

Tensors round_clamp(Tensors w, Tensors scale, Tensor bits, int64_t grid_index, bool is_signed, bool covered,
                    ScalarType dtype) {
  bool is_double = is_double_list(w);
  check_float("dtype", dtype);
  const GridKind grid = check_grid(grid_index, is_signed);
  List list = make_list(w, scale, bits, nullptr, is_double, grid);
  Tensors q = empty_like(list.w, dtype);
  is_double ? round_clamp_into<double>(list, grid, is_signed, covered, targets(q, list))
            : round_clamp_into<float>(list, grid, is_signed, covered, targets(q, list));
  return q;
}

// q may be null: the sums alone.
template <class A>
void msq_into(const List& list, GridKind grid, bool covered, const Targets* q, A* penalty, int64_t* nonzero,
              A* sq_error) {
  std::vector<LsbSums> parts(list.chunks.size());
  for_blocks<A>(list, grid, true,
                [&](int64_t chunk, int64_t t, int64_t, int64_t i, int64_t end, const Quantizer<A>& p) {
                  with_source<A>(list.data[t], list.type, i, end - i, [&](const auto* w) {
                    if (!q)
                      return msq_loop(w, static_cast<Nothing*>(nullptr), false, end - i, p, covered, parts[chunk]);
                    with_target<A>(q->data[t], q->type, i, end - i, q->streaming, [&](auto* y, bool streaming) {
                      msq_loop(w, y, streaming, end - i, p, covered, parts[chunk]);
                    });
                  });
                });
  std::vector<LsbSums> sums(list.size());
  for (size_t i = 0; i < parts.size(); i++) {
    LsbSums& s = sums[list.chunks[i].tensor];
    s.penalty += parts[i].penalty;
    s.nonzero += parts[i].nonzero;
    s.sq_error += parts[i].sq_error;
  }
  for (int64_t t = 0; t < list.size(); t++) {
    penalty[t] = A(sums[t].penalty * (grid == kFull ? 2 : 1));
    nonzero[t] = sums[t].nonzero;
    sq_error[t] = A(sums[t].sq_error);
  }
}

void msq_into(const List& list, GridKind grid, bool covered, const Tensors& q, const Tensor& penalty,
              const Tensor& nonzero, const Tensor& sq_error) {
  Targets to;
  if (!q.empty()) to = targets(q, list);
  int64_t* count = static_cast<int64_t*>(nonzero.data_ptr());
  if (list.is_double)
    msq_into<double>(list, grid, covered, q.empty() ? nullptr : &to, static_cast<double*>(penalty.data_ptr()), count,
                     static_cast<double*>(sq_error.data_ptr()));
  else
    msq_into<float>(list, grid, covered, q.empty() ? nullptr : &to, static_cast<float*>(penalty.data_ptr()), count,
                    static_cast<float*>(sq_error.data_ptr()));
}

using Sums = std::tuple<Tensor, Tensor, Tensor>;

Sums empty_sums(const List& list) {
  ScalarType acc = acc_type(list.is_double);
  return {empty_vector(list.size(), acc, list.w[0]), empty_vector(list.size(), ScalarType::Long, list.w[0]),
          empty_vector(list.size(), acc, list.w[0])};
}

void msq_out(Tensors w, Tensors scale, Tensor bits, Tensor k, int64_t grid_index, Tensors q, Tensor penalty,
             Tensor nonzero, Tensor sq_error) {
  bool is_double = is_double_list(w);
  const GridKind grid = check_grid(grid_index);
  List list = make_list(w, scale, bits, &k, is_double, grid);
  check_results("q", q, list.w, kFloats);
  ScalarType acc = acc_type(is_double);
  check_result("penalty", penalty, list.size(), acc, w[0]);
  check_result("nonzero", nonzero, list.size(), ScalarType::Long, w[0]);
  check_result("sq_error", sq_error, list.size(), acc, w[0]);
  check_own_memory({{"out", q}, {"penalty", {penalty}}, {"nonzero", {nonzero}}, {"sq_error", {sq_error}}},
                   {w, scale, {bits, k}});
  msq_into(list, grid, false, q, penalty, nonzero, sq_error);
}

std::tuple<Tensors, Tensor, Tensor, Tensor> msq(Tensors w, Tensors scale, Tensor bits, Tensor k, int64_t grid_index,
                                                bool covered, ScalarType dtype) {
  bool is_double = is_double_list(w);
  check_float("dtype", dtype);
  const GridKind grid = check_grid(grid_index);
  List list = make_list(w, scale, bits, &k, is_double, grid);
  Tensors q = empty_like(list.w, dtype);
  auto [penalty, nonzero, sq_error] = empty_sums(list);
  msq_into(list, grid, covered, q, penalty, nonzero, sq_error);
  return {q, penalty, nonzero, sq_error};
}

Sums lsb_stats(Tensors w, Tensors scale, Tensor bits, Tensor k, int64_t grid_index, bool covered) {
  const GridKind grid = check_grid(grid_index);
  List list = make_list(w, scale, bits, &k, is_double_list(w), grid);
  Sums sums = empty_sums(list);
  msq_into(list, grid, covered, {}, std::get<0>(sums), std::get<1>(sums), std::get<2>(sums));
  return sums;
}

// --- integers --------------------------------------------------------------------------------------------------

// f(w block, result block, whether to stream it, n, quantizer)
template <class A, class F>
void integers_into(const List& list, GridKind grid, bool is_signed, const Tensors& out, const F& f) {
  const Targets to = targets(out, list);
  for_blocks<A>(list, grid, is_signed, [&](int64_t, int64_t t, int64_t, int64_t i, int64_t end, const Quantizer<A>& p) {
    int32_t* result = static_cast<int32_t*>(to.data[t]) + i;
    const bool streaming = to.streaming && reinterpret_cast<intptr_t>(result) % 16 == 0;
    with_source<A>(list.data[t], list.type, i, end - i, [&](const auto* w) { f(w, result, streaming, end - i, p); });
  });
}

// f(A{}) with the arithmetic dtype of a list.
template <class F>
void with_arithmetic(bool is_double, const F& f) {
  is_double ? f(0.0) : f(0.0f);
}

Tensors lsb(Tensors w, Tensors scale, Tensor bits, Tensor k, int64_t grid_index) {
  bool is_double = is_double_list(w);
  const GridKind grid = check_grid(grid_index);
  List list = make_list(w, scale, bits, &k, is_double, grid);
  Tensors out = empty_like(list.w, ScalarType::Int);
  with_arithmetic(is_double, [&](auto zero) {
    integers_into<decltype(zero)>(list, grid, true, out, [](const auto&... args) { lsb_loop(args...); });
  });
  return out;
}

Tensors encode(Tensors w, Tensors scale, Tensor bits, int64_t rule, int64_t grid_index, bool is_signed) {
  bool is_double = is_double_list(w);
  check_rule(rule);
  const GridKind grid = check_grid(grid_index, is_signed, rule);
  List list = make_list(w, scale, bits, nullptr, is_double, grid);
  Tensors out = empty_like(list.w, ScalarType::Int);
  with_arithmetic(is_double, [&](auto zero) {
    integers_into<decltype(zero)>(list, grid, is_signed, out, [&](const auto&... args) {
      if (rule == kRoundClamp)
        encode_loop<kRoundClamp>(args...);
      else if (rule == kFloor)
        encode_loop<kFloor>(args...);
      else
        encode_loop<kNearest>(args...);
    });
  });
  return out;
}

template <class A>
void decode_into(const List& list, GridKind grid, bool is_signed, const Targets& q) {
  std::vector<char> outside(list.chunks.size(), false);
  for_blocks<A>(list, grid, is_signed,
                [&](int64_t chunk, int64_t t, int64_t, int64_t i, int64_t end, const Quantizer<A>& p) {
                  const int32_t* codes = static_cast<const int32_t*>(list.data[t]) + i;
                  outside[chunk] |= union_loop(codes, end - i) >= static_cast<uint32_t>(p.count);
                  with_target<A>(q.data[t], q.type, i, end - i, q.streaming,
                                 [&](auto* y, bool streaming) { decode_loop(codes, y, streaming, end - i, p); });
                });
  for (size_t i = 0; i < outside.size(); i++) {
    if (!outside[i]) continue;
    const Chunk& at = list.chunks[i];
    const int32_t* codes = static_cast<const int32_t*>(list.data[at.tensor]);
    const int64_t n = code_bits(list.bits[at.tensor], grid);
    const int32_t* bad = std::find_if(codes + at.begin, codes + at.end, [n](int32_t c) { return c < 0 || c >> n; });
    fail(entry_name("codes", at.tensor, list.size()), ": expected values in 0..2^", n, " - 1, got ", *bad);
  }
}

Tensors decode(Tensors codes, Tensors scale, Tensor bits, int64_t grid_index, bool is_signed, ScalarType dtype) {
  check_list("codes", codes, {ScalarType::Int});
  check_list("scale", scale, {ScalarType::Float, ScalarType::Double});
  check_float("dtype", dtype);
  bool is_double = scale[0].scalar_type() == ScalarType::Double;
  const GridKind grid = check_grid(grid_index, is_signed);
  List list = make_list(codes, scale, bits, nullptr, is_double, grid);
  Tensors q = empty_like(list.w, dtype);
  is_double ? decode_into<double>(list, grid, is_signed, targets(q, list))
            : decode_into<float>(list, grid, is_signed, targets(q, list));
  return q;
}

// --- backward --------------------------------------------------------------------------------------------------

template <class A>
constexpr A kZeros[kBlock] = {};  // the gradient of q where there is none

template <class A>
void backward_into(const List& list, const Tensors& grad, const A* penalty, GridKind grid, bool is_signed,
                   const Targets& out, const std::vector<A*>& grad_scale) {
  std::vector<const void*> g_data;
  for (const Tensor& g : grad) g_data.push_back(g.data_ptr());
  Storage g_type = grad.empty() ? native<A>() : storage(grad[0]);
  std::vector<double> parts(list.chunks.size(), 0);
  for_chunks(list.chunks, [&](int64_t chunk) {
    const Chunk& c = list.chunks[chunk];
    const int64_t t = c.tensor;
    for_rows(c, list.rows[t], [&](int64_t row, int64_t begin, int64_t end) {
      const Quantizer<A> p = quantizer<A>(list, t, row, grid, is_signed);
      double sum = 0;
      for (int64_t i = begin; i < end; i += kBlock) {
        int64_t n = std::min(kBlock, end - i);
        auto run = [&](const auto* w, const auto* g) {
          with_target<A>(out.data[t], out.type, i, n, out.streaming, [&](auto* y, bool streaming) {
            if constexpr (std::is_same_v<decltype(*w), std::add_const_t<std::remove_reference_t<decltype(*y)>>&>) {
              if (penalty)
                grad_penalty_loop(w, g, y, streaming, n, p, penalty[t]);
              else if (grad_scale.empty())
                grad_loop(w, g, y, streaming, n, p);
              else
                sum += grad_and_scale_loop(w, g, y, streaming, n, p);
            } else {
              __builtin_unreachable();  // the result always has the dtype of w
            }
          });
          if (penalty && !grad_scale.empty()) sum += scale_grad_loop(w, g, n, p);
        };
        with_source<A>(list.data[t], list.type, i, n, [&](const auto* w) {
          if (grad.empty())
            run(w, kZeros<A>);
          else
            with_source<A>(g_data[t], g_type, i, n, [&](const auto* g) { run(w, g); });
        });
      }
      if (grad_scale.empty()) return;
      if (row_in_parts(list.rows[t]))
        parts[chunk] = sum;
      else
        grad_scale[t][row] = A(sum);
    });
    end_streaming();
  });
  if (!grad_scale.empty()) add_parts(list, parts, grad_scale);
}

std::tuple<Tensors, Tensors> uniform_backward(Tensors grad, std::optional<Tensor> grad_penalty, Tensors w,
                                              Tensors scale, Tensor bits, Tensor k, int64_t grid_index, bool is_signed,
                                              bool scale_grad) {
  bool is_double = is_double_list(w);
  const GridKind grid = check_grid(grid_index, is_signed);
  List list = make_list(w, scale, bits, &k, is_double, grid);
  Tensors g;
  if (scale_grad) check_count("scale", scale, w);  // one for all is a constant
  if (!grad.empty()) check_like("grad", grad, w, kFloats);
  for (size_t i = 0; i < grad.size(); i++) g.push_back(in_layout_of(grad[i], list.w[i]));
  Tensor penalty = w[0];
  if (grad_penalty) penalty = check_per_weight("grad_penalty", *grad_penalty, list.size(), acc_type(is_double), w[0]);
  Tensors out = empty_like(list.w, w[0].scalar_type()), out_scale;
  if (scale_grad)
    for (const Tensor& s : scale) out_scale.push_back(torch::stable::empty_like(s));
  with_arithmetic(is_double, [&](auto zero) {
    using A = decltype(zero);
    std::vector<A*> s;
    for (size_t i = 0; i < out_scale.size(); i++) {
      s.push_back(static_cast<A*>(out_scale[i].data_ptr()));
      std::fill(s[i], s[i] + out_scale[i].numel(), A(0));
    }
    backward_into<A>(list, g, grad_penalty ? static_cast<const A*>(penalty.data_ptr()) : nullptr, grid, is_signed,
                     targets(out, list), s);
  });
  return {out, out_scale};
}

template <class A>
void add_lsb_grad_into(const List& list, GridKind grid, const Targets& to, const A* strength) {
  for_blocks<A>(list, grid, true, [&](int64_t, int64_t t, int64_t, int64_t i, int64_t end, const Quantizer<A>& p) {
    with_source<A>(list.data[t], list.type, i, end - i, [&](const auto* w) {
      if (to.type == native<A>()) return add_lsb_grad_loop(w, static_cast<A*>(to.data[t]) + i, end - i, p, strength[t]);
      if constexpr (sizeof(A) == 4) {
        if (to.type == Storage::bf16)
          return add_lsb_grad_loop(w, static_cast<BFloat16*>(to.data[t]) + i, end - i, p, strength[t]);
      }
      A g[kBlock];
      load_block<A>(to.data[t], to.type, i, end - i, g);
      add_lsb_grad_loop(w, g, end - i, p, strength[t]);
      store_block<A>(to.data[t], to.type, i, end - i, false, g);
    });
  });
}

void add_lsb_grad_(Tensors grad, Tensors w, Tensors scale, Tensor bits, Tensor k, int64_t grid_index, Tensor strength) {
  bool is_double = is_double_list(w);
  const GridKind grid = check_grid(grid_index);
  List list = make_list(w, scale, bits, &k, is_double, grid);
  check_results("grad", grad, list.w, kFloats);
  check_result("strength", strength, list.size(), acc_type(is_double), w[0]);
  check_own_memory({{"grad", grad}}, {w, scale, {bits, k, strength}});
  if (is_double)
    add_lsb_grad_into(list, grid, targets(grad, list), static_cast<const double*>(strength.data_ptr()));
  else
    add_lsb_grad_into(list, grid, targets(grad, list), static_cast<const float*>(strength.data_ptr()));
}

}  // namespace
}  // namespace quantops

STABLE_TORCH_LIBRARY_IMPL(quantops, CPU, m) {
  m.impl("absmax", TORCH_BOX(&quantops::absmax));
  m.impl("absmean", TORCH_BOX(&quantops::absmean));
  m.impl("own_scale", TORCH_BOX(&quantops::own_scale));
  m.impl("round_clamp", TORCH_BOX(&quantops::round_clamp));
  m.impl("round_clamp_out", TORCH_BOX(&quantops::round_clamp_out));
  m.impl("msq", TORCH_BOX(&quantops::msq));
  m.impl("msq_out", TORCH_BOX(&quantops::msq_out));
  m.impl("lsb", TORCH_BOX(&quantops::lsb));
  m.impl("lsb_stats", TORCH_BOX(&quantops::lsb_stats));
  m.impl("uniform_backward", TORCH_BOX(&quantops::uniform_backward));
  m.impl("add_lsb_grad_", TORCH_BOX(&quantops::add_lsb_grad_));
  m.impl("encode", TORCH_BOX(&quantops::encode));
  m.impl("decode", TORCH_BOX(&quantops::decode));
}
