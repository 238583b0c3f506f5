// The combiner's three passes for ctypes.
#include "combiner/combiner.h"

#include "network_wrapper.hpp"

AUXFAST_CUDA_KERNELS(CombinerCudaKernels, combiner)

using namespace auxfast;

namespace {

// sizes: batch, num_losses, depth.
template <class T>
CombinerParams<T> describe(const int64_t* sizes, const int64_t* network, const void* losses, const void* phi,
                           void* saved) {
  CombinerParams<T> net{};
  describe(net, sizes[0], sizes[2], network, losses, phi);
  net.num_losses = sizes[1];
  int64_t inputs = net.num_losses, at = 0;
  for (int32_t layer = 0; layer < net.depth; ++layer) {
    const int64_t width = network[kFirstLayer + layer];
    net.width[layer] = int32_t(width);
    net.first_unit[layer] = net.units;
    net.units += int32_t(width);
    net.weight[layer] = at;
    at += width * inputs;
    net.bias[layer] = network[kFlag] ? at : -1;
    at += network[kFlag] ? width : 0;
    inputs = width;
  }
  net.weight[net.depth] = at;
  net.num_parameters = at + inputs;
  set_pointer(net.saved, saved);
  return net;
}

}  // namespace

// Shapes: combiner.h. What may be absent is nullptr.

extern "C" const char* combiner_forward(int64_t is_double, const int64_t* sizes, const int64_t* network,
                                        const void* losses, const void* phi, void* saved, void* value,
                                        void* grad_losses) {
  return by_dtype(is_double, [&](auto zero) {
    using T = decltype(zero);
    CombinerParams<T> net = describe<T>(sizes, network, losses, phi, saved);
    set_pointer(net.value, value);
    set_pointer(net.grad_losses, grad_losses);
    return run(combiner_cuda<T>().forward, net);
  });
}

extern "C" const char* combiner_backward_phi(int64_t is_double, const int64_t* sizes, const int64_t* network,
                                             const void* losses, const void* phi, void* saved, const void* grad,
                                             void* grad_phi) {
  return by_dtype(is_double, [&](auto zero) {
    using T = decltype(zero);
    CombinerParams<T> net = describe<T>(sizes, network, losses, phi, saved);
    return backward_phi(combiner_cuda<T>(), net, grad, grad_phi);
  });
}

extern "C" const char* combiner_second_order(int64_t is_double, const int64_t* sizes, const int64_t* network,
                                             const void* losses, const void* phi, void* saved, const void* grad,
                                             int64_t num_tangents, const void* tangents, void* grad_losses,
                                             void* grad_phi) {
  return by_dtype(is_double, [&](auto zero) {
    using T = decltype(zero);
    CombinerParams<T> net = describe<T>(sizes, network, losses, phi, saved);
    return second_order(combiner_cuda<T>(), net, grad, num_tangents, tangents, grad_losses, grad_phi);
  });
}
