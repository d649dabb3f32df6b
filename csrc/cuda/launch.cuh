// Where kernels are launched: the device and stream of a tensor, and the one place of the launch syntax.
//
// With QUANTOPS_EMULATE the same sources compile with a plain C++ compiler against tests/cuda_on_cpu, whose `emulate`
// runs a kernel thread by thread on the CPU: that is how the kernels are tested on machines without a GPU. Its value is
// the dispatch key that the kernels serve.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../stable_tensor.h"

namespace quantops::cuda {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("quantops: ") + what + ": " + cudaGetErrorString(error));
}

#ifdef QUANTOPS_EMULATE

struct OnDevice {
  cudaStream_t stream = nullptr;
  explicit OnDevice(const Tensor&) {}
};

template <class... Parameters, class... Args>
void launch(const OnDevice&, void (*kernel)(Parameters...), dim3 grid, unsigned threads, const Args&... args) {
  emulate([&] { kernel(args...); }, grid, threads);
}

#else

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

#endif

}  // namespace quantops::cuda

// QUANTOPS_REGISTER(QUANTOPS_KEY, m) { ... } registers the kernels of a file.
#ifdef QUANTOPS_EMULATE
#define QUANTOPS_KEY QUANTOPS_EMULATE
#else
#define QUANTOPS_KEY CUDA
#endif
#define QUANTOPS_REGISTER(key, m) STABLE_TORCH_LIBRARY_IMPL(quantops, key, m)
