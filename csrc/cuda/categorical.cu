// Family `categorical` on CUDA: the ops of quantops/library.py over lists of tensors, one launch each; one more where
// hard classes have gates, where the sums of scales come from many items, and where gradients of gates are wanted. What
// happens to an element is in csrc/categorical_*.h, the kernels are in categorical_*.cuh, how a list is walked in
// table.cuh. Values on the GPU are never read back: those out of range give NaN for that tensor.
#include <optional>
#include <tuple>

#include "categorical_backward.cuh"

namespace quantops::cuda {
namespace {

// A list of tensors with its widths, bits and gates, checked and in the shape that kernels take.
struct Problem {
  Tensors x, kept;  // x dense
  ScalarType dtype, acc;
  Mode mode;
  bool soft, has_gates;
  int64_t most_gates = 0;
  Source source;
  std::vector<CategoricalEntry> entries;

  Problem(const Tensors& tensors, const Tensors& alpha, const Tensors& sigma, const Tensor& bits, const Tensors& gates,
          const std::optional<Tensor>& seed, int64_t mode_, int64_t grad_of, bool is_signed)
      : dtype(check_list("x", tensors, kFloats)), acc(acc_type(dtype)), has_gates(!gates.empty()) {
    QUANTOPS_CHECK(mode_ >= kHard && mode_ <= kSample, "mode: expected 0, 1 or 2, got ", mode_);
    QUANTOPS_CHECK(grad_of == kOfWinner || grad_of == kOfSoft, "grad_of: expected 0 or 1, got ", grad_of);
    mode = static_cast<Mode>(mode_);
    soft = mode == kSoft || grad_of == kOfSoft;
    const size_t count = tensors.size();
    check_scales(alpha, tensors, acc, "alpha");
    check_scales(sigma, tensors, acc, "sigma");
    if (has_gates) {
      check_list("gates", gates, {acc});
      QUANTOPS_CHECK(gates.size() == count, "gates: expected a list with one entry per tensor (", count, "), got ",
                     gates.size());
      QUANTOPS_CHECK(device_of(gates[0]) == device_of(tensors[0]), "gates: expected device ", device_name(tensors[0]),
                     ", where x is, got ", device_name(gates[0]));
    }
    kept.push_back(check_per_weight("bits", bits, static_cast<int64_t>(count), ScalarType::Int, tensors[0]));
    source = {static_cast<const int32_t*>(kept[0].data_ptr()), nullptr, soft ? kMaxSoftBits : kMaxBits, is_signed};
    if (mode == kSample) {
      QUANTOPS_CHECK(seed.has_value(), "seed: expected an int64 tensor of one element for mode sample, got none");
      kept.push_back(check_per_weight("seed", *seed, 1, ScalarType::Long, tensors[0]));
      source.seed = static_cast<const int64_t*>(kept[1].data_ptr());
    }
    x = dense(tensors);
    int64_t first = 0;
    for (size_t i = 0; i < count; ++i) {
      QUANTOPS_CHECK(alpha[i].numel() == sigma[i].numel(), entry_name("sigma", i, count),
                     ": expected as many elements as alpha (", alpha[i].numel(), "), got ", sigma[i].numel());
      const Rows r = rows_of(x[i], alpha[i]);
      CategoricalEntry e{};
      e.w = x[i].data_ptr();
      e.scale = alpha[i].data_ptr();
      e.sigma = sigma[i].data_ptr();
      e.rows = r.rows;
      e.inner = r.inner;
      e.first = first;
      e.gate_count = -1;
      first += x[i].numel();
      if (has_gates) {
        kept.push_back(gates[i].is_contiguous() ? gates[i] : torch::stable::contiguous(gates[i]));
        e.gates = kept.back().data_ptr();
        e.gate_count = gates[i].numel();
        most_gates = std::max(most_gates, e.gate_count);
      }
      entries.push_back(e);
    }
  }

  void write_to(const Tensors& out) {
    for (size_t i = 0; i < out.size(); ++i) entries[i].out = out[i].data_ptr();
  }

  // Where the T_t of hard classes with gates go, and the launch that computes them.
  template <class A>
  void make_bounds() {
    int64_t scales = 0, most_rows = 0;
    for (const CategoricalEntry& e : entries) {
      scales += e.rows;
      most_rows = std::max(most_rows, e.rows);
    }
    kept.push_back(empty_vector(scales * kMaxLevels, acc, x[0]));
    A* place = static_cast<A*>(kept.back().data_ptr());
    for (CategoricalEntry& e : entries) {
      e.bounds = place;
      place += e.rows * kMaxLevels;
    }
    if (most_rows == 0) return;
    constexpr int N = kLargeTable<CategoricalEntry>;
    OnDevice on(x[0]);
    for (size_t base = 0; base < entries.size(); base += N) {
      Table<N, CategoricalEntry> table;
      table.base = static_cast<int32_t>(base);
      table.count = static_cast<int32_t>(std::min<size_t>(N, entries.size() - base));
      std::copy_n(entries.begin() + base, table.count, table.entry);
      const dim3 blocks(static_cast<unsigned>((most_rows + 63) / 64), table.count);
      launch(on, bounds_kernel<A, N>, blocks, 64, table, source);
    }
  }
};

Tensors categorical(Tensors x, Tensors alpha, Tensors sigma, Tensor bits, std::optional<Tensors> gates,
                    std::optional<Tensor> seed, int64_t mode, int64_t grad_of, bool is_signed, ScalarType dtype) {
  check_float("dtype", dtype);
  Problem p(x, alpha, sigma, bits, gates.value_or(Tensors{}), seed, mode, grad_of, is_signed);
  const ScalarType written = reads_grad(p.dtype, dtype) ? dtype : p.acc;
  Tensors q = empty_like(p.x, written);
  p.write_to(q);
  with_float(p.dtype, [&](auto element) {
    using W = decltype(element);
    if (p.mode == kHard && p.has_gates) p.make_bounds<Acc<W>>();
    with_grad<W>(written, [&](auto out) {
      using O = decltype(out);
      if (p.mode == kSoft)
        run(p.x[0], p.entries, SoftValue<W, O>{{}, p.source});
      else if (p.mode == kSample)
        run(p.x[0], p.entries, Sample<W, O>{{}, p.source});
      else if (!p.has_gates)
        run(p.x[0], p.entries, Nearest<W, O>{{}, p.source});
      else if (p.most_gates <= 8)
        run(p.x[0], p.entries, Bounded<W, O, 7>{{}, p.source});
      else
        run(p.x[0], p.entries, Bounded<W, O, kMaxLevels - 1>{{}, p.source});
    });
  });
  if (written != dtype)
    for (Tensor& t : q) {
      Tensor converted = empty_like(t, dtype);
      torch::stable::copy_(converted, t);
      t = converted;
    }
  return q;
}

// Runs an op that also leaves sums for gates, then what adds those up.
template <class A, class Op>
void run_with_gates(const Problem& p, Op op) {
  OnDevice on(p.x[0]);
  for_tables(p.entries, [&](const auto& table, int64_t items) {
    const Tensor scratch = empty_vector(items * kMaxLevels * int64_t(sizeof(double)), ScalarType::Byte, p.x[0]);
    op.of_gates = static_cast<double*>(scratch.data_ptr());
    launch_with_sums(on, p.x[0], table, items, op, [&](const Op& o) { launch_items(on, table, items, o); });
    launch(on, gates_kernel<A, std::decay_t<decltype(table)>>, dim3(static_cast<unsigned>(table.count)), kGateThreads,
           table, p.source, static_cast<const double*>(op.of_gates));
  });
}

std::tuple<Tensors, Tensors, Tensors, Tensors> categorical_backward(Tensors grad, Tensors x, Tensors alpha,
                                                                    Tensors sigma, Tensor bits, Tensors gates,
                                                                    std::optional<Tensor> seed, int64_t mode,
                                                                    int64_t grad_of, bool is_signed, bool scale_grad,
                                                                    bool gate_grad) {
  Problem p(x, alpha, sigma, bits, gates, seed, mode, grad_of, is_signed);
  gate_grad = gate_grad && p.has_gates;
  const ScalarType given = check_like("grad", grad, p.x, kFloats);
  const ScalarType read = reads_grad(p.dtype, given) ? given : p.acc;
  Tensors grad_x = empty_like(p.x, p.dtype), grad_alpha, grad_sigma, grad_gates, laid_out;
  p.write_to(grad_x);
  for (size_t i = 0; i < x.size(); ++i) {
    CategoricalEntry& e = p.entries[i];
    laid_out.push_back(in_layout_of(given == read ? grad[i] : torch::stable::to(grad[i], read), p.x[i]));
    e.grad = laid_out[i].data_ptr();
    // The kernels that sum anything sum for alpha and sigma: results that are not wanted are dropped.
    grad_alpha.push_back(empty_like(alpha[i], p.acc));
    grad_sigma.push_back(empty_like(sigma[i], p.acc));
    e.result = grad_alpha[i].data_ptr();
    e.sigma_result = grad_sigma[i].data_ptr();
    if (gate_grad) {
      grad_gates.push_back(empty_vector(gates[i].numel(), p.acc, p.x[0]));
      e.gates_result = grad_gates[i].data_ptr();
    }
  }
  with_float(p.dtype, [&](auto element) {
    using W = decltype(element);
    using A = Acc<W>;
    if (!p.soft && p.mode == kHard && p.has_gates) p.make_bounds<A>();
    with_grad<W>(read, [&](auto grad_element) {
      using G = decltype(grad_element);
      const bool sample = p.mode == kSample;
      if (p.soft && gate_grad)
        run_with_gates<A>(p, SoftBackward<W, G, true>{{}, p.source});
      else if (p.soft)
        run(p.x[0], p.entries, SoftBackward<W, G, false>{{}, p.source});
      else if (gate_grad)
        run_with_gates<A>(p, WinnerMany<W, G, true>{{}, p.source, sample});
      else if (p.has_gates || sample)
        run(p.x[0], p.entries, WinnerMany<W, G, false>{{}, p.source, sample});
      else if (scale_grad)
        run(p.x[0], p.entries, WinnerOne<W, G, true>{{}, p.source});
      else
        run(p.x[0], p.entries, WinnerOne<W, G, false>{{}, p.source});
    });
  });
  if (!scale_grad) grad_alpha = grad_sigma = {};
  return {grad_x, grad_alpha, grad_sigma, grad_gates};
}

}  // namespace
}  // namespace quantops::cuda

QUANTOPS_REGISTER(QUANTOPS_KEY, m) {
  m.impl("categorical", TORCH_BOX(&quantops::cuda::categorical));
  m.impl("categorical_backward", TORCH_BOX(&quantops::cuda::categorical_backward));
}
