// torch's side of the combiner: checks, allocates, fills CombinerParams and hands over to the kernels of the device.
// The schemas, and what each op returns, are in auxfast/ops/combiner.py.
#include <cstdlib>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "combiner/combiner.h"
#include "common/cpu_isa.h"
#include "common/recycled_memory.h"
#include "common/tensor_checks.h"
#ifdef AUXFAST_WITH_CUDA
#include "common/cuda_stream.h"
#endif

AUXFAST_CPU_KERNELS(CombinerKernels<float>, combiner_f32)
AUXFAST_CPU_KERNELS(CombinerKernels<double>, combiner_f64)

namespace auxfast {
namespace {

template <class T>
const CombinerKernels<T>& cpu_kernels() {
  if constexpr (std::is_same_v<T, float>)
    return combiner_f32();
  else
    return combiner_f64();
}

// [activation, bias, main loss or -1, reduction, width of each hidden layer]. The ops take it as text, with commas
// between: a list of numbers takes the dispatcher longer than all tensors together.
enum NetworkEntry { kActivation, kBias, kMainLoss, kReduction, kFirstWidth };
using Network = std::vector<int64_t>;

// Deletes the text, which an op owns. An argument of type std::string would be deleted by torch, but not the copy that
// torch 2.13 makes of it: blocks lost between the tensors of every call keep malloc from using their memory again, and
// the heap grows by all of them.
Network parse_network(const char* op, StringHandle owned_text) {
  struct Delete {
    void operator()(StringHandle text) const { torch_delete_string(text); }
  };
  const std::unique_ptr<StringOpaque, Delete> text(owned_text);
  const char* begin;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(text.get(), &begin));
  Network network;
  network.reserve(kFirstWidth + kMaxDepth);
  const char* at = begin;
  for (char* end;; at = end + 1) {
    network.push_back(std::strtoll(at, &end, 10));
    STD_TORCH_CHECK(end != at && (*end == ',' || *end == 0), "auxfast::", op, ": network must be numbers with commas ",
                    "between, got '", begin, "'");
    if (*end == 0) break;
  }
  STD_TORCH_CHECK(int64_t(network.size()) > kFirstWidth, "auxfast::", op, ": the network has no hidden layer");
  return network;
}

// The description of the network, checked against the tensors that every pass has.
template <class T>
CombinerParams<T> describe(const char* op, const Tensor& losses, const Tensor& phi, const Network& network) {
  const int64_t depth = int64_t(network.size()) - kFirstWidth;
  STD_TORCH_CHECK(depth <= kMaxDepth, "auxfast::", op, ": 1 to ", kMaxDepth, " hidden layers, got ", depth);
  CombinerParams<T> net{};
  net.batch = losses.size(0);
  net.num_losses = losses.size(1);
  net.depth = int32_t(depth);
  net.activation = static_cast<Activation>(network[kActivation]);
  net.main_loss = int32_t(network[kMainLoss]);
  net.per_sample = Reduction(network[kReduction]) == Reduction::none;
  net.scale = Reduction(network[kReduction]) == Reduction::mean ? T(1.0 / double(net.batch)) : T(1);
  STD_TORCH_CHECK(net.batch > 0 && net.num_losses > 0, "auxfast::", op, ": losses must not be empty");
  STD_TORCH_CHECK(net.main_loss >= -1 && net.main_loss < net.num_losses, "auxfast::", op, ": main loss ", net.main_loss,
                  " of ", net.num_losses, " losses");
  int64_t inputs = net.num_losses, at = 0;
  for (int32_t layer = 0; layer < net.depth; ++layer) {
    const int64_t width = network[kFirstWidth + layer];
    STD_TORCH_CHECK(width >= 1 && width <= kMaxWidth, "auxfast::", op, ": widths of 1 to ", kMaxWidth, ", got ", width);
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
  STD_TORCH_CHECK(phi.dim() == 1 && phi.numel() == net.num_parameters, "auxfast::", op, ": phi must have ",
                  net.num_parameters, " elements, got ", phi.numel());
  net.losses = pointer<T>(losses);
  net.phi = pointer<T>(phi);
  return net;
}

int64_t saved_size(const Network& network, int64_t batch) {
  int64_t units = 0;
  for (size_t i = kFirstWidth; i < network.size(); ++i) units += network[i];
  return 3 * units * ((batch + kTileSamples - 1) / kTileSamples * kTileSamples);
}

enum class Pass { forward, backward_phi, second_order };

template <class T>
void run_pass(Pass pass, CombinerParams<T>& net, [[maybe_unused]] const Tensor& losses) {
#ifdef AUXFAST_WITH_CUDA
  if (losses.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(losses.get_device_index());
    const int64_t bytes = combiner_cuda_workspace_bytes(net);
    const Tensor workspace = torch::stable::new_empty(losses, {bytes}, ScalarType::Byte);
    net.workspace = workspace.data_ptr();
    void* stream = current_cuda_stream(losses.get_device_index());
    const CombinerCudaKernels<T> kernels;
    const char* error = pass == Pass::forward        ? kernels.forward(net, stream)
                        : pass == Pass::backward_phi ? kernels.backward_phi(net, stream)
                                                     : kernels.second_order(net, stream);
    STD_TORCH_CHECK(error == nullptr, "auxfast: the combiner's CUDA kernel was not launched: ", error);
    return;
  }
#endif
  const int64_t chunks = combiner_num_chunks(net.batch);
  const int64_t tangents = pass == Pass::second_order ? net.num_tangents : 1;
  const int64_t numbers = pass == Pass::forward ? chunks : net.grad_phi ? tangents * chunks * net.num_parameters : 0;
  const std::unique_ptr<double[]> workspace(new double[numbers]);
  net.workspace = workspace.get();
  const CombinerKernels<T>& kernels = cpu_kernels<T>();
  (pass == Pass::forward        ? kernels.forward
   : pass == Pass::backward_phi ? kernels.backward_phi
                                : kernels.second_order)(net, kTorchExecutor);
}

void check_inputs(const char* op, const Tensor& losses, const Tensor& phi) {
  check_floating(op, "losses", losses);
  STD_TORCH_CHECK(losses.dim() == 2, "auxfast::", op, ": losses must be (batch, num_losses), got ", losses.dim(),
                  " dimensions");
  check_matches(op, "phi", phi, "losses", losses);
}

void check_later_pass(const char* op, const Tensor& grad, const Tensor& losses, const Tensor& saved,
                      const Network& network) {
  check_matches(op, "grad", grad, "losses", losses);
  check_matches(op, "saved", saved, "losses", losses);
  const int64_t expected = Reduction(network[kReduction]) == Reduction::none ? losses.size(0) : 1;
  STD_TORCH_CHECK(grad.numel() == expected, "auxfast::", op, ": grad must have ", expected, " elements, got ",
                  grad.numel());
  STD_TORCH_CHECK(saved.numel() == 0 || saved.numel() == saved_size(network, losses.size(0)), "auxfast::", op,
                  ": saved is not what combiner_forward returned");
}

std::tuple<Tensor, Tensor, Tensor> combiner_forward(const Tensor& losses_in, const Tensor& phi_in,
                                                    StringHandle network_text, bool save) {
  const char* op = "combiner_forward";
  const Network network = parse_network(op, network_text);
  check_inputs(op, losses_in, phi_in);
  const Tensor losses = as_contiguous(losses_in), phi = as_contiguous(phi_in);
  return by_dtype(losses, [&](auto zero) {
    using T = decltype(zero);
    CombinerParams<T> net = describe<T>(op, losses, phi, network);
    Tensor weights = new_tensor(losses, {net.batch, net.num_losses});
    Tensor value = net.per_sample ? new_tensor(losses, {net.batch}) : new_tensor(losses, {});
    const int64_t size = save ? saved_size(network, net.batch) : 0;
    Tensor saved = size > 0 && !losses.is_cuda()
                       ? torch::stable::from_blob(RecycledMemory::take(size * sizeof(T)), {size}, {1}, losses.device(),
                                                  losses.scalar_type(), RecycledMemory::give_back)
                       : new_tensor(losses, {size});
    net.value = pointer<T>(value);
    net.weights = pointer<T>(weights);
    net.saved = save ? pointer<T>(saved) : nullptr;
    run_pass(Pass::forward, net, losses);
    return std::make_tuple(value, weights, saved);
  });
}

Tensor combiner_backward_phi(const Tensor& grad_in, const Tensor& losses_in, const Tensor& phi_in, const Tensor& saved,
                             StringHandle network_text) {
  const char* op = "combiner_backward_phi";
  const Network network = parse_network(op, network_text);
  check_inputs(op, losses_in, phi_in);
  check_later_pass(op, grad_in, losses_in, saved, network);
  const Tensor grad = as_contiguous(grad_in), losses = as_contiguous(losses_in), phi = as_contiguous(phi_in);
  return by_dtype(losses, [&](auto zero) {
    using T = decltype(zero);
    CombinerParams<T> net = describe<T>(op, losses, phi, network);
    Tensor grad_phi = new_tensor(phi, {net.num_parameters});
    net.saved = saved.numel() ? pointer<T>(saved) : nullptr;
    net.grad = pointer<T>(grad);
    net.grad_stride = net.per_sample;
    net.grad_phi = pointer<T>(grad_phi);
    run_pass(Pass::backward_phi, net, losses);
    return grad_phi;
  });
}

// What combiner_second_order returns; without phi's part combiner_hessian.
std::pair<Tensor, std::optional<Tensor>> second_order(const char* op, bool with_phi, const Tensor& tangents_in,
                                                      const Tensor& grad_in, const Tensor& losses_in,
                                                      const Tensor& phi_in, const Tensor& saved,
                                                      StringHandle network_text) {
  const Network network = parse_network(op, network_text);
  check_inputs(op, losses_in, phi_in);
  check_later_pass(op, grad_in, losses_in, saved, network);
  check_matches(op, "tangents", tangents_in, "losses", losses_in);
  const bool several = tangents_in.dim() == 3;
  STD_TORCH_CHECK((several || tangents_in.dim() == 2) && tangents_in.size(several) == losses_in.size(0) &&
                      tangents_in.size(several + 1) == losses_in.size(1),
                  "auxfast::", op, ": tangents must be (batch, num_losses) or (num_tangents, batch, num_losses)");
  const Tensor tangents = as_contiguous(tangents_in), grad = as_contiguous(grad_in), losses = as_contiguous(losses_in),
               phi = as_contiguous(phi_in);
  return by_dtype(losses, [&](auto zero) {
    using T = decltype(zero);
    CombinerParams<T> net = describe<T>(op, losses, phi, network);
    net.num_tangents = several ? tangents.size(0) : 1;
    Tensor grad_losses = several ? new_tensor(losses, {net.num_tangents, net.batch, net.num_losses})
                                 : new_tensor(losses, {net.batch, net.num_losses});
    std::optional<Tensor> grad_phi;
    if (with_phi)
      grad_phi =
          several ? new_tensor(phi, {net.num_tangents, net.num_parameters}) : new_tensor(phi, {net.num_parameters});
    net.saved = saved.numel() ? pointer<T>(saved) : nullptr;
    net.grad = pointer<T>(grad);
    net.grad_stride = net.per_sample;
    net.tangents = pointer<T>(tangents);
    net.grad_losses = pointer<T>(grad_losses);
    net.grad_phi = with_phi ? pointer<T>(*grad_phi) : nullptr;
    if (net.num_tangents > 0) run_pass(Pass::second_order, net, losses);
    return std::make_pair(grad_losses, grad_phi);
  });
}

std::tuple<Tensor, Tensor> combiner_second_order(const Tensor& tangents, const Tensor& grad, const Tensor& losses,
                                                 const Tensor& phi, const Tensor& saved, StringHandle network) {
  const auto [grad_losses, grad_phi] =
      second_order("combiner_second_order", true, tangents, grad, losses, phi, saved, network);
  return std::make_tuple(grad_losses, *grad_phi);
}

Tensor combiner_hessian(const Tensor& tangents, const Tensor& grad, const Tensor& losses, const Tensor& phi,
                        const Tensor& saved, StringHandle network) {
  return second_order("combiner_hessian", false, tangents, grad, losses, phi, saved, network).first;
}

void register_kernels(torch::stable::detail::StableLibrary& library) {
  library.impl("combiner_forward", TORCH_BOX(&combiner_forward));
  library.impl("combiner_backward_phi", TORCH_BOX(&combiner_backward_phi));
  library.impl("combiner_second_order", TORCH_BOX(&combiner_second_order));
  library.impl("combiner_hessian", TORCH_BOX(&combiner_hessian));
}

}  // namespace
}  // namespace auxfast

STABLE_TORCH_LIBRARY_IMPL(auxfast, CPU, library) { auxfast::register_kernels(library); }
#ifdef AUXFAST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(auxfast, CUDA, library) { auxfast::register_kernels(library); }
#endif
