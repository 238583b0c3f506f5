// torch.ops.auxfast.linear_combination_ and row_dots: checks, and the plain structs that the kernels are given.
#include <string>
#include <vector>

#include "common/cpu_isa.h"
#include "common/tensor_checks.h"
#include "krylov/krylov.h"
#ifdef AUXFAST_WITH_CUDA
#include "common/cuda_stream.h"
#endif

AUXFAST_CPU_KERNELS(KrylovCpuKernels, krylov_cpu_kernels)

namespace auxfast {
namespace {

std::string shape_text(const Tensor& tensor) {
  std::string text = "(";
  for (const int64_t size : tensor.sizes()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + (tensor.dim() == 1 ? ",)" : ")");
}

void check_rows(const char* op, const char* name, const Tensor& rows) {
  check_floating(op, name, rows);
  STD_TORCH_CHECK(rows.dim() == 2 && rows.is_contiguous(), "auxfast::", op, ": ", name,
                  " must be a contiguous (k, n) tensor, not of shape ", shape_text(rows),
                  rows.is_contiguous() ? "" : " with other strides");
}

void check_shape(const char* op, const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, "auxfast::", op, ": ", name,
                  " has shape ", shape_text(tensor), ", not (", rows, ", ", columns, ")");
}

void check_matches_rows(const char* op, const char* name, const Tensor& rows, const char* like_name,
                        const Tensor& like) {
  check_rows(op, name, rows);
  check_shape(op, name, rows, like.size(0), like.size(1));
  check_matches(op, name, rows, like_name, like);
}

// Of two contiguous tensors of one shape and dtype: whether they share memory, but not element by element.
bool overlap_in_part(const Tensor& a, const Tensor& b) {
  const auto a_begin = uintptr_t(a.data_ptr()), b_begin = uintptr_t(b.data_ptr());
  const uintptr_t distance = a_begin < b_begin ? b_begin - a_begin : a_begin - b_begin;
  return distance > 0 && distance < uintptr_t(a.numel()) * uintptr_t(a.element_size());
}

// `coefficients` must be contiguous by now.
LinearCombination describe(const Tensor& out, const std::vector<Tensor>& terms, const Tensor& coefficients) {
  constexpr const char* kOp = "linear_combination_";
  constexpr const char* kNames[kMaxTerms] = {"terms[0]", "terms[1]", "terms[2]"};
  check_rows(kOp, "out", out);
  STD_TORCH_CHECK(1 <= terms.size() && terms.size() <= kMaxTerms, "auxfast::", kOp, ": terms must be 1 to ", kMaxTerms,
                  " tensors, not ", terms.size());
  LinearCombination work{out.data_ptr(), {}, int(terms.size()), nullptr, out.size(0), out.size(1)};
  for (size_t i = 0; i < terms.size(); ++i) {
    check_matches_rows(kOp, kNames[i], terms[i], "out", out);
    STD_TORCH_CHECK(!overlap_in_part(terms[i], out), "auxfast::", kOp, ": ", kNames[i],
                    " and out share memory, but do not start together");
    work.terms[i] = terms[i].data_ptr();
  }
  check_shape(kOp, "coefficients", coefficients, 1 + int64_t(terms.size()), out.size(0));
  STD_TORCH_CHECK(coefficients.scalar_type() == ScalarType::Double, "auxfast::", kOp,
                  ": coefficients must have dtype float64");
  STD_TORCH_CHECK(coefficients.device() == out.device(), "auxfast::", kOp,
                  ": coefficients and out must be on one device");
  work.coefficients = pointer<double>(coefficients);
  return work;
}

RowDots describe(const Tensor& a, const Tensor& b) {
  check_rows("row_dots", "a", a);
  check_matches_rows("row_dots", "b", b, "a", a);
  return {a.data_ptr(), b.data_ptr(), a.size(0), a.size(1)};
}

Tensor linear_combination_cpu(Tensor out, std::vector<Tensor> terms, Tensor given_coefficients) {
  const Tensor coefficients = as_contiguous(given_coefficients);
  const LinearCombination work = describe(out, terms, coefficients);
  const KrylovCpuKernels& kernels = krylov_cpu_kernels();
  const bool is_float = out.scalar_type() == ScalarType::Float;
  Tensor squares = new_float64(out, {work.rows});
  (is_float ? kernels.linear_combination_float : kernels.linear_combination_double)(kTorchExecutor, work,
                                                                                    pointer<double>(squares));
  return squares;
}

Tensor row_dots_cpu(Tensor a, Tensor b) {
  const RowDots work = describe(a, b);
  const KrylovCpuKernels& kernels = krylov_cpu_kernels();
  const bool is_float = a.scalar_type() == ScalarType::Float;
  Tensor dots = new_float64(a, {work.rows});
  (is_float ? kernels.row_dots_float : kernels.row_dots_double)(kTorchExecutor, work, pointer<double>(dots));
  return dots;
}

#ifdef AUXFAST_WITH_CUDA
// launch: of cuda::linear_combination_* or cuda::row_dots_*; returns the (rows,) sums.
template <class Work>
Tensor launch_cuda(const char* op, const char* (*launch)(const Work&, double*, double*, void*), const Work& work,
                   const Tensor& like) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  Tensor sums = new_float64(like, {work.rows});
  Tensor workspace = new_float64(like, {cuda::krylov_workspace(work.rows, work.n)});
  const char* error =
      launch(work, pointer<double>(workspace), pointer<double>(sums), current_cuda_stream(like.get_device_index()));
  STD_TORCH_CHECK(error == nullptr, "auxfast::", op, ": CUDA could not launch the kernel: ", error);
  return sums;
}

Tensor linear_combination_cuda(Tensor out, std::vector<Tensor> terms, Tensor given_coefficients) {
  const Tensor coefficients = as_contiguous(given_coefficients);
  const bool is_float = out.scalar_type() == ScalarType::Float;
  return launch_cuda("linear_combination_", is_float ? cuda::linear_combination_float : cuda::linear_combination_double,
                     describe(out, terms, coefficients), out);
}

Tensor row_dots_cuda(Tensor a, Tensor b) {
  const bool is_float = a.scalar_type() == ScalarType::Float;
  return launch_cuda("row_dots", is_float ? cuda::row_dots_float : cuda::row_dots_double, describe(a, b), a);
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auxfast, CPU, library) {
  library.impl("linear_combination_", TORCH_BOX(&linear_combination_cpu));
  library.impl("row_dots", TORCH_BOX(&row_dots_cpu));
}

#ifdef AUXFAST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(auxfast, CUDA, library) {
  library.impl("linear_combination_", TORCH_BOX(&linear_combination_cuda));
  library.impl("row_dots", TORCH_BOX(&row_dots_cuda));
}
#endif

}  // namespace auxfast
