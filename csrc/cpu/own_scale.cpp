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

// Weights [begin, begin + n) of a tensor, all of one row.
struct Block {
  int64_t tensor, row, begin, n;
};

template <class A>
int64_t count_carriers(const List& list, const Block& b, A least) {
  int64_t count = 0;
  with_source<A>(list.data[b.tensor], list.type, b.begin, b.n,
                 [&](const auto* w) { count = carriers_loop(w, b.n, least); });
  return count;
}

template <class A>
void write_block(const List& list, const Targets& out, const Block& b, A least, A each, bool stream) {
  with_source<A>(list.data[b.tensor], list.type, b.begin, b.n, [&](const auto* w) {
    with_target<A>(out.data[b.tensor], out.type, b.begin, b.n, stream, [&](auto* y, bool streaming) {
      if constexpr (std::is_same_v<decltype(*w), std::add_const_t<std::remove_reference_t<decltype(*y)>>&>)
        own_scale_loop(w, y, streaming, b.n, least, each);
      else
        __builtin_unreachable();  // the result always has the dtype of w
    });
  });
}

void clear_block(const Targets& out, const Block& b) {
  alignas(64) static const char zeros[kBlock * sizeof(double)] = {};
  const int64_t item = item_size(out.type);
  char* to = static_cast<char*>(out.data[b.tensor]) + b.begin * item;
  out.streaming ? stream(to, zeros, b.n * item) : (void)std::memset(to, 0, b.n * item);
}

// Memory is read once. A row within a chunk is counted while it comes into the cache, and then written. Of a longer row
// each chunk writes zeros and remembers the blocks that have carriers, mostly one in all, until their number is known.
template <class A>
void backward_into(const List& list, const Tensors& grad_scale, bool mean, const Targets& out) {
  std::vector<double> parts(list.chunks.size(), 0);
  std::vector<std::vector<Block>> found(list.chunks.size());
  auto gradient = [&](int64_t t, int64_t row) { return static_cast<const A*>(grad_scale[t].data_ptr())[row]; };
  auto size = [&](int64_t t, int64_t row) { return static_cast<const A*>(list.scale[t])[row]; };
  for_chunks(list.chunks, [&](int64_t chunk) {
    const Chunk& c = list.chunks[chunk];
    const Rows& rows = list.rows[c.tensor];
    for_rows(c, rows, [&](int64_t row, int64_t begin, int64_t end) {
      const A g = gradient(c.tensor, row), least = mean ? A(0) : size(c.tensor, row);
      auto blocks = [&](auto f) {
        for (int64_t i = begin; i < end; i += kBlock) f(Block{c.tensor, row, i, std::min(kBlock, end - i)});
      };
      int64_t count = mean ? rows.inner : 0;
      if (!mean && row_in_parts(rows)) {
        blocks([&](const Block& b) {
          const int64_t carriers = count_carriers(list, b, least);
          if (carriers) found[chunk].push_back(b);
          count += carriers;
          clear_block(out, b);
        });
        parts[chunk] = double(count);
        return;
      }
      if (!mean) blocks([&](const Block& b) { count += count_carriers(list, b, least); });
      blocks([&](const Block& b) { write_block(list, out, b, least, g / A(count), out.streaming); });
    });
    end_streaming();
  });
  if (mean) return;
  std::vector<std::vector<A>> counts;
  std::vector<A*> at;
  for (const Rows& r : list.rows) counts.emplace_back(r.rows);
  for (auto& v : counts) at.push_back(v.data());
  add_parts(list, parts, at);
  for_chunks(list.chunks, [&](int64_t chunk) {
    for (const Block& b : found[chunk])
      write_block(list, out, b, size(b.tensor, b.row), gradient(b.tensor, b.row) / counts[b.tensor][b.row], false);
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
