// Each op's kernels come as constant tables of pointers to functions, one for each element type. On the CPU there is a
// copy of both for each instruction set; on CUDA there is one. A kernel file defines them inside auxfast::AUXFAST_ISA:
//   extern const <Op>Kernels<float> <op>_f32 = {...};   extern const <Op>Kernels<double> <op>_f64 = {...};
#pragma once

#include <type_traits>

#include "common/cpu_isa.h"

#define AUXFAST_DECLARE_TABLES(isa, Kernels, op) \
  namespace auxfast::isa {                       \
  extern const Kernels<float> op##_f32;          \
  extern const Kernels<double> op##_f64;         \
  }

// AUXFAST_CPU_KERNELS(<Op>Kernels, <op>) defines auxfast::<op>_cpu<T>(), which returns the table for this machine. It
// is chosen once. AUXFAST_CUDA_KERNELS(<Op>CudaKernels, <op>) defines auxfast::<op>_cuda<T>().
#if defined(AUXFAST_WITH_AVX2) && defined(AUXFAST_WITH_AVX512)
#define AUXFAST_CPU_KERNELS(Kernels, op)                                                                \
  AUXFAST_DECLARE_TABLES(baseline, Kernels, op)                                                         \
  AUXFAST_DECLARE_TABLES(avx2, Kernels, op)                                                             \
  AUXFAST_DECLARE_TABLES(avx512, Kernels, op)                                                           \
  AUXFAST_DEFINE_TABLE(Kernels, op##_cpu, choose(baseline::op##_f32, avx2::op##_f32, avx512::op##_f32), \
                       choose(baseline::op##_f64, avx2::op##_f64, avx512::op##_f64))
#else
#define AUXFAST_CPU_KERNELS(Kernels, op)        \
  AUXFAST_DECLARE_TABLES(baseline, Kernels, op) \
  AUXFAST_DEFINE_TABLE(Kernels, op##_cpu, baseline::op##_f32, baseline::op##_f64)
#endif

#define AUXFAST_CUDA_KERNELS(Kernels, op)   \
  AUXFAST_DECLARE_TABLES(cuda, Kernels, op) \
  AUXFAST_DEFINE_TABLE(Kernels, op##_cuda, cuda::op##_f32, cuda::op##_f64)

#define AUXFAST_DEFINE_TABLE(Kernels, name, table_f32, table_f64) \
  namespace auxfast {                                             \
  template <class T>                                              \
  const Kernels<T>& name() {                                      \
    if constexpr (std::is_same_v<T, float>) {                     \
      static const Kernels<float>& table = table_f32;             \
      return table;                                               \
    } else {                                                      \
      static const Kernels<double>& table = table_f64;            \
      return table;                                               \
    }                                                             \
  }                                                               \
  }

namespace auxfast {

template <class Table>
const Table& choose(const Table& baseline, const Table& avx2, const Table& avx512) {
  const CpuIsa isa = best_cpu_isa();
  return isa == CpuIsa::avx512 ? avx512 : isa == CpuIsa::avx2 ? avx2 : baseline;
}

}  // namespace auxfast
