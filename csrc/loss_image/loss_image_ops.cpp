// torch's side of the loss image: checks, allocates, fills LossImageParams and hands over to the kernels of the device.
// The schemas, and what each op returns, are in auxfast/ops/loss_image.py.
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/cpu_isa.h"
#include "common/tensor_checks.h"
#include "loss_image/loss_image.h"
#ifdef AUXFAST_WITH_CUDA
#include "common/cuda_stream.h"
#endif

AUXFAST_CPU_KERNELS(LossImageKernels<float>, loss_image_f32)
AUXFAST_CPU_KERNELS(LossImageKernels<double>, loss_image_f64)

namespace auxfast {
namespace {

template <class T>
const LossImageKernels<T>& cpu_kernels() {
  if constexpr (std::is_same_v<T, float>)
    return loss_image_f32();
  else
    return loss_image_f64();
}

// network = [activation, main loss or -1, whether the main loss is a mean over pixels, reduction, channels of each
// convolution]; as ops/loss_image_network.py packs it.
enum NetworkEntry { kActivation, kMainLoss, kMainMean, kReduction, kFirstChannels };
using Network = std::vector<int64_t>;
using OptionalTensor = std::optional<Tensor>;

bool is_per_image(const Network& network) { return Reduction(network[kReduction]) == Reduction::none; }

void check_inputs(const char* op, const Tensor& losses, const Tensor& phi, const Network& network) {
  check_floating(op, "losses", losses);
  STD_TORCH_CHECK(losses.dim() == 4, "auxfast::", op, ": losses must be (batch, num_losses, H, W), got ", losses.dim(),
                  " dimensions");
  STD_TORCH_CHECK(losses.numel() > 0, "auxfast::", op, ": losses must not be empty");
  for (const int dimension : {2, 3})
    STD_TORCH_CHECK(losses.size(dimension) <= INT32_MAX / 2, "auxfast::", op, ": an image of ", losses.size(2), " x ",
                    losses.size(3), " is too large");
  check_matches(op, "phi", phi, "losses", losses);
  const int64_t depth = int64_t(network.size()) - kFirstChannels;
  STD_TORCH_CHECK(depth >= 1 && depth <= kMaxConvolutions, "auxfast::", op, ": 1 to ", kMaxConvolutions,
                  " convolutions, got ", depth);
}

void check_channels(const char* op, int64_t channels) {
  STD_TORCH_CHECK(channels >= 1 && channels <= kMaxChannels, "auxfast::", op, ": 1 to ", kMaxChannels,
                  " channels, got ", channels);
}

void check_grad(const char* op, const Tensor& grad, const Tensor& losses, const Network& network) {
  check_matches(op, "grad", grad, "losses", losses);
  const int64_t expected = is_per_image(network) ? losses.size(0) : 1;
  STD_TORCH_CHECK(grad.numel() == expected, "auxfast::", op, ": grad must have ", expected, " elements, got ",
                  grad.numel());
}

// The description of the network and its images, checked against the tensors that every pass has.
template <class T>
LossImageParams<T> describe(const char* op, const Tensor& losses, const Tensor& phi, const Network& network) {
  LossImageParams<T> net{};
  net.batch = losses.size(0);
  net.depth = int32_t(network.size()) - kFirstChannels;
  net.activation = static_cast<Activation>(network[kActivation]);
  net.main_loss = int32_t(network[kMainLoss]);
  net.per_image = is_per_image(network);
  net.scale = Reduction(network[kReduction]) == Reduction::mean ? T(1.0 / double(net.batch)) : T(1);
  check_channels(op, losses.size(1));
  net.channels[0] = int32_t(losses.size(1));
  net.height[0] = int32_t(losses.size(2));
  net.width[0] = int32_t(losses.size(3));
  net.main_scale = network[kMainMean] ? T(1.0 / (double(net.height[0]) * net.width[0])) : T(1);
  STD_TORCH_CHECK(net.main_loss >= -1 && net.main_loss < net.channels[0], "auxfast::", op, ": main loss ",
                  net.main_loss, " of ", net.channels[0], " losses");
  int64_t at = 0;
  for (int32_t i = 0; i < net.depth; ++i) {
    check_channels(op, network[kFirstChannels + i]);
    net.channels[i + 1] = int32_t(network[kFirstChannels + i]);
    net.height[i + 1] = pooled_size(net.height[i]);
    net.width[i + 1] = pooled_size(net.width[i]);
    net.weight[i] = at;
    at += int64_t(net.channels[i + 1]) * net.channels[i] * kTaps;
    net.bias[i] = at;
    at += net.channels[i + 1];
  }
  net.weight[net.depth] = at;
  net.num_parameters = at + net.channels[net.depth];
  const int32_t kept_rows = pool_extent(net.height[net.depth - 1]) * net.height[net.depth];
  const int32_t kept_columns = pool_extent(net.width[net.depth - 1]) * net.width[net.depth];
  net.position_scale = T(1.0 / (double(kept_rows) * kept_columns));
  STD_TORCH_CHECK(phi.dim() == 1 && phi.numel() == net.num_parameters, "auxfast::", op, ": phi must have ",
                  net.num_parameters, " elements, got ", phi.numel());
  net.losses = pointer<T>(losses);
  net.phi = pointer<T>(phi);
  return net;
}

enum class Pass { forward, backward_phi, second_order };

template <class T>
void run_pass(Pass pass, LossImageParams<T>& net, [[maybe_unused]] const Tensor& losses) {
#ifdef AUXFAST_WITH_CUDA
  if (losses.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(losses.get_device_index());
    const Tensor workspace = torch::stable::new_empty(losses, {loss_image_cuda_workspace_bytes(net)}, ScalarType::Byte);
    net.workspace = workspace.data_ptr();
    void* stream = current_cuda_stream(losses.get_device_index());
    const LossImageCudaKernels<T> kernels;
    const char* error = pass == Pass::forward        ? kernels.forward(net, stream)
                        : pass == Pass::backward_phi ? kernels.backward_phi(net, stream)
                                                     : kernels.second_order(net, stream);
    STD_TORCH_CHECK(error == nullptr, "auxfast: a CUDA kernel of the loss image was not launched: ", error);
    return;
  }
#endif
  net.items = loss_image_items(net);
  const std::unique_ptr<double[]> workspace(new double[loss_image_workspace_bytes(net) / sizeof(double) + 1]);
  net.workspace = workspace.get();
  const LossImageKernels<T>& kernels = cpu_kernels<T>();
  (pass == Pass::forward        ? kernels.forward
   : pass == Pass::backward_phi ? kernels.backward_phi
                                : kernels.second_order)(net, kTorchExecutor);
}

std::tuple<Tensor, Tensor> loss_image_forward(const Tensor& losses_in, const Tensor& phi_in,
                                              const OptionalTensor& main_weights_in, const Network& network,
                                              bool with_gradient) {
  const char* op = "loss_image_forward";
  check_inputs(op, losses_in, phi_in, network);
  const Tensor losses = as_contiguous(losses_in), phi = as_contiguous(phi_in);
  OptionalTensor main_weights;
  if (main_weights_in) {
    check_matches(op, "main_weights", *main_weights_in, "losses", losses);
    STD_TORCH_CHECK(main_weights_in->dim() == 1 && main_weights_in->size(0) == losses.size(0), "auxfast::", op,
                    ": main_weights must have ", losses.size(0), " elements, got ", main_weights_in->numel());
    main_weights = as_contiguous(*main_weights_in);
  }
  return by_dtype(losses, [&](auto zero) {
    using T = decltype(zero);
    LossImageParams<T> net = describe<T>(op, losses, phi, network);
    Tensor value = net.per_image ? new_tensor(losses, {net.batch}) : new_tensor(losses, {});
    Tensor grad_losses = with_gradient ? new_tensor(losses, {net.batch, losses.size(1), losses.size(2), losses.size(3)})
                                       : new_tensor(losses, {0});
    net.main_weights = main_weights ? pointer<T>(*main_weights) : nullptr;
    net.value = pointer<T>(value);
    net.grad_losses = with_gradient ? pointer<T>(grad_losses) : nullptr;
    run_pass(Pass::forward, net, losses);
    return std::make_tuple(value, grad_losses);
  });
}

Tensor loss_image_backward_phi(const Tensor& grad_in, const Tensor& losses_in, const Tensor& phi_in,
                               const Network& network) {
  const char* op = "loss_image_backward_phi";
  check_inputs(op, losses_in, phi_in, network);
  check_grad(op, grad_in, losses_in, network);
  const Tensor grad = as_contiguous(grad_in), losses = as_contiguous(losses_in), phi = as_contiguous(phi_in);
  return by_dtype(losses, [&](auto zero) {
    using T = decltype(zero);
    LossImageParams<T> net = describe<T>(op, losses, phi, network);
    Tensor grad_phi = new_tensor(phi, {net.num_parameters});
    net.grad = pointer<T>(grad);
    net.grad_stride = net.per_image;
    net.grad_phi = pointer<T>(grad_phi);
    run_pass(Pass::backward_phi, net, losses);
    return grad_phi;
  });
}

std::tuple<Tensor, Tensor> loss_image_second_order(const Tensor& tangents_in, const Tensor& grad_in,
                                                   const Tensor& losses_in, const Tensor& phi_in,
                                                   const Network& network, bool with_phi) {
  const char* op = "loss_image_second_order";
  check_inputs(op, losses_in, phi_in, network);
  check_grad(op, grad_in, losses_in, network);
  check_matches(op, "tangents", tangents_in, "losses", losses_in);
  const bool several = tangents_in.dim() == 5;
  bool fits = several || tangents_in.dim() == 4;
  for (int i = 0; fits && i < 4; ++i) fits = tangents_in.size(several + i) == losses_in.size(i);
  STD_TORCH_CHECK(fits, "auxfast::", op, ": tangents must have the shape of losses, or one more dimension in front");
  const Tensor tangents = as_contiguous(tangents_in), grad = as_contiguous(grad_in), losses = as_contiguous(losses_in),
               phi = as_contiguous(phi_in);
  return by_dtype(losses, [&](auto zero) {
    using T = decltype(zero);
    LossImageParams<T> net = describe<T>(op, losses, phi, network);
    net.num_tangents = several ? tangents.size(0) : 1;
    const int64_t batch = net.batch, num_losses = losses.size(1), height = losses.size(2), width = losses.size(3);
    Tensor grad_losses = several ? new_tensor(losses, {net.num_tangents, batch, num_losses, height, width})
                                 : new_tensor(losses, {batch, num_losses, height, width});
    const int64_t phi_size = with_phi ? net.num_parameters : 0;
    Tensor grad_phi = several ? new_tensor(phi, {net.num_tangents, phi_size}) : new_tensor(phi, {phi_size});
    net.grad = pointer<T>(grad);
    net.grad_stride = net.per_image;
    net.tangents = pointer<T>(tangents);
    net.grad_losses = pointer<T>(grad_losses);
    net.grad_phi = with_phi ? pointer<T>(grad_phi) : nullptr;
    if (net.num_tangents > 0) run_pass(Pass::second_order, net, losses);
    return std::make_tuple(grad_losses, grad_phi);
  });
}

void register_kernels(torch::stable::detail::StableLibrary& library) {
  library.impl("loss_image_forward", TORCH_BOX(&loss_image_forward));
  library.impl("loss_image_backward_phi", TORCH_BOX(&loss_image_backward_phi));
  library.impl("loss_image_second_order", TORCH_BOX(&loss_image_second_order));
}

}  // namespace
}  // namespace auxfast

STABLE_TORCH_LIBRARY_IMPL(auxfast, CPU, library) { auxfast::register_kernels(library); }
#ifdef AUXFAST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(auxfast, CUDA, library) { auxfast::register_kernels(library); }
#endif
