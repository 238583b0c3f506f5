// A pack holds one number for each of a tile's samples, in as many SIMD vectors as the registers bear.
#pragma once

#include "common/vector_element.h"

namespace auxfast::AUXFAST_ISA {

template <class T>
struct Pack {
  Vec<T> vector[kPackVectors];

  // Copies vector by vector: GCC would copy a plain struct as bytes, and through the stack.
  Pack() = default;
  AUXFAST_HD Pack(const Pack& other) { *this = other; }
  AUXFAST_HD Pack& operator=(const Pack& other) {
#pragma GCC unroll 4
    for (int i = 0; i < kPackVectors; ++i) vector[i] = other.vector[i];
    return *this;
  }

  AUXFAST_HD T* samples() { return reinterpret_cast<T*>(vector); }
  AUXFAST_HD const T* samples() const { return reinterpret_cast<const T*>(vector); }
};
template <class T>  // samples
constexpr int kTile = kPackVectors * kLanes<T>;

#define AUXFAST_PACK_OPERATOR(declaration, expression)                                         \
  template <class T>                                                                           \
  AUXFAST_HD Pack<T> declaration {                                                             \
    Pack<T> out;                                                                               \
    _Pragma("GCC unroll 4") for (int i = 0; i < kPackVectors; ++i) out.vector[i] = expression; \
    return out;                                                                                \
  }
AUXFAST_PACK_OPERATOR(operator+(Pack<T> a, Pack<T> b), a.vector[i] + b.vector[i])
AUXFAST_PACK_OPERATOR(operator*(Pack<T> a, Pack<T> b), a.vector[i] * b.vector[i])
AUXFAST_PACK_OPERATOR(operator+(Pack<T> a, T b), a.vector[i] + b)
AUXFAST_PACK_OPERATOR(operator*(T a, Pack<T> b), a* b.vector[i])
#undef AUXFAST_PACK_OPERATOR

template <class T>
AUXFAST_HD Pack<T>& operator+=(Pack<T>& a, Pack<T> b) {
#pragma GCC unroll 4
  for (int i = 0; i < kPackVectors; ++i) a.vector[i] += b.vector[i];
  return a;
}

template <class T>
struct ElementOf<Pack<T>> {
  using Scalar = T;
};

// An activation that is applied vector by vector.
template <class Act>
struct OnPacks {
  template <class T>
  static AUXFAST_HD void apply(Pack<T> z, Pack<T>& value, Pack<T>& state) {
#pragma GCC unroll 4
    for (int i = 0; i < kPackVectors; ++i) Act::apply(z.vector[i], value.vector[i], state.vector[i]);
  }
  template <class T>
  static AUXFAST_HD Pack<T> slope(Pack<T> state) {
#pragma GCC unroll 4
    for (int i = 0; i < kPackVectors; ++i) state.vector[i] = Act::slope(state.vector[i]);
    return state;
  }
  template <class T>
  static AUXFAST_HD Pack<T> relative_curvature(Pack<T> state) {
#pragma GCC unroll 4
    for (int i = 0; i < kPackVectors; ++i) state.vector[i] = Act::relative_curvature(state.vector[i]);
    return state;
  }
};

}  // namespace auxfast::AUXFAST_ISA
