// torch's side of the loss image: checks, allocates, fills LossImageParams and hands over to the kernels of the device.
// The schemas, and what each op returns, are in auxfast/ops/loss_image.py.
#include <optional>
#include <tuple>

#include "common/kernel_tables.h"
#include "common/network_ops.h"
#include "loss_image/loss_image.h"

AUXFAST_CPU_KERNELS(LossImageKernels, loss_image)
#ifdef AUXFAST_WITH_CUDA
AUXFAST_CUDA_KERNELS(LossImageCudaKernels, loss_image)
#endif

namespace auxfast {
namespace {

int32_t checked_channels(const char* op, int64_t channels) {
  STD_TORCH_CHECK(channels >= 1 && channels <= kMaxChannels, "auxfast::", op, ": 1 to ", kMaxChannels,
                  " channels, got ", channels);
  return int32_t(channels);
}

int32_t checked_extent(const char* op, int64_t extent) {
  STD_TORCH_CHECK(extent <= kMaxExtent, "auxfast::", op, ": images of at most ", kMaxExtent, " rows and columns, got ",
                  extent);
  return int32_t(extent);
}

struct LossImage {
  template <class T>
  using Params = LossImageParams<T>;
  static constexpr const char *kLosses = "(batch, num_losses, H, W)", *kLayers = "convolutions";
  static constexpr int64_t kDimensions = 4, kMostLayers = kMaxConvolutions;

  // The network's flag says whether the main loss is a mean over the image's pixels instead of a sum.
  template <class T>
  static void lay_out(const char* op, const Network& network, const Tensor& losses, LossImageParams<T>& net) {
    net.channels[0] = checked_channels(op, losses.size(1));
    net.height[0] = checked_extent(op, losses.size(2));
    net.width[0] = checked_extent(op, losses.size(3));
    net.main_scale = network.flag ? T(1.0 / (double(net.height[0]) * net.width[0])) : T(1);
    int64_t at = 0;
    for (int32_t i = 0; i < net.depth; ++i) {
      net.channels[i + 1] = checked_channels(op, network.layers[i]);
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
    net.tiles = loss_image_tiles(net);
  }

  template <class T>
  static constexpr auto cpu = loss_image_cpu<T>;
#ifdef AUXFAST_WITH_CUDA
  template <class T>
  static constexpr auto cuda = loss_image_cuda<T>;
#endif
  template <class T>
  static constexpr auto workspace_bytes = loss_image_workspace_bytes<T>;
};
using Call = NetworkCall<LossImage>;

// Hands `saved`, which may be empty, to a later pass.
auto with_saved(const Call& call, const Tensor& saved) {
  check_matches(call.op, "saved", saved, "losses", call.losses);
  return [&](auto& net) {
    if (saved.numel() == 0) return;
    STD_TORCH_CHECK(saved.numel() == loss_image_saved_size(net), "auxfast::", call.op,
                    ": saved is not what loss_image_forward returned");
    set_pointer(net.saved, saved);
  };
}

std::tuple<Tensor, Tensor, Tensor> loss_image_forward(const Tensor& losses,  // (batch, num_losses, H, W)
                                                      const Tensor& phi,     // (num_parameters,)
                                                      const std::optional<Tensor>& given_main_weights,  // (batch,)
                                                      StringHandle network, bool with_weights, bool save) {
  const Call call("loss_image_forward", losses, phi, network);
  STD_TORCH_CHECK(!save || losses.is_cuda(), "auxfast::", call.op, ": only the kernels for CUDA can save");
  std::optional<Tensor> main_weights;
  if (given_main_weights) {
    check_matches(call.op, "main_weights", *given_main_weights, "losses", losses);
    check_shape(call.op, "main_weights", *given_main_weights, {losses.size(0)});
    main_weights = as_contiguous(*given_main_weights);
  }
  return call.with_params([&](auto& net) {
    Tensor value = call.new_value(net);
    Tensor weights = with_weights ? new_tensor(losses, losses.sizes()) : new_tensor(losses, {0});
    set_pointer(net.value, value);
    if (main_weights) set_pointer(net.main_weights, *main_weights);
    if (with_weights) set_pointer(net.grad_losses, weights);
    Tensor saved = new_tensor(losses, {save ? loss_image_saved_size(net) : 0});
    if (save) set_pointer(net.saved, saved);
    call.run(Pass::forward, net);
    return std::make_tuple(value, weights, saved);
  });
}

Tensor loss_image_backward_phi(const Tensor& grad,    // (batch,) or ()
                               const Tensor& losses,  // (batch, num_losses, H, W)
                               const Tensor& phi,     // (num_parameters,)
                               const Tensor& saved,   // what loss_image_forward returned, or (0,)
                               StringHandle network) {
  const Call call("loss_image_backward_phi", losses, phi, network);
  return call.backward_phi(grad, with_saved(call, saved));
}

std::tuple<Tensor, Tensor> loss_image_second_order(const Tensor& tangents,  // (num_tangents, batch, num_losses, H, W)
                                                   const Tensor& grad,      // (batch,) or ()
                                                   const Tensor& losses,    // (batch, num_losses, H, W)
                                                   const Tensor& phi,       // (num_parameters,)
                                                   const Tensor& saved,     // what loss_image_forward returned, or (0,)
                                                   StringHandle network) {
  const Call call("loss_image_second_order", losses, phi, network);
  const auto [grad_losses, grad_phi] = call.second_order(true, tangents, grad, with_saved(call, saved));
  return std::make_tuple(grad_losses, *grad_phi);
}

// loss_image_second_order without grad_phi.
Tensor loss_image_hessian(const Tensor& tangents,  // (num_tangents, batch, num_losses, H, W), or without num_tangents
                          const Tensor& grad,      // (batch,) or ()
                          const Tensor& losses,    // (batch, num_losses, H, W)
                          const Tensor& phi,       // (num_parameters,)
                          const Tensor& saved,     // what loss_image_forward returned, or (0,)
                          StringHandle network) {
  const Call call("loss_image_hessian", losses, phi, network);
  return call.second_order(false, tangents, grad, with_saved(call, saved)).first;
}

void register_kernels(torch::stable::detail::StableLibrary& library) {
  library.impl("loss_image_forward", TORCH_BOX(&loss_image_forward));
  library.impl("loss_image_backward_phi", TORCH_BOX(&loss_image_backward_phi));
  library.impl("loss_image_second_order", TORCH_BOX(&loss_image_second_order));
  library.impl("loss_image_hessian", TORCH_BOX(&loss_image_hessian));
}

}  // namespace
}  // namespace auxfast

AUXFAST_REGISTER_KERNELS
