// The Krylov solvers' vector work on a GPU: one launch, and for long rows one more that adds the blocks' sums. No
// atomics, so that the same call gives the same bits; coefficients are read and sums are left on the device, and
// nothing waits.
#include "common/block_sum.cuh"
#include "krylov/krylov.h"
#include "krylov/krylov_math.h"

namespace auxfast::cuda {

// A block takes a chunk of kBlockElements of a row, and a thread every 256th element of it, so that loads are coalesced
// however the row is aligned, and loads all it takes of an operand before it uses the first, so that enough of them are
// on their way.
constexpr int kPerThread = 8;
constexpr int64_t kBlockElements = int64_t(kSumThreads) * kPerThread;

int64_t blocks_per_row(int64_t n) { return n > kBlockElements ? (n + kBlockElements - 1) / kBlockElements : 1; }

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

template <class Work>
const char* sum_rows(void (*kernel)(Work, unsigned, double*), const Work& work, void* stream) {
  if (work.rows == 0) return nullptr;
  const int64_t blocks = blocks_per_row(work.n);
  double* block_sums = blocks > 1 ? static_cast<double*>(work.workspace) : work.sums;
  LAUNCH(kernel, dim3(unsigned(work.rows * blocks)), dim3(kSumThreads), 0, stream, work, unsigned(blocks), block_sums);
  const char* error = launch_error();
  if (error != nullptr || blocks == 1) return error;
  LAUNCH(sum_rows_kernel, dim3(unsigned(work.rows)), dim3(kSumThreads), 0, stream, block_sums, blocks, work.sums);
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

template <class T>
constexpr KrylovCudaKernels<T> kKernels{{workspace_bytes<LinearCombination<T>>, linear_combination<T>},
                                        {workspace_bytes<RowDots<T>>, row_dots<T>}};
extern const KrylovCudaKernels<float> krylov_f32 = kKernels<float>;
extern const KrylovCudaKernels<double> krylov_f64 = kKernels<double>;

}  // namespace auxfast::cuda
