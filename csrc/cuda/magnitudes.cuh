// What absmax and absmean do to an element, and to their sums.
#pragma once
#include <limits>

#include "table.cuh"

namespace quantops::cuda {

// |w| as a bit pattern, which orders as the number does and puts NaN on top.
__device__ __forceinline__ unsigned magnitude_bits(float v) { return __float_as_uint(v) & 0x7fffffffu; }
__device__ __forceinline__ unsigned long long magnitude_bits(double v) {
  return static_cast<unsigned long long>(__double_as_longlong(v)) & 0x7fffffffffffffffull;
}
__device__ __forceinline__ float from_bits(unsigned v) { return __uint_as_float(v); }
__device__ __forceinline__ double from_bits(unsigned long long v) {
  return __longlong_as_double(static_cast<long long>(v));
}

template <class W>
using MagnitudeBits = decltype(magnitude_bits(Acc<W>()));

template <class W>
struct AbsMax : SumOp<MagnitudeBits<W>, Max, true> {
  static constexpr int64_t kItems = kReductionItems;
  using X = W;
  using G = None;
  using O = None;
  using State = MagnitudeBits<W>;

  __device__ __forceinline__ State begin(const Entry&, int64_t, int) const { return 0; }
  __device__ __forceinline__ None apply(X x, None, State& s) const {
    s = Max()(s, magnitude_bits(widen(x)));
    return {};
  }
  __device__ __forceinline__ State total(State s) const { return s; }
  __device__ __forceinline__ void write(const Entry& e, int64_t row, int, State most) const {
    static_cast<Acc<W>*>(e.result)[row] = from_bits(most);
  }
};

// Adds sums of |w| that may be past the largest double: those are kept as -2^-64 of themselves, exactly.
struct AddMagnitudes {
  static __device__ __forceinline__ double shrunk(double v) { return v < 0 ? -v : v * 0x1p-64; }
  __device__ __forceinline__ double operator()(double a, double b) const {
    const double sum = a + b;
    const bool large = a < 0 || b < 0 || sum > std::numeric_limits<double>::max();
    return large ? -(shrunk(a) + shrunk(b)) : sum;
  }
};

template <class W>
struct AbsMean
    : SumOp<double, std::conditional_t<std::is_same_v<W, double>, AddMagnitudes, Add>, true> {  // floats fit in doubles
  static constexpr int64_t kItems = kReductionItems;
  using X = W;
  using G = None;
  using O = None;
  using A = Acc<W>;
  struct State {
    double sum;
    A vector_sum;  // of the vector at hand, so that it is converted once
  };

  __device__ __forceinline__ State begin(const Entry&, int64_t, int) const { return {0.0, A(0)}; }
  __device__ __forceinline__ None apply(X x, None, State& s) const {
    s.vector_sum += fabs(widen(x));
    return {};
  }
  template <int kCount>
  __device__ __forceinline__ void flush(State& s, const X (&values)[kCount]) const {
    double sum = static_cast<double>(s.vector_sum);
    if (s.vector_sum > std::numeric_limits<A>::max()) {  // perhaps of numbers, whose parts do not overflow
      A part = A(0);
#pragma unroll
      for (int i = 0; i < kCount; ++i) part = fused(fabs(widen(values[i])), A(1) / A(kCount), part);
      sum = std::is_same_v<W, double> ? part * (-kCount * 0x1p-64) : static_cast<double>(part) * kCount;
    }
    s.sum = typename AbsMean::Combine()(s.sum, sum);
    s.vector_sum = A(0);
  }
  __device__ __forceinline__ double total(const State& s) const { return s.sum; }
  __device__ __forceinline__ void write(const Entry& e, int64_t row, int, double sum) const {
    const double mean = sum / static_cast<double>(e.inner > 0 ? e.inner : 1);
    static_cast<A*>(e.result)[row] = static_cast<A>(std::is_same_v<W, double> && sum < 0 ? mean * -0x1p64 : mean);
  }
};

}  // namespace quantops::cuda
