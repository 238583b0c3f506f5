// SIMD on GCC and Clang vector extensions: as wide as the instruction set that this file is compiled for.
#pragma once

#include <cstdint>
#include <utility>

#include "common/host_device.h"

namespace auxfast::AUXFAST_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kPackVectors = 4;  // of 32 registers: panels of 6 rows x 4 vectors, and the inputs
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kPackVectors = 2;  // of 16 registers: panels of 6 rows x 2 vectors, and the inputs
#else
constexpr int kVectorBytes = 16;
constexpr int kPackVectors = 2;
#endif

template <class T>
struct VectorTypes;
template <>
struct VectorTypes<float> {
  typedef float Aligned __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorTypes<double> {
  typedef double Aligned __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorTypes<T>::Aligned;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
AUXFAST_HD Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

template <class T>
AUXFAST_HD Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename VectorTypes<T>::Unaligned*>(from);
}

template <class T>
AUXFAST_HD void store(T* to, Vec<T> value) {
  *reinterpret_cast<typename VectorTypes<T>::Unaligned*>(to) = value;
}

// Pairwise, in a fixed order.
template <class T>
AUXFAST_HD T sum_lanes(Vec<T> value) {
  T lanes[kLanes<T>];
  store<T>(lanes, value);
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Lane i of the result is lane index[i] of a, or of b for indices from the number of lanes on.
template <class T, int... kIndex>
AUXFAST_HD Vec<T> shuffle(Vec<T> a, Vec<T> b, std::integer_sequence<int, kIndex...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kIndex...);
#else
  return __builtin_shuffle(a, b, typename VectorTypes<T>::Bits{kIndex...});
#endif
}

// Every second lane of a and b together, from lane kFirst on.
template <class T, int kFirst, int... I>
AUXFAST_HD Vec<T> every_second(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return shuffle<T>(a, b, std::integer_sequence<int, (2 * I + kFirst)...>{});
}

// Lane j of the result is the sum over the lanes of vectors[j], for as many vectors as there are lanes.
// The vectors are overwritten. Always the same order of additions.
template <class T>
AUXFAST_HD Vec<T> sum_each(Vec<T>* vectors) {
  constexpr std::make_integer_sequence<int, kLanes<T>> lanes;
  for (int n = kLanes<T>; n > 1; n /= 2)
    for (int i = 0; i < n / 2; ++i)
      vectors[i] = every_second<T, 0>(vectors[2 * i], vectors[2 * i + 1], lanes) +
                   every_second<T, 1>(vectors[2 * i], vectors[2 * i + 1], lanes);
  return vectors[0];
}

// Exchanges the off-diagonal quarters of every 2 kHalf x 2 kHalf block of the square matrix `rows`.
template <class T, int kHalf, int... I>
AUXFAST_HD void transpose_blocks(Vec<T>* rows, std::integer_sequence<int, I...>) {
  constexpr int kN = kLanes<T>;
#pragma GCC unroll 16
  for (int i = 0; i < kN; ++i) {
    if (i & kHalf) continue;
    const Vec<T> upper = rows[i], lower = rows[i + kHalf];
    rows[i] = shuffle<T>(upper, lower, std::integer_sequence<int, (I & kHalf ? kN + (I ^ kHalf) : I)...>{});
    rows[i + kHalf] = shuffle<T>(upper, lower, std::integer_sequence<int, (I & kHalf ? kN + I : I ^ kHalf)...>{});
  }
}

// Transposes as many vectors as there are lanes.
template <class T>
AUXFAST_HD void transpose(Vec<T>* rows) {
  constexpr std::make_integer_sequence<int, kLanes<T>> lanes;
  if constexpr (kLanes<T> > 8) transpose_blocks<T, 8>(rows, lanes);
  if constexpr (kLanes<T> > 4) transpose_blocks<T, 4>(rows, lanes);
  if constexpr (kLanes<T> > 2) transpose_blocks<T, 2>(rows, lanes);
  transpose_blocks<T, 1>(rows, lanes);
}

}  // namespace auxfast::AUXFAST_ISA
