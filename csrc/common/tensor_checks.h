// Shared by the *_ops.cpp files: checks of tensors, and the host services that CPU and CUDA kernels are lent.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <initializer_list>
#include <iterator>
#include <memory>

#include "common/parallel.h"

namespace auxfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A new contiguous tensor on the device of `like`. (torch::stable::new_empty looks its op up by name on every call,
// which costs more than the allocation.)
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, int32_t dtype) {
  constexpr int64_t kMostDimensions = 8;
  int64_t strides[kMostDimensions];
  int64_t stride = 1, dimension = int64_t(sizes.size());
  for (auto size = std::rbegin(sizes); size != std::rend(sizes); ++size) {
    strides[--dimension] = stride;
    stride *= *size ? *size : 1;  // as torch does
  }
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), std::data(sizes), strides, dtype,
                                                         device_type, device_index, &handle));
  return Tensor(handle);
}

// Of the dtype of `like`.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return new_tensor(like, sizes, dtype);
}

inline Tensor new_float64(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return new_tensor(like, sizes, aoti_torch_dtype_float64());
}

template <class T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Calls function(T()) with the element type of a tensor that is float32 or float64.
template <class Function>
auto by_dtype(const Tensor& tensor, const Function& function) {
  return tensor.scalar_type() == ScalarType::Double ? function(double()) : function(float());
}

// Frees with the thread; grows to the largest request of the thread.
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
