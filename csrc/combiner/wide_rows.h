// Products of the first layer when there are many losses: lanes run along the losses, so that rows of losses are
// read and written as they lie, instead of being transposed into packs of samples. Rows are longer than one vector.
//
// A row's rest that fills no vector is read as the row's last full vector with the part seen before blanked out.
#pragma once

#include <cstdint>

#include "common/panels.h"
#include "common/simd.h"

namespace auxfast::AUXFAST_ISA {

// The value with zeros in the first `seen` lanes, which vectors before this one covered.
template <class T>
AUXFAST_HD Vec<T> keep_rest(Vec<T> value, int seen) {
  typename VectorTypes<T>::Bits lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return lane >= seen ? value : Vec<T>{};
}

// Rows are prefetched so many elements ahead: several rows at once are more than the machine foresees by itself.
template <class T>
constexpr int64_t kAhead = 1024 / int64_t(sizeof(T));

// out[a * out_stride + b] = <left row a, right row b> for a panel of kA x kB rows; right rows from `right_rows` on
// repeat the last. kFirst: the right rows have not been read before.
template <class T, int kA, int kB, bool kFirst>
AUXFAST_HD void dot_panel(const T* left, const T* right, int64_t right_rows, int64_t length, T* out,
                          int64_t out_stride) {
  constexpr int kSums = (kA * kB + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  Vec<T> sum[kSums] = {};
  const T* row[kB];
  for (int b = 0; b < kB; ++b) row[b] = right + (b < right_rows ? b : right_rows - 1) * length;
  const auto step = [&](int64_t at, const auto& mask) {
    Vec<T> x[kB];
#pragma GCC unroll 4
    for (int b = 0; b < kB; ++b) {
      if (kFirst) __builtin_prefetch(row[b] + at + kAhead<T>);
      x[b] = mask(load(row[b] + at));
    }
#pragma GCC unroll 4
    for (int a = 0; a < kA; ++a) {
      const Vec<T> w = load(left + a * length + at);
#pragma GCC unroll 4
      for (int b = 0; b < kB; ++b) sum[a * kB + b] += w * x[b];
    }
  };
  int64_t at = 0;
  for (; at + kLanes<T> <= length; at += kLanes<T>) step(at, [](Vec<T> v) { return v; });
  const int seen = int(at + kLanes<T> - length);
  if (at < length) step(length - kLanes<T>, [&](Vec<T> v) { return keep_rest<T>(v, seen); });
#pragma GCC unroll 4
  for (int first = 0; first < kSums; first += kLanes<T>) {
    T sums[kLanes<T>];
    store<T>(sums, sum_each<T>(sum + first));
    for (int i = 0; i < kLanes<T> && first + i < kA * kB; ++i)
      out[(first + i) / kB * out_stride + (first + i) % kB] = sums[i];
  }
}

// out[a * out_stride + b] = <left row a, right row b>; out has room for `right_rows` rounded up to 4.
template <class T>
void row_products(const T* left, int left_rows, const T* right, int right_rows, int64_t length, T* out,
                  int64_t out_stride) {
  for (int b = 0; b < right_rows; b += 4) {
    in_panels<4>(left_rows, [&](auto height, int a) {
      constexpr int kHeight = decltype(height)::value;
      (a == 0 ? dot_panel<T, kHeight, 4, true> : dot_panel<T, kHeight, 4, false>)(left + a * length, right + b * length,
                                                                                  right_rows - b, length,
                                                                                  out + a * out_stride + b, out_stride);
    });
  }
}

// The coefficients of a combination of rows: entry (r, j) is at[r * row_stride + j * column_stride].
template <class T>
struct Coefficients {
  const T* at;
  int64_t row_stride, column_stride;
};

// out row r (+)= sum_j coefficient(r, j) * mask(in row j, its vector), for a panel of kRows rows and kVectors vectors.
template <class T, int kRows, int kVectors, bool kAdd, class Mask>
AUXFAST_HD void combine_panel(Coefficients<T> c, int count, const T* in, int64_t length, T* out, const Mask& mask) {
  Vec<T> sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = r * length + v * kLanes<T>;
      __builtin_prefetch(out + at + kAhead<T>, 1);
      sum[r][v] = kAdd ? load(out + at) : Vec<T>{};
    }
  for (int j = 0; j < count; ++j) {
    Vec<T> x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[v] = mask(load(in + j * length + v * kLanes<T>), v);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += c.at[r * c.row_stride + j * c.column_stride] * x[v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(out + r * length + v * kLanes<T>, sum[r][v]);
}

template <class T, int kVectors, bool kAdd, class Mask>
AUXFAST_HD void combine_columns(Coefficients<T> c, int rows, int count, const T* in, int64_t length, T* out,
                                const Mask& mask) {
  in_panels<5>(rows, [&](auto height, int r) AUXFAST_INLINE {
    const Coefficients<T> panel{c.at + r * c.row_stride, c.row_stride, c.column_stride};
    combine_panel<T, decltype(height)::value, kVectors, kAdd>(panel, count, in, length, out + r * length, mask);
  });
}

// out row r (+)= sum_j coefficient(r, j) * in row j, r < rows, j < count. in: (count, length); out: (rows, length), in
// and out if kAdd. It goes over a few columns at a time, so that those of `in` stay in the cache for all rows of `out`.
// Rows: int, or a constant known to the compiler.
template <class T, bool kAdd, class Rows>
void combine_rows(Coefficients<T> c, Rows rows, int count, const T* in, int64_t length, T* out) {
  constexpr int kVectors = kVectorBytes == 64 ? 4 : 2;
  constexpr int64_t kPanelColumns = kVectors * kLanes<T>;
  int64_t at = 0;
  const auto combine = [&](auto vectors, const auto& mask) AUXFAST_INLINE {
    combine_columns<T, decltype(vectors)::value, kAdd>(c, rows, count, in + at, length, out + at, mask);
    at += decltype(vectors)::value * kLanes<T>;
  };
  const auto all = [](Vec<T> value, int) { return value; };
  // The last columns go together with so many before them that they fill a panel.
  const auto combine_rest = [&](auto vectors) AUXFAST_INLINE {
    const int seen = int(at + decltype(vectors)::value * kLanes<T> - length);
    at -= seen;
    if constexpr (kAdd)
      combine(vectors, [&](Vec<T> value, int v) { return keep_rest<T>(value, seen - v * kLanes<T>); });
    else  // what was stored before is stored again
      combine(vectors, all);
  };
  while (at + kPanelColumns <= length) combine(std::integral_constant<int, kVectors>{}, all);
  // A vector by itself waits for its own sums, and takes half as long as a panel.
  if (at > 0 && length - at > kPanelColumns / 2) return combine_rest(std::integral_constant<int, kVectors>{});
  while (at + kLanes<T> <= length) combine(std::integral_constant<int, 1>{}, all);
  if (at < length) combine_rest(std::integral_constant<int, 1>{});
}

}  // namespace auxfast::AUXFAST_ISA
