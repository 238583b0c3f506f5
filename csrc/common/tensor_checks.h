// What the *_ops.cpp files share: checks of tensors, new tensors, and what kernels on the CPU are lent.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdlib>
#include <memory>
#include <string>

#include "common/kernels.h"

namespace auxfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

inline void check_floating(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double,
                  "auxfast::", op, ": ", name, " must be float32 or float64");
}

inline void check_matches(const char* op, const char* name, const Tensor& tensor, const char* like_name,
                          const Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), "auxfast::", op, ": ", name, " and ", like_name,
                  " must have one dtype");
  STD_TORCH_CHECK(tensor.device() == like.device(), "auxfast::", op, ": ", name, " and ", like_name,
                  " must be on one device");
}

inline std::string shape_text(Sizes sizes) {
  std::string text = "(";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, Sizes wanted) {
  STD_TORCH_CHECK(tensor.sizes().equals(wanted), "auxfast::", op, ": ", name, " has shape ", shape_text(tensor.sizes()),
                  ", not ", shape_text(wanted));
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A new tensor on the device of `like`. (torch::stable::new_empty looks its op up by name on every call, which costs
// more than the allocation.)
inline Tensor new_tensor(const Tensor& like, Sizes sizes, Sizes strides, int32_t dtype) {
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                  device_type, device_index, &handle));
  return Tensor(handle);
}

// A new contiguous tensor.
inline Tensor new_tensor(const Tensor& like, Sizes sizes, int32_t dtype) {
  constexpr size_t kMostDimensions = 8;
  int64_t strides[kMostDimensions];
  STD_TORCH_CHECK(sizes.size() <= kMostDimensions, "auxfast: a tensor of ", sizes.size(), " dimensions");
  int64_t stride = 1;
  for (size_t dimension = sizes.size(); dimension-- > 0;) {
    strides[dimension] = stride;
    stride *= sizes[dimension] ? sizes[dimension] : 1;  // as torch does
  }
  return new_tensor(like, sizes, Sizes(strides, sizes.size()), dtype);
}

// A new tensor of the dtype of `like`.
inline Tensor new_tensor(const Tensor& like, Sizes sizes) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return new_tensor(like, sizes, dtype);
}

inline Tensor new_float64(const Tensor& like, Sizes sizes) {
  return new_tensor(like, sizes, aoti_torch_dtype_float64());
}

// Points to the tensor's elements, which must be of type T.
template <class T>
void set_pointer(T*& pointer, const Tensor& tensor) {
  pointer = static_cast<T*>(tensor.data_ptr());
}

// Calls function(T()) with the element type of a tensor that is float32 or float64.
template <class Function>
auto by_dtype(const Tensor& tensor, const Function& function) {
  return tensor.scalar_type() == ScalarType::Double ? function(double()) : function(float());
}

// Memory of the calling thread: it grows to the thread's largest request, and the end of the thread frees it.
inline void* thread_scratch(size_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local size_t size = 0;
  if (bytes > size) {
    size = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(64, size));
    STD_TORCH_CHECK(memory != nullptr, "auxfast: out of memory for ", size, " bytes of scratch space");
  }
  return memory.get();
}

inline void torch_parallel_for(int64_t count, void (*task)(void*, int64_t), void* context) {
  if (count == 1) return task(context, 0);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) task(context, index);
  });
}

constexpr Executor kTorchExecutor{torch_parallel_for, thread_scratch};

}  // namespace auxfast

// Registers auxfast::register_kernels(library), which every *_ops.cpp defines, for the devices that there are kernels
// for: the functions that it registers look at the device themselves.
#ifdef AUXFAST_WITH_CUDA
#define AUXFAST_REGISTER_KERNELS                                                           \
  STABLE_TORCH_LIBRARY_IMPL(auxfast, CPU, library) { auxfast::register_kernels(library); } \
  STABLE_TORCH_LIBRARY_IMPL(auxfast, CUDA, library) { auxfast::register_kernels(library); }
#else
#define AUXFAST_REGISTER_KERNELS \
  STABLE_TORCH_LIBRARY_IMPL(auxfast, CPU, library) { auxfast::register_kernels(library); }
#endif
