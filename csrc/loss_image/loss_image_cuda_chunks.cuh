// How the GPU divides the loss image's work, and where it keeps what it needs of it.
//
// A pass works on one chunk after another: as many whole images as the workspace takes, or, if it does not take one, a
// band of rows of an image. So the workspace does not grow with the batch, and with an image's width only. Of layer i
// a band owns rows of h_i; its halo, which the neighbouring band computes again, holds what these rows depend on:
// one row of h_i on either side on the way back, 2^(depth - i + 1) - 1 rows forward. A record that the forward pass
// saves is of whole images, and so are the chunks of passes that have one.
#pragma once

#include <atomic>

#include "common/block_sum.cuh"
#include "loss_image/loss_image.h"
#include "loss_image/loss_image_math.h"

namespace auxfast::cuda {

constexpr int64_t kMemoryShare = 256;   // of the device's memory a chunk's images take one part in so many
constexpr int64_t kWeightBlocks = 512;  // that should share a layer's gradient in its weights
constexpr int64_t kPartPixels = 4096;   // that a block should sum of a plane: 16 a thread
constexpr int64_t kMostParts = 256;     // in which a plane is summed; a warp adds them up

// Channels that a thread computes at a time: few, or as many as registers allow.
constexpr int kFewOutputs = 4;
template <class T>
constexpr int kManyOutputs = 32 / sizeof(T);
template <class T>
constexpr int panel(int channels) {
  return channels > kFewOutputs ? kManyOutputs<T> : kFewOutputs;
}
constexpr int panels_of(int channels, int panel) { return (channels + panel - 1) / panel; }

struct Rows {
  int32_t begin, end;

  // These rows with `margin` more on either side, if the image has them.
  Rows grown(int32_t margin, int32_t height) const {
    return {begin > margin ? begin - margin : 0, end < height - margin ? end + margin : height};
  }
  Rows times(int32_t factor) const { return {factor * begin, factor * end}; }
};

// Some rows of all channels of images.
template <class T>
struct Planes {
  T* data;  // row rows.begin of the first channel; nullptr: there are none
  int64_t image_stride, channel_stride;
  Rows rows;
  int32_t width, pitch;  // columns; elements from one row to the next

  AUXFAST_HD int64_t offset(int64_t image, int channel, int32_t y) const {
    return image * image_stride + channel * channel_stride + int64_t(y - rows.begin) * pitch;
  }
  AUXFAST_HD T* row(int64_t image, int channel, int32_t y) const { return data + offset(image, channel, y); }
  AUXFAST_HD T& at(int64_t image, int channel, int32_t y, int32_t x) const { return row(image, channel, y)[x]; }

  Planes only(Rows some) const {
    return {data + int64_t(some.begin - rows.begin) * pitch, image_stride, channel_stride, some, width, pitch};
  }
  Planes<const T> to_read() const { return {data, image_stride, channel_stride, rows, width, pitch}; }
};

template <class T>
Planes<T> planes_of(T* data, int32_t channels, Rows rows, int32_t width, int32_t pitch) {
  const int64_t size = int64_t(rows.end - rows.begin) * pitch;
  return {data, channels * size, size, rows, width, pitch};
}

// Two neighbours in a row of z_i, from an even column on.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T at[2];

  static AUXFAST_HD Pair load(const T* from) { return *reinterpret_cast<const Pair*>(from); }
  AUXFAST_HD void store(T* to) const { *reinterpret_cast<Pair*>(to) = *this; }
};

struct Chunk {
  int64_t first_image, images;
  int band;
  Rows owned[kMaxConvolutions + 1];  // rows of h_i

  bool is_first() const { return first_image == 0 && band == 0; }
};

// The planes of a chunk's layers, index i: of h_i and of z_i. Those of z_i have the pixels that the pool keeps, and one
// layout, of an even pitch: a row of one pixel is followed by an element that nobody uses. They are the same for all
// first-order passes, so that their values have the same bits. The steps write them in this order:
// clang-format off
//   step              in                            out
//   activate          h[i-1]                        new_h[i], state[i]; e[depth]
//   go_back           e[i], state[i-1]              e[i-1]
//   activate_tangent  hd[i-1], state[i]; e[depth]   new_hd[i], zd[i], but zd[depth] gets kappa
//   go_back           zd[i], state[i-1], e[i-1]     zd[i-1] gets kappa
// clang-format on
template <class T>
struct ChunkPlanes {
  Planes<const T> h[kMaxConvolutions + 1], hd[kMaxConvolutions + 1];  // [0]: the losses, their tangent
  Planes<T> new_h[kMaxConvolutions + 1], new_hd[kMaxConvolutions + 1];
  Planes<T> state[kMaxConvolutions + 1], e[kMaxConvolutions + 1];  // the same memory if nobody needs the state later
  Planes<T> zd[kMaxConvolutions + 1];                              // kappa takes zd's place
  Rows back[kMaxConvolutions + 1];                                 // rows of h_i for which e_i and kappa_i are made
  int64_t elements = 0;                                            // that the planes take together

  // `net` has the chunk's images. From nullptr on it measures the memory.
  ChunkPlanes(const LossImageParams<T>& net, const Chunk& chunk, T* memory) {
    const bool with_tangent = net.tangents != nullptr;
    const auto take = [&](bool wanted, int32_t channels, Rows rows, int32_t width, int32_t pitch) {
      Planes<T> planes = planes_of(memory, channels, rows, width, pitch);
      if (!wanted || !memory) planes.data = nullptr;
      if (!wanted) return planes;
      const int64_t size = chunk.images * planes.image_stride, even_size = size + size % 2;
      elements += even_size;
      if (memory) memory += even_size;
      return planes;
    };
    // Planes that are saved, or are taken where nothing is.
    T* saved = net.saved;
    const auto keep = [&](int32_t channels, Rows rows, int32_t width, int32_t pitch) {
      if (!saved) return take(true, channels, rows, width, pitch);
      Planes<T> planes = planes_of(saved, channels, rows, width, pitch);
      planes.data += chunk.first_image * planes.image_stride;
      const int64_t size = net.batch * planes.image_stride;
      saved += size + size % 2;
      return planes;
    };
    h[0] = planes_of(net.losses, net.channels[0], {0, net.height[0]}, net.width[0], net.width[0]);
    for (int i = 1; i <= net.depth; ++i) {
      const Rows rows = chunk.owned[i].grown((2 << (net.depth - i)) - 1, net.height[i]);
      const Rows pixels = rows.times(pool_extent(net.height[i - 1]));
      const int32_t width = pool_extent(net.width[i - 1]) * net.width[i], pitch = width + width % 2;
      back[i] = chunk.owned[i].grown(1, net.height[i]);
      new_h[i] = keep(net.channels[i], rows, net.width[i], net.width[i]);
      new_hd[i] = take(with_tangent, net.channels[i], rows, net.width[i], net.width[i]);
      h[i] = new_h[i].to_read();
      hd[i] = new_hd[i].to_read();
      state[i] = keep(net.channels[i], pixels, width, pitch);
      e[i] = with_tangent || net.saved ? take(true, net.channels[i], pixels, width, pitch) : state[i];
      zd[i] = take(with_tangent, net.channels[i], pixels, width, pitch);
    }
  }
};

// How images are divided into chunks.
struct Chunking {
  int64_t images;  // in a chunk; the last one may have fewer
  int bands;       // that an image has

  template <class T>
  Chunk chunk(const LossImageParams<T>& net, int64_t first_image, int band) const {
    Chunk chunk{first_image, images < net.batch - first_image ? images : net.batch - first_image, band, {}};
    const auto begin = [&](int b) { return int32_t(b * int64_t(net.height[0]) / bands) >> net.depth << net.depth; };
    for (int i = 0; i <= net.depth; ++i)
      chunk.owned[i] = {begin(band) >> i, band + 1 < bands ? begin(band + 1) >> i : net.height[i]};
    return chunk;
  }

  // Elements of the planes of the largest chunk.
  template <class T>
  int64_t elements(const LossImageParams<T>& net) const {
    int64_t most = 0;
    for (int band = 0; band < bands; ++band) {
      const int64_t elements = ChunkPlanes<T>(net, chunk(net, 0, band), nullptr).elements;
      if (elements > most) most = elements;
    }
    return most;
  }
};

// Bytes of the current device's memory. A device is asked once, since its answer takes longer than a call of a pass
// may. 0: it gave none; then the launch that follows fails too, and says why.
inline int64_t device_memory() {
  constexpr int kMostDevices = 64;
  static std::atomic<int64_t> known[kMostDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMostDevices) return 0;
  int64_t bytes = known[device].load(std::memory_order_relaxed);
  if (bytes > 0) return bytes;
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) return 0;
  bytes = int64_t(properties.totalGlobalMem);
  known[device].store(bytes, std::memory_order_relaxed);
  return bytes;
}

// A chunk takes its share of the device's memory, unless the narrowest band is larger: so many images or rows that the
// device is busy with each launch.
template <class T>
Chunking make_chunking(const LossImageParams<T>& net) {
  const int64_t limit = device_memory() / kMemoryShare / int64_t(sizeof(T));
  Chunking chunking{1, 1};
  const int64_t affordable = limit / chunking.elements(net);
  if (affordable > 1) chunking.images = affordable < net.batch ? affordable : net.batch;
  while (!net.saved && chunking.elements(net) > limit && net.height[0] / (2 * chunking.bands) >= 4 << net.depth)
    chunking.bands *= 2;
  return chunking;
}

// The number of blocks that share a layer's gradient in its weights, for each panel of outputs and each input.
template <class T>
int weight_blocks(const LossImageParams<T>& net, int layer) {
  const int outputs = net.channels[layer + 1];
  const int64_t blocks = kWeightBlocks / (panels_of(outputs, panel<T>(outputs)) * net.channels[layer]);
  return blocks > 1 ? int(blocks) : 1;
}

// The number of blocks that share the sum of a plane of h_i.
template <class T>
int sum_parts(const LossImageParams<T>& net, int i) {
  const int64_t parts = int64_t(net.height[i]) * net.width[i] / kPartPixels;
  return parts < 1 ? 1 : int(parts < kMostParts ? parts : kMostParts);
}

// The workspace: the sums of all chunks, then what each chunk leaves for them, then its planes. `bytes`, its size, is
// known without there being any.
template <class T>
struct Workspace {
  double* values;       // (batch), in the forward pass
  double* phi_sums;     // (num_tangents or 1, num_parameters)
  double* plane_sums;   // (images, channels of the last layer, parts)
  double* main_sums;    // (images, parts)
  double* weight_sums;  // (weight_blocks, weights and biases of a layer)
  T* planes;
  int64_t bytes;

  Workspace(const LossImageParams<T>& net, const Chunking& chunking) {
    int64_t count = 0;
    const auto take = [&](int64_t numbers) {
      const uintptr_t at = uintptr_t(net.workspace) + uintptr_t(count) * sizeof(double);
      count += numbers;
      return reinterpret_cast<double*>(at);
    };
    values = take(net.value ? net.batch : 0);
    phi_sums = take(net.grad_phi ? (net.tangents ? net.num_tangents : 1) * net.num_parameters : 0);
    plane_sums = take(chunking.images * net.channels[net.depth] * sum_parts(net, net.depth));
    main_sums = take(chunking.images * sum_parts(net, 0));
    int64_t most = 0;
    for (int i = 0; net.grad_phi && i < net.depth; ++i) {
      const int64_t numbers = weight_blocks(net, i) * (net.weight[i + 1] - net.weight[i]);
      if (numbers > most) most = numbers;
    }
    weight_sums = take(most);
    take(count % 2);  // so that pairs are aligned
    planes = reinterpret_cast<T*>(take(0));
    bytes = count * int64_t(sizeof(double)) + chunking.elements(net) * int64_t(sizeof(T));
  }
};

}  // namespace auxfast::cuda
