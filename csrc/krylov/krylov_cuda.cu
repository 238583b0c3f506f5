// The Krylov solvers' vector work on a GPU: one launch a pass, and for long rows one more that adds the blocks' sums.
// No atomics, so that the same call gives the same bits; coefficients are read and sums are left on the device, and
// nothing waits.
#include "common/block_sum.cuh"
#include "krylov/conjugate_gradient_math.h"
#include "krylov/krylov.h"
#include "krylov/krylov_math.h"
#include "krylov/minres_math.h"

namespace auxfast::cuda {

// A block takes a chunk of kBlockElements of a row, and a thread every 256th element of it, so that loads are coalesced
// however the row is aligned, and loads all it takes of an operand before it uses the first, so that enough of them are
// on their way.
constexpr int kPerThread = 8;
constexpr int64_t kBlockElements = int64_t(kSumThreads) * kPerThread;

int64_t blocks_per_row(int64_t n) { return n > kBlockElements ? (n + kBlockElements - 1) / kBlockElements : 1; }

// Why a call is not launched, or nullptr.
template <class Work>
const char* refusal(const Work& work) {
  static_assert(kBlockElements == 2048, "as the message says");
  return work.rows * blocks_per_row(work.n) <= kMostBlocks ? nullptr
                                                           : "more than 2^31 - 1 blocks, of which each row takes one "
                                                             "for every 2048 elements: give fewer rows at a time";
}

// The row of a block, and the first element of a thread.
struct Place {
  int64_t row, at;
};

__device__ __forceinline__ Place place(unsigned blocks) {
  return {blockIdx.x / blocks, int64_t(blockIdx.x % blocks) * kBlockElements + threadIdx.x};
}

// sums: out, (gridDim.x,), of the squares of the new out; blocks: how many a row has.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    linear_combination_kernel(const LinearCombination<T> work, unsigned blocks, double* sums) {
  const auto [row, begin] = place(blocks);
  T value[kPerThread] = {};
  // Unrolled, or the pointers would be copied to local memory, to be indexed.
  AUXFAST_UNROLL
  for (int index = 0; index <= kMaxTerms; ++index) {
    const T coefficient = index <= work.num_terms ? row_coefficient(work, index, row) : T(0);
    if (coefficient == 0) continue;
    const T* operand = operand_row(work, index, row);
    AUXFAST_UNROLL
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t at = begin + i * kSumThreads;
      add_operand(value[i], coefficient, at < work.n ? operand[at] : T(0));
    }
  }
  T* out = work.out + row * work.n;
  double sum = 0;
  AUXFAST_UNROLL
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t at = begin + i * kSumThreads;
    if (at < work.n) {
      out[at] = value[i];
      sum += double(value[i]) * double(value[i]);
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(kSumThreads) row_dots_kernel(const RowDots<T> work, unsigned blocks, double* sums) {
  const auto [row, begin] = place(blocks);
  const T *a = work.a + row * work.n, *b = work.b + row * work.n;
  double sum = 0;
  AUXFAST_UNROLL
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t at = begin + i * kSumThreads;
    const T x = at < work.n ? a[at] : T(0), y = at < work.n ? b[at] : T(0);
    sum += double(x) * double(y);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// Sums rows, a block each; every thread adds its share in order. partial: in, (rows, count); sums: out, (rows,).
static __global__ void __launch_bounds__(kSumThreads)
    sum_rows_kernel(const double* partial, int64_t count, double* sums) {
  const double* row = partial + blockIdx.x * count;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += row[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <class Work>
const char* sum_rows(void (*kernel)(Work, unsigned, double*), const Work& work, void* stream) {
  if (work.rows == 0) return nullptr;
  if (const char* refused = refusal(work)) return refused;
  const int64_t blocks = blocks_per_row(work.n);
  double* block_sums = blocks > 1 ? static_cast<double*>(work.workspace) : work.sums;
  LAUNCH(kernel, grid_of(work.rows * blocks), dim3(kSumThreads), 0, stream, work, unsigned(blocks), block_sums);
  const char* error = launch_error();
  if (error != nullptr || blocks == 1) return error;
  LAUNCH(sum_rows_kernel, grid_of(work.rows), dim3(kSumThreads), 0, stream, block_sums, blocks, work.sums);
  return launch_error();
}

// The sums of the blocks, where a row has several.
template <class Work>
int64_t workspace_bytes(const Work& work) {
  const int64_t blocks = blocks_per_row(work.n);
  return blocks > 1 ? work.rows * blocks * int64_t(sizeof(double)) : 0;
}

template <class T>
const char* linear_combination(const LinearCombination<T>& work, void* stream) {
  return sum_rows(linear_combination_kernel<T>, work, stream);
}

template <class T>
const char* row_dots(const RowDots<T>& work, void* stream) {
  return sum_rows(row_dots_kernel<T>, work, stream);
}

// A pass of a step over all rows. partial: out, (gridDim.x,), if a row has several blocks; else its one block finishes.
template <class Pass, class Work>
__global__ void __launch_bounds__(kSumThreads) pass_kernel(const Work work, unsigned blocks, Sums* partial) {
  const auto [row, begin] = place(blocks);
  const Pass pass(work, row);
  Sums sums{0, 0};
  if (!pass.skips())
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t at = begin + i * kSumThreads;
      if (at >= work.n) break;
      pass.template at<typename Work::Type>(at, sums);
    }
  sums.a = block_sum(sums.a);
  __syncthreads();
  sums.b = block_sum(sums.b);
  if (threadIdx.x != 0) return;
  if (blocks == 1)
    Pass::finish(work, row, sums);
  else
    partial[blockIdx.x] = sums;
}

// Adds the sums of a row's blocks, in order, and finishes its pass. partial: in, (rows, blocks).
template <class Pass, class Work>
__global__ void __launch_bounds__(kSumThreads) finish_kernel(const Work work, int64_t blocks, const Sums* partial) {
  const int64_t row = blockIdx.x;
  Sums sums{0, 0};
  for (int64_t i = threadIdx.x; i < blocks; i += kSumThreads) {
    const Sums share = partial[row * blocks + i];
    sums = {sums.a + share.a, sums.b + share.b};
  }
  sums.a = block_sum(sums.a);
  __syncthreads();
  sums.b = block_sum(sums.b);
  if (threadIdx.x == 0) Pass::finish(work, row, sums);
}

// Launches passes in order, until one fails.
template <class Work>
class Launcher {
 public:
  Launcher(const Work& work, void* stream)
      : work_(work), stream_(stream), blocks_(blocks_per_row(work.n)), error_(refusal(work)) {}

  template <class Pass>
  void pass() {
    launch<Pass>();
    if (error_ != nullptr || blocks_ == 1 || work_.rows == 0) return;
    LAUNCH((finish_kernel<Pass, Work>), grid_of(work_.rows), dim3(kSumThreads), 0, stream_, work_, blocks_,
           static_cast<const Sums*>(work_.workspace));
    error_ = launch_error();
  }

  // A pass that has no sums.
  template <class Pass>
  void launch() {
    if (error_ != nullptr || work_.rows == 0) return;
    LAUNCH((pass_kernel<Pass, Work>), grid_of(work_.rows * blocks_), dim3(kSumThreads), 0, stream_, work_,
           unsigned(blocks_), static_cast<Sums*>(work_.workspace));
    error_ = launch_error();
  }

  const char* error() const { return error_; }

 private:
  const Work& work_;
  void* stream_;
  int64_t blocks_;
  const char* error_;
};

template <class T>
const char* conjugate_gradient_step(const ConjugateGradientStep<T>& work, void* stream) {
  Launcher<ConjugateGradientStep<T>> run(work, stream);
  if (work.part != kAfterPreconditioner) {
    run.template pass<Curvature<T>>();
    run.template pass<Residual<T>>();
  } else {
    run.template pass<PreconditionedResidual<T>>();
  }
  if (work.part != kBeforePreconditioner) run.template pass<Direction<T>>();
  return run.error();
}

template <class T>
const char* minres_step(const MinresStep<T>& work, void* stream) {
  Launcher<MinresStep<T>> run(work, stream);
  if (work.part != kAfterPreconditioner) {
    run.template pass<LanczosDiagonal<T>>();
    run.template pass<LanczosVector<T>>();
  } else {
    run.template pass<PreconditionedVector<T>>();
  }
  if (work.part != kBeforePreconditioner) {
    run.template pass<Directions<T>>();
    run.template launch<Solution<T>>();
  }
  return run.error();
}

template <class Work>
int64_t step_workspace_bytes(const Work& work) {
  return 2 * workspace_bytes(work);
}

template <class T>
constexpr KrylovCudaKernels<T> kKernels{{workspace_bytes<LinearCombination<T>>, linear_combination<T>},
                                        {workspace_bytes<RowDots<T>>, row_dots<T>},
                                        {step_workspace_bytes<ConjugateGradientStep<T>>, conjugate_gradient_step<T>},
                                        {step_workspace_bytes<MinresStep<T>>, minres_step<T>}};
extern const KrylovCudaKernels<float> krylov_f32 = kKernels<float>;
extern const KrylovCudaKernels<double> krylov_f64 = kKernels<double>;

}  // namespace auxfast::cuda
