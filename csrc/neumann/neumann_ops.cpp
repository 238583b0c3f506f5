// torch's side of the Neumann steps: checks, fills the struct of an op and hands over to the kernels of the device. The
// schemas, and what each op returns, are in auxfast/ops/neumann.py.
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "common/kernel_tables.h"
#include "common/tensor_checks.h"
#include "neumann/neumann.h"

AUXFAST_CPU_KERNELS(NeumannKernels, neumann)
#ifdef AUXFAST_WITH_CUDA
#include "common/cuda_launch.h"
AUXFAST_CUDA_KERNELS(NeumannCudaKernels, neumann)
#endif

namespace auxfast {
namespace {

std::string element_name(const char* list, size_t index) {
  return std::string(list) + "[" + std::to_string(index) + "]";
}

// Checks that tensor `index` of the list `name` has a shape, and the dtype and the device of `like`.
void check_element(const char* op, const char* name, size_t index, const Tensor& tensor, Sizes sizes,
                   const char* like_name, const Tensor& like) {
  if (tensor.sizes().equals(sizes) && tensor.scalar_type() == like.scalar_type() && tensor.device() == like.device())
    return;
  const std::string full_name = element_name(name, index);
  check_shape(op, full_name.c_str(), tensor, sizes);
  check_matches(op, full_name.c_str(), tensor, like_name, like);
}

// Whether the elements of a tensor of these sizes are numbered alike by both strides.
bool same_layout(Sizes sizes, Sizes a, Sizes b) {
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && a[d] != b[d]) return false;
  return true;
}

// The tensor, or its copy with the given strides if its elements are numbered otherwise (transposed, expanded, sliced,
// or in another memory format). Copies are kept alive in `copies`.
const Tensor& with_layout(const Tensor& tensor, Sizes strides, std::vector<Tensor>& copies) {
  if (same_layout(tensor.sizes(), tensor.strides(), strides)) return tensor;
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  copies.push_back(new_tensor(tensor, tensor.sizes(), strides, dtype));
  torch::stable::copy_(copies.back(), tensor);
  return copies.back();
}

// ---------------------------------------------------------------------------------------------------------------- step

constexpr const char* kStep = "neumann_step_";

void check_flat(const char* name, const Tensor& tensor, const Tensor& v, int64_t elements) {
  check_shape(kStep, name, tensor, {elements});
  STD_TORCH_CHECK(tensor.is_contiguous(), "auxfast::", kStep, ": ", name, " must be contiguous");
  check_matches(kStep, name, tensor, "v", v);
}

// The shapes and strides that `layout` tells, tensor by tensor.
class Layout {
 public:
  explicit Layout(const Tensor& layout)
      : next_(static_cast<const int64_t*>(layout.data_ptr())), left_(layout.numel()) {}

  // (sizes, strides) of the next tensor
  std::pair<Sizes, Sizes> next() {
    const int64_t dim = *take(1);
    const Sizes sizes(take(dim), size_t(dim));
    return {sizes, Sizes(take(dim), size_t(dim))};
  }

  bool is_at_end() const { return left_ == 0; }

 private:
  const int64_t* take(int64_t count) {
    STD_TORCH_CHECK(0 <= count && count <= left_, "auxfast::", kStep, ": layout does not tell the shapes of all of hv");
    left_ -= count;
    return std::exchange(next_, next_ + count);
  }

  const int64_t* next_;
  int64_t left_;
};

void neumann_step(Tensor v,                // in and out: (kTileElements * tiles,)
                  std::vector<Tensor> hv,  // any shapes
                  Tensor p,                // in and out: as v
                  Tensor sums,             // out: (rows, columns) float64, of which one row is written
                  Tensor layout,           // int64, on the CPU: for each of hv its rank, sizes, and strides in v
                  int64_t row, double step_size) {
  check_floating(kStep, "v", v);
  STD_TORCH_CHECK(sums.dim() == 2 && sums.is_contiguous() && sums.scalar_type() == ScalarType::Double &&
                      sums.device() == v.device() && sums.size(1) >= (v.is_cuda() ? kCudaSums : 1),
                  "auxfast::", kStep, ": sums must be a contiguous float64 matrix on the device of v, of 1 column, or ",
                  kCudaSums, " on CUDA");
  STD_TORCH_CHECK(0 <= row && row < sums.size(0), "auxfast::", kStep, ": row must be a row of sums, not ", row, " of ",
                  sums.size(0));
  STD_TORCH_CHECK(
      layout.dim() == 1 && layout.is_contiguous() && layout.scalar_type() == ScalarType::Long && layout.is_cpu(),
      "auxfast::", kStep, ": layout must be a contiguous int64 vector on the CPU");
  by_dtype(v, [&](auto zero) {
    using T = decltype(zero);
    T *first_v, *first_p;
    set_pointer(first_v, v);
    set_pointer(first_p, p);
    std::vector<Tensor> copies;
    copies.reserve(hv.size());
    std::vector<NeumannTensor<T>> tensors;
    tensors.reserve(hv.size());
    Layout shapes(layout);
    int64_t tiles = 0;
    for (size_t i = 0; i < hv.size(); ++i) {
      const auto [sizes, strides] = shapes.next();
      check_element(kStep, "hv", i, hv[i], sizes, "v", v);
      const int64_t numel = hv[i].numel(), at = tiles * kTileElements;
      if (numel == 0) continue;
      NeumannTensor<T> tensor{first_v + at, nullptr, first_p + at, numel, tiles};
      set_pointer(tensor.hv, with_layout(hv[i], strides, copies));
      tiles += tiles_of(numel);
      tensors.push_back(tensor);
    }
    STD_TORCH_CHECK(shapes.is_at_end(), "auxfast::", kStep, ": hv has only ", hv.size(), " of the tensors of layout");
    check_flat("v", v, v, tiles * kTileElements);
    check_flat("p", p, v, tiles * kTileElements);
    NeumannStep<T> work{{tensors.data(), int64_t(tensors.size()), tiles}, T(step_size), nullptr, nullptr};
    set_pointer(work.sums, sums);
    work.sums += row * sums.size(1);
#ifdef AUXFAST_WITH_CUDA
    if (v.is_cuda()) return launch_cuda(kStep, neumann_cuda<T>().step, work, v);
#endif
    neumann_cpu<T>().step(work, kTorchExecutor);
  });
}

// -------------------------------------------------------------------------------------------------------- guarded step

constexpr const char* kGuardedStep = "neumann_guarded_step_";

// Whether the elements fill their memory without gaps or repetition, in whatever order of dimensions.
bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t expected = 1;
  for (size_t found = 0; found < sizes.size(); ++found) {  // the dimension of the next larger stride, or none
    if (expected == tensor.numel()) return true;
    for (size_t d = 0; d < sizes.size(); ++d)
      if (sizes[d] > 1 && strides[d] == expected) {
        expected *= sizes[d];
        break;
      }
  }
  return expected == tensor.numel();
}

void check_lists(const std::vector<Tensor>& v, const std::vector<Tensor>& v_before, const std::vector<Tensor>& hv,
                 const std::vector<Tensor>& p) {
  STD_TORCH_CHECK(!v.empty() && v.size() == v_before.size() && v.size() == hv.size() && v.size() == p.size(),
                  "auxfast::", kGuardedStep, ": v, v_before, hv and p must be lists of one length >= 1, not ", v.size(),
                  ", ", v_before.size(), ", ", hv.size(), " and ", p.size());
  check_floating(kGuardedStep, "v[0]", v[0]);
  for (size_t i = 0; i < v.size(); ++i) {
    const Sizes sizes = v[i].sizes();
    check_element(kGuardedStep, "v", i, v[i], sizes, "v[0]", v[0]);
    check_element(kGuardedStep, "v_before", i, v_before[i], sizes, "v[0]", v[0]);
    check_element(kGuardedStep, "hv", i, hv[i], sizes, "v[0]", v[0]);
    check_element(kGuardedStep, "p", i, p[i], sizes, "v[0]", v[0]);
    STD_TORCH_CHECK(is_dense(v[i]) && same_layout(sizes, v[i].strides(), v_before[i].strides()) &&
                        same_layout(sizes, v[i].strides(), p[i].strides()),
                    "auxfast::", kGuardedStep, ": v[", i, "], v_before[", i, "] and p[", i,
                    "] are updated in place and must be dense in memory, with the same strides");
  }
}

// The lists have one length, and tensors of one shape at each index.
void neumann_guarded_step(std::vector<Tensor> v,         // any shapes
                          std::vector<Tensor> v_before,  // in and out: those of v; becomes the next v
                          std::vector<Tensor> hv,        // those of v
                          std::vector<Tensor> p,         // in and out: those of v
                          Tensor numbers,                // in and out: (kGuardedNumbers,) float64
                          double step_size) {
  check_lists(v, v_before, hv, p);
  check_shape(kGuardedStep, "numbers", numbers, {kGuardedNumbers});
  STD_TORCH_CHECK(
      numbers.is_contiguous() && numbers.scalar_type() == ScalarType::Double && numbers.device() == v[0].device(),
      "auxfast::", kGuardedStep, ": numbers must be contiguous, of dtype float64, on the device of v");
  by_dtype(v[0], [&](auto zero) {
    using T = decltype(zero);
    std::vector<Tensor> copies;
    copies.reserve(hv.size());
    std::vector<GuardedTensor<T>> tensors;
    tensors.reserve(v.size());
    int64_t tiles = 0;
    for (size_t i = 0; i < v.size(); ++i) {
      GuardedTensor<T> tensor{nullptr, nullptr, nullptr, nullptr, v[i].numel(), tiles};
      if (tensor.numel == 0) continue;
      set_pointer(tensor.v, v[i]);
      set_pointer(tensor.v_before, v_before[i]);
      set_pointer(tensor.hv, with_layout(hv[i], v[i].strides(), copies));
      set_pointer(tensor.p, p[i]);
      tiles += tiles_of(tensor.numel);
      tensors.push_back(tensor);
    }
    GuardedStep<T> work{{tensors.data(), int64_t(tensors.size()), tiles}, T(step_size), nullptr, nullptr};
    set_pointer(work.numbers, numbers);
#ifdef AUXFAST_WITH_CUDA
    if (v[0].is_cuda()) return launch_cuda(kGuardedStep, neumann_cuda<T>().guarded_step, work, v[0]);
#endif
    neumann_cpu<T>().guarded_step(work, kTorchExecutor);
  });
}

void register_kernels(torch::stable::detail::StableLibrary& library) {
  library.impl(kStep, TORCH_BOX(&neumann_step));
  library.impl(kGuardedStep, TORCH_BOX(&neumann_guarded_step));
}

}  // namespace
}  // namespace auxfast

AUXFAST_REGISTER_KERNELS
