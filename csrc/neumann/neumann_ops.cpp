// torch.ops.auxfast.neumann_step_: checks, and the plain struct that the kernels are given.
#include <vector>

#include "common/cpu_isa.h"
#include "common/tensor_checks.h"
#include "neumann/neumann.h"
#ifdef AUXFAST_WITH_CUDA
#include "common/cuda_stream.h"
#endif

AUXFAST_CPU_KERNELS(NeumannCpuKernels, neumann_cpu_kernels)

namespace auxfast {
namespace {

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

// That tensor `index` of the list `name` has the shape of v[index], and the dtype and the device of v[0].
void check(const char* name, size_t index, const Tensor& tensor, const Tensor& v, const Tensor& first) {
  const auto sizes = tensor.sizes(), wanted = v.sizes();
  bool same = sizes.size() == wanted.size();
  for (size_t d = 0; same && d < sizes.size(); ++d) same = sizes[d] == wanted[d];
  STD_TORCH_CHECK(same, "auxfast::neumann_step_: ", name, "[", index, "] and v[", index, "] must have one shape");
  STD_TORCH_CHECK(tensor.scalar_type() == first.scalar_type(), "auxfast::neumann_step_: ", name, "[", index,
                  "] and v[0] must have one dtype");
  STD_TORCH_CHECK(tensor.device() == first.device(), "auxfast::neumann_step_: ", name, "[", index,
                  "] and v[0] must be on one device");
}

// The tensors of one index, numbered as they lie in memory; `copies` keeps a copy of hv alive where one was needed.
NeumannTensor describe(size_t index, const Tensor& v, const Tensor& hv, const Tensor& p, std::vector<Tensor>& copies) {
  STD_TORCH_CHECK(is_dense(v) && same_layout(v, p), "auxfast::neumann_step_: v[", index, "] and p[", index,
                  "] are updated in place and must be dense in memory, with the same strides");
  const void* product = hv.data_ptr();
  if (!same_layout(v, hv)) {  // transposed, expanded, sliced, or in another memory format
    copies.push_back(torch::stable::empty_like(v));
    torch::stable::copy_(copies.back(), hv);
    product = copies.back().data_ptr();
  }
  return {v.data_ptr(), product, p.data_ptr(), v.numel(), 0};
}

struct Described {
  std::vector<NeumannTensor> tensors;
  std::vector<Tensor> copies;
  int64_t groups = 0;
};

Described describe_all(const std::vector<Tensor>& v, const std::vector<Tensor>& hv, const std::vector<Tensor>& p) {
  STD_TORCH_CHECK(!v.empty() && v.size() == hv.size() && v.size() == p.size(),
                  "auxfast::neumann_step_: v, hv and p must be lists of one length >= 1, not ", v.size(), ", ",
                  hv.size(), " and ", p.size());
  check_floating("neumann_step_", "v[0]", v[0]);
  Described all;
  for (size_t i = 0; i < v.size(); ++i) {
    check("v", i, v[i], v[i], v[0]);
    check("hv", i, hv[i], v[i], v[0]);
    check("p", i, p[i], v[i], v[0]);
    NeumannTensor tensor = describe(i, v[i], hv[i], p[i], all.copies);
    if (tensor.numel == 0) continue;
    tensor.first_group = all.groups;
    all.groups += (tensor.numel + kGroup - 1) / kGroup;
    all.tensors.push_back(tensor);
  }
  return all;
}

Tensor neumann_step_cpu(std::vector<Tensor> v, std::vector<Tensor> hv, std::vector<Tensor> p, double step_size) {
  const Described all = describe_all(v, hv, p);
  const NeumannList list{all.tensors.data(), int64_t(all.tensors.size()), all.groups, step_size};
  const NeumannCpuKernels& kernels = neumann_cpu_kernels();
  const bool is_float = v[0].scalar_type() == ScalarType::Float;
  const double squared_norm = (is_float ? kernels.step_float : kernels.step_double)(kTorchExecutor, list);
  Tensor out = new_float64(v[0], {});
  *pointer<double>(out) = squared_norm;
  return out;
}

#ifdef AUXFAST_WITH_CUDA
Tensor neumann_step_cuda(std::vector<Tensor> v, std::vector<Tensor> hv, std::vector<Tensor> p, double step_size) {
  const Described all = describe_all(v, hv, p);
  const NeumannList list{all.tensors.data(), int64_t(all.tensors.size()), all.groups, step_size};
  const torch::stable::accelerator::DeviceGuard guard(v[0].get_device_index());
  Tensor out = new_float64(v[0], {});
  Tensor workspace = new_float64(v[0], {cuda::neumann_workspace(list)});
  const bool is_float = v[0].scalar_type() == ScalarType::Float;
  const char* error = (is_float ? cuda::neumann_step_float : cuda::neumann_step_double)(
      list, pointer<double>(workspace), pointer<double>(out), current_cuda_stream(v[0].get_device_index()));
  STD_TORCH_CHECK(error == nullptr, "auxfast::neumann_step_: CUDA could not launch the kernel: ", error);
  return out;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auxfast, CPU, library) { library.impl("neumann_step_", TORCH_BOX(&neumann_step_cpu)); }

#ifdef AUXFAST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(auxfast, CUDA, library) { library.impl("neumann_step_", TORCH_BOX(&neumann_step_cuda)); }
#endif

}  // namespace auxfast
