// How the *_ops.cpp files run a kernel on CUDA. torch's CUDA library is not linked: this module must load where there
// is none.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

#include "common/kernels.h"
#include "common/tensor_checks.h"

namespace auxfast {

inline void* current_cuda_stream(int32_t device_index) {
  using Lookup = AOTITorchError (*)(int32_t, void**);
  static const Lookup lookup = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Lookup>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(lookup != nullptr, "auxfast: the running torch has no CUDA support (libtorch_cuda.so is not loaded)");
  void* stream = nullptr;
  STD_TORCH_CHECK(lookup(device_index, &stream) == 0, "auxfast: torch did not name the current CUDA stream of device ",
                  device_index);
  return stream;
}

// Runs the kernel on the device of `like` and its current stream, in a workspace that it allocates if it takes one.
template <class Params>
void launch_cuda(const char* op, const CudaKernel<Params>& kernel, Params& params, const Tensor& like) {
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t bytes = kernel.workspace_bytes(params);
  std::optional<Tensor> workspace;  // an allocation takes the host longer than all else here
  if (bytes > 0) workspace = new_tensor(like, {bytes}, aoti_torch_dtype_uint8());
  params.workspace = workspace ? workspace->data_ptr() : nullptr;
  const char* error = kernel.launch(params, current_cuda_stream(device));
  STD_TORCH_CHECK(error == nullptr, "auxfast::", op, ": CUDA could not launch the kernel: ", error);
}

}  // namespace auxfast
