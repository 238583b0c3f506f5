// Sums over a tile's samples, for phi: sums of packs and of outer products of packs.
#pragma once

#include "combiner/pack.h"
#include "common/panels.h"

namespace auxfast::AUXFAST_ISA {

// The same packs of several tiles: those of tile t begin at first + t * stride.
template <class T>
struct TilePacks {
  const Pack<T>* first;
  int64_t stride;

  AUXFAST_HD TilePacks operator+(int64_t pack) const { return {first + pack, stride}; }
};

// The packs whose products are added up over the samples of `tiles` tiles: <left, right>, and <left2, right2> unless
// left2 is null.
template <class T>
struct OuterProducts {
  TilePacks<T> left, right, left2, right2;
  int tiles;
};

// out[i * columns + k] += the products of the packs i on the left with the packs k on the right, for a panel of
// kRows x kColumns. out: in and out.
// Adding up the lanes in the end takes nearly as long as one tile's products, hence several tiles.
template <class T, int kRows, int kColumns>
__attribute__((noinline)) void outer_panel(const OuterProducts<T>& packs, int row, int column, int columns, T* out) {
  constexpr int kSums = (kRows * kColumns + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  Vec<T> sum[kSums] = {};
  const auto add = [&](TilePacks<T> left, TilePacks<T> right) AUXFAST_INLINE {
#pragma GCC unroll 1
    for (int tile = 0; tile < packs.tiles; ++tile) {
      const Pack<T>*a = left.first + tile * left.stride, *b = right.first + tile * right.stride;
#pragma GCC unroll 1
      for (int v = 0; v < kPackVectors; ++v) {
        Vec<T> x[kColumns];
#pragma GCC unroll 4
        for (int k = 0; k < kColumns; ++k) x[k] = b[k].vector[v];
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
          for (int k = 0; k < kColumns; ++k) sum[i * kColumns + k] += a[i].vector[v] * x[k];
      }
    }
  };
  add(packs.left + row, packs.right + column);
  if (packs.left2.first) add(packs.left2 + row, packs.right2 + column);
  T total[kSums];
#pragma GCC unroll 4
  for (int first = 0; first < kSums; first += kLanes<T>) store<T>(total + first, sum_each<T>(sum + first));
  out += row * columns + column;
  for (int i = 0; i < kRows; ++i)
    for (int k = 0; k < kColumns; ++k) out[i * columns + k] += total[i * kColumns + k];
}

// outer_panel for all rows and columns. out: in and out, (rows, columns).
template <class T>
void add_outer(const OuterProducts<T>& packs, int rows, int columns, T* out) {
  constexpr int kMostRows = kVectorBytes == 64 ? 4 : 2, kMostColumns = 4;
  in_panels<kMostRows>(rows, [&](auto height, int i) AUXFAST_INLINE {
    in_panels<kMostColumns>(columns, [&](auto width, int k) AUXFAST_INLINE {
      outer_panel<T, decltype(height)::value, decltype(width)::value>(packs, i, k, columns, out);
    });
  });
}

// out[i] += the sum of the packs i over the samples of the tiles. out: in and out, (count).
template <class T>
void add_packs(TilePacks<T> packs, int tiles, int count, T* out) {
  for (int first = 0; first < count; first += kLanes<T>) {
    const int some = count - first < kLanes<T> ? count - first : kLanes<T>;
    Vec<T> sum[kLanes<T>] = {};
    for (int i = 0; i < some; ++i) {
      Pack<T> over_tiles{};
      for (int tile = 0; tile < tiles; ++tile) over_tiles += packs.first[tile * packs.stride + first + i];
      for (int v = 0; v < kPackVectors; ++v) sum[i] += over_tiles.vector[v];
    }
    const Vec<T> total = sum_each<T>(sum);
    for (int i = 0; i < some; ++i) out[first + i] += total[i];
  }
}

}  // namespace auxfast::AUXFAST_ISA
