// The current CUDA stream of a device, without linking torch's CUDA library: this module must load where there is none.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

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

}  // namespace auxfast
