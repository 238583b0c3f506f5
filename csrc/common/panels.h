// Splitting a runtime count into panels whose height the compiler knows, so that their sums stay in registers.
#pragma once

#include <type_traits>

#include "common/host_device.h"

namespace auxfast::AUXFAST_ISA {

// Covers 0 .. count - 1 with as few panels of at most kMost as possible and calls
// work(std::integral_constant<int, height>, first) for each. What one full panel and some more would cover becomes two
// panels of nearly equal height, because a low panel has too few sums to keep the arithmetic units busy.
template <int kMost, class Work>
AUXFAST_HD void in_panels(int count, const Work& work) {
  static_assert(kMost >= 1 && kMost <= 6);
  for (int first = 0; first < count;) {
    const int left = count - first;
    const int height = left >= 2 * kMost ? kMost : left > kMost ? (left + 1) / 2 : left;
    if (height == 1) work(std::integral_constant<int, 1>{}, first);
    if constexpr (kMost >= 2)
      if (height == 2) work(std::integral_constant<int, 2>{}, first);
    if constexpr (kMost >= 3)
      if (height == 3) work(std::integral_constant<int, 3>{}, first);
    if constexpr (kMost >= 4)
      if (height == 4) work(std::integral_constant<int, 4>{}, first);
    if constexpr (kMost >= 5)
      if (height == 5) work(std::integral_constant<int, 5>{}, first);
    if constexpr (kMost >= 6)
      if (height == 6) work(std::integral_constant<int, 6>{}, first);
    first += height;
  }
}

}  // namespace auxfast::AUXFAST_ISA
