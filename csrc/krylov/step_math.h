// What the passes of a step have in common. A step of a Krylov method is a few passes over the memory of a row; between
// two of them stand the scalars of the recurrence, which need the sums of the pass before.
//
// A pass is a class:
//   Pass(work, row)              reads the numbers of a row
//   skips()                      whether it leaves the row alone, because that has stopped
//   at<V>(i)                     updates the elements from i on, one (V = double) or as many as a SIMD vector has, and
//                                returns their shares in two sums
//   static finish(work, row, sums)   goes on with the row's numbers; it is called for rows that were left alone too
// All arithmetic is in float64, whatever the vectors are stored in.
#pragma once

#include <cmath>

#include "common/host_device.h"
#include "krylov/krylov.h"

namespace auxfast::AUXFAST_ISA {

// How a V is read and written; store() returns the value as it is stored. The CPU adds its vectors.
template <class V>
struct Memory;

template <>
struct Memory<double> {
  template <class T>
  static AUXFAST_HD double load(const T* from) {
    return double(*from);
  }
  template <class T>
  static AUXFAST_HD double store(T* to, double value) {
    const T stored = T(value);
    *to = stored;
    return double(stored);
  }
};

template <class V>
struct Pair {
  V a, b;
};
using Sums = Pair<double>;

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
    const int step = int((*this)[kSteps]);
    if (step >= kLanczosSteps) return;
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
constexpr double kTiny = sizeof(T) == 4 ? 0x1p-23 : 0x1p-52;

}  // namespace auxfast::AUXFAST_ISA
