// Where kernels are launched: the device and stream of a tensor, and the one place of the launch syntax.
//
// With QUANTOPS_EMULATE the same sources compile with a plain C++ compiler against tests/emulation/cuda_on_cpu, whose
// `emulate` runs a kernel thread by thread on the CPU: that is how the kernels are tested on machines without a GPU.
// Its value is the dispatch key that the kernels serve.
#pragma once
#include <cuda_runtime.h>

#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "../stable_tensor.h"

namespace quantops::cuda {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("quantops: ") + what + ": " + cudaGetErrorString(error));
}

constexpr int kStreams = 4096, kCounters = 65536;

#ifdef QUANTOPS_EMULATE

inline int take_counter(cudaStream_t) { return 0; }

struct OnDevice {
  cudaStream_t stream = nullptr;
  explicit OnDevice(const Tensor&) {}
};

template <class... Parameters, class... Args>
void launch(const OnDevice&, void (*kernel)(Parameters...), dim3 grid, unsigned threads, const Args&... args) {
  emulate([&] { kernel(args...); }, grid, threads);
}

template <class... Parameters, class... Args>
void launch_beside(const OnDevice& on, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                   const Args&... args) {
  launch(on, kernel, grid, threads, args...);
}

#else

// A counter for a launch to come on this stream, or -1 where none is left. The launches of a stream take turns, so one
// is enough for them; a launch that is captured into a graph, which may run on any stream, has one that is its own.
inline int take_counter(cudaStream_t stream) {
  static std::mutex mutex;
  static std::unordered_map<unsigned long long, int> of_stream;
  static int captured = kStreams;
  cudaStreamCaptureStatus capture;
  check_cuda(cudaStreamIsCapturing(stream, &capture), "the state of a stream");
  unsigned long long id = reinterpret_cast<uintptr_t>(stream);
#if CUDART_VERSION >= 12000
  if (capture == cudaStreamCaptureStatusNone) check_cuda(cudaStreamGetId(stream, &id), "the id of a stream");
#endif
  const std::lock_guard<std::mutex> lock(mutex);
  if (capture != cudaStreamCaptureStatusNone) return captured < kCounters ? captured++ : -1;
  const auto found = of_stream.find(id);
  if (found != of_stream.end()) return found->second;
  const int next = static_cast<int>(of_stream.size());
  return next < kStreams ? of_stream[id] = next : -1;
}

// Makes a tensor's device the current one, and knows its current stream, while it lives.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  explicit OnDevice(const Tensor& t) : guard(t.get_device_index()) {
    void* current;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

template <class... Parameters, class... Args>
void launch(const OnDevice& on, void (*kernel)(Parameters...), dim3 grid, unsigned threads, const Args&... args) {
  kernel<<<grid, threads, 0, on.stream>>>(args...);
  check_cuda(cudaGetLastError(), "kernel launch");
}

// Whether the current device's code of a kernel has wait_for_launch_before: it may be made from what is for older ones.
template <class... Parameters>
bool waits_for_launch_before(void (*kernel)(Parameters...)) {
  if (CUDART_VERSION < 12030) return false;  // no such launches in graphs
  cudaFuncAttributes code;
  check_cuda(cudaFuncGetAttributes(&code, kernel), "the attributes of a kernel");
  return code.ptxVersion >= 90;
}

// A launch whose blocks may come while the last ones of the launch before it, which says let_next_launch, still run:
// the time between the two is saved. The kernel says wait_for_launch_before.
template <class... Parameters, class... Args>
void launch_beside(const OnDevice& on, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                   const Args&... args) {
  if (!waits_for_launch_before(kernel)) return launch(on, kernel, grid, threads, args...);
  cudaLaunchAttribute beside{};
  beside.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  beside.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = on.stream;
  config.attrs = &beside;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, args...), "kernel launch");
}

#endif

// By each block: the launch that launch_beside makes next may begin once all blocks have been here.
__device__ __forceinline__ void let_next_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Until the launch before this one is done and what it wrote can be seen.
__device__ __forceinline__ void wait_for_launch_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}

}  // namespace quantops::cuda

// QUANTOPS_REGISTER(QUANTOPS_KEY, m) { ... } registers the kernels of a file.
#ifdef QUANTOPS_EMULATE
#define QUANTOPS_KEY QUANTOPS_EMULATE
#else
#define QUANTOPS_KEY CUDA
#endif
#define QUANTOPS_REGISTER(key, m) STABLE_TORCH_LIBRARY_IMPL(quantops, key, m)
