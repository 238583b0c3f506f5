"""The loss image: a small convolutional network that turns an image of losses into one number (the paper's section 3.2,
"convolutional loss network").

For an image of losses h_0 (num_losses, H, W): h_i = avgpool2(act(conv3x3(h_{i-1}))), g = mean over positions of
w . h_depth, and the value is g plus the main loss's mean or sum over pixels, per image, or its mean or sum over the
batch. Three kernels serve all of first and second order; their derivation is in csrc/loss_image/loss_image_math.h.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from auxfast.ops.inputs import op_inputs, reduce_values, without_autocast
from auxfast.ops.network import LossImageNetwork, loss_image_saved_size, unpacked
from auxfast.ops.second_order import SavedForward, batch_over_tangents, differentiable_value

# ---------------------------------------------------------------------------------------------------------- schemas
# network: see Network.packed. main_weights: (batch,), the factor of each image's sum of the main loss, if that is not
# the network's constant. weights: d value / d losses, or empty. saved: CUDA's own record of the activations, or empty.
# loss_image_hessian is loss_image_second_order without grad_phi.

_LIBRARY = torch.library.Library("auxfast", "FRAGMENT")
_LIBRARY.define("loss_image_forward(Tensor losses, Tensor phi, Tensor? main_weights, str network, bool with_weights, bool save) -> (Tensor value, Tensor weights, Tensor saved)")  # fmt: skip  # noqa: E501
_LIBRARY.define("loss_image_backward_phi(Tensor grad, Tensor losses, Tensor phi, Tensor saved, str network) -> Tensor")
_LIBRARY.define("loss_image_second_order(Tensor tangents, Tensor grad, Tensor losses, Tensor phi, Tensor saved, str network) -> (Tensor grad_losses, Tensor grad_phi)")  # fmt: skip  # noqa: E501
_LIBRARY.define("loss_image_hessian(Tensor tangents, Tensor grad, Tensor losses, Tensor phi, Tensor saved, str network) -> Tensor")  # fmt: skip  # noqa: E501
for _op in ("loss_image_forward", "loss_image_backward_phi", "loss_image_second_order", "loss_image_hessian"):
    # The Functions of second_order.py are their autograd.
    _LIBRARY.impl(_op, torch.library.fallthrough_kernel, "Autograd")


# -------------------------------------------------------------------------------------------------------- reference


def loss_image_reference(
    losses: Tensor, phi: Tensor, network: LossImageNetwork, main_weights: Tensor | None = None
) -> Tensor:
    """The loss image in PyTorch operations: on any device, differentiable to any order, under every transform.

    Args and result as in `loss_image`; `main_weights` (batch,) stands for the mask: the factor of each image's sum of
    the main loss, instead of the network's.
    """
    parts = network.split(phi)
    h = losses
    with without_autocast(losses):
        for layer in range(len(network.channels)):
            h = F.conv2d(h, parts[f"{layer}.weight"], parts[f"{layer}.bias"], padding=1)
            if network.activation == "softplus":
                h = F.softplus(h, threshold=40.0)  # the default of 20 is off by 2e-9 in float64
            # Along a dimension of size 1 a pool of 2 would leave nothing: there it does nothing.
            h = F.avg_pool2d(h, [min(2, size) for size in h.shape[-2:]])
        value = h.mean((-2, -1)) @ parts["out.weight"]
    if network.main is not None:
        main = losses[:, network.main].sum((-2, -1))
        value = value + main * (network.main_weight(losses) if main_weights is None else main_weights)
    return reduce_values(value, network.reduction)


# ------------------------------------------------------------------------------------------- fake kernels, batching


@torch.library.register_fake("auxfast::loss_image_forward")
def _forward_fake(
    losses: Tensor, phi: Tensor, main_weights: Tensor | None, network: str, with_weights: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    per_sample, channels = unpacked(network)
    batch, _, height, width = losses.shape
    value = losses.new_empty((batch,) if per_sample else ())
    saved = losses.new_empty(loss_image_saved_size(channels, batch, height, width) if save else 0)
    return value, losses.new_empty(losses.shape if with_weights else (0,)), saved


@torch.library.register_fake("auxfast::loss_image_backward_phi")
def _backward_phi_fake(grad: Tensor, losses: Tensor, phi: Tensor, saved: Tensor, network: str) -> Tensor:
    return phi.new_empty(phi.shape)


@torch.library.register_fake("auxfast::loss_image_second_order")
def _second_order_fake(
    tangents: Tensor, grad: Tensor, losses: Tensor, phi: Tensor, saved: Tensor, network: str
) -> tuple[Tensor, Tensor]:
    return tangents.new_empty(tangents.shape), phi.new_empty((*tangents.shape[:-4], *phi.shape))


torch.library.register_fake("auxfast::loss_image_hessian", lambda *args: _second_order_fake(*args)[0])

batch_over_tangents("loss_image", "second_order", "hessian")


# -------------------------------------------------------------------------------------------------------- autograd

_forward = torch.ops.auxfast.loss_image_forward.default
_backward_phi = torch.ops.auxfast.loss_image_backward_phi.default
_second_order = torch.ops.auxfast.loss_image_second_order.default
_hessian = torch.ops.auxfast.loss_image_hessian.default


# A GPU computes activations in more time than it reads them, so there they are kept for later passes, of whole images:
# as long as they take a small share of its memory, and the work on a single image no more than the share that it would
# get anyway (kMemoryShare in csrc/loss_image/loss_image_cuda_chunks.cuh; three times what is kept of an image).
MOST_SAVED_SHARE = 1 / 16
_MOST_SHARE_OF_AN_IMAGE = 1 / 256 / 3


def _saves(losses: Tensor, network: LossImageNetwork) -> bool:
    if not losses.is_cuda:
        return False
    memory = torch.cuda.get_device_properties(losses.device).total_memory
    bytes_ = network.saved_size(*losses.shape) * losses.element_size()
    return bytes_ <= memory * MOST_SAVED_SHARE and bytes_ / len(losses) <= memory * _MOST_SHARE_OF_AN_IMAGE


class _LossImage(SavedForward):
    """`saved`: the kernels' own record of the activations."""

    op = "loss image"

    def __init__(
        self, network: LossImageNetwork, main_weights: Tensor | None, value: Tensor, weights: Tensor, saved: Tensor
    ) -> None:
        self.network, self.main_weights, self.per_sample = network, main_weights, network.reduction == "none"
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
        return loss_image_reference(losses, phi, self.network, self.main_weights)


# ------------------------------------------------------------------------------------------------------------ the op


def loss_image(losses: Tensor, phi: Tensor, network: LossImageNetwork, mask: Tensor | None = None) -> Tensor:
    """The combined loss of an image of losses, differentiable twice in `losses` and `phi` (a third time raises).

    Args:
        losses: (batch, num_losses, H, W), float32 or float64; float16 and bfloat16 are computed in float32.
        phi: (network.num_parameters,), of the dtype of the computation, on the losses' device.
        network: the architecture.
        mask: (batch, num_losses, H, W), bool or 0/1; where it is 0 that loss is missing at that pixel: it counts as 0
            and receives gradient 0, whatever its value, NaN included. The network's own mean is over all positions; the
            main loss's over all pixels or over those that the mask keeps, by `network.main_reduction`.

    Returns:
        A scalar, or (batch,) if the reduction is "none".

    A pool drops the last row or column of an odd size, as PyTorch does, and does nothing along a dimension of size 1,
    where PyTorch would raise.

    Kernels run on the CPU and on CUDA for up to 4 convolutions and up to 64 losses and channels. Other networks, other
    devices, empty losses, torch.func transforms, forward-mode AD, torch.compile and `auxfast.reference_kernels()` run
    `loss_image_reference`. `is_grads_batched=True` works for Hessian products. Memory beyond the inputs and results
    grows with the width of the image and not with its height; on CUDA it is a 256th of the device's memory, or less for
    small batches, and more only for many channels or many thousands of columns, and up to a 16th holds the activations
    for later passes (60 bytes a pixel of the image, with 8 and 16 channels). Reductions have a fixed order: the same
    bits for any number of threads, and for each call on one GPU.

    Raises:
        ValueError: a shape that does not fit the network; TypeError: a dtype that is not floating or that differs
            between losses and phi; RuntimeError: different devices.
    """
    main_weights = None
    losses, phi, native = op_inputs(losses, phi, network, mask, image=True)
    if mask is not None and network.main is not None and network.main_reduction == "valid_mean":
        valid = mask[:, network.main].bool().sum((-2, -1))
        main_weights = valid.clamp(min=1).to(losses.dtype).reciprocal()
    if not native:
        return loss_image_reference(losses, phi, network, main_weights)
    differentiable = torch.is_grad_enabled() and (losses.requires_grad or phi.requires_grad)
    save = differentiable and _saves(losses, network)
    value, weights, saved = _forward(losses, phi, main_weights, network.packed, differentiable, save)
    if not differentiable:
        return value
    return differentiable_value(losses, phi, _LossImage(network, main_weights, value, weights, saved))
