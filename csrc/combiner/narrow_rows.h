// Transposition for the first layer's products when there are few losses: a tile's rows of losses become packs, and
// packs become rows.
//
// Rows are read and written in words of 16 bytes, which cost little more than whole vectors: a vector takes the same
// columns of every fourth sample (AVX-512; every second with AVX2), and as many vectors as a word has columns are then
// transposed word by word. The last word of a row reaches back into the one before.
#pragma once

#include <cstdint>
#include <cstring>

#include "combiner/pack.h"

namespace auxfast::AUXFAST_ISA {

template <class T>
constexpr int kWordLanes = kWordBytes / int(sizeof(T));

#if defined(__clang__) || __GNUC__ >= 12
template <class V, int... I>
AUXFAST_HD auto concatenate(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, I...);
}

// One vector of the words at from, from + stride, ...
template <class T, int kBytes = kVectorBytes>
AUXFAST_HD auto load_words(const T* from, int64_t stride) {
  if constexpr (kBytes == kWordBytes)
    return typename VectorTypes<T>::Word(*reinterpret_cast<const typename VectorTypes<T>::UnalignedWord*>(from));
  else
    return concatenate(load_words<T, kBytes / 2>(from, stride),
                       load_words<T, kBytes / 2>(from + kBytes / 2 / kWordBytes * stride, stride),
                       std::make_integer_sequence<int, kBytes / int(sizeof(T))>{});
}

// Writes the vector's words to `to`, to + stride, ...
template <class T, int kWord = 0, int... I>
AUXFAST_HD void store_words(T* to, int64_t stride, Vec<T> value, std::integer_sequence<int, I...> lanes) {
  *reinterpret_cast<typename VectorTypes<T>::UnalignedWord*>(to) =
      __builtin_shufflevector(value, value, (kWord * kWordLanes<T> + I)...);
  if constexpr ((kWord + 1) * kWordBytes < kVectorBytes) store_words<T, kWord + 1>(to + stride, stride, value, lanes);
}
template <class T>
AUXFAST_HD void store_words(T* to, int64_t stride, Vec<T> value) {
  store_words<T>(to, stride, value, std::make_integer_sequence<int, kWordLanes<T>>{});
}
#else  // through the stack
template <class T>
AUXFAST_HD Vec<T> load_words(const T* from, int64_t stride) {
  Vec<T> vector;
  for (int i = 0; i < kVectorBytes / kWordBytes; ++i)
    std::memcpy(reinterpret_cast<char*>(&vector) + i * kWordBytes, from + i * stride, kWordBytes);
  return vector;
}
template <class T>
AUXFAST_HD void store_words(T* to, int64_t stride, Vec<T> value) {
  for (int i = 0; i < kVectorBytes / kWordBytes; ++i)
    std::memcpy(to + i * stride, reinterpret_cast<const char*>(&value) + i * kWordBytes, kWordBytes);
}
#endif

// Exchanges the off-diagonal quarters of every square of 2 kHalf x 2 kHalf numbers in the words of `rows`.
template <class T, int kHalf, int... I>
AUXFAST_HD void transpose_squares(Vec<T>* rows, std::integer_sequence<int, I...>) {
  constexpr int kN = kLanes<T>;
#pragma GCC unroll 4
  for (int i = 0; i < kWordLanes<T>; ++i) {
    if (i & kHalf) continue;
    const Vec<T> upper = rows[i], lower = rows[i + kHalf];
    rows[i] = shuffle<T>(upper, lower, std::integer_sequence<int, (I & kHalf ? kN + (I ^ kHalf) : I)...>{});
    rows[i + kHalf] = shuffle<T>(upper, lower, std::integer_sequence<int, (I & kHalf ? kN + I : I ^ kHalf)...>{});
  }
}

// Transposes the square matrices that the words of `rows` are; in and out, kWordLanes vectors.
template <class T>
AUXFAST_HD void transpose_words(Vec<T>* rows) {
  constexpr std::make_integer_sequence<int, kLanes<T>> lanes;
  if constexpr (kWordLanes<T> > 2) transpose_squares<T, 2>(rows, lanes);
  transpose_squares<T, 1>(rows, lanes);
}

// Calls work(vector, first column) for the words of a tile's rows, in the vectors that are full, and returns how many
// samples these hold.
template <class T, class Work>
AUXFAST_HD int for_each_word(int samples, int64_t count, const Work& work) {
  if (count < kWordLanes<T>) return 0;
  const int vectors = samples / kLanes<T>;
  for (int v = 0; v < vectors; ++v) {
    for (int64_t first = 0; first + kWordLanes<T> < count; first += kWordLanes<T>) work(v, first);
    work(v, count - kWordLanes<T>);
  }
  return vectors * kLanes<T>;
}

// rows: in, (samples, count); packs: out, (count). Pack k gets loss k of the tile's samples, and zeros behind the last.
template <class T>
void gather_tile(const T* rows, int samples, int64_t count, Pack<T>* packs) {
  const int done = for_each_word<T>(samples, count, [&](int v, int64_t first) {
    Vec<T> square[kWordLanes<T>];
    for (int i = 0; i < kWordLanes<T>; ++i)
      square[i] = load_words(rows + (v * kLanes<T> + i) * count + first, kWordLanes<T> * count);
    transpose_words<T>(square);
    for (int k = 0; k < kWordLanes<T>; ++k) packs[first + k].vector[v] = square[k];
  });
  for (int64_t k = 0; k < count; ++k) {
    for (int s = done; s < samples; ++s) packs[k].samples()[s] = rows[s * count + k];
    for (int s = samples; s < kTile<T>; ++s) packs[k].samples()[s] = T(0);
  }
}

// The inverse of gather_tile: writes packs back as rows. packs: in, (count); rows: out, (samples, count).
template <class T>
void scatter_tile(const Pack<T>* packs, int samples, int64_t count, T* rows) {
  const int done = for_each_word<T>(samples, count, [&](int v, int64_t first) {
    Vec<T> square[kWordLanes<T>];
    for (int k = 0; k < kWordLanes<T>; ++k) square[k] = packs[first + k].vector[v];
    transpose_words<T>(square);
    for (int i = 0; i < kWordLanes<T>; ++i)
      store_words(rows + (v * kLanes<T> + i) * count + first, kWordLanes<T> * count, square[i]);
  });
  for (int s = done; s < samples; ++s)
    for (int64_t k = 0; k < count; ++k) rows[s * count + k] = packs[k].samples()[s];
}

}  // namespace auxfast::AUXFAST_ISA
