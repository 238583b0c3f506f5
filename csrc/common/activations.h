// Activations and their slopes, for a CUDA thread's float or double and for a SIMD vector alike.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/host_device.h"

namespace auxfast::AUXFAST_ISA {

// The type of an element of V, and V's bits as integers. vector_element.h and combiner/pack.h add theirs.
template <class V>
struct ElementOf;

template <class T, class Integer>
struct ScalarElement {
  using Scalar = T;
  static constexpr Integer kSign = Integer(1) << (8 * sizeof(Integer) - 1);
  static AUXFAST_HD Integer bits(T x) {
    Integer bits;
    __builtin_memcpy(&bits, &x, sizeof(T));
    return bits;
  }
  static AUXFAST_HD T from_bits(Integer bits) {
    T x;
    __builtin_memcpy(&x, &bits, sizeof(T));
    return x;
  }
};
template <>
struct ElementOf<float> : ScalarElement<float, uint32_t> {};
template <>
struct ElementOf<double> : ScalarElement<double, uint64_t> {};

template <class V, class T, int N>
AUXFAST_HD V horner(V x, const T (&coefficients)[N]) {
  V sum = coefficients[0] + V{};
  AUXFAST_UNROLL
  for (int i = 1; i < N; ++i) sum = sum * x + coefficients[i];
  return sum;
}

// p * 2^n for the n that was rounded by adding `1.5 * 2^mantissa` and the exponent's bias to it: the low bits of that
// sum are n + bias, the exponent of 2^n. Adding n to p's own exponent instead would make a number of some NaNs, a GPU's
// among them: all bits of their mantissa are set.
template <class V, int kMantissa>
AUXFAST_HD V times_power_of_two(V p, V shifted_n) {
  return p * ElementOf<V>::from_bits(ElementOf<V>::bits(shifted_n) << kMantissa);
}

// -|x|, and x >= 0 with the sign opposite to that of `other`: by bits, since selections take three times as long.
template <class V>
AUXFAST_HD V negative_abs(V x) {
  return ElementOf<V>::from_bits(ElementOf<V>::bits(x) | ElementOf<V>::kSign);
}
template <class V>
AUXFAST_HD V with_opposite_sign(V x, V other) {
  return ElementOf<V>::from_bits(ElementOf<V>::bits(x) | (~ElementOf<V>::bits(other) & ElementOf<V>::kSign));
}

// exp(x) for x <= 0, and log1p(e) / e for e = exp(x), by element type.
//
// x = n ln2 + r with |r| <= ln2 / 2; ln2 in two parts keeps r exact. Below the smallest normal number's logarithm x is
// clamped: softplus is 0 there to every digit that matters.
template <class T>
struct ExpAndLog;

template <>
struct ExpAndLog<float> {
  // Minimax polynomials: exp on [-ln2/2, ln2/2] (relative error 1.2e-7), log1p(e)/e on [0, 1] (1.1e-7).
  template <class V>
  static AUXFAST_HD V exp_nonpositive(V x) {
    constexpr float kShift = 12582912.0f + 127.0f;  // 1.5 * 2^23, and the bias
    constexpr float kExp[] = {0.008297584019601345f, 0.04191587492823601f, 0.16667577624320984f,
                              0.4999889135360718f,   0.9999997019767761f,  1.0000001192092896f};
    x = x < -87.0f ? V{} - 87.0f : x;
    const V shifted_n = x * 1.44269504089f + kShift;
    const V n = shifted_n - kShift;
    const V r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    return times_power_of_two<V, 23>(horner(r, kExp), shifted_n);
  }
  template <class V>
  static AUXFAST_HD V log1p_over(V e) {
    constexpr float kLog[] = {0.005232692696154118f, -0.029505232349038124f, 0.07822594046592712f,
                              -0.13663244247436523f, 0.19106006622314453f,   -0.2484298199415207f,
                              0.3331909775733948f,   -0.4999949336051941f,   0.9999999403953552f};
    return horner(e, kLog);
  }
};

template <>
struct ExpAndLog<double> {
  // Taylor's series of exp up to r^13 (relative error 4e-18), and
  // log1p(e) = 2 artanh(s) = 2 s (1 + s^2/3 + s^4/5 + ...) with s = e / (2 + e) <= 1/3 (terms up to s^32, 1e-17).
  template <class V>
  static AUXFAST_HD V exp_nonpositive(V x) {
    constexpr double kShift = 6755399441055744.0 + 1023.0;  // 1.5 * 2^52, and the bias
    constexpr double kExp[] = {
        1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
        1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
    x = x < -708.0 ? V{} - 708.0 : x;
    const V shifted_n = x * 1.4426950408889634074 + kShift;
    const V n = shifted_n - kShift;
    const V r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
    return times_power_of_two<V, 52>(horner(r, kExp), shifted_n);
  }
  template <class V>
  static AUXFAST_HD V log1p_over(V e) {
    constexpr double kArtanh[] = {2.0 / 33, 2.0 / 31, 2.0 / 29, 2.0 / 27, 2.0 / 25, 2.0 / 23,
                                  2.0 / 21, 2.0 / 19, 2.0 / 17, 2.0 / 15, 2.0 / 13, 2.0 / 11,
                                  2.0 / 9,  2.0 / 7,  2.0 / 5,  2.0 / 3,  2.0};
    const V s = e / (2.0 + e);
    return horner(s * s, kArtanh) / (2.0 + e);
  }
};

// e / (1 + e) for 0 <= e <= 1. On a GPU an approximate reciprocal and a step of Newton's method reach 1e-7: an exact
// division has a branch for numbers that do not occur here, and each keeps the compiler from working on several at a
// time.
template <class V>
AUXFAST_HD V over_one_plus(V e) {
  const V sum = typename ElementOf<V>::Scalar(1) + e;
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<V, float>) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(sum));
    return e * (inverse + inverse * (1.0f - sum * inverse));
  }
#endif
  return e / sum;
}

// clang-format off
// softplus(z) = log(1 + exp(z)) = max(z, 0) + log1p(e) with e = exp(-|z|): no overflow at either end.
// Its slope is s = sigmoid(z), and its second derivative / slope is 1 - s, the relative curvature. Near 1, s as such
// would leave no digits in 1 - s (at z = 10 a float keeps three), so what is kept is
//   state = s for z < 0, else s - 1     which is e / (1 + e) with either sign.
// clang-format on
struct Softplus {
  template <class V>
  static AUXFAST_HD void apply(V z, V& value, V& state) {
    using T = typename ElementOf<V>::Scalar;
    const V e = ExpAndLog<T>::exp_nonpositive(negative_abs(z));
    const V tail = over_one_plus(e);
    value = (z < T(0) ? V{} : z) + e * ExpAndLog<T>::log1p_over(e);
    state = with_opposite_sign(tail, z);
  }
  template <class V>
  static AUXFAST_HD V slope(V state) {
    using T = typename ElementOf<V>::Scalar;
    return state + (state < T(0) ? V{} + T(1) : V{});
  }
  // The second derivative divided by the slope.
  template <class V>
  static AUXFAST_HD V relative_curvature(V state) {
    using T = typename ElementOf<V>::Scalar;
    return (state < T(0) ? V{} : V{} + T(1)) - state;
  }
};

// The state of Softplus where its slope is 1 and its relative curvature 0, so that code which knows the activation only
// at run time needs no more than its own apply().
struct Identity {
  template <class V>
  static AUXFAST_HD void apply(V z, V& value, V& state) {
    value = z;
    state = V{} + typename ElementOf<V>::Scalar(1);
  }
  template <class V>
  static AUXFAST_HD V slope(V state) {
    return state;
  }
  template <class V>
  static AUXFAST_HD V relative_curvature(V) {
    return V{};
  }
};

}  // namespace auxfast::AUXFAST_ISA
