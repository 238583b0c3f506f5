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

}  // namespace auxfast
