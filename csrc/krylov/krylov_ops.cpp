// torch's side of the Krylov solvers' vector work: checks, fills LinearCombination or RowDots and hands over to the
// kernels of the device. The schemas, and what each op returns, are in auxfast/ops/krylov.py.
#include <string>
#include <vector>

#include "common/kernel_tables.h"
#include "common/tensor_checks.h"
#include "krylov/krylov.h"

AUXFAST_CPU_KERNELS(KrylovKernels, krylov)
#ifdef AUXFAST_WITH_CUDA
#include "common/cuda_launch.h"
AUXFAST_CUDA_KERNELS(KrylovCudaKernels, krylov)
#endif

namespace auxfast {
namespace {

void check_rows(const char* op, const char* name, const Tensor& rows) {
  check_floating(op, name, rows);
  STD_TORCH_CHECK(rows.dim() == 2 && rows.is_contiguous(), "auxfast::", op, ": ", name,
                  " must be a contiguous (k, n) tensor, not of shape ", shape_text(rows.sizes()),
                  rows.is_contiguous() ? "" : " with other strides");
}

void check_matches_rows(const char* op, const char* name, const Tensor& rows, const char* like_name,
                        const Tensor& like) {
  check_rows(op, name, rows);
  check_shape(op, name, rows, like.sizes());
  check_matches(op, name, rows, like_name, like);
}

// Whether two contiguous tensors of one shape and dtype share memory, but not element by element.
bool overlap_in_part(const Tensor& a, const Tensor& b) {
  const auto a_begin = uintptr_t(a.data_ptr()), b_begin = uintptr_t(b.data_ptr());
  const uintptr_t distance = a_begin < b_begin ? b_begin - a_begin : a_begin - b_begin;
  return distance > 0 && distance < uintptr_t(a.numel()) * uintptr_t(a.element_size());
}

void check_combination(const char* op, const Tensor& out, const std::vector<Tensor>& terms,
                       const Tensor& coefficients) {
  constexpr const char* kNames[kMaxTerms] = {"terms[0]", "terms[1]", "terms[2]"};
  check_rows(op, "out", out);
  STD_TORCH_CHECK(1 <= terms.size() && terms.size() <= kMaxTerms, "auxfast::", op, ": terms must be 1 to ", kMaxTerms,
                  " tensors, not ", terms.size());
  for (size_t i = 0; i < terms.size(); ++i) {
    check_matches_rows(op, kNames[i], terms[i], "out", out);
    STD_TORCH_CHECK(!overlap_in_part(terms[i], out), "auxfast::", op, ": ", kNames[i],
                    " and out share memory, but do not start together");
  }
  check_shape(op, "coefficients", coefficients, {1 + int64_t(terms.size()), out.size(0)});
  STD_TORCH_CHECK(coefficients.scalar_type() == ScalarType::Double, "auxfast::", op,
                  ": coefficients must have dtype float64");
  STD_TORCH_CHECK(coefficients.device() == out.device(), "auxfast::", op,
                  ": coefficients and out must be on one device");
}

Tensor linear_combination(Tensor out,                   // in and out: (k, n)
                          std::vector<Tensor> terms,    // (k, n) each
                          Tensor given_coefficients) {  // (1 + number of terms, k)
  constexpr const char* kOp = "linear_combination_";
  const Tensor coefficients = as_contiguous(given_coefficients);
  check_combination(kOp, out, terms, coefficients);
  Tensor squares = new_float64(out, {out.size(0)});
  by_dtype(out, [&](auto zero) {
    using T = decltype(zero);
    LinearCombination<T> work{};
    work.rows = out.size(0);
    work.n = out.size(1);
    work.num_terms = int(terms.size());
    set_pointer(work.out, out);
    for (size_t i = 0; i < terms.size(); ++i) set_pointer(work.terms[i], terms[i]);
    set_pointer(work.coefficients, coefficients);
    set_pointer(work.sums, squares);
#ifdef AUXFAST_WITH_CUDA
    if (out.is_cuda()) return launch_cuda(kOp, krylov_cuda<T>().linear_combination, work, out);
#endif
    krylov_cpu<T>().linear_combination(work, kTorchExecutor);
  });
  return squares;
}

Tensor row_dots(Tensor a,    // (k, n)
                Tensor b) {  // (k, n)
  constexpr const char* kOp = "row_dots";
  check_rows(kOp, "a", a);
  check_matches_rows(kOp, "b", b, "a", a);
  Tensor dots = new_float64(a, {a.size(0)});
  by_dtype(a, [&](auto zero) {
    using T = decltype(zero);
    RowDots<T> work{};
    work.rows = a.size(0);
    work.n = a.size(1);
    set_pointer(work.a, a);
    set_pointer(work.b, b);
    set_pointer(work.sums, dots);
#ifdef AUXFAST_WITH_CUDA
    if (a.is_cuda()) return launch_cuda(kOp, krylov_cuda<T>().row_dots, work, a);
#endif
    krylov_cpu<T>().row_dots(work, kTorchExecutor);
  });
  return dots;
}

void register_kernels(torch::stable::detail::StableLibrary& library) {
  library.impl("linear_combination_", TORCH_BOX(&linear_combination));
  library.impl("row_dots", TORCH_BOX(&row_dots));
}

}  // namespace
}  // namespace auxfast

AUXFAST_REGISTER_KERNELS
