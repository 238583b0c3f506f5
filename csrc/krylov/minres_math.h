// A step of MINRES (Paige & Saunders 1975): the Lanczos process, and the QR factorisation of its tridiagonal matrix by
// one rotation (c, s) a step. Names as in the authors' own program (stanford.edu/group/SOL/software/minres), which
// differs from the paper in signs.
//
// clang-format off
// A Lanczos vector is v = z / beta with z = M u, M the preconditioner and u . z = beta^2. With q = H v:
//   LanczosDiagonal  v.q                                                      alfa = v.q
//   LanczosVector    u' = q - (alfa / beta) u - (beta / beta_old) u_old,  u'.u', u_old.u'     beta', the rotation, gamma
//   Directions       w' = (v - epsilon w_old - delta w) / gamma,   v <- z' / beta',   r <- s^2 r - (c phibar / gamma) u'
//   Solution         x <- x + phi w'
// u_old.u' would be 0 but for v_old . H v - v . H v_old: it says by how much products contradict symmetry.
//
// The Lanczos vectors are stored as T, but updated in float64: their orthogonality lasts longer. w and x are stored as
// float64 too. Rounding in w grows with the square of the condition number (Sleijpen, van der Vorst and Modersitzki
// 2000): in float32 the solution would be lost from a condition number of 1e4 on.
//
// r is b - H x whatever is left of orthogonality: of phibar, which claims to be its norm, that is not true.
// clang-format on
#pragma once

#include "krylov/step_math.h"

namespace auxfast::AUXFAST_ISA {

// Curvature, in machine epsilons of the largest one, up to which a residual counts as a null vector of H.
constexpr double kNull = 0.1;

template <class T>
class LanczosDiagonal {
 public:
  AUXFAST_HD LanczosDiagonal(const MinresStep<T>& work, int64_t row)
      : v_(work.v + row * work.n),
        q_(work.product + row * work.n),
        skips_(numbers_of(work, row)[kStatus] != kRunning) {}

  AUXFAST_HD bool skips() const { return skips_; }

  template <class V>
  AUXFAST_HD void at(int64_t i, Shares<V>& sums) const {
    using E = Element<V>;
    sums.a = sums.a + E::widened(E::load(v_ + i)) * E::widened(E::load(q_ + i));
  }

  static AUXFAST_HD void finish(const MinresStep<T>& work, int64_t row, Sums sums) {
    const Numbers numbers = numbers_of(work, row);
    numbers[kMoves] = numbers[kStatus] == kRunning;
    if (numbers[kMoves] != 0) numbers[kAlfa] = sums.a;
  }

 private:
  const T *v_, *q_;
  bool skips_;
};

// Applies the last rotation to the new column of the tridiagonal matrix and makes the next one. Stops rows whose
// residual r before this step is a null vector, and notes negative curvature along it:
//   r . H r / r . r = -c gbar          (Liu & Roosta 2022, "MINRES: from negative curvature detection to monotonicity
//                                      properties")
//   |H r| / |r| = hypot(gbar, dbar)    (in Paige & Saunders)
// square: the new u . z; overlap: u_old . z.
template <class T>
AUXFAST_HD void rotate(const MinresStep<T>& work, const Numbers& numbers, double square, double overlap) {
  const double alfa = numbers[kAlfa], before = numbers[kBeta], beta = sqrt(square);
  const double column = larger(numbers[kLargest], hypot(alfa, beta));
  if (numbers[kSteps] > 0) numbers.note_asymmetry(overlap * numbers[kBetaRatio] / (before * column));
  if (work.part == kWhole) numbers.record(alfa, beta);
  const double delta = numbers[kC] * numbers[kDbar] + numbers[kS] * alfa;
  const double gbar = numbers[kS] * numbers[kDbar] - numbers[kC] * alfa;
  const double curvature = -numbers[kC] * gbar, dbar = -numbers[kC] * beta, slope = hypot(gbar, dbar);
  if (!is_finite(slope)) return numbers.stop(kBroken);  // a preconditioner that is not positive definite ends here too
  numbers[kLargest] = column;                           // the longest column of the tridiagonal matrix, at most |H|
  const double flat = kMachineEpsilon<T> * column;
  if (curvature < -flat) numbers[kNegative] = 1;
  if (fabs(curvature) <= kNull * flat && slope * slope <= kNull * flat * column) return numbers.stop(kSingular);

  numbers[kEpsilonBefore] = numbers[kEpsilon];
  numbers[kEpsilon] = numbers[kS] * beta;
  numbers[kDbar] = dbar;
  numbers[kDelta] = delta;
  numbers[kBeta] = beta;
  numbers[kBetaRatio] = beta / before;
  const double gamma = numbers[kGamma] = hypot(gbar, beta);
  numbers[kC] = gbar / gamma;
  numbers[kS] = beta / gamma;
  numbers[kPhi] = numbers[kC] * numbers[kPhibar];
  numbers[kPhibarBefore] = numbers[kPhibar];
  numbers[kPhibar] *= numbers[kS];
}

template <class T>
class LanczosVector {
 public:
  AUXFAST_HD LanczosVector(const MinresStep<T>& work, int64_t row)
      : q_(work.product + row * work.n), u_(work.u + row * work.n), u_old_(work.u_old + row * work.n) {
    const Numbers numbers = numbers_of(work, row);
    of_u_ = numbers[kAlfa] / numbers[kBeta];
    of_u_old_ = numbers[kBetaRatio];
    skips_ = numbers[kMoves] == 0;
  }

  AUXFAST_HD bool skips() const { return skips_; }

  template <class V>
  AUXFAST_HD void at(int64_t i, Shares<V>& sums) const {
    using E = Element<V>;
    const auto old = E::widened(E::load(u_old_ + i));
    const V next = E::narrowed(E::widened(E::load(q_ + i)) - of_u_ * E::widened(E::load(u_ + i)) - of_u_old_ * old);
    E::store(q_ + i, next);
    const auto u = E::widened(next);
    sums.a = sums.a + u * u;
    sums.b = sums.b + old * u;
  }

  static AUXFAST_HD void finish(const MinresStep<T>& work, int64_t row, Sums sums) {
    const Numbers numbers = numbers_of(work, row);
    if (numbers[kMoves] != 0 && work.part == kWhole) rotate(work, numbers, sums.a, sums.b);
  }

 private:
  T* q_;
  const T *u_, *u_old_;
  double of_u_, of_u_old_;
  bool skips_;
};

template <class T>
class PreconditionedVector {
 public:
  AUXFAST_HD PreconditionedVector(const MinresStep<T>& work, int64_t row)
      : u_(work.product + row * work.n),
        u_old_(work.u_old + row * work.n),
        z_(work.z + row * work.n),
        skips_(numbers_of(work, row)[kMoves] == 0) {}

  AUXFAST_HD bool skips() const { return skips_; }

  template <class V>
  AUXFAST_HD void at(int64_t i, Shares<V>& sums) const {
    using E = Element<V>;
    const auto z = E::widened(E::load(z_ + i));
    sums.a = sums.a + E::widened(E::load(u_ + i)) * z;
    sums.b = sums.b + E::widened(E::load(u_old_ + i)) * z;
  }

  static AUXFAST_HD void finish(const MinresStep<T>& work, int64_t row, Sums sums) {
    const Numbers numbers = numbers_of(work, row);
    if (numbers[kMoves] != 0) rotate(work, numbers, sums.a, sums.b);
  }

 private:
  const T *u_, *u_old_, *z_;
  bool skips_;
};

template <class T>
class Directions {
 public:
  AUXFAST_HD Directions(const MinresStep<T>& work, int64_t row)
      : w_(work.w + row * work.n),
        w_old_(work.w_old + row * work.n),
        v_(work.v + row * work.n),
        r_(work.r + row * work.n),
        u_(work.product + row * work.n),
        z_(work.z + row * work.n) {
    const Numbers numbers = numbers_of(work, row);
    const double gamma = numbers[kGamma], beta = numbers[kBeta];
    of_v_ = 1 / gamma;
    of_w_ = -numbers[kDelta] / gamma;
    of_w_old_ = -numbers[kEpsilonBefore] / gamma;
    of_z_ = beta > 0 ? 1 / beta : 0;  // an invariant subspace: the row is about to stop
    of_r_ = T(numbers[kS] * numbers[kS]);
    of_u_ = T(-numbers[kC] * numbers[kPhibarBefore] / gamma);  // phibar' / beta', which may be 0 / 0 as it stands
    skips_ = numbers[kMoves] == 0;
  }

  AUXFAST_HD bool skips() const { return skips_; }

  template <class V>
  AUXFAST_HD void at(int64_t i, Shares<V>& sums) const {
    using E = Element<V>;
    const auto w =
        of_v_ * E::widened(E::load(v_ + i)) + of_w_ * E::load_wide(w_ + i) + of_w_old_ * E::load_wide(w_old_ + i);
    E::store_wide(w_old_ + i, w);
    E::store(v_ + i, E::narrowed(of_z_ * E::widened(E::load(z_ + i))));
    const V next = of_r_ * E::load(r_ + i) + of_u_ * E::load(u_ + i);
    E::store(r_ + i, next);
    const auto r = E::widened(next);
    sums.a = sums.a + w * w;
    sums.b = sums.b + r * r;
  }

  // Stops before a step if its rounding, in a product with H, is more than it takes from the residual: it would go
  // along null vectors. Rounding within sqrt(eps) of the residual never matters. With a preconditioner phibar is in its
  // norm, and w is not.
  static AUXFAST_HD void finish(const MinresStep<T>& work, int64_t row, Sums sums) {
    const Numbers numbers = numbers_of(work, row);
    if (numbers[kMoves] == 0) return;
    numbers[kSteps] += 1;
    if (work.part == kWhole) {
      const double rounding = kMachineEpsilon<T> * numbers[kLargest] * fabs(numbers[kPhi]) * sqrt(sums.a);
      const double before = numbers[kPhibarBefore];
      if (!(rounding < larger(sqrt(kMachineEpsilon<T>) * before, before - numbers[kPhibar])))
        return numbers.stop(kSingular);
    }
    numbers[kSquare] = sums.b;
    if (sqrt(sums.b) <= numbers[kTolerance]) numbers[kStatus] = kReached;
  }

 private:
  const double* w_;
  double* w_old_;
  T *v_, *r_;
  const T *u_, *z_;
  double of_v_, of_w_, of_w_old_, of_z_;
  T of_r_, of_u_;
  bool skips_;
};

template <class T>
class Solution {
 public:
  AUXFAST_HD Solution(const MinresStep<T>& work, int64_t row)
      : x_(work.x + row * work.n), w_(work.w_old + row * work.n) {
    const Numbers numbers = numbers_of(work, row);
    phi_ = numbers[kPhi];
    skips_ = numbers[kMoves] == 0;
  }

  AUXFAST_HD bool skips() const { return skips_; }

  template <class V>
  AUXFAST_HD void at(int64_t i, Shares<V>&) const {
    using E = Element<V>;
    E::store_wide(x_ + i, E::load_wide(x_ + i) + phi_ * E::load_wide(w_ + i));
  }

  static AUXFAST_HD void finish(const MinresStep<T>&, int64_t, Sums) {}

 private:
  double* x_;
  const double* w_;
  double phi_;
  bool skips_;
};

}  // namespace auxfast::AUXFAST_ISA
