// torch's side of the ops with a network, the combiner and the loss image: how they are told the network, what they
// check, and their passes.
#pragma once

#include <cstdlib>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>

#include "common/network.h"
#include "common/tensor_checks.h"
#ifdef AUXFAST_WITH_CUDA
#include "common/cuda_launch.h"
#endif

namespace auxfast {

// An op is told its network as text, numbers with commas between, which the dispatcher takes in much less time than a
// list of numbers: activation, reduction, main loss or -1, a flag of the op's own, and the size of each layer.
// Network.packed in auxfast/ops/network.py writes it.
struct Network {
  static constexpr int64_t kMostLayers = 8;  // of any op

  Activation activation;
  Reduction reduction;
  int64_t main_loss;
  bool flag;
  int64_t depth;
  int64_t layers[kMostLayers];  // layers beyond are counted in `depth` only
};

// Deletes the text, which an op owns. An argument of type std::string would be deleted by torch, but not the copy that
// torch 2.13 makes of it: memory lost between the tensors of every call keeps malloc from using theirs again, and the
// heap grows by all of them.
inline Network parse_network(const char* op, StringHandle owned_text) {
  struct Delete {
    void operator()(StringHandle text) const { torch_delete_string(text); }
  };
  const std::unique_ptr<StringOpaque, Delete> text(owned_text);
  const char* begin;
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(text.get(), &begin));
  constexpr int64_t kHeader = 4;
  int64_t numbers[kHeader + Network::kMostLayers] = {}, count = 0;
  const char* at = begin;
  for (char* end;; at = end + 1) {
    const int64_t number = std::strtoll(at, &end, 10);
    STD_TORCH_CHECK(end != at && (*end == ',' || *end == 0), "auxfast::", op,
                    ": network must be numbers with commas between, got '", begin, "'");
    if (count < kHeader + Network::kMostLayers) numbers[count] = number;
    ++count;
    if (*end == 0) break;
  }
  Network network{Activation(numbers[0]),
                  Reduction(numbers[1]),
                  numbers[2],
                  numbers[3] != 0,
                  count > kHeader ? count - kHeader : 0,
                  {}};
  for (int64_t i = 0; i < Network::kMostLayers; ++i) network.layers[i] = numbers[kHeader + i];
  return network;
}

template <class Params>
using Element = typename std::decay_t<Params>::Element;

// One call of a pass of an op, with the arguments that every pass has, checked and contiguous. The op is a struct:
//   Params<T>                         the struct of its kernels, a NetworkParams<T>
//   kLosses, kDimensions              what the losses must be, and how many dimensions that is
//   kLayers, kMostLayers              what its layers are called, and how many its kernels take
//   lay_out(op, network, losses, net) fills what is the op's own in Params, and num_parameters
//   cpu<T>(), cuda<T>()               its kernels' tables
//   workspace_bytes<T>(net)           of its kernels on the CPU
template <class Op>
class NetworkCall {
 public:
  template <class T>
  using Params = typename Op::template Params<T>;

  NetworkCall(const char* op, const Tensor& losses, const Tensor& phi, StringHandle text)
      : op(op), network(parse_network(op, text)), losses(as_contiguous(losses)), phi(as_contiguous(phi)) {
    check_floating(op, "losses", losses);
    STD_TORCH_CHECK(losses.dim() == Op::kDimensions, "auxfast::", op, ": losses must be ", Op::kLosses, ", got ",
                    losses.dim(), " dimensions");
    STD_TORCH_CHECK(losses.numel() > 0, "auxfast::", op, ": losses must not be empty");
    check_matches(op, "phi", phi, "losses", losses);
    const auto [depth, main_loss] = std::pair(network.depth, network.main_loss);
    STD_TORCH_CHECK(1 <= depth && depth <= Op::kMostLayers, "auxfast::", op, ": 1 to ", Op::kMostLayers, " ",
                    Op::kLayers, ", got ", depth);
    STD_TORCH_CHECK(-1 <= main_loss && main_loss < losses.size(1), "auxfast::", op, ": main loss ", main_loss, " of ",
                    losses.size(1), " losses");
  }

  // Calls pass(net) with net for the elements' type: what every pass is told, checked.
  template <class Function>
  auto with_params(const Function& pass) const {
    return by_dtype(losses, [&](auto zero) {
      using T = decltype(zero);
      Params<T> net{};
      net.batch = losses.size(0);
      net.depth = int32_t(network.depth);
      net.activation = network.activation;
      net.main_loss = network.main_loss;
      net.per_sample = network.reduction == Reduction::none;
      net.scale = network.reduction == Reduction::mean ? T(1.0 / double(net.batch)) : T(1);
      Op::lay_out(op, network, losses, net);
      check_shape(op, "phi", phi, {net.num_parameters});
      set_pointer(net.losses, losses);
      set_pointer(net.phi, phi);
      return pass(net);
    });
  }

  // A new tensor for the value: (batch,) or ().
  template <class T>
  Tensor new_value(const NetworkParams<T>& net) const {
    return net.per_sample ? new_tensor(losses, {net.batch}) : new_tensor(losses, {});
  }

  template <class T>
  void run(Pass pass, Params<T>& net) const {
#ifdef AUXFAST_WITH_CUDA
    if (losses.is_cuda()) return launch_cuda(op, Op::template cuda<T>().get(pass), net, losses);
#endif
    const std::unique_ptr<double[]> workspace(new double[Op::template workspace_bytes<T>(net) / sizeof(double) + 1]);
    net.workspace = workspace.get();
    Op::template cpu<T>().get(pass)(net, kTorchExecutor);
  }

  // Returns (num_parameters,). complete(net) adds what only this op has.
  template <class Complete>
  Tensor backward_phi(const Tensor& given_grad, const Complete& complete) const {
    const Tensor grad = checked_grad(given_grad);
    return with_params([&](auto& net) {
      Tensor grad_phi = new_tensor(phi, {net.num_parameters});
      net.grad_stride = net.per_sample;
      set_pointer(net.grad, grad);
      set_pointer(net.grad_phi, grad_phi);
      complete(net);
      run(Pass::backward_phi, net);
      return grad_phi;
    });
  }

  // Returns grad_losses, of the tangents' shape, and if asked for grad_phi, (num_tangents, num_parameters) or
  // (num_parameters,) for a single tangent.
  template <class Complete>
  std::pair<Tensor, std::optional<Tensor>> second_order(bool with_phi, const Tensor& given_tangents,
                                                        const Tensor& given_grad, const Complete& complete) const {
    const Tensor grad = checked_grad(given_grad);
    check_matches(op, "tangents", given_tangents, "losses", losses);
    const Sizes shape = given_tangents.sizes(), one = losses.sizes();
    const bool batched = shape.size() == one.size() + 1;
    STD_TORCH_CHECK((batched ? shape.slice(1) : shape).equals(one), "auxfast::", op,
                    ": tangents must have the shape of losses ", shape_text(one),
                    " or one more dimension in front, got ", shape_text(shape));
    const Tensor tangents = as_contiguous(given_tangents);
    return with_params([&](auto& net) {
      net.num_tangents = batched ? shape[0] : 1;
      Tensor grad_losses = new_tensor(losses, shape);
      std::optional<Tensor> grad_phi;
      if (with_phi) {
        const int64_t sizes[] = {net.num_tangents, net.num_parameters};
        grad_phi = new_tensor(phi, Sizes(sizes + !batched, 1 + batched));
        set_pointer(net.grad_phi, *grad_phi);
      }
      net.grad_stride = net.per_sample;
      set_pointer(net.grad, grad);
      set_pointer(net.tangents, tangents);
      set_pointer(net.grad_losses, grad_losses);
      complete(net);
      if (net.num_tangents > 0) run(Pass::second_order, net);
      return std::make_pair(grad_losses, grad_phi);
    });
  }

  const char* const op;
  const Network network;
  const Tensor losses, phi;

 private:
  // The gradient that reaches the value: (batch,), or ().
  Tensor checked_grad(const Tensor& grad) const {
    check_matches(op, "grad", grad, "losses", losses);
    const int64_t batch = losses.size(0);
    check_shape(op, "grad", grad, Sizes(&batch, network.reduction == Reduction::none));
    return as_contiguous(grad);
  }
};

}  // namespace auxfast
