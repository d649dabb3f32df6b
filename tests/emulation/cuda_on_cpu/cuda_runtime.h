// Just enough of CUDA to run the kernels of csrc/cuda on the CPU, compiled by a plain C++ compiler from the same files:
//     g++ -x c++ -DQUANTOPS_EMULATE=CPU -I tests/emulation/cuda_on_cpu ...
//
// Blocks run one after another. The threads of a block are fibers that run in turn, each up to its next
// __syncthreads or shuffle, so that these mean what they mean on a GPU; a shuffle that not all lanes of the warp take
// part in, or a barrier that some threads have left, stops the program instead of hanging it.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <type_traits>
#include <vector>

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "none in emulation"; }

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace cuda_on_cpu {

constexpr int kMaxThreads = 1024, kWarpSize = 32, kStackBytes = 256 * 1024;

[[noreturn]] inline void stop(const char* why) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", why);
  std::abort();
}

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  bool created = false, done = true;
  int64_t shuffles = 0;                   // so far in this block
  alignas(16) unsigned char sent[2][16];  // what the lane sent in its last two shuffles, and their numbers
  int64_t sent_at[2];
  char* stack = nullptr;
};

struct Machine {
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  const std::function<void()>* kernel = nullptr;
  ucontext_t scheduler;
  jmp_buf back;
  int current = 0, count = 0, alive = 0, waiting = 0;
  int64_t barrier = 0;  // barriers passed by the block
  std::mutex mutex;
  dim3 block_index, block_size, grid_size;
};

inline Machine& machine() {
  static Machine* m = new Machine;  // never destroyed: fibers live as long as the program
  return *m;
}

struct ThreadIndex {
  operator dim3() const { return dim3(machine().current, 0, 0); }
};

// To the scheduler and, in the thread's next turn, back. With the address sanitizer, which follows stacks through
// swapcontext but not through longjmp, the slow way.
inline void yield() {
  Machine& m = machine();
  Fiber& f = m.fibers[m.current];
#ifdef __SANITIZE_ADDRESS__
  swapcontext(&f.context, &m.scheduler);
#else
  if (_setjmp(f.resume) == 0) _longjmp(m.back, 1);
#endif
}

inline void fiber_main() {
  Machine& m = machine();
  while (true) {
    (*m.kernel)();
    m.fibers[m.current].done = true;
    --m.alive;
    yield();
  }
}

inline void run_turn(int thread) {
  Machine& m = machine();
  Fiber& f = m.fibers[thread];
  m.current = thread;
#ifdef __SANITIZE_ADDRESS__
  swapcontext(&m.scheduler, &f.context);
#else
  if (_setjmp(m.back) != 0) return;
  if (f.created) _longjmp(f.resume, 1);
  f.created = true;
  setcontext(&f.context);
#endif
}

inline void prepare(int threads) {
  Machine& m = machine();
  for (int t = 0; t < threads; ++t) {
    Fiber& f = m.fibers[t];
    if (f.stack) continue;
    f.stack = static_cast<char*>(std::malloc(kStackBytes));
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
  }
}

inline void run_block(int threads) {
  Machine& m = machine();
  m.alive = m.count = threads;
  m.waiting = 0;
  for (int t = 0; t < threads; ++t) {
    m.fibers[t].done = false;
    m.fibers[t].shuffles = 0;
    m.fibers[t].sent_at[0] = m.fibers[t].sent_at[1] = -1;
  }
  while (m.alive > 0) {
    for (int t = 0; t < threads; ++t)
      if (!m.fibers[t].done) run_turn(t);
  }
}

template <class T>
T shuffle_from(T value, int source_lane) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
  Machine& m = machine();
  const int me = m.current;
  Fiber& f = m.fibers[me];
  const int64_t number = f.shuffles++;
  std::memcpy(f.sent[number % 2], &value, sizeof(T));
  f.sent_at[number % 2] = number;
  yield();
  const int source = me / kWarpSize * kWarpSize + source_lane;
  if (m.fibers[source].sent_at[number % 2] != number) stop("a shuffle that not all lanes of the warp take part in");
  T result;
  std::memcpy(&result, m.fibers[source].sent[number % 2], sizeof(T));
  return result;
}

}  // namespace cuda_on_cpu

#define threadIdx (dim3(cuda_on_cpu::machine().current, 0, 0))
#define blockIdx (cuda_on_cpu::machine().block_index)
#define blockDim (cuda_on_cpu::machine().block_size)
#define gridDim (cuda_on_cpu::machine().grid_size)

// Runs `kernel` as every thread of every block.
inline void emulate(const std::function<void()>& kernel, dim3 grid, unsigned threads) {
  auto& m = cuda_on_cpu::machine();
  std::lock_guard<std::mutex> lock(m.mutex);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || threads == 0 || threads > 1024)
    cuda_on_cpu::stop("a launch that a GPU refuses");
  cuda_on_cpu::prepare(threads);
  m.kernel = &kernel;
  m.grid_size = grid;
  m.block_size = dim3(threads);
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      m.block_index = dim3(x, y, 0);
      cuda_on_cpu::run_block(threads);
    }
}

inline void __syncthreads() {
  auto& m = cuda_on_cpu::machine();
  const int64_t passed = m.barrier;
  if (++m.waiting == m.count) {
    m.waiting = 0;
    ++m.barrier;
  }
  while (m.barrier == passed) {
    if (m.alive < m.count) cuda_on_cpu::stop("a barrier that some threads of the block have left");
    cuda_on_cpu::yield();
  }
}

inline void __threadfence() {}

inline unsigned atomicInc(unsigned* at, unsigned most) {
  const unsigned old = *at;
  *at = old >= most ? 0 : old + 1;
  return old;
}

template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const int lane = cuda_on_cpu::machine().current % 32;
  return cuda_on_cpu::shuffle_from(value, lane + delta < 32 ? lane + delta : lane);
}

// Every lane passes only when all others have come here, as after a shuffle.
inline void __syncwarp() { cuda_on_cpu::shuffle_from(0, cuda_on_cpu::machine().current % 32); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_on_cpu::shuffle_from(value, (cuda_on_cpu::machine().current % 32) ^ mask);
}

template <class T>
void __stwb(T* to, T value) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(T)) cuda_on_cpu::stop("a store that is not aligned");
  *to = value;
}

inline unsigned __float_as_uint(float v) {
  unsigned r;
  std::memcpy(&r, &v, 4);
  return r;
}
inline float __uint_as_float(unsigned v) {
  float r;
  std::memcpy(&r, &v, 4);
  return r;
}
inline long long __double_as_longlong(double v) {
  long long r;
  std::memcpy(&r, &v, 8);
  return r;
}
inline double __longlong_as_double(long long v) {
  double r;
  std::memcpy(&r, &v, 8);
  return r;
}
