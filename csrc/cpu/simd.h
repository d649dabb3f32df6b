// What makes a plain loop fast on CPU: compiled for three instruction sets, chosen when the library loads.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// Lambdas inside such a function are not cloned: keep loops in the function itself.
#if __GNUC__ >= 12
#define QUANTOPS_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else  // older names of the same two
#define QUANTOPS_SIMD __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#endif
#else
#define QUANTOPS_SIMD
#endif

namespace quantops {

constexpr int kLanes = 32;  // loops take this many elements at a time; float sums too, so that their value is fixed

}  // namespace quantops
