// The loss-image op: what one call is told. Host code, CPU kernels and CUDA kernels share it.
//
// An image of losses h_0 (num_losses, H, W) goes through convolutions  z_i = W_i * h_{i-1} + b_i  (3x3, padding 1),
// each followed by  h_i = avgpool2(act(z_i)),  to  g = mean over positions of w . h_depth,  and the main loss is added:
// + k (sum over pixels of h_0[main_loss]). The value is sum_b g_b, their mean, or g itself.
//
// A pool halves a dimension and drops the last row or column of an odd one, as PyTorch does. Along a dimension of size
// 1 it would leave nothing: there it does nothing.
#pragma once

#include <cstdint>

#include "common/network.h"

namespace auxfast {

constexpr int kMaxConvolutions = 4;
constexpr int kMaxChannels = 64;  // of the losses, too
constexpr int kTaps = 9;          // of a 3x3 kernel

constexpr int32_t pool_extent(int32_t size) { return size > 1 ? 2 : 1; }
constexpr int32_t pooled_size(int32_t size) { return size / pool_extent(size); }

// How the CPU divides the work; by sizes alone, so that the result does not depend on the number of threads. Narrow
// images lie side by side in a strip, tall ones are cut into bands of rows. An item is one band of one strip; a chunk
// is a run of items that one thread adds up in phi, one after the other.
struct LossImageItems {
  int64_t images;            // of a strip; the last one may have fewer
  int64_t segment;           // columns of a strip from one image to the next
  int64_t bands, band_rows;  // of an image; of a band (the last one takes what is left)
  int64_t count, chunks;     // of items; of chunks
};

// phi is flat: for every convolution W_i (channels_i, channels_{i-1}, 3, 3) and b_i (channels_i); then w (channels of
// the last).
template <class T>
struct LossImageParams : NetworkParams<T> {
  int32_t channels[kMaxConvolutions + 1];                             // of h_i; channels[0]: num_losses
  int32_t height[kMaxConvolutions + 1], width[kMaxConvolutions + 1];  // of h_i
  int64_t weight[kMaxConvolutions + 1];                               // where in phi W_{i+1} begins; weight[depth]: w
  int64_t bias[kMaxConvolutions];                                     // where in phi b_{i+1} begins
  T position_scale;  // 1 / (positions of z_depth that the last pool keeps)
  T main_scale;      // k, unless there are main_weights

  const T* main_weights;  // in: (batch), k of each image; or nullptr
  LossImageItems items;   // CPU only
};

// Host code only calls these two, so that no copy of them for a particular instruction set exists.
template <class T>
LossImageItems loss_image_items(const LossImageParams<T>& net) {
  constexpr int64_t kStripColumns = 288, kBandRows = 256, kEnoughItems = 32, kMostChunks = 64;
  LossImageItems items{};
  const int64_t unit = int64_t(1) << net.depth;  // bands and images begin where rows and column pairs of all layers do
  items.segment = (net.width[0] + unit - 1) / unit * unit;
  int64_t most_images = kStripColumns / items.segment;
  if (most_images < 1) most_images = 1;
  const int64_t strips = (net.batch + most_images - 1) / most_images;
  items.images = (net.batch + strips - 1) / strips;
  items.bands = net.height[0] / kBandRows;
  const int64_t wanted = (kEnoughItems + strips - 1) / strips;
  if (items.bands > wanted) items.bands = wanted;
  if (items.bands < 1) items.bands = 1;
  items.band_rows = net.height[0] / items.bands / unit * unit;
  items.count = strips * items.bands;
  items.chunks = items.count < kMostChunks ? items.count : kMostChunks;
  return items;
}

// The sums of every chunk for phi, the sums of every band for the value, and all weights twice in the kernels' order.
template <class T>
int64_t loss_image_workspace_bytes(const LossImageParams<T>& net) {
  const int64_t tangents = net.tangents ? net.num_tangents : 1;
  const int64_t phi_sums = net.grad_phi ? tangents * net.items.chunks * net.num_parameters : 0;
  const int64_t sums = phi_sums + net.items.bands * net.batch;
  return sums * int64_t(sizeof(double)) + 2 * net.num_parameters * int64_t(sizeof(T));
}

template <class T>
using LossImageKernels = NetworkKernels<LossImageParams<T>>;
template <class T>
using LossImageCudaKernels = NetworkCudaKernels<LossImageParams<T>>;

}  // namespace auxfast
