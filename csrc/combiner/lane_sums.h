// Sums over samples for phi: outer products of packs, added up lane by lane.
#pragma once

#include "combiner/pack.h"
#include "common/panels.h"

namespace auxfast::AUXFAST_ISA {

// sums[i * columns + k] (one vector each) += the products of packs left[i] and right[k], and of left2[i] and right2[k].
template <class T, int kRows, int kColumns>
AUXFAST_HD void outer_block(const Pack<T>* left, const Pack<T>* right, const Pack<T>* left2, const Pack<T>* right2,
                            int columns, Vec<T>* sums) {
  Vec<T> sum[kRows][kColumns];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int k = 0; k < kColumns; ++k) sum[i][k] = sums[i * columns + k];
  const auto add = [&](const Pack<T>* a, const Pack<T>* b) {
#pragma GCC unroll 4
    for (int v = 0; v < kPackVectors; ++v) {
      Vec<T> right_part[kColumns];
#pragma GCC unroll 4
      for (int k = 0; k < kColumns; ++k) right_part[k] = b[k].part[v];
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int k = 0; k < kColumns; ++k) sum[i][k] += a[i].part[v] * right_part[k];
    }
  };
  add(left, right);
  if (left2) add(left2, right2);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int k = 0; k < kColumns; ++k) sums[i * columns + k] = sum[i][k];
}

template <class T>
void add_outer(const Pack<T>* left, int rows, const Pack<T>* right, int columns, const Pack<T>* left2,
               const Pack<T>* right2, Vec<T>* sums) {
  constexpr int kMostRows = kVectorBytes == 64 ? 5 : 2, kMostColumns = 4;
  in_panels<kMostRows>(rows, [&](auto height, int i) AUXFAST_INLINE {
    in_panels<kMostColumns>(columns, [&](auto width, int k) AUXFAST_INLINE {
      outer_block<T, decltype(height)::value, decltype(width)::value>(left + i, right + k, left2 ? left2 + i : nullptr,
                                                                      right2 ? right2 + k : nullptr, columns,
                                                                      sums + i * columns + k);
    });
  });
}

}  // namespace auxfast::AUXFAST_ISA
