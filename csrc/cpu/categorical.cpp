// Family `categorical` on CPU: the ops of quantops/library.py over lists of tensors.
#include <optional>
#include <tuple>

#include "cpu/categorical_backward_loops.h"
#include "cpu/categorical_draw_loops.h"
#include "cpu/categorical_gates_loops.h"
#include "cpu/categorical_soft_loops.h"
#include "cpu/list.h"

namespace quantops {
namespace {

// The arguments of both ops, checked, and what a tensor's gates fix.
struct Problem {
  List list;
  std::vector<const void*> sigma, gates;  // gates: null without
  std::vector<Levels> levels;
  std::vector<int64_t> first;  // place of each tensor's element 0 in the list
  uint64_t seed;
  Tensors kept;
};

template <class A>
void check_values(const Problem& p, const Tensors& alpha, const Tensors& sigma, const Tensors& gates) {
  for (size_t i = 0; i < alpha.size(); i++) {
    const A* a = static_cast<const A*>(alpha[i].data_ptr());
    const A* s = static_cast<const A*>(sigma[i].data_ptr());
    for (int64_t j = 0; j < alpha[i].numel(); j++) {
      QUANTOPS_CHECK(valid_alpha(a[j]), entry_name("alpha", i, alpha.size()),
                     ": expected finite values > 0 whose inverse is finite, got ", a[j], " at element ", j);
      QUANTOPS_CHECK(valid_width(s[j]), entry_name("sigma", i, alpha.size()), ": expected finite values > 0, got ",
                     s[j], " at element ", j);
    }
    if (gates.empty()) continue;
    QUANTOPS_CHECK(gates[i].numel() == p.list.bits[i], entry_name("gates", i, gates.size()),
                   ": expected one value per bit (", p.list.bits[i], "), got shape ", numbers(gates[i].sizes()));
    const A* g = static_cast<const A*>(p.gates[i]);
    for (int64_t j = 0; j < gates[i].numel(); j++)
      QUANTOPS_CHECK(g[j] >= A(0) && g[j] <= A(1), entry_name("gates", i, gates.size()),
                     ": expected values in [0, 1], got ", g[j], " at element ", j);
  }
}

template <class A>
void make_all_levels(Problem& p, int most_bits, bool is_signed) {
  for (int64_t i = 0; i < p.list.size(); i++) {
    const int32_t n = p.list.bits[i];
    p.levels.push_back(make_levels(static_cast<const A*>(p.gates[i]), n, n, most_bits, is_signed));
  }
}

Problem make_problem(const Tensors& x, const Tensors& alpha, const Tensors& sigma, const Tensor& bits,
                     const Tensors& gates, const std::optional<Tensor>& seed, int64_t mode, int64_t grad,
                     bool is_signed) {
  QUANTOPS_CHECK(mode >= kHard && mode <= kSample, "mode: expected 0, 1 or 2, got ", mode);
  QUANTOPS_CHECK(grad == kOfWinner || grad == kOfSoft, "grad_of: expected 0 or 1, got ", grad);
  const bool is_double = check_list("x", x, kFloats) == ScalarType::Double;
  const ScalarType acc = acc_type(is_double);
  Problem p;
  p.list = make_list(x, is_double);
  check_scales(alpha, x, acc, "alpha");
  check_scales(sigma, x, acc, "sigma");
  p.list.parameters.push_back(check_per_weight("bits", bits, p.list.size(), ScalarType::Int, x[0]));
  p.list.bits = static_cast<const int32_t*>(p.list.parameters[0].data_ptr());
  const int most_bits = mode == kSoft || grad == kOfSoft ? kMaxSoftBits : kMaxBits;
  QUANTOPS_CHECK(gates.empty() || gates.size() == x.size(), "gates: expected a list with one entry per tensor (",
                 x.size(), "), got ", gates.size());
  if (!gates.empty()) check_list("gates", gates, {acc});
  int64_t elements = 0;
  for (size_t i = 0; i < x.size(); i++) {
    QUANTOPS_CHECK(alpha[i].numel() == sigma[i].numel(), entry_name("sigma", i, x.size()),
                   ": expected as many elements as alpha (", alpha[i].numel(), "), got ", sigma[i].numel());
    QUANTOPS_CHECK(p.list.bits[i] >= 0 && p.list.bits[i] <= most_bits, entry_name("bits", i, x.size()),
                   ": expected 0..", most_bits, most_bits == kMaxSoftBits ? " where soft sums are taken" : "", ", got ",
                   p.list.bits[i]);
    p.list.rows.push_back(rows_of(x[i], alpha[i]));
    p.list.scale.push_back(alpha[i].data_ptr());
    p.sigma.push_back(sigma[i].data_ptr());
    p.kept.push_back(gates.empty() || gates[i].is_contiguous() ? x[i] : torch::stable::contiguous(gates[i]));
    p.gates.push_back(gates.empty() ? nullptr : gates[i].is_contiguous() ? gates[i].data_ptr() : p.kept[i].data_ptr());
    p.first.push_back(elements);
    elements += x[i].numel();
  }
  is_double ? check_values<double>(p, alpha, sigma, gates) : check_values<float>(p, alpha, sigma, gates);
  is_double ? make_all_levels<double>(p, most_bits, is_signed) : make_all_levels<float>(p, most_bits, is_signed);
  p.list.chunks = make_chunks(p.list.rows);
  if (mode == kSample) {
    QUANTOPS_CHECK(seed.has_value(), "seed: expected an int64 tensor of one element for mode sample, got none");
    p.kept.push_back(check_per_weight("seed", *seed, 1, ScalarType::Long, x[0]));
    p.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(p.kept.back().data_ptr()));
  }
  return p;
}

// Everything that one scale of one tensor fixes.
template <class A>
struct Scale {
  Bins<A> bins;
  const A* gates;
  const Levels* levels;
  const Bounds<A>* bounds;  // of the hard class, or null: it is the nearest one
  OneScale<A> one;
  Level<A> level[kMaxLevels];  // from the lowest
  int count;
  A sharp;
  SplineTable<A> table;  // of a soft sum; without intervals where it is taken over the classes
  std::vector<A> decay;  // exp(-beta n), n = 0, 1, ... to where it is felt
  GateSteps<A> steps;    // `step_count` of them
  int step_count;
};

template <class A>
bool gated(const Problem& p, int64_t t) {
  return p.gates[t] && cumulative_gate(static_cast<const A*>(p.gates[t]), p.levels[t].count) < 1;
}

template <class A>
A alpha_of(const Problem& p, int64_t t, int64_t row) {
  return static_cast<const A*>(p.list.scale[t])[p.list.rows[t].rows == 1 ? 0 : row];
}

template <class A>
A sigma_of(const Problem& p, int64_t t, int64_t row) {
  return static_cast<const A*>(p.sigma[t])[p.list.rows[t].rows == 1 ? 0 : row];
}

// The bounds of every scale of every tensor that has gates: once, since a row may lie in many chunks.
template <class A>
std::vector<std::vector<Bounds<A>>> all_bounds(const Problem& p) {
  std::vector<std::vector<Bounds<A>>> all(p.list.size());
  for (int64_t t = 0; t < p.list.size(); t++) {
    if (!gated<A>(p, t)) continue;
    all[t].resize(p.list.rows[t].rows);
    torch::stable::parallel_for(0, p.list.rows[t].rows, 64, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        Bounds<A>& b = all[t][row];
        std::fill(std::begin(b.value), std::end(b.value), -std::numeric_limits<A>::infinity());
        std::fill(std::begin(b.top), std::end(b.top), A(0));
        for (int k = 1; k < p.levels[t].count; k++) b.top[k - 1] = A(top_of_level(k, p.levels[t].is_signed));
        hard_bounds(static_cast<const A*>(p.gates[t]), p.levels[t], alpha_of<A>(p, t, row), sigma_of<A>(p, t, row),
                    b.value);
      }
    });
  }
  return all;
}

// --- soft sums ---------------------------------------------------------------------------------------------------

// The first pass. kSteps: of s.steps that are looked at.
template <int kSteps, class A>
void soft_sums(const Scale<A>& s, SoftPart<A>& part, int64_t n) {
  soft_start_loop<kSteps>(part, n, s.steps, s.bins);
  for (size_t step = 1; step < s.decay.size(); step++)
    soft_pair_loop<kSteps>(part, n, A(step), s.decay[step - 1], s.decay[step], s.steps);
}

// Sums of deviations over the levels above each, after every step: `step` 0 is c itself.
template <class A>
void soft_tails(const Scale<A>& s, SoftPart<A>& part, int64_t n, int step) {
  for (int t = 1; t < s.levels->count; t++) {
    const A top = A(top_of_level(t, s.levels->is_signed)), bottom = s.levels->is_signed ? -top - A(1) : A(0);
    soft_tail_loop(part.at.c, part.up, part.down, part.tail[t], n, A(step), bottom, top);
  }
}

// The second pass.
template <int kSteps, class A>
void soft_slopes(const Scale<A>& s, SoftPart<A>& part, int64_t n, bool tails) {
  soft_mean_loop(part, n, s.sharp);
  if (tails) {
    for (int t = 1; t < s.levels->count; t++) std::fill(part.tail[t], part.tail[t] + n, A(0));
    soft_tails(s, part, n, 0);
  }
  for (size_t step = 1; step < s.decay.size(); step++) {
    soft_slope_loop<kSteps>(part, n, A(step), s.decay[step - 1], s.decay[step], s.steps, s.sharp);
    if (tails) soft_tails(s, part, n, int(step));
  }
}

// The coefficients of the spline, by the sums over the classes at its nodes.
template <class A>
void fill_table(Scale<A>& s) {
  constexpr int kStep = kPart / kSplineOrder;  // intervals at a time
  const Spline<A>& k = s.table.spline;
  SoftPart<A> part;
  for (int first = 0; first < k.intervals; first += kStep) {
    const int count = std::min(kStep, k.intervals - first), n = count * kSplineOrder;
    for (int i = 0; i < n; i++) {
      const SplineNode<A> node = spline_node(first + i / kSplineOrder, i % kSplineOrder, k, s.bins);
      part.at.c[i] = node.c;
      part.at.z[i] = node.z;
    }
    soft_sums<1>(s, part, n);
    soft_slopes<1>(s, part, n, false);
    for (int i = 0; i < count; i++) {
      A of[kSplineFunctions][kSplineOrder];
      for (int j = 0; j < kSplineOrder; j++) {
        const int at = i * kSplineOrder + j;
        const SplineValues<A> v =
            spline_values({part.by_x[at], part.by_width[at]}, part.at.z[at], part.first[at], part.weight[at], s.bins);
        of[0][j] = v.x;
        of[1][j] = v.alpha;
        of[2][j] = v.sigma;
        of[3][j] = v.mean;
      }
      for (int f = 0; f < kSplineFunctions; f++) {
        to_coefficients(of[f]);
        s.table.set(first + i, f, of[f]);
      }
    }
  }
}

// --- what a scale fixes ------------------------------------------------------------------------------------------

enum class Needs { bins, winner, soft };

template <class A>
void make_scale(Scale<A>& s, const Problem& p, int64_t t, int64_t row,
                const std::vector<std::vector<Bounds<A>>>& bounds, Needs needs) {
  s.levels = &p.levels[t];
  s.gates = gated<A>(p, t) ? static_cast<const A*>(p.gates[t]) : nullptr;
  s.bounds = bounds.empty() || bounds[t].empty() ? nullptr : &bounds[t][row];
  s.bins = make_bins(alpha_of<A>(p, t, row), sigma_of<A>(p, t, row), *s.levels);
  if (needs == Needs::bins) return;
  s.sharp = A(one_minus_exp(double(s.bins.beta)));
  if (needs == Needs::winner) {
    s.one = make_one_scale(s.bins);
    s.count = p.gates[t] ? s.levels->count : 1;
    for (int k = 1; k <= s.count; k++)
      s.level[k - 1] = p.gates[t] ? make_level(static_cast<const A*>(p.gates[t]), *s.levels, k, s.bins.beta)
                                  : make_only_level(*s.levels, s.bins.beta);
    return;
  }
  s.decay.resize(soft_reach(*s.levels, s.gates, s.bins.beta) + 1);
  for (size_t n = 0; n < s.decay.size(); n++) s.decay[n] = exponential(-s.bins.beta * A(n));
  s.step_count = p.gates[t] ? s.levels->count : 1;
  for (int k = 0; k < kMaxSoftBits; k++) {  // those past the count repeat the last
    const int32_t top = k < s.step_count - 1 ? top_of_level(k + 1, s.levels->is_signed) : s.levels->high;
    s.steps.top[k] = A(top);
    s.steps.bottom[k] = s.levels->is_signed && k < s.step_count - 1 ? A(-top - 1) : A(s.levels->low);
    s.steps.weight[k] = k < s.step_count ? A(cumulative_gate(s.gates, k + 1)) : A(0);
  }
  s.steps.weight[kMaxSoftBits] = A(0);
  s.table.spline = p.gates[t] ? Spline<A>{} : make_spline(s.bins, *s.levels, p.list.rows[t].inner);
  if (s.table.spline.intervals) fill_table(s);
}

// --- classes ---------------------------------------------------------------------------------------------------

template <class A>
void hard_classes(const Scale<A>& s, const A* x, A* j, int64_t n) {
  if (s.bounds) {
    bounded_loop(x, j, n, s.bins, *s.bounds, *s.levels);
  } else {
    Bins<A> p = s.bins;
    p.alpha = A(1);
    nearest_loop(x, j, false, n, p);
  }
}

// At most kPart elements; `index`: place of the first in the list.
template <class A>
void draw_classes(const Scale<A>& s, const Places<A>& at, A* j, int64_t n, uint64_t seed, uint64_t index) {
  Draws draws;
  alignas(64) A mass[kMaxLevels][kPart], left[kPart] = {};
  std::fill(j, j + n, quiet_nan<A>());
  philox_loop(draws, n, seed, index);
  if (s.count > 1) {
    for (int k = 0; k < s.count; k++)
      if (s.level[k].step > 0) interval_loop(at, mass[k], left, n, s.level[k], s.bins);
    first_draw_loop(draws, left, n);
  } else {  // the interval of all classes: nothing to choose
    std::fill(mass[0], mass[0] + n, A(0));
  }
  for (int k = 0; k < s.count; k++)
    if (s.level[k].step > 0) {
      const bool last = k == s.count - 1;
      if (is_narrow(s.level[k], s.bins))
        draw_loop<true>(at, draws, mass[k], left, j, n, s.level[k], s.bins, last);
      else
        draw_loop<false>(at, draws, mass[k], left, j, n, s.level[k], s.bins, last);
    }
}

// --- forward ---------------------------------------------------------------------------------------------------

template <class A>
void spline_value_part(const Scale<A>& s, const A* x, A* q, int64_t n) {
  const Spline<A>& k = s.table.spline;
  SplinePart<A> part;
  A none[8][kSplineFunctions];
  spline_place_loop<false>(x, x, part, n, s.bins, k);
  spline_loop<false>(s.table.row, part, n, none);
  spline_value_loop(part, q, n, s.bins.alpha, k.middle);
}

template <int kSteps, class A>
void soft_value_part(const Scale<A>& s, const A* x, A* q, int64_t n) {
  SoftPart<A> part;
  place_loop(x, part.at, n, s.bins);
  soft_sums<kSteps>(s, part, n);
  soft_value_loop(part, q, n, s.bins.alpha);
}

template <class A>
void forward_part(const Problem& p, int64_t t, const Scale<A>& s, Mode mode, int64_t i, const A* x, A* q, int64_t n) {
  if (mode == kHard) {
    alignas(64) A j[kPart];
    bounded_loop(x, j, n, s.bins, *s.bounds, *s.levels);
    scale_loop(j, q, n, s.bins.alpha);
  } else if (mode == kSoft) {
    if (s.table.spline.intervals)
      spline_value_part(s, x, q, n);
    else if (s.step_count == 1)
      soft_value_part<1>(s, x, q, n);
    else if (s.step_count <= 4)
      soft_value_part<4>(s, x, q, n);
    else
      soft_value_part<8>(s, x, q, n);
  } else {
    Places<A> at;
    alignas(64) A j[kPart];
    place_loop(x, at, n, s.bins);
    draw_classes(s, at, j, n, p.seed, uint64_t(p.first[t] + i));
    scale_loop(j, q, n, s.bins.alpha);
  }
}

template <class A>
void forward_into(const Problem& p, Mode mode, const Targets& q) {
  const List& list = p.list;
  std::vector<std::vector<Bounds<A>>> bounds;
  if (mode == kHard) bounds = all_bounds<A>(p);
  const Needs needs = mode == kHard ? Needs::bins : mode == kSoft ? Needs::soft : Needs::winner;
  for_chunks(list.chunks, [&](int64_t chunk) {
    const Chunk& c = list.chunks[chunk];
    const int64_t t = c.tensor;
    alignas(64) A in[kBlock];
    Scale<A> s;
    for_rows(c, list.rows[t], [&](int64_t row, int64_t begin, int64_t end) {
      make_scale(s, p, t, row, bounds, needs);
      for (int64_t i = begin; i < end; i += kBlock) {
        const int64_t n = std::min(kBlock, end - i);
        if (mode == kHard && !s.bounds) {
          with_source<A>(list.data[t], list.type, i, n, [&](const auto* x) {
            with_target<A>(q.data[t], q.type, i, n, q.streaming,
                           [&](auto* y, bool streaming) { nearest_loop(x, y, streaming, n, s.bins); });
          });
          continue;
        }
        const A* x = load_block<A>(list.data[t], list.type, i, n, in);
        // Streamed where little is computed; elsewhere writes through the caches go on beside the arithmetic, which a
        // block that is streamed at once stops.
        with_block<A>(q.data[t], q.type, i, n, mode == kHard && q.streaming, [&](A* y) {
          for (int64_t k = 0; k < n; k += kPart)
            forward_part(p, t, s, mode, i + k, x + k, y + k, std::min(kPart, n - k));
        });
      }
    });
    end_streaming();
  });
}

Tensors categorical(Tensors x, Tensors alpha, Tensors sigma, Tensor bits, std::optional<Tensors> gates,
                    std::optional<Tensor> seed, int64_t mode, int64_t grad_of, bool is_signed, ScalarType dtype) {
  check_float("dtype", dtype);
  const Problem p = make_problem(x, alpha, sigma, bits, gates.value_or(Tensors{}), seed, mode, grad_of, is_signed);
  Tensors q = empty_like(p.list.w, dtype);
  p.list.is_double ? forward_into<double>(p, Mode(mode), targets(q, p.list))
                   : forward_into<float>(p, Mode(mode), targets(q, p.list));
  return q;
}

// --- backward --------------------------------------------------------------------------------------------------

// Sums over a chunk: of gates, the sums of g dq/dgates[t] gates[t].
struct GateSums {
  double gate[kMaxLevels] = {};
};

template <class A>
void winner_part(const Problem& p, int64_t t, const Scale<A>& s, Mode mode, int64_t i, const A* x, const A* g, A* y,
                 int64_t n, ScaleSums& sums, GateSums* gates) {
  WinnerPart<A> w;
  place_loop(x, w.at, n, s.bins);
  if (mode == kHard)
    hard_classes(s, x, w.j, n);
  else
    draw_classes(s, w.at, w.j, n, p.seed, uint64_t(p.first[t] + i));
  for (int k = 0; k < s.count; k++) {
    const Level<A>& before = s.level[k ? k - 1 : 0];
    level_loop(w, k, n, s.level[k], before.bottom, before.top, s.bins, s.levels->is_signed);
  }
  winner_of_many_loop(w, g, y, n, s.sharp, s.bins, sums);
  if (!gates) return;
  alignas(64) A tail[kPart] = {};
  for (int k = s.count - 1; k > 0; k--)
    gates->gate[k] += winner_gate_loop(w, w.mass[k], tail, n, s.level[k - 1].bottom, s.level[k - 1].top);
}

template <class A>
void spline_gradient_part(const Scale<A>& s, const A* x, const A* g, A* y, int64_t n, ScaleSums& sums) {
  SplinePart<A> part;
  A of[8][kSplineFunctions];
  spline_place_loop<true>(x, g, part, n, s.bins, s.table.spline);
  spline_loop<true>(s.table.row, part, n, of);
  sums.alpha += spline_gradient_loop(part, g, y, n);
  for (const A* f : of) {
    sums.alpha += f[1];
    sums.sigma += f[2];
  }
}

template <int kSteps, class A>
void soft_gradient_part(const Scale<A>& s, const A* x, const A* g, A* y, int64_t n, ScaleSums& sums, GateSums* gates) {
  SoftPart<A> part;
  place_loop(x, part.at, n, s.bins);
  soft_sums<kSteps>(s, part, n);
  soft_slopes<kSteps>(s, part, n, gates != nullptr);
  soft_gradient_loop(part, g, y, n, s.bins, sums);
  if (!gates) return;
  for (int k = 1; k < s.levels->count; k++) gates->gate[k] += soft_gate_loop(part, part.tail[k], g, n, s.bins.alpha);
}

template <class A>
void soft_gradient_part(const Scale<A>& s, const A* x, const A* g, A* y, int64_t n, ScaleSums& sums, GateSums* gates) {
  if (s.table.spline.intervals)
    spline_gradient_part(s, x, g, y, n, sums);
  else if (s.step_count == 1)
    soft_gradient_part<1>(s, x, g, y, n, sums, gates);
  else if (s.step_count <= 4)
    soft_gradient_part<4>(s, x, g, y, n, sums, gates);
  else
    soft_gradient_part<8>(s, x, g, y, n, sums, gates);
}

template <class A>
struct Gradients {
  Targets x;
  std::vector<A*> alpha, sigma, gates;  // or empty
};

template <class A>
void backward_into(const Problem& p, const Tensors& grad, Mode mode, bool soft, const Gradients<A>& out) {
  const List& list = p.list;
  std::vector<const void*> g_data;
  for (const Tensor& g : grad) g_data.push_back(g.data_ptr());
  const Storage g_type = storage(grad[0]);
  std::vector<double> alpha_parts(list.chunks.size(), 0), sigma_parts(list.chunks.size(), 0);
  std::vector<GateSums> gate_parts(out.gates.empty() ? 0 : list.chunks.size());
  std::vector<std::vector<Bounds<A>>> bounds;
  if (mode == kHard && !soft) bounds = all_bounds<A>(p);
  for_chunks(list.chunks, [&](int64_t chunk) {
    const Chunk& c = list.chunks[chunk];
    const int64_t t = c.tensor;
    GateSums* gate_sums = out.gates.empty() ? nullptr : &gate_parts[chunk];
    alignas(64) A in[kBlock], gradient[kBlock];
    Scale<A> s;
    for_rows(c, list.rows[t], [&](int64_t row, int64_t begin, int64_t end) {
      make_scale(s, p, t, row, bounds, soft ? Needs::soft : Needs::winner);
      // Without gates, and without a gradient for gates that are all 1, one interval is all there is.
      const bool one = !soft && mode == kHard && !s.gates && !(gate_sums && p.gates[t]);
      ScaleSums sums;
      for (int64_t i = begin; i < end; i += kBlock) {
        const int64_t n = std::min(kBlock, end - i);
        const A* x = load_block<A>(list.data[t], list.type, i, n, in);
        const A* g = load_block<A>(g_data[t], g_type, i, n, gradient);
        with_block<A>(out.x.data[t], out.x.type, i, n, false, [&](A* y) {  // not streamed, as in forward_into
          if (one && out.alpha.empty()) return winner_of_one_block<false>(x, g, y, n, s.bins, s.one, sums);
          if (one) return winner_of_one_block<true>(x, g, y, n, s.bins, s.one, sums);
          for (int64_t k = 0; k < n; k += kPart) {
            const int64_t size = std::min(kPart, n - k);
            if (soft)
              soft_gradient_part(s, x + k, g + k, y + k, size, sums, gate_sums);
            else
              winner_part(p, t, s, mode, i + k, x + k, g + k, y + k, size, sums, gate_sums);
          }
        });
      }
      if (out.alpha.empty()) return;
      if (row_in_parts(list.rows[t])) {
        alpha_parts[chunk] = sums.alpha;
        sigma_parts[chunk] = sums.sigma;
      } else {
        out.alpha[t][row] = A(sums.alpha);
        out.sigma[t][row] = A(sums.sigma);
      }
    });
  });
  if (!out.alpha.empty()) {
    add_parts(list, alpha_parts, out.alpha);
    add_parts(list, sigma_parts, out.sigma);
  }
  if (out.gates.empty()) return;
  std::vector<GateSums> totals(list.size());
  for (size_t i = 0; i < gate_parts.size(); i++)
    for (int k = 0; k < kMaxLevels; k++) totals[list.chunks[i].tensor].gate[k] += gate_parts[i].gate[k];
  for (int64_t t = 0; t < list.size(); t++)
    for (int k = 1; k < p.levels[t].count; k++)
      out.gates[t][k] = A(totals[t].gate[k] / double(static_cast<const A*>(p.gates[t])[k]));
}

template <class A>
std::vector<A*> zeros(const Tensors& tensors) {
  std::vector<A*> data;
  for (const Tensor& t : tensors) {
    data.push_back(static_cast<A*>(t.data_ptr()));
    std::fill(data.back(), data.back() + t.numel(), A(0));
  }
  return data;
}

std::tuple<Tensors, Tensors, Tensors, Tensors> categorical_backward(Tensors grad, Tensors x, Tensors alpha,
                                                                    Tensors sigma, Tensor bits, Tensors gates,
                                                                    std::optional<Tensor> seed, int64_t mode,
                                                                    int64_t grad_of, bool is_signed, bool scale_grad,
                                                                    bool gate_grad) {
  const Problem p = make_problem(x, alpha, sigma, bits, gates, seed, mode, grad_of, is_signed);
  check_like("grad", grad, x, kFloats);
  Tensors g;
  for (size_t i = 0; i < grad.size(); i++) g.push_back(in_layout_of(grad[i], p.list.w[i]));
  const Tensors grad_x = empty_like(p.list.w, x[0].scalar_type());
  Tensors grad_alpha, grad_sigma, grad_gates;
  for (size_t i = 0; i < x.size(); i++) {
    if (scale_grad) {
      grad_alpha.push_back(torch::stable::empty_like(alpha[i]));
      grad_sigma.push_back(torch::stable::empty_like(sigma[i]));
    }
    if (gate_grad && !gates.empty()) grad_gates.push_back(empty_vector(gates[i].numel(), gates[i].scalar_type(), x[0]));
  }
  auto run = [&](auto zero) {
    using A = decltype(zero);
    backward_into<A>(p, g, Mode(mode), mode == kSoft || grad_of == kOfSoft,
                     {targets(grad_x, p.list), zeros<A>(grad_alpha), zeros<A>(grad_sigma), zeros<A>(grad_gates)});
  };
  p.list.is_double ? run(0.0) : run(0.0f);
  return {grad_x, grad_alpha, grad_sigma, grad_gates};
}

}  // namespace
}  // namespace quantops

STABLE_TORCH_LIBRARY_IMPL(quantops, CPU, m) {
  m.impl("categorical", TORCH_BOX(&quantops::categorical));
  m.impl("categorical_backward", TORCH_BOX(&quantops::categorical_backward));
}
