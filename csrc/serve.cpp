// Runs an AOTInductor package of a quantized model without Python: an example, and what tests/export/test_aoti.py
// checks.
//
//   g++ -std=c++20 serve.cpp -o serve -I$TORCH/include -L$TORCH/lib -Wl,-rpath,$TORCH/lib -ltorch -ltorch_cpu -lc10
//   -ldl
//   ./serve _cpu.abi3.so model.pt2 8 3 32 32 < input.f32 > output.f32
//
// TORCH: the folder of an installed torch, or libtorch. The first argument is the library with the kernels, which
// `python -c "import quantops; print(quantops.backends.library_path('cpu'))"` tells; for a package made for a GPU,
// _cuda.abi3.so is loaded after it in the same way. The sizes are those of the input.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>

int main(int count, char** arguments) {
  if (count < 4) {
    std::fprintf(stderr, "usage: serve LIBRARY PACKAGE SIZE... < input.f32 > output.f32\n");
    return 2;
  }
  if (!dlopen(arguments[1], RTLD_NOW)) {  // its ops and kernels register themselves
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader model(arguments[2]);
  std::vector<int64_t> sizes;
  for (int i = 3; i < count; ++i) sizes.push_back(std::atoll(arguments[i]));
  at::Tensor x = at::empty(sizes);
  if (std::fread(x.data_ptr(), sizeof(float), x.numel(), stdin) != static_cast<size_t>(x.numel())) {
    std::fprintf(stderr, "stdin: expected %lld values of float32\n", static_cast<long long>(x.numel()));
    return 1;
  }
  const at::Tensor y = model.run({x})[0].contiguous();
  return std::fwrite(y.data_ptr(), y.element_size(), y.numel(), stdout) == static_cast<size_t>(y.numel()) ? 0 : 1;
}
