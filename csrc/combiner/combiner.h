// The combiner op: what one call is told. Host code, CPU kernels and CUDA kernels share it.
//
// A sample's losses l (num_losses) go through hidden layers  z_i = W_i h_{i-1} + b_i,  h_i = act(z_i),  h_0 = l,
// to  g = w . h_depth  (+ l[main_loss]).  The value is sum_b g_b, their mean, or g itself.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/network.h"
#include "common/parallel.h"

namespace auxfast {

constexpr int kMaxDepth = 8;
constexpr int kMaxWidth = 64;

// phi is flat: for every hidden layer W_i (width_i, inputs_i), row by row, then b_i (width_i) if there are biases; then
// w (width of the last layer).
template <class T>
struct CombinerParams {
  int64_t batch, num_losses;
  int32_t depth, units;  // hidden layers; their widths together
  int32_t width[kMaxDepth];
  int32_t first_unit[kMaxDepth];  // of layer i among all units
  int64_t weight[kMaxDepth + 1];  // where in phi W_i begins; weight[depth]: w
  int64_t bias[kMaxDepth];        // where in phi b_i begins; -1 without biases
  int64_t num_parameters;         // of phi
  Activation activation;
  int32_t main_loss;  // column that is added to g, or -1
  bool per_sample;    // the value is (batch) instead of one number
  T scale;            // of every sample in the value: 1 / batch for the mean, else 1

  const T* losses;  // (batch, num_losses)
  const T* phi;     // (num_parameters)
  T* saved;         // 3 * units numbers a sample (whole tiles), in the kernels' own order; or nullptr

  T* value;    // forward: (1) or (batch)
  T* weights;  // forward: (batch, num_losses), d value / d losses

  const T* grad;  // later passes: gradient that reaches the value; grad_stride 0: one number, 1: (batch)
  int64_t grad_stride;
  const T* tangents;  // second order: (num_tangents, batch, num_losses)
  int64_t num_tangents;
  T* grad_losses;   // second order: (num_tangents, batch, num_losses)
  T* grad_phi;      // (num_tangents, num_parameters), phi gradient: (num_parameters); or nullptr
  void* workspace;  // CPU: a number a chunk (forward), or phi's sums of every tangent and chunk
};

// Sums over the batch are made chunk by chunk, and the chunks' sums added in order: chunks depend on the batch alone,
// so that the result does not depend on the number of threads. A chunk is whole tiles of every instruction set.
constexpr int64_t kTileSamples = 64;
constexpr int64_t combiner_chunk(int64_t batch) {
  const int64_t samples = batch / 128 < 512 ? 512 : batch / 128;
  return (samples + kTileSamples - 1) / kTileSamples * kTileSamples;
}
constexpr int64_t combiner_num_chunks(int64_t batch) {
  return (batch + combiner_chunk(batch) - 1) / combiner_chunk(batch);
}

// Forward, gradient in phi, and second order: see auxfast/ops/combiner.py for what each returns.
template <class T>
struct CombinerKernels {
  void (*forward)(const CombinerParams<T>&, const Executor&);
  void (*backward_phi)(const CombinerParams<T>&, const Executor&);
  void (*second_order)(const CombinerParams<T>&, const Executor&);
};

// The same passes on a GPU: nullptr, or what CUDA said against the launch. `workspace` is device memory.
template <class T>
struct CombinerCudaKernels {
  const char* forward(const CombinerParams<T>&, void* stream) const;
  const char* backward_phi(const CombinerParams<T>&, void* stream) const;
  const char* second_order(const CombinerParams<T>&, void* stream) const;
};
template <class T>
int64_t combiner_cuda_workspace_bytes(const CombinerParams<T>&);

}  // namespace auxfast
