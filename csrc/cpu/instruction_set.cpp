// Tells which of the loops of this library run on this processor, for quantops.info().
#include <string>

#include "cpu/blocks.h"
#include "cpu/simd.h"

namespace quantops {

#if defined(QUANTOPS_AVX512)
// What the clones of the loops are chosen by, when the library loads.
inline const char* loops() {
#if __GNUC__ >= 12
  if (__builtin_cpu_supports("x86-64-v4")) return "AVX512 loops";
  if (__builtin_cpu_supports("x86-64-v3")) return "AVX2 loops";
#else
  if (__builtin_cpu_is("skylake-avx512")) return "AVX512 loops";
  if (__builtin_cpu_is("haswell")) return "AVX2 loops";
#endif
  return "SSE2 loops";
}
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
inline const char* loops() { return "AVX512 loops alone, as compiled"; }
#elif defined(__AVX2__)
inline const char* loops() { return "AVX2 loops alone, as compiled"; }
#elif defined(__x86_64__)
inline const char* loops() {
  return "SSE2 loops alone, as compiled: g++ makes AVX2 and AVX512 ones too, and CXXFLAGS=-march=native this machine's";
}
#else
inline const char* loops() { return "loops for any processor"; }
#endif

// How float16 becomes float32 and back.
inline const char* half_precision() {
#if defined(__x86_64__)
  if (detail::has_f16c()) return ", float16 by F16C";
#endif
  return ", float16 by integer arithmetic";
}

}  // namespace quantops

extern "C" __attribute__((visibility("default"))) const char* quantops_instruction_set() {
  static const std::string text = std::string(quantops::loops()) + quantops::half_precision();
  return text.c_str();
}
