// Which of the compiled instruction sets runs here. torch's own ATEN_CPU_CAPABILITY=default|avx2|avx512 limits it.
#pragma once

#include <cstdlib>
#include <cstring>

namespace auxfast {

enum class CpuIsa { baseline, avx2, avx512 };

inline CpuIsa best_cpu_isa() {
#if defined(__x86_64__)
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  const bool allow_avx2 = !limit || std::strcmp(limit, "default") != 0;
  const bool allow_avx512 = allow_avx2 && (!limit || std::strcmp(limit, "avx2") != 0);
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (allow_avx512 && avx512) return CpuIsa::avx512;
  if (allow_avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuIsa::avx2;
#endif
  return CpuIsa::baseline;
}

inline const char* cpu_isa_name(CpuIsa isa) {
  return isa == CpuIsa::avx512 ? "avx512" : isa == CpuIsa::avx2 ? "avx2" : "baseline";
}

// Of the copies of one kernel table, the one for this machine; found once, when the module is loaded.
template <class Kernels>
const Kernels& choose_cpu_kernels(const Kernels& baseline, [[maybe_unused]] const Kernels* avx2,
                                  [[maybe_unused]] const Kernels* avx512) {
  const CpuIsa isa = best_cpu_isa();
  if (isa == CpuIsa::avx512 && avx512) return *avx512;
  if (isa != CpuIsa::baseline && avx2) return *avx2;
  return baseline;
}

}  // namespace auxfast

// Declares `extern const Kernels auxfast::<isa>::name` for each compiled instruction set, and the chosen one as
// auxfast::name(). Kernel files define theirs as `extern const Kernels name = {...}` inside auxfast::AUXFAST_ISA.
#if defined(AUXFAST_WITH_AVX2) && defined(AUXFAST_WITH_AVX512)
#define AUXFAST_CPU_KERNELS(Kernels, name)                                                         \
  namespace auxfast {                                                                              \
  namespace baseline {                                                                             \
  extern const Kernels name;                                                                       \
  }                                                                                                \
  namespace avx2 {                                                                                 \
  extern const Kernels name;                                                                       \
  }                                                                                                \
  namespace avx512 {                                                                               \
  extern const Kernels name;                                                                       \
  }                                                                                                \
  static const Kernels& name() {                                                                   \
    static const Kernels& chosen = choose_cpu_kernels(baseline::name, &avx2::name, &avx512::name); \
    return chosen;                                                                                 \
  }                                                                                                \
  }
#else
#define AUXFAST_CPU_KERNELS(Kernels, name)                \
  namespace auxfast {                                     \
  namespace baseline {                                    \
  extern const Kernels name;                              \
  }                                                       \
  static const Kernels& name() { return baseline::name; } \
  }
#endif
