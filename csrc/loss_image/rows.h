// Rows of pixels: conversions between plain order and their two phases (see convolution.h), rings, and masks of
// columns.
#pragma once

#include <cstring>

#include "common/vector_element.h"

namespace auxfast::AUXFAST_ISA {

template <class T>
using Mask = typename VectorTypes<T>::Bits;  // has all bits of a lane, or none

template <class T>
AUXFAST_HD Vec<T> masked(Vec<T> value, Mask<T> mask) {
  return ElementOf<Vec<T>>::from_bits(ElementOf<Vec<T>>::bits(value) & mask);
}

// masked(load(from), mask). From a selection GCC makes a load that leaves lanes out: free with AVX-512, but with
// AVX2 slower than two instructions.
template <class T>
AUXFAST_HD Vec<T> load_masked(const T* from, Mask<T> mask) {
  if constexpr (kVectorBytes == 64)
    return mask != 0 ? load(from) : Vec<T>{};
  else
    return masked<T>(load(from), mask);
}

template <class T>
constexpr std::make_integer_sequence<int, kLanes<T>> kLaneIndices{};

// Splits plain columns, in: (2 * count), into phases, out: (count) each; whole vectors of them.
template <class T>
AUXFAST_HD void split_columns(const T* columns, int64_t count, T* even, T* odd) {
  for (int64_t x = 0; x < count; x += kLanes<T>) {
    const Vec<T> first = load(columns + 2 * x), second = load(columns + 2 * x + kLanes<T>);
    store<T>(even + x, every_second<T, 0>(first, second, kLaneIndices<T>));
    store<T>(odd + x, every_second<T, 1>(first, second, kLaneIndices<T>));
  }
}

// split_columns for a row of any width, with zeros behind the last column, up to the end of a vector.
template <class T>
AUXFAST_HD void split_row(const T* columns, int64_t width, T* even, T* odd) {
  const int64_t whole = width / (2 * kLanes<T>)*(2 * kLanes<T>);
  split_columns(columns, whole / 2, even, odd);
  if (whole == width) return;
  T rest[2 * kLanes<T>] = {};
  std::memcpy(rest, columns + whole, size_t(width - whole) * sizeof(T));
  split_columns(rest, kLanes<T>, even + whole / 2, odd + whole / 2);
}

template <class T>
AUXFAST_HD void store_interleaved(T* columns, Vec<T> even, Vec<T> odd) {
  store<T>(columns, interleave<T, false>(even, odd, kLaneIndices<T>));
  store<T>(columns + kLanes<T>, interleave<T, true>(even, odd, kLaneIndices<T>));
}

template <class T>
T sum_row(const T* row, int64_t count) {
  Vec<T> sum{};
  int64_t x = 0;
  for (; x + kLanes<T> <= count; x += kLanes<T>) sum += load(row + x);
  T rest = sum_lanes<T>(sum);
  for (; x < count; ++x) rest += row[x];
  return rest;
}

// The last few rows of an image, for all channels and one or two streams (value and tangent). Rows outside the image
// are zero.
template <class T>
struct RowRing {
  int height, slots;
  int64_t length, stream_stride, row_stride;  // elements from phase to phase, stream to stream, row to row
  T* rows;
  const T* zeros;

  AUXFAST_HD T* row(int y, int stream) const { return rows + (y % slots) * row_stride + stream * stream_stride; }
  AUXFAST_HD const T* row_or_zeros(int y, int stream) const { return y < 0 || y >= height ? zeros : row(y, stream); }
};

}  // namespace auxfast::AUXFAST_ISA
