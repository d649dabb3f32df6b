// Family `uniform` on CUDA: the ops of quantops/library.py over lists of tensors, one launch each (two with many sums).
// What happens to an element is in csrc/quant_math.h, how a list is walked in table.cuh. Values on the GPU are never
// read back: bits, k or a scale out of range give NaN for that tensor (integers: kInvalid, a count: -1).
#include <optional>
#include <tuple>

#include "../grid_argument.h"
#include "magnitudes.cuh"
#include "table.cuh"

namespace quantops::cuda {
namespace {

// ---------------------------------------------------------------------------------------------- what an element does

// Where the quantizer of a scale comes from.
struct Source {
  const int32_t* bits;
  const int32_t* k;  // null: no LSBs
  GridKind grid;
  bool is_signed;

  template <class A>
  __device__ __forceinline__ Quantizer<A> get(const Entry& e, int64_t row, int which) const {
    return make_quantizer<A>(static_cast<const A*>(e.scale)[row], bits[which], k ? k[which] : 0, grid, is_signed);
  }
};

template <class W, class Out>
struct RoundClamp : OpBase {
  using X = W;
  using G = None;
  using O = Out;
  using State = Quantizer<Acc<W>>;
  Source source;

  __device__ __forceinline__ State begin(const Entry& e, int64_t row, int which) const {
    return source.get<Acc<W>>(e, row, which);
  }
  __device__ __forceinline__ O apply(X w, None, const State& p) const {
    auto c = round_clamp_code(round_clamp_unit(widen(w), p), p);
    return Narrow<O>::from(level(c, p) * p.step);
  }
};

// The low bits of a number: on kRounding they count integers, at no cost beside a conversion's.
__device__ __forceinline__ int32_t low_bits(float v) { return static_cast<int32_t>(__float_as_uint(v)); }
__device__ __forceinline__ int32_t low_bits(double v) { return static_cast<int32_t>(__double_as_longlong(v)); }

// Adds |b| to `sum` and 1 to `count` where b is a number but 0. Two instructions that are skipped, where the sum of
// `magnitude` and a comparison take five.
template <class A>
__device__ __forceinline__ void count_residual(A b, A& sum, int32_t& count) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(A) == 4) {
    asm("{\n.reg .pred other;\nsetp.ne.f32 other, %2, 0f00000000;\n@other add.rn.f32 %0, %0, %3;\n"
        "@other add.s32 %1, %1, 1;\n}"
        : "+f"(sum), "+r"(count)
        : "f"(b), "f"(fabsf(b)));
    return;
  }
#endif
  const A size = magnitude(b);
  sum += size;
  count += size != A(0);
}

// The sums of an item, and of a tensor. nonzero: -1 where bits, k or a scale are out of range.
struct Sums {
  double penalty, sq_error;
  int64_t nonzero;
};
struct AddSums {
  __device__ __forceinline__ Sums operator()(const Sums& a, const Sums& b) const {
    return {a.penalty + b.penalty, a.sq_error + b.sq_error, (a.nonzero | b.nonzero) < 0 ? -1 : a.nonzero + b.nonzero};
  }
};

// q and its sums; the sums alone where Out is None.
template <class W, class Out>
struct Msq : SumOp<Sums, AddSums, false> {
  static constexpr int64_t kItems = kMsqItems;
  static constexpr bool kWide = sizeof(Acc<W>) == 8;
  static constexpr int kBlocks = kWide || std::is_same_v<Out, double> ? 2 : kMsqBlocks;
  static constexpr int kBytesInFlight = kWide || std::is_same_v<Out, None> ? 64 : kMsqBytes;
  using X = W;
  using G = None;
  using O = Out;
  using A = Acc<W>;
  struct State {
    Quantizer<A> p;
    double sq_error;
    int32_t levels, nonzero;           // sum |B| and the count of B != 0, which is negative where p is not valid: a
                                       // lane has < 2^12 elements, |B| <= 2^15
    A vector_sq_error, vector_levels;  // of the vector at hand, so that it is converted once; levels: on kRounding
  };
  Source source;
  A *penalty, *sq_error;  // of each tensor
  int64_t* nonzero;

  __device__ __forceinline__ State begin(const Entry& e, int64_t row, int which) const {
    const Quantizer<A> p = source.get<A>(e, row, which);
    return {p, 0.0, 0, p.valid ? 0 : INT32_MIN, A(0), kRounding<A>};
  }
  __device__ __forceinline__ auto apply(X x, None, State& s) const {
    const A w = widen(x), u = round_clamp_unit(w, s.p), c = round_clamp_code(u, s.p);
    const A q = level(c, s.p) * s.p.step;
    const A difference = q - w;
    s.vector_sq_error = product_plus(difference, difference, s.vector_sq_error);
    count_residual(lsb_residual(u, c, s.p), s.vector_levels, s.nonzero);  // exact: an integer below 2^18
    if constexpr (std::is_same_v<O, None>)
      return None{};
    else
      return Narrow<O>::from(q);
  }
  template <int kCount>
  __device__ __forceinline__ void flush(State& s, const X (&)[kCount]) const {
    s.sq_error += static_cast<double>(s.vector_sq_error);
    s.levels += low_bits(s.vector_levels) - low_bits(kRounding<A>);
    s.vector_sq_error = A(0);
    s.vector_levels = kRounding<A>;
  }
  __device__ __forceinline__ Sums total(const State& s) const {
    const double levels =
        static_cast<double>(s.levels) * (source.grid == kFull ? 2.0 : 1.0);  // twice the step may be inf
    return {levels * static_cast<double>(s.p.step), s.sq_error, s.nonzero < 0 ? -1 : s.nonzero};
  }
  __device__ void write(const Entry& e, int64_t, int which, const Sums& s) const {
    bool bad = s.nonzero < 0;
    if (e.rows == 0 || e.inner == 0) {  // no element has asked for bits or a scale
      bad = !valid_bits(source.bits[which], source.k ? source.k[which] : 0, source.grid);
      for (int64_t row = 0; row < e.rows; ++row) bad |= !valid_scale(static_cast<const A*>(e.scale)[row]);
    }
    penalty[which] = bad ? quiet_nan<A>() : static_cast<A>(s.penalty);
    sq_error[which] = bad ? quiet_nan<A>() : static_cast<A>(s.sq_error);
    nonzero[which] = bad ? -1 : s.nonzero;
  }
};

template <class W>
struct Lsb : OpBase {
  using X = W;
  using G = None;
  using O = int32_t;
  using State = Quantizer<Acc<W>>;
  Source source;

  __device__ __forceinline__ State begin(const Entry& e, int64_t row, int which) const {
    return source.get<Acc<W>>(e, row, which);
  }
  __device__ __forceinline__ O apply(X w, None, const State& p) const {
    auto u = round_clamp_unit(widen(w), p);
    return to_int(lsb_residual(u, round_clamp_code(u, p), p), p.valid);
  }
};

template <class W>
struct Encode : OpBase {
  using X = W;
  using G = None;
  using O = int32_t;
  using State = Quantizer<Acc<W>>;
  Source source;
  Rule rule;

  __device__ __forceinline__ State begin(const Entry& e, int64_t row, int which) const {
    return source.get<Acc<W>>(e, row, which);
  }
  __device__ __forceinline__ O apply(X w, None, const State& p) const {
    return stored_code(code(widen(w), rule, p), p);
  }
};

template <class A, class Out>
struct Decode : OpBase {
  using X = int32_t;
  using G = None;
  using O = Out;
  using State = Quantizer<A>;
  Source source;

  __device__ __forceinline__ State begin(const Entry& e, int64_t row, int which) const {
    return source.get<A>(e, row, which);
  }
  __device__ __forceinline__ O apply(X code, None, const State& p) const {
    const A c = static_cast<A>(code);
    const A q = level(code_of_stored(c, p), p) * p.step;
    return Narrow<O>::from(c >= A(0) && c < p.count ? q : quiet_nan<A>());
  }
};

// dL/dw, and the sums of dL/ds where kScale. kPenalty: there is a dL/dR (with kScale: there may be).
template <class W, class Grad, bool kPenalty, bool kScale>
struct Backward : std::conditional_t<kScale, SumOp<double, Add, true>, OpBase> {
  static constexpr int kBytesInFlight = kScale ? 32 : 64;  // no registers to spare
  static constexpr int kBlocks = sizeof(Acc<W>) == 8 ? 2 : 4;
  using X = W;
  using G = Grad;
  using O = W;
  using A = Acc<W>;
  struct State {
    Quantizer<A> p;
    A r;
    double scale_grad;
    A vector_scale_grad;  // of the vector at hand, so that it is converted once
  };
  Source source;
  const A* grad_penalty;  // one per tensor, or null

  __device__ __forceinline__ State begin(const Entry& e, int64_t row, int which) const {
    return {source.get<A>(e, row, which), grad_penalty ? grad_penalty[which] : A(0), 0.0, A(0)};
  }
  __device__ __forceinline__ O apply(X x, G gx, State& s) const {
    const A w = widen(x), g = static_cast<A>(widen(gx));
    if constexpr (kScale) s.vector_scale_grad = product_plus(g, scale_grad_term(w, s.p), s.vector_scale_grad);
    if (kPenalty && grad_penalty) return Narrow<O>::from(grad_weight(w, g, s.r, s.p));
    return Narrow<O>::from(inside(w, s.p) ? g : s.p.outside);
  }
  template <int kCount>
  __device__ __forceinline__ void flush(State& s, const X (&)[kCount]) const {
    if constexpr (kScale) {
      s.scale_grad += static_cast<double>(s.vector_scale_grad);
      s.vector_scale_grad = A(0);
    }
  }
  __device__ __forceinline__ double total(const State& s) const { return s.scale_grad; }
  __device__ __forceinline__ void write(const Entry& e, int64_t row, int, double sum) const {
    static_cast<A*>(e.result)[row] = static_cast<A>(sum);
  }
};

template <class W>
struct AddLsbGrad : OpBase {
  using X = W;
  using G = W;
  using O = W;
  using A = Acc<W>;
  struct State {
    Quantizer<A> p;
    A r;
  };
  Source source;
  const A* strength;

  __device__ __forceinline__ State begin(const Entry& e, int64_t row, int which) const {
    return {source.get<A>(e, row, which), strength[which]};
  }
  __device__ __forceinline__ O apply(X x, G g, const State& s) const {
    return Narrow<O>::from(add_penalty_slope(widen(x), widen(g), s.r, s.p));
  }
};

// ---------------------------------------------------------------------------------------------------------- arguments

// The weights of a list, their scales, bits and k, checked and in the shape that kernels take.
struct List {
  Tensors w;  // dense
  ScalarType dtype, acc;
  Tensor bits, k;
  Source source;
  std::vector<Entry> entries;

  List(const Tensors& weights, const Tensors& scale, const Tensor& bits_, const Tensor* k_, GridKind grid,
       bool is_signed)
      : dtype(check_list("w", weights, kFloats)), acc(acc_type(dtype)) {
    fill(weights, scale, bits_, k_, grid, is_signed);
  }

  // Codes: the arithmetic is that of the scales.
  List(const Tensors& codes, const Tensors& scale, const Tensor& bits_, GridKind grid, bool is_signed)
      : dtype(check_list("codes", codes, {ScalarType::Int})), acc(ScalarType::Float) {
    if (!scale.empty() && scale[0].scalar_type() == ScalarType::Double) acc = ScalarType::Double;
    fill(codes, scale, bits_, nullptr, grid, is_signed);
  }

  const Tensor& first() const { return w[0]; }
  int64_t size() const { return static_cast<int64_t>(w.size()); }

  void write_to(const Tensors& out) {
    for (size_t i = 0; i < out.size(); ++i) entries[i].out = out[i].data_ptr();
  }

 private:
  void fill(const Tensors& weights, const Tensors& scale, const Tensor& bits_, const Tensor* k_, GridKind grid,
            bool is_signed) {
    const int64_t count = static_cast<int64_t>(weights.size());
    const std::vector<Scaled> scaled = check_scaled(scale, weights, acc);
    bits = check_per_weight("bits", bits_, count, ScalarType::Int, weights[0]);
    if (k_) k = check_per_weight("k", *k_, count, ScalarType::Int, weights[0]);
    source = {static_cast<const int32_t*>(bits.data_ptr()), k_ ? static_cast<const int32_t*>(k.data_ptr()) : nullptr,
              grid, is_signed};
    w = dense(weights);
    entries.reserve(weights.size());
    for (size_t i = 0; i < w.size(); ++i) {
      const auto& [r, at] = scaled[i];
      entries.push_back({w[i].data_ptr(), nullptr, nullptr, at, nullptr, r.rows, r.inner});
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------- ops

template <template <class> class Op>
Tensor reduce(const Tensors& weights, bool per_row) {
  const ScalarType dtype = check_list("w", weights, kFloats);
  const Tensors w = dense(weights);
  std::vector<Entry> entries;
  int64_t scales = 0;
  for (size_t i = 0; i < w.size(); ++i) {
    QUANTOPS_CHECK(!per_row || w[i].dim() > 0, entry_name("w", i, w.size()),
                   ": expected at least one dimension for a scale per row, got a 0-dim tensor");
    const Rows r = rows_of(w[i], per_row);
    entries.push_back({w[i].data_ptr(), nullptr, nullptr, nullptr, nullptr, r.rows, r.inner});
    scales += r.rows;
  }
  const Tensor result = empty_vector(scales, acc_type(dtype), w[0]);
  with_float(dtype, [&](auto element) {
    using W = decltype(element);
    using A = Acc<W>;
    A* place = static_cast<A*>(result.data_ptr());
    for (Entry& e : entries) {
      e.result = place;
      place += e.rows;
    }
    run(w[0], entries, Op<W>{});
  });
  return result;
}

Tensor absmax(Tensors w, bool per_row) { return reduce<AbsMax>(w, per_row); }

Tensor absmean(Tensors w, bool per_row) { return reduce<AbsMean>(w, per_row); }

// Either, as a function of the weights whose gradient is in own_scale.cu.
Tensor own_scale(Tensors w, bool per_row, bool mean) { return mean ? absmean(w, per_row) : absmax(w, per_row); }

void round_clamp_into(List& list, const Tensors& q, ScalarType q_dtype) {
  list.write_to(q);
  with_float(list.dtype, [&](auto element) {
    using W = decltype(element);
    with_float(q_dtype,
               [&](auto out) { run(list.first(), list.entries, RoundClamp<W, decltype(out)>{{}, list.source}); });
  });
}

Tensors round_clamp(Tensors w, Tensors scale, Tensor bits, int64_t grid, bool is_signed, bool /*covered*/,
                    ScalarType dtype) {
  check_float("dtype", dtype);
  List list(w, scale, bits, nullptr, check_grid(grid, is_signed), is_signed);
  Tensors q = empty_like(list.w, dtype);
  round_clamp_into(list, q, dtype);
  return q;
}

void round_clamp_out(Tensors w, Tensors scale, Tensor bits, int64_t grid, bool is_signed, Tensors q) {
  List list(w, scale, bits, nullptr, check_grid(grid, is_signed), is_signed);
  const ScalarType q_dtype = check_results("q", q, list.w, kFloats);
  check_own_memory({{"out", q}}, {w, scale, {bits}});
  round_clamp_into(list, q, q_dtype);
}

// The sums alone where q is null.
void msq_into(List& list, const Tensors* q, ScalarType q_dtype, const Tensor& penalty, const Tensor& nonzero,
              const Tensor& sq_error) {
  if (q) list.write_to(*q);
  with_float(list.dtype, [&](auto element) {
    using W = decltype(element);
    using A = Acc<W>;
    auto go = [&](auto out) {
      run(list.first(), list.entries,
          Msq<W, decltype(out)>{{},
                                list.source,
                                static_cast<A*>(penalty.data_ptr()),
                                static_cast<A*>(sq_error.data_ptr()),
                                static_cast<int64_t*>(nonzero.data_ptr())});
    };
    if (q)
      with_float(q_dtype, go);
    else
      go(None{});
  });
}

std::tuple<Tensor, Tensor, Tensor> empty_sums(const List& list) {
  return {empty_vector(list.size(), list.acc, list.first()), empty_vector(list.size(), ScalarType::Long, list.first()),
          empty_vector(list.size(), list.acc, list.first())};
}

std::tuple<Tensors, Tensor, Tensor, Tensor> msq(Tensors w, Tensors scale, Tensor bits, Tensor k, int64_t grid,
                                                bool /*covered*/, ScalarType dtype) {
  check_float("dtype", dtype);
  List list(w, scale, bits, &k, check_grid(grid), true);
  Tensors q = empty_like(list.w, dtype);
  auto [penalty, nonzero, sq_error] = empty_sums(list);
  msq_into(list, &q, dtype, penalty, nonzero, sq_error);
  return {q, penalty, nonzero, sq_error};
}

void msq_out(Tensors w, Tensors scale, Tensor bits, Tensor k, int64_t grid, Tensors q, Tensor penalty, Tensor nonzero,
             Tensor sq_error) {
  List list(w, scale, bits, &k, check_grid(grid), true);
  const ScalarType q_dtype = check_results("q", q, list.w, kFloats);
  check_result("penalty", penalty, list.size(), list.acc, list.first());
  check_result("nonzero", nonzero, list.size(), ScalarType::Long, list.first());
  check_result("sq_error", sq_error, list.size(), list.acc, list.first());
  check_own_memory({{"out", q}, {"penalty", {penalty}}, {"nonzero", {nonzero}}, {"sq_error", {sq_error}}},
                   {w, scale, {bits, k}});
  msq_into(list, &q, q_dtype, penalty, nonzero, sq_error);
}

std::tuple<Tensor, Tensor, Tensor> lsb_stats(Tensors w, Tensors scale, Tensor bits, Tensor k, int64_t grid,
                                             bool /*covered*/) {
  List list(w, scale, bits, &k, check_grid(grid), true);
  auto sums = empty_sums(list);
  msq_into(list, nullptr, list.dtype, std::get<0>(sums), std::get<1>(sums), std::get<2>(sums));
  return sums;
}

Tensors lsb(Tensors w, Tensors scale, Tensor bits, Tensor k, int64_t grid) {
  List list(w, scale, bits, &k, check_grid(grid), true);
  Tensors b = empty_like(list.w, ScalarType::Int);
  list.write_to(b);
  with_float(list.dtype,
             [&](auto element) { run(list.first(), list.entries, Lsb<decltype(element)>{{}, list.source}); });
  return b;
}

Tensors encode(Tensors w, Tensors scale, Tensor bits, int64_t rule, int64_t grid, bool is_signed) {
  check_rule(rule);
  List list(w, scale, bits, nullptr, check_grid(grid, is_signed, rule), is_signed);
  Tensors c = empty_like(list.w, ScalarType::Int);
  list.write_to(c);
  with_float(list.dtype, [&](auto element) {
    run(list.first(), list.entries, Encode<decltype(element)>{{}, list.source, static_cast<Rule>(rule)});
  });
  return c;
}

Tensors decode(Tensors codes, Tensors scale, Tensor bits, int64_t grid, bool is_signed, ScalarType dtype) {
  check_float("dtype", dtype);
  List list(codes, scale, bits, check_grid(grid, is_signed), is_signed);
  Tensors q = empty_like(list.w, dtype);
  list.write_to(q);
  with_float(dtype, [&](auto out) {
    using O = decltype(out);
    if (list.acc == ScalarType::Double)
      run(list.first(), list.entries, Decode<double, O>{{}, list.source});
    else
      run(list.first(), list.entries, Decode<float, O>{{}, list.source});
  });
  return q;
}

std::tuple<Tensors, Tensors> uniform_backward(Tensors grad, std::optional<Tensor> grad_penalty, Tensors w,
                                              Tensors scale, Tensor bits, Tensor k, int64_t grid, bool is_signed,
                                              bool scale_grad) {
  List list(w, scale, bits, &k, check_grid(grid, is_signed), is_signed);
  if (scale_grad) check_count("scale", scale, w);  // one for all is a constant
  ScalarType grad_dtype = list.dtype;
  Tensors laid_out;  // the gradients, kept alive
  if (!grad.empty()) {
    grad_dtype = check_like("grad", grad, list.w, kFloats);
    const bool as_is = reads_grad(list.dtype, grad_dtype);
    if (!as_is) grad_dtype = list.acc;
    for (size_t i = 0; i < grad.size(); ++i) {
      laid_out.push_back(in_layout_of(as_is ? grad[i] : torch::stable::to(grad[i], grad_dtype), list.w[i]));
      list.entries[i].grad = laid_out[i].data_ptr();
    }
  }
  Tensor r;
  if (grad_penalty) {
    check_float("grad_penalty", grad_penalty->scalar_type());
    r = check_per_weight("grad_penalty", torch::stable::to(*grad_penalty, list.acc), list.size(), list.acc,
                         list.first());
  }
  Tensors grad_w = empty_like(list.w, list.dtype), grad_scale;
  list.write_to(grad_w);
  if (scale_grad)
    for (size_t i = 0; i < scale.size(); ++i) {
      grad_scale.push_back(empty_like(scale[i], list.acc));
      list.entries[i].result = grad_scale[i].data_ptr();
    }

  with_float(list.dtype, [&](auto element) {
    using W = decltype(element);
    using A = Acc<W>;
    const A* penalty = grad_penalty ? static_cast<const A*>(r.data_ptr()) : nullptr;
    with_grad<W>(grad_dtype, [&](auto grad_element) {
      using G = decltype(grad_element);
      if (scale_grad)
        run(list.first(), list.entries, Backward<W, G, true, true>{{}, list.source, penalty});
      else if (penalty)
        run(list.first(), list.entries, Backward<W, G, true, false>{{}, list.source, penalty});
      else
        run(list.first(), list.entries, Backward<W, G, false, false>{{}, list.source, nullptr});
    });
  });
  return {grad_w, grad_scale};
}

void add_lsb_grad_(Tensors grad, Tensors w, Tensors scale, Tensor bits, Tensor k, int64_t grid, Tensor strength) {
  List list(w, scale, bits, &k, check_grid(grid), true);
  check_results("grad", grad, list.w, {list.dtype});
  const Tensor s = check_per_weight("strength", strength, list.size(), list.acc, list.first());
  check_own_memory({{"grad", grad}}, {w, scale, {bits, k, strength}});
  list.write_to(grad);
  for (Entry& e : list.entries) e.grad = e.out;
  with_float(list.dtype, [&](auto element) {
    using W = decltype(element);
    run(list.first(), list.entries, AddLsbGrad<W>{{}, list.source, static_cast<const Acc<W>*>(s.data_ptr())});
  });
}

}  // namespace
}  // namespace quantops::cuda

QUANTOPS_REGISTER(QUANTOPS_KEY, m) {
  using namespace quantops::cuda;
  m.impl("absmax", TORCH_BOX(&absmax));
  m.impl("absmean", TORCH_BOX(&absmean));
  m.impl("own_scale", TORCH_BOX(&own_scale));
  m.impl("round_clamp", TORCH_BOX(&round_clamp));
  m.impl("round_clamp_out", TORCH_BOX(&round_clamp_out));
  m.impl("msq", TORCH_BOX(&msq));
  m.impl("msq_out", TORCH_BOX(&msq_out));
  m.impl("lsb", TORCH_BOX(&lsb));
  m.impl("lsb_stats", TORCH_BOX(&lsb_stats));
  m.impl("uniform_backward", TORCH_BOX(&uniform_backward));
  m.impl("add_lsb_grad_", TORCH_BOX(&add_lsb_grad_));
  m.impl("encode", TORCH_BOX(&encode));
  m.impl("decode", TORCH_BOX(&decode));
}
