// Family `activation` on CPU: the ops of quantops/library.py, over the blocks of one tensor.
#include <tuple>

#include "activation_arguments.h"
#include "cpu/activation_front_loops.h"
#include "cpu/activation_loops.h"
#include "cpu/list.h"

namespace quantops {
namespace {

// The arguments of both ops, checked: `list` has the one tensor whose layout the results have.
struct Problem {
  List list;
  const void *scale, *offset;  // offset: null where there is none
  int32_t bits;
  int64_t rule, front, keep, learn;
  bool is_signed;
  Channels channels;

  template <class A>
  Grid<A> grid(int64_t channel) const {
    const A b = offset ? static_cast<const A*>(offset)[channel] : A(0);
    return make_grid(static_cast<const A*>(scale)[channel], b, bits, rule, is_signed, front);
  }
};

template <class A>
void check_values(const Problem& p) {
  for (int64_t i = 0; i < p.channels.count; i++) {
    const A s = static_cast<const A*>(p.scale)[i], b = p.offset ? static_cast<const A*>(p.offset)[i] : A(0);
    QUANTOPS_CHECK(valid_step_scale(s), "scale: expected values in 2^-100..2^100, got ", s);
    QUANTOPS_CHECK(finite_offset(b), "offset: expected finite values, got ", b);
  }
}

Problem make_problem(const Tensor& t, ScalarType acc, const Tensor& scale, const MaybeTensor& offset,
                     const Tensor& bits, int64_t rule, bool is_signed, int64_t front, int64_t keep, int64_t learn) {
  check_options(rule, is_signed, front, keep, learn, offset);
  Problem p;
  p.list = make_list({t}, acc == ScalarType::Double);
  const Tensor& x = p.list.w[0];
  p.channels = channels_of("scale", scale, x);
  p.list.parameters = {check_per_weight("scale", scale, p.channels.count, acc, t),
                       check_per_weight("bits", bits, 1, ScalarType::Int, t)};
  if (offset) p.list.parameters.push_back(check_per_weight("offset", *offset, p.channels.count, acc, t));
  p.scale = p.list.parameters[0].data_ptr();
  p.offset = offset ? p.list.parameters[2].data_ptr() : nullptr;
  p.bits = *static_cast<const int32_t*>(p.list.parameters[1].data_ptr());
  QUANTOPS_CHECK(p.bits >= 0 && p.bits <= kMaxBits, "bits: expected 0..", kMaxBits, ", got ", p.bits);
  p.rule = rule;
  p.front = front;
  p.keep = keep;
  p.learn = learn;
  p.is_signed = is_signed;
  p.list.is_double ? check_values<double>(p) : check_values<float>(p);
  p.list.rows.push_back({1, t.numel()});
  p.list.chunks = make_chunks(p.list.rows);
  return p;
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

// f(std::integral_constant<Keep, keep>)
template <class F>
void with_keep(int64_t keep, const F& f) {
  if (keep == kInput)
    f(std::integral_constant<Keep, kInput>());
  else if (keep == kBits)
    f(std::integral_constant<Keep, kBits>());
  else
    f(std::integral_constant<Keep, kResidual>());
}

// Grids of all channels.
template <class A>
std::vector<Grid<A>> grids_of(const Problem& p) {
  std::vector<Grid<A>> grids;
  for (int64_t c = 0; c < p.channels.count; c++) grids.push_back(p.grid<A>(c));
  return grids;
}

// Calls f(channel, begin, end) for the runs of one channel in elements [i, i + n), counted from i.
template <class F>
void for_runs(const Channels& channels, int64_t i, int64_t n, const F& f) {
  int64_t channel = channels.of(i), left = channels.run - i % channels.run;
  for (int64_t at = 0; at < n; left = channels.run, channel = channel + 1 == channels.count ? 0 : channel + 1) {
    const int64_t end = std::min(n, at + left);
    f(channel, at, end);
    at = end;
  }
}

template <class A>
void fill(OfElements<A>& each, const std::vector<Grid<A>>& grids, const Channels& channels, int64_t i, int64_t n) {
  for_runs(channels, i, n, [&](int64_t channel, int64_t at, int64_t end) {
    for (; at < end; at++) each.set(at, grids[channel]);
  });
}

// --- forward ---------------------------------------------------------------------------------------------------

template <class A>
void forward_into(const Problem& p, const Targets& q, uint8_t* kept) {
  const Grid<A> grid = p.grid<A>(0);
  const void* x = p.list.data[0];
  const bool plain = p.rule == kRoundClamp && !p.offset;
  with_keep(p.keep, [&](auto keep) {
    for_blocks(p.list, [&](int64_t, int64_t i, int64_t n) {
      auto quantize = [&](const auto* from) {
        with_target<A>(q.data[0], q.type, i, n, q.streaming, [&](auto* to, bool streaming) {
          uint8_t* put = kept + kept_bytes(i, keep());
          plain ? activation_loop<keep(), true>(from, to, streaming, put, n, grid)
                : activation_loop<keep(), false>(from, to, streaming, put, n, grid);
        });
      };
      if (!is_smooth(p.front)) return with_source<A>(x, p.list.type, i, n, quantize);
      A in[kBlock], h[kBlock];
      front_block(p.front, load_block<A>(x, p.list.type, i, n, in), h, n);
      quantize(static_cast<const A*>(h));
    });
  });
}

// Numbers of a block as they are kept, from `kept` on.
void put_kept(const int32_t* numbers, int64_t n, int64_t keep, uint8_t* kept) {
  if (keep == kResidual)
    for (int64_t i = 0; i < n; i++) kept[i] = static_cast<uint8_t>(numbers[i]);
  if (keep != kBits) return;
  for (int64_t i = 0; i < n; i += 8) {
    uint32_t byte = 0;
    for (int64_t j = i; j < std::min(i + 8, n); j++) byte |= static_cast<uint32_t>(numbers[j]) << (j - i);
    kept[i / 8] = static_cast<uint8_t>(byte);
  }
}

void get_kept(const uint8_t* kept, int64_t n, int64_t keep, int32_t* numbers) {
  if (keep == kInput)
    std::fill(numbers, numbers + n, 0);
  else
    for (int64_t i = 0; i < n; i++) numbers[i] = keep == kBits ? kept[i / 8] >> i % 8 & 1 : kept[i];
}

template <class A>
void forward_of_channels(const Problem& p, const Targets& q, uint8_t* kept) {
  const std::vector<Grid<A>> grids = grids_of<A>(p);
  with_keep(p.keep, [&](auto keep) {
    for_blocks(p.list, [&](int64_t, int64_t i, int64_t n) {
      A in[kBlock], h[kBlock], out[kBlock];
      int32_t numbers[kBlock];
      OfElements<A> each;
      fill(each, grids, p.channels, i, n);
      const A* from = load_block<A>(p.list.data[0], p.list.type, i, n, in);
      if (is_smooth(p.front)) {
        front_block(p.front, from, h, n);
        from = h;
      }
      activation_channels_loop<keep()>(from, out, numbers, n, grids[0], each);
      store_block<A>(q.data[0], q.type, i, n, q.streaming, out);
      put_kept(numbers, n, keep(), kept + kept_bytes(i, keep()));
    });
  });
}

std::tuple<Tensor, Tensor> activation(Tensor x, Tensor scale, MaybeTensor offset, Tensor bits, int64_t rule,
                                      bool is_signed, int64_t front, int64_t keep, int64_t learn, ScalarType dtype) {
  check_float("dtype", dtype);
  const ScalarType acc = acc_type(check_list("x", {x}, kFloats));
  const Problem p = make_problem(x, acc, scale, offset, bits, rule, is_signed, front, keep, learn);
  Tensor q = empty_like(p.list.w[0], dtype), kept = empty_vector(kept_bytes(x.numel(), keep), ScalarType::Byte, x);
  uint8_t* to = static_cast<uint8_t*>(kept.data_ptr());
  auto run = [&](auto zero) {
    using A = decltype(zero);
    p.channels.count == 1 ? forward_into<A>(p, targets({q}, p.list), to)
                          : forward_of_channels<A>(p, targets({q}, p.list), to);
  };
  p.list.is_double ? run(0.0) : run(0.0f);
  return {q, kept};
}

// --- backward --------------------------------------------------------------------------------------------------

// The other tensor that is read, x or q, if there is one.
struct Other {
  const void* data = nullptr;
  Storage type = Storage::f32;
};

// f(g, x or q, where dL/dx goes, whether to stream it): as they are stored where all are alike.
template <class A, class F>
void with_gradient(const Problem& p, const Other& other, const Targets& out, int64_t i, int64_t n, const F& f) {
  if constexpr (sizeof(A) == 4) {
    if (p.list.type == Storage::bf16 && out.type == Storage::bf16 && (!other.data || other.type == Storage::bf16)) {
      const BFloat16* xq = other.data ? static_cast<const BFloat16*>(other.data) + i : nullptr;
      return with_target<A>(out.data[0], out.type, i, n, out.streaming, [&](auto* to, bool streaming) {
        if constexpr (std::is_same_v<decltype(to), BFloat16*>)
          f(static_cast<const BFloat16*>(p.list.data[0]) + i, xq, to, streaming);
      });
    }
  }
  A g[kBlock], second[kBlock];
  const A* from = load_block<A>(p.list.data[0], p.list.type, i, n, g);
  const A* xq = other.data ? load_block<A>(other.data, other.type, i, n, second) : nullptr;
  if (out.type == native<A>())
    return with_target<A>(out.data[0], out.type, i, n, out.streaming, [&](auto* to, bool streaming) {
      if constexpr (std::is_same_v<decltype(to), A*>) f(from, xq, to, streaming);
    });
  with_block<A>(out.data[0], out.type, i, n, out.streaming, [&](A* to) { f(from, xq, to, false); });
}

// Behind a smooth front: dL/dh as without one, times dh/dx.
template <Learn kLearn, class A>
void front_backward(const Problem& p, const Other& x, const Targets& out, int64_t i, int64_t n, const Grid<A>& grid,
                    SideSums& sums) {
  A gradient[kBlock], second[kBlock], h[kPart], slope[kPart], of_h[kPart];
  const A* g = load_block<A>(p.list.data[0], p.list.type, i, n, gradient);
  const A* from = load_block<A>(x.data, x.type, i, n, second);
  with_target<A>(out.data[0], out.type, i, n, out.streaming, [&](auto* to, bool streaming) {
    for (int64_t j = 0; j < n; j += kPart) {
      const int64_t m = std::min(kPart, n - j);
      front_slope_block(p.front, from + j, h, slope, m);
      activation_grad_loop<kInput, kLearn>(g + j, static_cast<const A*>(h), nullptr, of_h, false, m, grid, sums);
      front_product_loop(static_cast<const A*>(of_h), static_cast<const A*>(slope), to + j, streaming, m);
    }
  });
}

template <Keep kKeep, Learn kLearn, class A>
void backward_as(const Problem& p, const Other& other, const uint8_t* kept, const Targets& out,
                 std::vector<SideSums>& parts) {
  const Grid<A> grid = p.grid<A>(0);
  for_blocks(p.list, [&](int64_t chunk, int64_t i, int64_t n) {
    if constexpr (kKeep == kInput)
      if (is_smooth(p.front)) return front_backward<kLearn>(p, other, out, i, n, grid, parts[chunk]);
    with_gradient<A>(p, other, out, i, n, [&](const auto* g, const auto* xq, auto* to, bool streaming) {
      activation_grad_loop<kKeep, kLearn>(g, xq, kept + kept_bytes(i, kKeep), to, streaming, n, grid, parts[chunk]);
    });
  });
}

template <class A>
void backward_into(const Problem& p, const Other& other, const uint8_t* kept, const Targets& out, A* of_scale,
                   A* of_offset) {
  std::vector<SideSums> parts(p.list.chunks.size());
  if (p.keep == kInput) {
    if (p.learn == kLearnNone)
      backward_as<kInput, kLearnNone, A>(p, other, kept, out, parts);
    else if (p.learn == kLearnClip)
      backward_as<kInput, kLearnClip, A>(p, other, kept, out, parts);
    else
      backward_as<kInput, kLearnStep, A>(p, other, kept, out, parts);
  } else if (p.keep == kBits) {
    if (p.learn == kLearnNone)
      backward_as<kBits, kLearnNone, A>(p, other, kept, out, parts);
    else
      backward_as<kBits, kLearnClip, A>(p, other, kept, out, parts);
  } else {
    if (p.learn == kLearnNone)
      backward_as<kResidual, kLearnNone, A>(p, other, kept, out, parts);
    else
      backward_as<kResidual, kLearnStep, A>(p, other, kept, out, parts);
  }
  if (p.learn == kLearnNone) return;
  SideSums sums;
  for (const SideSums& s : parts) sums.add(s);
  finish_sums(sums, p.list.numel(), p.learn, p.keep, p.grid<A>(0), *of_scale, *of_offset);
}

constexpr int64_t kMostParts = 64;  // of the sums of all channels

template <class A>
void backward_of_channels(Problem p, const Other& other, const uint8_t* kept, const Targets& out, A* of_scale,
                          A* of_offset) {
  const std::vector<Grid<A>> grids = grids_of<A>(p);
  const int64_t numel = p.list.numel(), blocks = (numel + kBlock - 1) / kBlock;
  const int64_t step = std::max(kChunk, (blocks + kMostParts - 1) / kMostParts * kBlock);
  p.list.chunks.clear();
  for (int64_t i = 0; i < numel; i += step) p.list.chunks.push_back({0, i, std::min(i + step, numel)});
  std::vector<std::vector<SideSums>> parts(p.list.chunks.size());
  with_keep(p.keep, [&](auto keep) {
    for_blocks(p.list, [&](int64_t chunk, int64_t i, int64_t n) {
      A gradient[kBlock], second[kBlock], h[kBlock], slope[kBlock], result[kBlock];
      int32_t numbers[kBlock];
      OfElements<A> each;
      Terms<A> terms;
      fill(each, grids, p.channels, i, n);
      get_kept(kept + kept_bytes(i, keep()), n, keep(), numbers);
      const A* g = load_block<A>(p.list.data[0], p.list.type, i, n, gradient);
      const A* xq = other.data ? load_block<A>(other.data, other.type, i, n, second) : g;
      if (is_smooth(p.front)) {
        front_slope_block(p.front, xq, h, slope, n);
        xq = h;
      }
      activation_grad_channels_loop<keep()>(g, xq, numbers, result, n, grids[0], each, terms);
      if (is_smooth(p.front))
        front_product_loop(static_cast<const A*>(result), static_cast<const A*>(slope), second, false, n);
      store_block<A>(out.data[0], out.type, i, n, out.streaming, is_smooth(p.front) ? second : result);
      if (p.learn == kLearnNone) return;
      parts[chunk].resize(grids.size());
      for_runs(p.channels, i, n, [&](int64_t channel, int64_t at, int64_t end) {
        SideSums& s = parts[chunk][channel];
        for (; at < end; at++) s.add({terms.inside[at], terms.above[at], terms.below[at]});
      });
    });
  });
  if (p.learn == kLearnNone) return;
  for (int64_t c = 0; c < p.channels.count; c++) {
    SideSums sums;
    for (const auto& part : parts) sums.add(part[c]);
    finish_sums(sums, numel / p.channels.count, p.learn, p.keep, grids[c], of_scale[c], of_offset[c]);
  }
}

std::tuple<Tensor, Tensors> activation_backward(Tensor grad, MaybeTensor x, MaybeTensor q, Tensor kept, Tensor scale,
                                                MaybeTensor offset, Tensor bits, int64_t rule, bool is_signed,
                                                int64_t front, int64_t keep, int64_t learn, ScalarType dtype) {
  check_float("dtype", dtype);
  check_dense("grad", grad, "laid out as q was");
  const Problem p = make_problem(grad, acc_type(dtype), scale, offset, bits, rule, is_signed, front, keep, learn);
  const bool wants_q = keep == kBits && learn != kLearnNone;
  const Tensor second = other_of(grad, keep == kInput ? x : q, keep == kInput ? "x" : "q", keep == kInput || wants_q);
  const Tensor packed = check_per_weight("kept", kept, kept_bytes(grad.numel(), keep), ScalarType::Byte, grad);
  Other other;
  if (keep == kInput || wants_q) other = {second.data_ptr(), storage(second)};
  Tensor grad_x = empty_like(grad, dtype);
  Tensors sums;
  if (learn != kLearnNone) sums = {torch::stable::empty_like(scale), torch::stable::empty_like(scale)};
  const uint8_t* from = static_cast<const uint8_t*>(packed.data_ptr());
  auto run = [&](auto zero) {
    using A = decltype(zero);
    const Targets out = targets({grad_x}, p.list);
    A* of[2] = {};
    for (size_t i = 0; i < sums.size(); i++) of[i] = static_cast<A*>(sums[i].data_ptr());
    p.channels.count == 1 ? backward_into<A>(p, other, from, out, of[0], of[1])
                          : backward_of_channels<A>(p, other, from, out, of[0], of[1]);
  };
  p.list.is_double ? run(0.0) : run(0.0f);
  return {grad_x, sums};
}

}  // namespace
}  // namespace quantops

STABLE_TORCH_LIBRARY_IMPL(quantops, CPU, m) {
  m.impl("activation", TORCH_BOX(&quantops::activation));
  m.impl("activation_backward", TORCH_BOX(&quantops::activation_backward));
}
