// Splits a list of weights into chunks of like size, whose shape never depends on the number of threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "stable_tensor.h"

namespace quantops {

constexpr int64_t kChunk = 32768;   // elements
constexpr int64_t kSerial = 65536;  // elements of a whole list below which threads cost more than they give

// A run of one weight: whole rows, or a part of one row.
struct Chunk {
  int64_t tensor, begin, end;
};

inline std::vector<Chunk> make_chunks(const std::vector<Rows>& list) {
  std::vector<Chunk> chunks;
  for (int64_t t = 0; t < int64_t(list.size()); t++) {
    const auto [count, size] = list[t];
    if (size == 0 || count == 0) continue;
    int64_t step = size >= kChunk ? kChunk : kChunk / size * size;
    for (int64_t row = 0; row < (size >= kChunk ? count : 1); row++) {
      int64_t base = row * size, end = size >= kChunk ? base + size : count * size;
      for (int64_t i = base; i < end; i += step) chunks.push_back({t, i, std::min(i + step, end)});
    }
  }
  return chunks;
}

// Calls f(index of chunk) for every chunk, on all threads, each with about the same number of elements.
template <class F>
void for_chunks(const std::vector<Chunk>& chunks, const F& f) {
  int64_t total = 0;
  for (const Chunk& c : chunks) total += c.end - c.begin;
  int64_t threads = total <= kSerial ? 1 : torch::stable::get_num_threads();
  if (threads <= 1) {
    for (size_t i = 0; i < chunks.size(); i++) f(int64_t(i));
    return;
  }
  std::vector<int64_t> first(threads + 1, int64_t(chunks.size()));
  first[0] = 0;
  int64_t seen = 0, thread = 1;
  for (size_t i = 0; i < chunks.size() && thread < threads; i++) {
    seen += chunks[i].end - chunks[i].begin;
    while (thread < threads && seen * threads >= total * thread) first[thread++] = int64_t(i) + 1;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = first[begin]; i < first[end]; i++) f(i);
  });
}

// Calls f(row, begin, end) for the rows of a chunk.
template <class F>
void for_rows(const Chunk& c, const Rows& rows, const F& f) {
  for (int64_t i = c.begin; i < c.end;) {
    int64_t row = i / rows.inner, end = std::min(c.end, (row + 1) * rows.inner);
    f(row, i, end);
    i = end;
  }
}

// A row at least as long as a chunk lies in chunks of its own, one after another; of shorter ones a chunk has many.
inline bool row_in_parts(const Rows& rows) { return rows.inner >= kChunk; }

}  // namespace quantops
