// What the passes of a step have in common. A step of a Krylov method is a few passes over the memory of a row; between
// two of them stand the scalars of the recurrence, which need the sums of the pass before.
//
// A pass is a class:
//   Pass(work, row)              reads the numbers of a row
//   skips()                      whether it leaves the row alone, because that has stopped
//   at<V>(i, sums)               updates the elements from i on, one (V = T) or as many as a SIMD vector has (V =
//                                Vec<T>), and adds their shares to two sums
//   static finish(work, row, sums)   goes on with the row's numbers; it is called for rows that were left alone too
// Vectors are updated in the arithmetic that they are stored in, unless a pass says otherwise, with coefficients that
// are rounded to it: so x and r take the same step. Sums and scalars are float64.
#pragma once

#include <cmath>

#include "common/host_device.h"
#include "krylov/krylov.h"

namespace auxfast::AUXFAST_ISA {

// One element, or a SIMD vector of them, and its counterpart in float64. The CPU adds its vectors.
template <class V>
struct Element;

template <class T>
struct ScalarElement {
  using Wide = double;
  static AUXFAST_HD T load(const T* from) { return *from; }
  static AUXFAST_HD void store(T* to, T value) { *to = value; }
  static AUXFAST_HD double load_wide(const double* from) { return *from; }
  static AUXFAST_HD void store_wide(double* to, double value) { *to = value; }
  static AUXFAST_HD double widened(T value) { return double(value); }
  static AUXFAST_HD T narrowed(double value) { return T(value); }
};
template <>
struct Element<float> : ScalarElement<float> {};
template <>
struct Element<double> : ScalarElement<double> {};

template <class V>
struct Pair {
  V a, b;
};
using Sums = Pair<double>;
template <class V>
using Shares = Pair<typename Element<V>::Wide>;

// The numbers of one row.
struct Numbers {
  double* first;
  int64_t rows;

  AUXFAST_HD double& operator[](int index) const { return first[index * rows]; }

  AUXFAST_HD void stop(Status why) const {
    (*this)[kStatus] = why;
    (*this)[kMoves] = 0;
  }

  AUXFAST_HD void record(double diagonal, double off_diagonal) const {
    if ((*this)[kSteps] >= kLanczosSteps) return;
    const int step = int((*this)[kSteps]);
    (*this)[kLanczos + 2 * step] = diagonal;
    (*this)[kLanczos + 2 * step + 1] = off_diagonal;
  }

  // Takes note of |<v, H w> - <w, H v>| for the unit vectors v and w of this step and the one before, relative to what
  // is known of H.
  AUXFAST_HD void note_asymmetry(double error) const {
    if ((*this)[kSteps] == 1) (*this)[kAsymmetry] = fabs(error);
    (*this)[kNoise] += error * error;
  }
};

template <class Work>
AUXFAST_HD Numbers numbers_of(const Work& work, int64_t row) {
  return {work.numbers + row, work.rows};
}

AUXFAST_HD bool is_finite(double value) { return value - value == 0; }

AUXFAST_HD double larger(double a, double b) { return a < b ? b : a; }

// The machine epsilon: of rounding, relative to the largest curvature.
template <class T>
constexpr double kMachineEpsilon = sizeof(T) == 4 ? 0x1p-23 : 0x1p-52;

}  // namespace auxfast::AUXFAST_ISA
