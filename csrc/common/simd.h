// SIMD on GCC and Clang vector extensions: as wide as the instruction set that this file is compiled for.
#pragma once

#include <cstdint>
#include <utility>

#include "common/host_device.h"

namespace auxfast::AUXFAST_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kPackVectors = 4;  // 32 registers have room for panels of 6 rows x 4 vectors, and the inputs
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kPackVectors = 2;  // 16 registers have room for panels of 6 rows x 2 vectors, and the inputs
#else
constexpr int kVectorBytes = 16;
constexpr int kPackVectors = 2;
#endif

constexpr int kWordBytes = 16;  // of a word, the least of a vector that moves to and from memory by itself

template <class T>
struct VectorTypes;
template <>
struct VectorTypes<float> {
  typedef float Aligned __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef float Word __attribute__((vector_size(kWordBytes)));
  typedef float UnalignedWord __attribute__((vector_size(kWordBytes), aligned(4), may_alias));
};
template <>
struct VectorTypes<double> {
  typedef double Aligned __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef double Word __attribute__((vector_size(kWordBytes)));
  typedef double UnalignedWord __attribute__((vector_size(kWordBytes), aligned(8), may_alias));
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

// The same value, kept in its register: GCC otherwise reads an operand from memory again for every use of it.
template <class V>
AUXFAST_HD V in_register(V value) {
#if defined(__x86_64__) && !defined(__clang__)
  asm volatile("" : "+v"(value));
#endif
  return value;
}

// The same pointer, but the compiler does not know it: GCC otherwise keeps what it has read there for so long that it
// runs out of registers.
template <class T>
AUXFAST_HD const T* opaque(const T* pointer) {
#if defined(__GNUC__) && !defined(__clang__)
  asm volatile("" : "+r"(pointer));
#endif
  return pointer;
}

// The sum of the lanes, added pairwise in a fixed order.
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

// Every second lane of a and b, one behind the other, from lane kFirst on.
template <class T, int kFirst, int... I>
AUXFAST_HD Vec<T> every_second(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return shuffle<T>(a, b, std::integer_sequence<int, (2 * I + kFirst)...>{});
}

// The lanes of a and b in turn, a's first; their lower or upper halves.
template <class T, bool kUpper, int... I>
AUXFAST_HD Vec<T> interleave(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  constexpr int kN = kLanes<T>;
  return shuffle<T>(a, b, std::integer_sequence<int, ((kUpper ? kN / 2 : 0) + I / 2 + (I % 2 ? kN : 0))...>{});
}

// The sums of lanes kDistance apart: those of a in the lanes i without that bit (i & kDistance), those of b in the
// others.
template <class T, int kDistance, int... I>
AUXFAST_HD Vec<T> add_pairs(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  constexpr int kN = kLanes<T>;
  return shuffle<T>(a, b, std::integer_sequence<int, (I & kDistance ? kN + I : I)...>{}) +
         shuffle<T>(a, b, std::integer_sequence<int, (I & kDistance ? kN + (I ^ kDistance) : I ^ kDistance)...>{});
}

// Lane j of the result is the sum over the lanes of vectors[j], for as many vectors as there are lanes. The order of
// additions is always the same.
template <class T, int kDistance = 1>
AUXFAST_HD Vec<T> sum_each(const Vec<T>* vectors) {
  constexpr std::make_integer_sequence<int, kLanes<T>> lanes;
  constexpr int kCount = kLanes<T> / kDistance / 2;
  Vec<T> sums[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) sums[i] = add_pairs<T, kDistance>(vectors[2 * i], vectors[2 * i + 1], lanes);
  if constexpr (kCount == 1)
    return sums[0];
  else
    return sum_each<T, 2 * kDistance>(sums);
}

}  // namespace auxfast::AUXFAST_ISA
