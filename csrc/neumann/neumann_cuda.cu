// The Neumann steps on a GPU: one launch for a list of a few hundred tensors, and for the guarded step one more that
// adds the blocks' sums. No atomics, so that the same call gives the same bits, and nothing waits for the device.
#include "common/block_sum.cuh"
#include "neumann/neumann.h"
#include "neumann/neumann_math.h"

namespace auxfast::cuda {

constexpr int kWarps = kSumThreads / 32;
constexpr int kPerLane = int(kTileElements) / 32;

// What one launch is told of a list. Its `tiles`, from first_tile on, are dealt to the blocks in order: each has
// `share` of them, and the first `more` blocks have one more.
template <class Tensor, int kCapacity>
struct Launch {
  Tensor tensors[kCapacity];
  int count;  // of tensors
  int64_t first_tile, share, more;
  bool adds;  // to the sums, of which the list's earlier launches have written as many
};

// Tensors for which the arguments of a kernel have room, besides 64 bytes for the others: in 4 KB, and in the 32 KB
// that CUDA 12.1 allows from compute capability 7.0 on. Short lists keep to 4 KB, since all arguments are copied.
template <class Tensor>
constexpr int kFew = int((4096 - 64 - sizeof(Launch<Tensor, 1>)) / sizeof(Tensor)) + 1;
#if CUDART_VERSION >= 12010
template <class Tensor>
constexpr int kMany = int((32764 - 64 - sizeof(Launch<Tensor, 1>)) / sizeof(Tensor)) + 1;

// Whether the driver knows 32 KB of arguments: one of CUDA 12.0 may run a module that was built with 12.1.
bool has_room_for_many() {
  static const bool answer = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12010;
  }();
  return answer;
}
#else
template <class Tensor>
constexpr int kMany = kFew<Tensor>;
constexpr bool has_room_for_many() { return false; }
#endif

template <class T>
struct alignas(16) LaneElements {
  T x[kPerLane];
};

// A lane's access to all of its elements, or to those before `count`, where the others are zeros. It has the same
// elements whether or not they are loaded together.
struct Together {
  template <class T>
  __device__ __forceinline__ LaneElements<T> load(const T* from) const {
    return *reinterpret_cast<const LaneElements<T>*>(from);
  }
  template <class T>
  __device__ __forceinline__ void store(T* to, const LaneElements<T>& value) const {
    *reinterpret_cast<LaneElements<T>*>(to) = value;
  }
};
struct OneByOne {
  int64_t count;
  template <class T>
  __device__ __forceinline__ LaneElements<T> load(const T* from) const {
    LaneElements<T> value = {};
    AUXFAST_UNROLL
    for (int i = 0; i < kPerLane; ++i)
      if (i < count) value.x[i] = from[i];
    return value;
  }
  template <class T>
  __device__ __forceinline__ void store(T* to, const LaneElements<T>& value) const {
    AUXFAST_UNROLL
    for (int i = 0; i < kPerLane; ++i)
      if (i < count) to[i] = value.x[i];
  }
};

template <class T>
__device__ __forceinline__ bool are_aligned(const T* a, const T* b, const T* c, const T* d) {
  return ((reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | reinterpret_cast<uintptr_t>(c) |
           reinterpret_cast<uintptr_t>(d)) %
          alignof(LaneElements<T>)) == 0;
}

// Calls visit(tensor, at) for the tiles of the block, where `at` is the element that the lane begins with; there may be
// none, in a tensor's last tile. A warp takes one tile at a time, so that even tensors of a few elements keep all warps
// busy.
template <class Tensor, int kCapacity, class Visit>
__device__ __forceinline__ void for_each_tile(const Launch<Tensor, kCapacity>& launch, const Visit& visit) {
  const int lane = threadIdx.x % 32;
  const int64_t block = blockIdx.x;
  const int64_t begin = launch.first_tile + block * launch.share + (block < launch.more ? block : launch.more);
  const int64_t end = begin + launch.share + (block < launch.more);
  int64_t tile = begin + threadIdx.x / 32;
  int low = 0, high = launch.count;  // to find the last tensor that starts at or before this warp's first tile
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (launch.tensors[middle].first_tile <= tile)
      low = middle;
    else
      high = middle;
  }
  for (; tile < end; tile += kWarps) {
    while (low + 1 < launch.count && launch.tensors[low + 1].first_tile <= tile) ++low;
    const Tensor& tensor = launch.tensors[low];
    visit(tensor, (tile - tensor.first_tile) * kTileElements + lane * kPerLane);
  }
}

// sums: out, (gridDim.x,)
template <class T, int kCapacity>
__global__ void __launch_bounds__(kSumThreads)
    step_kernel(const __grid_constant__ Launch<NeumannTensor<T>, kCapacity> launch, T step_size, double* sums) {
  double sum = 0;
  for_each_tile(launch, [&](const NeumannTensor<T>& tensor, int64_t at) {
    T *v = tensor.v + at, *p = tensor.p + at;
    const T* hv = tensor.hv + at;
    const auto update = [&](auto access) {
      LaneElements<T> new_v = access.load(v), new_p = access.load(p);
      const LaneElements<T> product = access.load(hv);
      AUXFAST_UNROLL
      for (int i = 0; i < kPerLane; ++i) {
        neumann_element(new_v.x[i], product.x[i], new_p.x[i], step_size);
        sum += double(new_v.x[i]) * double(new_v.x[i]);
      }
      access.store(v, new_v);
      access.store(p, new_p);
    };
    if (are_aligned<T>(v, hv, p, p) && at + kPerLane <= tensor.numel)
      update(Together{});
    else
      update(OneByOne{tensor.numel - at});
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = launch.adds ? sums[blockIdx.x] + sum : sum;
}

// sums: out, (2, gridDim.x): of the squares of the new v, and of those of hv
template <class T, int kCapacity>
__global__ void __launch_bounds__(kSumThreads)
    guarded_step_kernel(const __grid_constant__ Launch<GuardedTensor<T>, kCapacity> launch, T step_size,
                        const double* numbers, double* sums) {
  if (numbers[kGrew] != 0) return;
  double square = 0, of_product = 0;
  for_each_tile(launch, [&](const GuardedTensor<T>& tensor, int64_t at) {
    T *v_before = tensor.v_before + at, *p = tensor.p + at;
    const T *v = tensor.v + at, *hv = tensor.hv + at;
    const auto update = [&](auto access) {
      LaneElements<T> new_v = access.load(v_before), new_p = access.load(p);
      const LaneElements<T> last = access.load(v), product = access.load(hv);
      AUXFAST_UNROLL
      for (int i = 0; i < kPerLane; ++i) {
        guarded_element(last.x[i], new_v.x[i], product.x[i], new_p.x[i], step_size);
        square += double(new_v.x[i]) * double(new_v.x[i]);
        of_product += double(product.x[i]) * double(product.x[i]);
      }
      access.store(v_before, new_v);
      access.store(p, new_p);
    };
    if (are_aligned<T>(v, v_before, hv, p) && at + kPerLane <= tensor.numel)
      update(Together{});
    else
      update(OneByOne{tensor.numel - at});
  });
  square = block_sum(square);
  __syncthreads();
  of_product = block_sum(of_product);
  if (threadIdx.x != 0) return;
  double *of_v = sums + blockIdx.x, *of_hv = of_v + gridDim.x;
  *of_v = launch.adds ? *of_v + square : square;
  *of_hv = launch.adds ? *of_hv + of_product : of_product;
}

// sums: in, (2, count)
static __global__ void __launch_bounds__(kSumThreads)
    guarded_numbers_kernel(const double* sums, int64_t count, double* numbers) {
  if (numbers[kGrew] != 0) return;
  double square = 0, of_product = 0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) {
    square += sums[i];
    of_product += sums[count + i];
  }
  square = block_sum(square);
  __syncthreads();
  of_product = block_sum(of_product);
  if (threadIdx.x == 0) note_step(numbers, square, of_product);
}

constexpr int64_t kGuardedSums = 132 * 6;  // as kCudaSums: the guarded step's 40 registers leave room for 6 blocks

// Enough blocks that each warp has a tile, or that the GPU is full. All launches of a list have as many, so that they
// add to the same sums.
int64_t blocks_of(int64_t tiles, int64_t most) {
  const int64_t blocks = (tiles + kWarps - 1) / kWarps;
  return blocks < 1 ? 1 : blocks < most ? blocks : most;
}

// Calls launch_one(launch) for kCapacity tensors at a time, and at least once, until one fails. blocks: of each launch
template <int kCapacity, class Tensor, class LaunchOne>
const char* launch_by(const TensorList<Tensor>& list, int64_t blocks, const LaunchOne& launch_one) {
  static_assert(sizeof(Launch<Tensor, kCapacity>) + 64 <= (kCapacity > kFew<Tensor> ? 32764 : 4096), "arguments");
  int64_t begin = 0;
  do {
    const int64_t end = begin + kCapacity < list.count ? begin + kCapacity : list.count;
    Launch<Tensor, kCapacity> launch{};
    launch.count = int(end - begin);
    for (int i = 0; i < launch.count; ++i) launch.tensors[i] = list.tensors[begin + i];
    launch.first_tile = launch.tensors[0].first_tile;
    const int64_t tiles = (end < list.count ? list.tensors[end].first_tile : list.tiles) - launch.first_tile;
    launch.share = tiles / blocks;
    launch.more = tiles % blocks;
    launch.adds = begin > 0;
    if (const char* error = launch_one(launch)) return error;
    begin = end;
  } while (begin < list.count);
  return nullptr;
}

template <class Tensor, class LaunchOne>
const char* for_each_launch(const TensorList<Tensor>& list, int64_t blocks, const LaunchOne& launch_one) {
  return list.count > kFew<Tensor> && has_room_for_many() ? launch_by<kMany<Tensor>>(list, blocks, launch_one)
                                                          : launch_by<kFew<Tensor>>(list, blocks, launch_one);
}

// The capacity of a launch, for a template argument.
template <class Tensor, int kCapacity>
std::integral_constant<int, kCapacity> capacity_of(const Launch<Tensor, kCapacity>&);

template <class T>
const char* step(const NeumannStep<T>& work, void* stream) {
  const int64_t blocks = blocks_of(work.list.tiles, kCudaSums);
  return for_each_launch(work.list, blocks, [&](const auto& launch) {
    constexpr int kCapacity = decltype(capacity_of(launch))::value;
    LAUNCH((step_kernel<T, kCapacity>), grid_of(blocks), dim3(kSumThreads), 0, stream, launch, work.step_size,
           work.sums);
    return launch_error();
  });
}

template <class T>
const char* guarded_step(const GuardedStep<T>& work, void* stream) {
  const int64_t blocks = blocks_of(work.list.tiles, kGuardedSums);
  auto* sums = static_cast<double*>(work.workspace);
  const char* error = for_each_launch(work.list, blocks, [&](const auto& launch) {
    constexpr int kCapacity = decltype(capacity_of(launch))::value;
    LAUNCH((guarded_step_kernel<T, kCapacity>), grid_of(blocks), dim3(kSumThreads), 0, stream, launch, work.step_size,
           work.numbers, sums);
    return launch_error();
  });
  if (error) return error;
  LAUNCH(guarded_numbers_kernel, dim3(1), dim3(kSumThreads), 0, stream, sums, blocks, work.numbers);
  return launch_error();
}

template <class T>
int64_t step_bytes(const NeumannStep<T>&) {
  return 0;
}
template <class T>
int64_t guarded_step_bytes(const GuardedStep<T>& work) {
  return 2 * blocks_of(work.list.tiles, kGuardedSums) * int64_t(sizeof(double));
}

template <class T>
constexpr NeumannCudaKernels<T> kKernels{{step_bytes<T>, step<T>}, {guarded_step_bytes<T>, guarded_step<T>}};
extern const NeumannCudaKernels<float> neumann_f32 = kKernels<float>;
extern const NeumannCudaKernels<double> neumann_f64 = kKernels<double>;

}  // namespace auxfast::cuda
