// The loss image's three passes for ctypes.
#include "loss_image/loss_image.h"

#include "network_wrapper.hpp"

AUXFAST_CUDA_KERNELS(LossImageCudaKernels, loss_image)

using namespace auxfast;

namespace {

// sizes: batch, num_losses, H, W, depth.
template <class T>
LossImageParams<T> describe(const int64_t* sizes, const int64_t* network, const void* losses, const void* phi) {
  LossImageParams<T> net{};
  describe(net, sizes[0], sizes[4], network, losses, phi);
  net.channels[0] = int32_t(sizes[1]);
  net.height[0] = int32_t(sizes[2]);
  net.width[0] = int32_t(sizes[3]);
  net.main_scale = network[kFlag] ? T(1.0 / double(sizes[2] * sizes[3])) : T(1);
  int64_t at = 0;
  for (int32_t i = 0; i < net.depth; ++i) {
    net.channels[i + 1] = int32_t(network[kFirstLayer + i]);
    net.height[i + 1] = pooled_size(net.height[i]);
    net.width[i + 1] = pooled_size(net.width[i]);
    net.weight[i] = at;
    net.bias[i] = at + int64_t(net.channels[i + 1]) * net.channels[i] * kTaps;
    at = net.bias[i] + net.channels[i + 1];
  }
  net.weight[net.depth] = at;
  net.num_parameters = at + net.channels[net.depth];
  const int32_t last = net.depth - 1;
  const int64_t positions = int64_t(net.height[net.depth]) * pool_extent(net.height[last]) * net.width[net.depth] *
                            pool_extent(net.width[last]);
  net.position_scale = T(1.0 / double(positions));
  return net;
}

}  // namespace

// Shapes: loss_image.h. What may be absent is nullptr.

extern "C" const char* loss_image_forward(int64_t is_double, const int64_t* sizes, const int64_t* network,
                                          const void* losses, const void* phi, void* saved, const void* main_weights,
                                          void* value, void* grad_losses) {
  return by_dtype(is_double, [&](auto zero) {
    using T = decltype(zero);
    LossImageParams<T> net = describe<T>(sizes, network, losses, phi);
    set_pointer(net.saved, saved);
    set_pointer(net.main_weights, main_weights);
    set_pointer(net.value, value);
    set_pointer(net.grad_losses, grad_losses);
    return run(loss_image_cuda<T>().forward, net);
  });
}

extern "C" const char* loss_image_backward_phi(int64_t is_double, const int64_t* sizes, const int64_t* network,
                                               const void* losses, const void* phi, void* saved, const void* grad,
                                               void* grad_phi) {
  return by_dtype(is_double, [&](auto zero) {
    using T = decltype(zero);
    LossImageParams<T> net = describe<T>(sizes, network, losses, phi);
    set_pointer(net.saved, saved);
    return backward_phi(loss_image_cuda<T>(), net, grad, grad_phi);
  });
}

extern "C" const char* loss_image_second_order(int64_t is_double, const int64_t* sizes, const int64_t* network,
                                               const void* losses, const void* phi, void* saved, const void* grad,
                                               int64_t num_tangents, const void* tangents, void* grad_losses,
                                               void* grad_phi) {
  return by_dtype(is_double, [&](auto zero) {
    using T = decltype(zero);
    LossImageParams<T> net = describe<T>(sizes, network, losses, phi);
    set_pointer(net.saved, saved);
    return second_order(loss_image_cuda<T>(), net, grad, num_tangents, tangents, grad_losses, grad_phi);
  });
}
