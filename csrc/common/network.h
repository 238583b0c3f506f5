// What the ops with a network (combiner, loss image) have in common: what their kernels are told, and their passes.
#pragma once

#include <cstdint>

#include "common/kernels.h"

namespace auxfast {

// These codes are those of auxfast/ops/network.py.
enum class Activation : int32_t { identity, softplus };
enum class Reduction : int64_t { none, sum, mean };  // over the batch

// One call of a pass. A sample is one of the batch: a row of losses, or an image of them; (losses) stands for its
// shape, (num_losses) or (num_losses, H, W).
template <class T>
struct NetworkParams {
  using Element = T;

  int64_t batch;
  int32_t depth;           // hidden layers, or convolutions
  int64_t num_parameters;  // of phi
  Activation activation;
  int64_t main_loss;  // column or channel of the losses that is added to the network's output, or -1
  bool per_sample;    // the value is (batch) instead of one number
  T scale;            // of every sample in the value: 1 / batch for the mean, else 1

  const T* losses;      // in: (batch, losses)
  const T* phi;         // in: (num_parameters)
  const T* grad;        // in, later passes: the gradient that reaches the value, (batch) or one number
  int64_t grad_stride;  // 1 or 0
  const T* tangents;    // in, second order: (num_tangents, batch, losses)
  int64_t num_tangents;

  T* value;         // out, forward: (batch) or one number
  T* grad_losses;   // out, forward: d value / d losses (batch, losses); second order: (num_tangents, batch, losses)
  T* grad_phi;      // out, backward_phi: (num_parameters); second order: (num_tangents, num_parameters), or nullptr
  void* workspace;  // overwritten; its size is what the op's functions for workspace bytes say
};

enum class Pass { forward, backward_phi, second_order };

// An op's passes on one kind of device; auxfast/ops/<op>.py says what each returns.
template <class Kernel>
struct Passes {
  Kernel forward, backward_phi, second_order;

  // Only host code calls this, so that no copy of it for a particular instruction set exists.
  const Kernel& get(Pass pass) const {
    return pass == Pass::forward ? forward : pass == Pass::backward_phi ? backward_phi : second_order;
  }
};

template <class Params>
using NetworkKernels = Passes<CpuKernel<Params>>;
template <class Params>
using NetworkCudaKernels = Passes<CudaKernel<Params>>;

}  // namespace auxfast
