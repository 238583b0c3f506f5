// A step of conjugate gradients, in the notation of Saad, Iterative Methods for Sparse Linear Systems (2003), algorithm
// 9.1, in as few passes as its sums allow.
//
// clang-format off
// The step takes q = H p, and z = M r or r itself:
//   Curvature    p.q, z.q                                      alpha = r.z / p.q
//   Residual     r <- r - alpha q,   r.r                       beta = r'.z' / r.z
//   Direction    x <- x + alpha p,   p <- beta p + z',   p.p
// z.q costs a row no more than its memory, and says by how much products contradict symmetry: with p = z + beta p_old,
//   p.q - z.q = beta p_old . H p,   which would be beta p . H p_old = 0.
// The Lanczos matrix has 1 / alpha + (beta / alpha of the step before) on its diagonal and sqrt(beta) / alpha beside it.
// clang-format on
#pragma once

#include "krylov/step_math.h"

namespace auxfast::AUXFAST_ISA {

template <class T>
class Curvature {
 public:
  AUXFAST_HD Curvature(const ConjugateGradientStep<T>& work, int64_t row)
      : p_(work.p + row * work.n),
        q_(work.product + row * work.n),
        z_(work.z + row * work.n),
        skips_(numbers_of(work, row)[kStatus] != kRunning) {}

  AUXFAST_HD bool skips() const { return skips_; }

  template <class V>
  AUXFAST_HD void at(int64_t i, Shares<V>& sums) const {
    using E = Element<V>;
    const auto q = E::widened(E::load(q_ + i));
    sums.a = sums.a + E::widened(E::load(p_ + i)) * q;
    sums.b = sums.b + E::widened(E::load(z_ + i)) * q;
  }

  static AUXFAST_HD void finish(const ConjugateGradientStep<T>& work, int64_t row, Sums sums) {
    const Numbers numbers = numbers_of(work, row);
    numbers[kMoves] = 0;
    if (numbers[kStatus] != kRunning) return;
    const double curvature = sums.a / numbers[kPp];
    if (!is_finite(curvature)) return numbers.stop(kBroken);
    const double largest = numbers[kLargest] = larger(numbers[kLargest], fabs(curvature));
    const double flat = kMachineEpsilon<T> * largest;
    if (curvature < -flat) {
      numbers[kNegative] = 1;
      return numbers.stop(kCurved);
    }
    if (curvature <= flat) return numbers.stop(kSingular);
    if (numbers[kSteps] > 0) {
      const double lengths = sqrt(numbers[kPpBefore] * numbers[kPp]);
      numbers.note_asymmetry((sums.a - sums.b) / (numbers[kCgBeta] * lengths * largest));
    }
    numbers[kAlpha] = numbers[kRz] / sums.a;
    numbers[kMoves] = 1;
  }

 private:
  const T *p_, *q_, *z_;
  bool skips_;
};

// r'.z' leads on to the next direction.
template <class T>
AUXFAST_HD void turn(const ConjugateGradientStep<T>& work, const Numbers& numbers, double rz) {
  const double alpha = numbers[kAlpha], beta = rz / numbers[kRz];
  if (work.part == kWhole) numbers.record(1 / alpha + numbers[kBetaByAlpha], sqrt(beta) / alpha);
  numbers[kRz] = rz;
  numbers[kCgBeta] = beta;
  numbers[kBetaByAlpha] = beta / alpha;
  numbers[kSteps] += 1;
  const double tolerance = numbers[kTolerance];
  if (numbers[kSquare] <= tolerance * tolerance)
    numbers[kStatus] = kReached;
  else if (!(rz > 0))
    numbers[kStatus] = kBroken;  // a preconditioner that is not positive definite
}

template <class T>
class Residual {
 public:
  AUXFAST_HD Residual(const ConjugateGradientStep<T>& work, int64_t row)
      : r_(work.r + row * work.n), q_(work.product + row * work.n) {
    const Numbers numbers = numbers_of(work, row);
    alpha_ = T(numbers[kAlpha]);
    skips_ = numbers[kMoves] == 0;
  }

  AUXFAST_HD bool skips() const { return skips_; }

  template <class V>
  AUXFAST_HD void at(int64_t i, Shares<V>& sums) const {
    using E = Element<V>;
    const V next = E::load(r_ + i) - alpha_ * E::load(q_ + i);
    E::store(r_ + i, next);
    const auto r = E::widened(next);
    sums.a = sums.a + r * r;
  }

  // The iterate is kept where it is the best so far and the next one is worse.
  static AUXFAST_HD void finish(const ConjugateGradientStep<T>& work, int64_t row, Sums sums) {
    const Numbers numbers = numbers_of(work, row);
    if (numbers[kMoves] == 0) return;
    if (!is_finite(sums.a)) return numbers.stop(kBroken);
    const double square = numbers[kSquare];
    const bool leaves = square <= numbers[kBestSquare] && sums.a > square;
    numbers[kLeaves] = leaves;
    if (leaves) numbers[kBestSquare] = square;
    numbers[kSquare] = sums.a;
    if (work.part == kWhole) turn(work, numbers, sums.a);
  }

 private:
  T* r_;
  const T* q_;
  T alpha_;
  bool skips_;
};

template <class T>
class PreconditionedResidual {
 public:
  AUXFAST_HD PreconditionedResidual(const ConjugateGradientStep<T>& work, int64_t row)
      : r_(work.r + row * work.n), z_(work.z + row * work.n), skips_(numbers_of(work, row)[kMoves] == 0) {}

  AUXFAST_HD bool skips() const { return skips_; }

  template <class V>
  AUXFAST_HD void at(int64_t i, Shares<V>& sums) const {
    using E = Element<V>;
    sums.a = sums.a + E::widened(E::load(r_ + i)) * E::widened(E::load(z_ + i));
  }

  static AUXFAST_HD void finish(const ConjugateGradientStep<T>& work, int64_t row, Sums sums) {
    const Numbers numbers = numbers_of(work, row);
    if (numbers[kMoves] != 0) turn(work, numbers, sums.a);
  }

 private:
  const T *r_, *z_;
  bool skips_;
};

template <class T>
class Direction {
 public:
  AUXFAST_HD Direction(const ConjugateGradientStep<T>& work, int64_t row)
      : x_(work.x + row * work.n),
        best_(work.best + row * work.n),
        p_(work.p + row * work.n),
        z_(work.z + row * work.n) {
    const Numbers numbers = numbers_of(work, row);
    alpha_ = T(numbers[kAlpha]);
    beta_ = T(numbers[kCgBeta]);
    leaves_ = numbers[kLeaves] != 0;
    skips_ = numbers[kMoves] == 0;
  }

  AUXFAST_HD bool skips() const { return skips_; }

  template <class V>
  AUXFAST_HD void at(int64_t i, Shares<V>& sums) const {
    using E = Element<V>;
    const V x = E::load(x_ + i), p = E::load(p_ + i);
    if (leaves_) E::store(best_ + i, x);
    E::store(x_ + i, x + alpha_ * p);
    const V next = beta_ * p + E::load(z_ + i);
    E::store(p_ + i, next);
    const auto wide = E::widened(next);
    sums.a = sums.a + wide * wide;
  }

  static AUXFAST_HD void finish(const ConjugateGradientStep<T>& work, int64_t row, Sums sums) {
    const Numbers numbers = numbers_of(work, row);
    if (numbers[kMoves] == 0) return;
    numbers[kPpBefore] = numbers[kPp];
    numbers[kPp] = sums.a;
  }

 private:
  T *x_, *best_, *p_;
  const T* z_;
  T alpha_, beta_;
  bool leaves_, skips_;
};

}  // namespace auxfast::AUXFAST_ISA
