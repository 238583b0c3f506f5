// Sums over a tile's samples, for phi: outer products of packs.
#pragma once

#include "combiner/pack.h"
#include "common/panels.h"

namespace auxfast::AUXFAST_ISA {

// out[i * columns + k] += <left[i], right[k]> + <left2[i], right2[k]> over the tile's samples, for kRows x kColumns.
template <class T, int kRows, int kColumns>
__attribute__((noinline)) void outer_block(const Pack<T>* left, const Pack<T>* right, const Pack<T>* left2,
                                           const Pack<T>* right2, int columns, T* out) {
  constexpr int kSums = (kRows * kColumns + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  Vec<T> sum[kSums] = {};
  const auto add = [&](const Pack<T>* a, const Pack<T>* b) {
#pragma GCC unroll 1
    for (int v = 0; v < kPackVectors; ++v) {
      Vec<T> x[kColumns];
#pragma GCC unroll 4
      for (int k = 0; k < kColumns; ++k) x[k] = b[k].part[v];
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int k = 0; k < kColumns; ++k) sum[i * kColumns + k] += a[i].part[v] * x[k];
    }
  };
  add(left, right);
  if (left2) add(left2, right2);
  T total[kSums];
#pragma GCC unroll 4
  for (int first = 0; first < kSums; first += kLanes<T>) store<T>(total + first, sum_each<T>(sum + first));
  for (int i = 0; i < kRows; ++i)
    for (int k = 0; k < kColumns; ++k) out[i * columns + k] += total[i * kColumns + k];
}

// The same for all rows and columns.
template <class T>
void add_outer(const Pack<T>* left, int rows, const Pack<T>* right, int columns, const Pack<T>* left2,
               const Pack<T>* right2, T* out) {
  constexpr int kMostRows = kVectorBytes == 64 ? 4 : 2, kMostColumns = 4;
  in_panels<kMostRows>(rows, [&](auto height, int i) AUXFAST_INLINE {
    in_panels<kMostColumns>(columns, [&](auto width, int k) AUXFAST_INLINE {
      outer_block<T, decltype(height)::value, decltype(width)::value>(left + i, right + k, left2 ? left2 + i : nullptr,
                                                                      right2 ? right2 + k : nullptr, columns,
                                                                      out + i * columns + k);
    });
  });
}

// out[i] += the sum of pack i over the tile's samples.
template <class T>
void add_packs(const Pack<T>* packs, int count, T* out) {
  for (int first = 0; first < count; first += kLanes<T>) {
    const int some = count - first < kLanes<T> ? count - first : kLanes<T>;
    Vec<T> sum[kLanes<T>] = {};
    for (int i = 0; i < some; ++i)
      for (int v = 0; v < kPackVectors; ++v) sum[i] += packs[first + i].part[v];
    const Vec<T> total = sum_each<T>(sum);
    for (int i = 0; i < some; ++i) out[first + i] += total[i];
  }
}

}  // namespace auxfast::AUXFAST_ISA
