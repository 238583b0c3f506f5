// The combiner on the CPU. Samples are worked on in tiles: a pack holds one number for each sample of a tile, and the
// formulas of combiner_math.h run on packs. Sums over samples stay in the lanes until several tiles are done.
#include <cstring>

#include "combiner/combiner.h"
#include "combiner/combiner_math.h"
#include "combiner/lane_sums.h"
#include "combiner/narrow_rows.h"
#include "combiner/pack.h"
#include "combiner/wide_rows.h"

namespace auxfast::AUXFAST_ISA {
namespace {

// Transposing a tile's losses into packs beats running lanes along the losses up to here (measured at widths 10, 64).
constexpr int64_t kMostTransposedLosses = 48;

// Sums for phi are made from several tiles at once, as many as these bounds allow.
template <class T>
constexpr int kMostTiles = 256 / kTile<T>;
constexpr int64_t kTilesBytes = 512 << 10;  // of their packs, which should not leave the L2 cache

// One chunk of samples: one thread works on it, in memory of its own.
template <class T, class Act>
class Chunk {
  using Math = CombinerMath<OnPacks<Act>, Pack<T>, T, Pack<T>*>;

 public:
  Chunk(const CombinerParams<T>& params, int64_t index, const Executor& executor, T* phi_sums)
      : net(params), math{params}, wide(params.num_losses > kMostTransposedLosses), phi_sums(phi_sums) {
    const int64_t losses = wide ? 0 : net.num_losses, inputs = wide ? net.width[0] : losses;
    own_stride = 5 * net.units + 2 * inputs;
    saved_stride = net.saved ? 3 * net.units : own_stride;
    const int64_t fitting = kTilesBytes / int64_t(own_stride * sizeof(Pack<T>));
    tiles_at_once = phi_sums ? int(fitting < 1 ? 1 : fitting < kMostTiles<T> ? fitting : kMostTiles<T>) : 1;
    own = static_cast<Pack<T>*>(executor.scratch((tiles_at_once * own_stride + losses) * sizeof(Pack<T>)));
    results = own + tiles_at_once * own_stride;
    if (phi_sums) std::memset(phi_sums, 0, net.num_parameters * sizeof(T));
    const int64_t chunk = combiner_chunk(net.batch);
    begin = index * chunk;
    end = begin + chunk < net.batch ? begin + chunk : net.batch;
  }

  // Writes values and their derivatives in the losses. Returns the chunk's sum of values, in double.
  double forward() {
    double total = 0;
    for_each_tile([&](int64_t first, int samples) {
      activate(first, samples);
      total += write_value(first, samples);
      for (int unit = 0; unit < net.width[0]; ++unit) hd[unit] = net.scale * delta[unit];
      to_losses(hd, samples, net.main_loss >= 0 ? net.scale : T(0), net.grad_losses, first);
    });
    return total;
  }

  // Adds up sum_b c_b d g_b / d phi.
  void backward_phi() {
    for_each_tile([&](int64_t first, int samples) {
      if (!net.saved) activate(first, samples);
      const Pack<T> c = incoming(first, samples);
      for (int unit = 0; unit < net.units; ++unit) {
        kappa[unit] = c * delta[unit];
        hd[unit] = c * value[unit];
      }
      if (wide)
        add_rows_to_phi(kappa, net.losses, first, samples);
      else
        gather_tile(net.losses + first * net.num_losses, samples, net.num_losses, tile_losses);
    });
  }

  // Writes the derivatives of sum_b c_b <d g_b / d l_b, t_b> in the losses and, if asked for, adds up those in phi.
  // tangent: in, grad_losses: out, both (batch, num_losses).
  void second_order(const T* tangent, T* grad_losses) {
    second = true;
    for_each_tile([&](int64_t first, int samples) {
      if (!net.saved) activate(first, samples);
      const Pack<T> c = incoming(first, samples);
      math.second_order(
          [&](const auto& result) {
            from_losses(tangent, first, samples, nullptr, tile_tangent,
                        [&](int unit, Pack<T> zd) AUXFAST_INLINE { result(unit, c * zd); });
          },
          state, delta, hd, kappa);
      to_losses(kappa, samples, T(0), grad_losses, first);
      if (!phi_sums) return;
      // c e_1 t^T is the one term where the tangent's own factor c is still missing.
      if (wide) {
        Pack<T> scaled[kMaxWidth];
        for (int unit = 0; unit < net.width[0]; ++unit) scaled[unit] = c * delta[unit];
        add_rows_to_phi(kappa, net.losses, first, samples);
        add_rows_to_phi(scaled, tangent, first, samples);
      } else {
        gather_tile(net.losses + first * net.num_losses, samples, net.num_losses, tile_losses);
        for (int k = 0; k < net.num_losses; ++k) tile_tangent[k] = c * tile_tangent[k];
      }
    });
  }

 private:
  // Calls work(first sample, samples) for every tile, with the pointers at its packs. The packs of tiles_at_once tiles
  // stay until their sums for phi are made.
  template <class Work>
  void for_each_tile(const Work& work) {
    int64_t first = begin;
    while (first < end) {
      const int64_t first_of_tiles = first;
      int tiles = 0;
      for (; tiles < tiles_at_once && first < end; ++tiles, first += kTile<T>) {
        point_to_tile(first, tiles);
        work(first, int(end - first < kTile<T> ? end - first : kTile<T>));
      }
      point_to_tile(first_of_tiles, 0);
      if (phi_sums) add_to_phi(tiles);
    }
  }

  // Points to the saved tile that begins at sample `first`, or to this chunk's own.
  void point_to_tile(int64_t first, int tile) {
    Pack<T>* mine = own + tile * own_stride;
    state = net.saved ? reinterpret_cast<Pack<T>*>(net.saved + first * 3 * net.units) : mine;
    delta = state + net.units;
    value = delta + net.units;
    hd = mine + 3 * net.units;
    kappa = hd + net.units;
    tile_losses = kappa + net.units;
    tile_tangent = tile_losses + (wide ? net.width[0] : net.num_losses);
  }

  // Calls result(unit, <row `unit` of W_1, sample's losses> + bias) for the units of the first layer. matrix: in,
  // (batch, num_losses). tile: overwritten; unless wide, the tile's rows of the matrix stay there as packs.
  template <class Result>
  void from_losses(const T* matrix, int64_t first, int samples, const T* bias, Pack<T>* tile, const Result& result) {
    const int64_t losses = net.num_losses;
    const int width = net.width[0];
    if (!wide) {
      gather_tile(matrix + first * losses, samples, losses, tile);
      matvec<Pack<T>>(width, int(losses), math.weight(0), losses, 1, bias, tile, result);
      return;
    }
    if (samples < kTile<T>) std::memset(static_cast<void*>(tile), 0, width * sizeof(Pack<T>));
    row_products(math.weight(0), width, matrix + first * losses, samples, losses, tile->samples(), kTile<T>);
    for (int unit = 0; unit < width; ++unit) result(unit, bias ? tile[unit] + bias[unit] : tile[unit]);
  }

  // Writes W_1^T units, and `main` more in the main loss's column, to the tile's rows of matrix: out, (batch,
  // num_losses).
  void to_losses(const Pack<T>* units, int samples, T main, T* matrix, int64_t first) {
    const int64_t losses = net.num_losses;
    T* rows = matrix + first * losses;
    if (!wide) {
      matvec<Pack<T>>(int(losses), net.width[0], math.weight(0), 1, losses, static_cast<const T*>(nullptr), units,
                      [&](int k, Pack<T> sum) AUXFAST_INLINE { results[k] = sum; });
      if (main != T(0)) results[net.main_loss] = results[net.main_loss] + main;
      scatter_tile(results, samples, losses, rows);
      return;
    }
    const auto combine = [&](auto count, int s) {
      combine_rows<T, false>({units->samples() + s, 1, kTile<T>}, count, net.width[0], math.weight(0), losses,
                             rows + s * losses);
    };
    if (net.width[0] > 1)
      combine(samples, 0);
    else  // one row of weights stays in the cache, and fresh memory takes whole rows faster than columns
      for (int s = 0; s < samples; ++s) combine(std::integral_constant<int, 1>{}, s);
    if (main != T(0))
      for (int s = 0; s < samples; ++s) rows[s * losses + net.main_loss] += main;
  }

  void activate(int64_t first, int samples) {
    math.forward(
        [&](const auto& result) { from_losses(net.losses, first, samples, math.bias(0), tile_losses, result); }, state,
        value);
    math.backward(state, delta);
  }

  double write_value(int64_t first, int samples) {
    Pack<T> g = math.output(value);
    if (net.main_loss >= 0 && !wide) g += tile_losses[net.main_loss];
    if (net.main_loss >= 0 && wide)
      for (int s = 0; s < samples; ++s) g.samples()[s] += net.losses[(first + s) * net.num_losses + net.main_loss];
    if (net.per_sample) std::memcpy(net.value + first, g.samples(), samples * sizeof(T));
    blank_behind(samples, g);
    double total = 0;
    for (int v = 0; v < kPackVectors; ++v) total += double(sum_lanes<T>(g.vector[v]));
    return total;
  }

  // The gradient c that reaches each sample, with the scale of the mean; 0 behind the last sample.
  Pack<T> incoming(int64_t first, int samples) const {
    Pack<T> c{};
    if (net.grad_stride == 0)
      c = c + net.scale * net.grad[0];
    else
      for (int s = 0; s < samples; ++s) c.samples()[s] = net.scale * net.grad[first + s];
    blank_behind(samples, c);
    return c;
  }

  static void blank_behind(int samples, Pack<T>& pack) {
    for (int s = samples; s < kTile<T>; ++s) pack.samples()[s] = T(0);
  }

  // Adds to phi_sums, over several tiles: kappa h^T, and delta hd^T in second order, for the weights; kappa for the
  // biases; hd of the last layer for the output weights. The pointers are those of the first tile.
  void add_to_phi(int tiles) {
    const TilePacks<T> kappas{kappa, own_stride}, hds{hd, own_stride}, values{value, saved_stride};
    const TilePacks<T> deltas{second ? delta : nullptr, saved_stride};
    for (int layer = 0; layer < net.depth; ++layer) {
      const int at = net.first_unit[layer], width = net.width[layer];
      if (net.bias[layer] >= 0) add_packs<T>(kappas + at, tiles, width, phi_sums + net.bias[layer]);
      if (layer > 0) {
        const int below = net.first_unit[layer - 1];
        add_outer<T>({kappas + at, values + below, second ? deltas + at : deltas, hds + below, tiles}, width,
                     net.width[layer - 1], phi_sums + net.weight[layer]);
      } else if (!wide) {
        add_outer<T>({kappas, {tile_losses, own_stride}, deltas, {tile_tangent, own_stride}, tiles}, width,
                     int(net.num_losses), phi_sums);
      }
    }
    const int last = net.depth - 1;
    add_packs<T>(hds + net.first_unit[last], tiles, net.width[last], phi_sums + net.weight[net.depth]);
  }

  // Adds the first layer's weights of a wide tile: lanes run along the losses, so these sums need no lanes of their
  // own.
  void add_rows_to_phi(const Pack<T>* units, const T* matrix, int64_t first, int samples) {
    combine_rows<T, true>({units->samples(), kTile<T>, 1}, net.width[0], samples, matrix + first * net.num_losses,
                          net.num_losses, phi_sums);
  }

  const CombinerParams<T>& net;
  Math math;
  const bool wide;
  bool second = false;
  int64_t begin, end;
  // The packs of the tile that is worked on:
  // clang-format off
  //   pass          state, delta, value              hd                       kappa
  //   forward       out; into `saved` if asked for   layer 0: scale * delta   unused
  //   backward_phi  in, from `saved` or made again   c * value                c * delta
  //   second_order  in, from `saved` or made again   hd                       kappa
  // clang-format on
  Pack<T>*state, *delta, *value, *hd, *kappa;  // (units): see combiner_math.h
  Pack<T>*tile_losses, *tile_tangent;          // (num_losses), or if wide (width of the first layer)
  Pack<T>*own, *results;                       // (tiles_at_once, own_stride); (num_losses), or if wide unused
  int64_t own_stride, saved_stride;            // packs from tile to tile
  int tiles_at_once;                           // tiles whose sums for phi are made at once
  T* phi_sums;                                 // out: (num_parameters), this chunk's; or nullptr
};

template <class T, class Act>
void forward(const CombinerParams<T>& net, const Executor& executor) {
  const int64_t chunks = combiner_num_chunks(net.batch);
  auto* totals = static_cast<double*>(net.workspace);
  executor.run(chunks, [&](int64_t index) { totals[index] = Chunk<T, Act>(net, index, executor, nullptr).forward(); });
  if (net.per_sample) return;
  double total = 0;
  for (int64_t index = 0; index < chunks; ++index) total += totals[index];
  *net.value = T(total * net.scale);
}

// Adds the chunks' sums for phi in order. chunk_sums: in, (chunks, count); out: (count).
template <class T>
void add_chunks(const T* chunk_sums, int64_t chunks, int64_t count, T* out) {
  constexpr int64_t kAtOnce = 64;
  for (int64_t first = 0; first < count; first += kAtOnce) {
    const int64_t some = count - first < kAtOnce ? count - first : kAtOnce;
    double sum[kAtOnce] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t i = 0; i < some; ++i) sum[i] += chunk_sums[chunk * count + first + i];
    for (int64_t i = 0; i < some; ++i) out[first + i] = T(sum[i]);
  }
}

template <class T, class Act>
void backward_phi(const CombinerParams<T>& net, const Executor& executor) {
  const int64_t chunks = combiner_num_chunks(net.batch);
  T* chunk_sums = chunks > 1 ? static_cast<T*>(net.workspace) : net.grad_phi;
  executor.run(chunks, [&](int64_t index) {
    Chunk<T, Act>(net, index, executor, chunk_sums + index * net.num_parameters).backward_phi();
  });
  if (chunks > 1) add_chunks(chunk_sums, chunks, net.num_parameters, net.grad_phi);
}

template <class T, class Act>
void second_order(const CombinerParams<T>& net, const Executor& executor) {
  const int64_t chunks = combiner_num_chunks(net.batch), size = net.batch * net.num_losses;
  T* chunk_sums = chunks > 1 ? static_cast<T*>(net.workspace) : net.grad_phi;
  executor.run(net.num_tangents * chunks, [&](int64_t index) {
    const int64_t tangent = index / chunks;
    T* phi_sums = net.grad_phi ? chunk_sums + index * net.num_parameters : nullptr;
    Chunk<T, Act>(net, index % chunks, executor, phi_sums)
        .second_order(net.tangents + tangent * size, net.grad_losses + tangent * size);
  });
  if (!net.grad_phi || chunks == 1) return;
  for (int64_t tangent = 0; tangent < net.num_tangents; ++tangent)
    add_chunks(chunk_sums + tangent * chunks * net.num_parameters, chunks, net.num_parameters,
               net.grad_phi + tangent * net.num_parameters);
}

#define AUXFAST_BY_ACTIVATION(function)                        \
  [](const CombinerParams<T>& net, const Executor& executor) { \
    if (net.activation == Activation::softplus)                \
      function<T, Softplus>(net, executor);                    \
    else                                                       \
      function<T, Identity>(net, executor);                    \
  }
template <class T>
constexpr CombinerKernels<T> kKernels{AUXFAST_BY_ACTIVATION(forward), AUXFAST_BY_ACTIVATION(backward_phi),
                                      AUXFAST_BY_ACTIVATION(second_order)};

}  // namespace

extern const CombinerKernels<float> combiner_f32 = kKernels<float>;
extern const CombinerKernels<double> combiner_f64 = kKernels<double>;

}  // namespace auxfast::AUXFAST_ISA
