// The combiner's three passes for ctypes.
#include "combiner/combiner.h"

#include <vector>

using namespace auxfast;

namespace {

// network: as ops/combiner_network.py packs it, with `depth` widths at its end.
template <class T>
CombinerParams<T> describe(int64_t batch, int64_t num_losses, int64_t depth, const int64_t* network, const void* losses,
                           const void* phi, void* saved) {
  enum { kActivation, kBias, kMainLoss, kReduction, kFirstWidth };
  CombinerParams<T> net{};
  net.batch = batch;
  net.num_losses = num_losses;
  net.depth = int32_t(depth);
  net.activation = static_cast<Activation>(network[kActivation]);
  net.main_loss = int32_t(network[kMainLoss]);
  net.per_sample = network[kReduction] == 0;
  net.scale = network[kReduction] == 2 ? T(1.0 / double(batch)) : T(1);
  int64_t inputs = num_losses, at = 0;
  for (int32_t layer = 0; layer < net.depth; ++layer) {
    const int64_t width = network[kFirstWidth + layer];
    net.width[layer] = int32_t(width);
    net.first_unit[layer] = net.units;
    net.units += int32_t(width);
    net.weight[layer] = at;
    at += width * inputs;
    net.bias[layer] = network[kBias] ? at : -1;
    at += network[kBias] ? width : 0;
    inputs = width;
  }
  net.weight[net.depth] = at;
  net.num_parameters = at + inputs;
  net.losses = static_cast<const T*>(losses);
  net.phi = static_cast<const T*>(phi);
  net.saved = static_cast<T*>(saved);
  net.grad_stride = net.per_sample;
  return net;
}

template <class T>
const char* run(const char* (CombinerCudaKernels<T>::*pass)(const CombinerParams<T>&, void*) const,
                CombinerParams<T>& net) {
  std::vector<unsigned char> workspace(size_t(combiner_cuda_workspace_bytes(net)), 0xFF);
  net.workspace = workspace.data();
  return (CombinerCudaKernels<T>().*pass)(net, nullptr);
}

// Calls function(T()) with the element type.
template <class Function>
const char* by_dtype(int64_t is_double, const Function& function) {
  return is_double ? function(double()) : function(float());
}

}  // namespace

// Shapes: combiner.h. What may be absent is nullptr.
extern "C" const char* combiner_forward(int64_t is_double, int64_t batch, int64_t num_losses, int64_t depth,
                                        const int64_t* network, const void* losses, const void* phi, void* saved,
                                        void* value, void* weights) {
  return by_dtype(is_double, [&](auto zero) {
    using T = decltype(zero);
    CombinerParams<T> net = describe<T>(batch, num_losses, depth, network, losses, phi, saved);
    net.value = static_cast<T*>(value);
    net.weights = static_cast<T*>(weights);
    return run(&CombinerCudaKernels<T>::forward, net);
  });
}

extern "C" const char* combiner_backward_phi(int64_t is_double, int64_t batch, int64_t num_losses, int64_t depth,
                                             const int64_t* network, const void* losses, const void* phi, void* saved,
                                             const void* grad, void* grad_phi) {
  return by_dtype(is_double, [&](auto zero) {
    using T = decltype(zero);
    CombinerParams<T> net = describe<T>(batch, num_losses, depth, network, losses, phi, saved);
    net.grad = static_cast<const T*>(grad);
    net.grad_phi = static_cast<T*>(grad_phi);
    return run(&CombinerCudaKernels<T>::backward_phi, net);
  });
}

extern "C" const char* combiner_second_order(int64_t is_double, int64_t batch, int64_t num_losses, int64_t depth,
                                             const int64_t* network, const void* losses, const void* phi, void* saved,
                                             const void* grad, int64_t num_tangents, const void* tangents,
                                             void* grad_losses, void* grad_phi) {
  return by_dtype(is_double, [&](auto zero) {
    using T = decltype(zero);
    CombinerParams<T> net = describe<T>(batch, num_losses, depth, network, losses, phi, saved);
    net.grad = static_cast<const T*>(grad);
    net.num_tangents = num_tangents;
    net.tangents = static_cast<const T*>(tangents);
    net.grad_losses = static_cast<T*>(grad_losses);
    net.grad_phi = static_cast<T*>(grad_phi);
    return run(&CombinerCudaKernels<T>::second_order, net);
  });
}
