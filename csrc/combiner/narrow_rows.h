// The first layer's products when there are few losses: a tile's rows of losses are transposed into packs, and back.
#pragma once

#include <cstdint>
#include <cstring>

#include "combiner/pack.h"

namespace auxfast::AUXFAST_ISA {

// Rows of `count` losses to packs and back: pack k holds loss k of the tile's samples, zeros behind the last sample.
// Square blocks are transposed in registers; the last block of a row that they do not divide reaches back into the one
// before. Rows shorter than a vector are moved as vectors all the same where memory up to `end` allows: what is read
// too much lands in packs that nobody looks at (there must be room for one vector's worth of packs), what is written
// too much is the beginning of the next row, which is written next.
constexpr int64_t kTooShortForVectors = 4;

template <class T>
AUXFAST_HD void gather_block(const T* rows, int samples, int64_t count, int64_t first, const T* end, Pack<T>* packs) {
  const int64_t length = count < kLanes<T> ? count : kLanes<T>;
  for (int v = 0; v < kPackVectors; ++v) {
    Vec<T> block[kLanes<T>];
    for (int i = 0; i < kLanes<T>; ++i) {
      const int s = v * kLanes<T> + i;
      const T* from = rows + s * count + first;
      block[i] = Vec<T>{};
      if (s < samples && from + kLanes<T> <= end)
        block[i] = load(from);
      else if (s < samples)
        for (int64_t k = 0; k < length; ++k) block[i][k] = from[k];
    }
    transpose<T>(block);
    for (int i = 0; i < kLanes<T>; ++i) packs[first + i].part[v] = block[i];
  }
}

template <class T>
void gather_tile(const T* rows, int samples, int64_t count, const T* end, Pack<T>* packs) {
  if (count <= kTooShortForVectors) {
    if (samples < kTile<T>) std::memset(static_cast<void*>(packs), 0, count * sizeof(Pack<T>));
    for (int64_t k = 0; k < count; ++k)
      for (int s = 0; s < samples; ++s) packs[k].samples()[s] = rows[s * count + k];
    return;
  }
  int64_t first = 0;
  for (; first + kLanes<T> < count; first += kLanes<T>) gather_block(rows, samples, count, first, end, packs);
  gather_block(rows, samples, count, count < kLanes<T> ? 0 : count - kLanes<T>, end, packs);
}

template <class T>
AUXFAST_HD void scatter_block(const Pack<T>* packs, int samples, int64_t count, int64_t first, const T* end, T* rows) {
  const int64_t length = count < kLanes<T> ? count : kLanes<T>;
  for (int v = 0; v < kPackVectors; ++v) {
    Vec<T> block[kLanes<T>];
    for (int i = 0; i < kLanes<T>; ++i) block[i] = packs[first + i].part[v];
    transpose<T>(block);
    for (int i = 0; i < kLanes<T>; ++i) {
      const int s = v * kLanes<T> + i;
      if (s >= samples) return;
      T* to = rows + s * count + first;
      if (to + kLanes<T> <= end)
        store(to, block[i]);
      else
        for (int64_t k = 0; k < length; ++k) to[k] = block[i][k];
    }
  }
}

template <class T>
void scatter_tile(const Pack<T>* packs, int samples, int64_t count, const T* end, T* rows) {
  if (count <= kTooShortForVectors) {
    for (int s = 0; s < samples; ++s)
      for (int64_t k = 0; k < count; ++k) rows[s * count + k] = packs[k].samples()[s];
    return;
  }
  int64_t first = 0;
  for (; first + kLanes<T> < count; first += kLanes<T>) scatter_block(packs, samples, count, first, end, rows);
  scatter_block(packs, samples, count, count < kLanes<T> ? 0 : count - kLanes<T>, end, rows);
}

}  // namespace auxfast::AUXFAST_ISA
