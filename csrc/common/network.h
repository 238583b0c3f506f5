// Codes by which the networks' descriptions name their choices; as auxfast/ops/network.py has them.
#pragma once

#include <cstdint>

namespace auxfast {

enum class Activation : int32_t { identity, softplus };
enum class Reduction : int64_t { none, sum, mean };  // over the batch

}  // namespace auxfast
