// torch's side of the Neumann step: checks, fills NeumannList and hands over to the kernels of the device. The schema,
// and what the op returns, are in auxfast/ops/neumann.py.
#include <string>
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

constexpr const char* kOp = "neumann_step_";

// Whether the two tensors, of one shape, number their elements alike.
bool same_layout(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), a_strides = a.strides(), b_strides = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && a_strides[d] != b_strides[d]) return false;
  return true;
}

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

// Checks that tensor `index` of the list `name` has the shape of v[index], and the dtype and the device of v[0].
void check(const char* name, size_t index, const Tensor& tensor, const Tensor& v, const Tensor& first) {
  if (tensor.sizes().equals(v.sizes()) && tensor.scalar_type() == first.scalar_type() &&
      tensor.device() == first.device())
    return;
  const std::string full_name = std::string(name) + "[" + std::to_string(index) + "]";
  check_shape(kOp, full_name.c_str(), tensor, v.sizes());
  check_matches(kOp, full_name.c_str(), tensor, "v[0]", first);
}

void check(const std::vector<Tensor>& v, const std::vector<Tensor>& hv, const std::vector<Tensor>& p) {
  STD_TORCH_CHECK(!v.empty() && v.size() == hv.size() && v.size() == p.size(), "auxfast::", kOp,
                  ": v, hv and p must be lists of one length >= 1, not ", v.size(), ", ", hv.size(), " and ", p.size());
  check_floating(kOp, "v[0]", v[0]);
  for (size_t i = 0; i < v.size(); ++i) {
    check("v", i, v[i], v[i], v[0]);
    check("hv", i, hv[i], v[i], v[0]);
    check("p", i, p[i], v[i], v[0]);
    STD_TORCH_CHECK(is_dense(v[i]) && same_layout(v[i], p[i]), "auxfast::", kOp, ": v[", i, "] and p[", i,
                    "] are updated in place and must be dense in memory, with the same strides");
  }
}

// The tensors that have elements, numbered as these lie in memory. Where the layout of hv is not v's (transposed,
// expanded, sliced, or in another memory format), its copy is kept alive in `copies`.
template <class T>
std::vector<NeumannTensor<T>> describe(const std::vector<Tensor>& v, const std::vector<Tensor>& hv,
                                       const std::vector<Tensor>& p, std::vector<Tensor>& copies) {
  std::vector<NeumannTensor<T>> tensors;
  tensors.reserve(v.size());
  int64_t tiles = 0;
  for (size_t i = 0; i < v.size(); ++i) {
    NeumannTensor<T> tensor{nullptr, nullptr, nullptr, v[i].numel(), tiles};
    if (tensor.numel == 0) continue;
    const bool copied = !same_layout(v[i], hv[i]);
    if (copied) {
      copies.push_back(torch::stable::empty_like(v[i]));
      torch::stable::copy_(copies.back(), hv[i]);
    }
    set_pointer(tensor.v, v[i]);
    set_pointer(tensor.hv, copied ? copies.back() : hv[i]);
    set_pointer(tensor.p, p[i]);
    tiles += tiles_of(tensor.numel);
    tensors.push_back(tensor);
  }
  return tensors;
}

// The lists have one length, and tensors of one shape at each index.
Tensor neumann_step(std::vector<Tensor> v,   // in and out: any shapes
                    std::vector<Tensor> hv,  // in: those of v
                    std::vector<Tensor> p,   // in and out: those of v
                    double step_size) {
  check(v, hv, p);
  Tensor squared_norm = new_float64(v[0], {});
  by_dtype(v[0], [&](auto zero) {
    using T = decltype(zero);
    std::vector<Tensor> copies;
    const std::vector<NeumannTensor<T>> tensors = describe<T>(v, hv, p, copies);
    const int64_t tiles = tensors.empty() ? 0 : tensors.back().first_tile + tiles_of(tensors.back().numel);
    NeumannList<T> list{tensors.data(), int64_t(tensors.size()), tiles, T(step_size), nullptr, nullptr};
    set_pointer(list.squared_norm, squared_norm);
#ifdef AUXFAST_WITH_CUDA
    if (v[0].is_cuda()) return launch_cuda(kOp, neumann_cuda<T>().step, list, v[0]);
#endif
    neumann_cpu<T>().step(list, kTorchExecutor);
  });
  return squared_norm;
}

void register_kernels(torch::stable::detail::StableLibrary& library) { library.impl(kOp, TORCH_BOX(&neumann_step)); }

}  // namespace
}  // namespace auxfast

AUXFAST_REGISTER_KERNELS
