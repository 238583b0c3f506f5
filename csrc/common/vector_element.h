// What activations.h must know of SIMD vectors.
#pragma once

#include "common/activations.h"
#include "common/simd.h"

namespace auxfast::AUXFAST_ISA {

template <class T>
struct VectorElement {
  using Scalar = T;
  using Bits = typename VectorTypes<T>::Bits;
  static constexpr std::conditional_t<sizeof(T) == 4, int32_t, int64_t> kSign = sizeof(T) == 4 ? INT32_MIN : INT64_MIN;
  static AUXFAST_HD Bits bits(Vec<T> x) { return (Bits)x; }
  static AUXFAST_HD Vec<T> from_bits(Bits bits) { return (Vec<T>)bits; }
};
template <>
struct ElementOf<Vec<float>> : VectorElement<float> {};
template <>
struct ElementOf<Vec<double>> : VectorElement<double> {};

}  // namespace auxfast::AUXFAST_ISA
