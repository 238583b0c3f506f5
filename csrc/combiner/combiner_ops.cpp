// torch's side of the combiner: checks, allocates, fills CombinerParams and hands over to the kernels of the device.
// The schemas, and what each op returns, are in auxfast/ops/combiner.py.
#include <cstdlib>
#include <mutex>
#include <tuple>
#include <utility>

#include "combiner/combiner.h"
#include "common/kernel_tables.h"
#include "common/network_ops.h"

AUXFAST_CPU_KERNELS(CombinerKernels, combiner)
#ifdef AUXFAST_WITH_CUDA
AUXFAST_CUDA_KERNELS(CombinerCudaKernels, combiner)
#endif

namespace auxfast {
namespace {

struct Combiner {
  template <class T>
  using Params = CombinerParams<T>;
  static constexpr const char *kLosses = "(batch, num_losses)", *kLayers = "hidden layers";
  static constexpr int64_t kDimensions = 2, kMostLayers = kMaxDepth;

  // The network's flag says whether hidden layers have biases.
  template <class T>
  static void lay_out(const char* op, const Network& network, const Tensor& losses, CombinerParams<T>& net) {
    net.num_losses = losses.size(1);
    int64_t inputs = net.num_losses, at = 0;
    for (int32_t layer = 0; layer < net.depth; ++layer) {
      const int64_t width = network.layers[layer];
      STD_TORCH_CHECK(width >= 1 && width <= kMaxWidth, "auxfast::", op, ": widths of 1 to ", kMaxWidth, ", got ",
                      width);
      net.width[layer] = int32_t(width);
      net.first_unit[layer] = net.units;
      net.units += int32_t(width);
      net.weight[layer] = at;
      at += width * inputs;
      net.bias[layer] = network.flag ? at : -1;
      at += network.flag ? width : 0;
      inputs = width;
    }
    net.weight[net.depth] = at;
    net.num_parameters = at + inputs;
  }

  template <class T>
  static constexpr auto cpu = combiner_cpu<T>;
#ifdef AUXFAST_WITH_CUDA
  template <class T>
  static constexpr auto cuda = combiner_cuda<T>;
#endif
  template <class T>
  static constexpr auto workspace_bytes = combiner_workspace_bytes<T>;
};
using Call = NetworkCall<Combiner>;

// Memory that outlives its tensor, for the next tensor of the same size.
//
// What a forward pass saves for the second order is allocated and freed at every step. malloc gives memory of that size
// back to the system whenever it lies at the end of its heap; the pages that come instead at the next step must be
// zeroed first, and that takes longer than the kernels.
class RecycledMemory {
 public:
  static void* take(size_t bytes) {
    RecycledMemory& self = instance();
    {
      const std::lock_guard<std::mutex> lock(self.mutex_);
      for (Header*& spare : self.spare_)
        if (spare && spare->bytes == bytes) return std::exchange(spare, nullptr) + 1;
    }
    auto* header = static_cast<Header*>(std::aligned_alloc(sizeof(Header), sizeof(Header) + (bytes + 63) / 64 * 64));
    STD_TORCH_CHECK(header != nullptr, "auxfast: out of memory for ", bytes, " bytes");
    header->bytes = bytes;
    return header + 1;
  }

  static void give_back(void* memory) {
    RecycledMemory& self = instance();
    Header* header = static_cast<Header*>(memory) - 1;
    if (header->bytes <= kMostBytes) {
      const std::lock_guard<std::mutex> lock(self.mutex_);
      std::swap(header, self.spare_[self.next_]);  // the oldest goes
      self.next_ = (self.next_ + 1) % kMostSpares;
    }
    std::free(header);
  }

 private:
  static constexpr size_t kMostBytes = 1 << 20;  // of a tensor: up to here auxfast/ops/combiner.py always saves
  static constexpr int kMostSpares = 4;
  struct alignas(64) Header {
    size_t bytes;
  };

  static RecycledMemory& instance() {
    static auto* only = new RecycledMemory;  // never destroyed: tensors may outlive everything
    return *only;
  }

  std::mutex mutex_;
  Header* spare_[kMostSpares] = {};
  int next_ = 0;
};

template <class T>
Tensor new_saved(const Tensor& losses, int64_t size) {
  if (size == 0 || losses.is_cuda()) return new_tensor(losses, {size});
  return torch::stable::from_blob(RecycledMemory::take(size * sizeof(T)), {size}, {1}, losses.device(),
                                  losses.scalar_type(), RecycledMemory::give_back);
}

// Hands `saved`, which may be empty, to a later pass.
auto with_saved(const Call& call, const Tensor& saved) {
  check_matches(call.op, "saved", saved, "losses", call.losses);
  return [&](auto& net) {
    if (saved.numel() == 0) return;
    STD_TORCH_CHECK(saved.numel() == combiner_saved_size(net) && saved.is_contiguous(), "auxfast::", call.op,
                    ": saved is not what combiner_forward returned");
    set_pointer(net.saved, saved);
  };
}

std::tuple<Tensor, Tensor, Tensor> combiner_forward(const Tensor& losses,  // (batch, num_losses)
                                                    const Tensor& phi,     // (num_parameters,)
                                                    StringHandle network, bool save) {
  const Call call("combiner_forward", losses, phi, network);
  return call.with_params([&](auto& net) {
    Tensor value = call.new_value(net), weights = new_tensor(call.losses, call.losses.sizes());
    Tensor saved = new_saved<Element<decltype(net)>>(call.losses, save ? combiner_saved_size(net) : 0);
    set_pointer(net.value, value);
    set_pointer(net.grad_losses, weights);
    if (save) set_pointer(net.saved, saved);
    call.run(Pass::forward, net);
    return std::make_tuple(value, weights, saved);
  });
}

Tensor combiner_backward_phi(const Tensor& grad,    // (batch,) or ()
                             const Tensor& losses,  // (batch, num_losses)
                             const Tensor& phi,     // (num_parameters,)
                             const Tensor& saved,   // what combiner_forward returned, or (0,)
                             StringHandle network) {
  const Call call("combiner_backward_phi", losses, phi, network);
  return call.backward_phi(grad, with_saved(call, saved));
}

std::tuple<Tensor, Tensor> combiner_second_order(
    const Tensor& tangents,  // (num_tangents, batch, num_losses) or without
    const Tensor& grad,      // (batch,) or ()
    const Tensor& losses,    // (batch, num_losses)
    const Tensor& phi,       // (num_parameters,)
    const Tensor& saved,     // what combiner_forward returned, or (0,)
    StringHandle network) {
  const Call call("combiner_second_order", losses, phi, network);
  const auto [grad_losses, grad_phi] = call.second_order(true, tangents, grad, with_saved(call, saved));
  return std::make_tuple(grad_losses, *grad_phi);
}

// combiner_second_order without grad_phi.
Tensor combiner_hessian(const Tensor& tangents,  // (num_tangents, batch, num_losses), or without num_tangents
                        const Tensor& grad,      // (batch,) or ()
                        const Tensor& losses,    // (batch, num_losses)
                        const Tensor& phi,       // (num_parameters,)
                        const Tensor& saved,     // what combiner_forward returned, or (0,)
                        StringHandle network) {
  const Call call("combiner_hessian", losses, phi, network);
  return call.second_order(false, tangents, grad, with_saved(call, saved)).first;
}

void register_kernels(torch::stable::detail::StableLibrary& library) {
  library.impl("combiner_forward", TORCH_BOX(&combiner_forward));
  library.impl("combiner_backward_phi", TORCH_BOX(&combiner_backward_phi));
  library.impl("combiner_second_order", TORCH_BOX(&combiner_second_order));
  library.impl("combiner_hessian", TORCH_BOX(&combiner_hessian));
}

}  // namespace
}  // namespace auxfast

AUXFAST_REGISTER_KERNELS
