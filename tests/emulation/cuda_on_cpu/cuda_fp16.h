// float16 for the emulation of CUDA on the CPU, see cuda_runtime.h.
#pragma once
#include <torch/headeronly/util/Half.h>

using __half = c10::Half;
inline float __half2float(__half v) { return static_cast<float>(v); }
inline __half __float2half_rn(float v) { return __half(v); }
