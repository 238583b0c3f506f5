// The loss image's three passes for ctypes.
#include "loss_image/loss_image.h"

#include <vector>

using namespace auxfast;

namespace {

// sizes: batch, num_losses, H, W, depth; network: as ops/loss_image_network.py packs it, with `depth` channels at its
// end.
template <class T>
LossImageParams<T> describe(const int64_t* sizes, const int64_t* network, const void* losses, const void* phi) {
  enum { kActivation, kMainLoss, kMainMean, kReduction, kFirstChannels };
  LossImageParams<T> net{};
  net.batch = sizes[0];
  net.channels[0] = int32_t(sizes[1]);
  net.height[0] = int32_t(sizes[2]);
  net.width[0] = int32_t(sizes[3]);
  net.depth = int32_t(sizes[4]);
  net.activation = static_cast<Activation>(network[kActivation]);
  net.main_loss = int32_t(network[kMainLoss]);
  net.main_scale = network[kMainMean] ? T(1.0 / double(sizes[2] * sizes[3])) : T(1);
  net.per_image = network[kReduction] == 0;
  net.scale = network[kReduction] == 2 ? T(1.0 / double(net.batch)) : T(1);
  int64_t at = 0;
  for (int32_t i = 0; i < net.depth; ++i) {
    net.channels[i + 1] = int32_t(network[kFirstChannels + i]);
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
  net.losses = static_cast<const T*>(losses);
  net.phi = static_cast<const T*>(phi);
  net.grad_stride = net.per_image;
  return net;
}

template <class T>
const char* run(const char* (LossImageCudaKernels<T>::*pass)(const LossImageParams<T>&, void*) const,
                LossImageParams<T>& net) {
  std::vector<unsigned char> workspace(size_t(loss_image_cuda_workspace_bytes(net)), 0xFF);
  net.workspace = workspace.data();
  return (LossImageCudaKernels<T>().*pass)(net, nullptr);
}

// Calls function(T()) with the element type.
template <class Function>
const char* by_dtype(int64_t is_double, const Function& function) {
  return is_double ? function(double()) : function(float());
}

}  // namespace

// Shapes: loss_image.h. What may be absent is nullptr.
extern "C" const char* loss_image_forward(int64_t is_double, const int64_t* sizes, const int64_t* network,
                                          const void* losses, const void* phi, const void* main_weights, void* value,
                                          void* grad_losses) {
  return by_dtype(is_double, [&](auto zero) {
    using T = decltype(zero);
    LossImageParams<T> net = describe<T>(sizes, network, losses, phi);
    net.main_weights = static_cast<const T*>(main_weights);
    net.value = static_cast<T*>(value);
    net.grad_losses = static_cast<T*>(grad_losses);
    return run(&LossImageCudaKernels<T>::forward, net);
  });
}

extern "C" const char* loss_image_backward_phi(int64_t is_double, const int64_t* sizes, const int64_t* network,
                                               const void* losses, const void* phi, const void* grad, void* grad_phi) {
  return by_dtype(is_double, [&](auto zero) {
    using T = decltype(zero);
    LossImageParams<T> net = describe<T>(sizes, network, losses, phi);
    net.grad = static_cast<const T*>(grad);
    net.grad_phi = static_cast<T*>(grad_phi);
    return run(&LossImageCudaKernels<T>::backward_phi, net);
  });
}

extern "C" const char* loss_image_second_order(int64_t is_double, const int64_t* sizes, const int64_t* network,
                                               const void* losses, const void* phi, const void* grad,
                                               int64_t num_tangents, const void* tangents, void* grad_losses,
                                               void* grad_phi) {
  return by_dtype(is_double, [&](auto zero) {
    using T = decltype(zero);
    LossImageParams<T> net = describe<T>(sizes, network, losses, phi);
    net.grad = static_cast<const T*>(grad);
    net.num_tangents = num_tangents;
    net.tangents = static_cast<const T*>(tangents);
    net.grad_losses = static_cast<T*>(grad_losses);
    net.grad_phi = static_cast<T*>(grad_phi);
    return run(&LossImageCudaKernels<T>::second_order, net);
  });
}
