"""The combiner: a small network that turns each sample's losses into one number (the paper's g, equation 1).

For a sample's losses l (num_losses): h_0 = l, h_i = act(W_i h_{i-1} + b_i), g = w . h_depth, and the value is
g + l[main] per sample, or its mean or sum over the batch. Three kernels serve all of first and second order; their
derivation is in csrc/combiner/combiner_math.h.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from auxfast.autograd.torch_calls import without_frame
from auxfast.ops.inputs import op_inputs, reduce_values, without_autocast
from auxfast.ops.network import TILE_SAMPLES, CombinerNetwork, unpacked
from auxfast.ops.second_order import SavedForward, batch_over_tangents, differentiable_value

# ---------------------------------------------------------------------------------------------------------- schemas
# network: see Network.packed. saved: the kernels' own record of the activations, possibly empty. weights: d value / d
# losses. combiner_hessian is combiner_second_order without grad_phi.

_LIBRARY = torch.library.Library("auxfast", "FRAGMENT")
_LIBRARY.define("combiner_forward(Tensor losses, Tensor phi, str network, bool save) -> (Tensor value, Tensor weights, Tensor saved)")  # fmt: skip  # noqa: E501
_LIBRARY.define("combiner_backward_phi(Tensor grad, Tensor losses, Tensor phi, Tensor saved, str network) -> Tensor")
_LIBRARY.define("combiner_second_order(Tensor tangents, Tensor grad, Tensor losses, Tensor phi, Tensor saved, str network) -> (Tensor grad_losses, Tensor grad_phi)")  # fmt: skip  # noqa: E501
_LIBRARY.define("combiner_hessian(Tensor tangents, Tensor grad, Tensor losses, Tensor phi, Tensor saved, str network) -> Tensor")  # fmt: skip  # noqa: E501
for _op in ("combiner_forward", "combiner_backward_phi", "combiner_second_order", "combiner_hessian"):
    # The Functions below are their autograd. Without this every call passes through a kernel that only records that
    # there is none, for 3 us.
    _LIBRARY.impl(_op, torch.library.fallthrough_kernel, "Autograd")

# -------------------------------------------------------------------------------------------------------- reference


def combiner_reference(losses: Tensor, phi: Tensor, network: CombinerNetwork) -> Tensor:
    """The combiner in PyTorch operations: on any device, differentiable to any order, under every transform.

    Args and result as in `combiner`, without the mask.
    """
    parts = network.split(phi)
    h = losses
    with without_autocast(losses):
        for layer in range(len(network.hidden)):
            h = F.linear(h, parts[f"{layer}.weight"], parts.get(f"{layer}.bias"))
            if network.activation == "softplus":
                h = F.softplus(h, threshold=40.0)  # the default of 20 is off by 2e-9 in float64
        value = h @ parts["out.weight"]
    if network.main is not None:
        value = value + losses[:, network.main]
    return reduce_values(value, network.reduction)


# ------------------------------------------------------------------------------------------- fake kernels, batching


@torch.library.register_fake("auxfast::combiner_forward")
def _forward_fake(losses: Tensor, phi: Tensor, network: str, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch = losses.shape[0]
    tiles = (batch + TILE_SAMPLES - 1) // TILE_SAMPLES
    per_sample, widths = unpacked(network)
    value = losses.new_empty((batch,) if per_sample else ())
    saved = losses.new_empty((3 * sum(widths) * TILE_SAMPLES * tiles if save else 0,))
    return value, losses.new_empty(losses.shape), saved


@torch.library.register_fake("auxfast::combiner_backward_phi")
def _backward_phi_fake(grad: Tensor, losses: Tensor, phi: Tensor, saved: Tensor, network: str) -> Tensor:
    return phi.new_empty(phi.shape)


@torch.library.register_fake("auxfast::combiner_second_order")
def _second_order_fake(
    tangents: Tensor, grad: Tensor, losses: Tensor, phi: Tensor, saved: Tensor, network: str
) -> tuple[Tensor, Tensor]:
    return tangents.new_empty(tangents.shape), phi.new_empty((*tangents.shape[:-2], *phi.shape))


torch.library.register_fake("auxfast::combiner_hessian", lambda *args: _second_order_fake(*args)[0])

batch_over_tangents("combiner", "second_order", "hessian")


# -------------------------------------------------------------------------------------------------------- autograd

# Activations are kept for the second order where that takes little memory, or less than the losses do; elsewhere they
# are computed again. On the CPU reading them back costs as much as the arithmetic once they leave its caches. A GPU
# reads them faster than it computes them: there memory alone is the limit, of which a GiB is a small part.
MOST_SAVED_BYTES = 1 << 20
MOST_SAVED_BYTES_ON_GPU = 1 << 30

_forward = without_frame(torch.ops.auxfast.combiner_forward.default)
_backward_phi = without_frame(torch.ops.auxfast.combiner_backward_phi.default)
_second_order = without_frame(torch.ops.auxfast.combiner_second_order.default)
_hessian = without_frame(torch.ops.auxfast.combiner_hessian.default)


class _Combination(SavedForward):
    """`saved`: the kernels' own record of the activations."""

    op = "combiner"

    def __init__(self, network: CombinerNetwork, value: Tensor, weights: Tensor, saved: Tensor) -> None:
        self.network, self.per_sample = network, network.reduction == "none"
        self.value, self.weights, self.saved = value, weights, saved

    def backward_phi(self, grad: Tensor, losses: Tensor, phi: Tensor) -> Tensor:
        gradient: Tensor = _backward_phi(grad, losses, phi, self.saved, self.network.packed)
        return gradient

    def second_order(
        self, tangent: Tensor, grad: Tensor, losses: Tensor, phi: Tensor, with_phi: bool
    ) -> tuple[Tensor, Tensor | None]:
        given = tangent, grad, losses, phi, self.saved, self.network.packed
        return _second_order(*given) if with_phi else (_hessian(*given), None)

    def reference(self, losses: Tensor, phi: Tensor) -> Tensor:
        return combiner_reference(losses, phi, self.network)


# ------------------------------------------------------------------------------------------------------------ the op


def combiner(losses: Tensor, phi: Tensor, network: CombinerNetwork, mask: Tensor | None = None) -> Tensor:
    """The combined loss, differentiable twice in `losses` and `phi` (a third time raises).

    Args:
        losses: (batch, num_losses), float32 or float64; float16 and bfloat16 are computed in float32.
        phi: (network.num_parameters,), of the dtype of the computation, on the losses' device.
        network: the architecture.
        mask: (batch, num_losses), bool or 0/1; where it is 0 the sample does not have that loss: the loss contributes
            0 and receives gradient 0, whatever its value, NaN included.

    Returns:
        A scalar, or (batch,) if the reduction is "none".

    Kernels run on the CPU and on CUDA for up to 8 hidden layers of up to 64 units. Other networks, other devices, empty
    losses, torch.func transforms, forward-mode AD, torch.compile and `auxfast.reference_kernels()` run
    `combiner_reference`. `is_grads_batched=True` works for Hessian products. Reductions have a fixed order: the same
    bits for any number of threads and for every run on one GPU.

    Raises:
        ValueError: a shape that does not fit the network; TypeError: a dtype that is not floating or that differs
            between losses and phi; RuntimeError: different devices.
    """
    losses, phi, native = op_inputs(losses, phi, network, mask)
    if not native:
        return combiner_reference(losses, phi, network)
    differentiable = torch.is_grad_enabled() and (losses.requires_grad or phi.requires_grad)
    saved_size = network.saved_size(losses.shape[0])
    most_bytes = MOST_SAVED_BYTES_ON_GPU if losses.is_cuda else MOST_SAVED_BYTES
    save = saved_size * losses.element_size() <= most_bytes or saved_size <= losses.numel()
    value, weights, saved = _forward(losses, phi, network.packed, differentiable and save)
    return differentiable_value(losses, phi, _Combination(network, value, weights, saved)) if differentiable else value
