// What the kernels of the loss image are told: pointers and sizes, nothing of torch.
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
constexpr int kMaxChannels = 64;               // of the losses, too
constexpr int kTaps = 9;                       // of a 3x3 kernel
constexpr int32_t kMaxExtent = INT32_MAX / 2;  // rows or columns of an image, so that rounding up leaves 32 bits

constexpr int32_t pool_extent(int32_t size) { return size > 1 ? 2 : 1; }
constexpr int32_t pooled_size(int32_t size) { return size / pool_extent(size); }

// How the CPU divides the work: by sizes alone, so that the result does not depend on the number of threads. Tall
// images are cut into bands of rows, and narrow ones lie side by side: a tile is one band of some images. A chunk is a
// run of tiles; one thread works on it and adds up its sums for phi.
struct LossImageTiles {
  int64_t images;            // of a tile; the last ones may have fewer
  int64_t pitch;             // columns from one image of a tile to the next
  int64_t bands, band_rows;  // bands of an image, rows of a band (the last one takes what is left)
  int64_t count, chunks;     // how many tiles and chunks there are
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
  T* saved;               // out, forward; in, later passes; (loss_image_saved_size), or nullptr. CUDA only
  LossImageTiles tiles;   // CPU only
};

// Elements of a plane of z_i, i > 0: those that the pool keeps, in rows of an even pitch.
template <class T>
int64_t state_size(const LossImageParams<T>& net, int i) {
  const int64_t width = pool_extent(net.width[i - 1]) * net.width[i];
  return int64_t(pool_extent(net.height[i - 1])) * net.height[i] * (width + width % 2);
}

// Elements that CUDA's forward pass may save for the later ones: of each layer the activations' state, and h.
template <class T>
int64_t loss_image_saved_size(const LossImageParams<T>& net) {
  int64_t size = 0;
  for (int i = 1; i <= net.depth; ++i) {
    const int64_t channels = net.batch * net.channels[i], of_h = channels * net.height[i] * net.width[i];
    size += channels * state_size(net, i) + of_h + of_h % 2;
  }
  return size;
}

// Host code only calls these two, so that no copy of them for a particular instruction set exists.
template <class T>
LossImageTiles loss_image_tiles(const LossImageParams<T>& net) {
  constexpr int64_t kTileColumns = 288, kBandRows = 256, kEnoughTiles = 32, kMostChunks = 64;
  LossImageTiles tiles{};
  const int64_t step = int64_t(1) << net.depth;  // bands and images begin where rows and column pairs of all layers do
  tiles.pitch = (net.width[0] + step - 1) / step * step;
  int64_t most_images = kTileColumns / tiles.pitch;
  if (most_images < 1) most_images = 1;
  const int64_t tiles_per_band = (net.batch + most_images - 1) / most_images;
  tiles.images = (net.batch + tiles_per_band - 1) / tiles_per_band;
  tiles.bands = net.height[0] / kBandRows;
  const int64_t wanted = (kEnoughTiles + tiles_per_band - 1) / tiles_per_band;
  if (tiles.bands > wanted) tiles.bands = wanted;
  if (tiles.bands < 1) tiles.bands = 1;
  tiles.band_rows = net.height[0] / tiles.bands / step * step;
  tiles.count = tiles_per_band * tiles.bands;
  tiles.chunks = tiles.count < kMostChunks ? tiles.count : kMostChunks;
  return tiles;
}

// The workspace on the CPU: the sums of every chunk for phi, the sums of every band for the value, and all weights
// twice in the kernels' order.
template <class T>
int64_t loss_image_workspace_bytes(const LossImageParams<T>& net) {
  const int64_t tangents = net.tangents ? net.num_tangents : 1;
  const int64_t phi_sums = net.grad_phi ? tangents * net.tiles.chunks * net.num_parameters : 0;
  const int64_t sums = phi_sums + net.tiles.bands * net.batch;
  return sums * int64_t(sizeof(double)) + 2 * net.num_parameters * int64_t(sizeof(T));
}

template <class T>
using LossImageKernels = NetworkKernels<LossImageParams<T>>;
template <class T>
using LossImageCudaKernels = NetworkCudaKernels<LossImageParams<T>>;

}  // namespace auxfast
