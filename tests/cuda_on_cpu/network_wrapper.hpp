// What the wrappers of the ops with a network share: their passes.
#pragma once

#include "common/network.h"
#include "wrapper.hpp"

namespace auxfast {

// The numbers that Network.packed in auxfast/ops/network.py writes as text.
enum NetworkEntry { kActivation, kReduction, kMainLoss, kFlag, kFirstLayer };

template <class T>
void describe(NetworkParams<T>& net, int64_t batch, int64_t depth, const int64_t* network, const void* losses,
              const void* phi) {
  net.batch = batch;
  net.depth = int32_t(depth);
  net.activation = Activation(network[kActivation]);
  net.main_loss = network[kMainLoss];
  net.per_sample = Reduction(network[kReduction]) == Reduction::none;
  net.scale = Reduction(network[kReduction]) == Reduction::mean ? T(1.0 / double(batch)) : T(1);
  net.grad_stride = net.per_sample;
  set_pointer(net.losses, losses);
  set_pointer(net.phi, phi);
}

template <class Params>
const char* backward_phi(const NetworkCudaKernels<Params>& kernels, Params& net, const void* grad, void* grad_phi) {
  set_pointer(net.grad, grad);
  set_pointer(net.grad_phi, grad_phi);
  return run(kernels.backward_phi, net);
}

template <class Params>
const char* second_order(const NetworkCudaKernels<Params>& kernels, Params& net, const void* grad, int64_t num_tangents,
                         const void* tangents, void* grad_losses, void* grad_phi) {
  net.num_tangents = num_tangents;
  set_pointer(net.grad, grad);
  set_pointer(net.tangents, tangents);
  set_pointer(net.grad_losses, grad_losses);
  set_pointer(net.grad_phi, grad_phi);
  return run(kernels.second_order, net);
}

}  // namespace auxfast
