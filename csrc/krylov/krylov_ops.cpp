// torch's side of the Krylov solvers' vector work: checks, fills the struct of an op and hands over to the kernels of
// the device. The schemas, and what each op returns, are in auxfast/ops/krylov.py.
#include <optional>
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

void check_float64(const char* op, const char* name, const Tensor& tensor, Sizes sizes, const Tensor& like) {
  check_shape(op, name, tensor, sizes);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous(), "auxfast::", op, ": ", name,
                  " must be contiguous and have dtype float64");
  STD_TORCH_CHECK(tensor.device() == like.device(), "auxfast::", op, ": ", name, " and r must be on one device");
}

// first_with_z: the first part that has z.
Part check_part(const char* op, const std::optional<Tensor>& z, int64_t part, Part first_with_z) {
  STD_TORCH_CHECK(kWhole <= part && part <= kAfterPreconditioner, "auxfast::", op, ": part must be 0, 1 or 2, not ",
                  part);
  STD_TORCH_CHECK(z.has_value() == (part >= first_with_z), "auxfast::", op, ": z must ",
                  part >= first_with_z ? "be given" : "be None", " for part ", part);
  return Part(part);
}

void conjugate_gradient_step(Tensor x,                 // in and out: (k, n)
                             Tensor best,              // in and out: (k, n)
                             Tensor r,                 // in and out: (k, n)
                             Tensor p,                 // in and out: (k, n)
                             std::optional<Tensor> z,  // (k, n)
                             Tensor product,           // (k, n)
                             Tensor numbers,           // in and out: (kNumbers, k)
                             int64_t part) {
  constexpr const char* kOp = "conjugate_gradient_step_";
  check_rows(kOp, "r", r);
  check_matches_rows(kOp, "x", x, "r", r);
  check_matches_rows(kOp, "best", best, "r", r);
  check_matches_rows(kOp, "p", p, "r", r);
  if (z) check_matches_rows(kOp, "z", *z, "r", r);
  check_matches_rows(kOp, "product", product, "r", r);
  check_float64(kOp, "numbers", numbers, {kNumbers, r.size(0)}, r);
  const Part checked_part = check_part(kOp, z, part, kBeforePreconditioner);
  by_dtype(r, [&](auto zero) {
    using T = decltype(zero);
    ConjugateGradientStep<T> work{};
    work.part = checked_part;
    work.rows = r.size(0);
    work.n = r.size(1);
    set_pointer(work.x, x);
    set_pointer(work.best, best);
    set_pointer(work.r, r);
    set_pointer(work.p, p);
    set_pointer(work.z, z ? *z : r);
    set_pointer(work.product, product);
    set_pointer(work.numbers, numbers);
#ifdef AUXFAST_WITH_CUDA
    if (r.is_cuda()) return launch_cuda(kOp, krylov_cuda<T>().conjugate_gradient_step, work, r);
#endif
    krylov_cpu<T>().conjugate_gradient_step(work, kTorchExecutor);
  });
}

void minres_step(Tensor x,                 // in and out: (k, n) float64
                 Tensor w,                 // (k, n) float64
                 Tensor w_old,             // in and out: (k, n) float64
                 Tensor v,                 // in and out: (k, n)
                 Tensor u,                 // (k, n)
                 Tensor u_old,             // (k, n)
                 Tensor r,                 // in and out: (k, n)
                 std::optional<Tensor> z,  // (k, n)
                 Tensor product,           // in and out: (k, n)
                 Tensor numbers,           // in and out: (kNumbers, k)
                 int64_t part) {
  constexpr const char* kOp = "minres_step_";
  check_rows(kOp, "r", r);
  check_float64(kOp, "x", x, r.sizes(), r);
  check_float64(kOp, "w", w, r.sizes(), r);
  check_float64(kOp, "w_old", w_old, r.sizes(), r);
  check_matches_rows(kOp, "v", v, "r", r);
  check_matches_rows(kOp, "u", u, "r", r);
  check_matches_rows(kOp, "u_old", u_old, "r", r);
  if (z) check_matches_rows(kOp, "z", *z, "r", r);
  check_matches_rows(kOp, "product", product, "r", r);
  check_float64(kOp, "numbers", numbers, {kNumbers, r.size(0)}, r);
  const Part checked_part = check_part(kOp, z, part, kAfterPreconditioner);
  by_dtype(r, [&](auto zero) {
    using T = decltype(zero);
    MinresStep<T> work{};
    work.part = checked_part;
    work.rows = r.size(0);
    work.n = r.size(1);
    set_pointer(work.x, x);
    set_pointer(work.w, w);
    set_pointer(work.w_old, w_old);
    set_pointer(work.v, v);
    set_pointer(work.u, u);
    set_pointer(work.u_old, u_old);
    set_pointer(work.r, r);
    set_pointer(work.z, z ? *z : product);
    set_pointer(work.product, product);
    set_pointer(work.numbers, numbers);
#ifdef AUXFAST_WITH_CUDA
    if (r.is_cuda()) return launch_cuda(kOp, krylov_cuda<T>().minres_step, work, r);
#endif
    krylov_cpu<T>().minres_step(work, kTorchExecutor);
  });
}

void register_kernels(torch::stable::detail::StableLibrary& library) {
  library.impl("linear_combination_", TORCH_BOX(&linear_combination));
  library.impl("row_dots", TORCH_BOX(&row_dots));
  library.impl("conjugate_gradient_step_", TORCH_BOX(&conjugate_gradient_step));
  library.impl("minres_step_", TORCH_BOX(&minres_step));
}

}  // namespace
}  // namespace auxfast

AUXFAST_REGISTER_KERNELS
