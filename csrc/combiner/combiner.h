// What the kernels of the combiner are told: pointers and sizes, nothing of torch.
//
// A sample's losses l (num_losses) go through hidden layers  z_i = W_i h_{i-1} + b_i,  h_i = act(z_i),  h_0 = l,
// to  g = w . h_depth  (+ l[main_loss]).  The value is sum_b g_b, their mean, or g itself.
#pragma once

#include <cstdint>

#include "common/network.h"

namespace auxfast {

constexpr int kMaxDepth = 8;
constexpr int kMaxWidth = 64;

// phi is flat: for every hidden layer W_i (width_i, inputs_i), row by row, then b_i (width_i) if there are biases; then
// w (width of the last layer).
template <class T>
struct CombinerParams : NetworkParams<T> {
  int64_t num_losses;
  int32_t units;  // the widths of all hidden layers together
  int32_t width[kMaxDepth];
  int32_t first_unit[kMaxDepth];  // the number of layer i's first among all units
  int64_t weight[kMaxDepth + 1];  // where in phi W_i begins; weight[depth]: w
  int64_t bias[kMaxDepth];        // where in phi b_i begins; -1 without biases

  T* saved;  // out, forward; in, later passes: (combiner_saved_size) in the kernels' own order, or nullptr
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

// Elements of `saved`: 3 for each unit and sample, in whole tiles.
template <class T>
int64_t combiner_saved_size(const CombinerParams<T>& net) {
  return 3 * int64_t(net.units) * ((net.batch + kTileSamples - 1) / kTileSamples * kTileSamples);
}

// The workspace on the CPU: the value's sum of each chunk, or phi's sums of each tangent and chunk. Only host code
// calls this and combiner_saved_size, so that no copy of them for a particular instruction set exists.
template <class T>
int64_t combiner_workspace_bytes(const CombinerParams<T>& net) {
  const int64_t chunks = combiner_num_chunks(net.batch), tangents = net.tangents ? net.num_tangents : 1;
  return net.grad_phi ? tangents * chunks * net.num_parameters * int64_t(sizeof(T)) : chunks * int64_t(sizeof(double));
}

template <class T>
using CombinerKernels = NetworkKernels<CombinerParams<T>>;
template <class T>
using CombinerCudaKernels = NetworkCudaKernels<CombinerParams<T>>;

}  // namespace auxfast
