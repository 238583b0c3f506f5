// The first layer's products when there are few losses: a tile's rows of losses are transposed into packs, and back.
//
// Rows are read and written in pieces of 16 bytes, which cost little more than whole vectors: a vector takes the same
// columns of every fourth sample (AVX-512; every second with AVX2), and as many vectors as a piece has columns are then
// transposed piece by piece. The last piece of a row reaches back into the one before.
#pragma once

#include <cstdint>
#include <cstring>

#include "combiner/pack.h"

namespace auxfast::AUXFAST_ISA {

template <class T>
constexpr int kPieceLanes = kPieceBytes / int(sizeof(T));

#if defined(__clang__) || __GNUC__ >= 12
template <class V, int... I>
AUXFAST_HD auto concatenate(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, I...);
}

// The pieces at from, from + stride, ... in one vector.
template <class T, int kBytes = kVectorBytes>
AUXFAST_HD auto load_pieces(const T* from, int64_t stride) {
  if constexpr (kBytes == kPieceBytes)
    return typename VectorTypes<T>::Piece(*reinterpret_cast<const typename VectorTypes<T>::UnalignedPiece*>(from));
  else
    return concatenate(load_pieces<T, kBytes / 2>(from, stride),
                       load_pieces<T, kBytes / 2>(from + kBytes / 2 / kPieceBytes * stride, stride),
                       std::make_integer_sequence<int, kBytes / int(sizeof(T))>{});
}

// The vector's pieces to `to`, to + stride, ...
template <class T, int kPiece = 0, int... I>
AUXFAST_HD void store_pieces(T* to, int64_t stride, Vec<T> value, std::integer_sequence<int, I...> lanes) {
  *reinterpret_cast<typename VectorTypes<T>::UnalignedPiece*>(to) =
      __builtin_shufflevector(value, value, (kPiece * kPieceLanes<T> + I)...);
  if constexpr ((kPiece + 1) * kPieceBytes < kVectorBytes)
    store_pieces<T, kPiece + 1>(to + stride, stride, value, lanes);
}
template <class T>
AUXFAST_HD void store_pieces(T* to, int64_t stride, Vec<T> value) {
  store_pieces<T>(to, stride, value, std::make_integer_sequence<int, kPieceLanes<T>>{});
}
#else  // through the stack
template <class T>
AUXFAST_HD Vec<T> load_pieces(const T* from, int64_t stride) {
  Vec<T> vector;
  for (int i = 0; i < kVectorBytes / kPieceBytes; ++i)
    std::memcpy(reinterpret_cast<char*>(&vector) + i * kPieceBytes, from + i * stride, kPieceBytes);
  return vector;
}
template <class T>
AUXFAST_HD void store_pieces(T* to, int64_t stride, Vec<T> value) {
  for (int i = 0; i < kVectorBytes / kPieceBytes; ++i)
    std::memcpy(to + i * stride, reinterpret_cast<const char*>(&value) + i * kPieceBytes, kPieceBytes);
}
#endif

// Exchanges the off-diagonal quarters of every 2 kHalf x 2 kHalf block in the pieces of `rows`.
template <class T, int kHalf, int... I>
AUXFAST_HD void transpose_blocks(Vec<T>* rows, std::integer_sequence<int, I...>) {
  constexpr int kN = kLanes<T>;
#pragma GCC unroll 4
  for (int i = 0; i < kPieceLanes<T>; ++i) {
    if (i & kHalf) continue;
    const Vec<T> upper = rows[i], lower = rows[i + kHalf];
    rows[i] = shuffle<T>(upper, lower, std::integer_sequence<int, (I & kHalf ? kN + (I ^ kHalf) : I)...>{});
    rows[i + kHalf] = shuffle<T>(upper, lower, std::integer_sequence<int, (I & kHalf ? kN + I : I ^ kHalf)...>{});
  }
}

// Transposes the square matrices that the pieces of `rows` are.
template <class T>
AUXFAST_HD void transpose_pieces(Vec<T>* rows) {
  constexpr std::make_integer_sequence<int, kLanes<T>> lanes;
  if constexpr (kPieceLanes<T> > 2) transpose_blocks<T, 2>(rows, lanes);
  transpose_blocks<T, 1>(rows, lanes);
}

// work(vector, first column) for the pieces of a tile's rows, in the vectors that are full; their samples are returned.
template <class T, class Work>
AUXFAST_HD int for_each_piece(int samples, int64_t count, const Work& work) {
  if (count < kPieceLanes<T>) return 0;
  const int vectors = samples / kLanes<T>;
  for (int v = 0; v < vectors; ++v) {
    for (int64_t first = 0; first + kPieceLanes<T> < count; first += kPieceLanes<T>) work(v, first);
    work(v, count - kPieceLanes<T>);
  }
  return vectors * kLanes<T>;
}

// Rows of `count` losses to packs: pack k holds loss k of the tile's samples, zeros behind the last sample.
template <class T>
void gather_tile(const T* rows, int samples, int64_t count, Pack<T>* packs) {
  const int done = for_each_piece<T>(samples, count, [&](int v, int64_t first) {
    Vec<T> block[kPieceLanes<T>];
    for (int i = 0; i < kPieceLanes<T>; ++i)
      block[i] = load_pieces(rows + (v * kLanes<T> + i) * count + first, kPieceLanes<T> * count);
    transpose_pieces<T>(block);
    for (int k = 0; k < kPieceLanes<T>; ++k) packs[first + k].part[v] = block[k];
  });
  for (int64_t k = 0; k < count; ++k) {
    for (int s = done; s < samples; ++s) packs[k].samples()[s] = rows[s * count + k];
    for (int s = samples; s < kTile<T>; ++s) packs[k].samples()[s] = T(0);
  }
}

// And back.
template <class T>
void scatter_tile(const Pack<T>* packs, int samples, int64_t count, T* rows) {
  const int done = for_each_piece<T>(samples, count, [&](int v, int64_t first) {
    Vec<T> block[kPieceLanes<T>];
    for (int k = 0; k < kPieceLanes<T>; ++k) block[k] = packs[first + k].part[v];
    transpose_pieces<T>(block);
    for (int i = 0; i < kPieceLanes<T>; ++i)
      store_pieces(rows + (v * kLanes<T> + i) * count + first, kPieceLanes<T> * count, block[i]);
  });
  for (int s = done; s < samples; ++s)
    for (int64_t k = 0; k < count; ++k) rows[s * count + k] = packs[k].samples()[s];
}

}  // namespace auxfast::AUXFAST_ISA
