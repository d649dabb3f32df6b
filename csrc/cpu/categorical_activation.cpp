// Family `categorical_activation` on CPU: the ops of quantops/library.py, over the blocks of one tensor.
#include <memory>
#include <numeric>
#include <tuple>

#include "cpu/categorical_activation_loops.h"
#include "cpu/list.h"

namespace quantops {
namespace {

// The arguments of both ops, checked: `list` has the one tensor whose layout the results have.
struct Problem {
  List list;
  Levels levels;
  const void* sigma;
};

template <class A>
void check_values(const Problem& p) {
  const A alpha = *static_cast<const A*>(p.list.scale[0]), sigma = *static_cast<const A*>(p.sigma);
  QUANTOPS_CHECK(valid_alpha(alpha), "alpha: expected a finite value > 0 whose inverse is finite, got ", alpha);
  QUANTOPS_CHECK(valid_width(sigma), "sigma: expected a finite value > 0, got ", sigma);
}

Problem make_problem(const Tensor& t, ScalarType acc, const Tensor& alpha, const Tensor& sigma, const Tensor& bits,
                     int64_t grad_of) {
  QUANTOPS_CHECK(grad_of == kOfWinner || grad_of == kOfSoft, "grad_of: expected 0 or 1, got ", grad_of);
  Problem p;
  p.list = make_list({t}, acc == ScalarType::Double);
  p.list.parameters = {check_per_weight("alpha", alpha, 1, acc, t), check_per_weight("sigma", sigma, 1, acc, t),
                       check_per_weight("bits", bits, 1, ScalarType::Int, t)};
  p.list.scale.push_back(p.list.parameters[0].data_ptr());
  p.sigma = p.list.parameters[1].data_ptr();
  const int32_t n = *static_cast<const int32_t*>(p.list.parameters[2].data_ptr());
  QUANTOPS_CHECK(n >= 0 && n <= kMaxSoftBits, "bits: expected 0..", kMaxSoftBits, ", got ", n);
  p.list.is_double ? check_values<double>(p) : check_values<float>(p);
  p.levels = make_levels(static_cast<const float*>(nullptr), -1, n, kMaxSoftBits, false);
  p.list.rows.push_back({1, t.numel()});
  p.list.chunks = make_chunks(p.list.rows);
  return p;
}

template <class A>
Bins<A> bins_of(const Problem& p) {
  return make_bins(*static_cast<const A*>(p.list.scale[0]), *static_cast<const A*>(p.sigma), p.levels);
}

// Calls f(chunk, begin, n) for all blocks, on all threads.
template <class F>
void for_blocks(const List& list, const F& f) {
  for_chunks(list.chunks, [&](int64_t chunk) {
    const Chunk& c = list.chunks[chunk];
    for (int64_t i = c.begin; i < c.end; i += kBlock) f(chunk, i, std::min(kBlock, c.end - i));
    end_streaming();
  });
}

// --- forward ---------------------------------------------------------------------------------------------------

// Whether the loops see q as it is stored.
template <class A>
bool stored_by_loops(Storage t) {
  return t == native<A>() || (sizeof(A) == 4 && t == Storage::bf16);
}

template <class A>
void forward_into(const Problem& p, const Targets& q, uint8_t* quarters) {
  const Bins<A> bins = bins_of<A>(p);
  const void* x = p.list.data[0];
  for_blocks(p.list, [&](int64_t, int64_t i, int64_t n) {
    uint8_t k[kBlock + kQuarters];
    if (stored_by_loops<A>(q.type)) {
      with_source<A>(x, p.list.type, i, n, [&](const auto* from) {
        with_target<A>(q.data[0], q.type, i, n, q.streaming, [&](auto* to, bool streaming) {
          categorical_activation_loop(from, to, k, streaming, n, bins, A(-2), A(1));
        });
      });
    } else {
      A in[kBlock], value[kBlock];
      const A* from = load_block<A>(x, p.list.type, i, n, in);
      categorical_activation_loop(from, value, k, false, n, bins, A(-2), A(1));
      store_block<A>(q.data[0], q.type, i, n, false, value);
      quarter_loop(from, load_block<A>(q.data[0], q.type, i, n, value), k, n, bins, A(-2), A(1));
    }
    std::fill(k + n, k + n + (-n & (kQuarters - 1)), uint8_t(0));
    join_quarters_loop(k, quarters + i / kQuarters, quarter_bytes(n));
  });
}

std::tuple<Tensor, Tensor> categorical_activation(Tensor x, Tensor alpha, Tensor sigma, Tensor bits, int64_t grad_of,
                                                  ScalarType dtype) {
  check_float("dtype", dtype);
  const Problem p = make_problem(x, acc_type(check_list("x", {x}, kFloats)), alpha, sigma, bits, grad_of);
  Tensor q = empty_like(p.list.w[0], dtype), quarters = empty_vector(quarter_bytes(x.numel()), ScalarType::Byte, x);
  uint8_t* to = static_cast<uint8_t*>(quarters.data_ptr());
  p.list.is_double ? forward_into<double>(p, targets({q}, p.list), to)
                   : forward_into<float>(p, targets({q}, p.list), to);
  return {q, quarters};
}

// --- backward --------------------------------------------------------------------------------------------------

// A row for every place that q and quarters can name.
template <class A>
struct FactorTable {
  alignas(64) A row[kMostPlaces * kRow];
};

template <class A>
void fill_table(FactorTable<A>& table, const Problem& p, const Bins<A>& bins, bool soft) {
  const int count = places_of(p.levels);
  A x[kTablePart];
  const OneInterval<A> one = make_one_interval(bins);
  const int reach = soft_reach(p.levels, static_cast<const A*>(nullptr), bins.beta);
  std::vector<A> decay(reach + 1);
  if (soft)
    for (int n = 0; n <= reach; n++) decay[n] = exponential(-bins.beta * A(n));
  for (int first = 0; first < count; first += kTablePart) {
    const int n = std::min<int>(kTablePart, count - first);
    for (int i = 0; i < n; i++) x[i] = middle_of(first + i, count, bins.alpha);
    A* rows = table.row + kRow * first;
    if (soft)
      soft_factor_loop(x, rows, n, decay.data(), reach, A(one_minus_exp(double(bins.beta))), bins);
    else
      for (int i = 0; i < n; i++) put_row(rows + kRow * i, winner_factors_at(x[i], bins, one));
  }
}

constexpr int64_t kSumPart = 256;  // elements whose sums are taken in the dtype of the arithmetic

template <class A>
void backward_into(const Problem& p, const Tensor& grad, const uint8_t* quarters, bool soft, const Targets& out,
                   A* grad_alpha, A* grad_sigma) {
  const Bins<A> bins = bins_of<A>(p);
  const auto table = std::make_unique<FactorTable<A>>();
  fill_table(*table, p, bins, soft);
  const Storage g_type = storage(grad);
  const void* g_data = grad.data_ptr();
  std::vector<double> alpha_parts(p.list.chunks.size(), 0), sigma_parts(p.list.chunks.size(), 0);
  for_blocks(p.list, [&](int64_t chunk, int64_t i, int64_t n) {
    uint8_t k[kBlock + kQuarters];
    int32_t place[kBlock];
    A gradient[kBlock];
    split_quarters_loop(quarters + i / kQuarters, k, quarter_bytes(n));
    with_source<A>(p.list.data[0], p.list.type, i, n, [&](const auto* q) { place_loop(q, k, place, n, bins); });
    const A* g = load_block<A>(g_data, g_type, i, n, gradient);
    with_block<A>(out.data[0], out.type, i, n, out.streaming, [&](A* y) {
      for (int64_t at = 0; at < n; at += kSumPart) {
        A sums[4][kRow];
        factor_loop(table->row, place + at, g + at, y + at, std::min(kSumPart, n - at), sums);
        for (const A* s : sums) {
          alpha_parts[chunk] += s[1];
          sigma_parts[chunk] += s[2];
        }
      }
    });
  });
  if (!grad_alpha) return;
  *grad_alpha = A(std::accumulate(alpha_parts.begin(), alpha_parts.end(), 0.0));
  *grad_sigma = A(std::accumulate(sigma_parts.begin(), sigma_parts.end(), 0.0));
}

std::tuple<Tensor, Tensors> categorical_activation_backward(Tensor grad, Tensor q, Tensor quarters, Tensor alpha,
                                                            Tensor sigma, Tensor bits, int64_t grad_of, bool scale_grad,
                                                            ScalarType dtype) {
  check_float("dtype", dtype);
  check_dense("q", q, "as the forward pass gives it");
  const Problem p = make_problem(q, acc_type(dtype), alpha, sigma, bits, grad_of);
  check_like("grad", {grad}, {q}, kFloats);
  const Tensor packed = check_per_weight("quarters", quarters, quarter_bytes(q.numel()), ScalarType::Byte, q);
  const Tensor grad_x = empty_like(q, dtype), g = in_layout_of(grad, q);
  Tensors sums;
  if (scale_grad) sums = {torch::stable::empty_like(alpha), torch::stable::empty_like(sigma)};
  auto run = [&](auto zero) {
    using A = decltype(zero);
    backward_into<A>(p, g, static_cast<const uint8_t*>(packed.data_ptr()), grad_of == kOfSoft,
                     targets({grad_x}, p.list), scale_grad ? static_cast<A*>(sums[0].data_ptr()) : nullptr,
                     scale_grad ? static_cast<A*>(sums[1].data_ptr()) : nullptr);
  };
  p.list.is_double ? run(0.0) : run(0.0f);
  return {grad_x, sums};
}

}  // namespace
}  // namespace quantops

STABLE_TORCH_LIBRARY_IMPL(quantops, CPU, m) {
  m.impl("categorical_activation", TORCH_BOX(&quantops::categorical_activation));
  m.impl("categorical_activation_backward", TORCH_BOX(&quantops::categorical_activation_backward));
}
