// One pass over arrays in memory that leaves a float64 sum behind: what memory-bound ops are made of on the CPU.
#pragma once

#include "common/simd.h"

namespace auxfast::AUXFAST_ISA {

// A vector or one element from memory, by the type of V. Hardware prefetchers stop at the end of a page and restart
// late; asking 2 KB ahead made passes 10% faster.
template <class V, class T>
AUXFAST_HD V load_as(const T* from) {
  constexpr int64_t kAheadBytes = 2048;
  if (sizeof(V) > sizeof(T)) __builtin_prefetch(reinterpret_cast<const char*>(from) + kAheadBytes);
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <class V, class T>
AUXFAST_HD void store_as(T* to, V value) {
  __builtin_memcpy(to, &value, sizeof value);
}

template <class V>
struct Factors {
  V a, b;
};

AUXFAST_HD void add_products(Vec<double>& sum, Vec<double> a, Vec<double> b) { sum += a * b; }

// Products of float32 are exact in float64, which neither overflows nor loses small residuals. (Converted as a whole:
// GCC makes twice the instructions of a vector's halves.)
AUXFAST_HD void add_products(Vec<double>& sum, Vec<float> a, Vec<float> b) {
  typedef double Wide __attribute__((vector_size(2 * kVectorBytes)));
  const Wide wide_a = __builtin_convertvector(a, Wide), wide_b = __builtin_convertvector(b, Wide);
  Vec<double> a_halves[2], b_halves[2];
  __builtin_memcpy(a_halves, &wide_a, sizeof wide_a);
  __builtin_memcpy(b_halves, &wide_b, sizeof wide_b);
  for (int i = 0; i < 2; ++i) sum += a_halves[i] * b_halves[i];
}

// Calls body(at, V{}) for all of [0, count), with V = Vec<T> (for the elements from `at` on) or V = T, and returns the
// sum of the products of the Factors<V> that it returns, in an order that depends on `count` only.
template <class T, class Body>
AUXFAST_HD double sum_products(int64_t count, const Body& body) {
  constexpr int kUnroll = 4;  // vectors: as many independent additions as the unit has latency
  Vec<double> sums[kUnroll] = {};
  int64_t at = 0;
  const auto add_vector = [&](Vec<double>& sum) AUXFAST_INLINE {
    const Factors<Vec<T>> factors = body(at, Vec<T>{});
    add_products(sum, factors.a, factors.b);
    at += kLanes<T>;
  };
  while (at + kUnroll * kLanes<T> <= count)
    for (int i = 0; i < kUnroll; ++i) add_vector(sums[i]);
  while (at + kLanes<T> <= count) add_vector(sums[0]);
  double sum = sum_lanes<double>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; at < count; ++at) {
    const Factors<T> factors = body(at, T{});
    sum += double(factors.a) * double(factors.b);
  }
  return sum;
}

}  // namespace auxfast::AUXFAST_ISA
