// The words that let one header of formulas serve a CUDA thread and a SIMD vector of samples.
#pragma once

#ifdef __CUDACC__
#define AUXFAST_HD __host__ __device__ __forceinline__
#define AUXFAST_INLINE  // behind a lambda's parameters; nvcc inlines them as it is
#ifdef __CUDA_ARCH__
#define AUXFAST_UNROLL _Pragma("unroll")
#else
#define AUXFAST_UNROLL  // nvcc's host compiler does not know it
#endif
#else
#define AUXFAST_HD inline __attribute__((always_inline))
#define AUXFAST_INLINE __attribute__((always_inline))
#define AUXFAST_UNROLL _Pragma("GCC unroll 32")
#endif

// Every translation unit of kernels keeps its code in a namespace of its own, auxfast::AUXFAST_ISA: the linker would
// otherwise merge, say, the AVX-512 copy of a template with the baseline copy and run it on any machine.
#ifndef AUXFAST_ISA
#define AUXFAST_ISA cuda
#endif
