// What makes a plain loop fast on CPU: compiled for three instruction sets, chosen when the library loads.
#pragma once

// clang, up to 19 at least, clones no function templates, which is what nearly all loops are: it compiles them for the
// one instruction set that its flags say. instruction_set.cpp tells which loops run.
// Neither does a build with sanitizers: clones are chosen before their runtime is there.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#if __GNUC__ >= 12
#define QUANTOPS_AVX512 "arch=x86-64-v4"
#define QUANTOPS_AVX2 "arch=x86-64-v3"
#else  // older names of the same two
#define QUANTOPS_AVX512 "arch=skylake-avx512"
#define QUANTOPS_AVX2 "arch=haswell"
#endif
// Lambdas inside such a function are not cloned: keep loops in the function itself.
#define QUANTOPS_CLONES target_clones(QUANTOPS_AVX512, QUANTOPS_AVX2, "default")
#define QUANTOPS_SIMD __attribute__((QUANTOPS_CLONES))
// Where products and sums may be fused, which two of the three can: in gradients and soft sums, not in what leads to a
// code, a class or a draw.
#define QUANTOPS_FUSED_SIMD __attribute__((QUANTOPS_CLONES, optimize("fp-contract=fast")))
#else
#define QUANTOPS_SIMD
#define QUANTOPS_FUSED_SIMD
#endif

namespace quantops {

constexpr int kLanes = 32;  // loops take this many elements at a time; float sums too, so that their value is fixed

}  // namespace quantops
