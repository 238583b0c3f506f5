"""The combiner: a small network that turns each sample's losses into one number (the paper's g, equation 1).

For a sample's losses l (num_losses): h_0 = l, h_i = act(W_i h_{i-1} + b_i), g = w . h_depth, and the value is
g + l[main] per sample, or its mean or sum over the batch. Three kernels serve all of first and second order; their
derivation is in csrc/combiner/combiner_math.h.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from auxfast._native import use_native
from auxfast.ops.combiner_network import REDUCTIONS, TILE_SAMPLES, CombinerNetwork, Reduction

# ---------------------------------------------------------------------------------------------------------- schemas
# network: see CombinerNetwork.packed. saved: the kernels' own record of the activations, possibly empty.

_LIBRARY = torch.library.Library("auxfast", "FRAGMENT")
_LIBRARY.define("combiner_forward(Tensor losses, Tensor phi, int[] network, bool save) -> (Tensor value, Tensor weights, Tensor saved)")  # fmt: skip  # noqa: E501
_LIBRARY.define("combiner_backward_phi(Tensor grad, Tensor losses, Tensor phi, Tensor saved, int[] network) -> Tensor")
_LIBRARY.define("combiner_second_order(Tensor tangents, Tensor grad, Tensor losses, Tensor phi, Tensor saved, int[] network, bool with_phi) -> (Tensor grad_losses, Tensor grad_phi)")  # fmt: skip  # noqa: E501
for _op in ("combiner_forward", "combiner_backward_phi", "combiner_second_order"):
    # The Functions below are their autograd. Without this every call passes through a kernel that only records that
    # there is none, for 3 us.
    _LIBRARY.impl(_op, torch.library.fallthrough_kernel, "Autograd")

_LOW_PRECISION = (torch.float16, torch.bfloat16)


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


def without_autocast(losses: Tensor) -> AbstractContextManager[Any]:
    """Keeps products of losses out of autocast's half precision: they are small, and a loss needs its digits."""
    device = losses.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()


def reduce_values(values: Tensor, reduction: Reduction) -> Tensor:
    """`values` (batch,) as they are ("none"), or their "mean" or "sum"."""
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" else values.sum()


# ------------------------------------------------------------------------------------------- fake kernels, batching


@torch.library.register_fake("auxfast::combiner_forward")
def _forward_fake(losses: Tensor, phi: Tensor, network: list[int], save: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch = losses.shape[0]
    tiles = (batch + TILE_SAMPLES - 1) // TILE_SAMPLES
    value = losses.new_empty((batch,) if network[3] == REDUCTIONS["none"] else ())
    saved = losses.new_empty((3 * sum(network[4:]) * TILE_SAMPLES * tiles if save else 0,))
    return value, losses.new_empty(losses.shape), saved


@torch.library.register_fake("auxfast::combiner_backward_phi")
def _backward_phi_fake(grad: Tensor, losses: Tensor, phi: Tensor, saved: Tensor, network: list[int]) -> Tensor:
    return phi.new_empty(phi.shape)


@torch.library.register_fake("auxfast::combiner_second_order")
def _second_order_fake(
    tangents: Tensor, grad: Tensor, losses: Tensor, phi: Tensor, saved: Tensor, network: list[int], with_phi: bool
) -> tuple[Tensor, Tensor]:
    grad_phi = phi.new_empty((*tangents.shape[:-2], phi.shape[0] if with_phi else 0))
    return tangents.new_empty(tangents.shape), grad_phi


@torch.library.register_vmap("auxfast::combiner_second_order")
def _second_order_vmap(
    info: Any, in_dims: tuple[int | None, ...], tangents: Tensor, *args: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Several Hessian products through one graph (`is_grads_batched=True`) are one call with several tangents."""
    if in_dims[0] is None or any(dim is not None for dim in in_dims[1:] if not isinstance(dim, list)):
        raise NotImplementedError("auxfast's combiner batches second derivatives over the tangents only")
    return torch.ops.auxfast.combiner_second_order(tangents.movedim(in_dims[0], 0), *args), (0, 0)


# -------------------------------------------------------------------------------------------------------- autograd
# Functions in the old style, without setup_context: that costs 12 us an apply and all it buys is torch.func, where
# `combiner` runs the reference anyway. Each takes what it differentiates first.


_forward = torch.ops.auxfast.combiner_forward.default
_backward_phi = torch.ops.auxfast.combiner_backward_phi.default
_second_order = torch.ops.auxfast.combiner_second_order.default


def _is_needed(next_function: tuple[Any, int]) -> bool:
    """Whether the backward pass under way will use the gradient sent there. `ctx.needs_input_grad` cannot tell: it
    says what requires grad, and a Hessian product, which asks for the inner parameters only, would pay for phi."""
    node = next_function[0]
    return node is not None and torch._C._will_engine_execute_node(node)


def _check_transforms(incoming: Tensor, with_graph: bool) -> None:
    """Raises where a backward pass would lose derivatives without a word."""
    if torch.autograd.forward_ad._current_level >= 0:
        what = "forward-mode AD through their backward pass"
    elif with_graph and (
        torch._C._functorch.is_legacy_batchedtensor(incoming) or torch._C._are_functorch_transforms_active()
    ):
        what = "batched gradients that have a graph (is_grads_batched=True with create_graph=True)"
    else:
        return
    raise NotImplementedError(
        f"auxfast's combiner kernels do not support {what}. Call the combiner within auxfast.reference_kernels()."
    )


class _Record(NamedTuple):
    """What the kernels keep of a forward pass. No autograd tensors, so ctx may hold it as it is, which is cheaper."""

    network: CombinerNetwork
    weights: Tensor  # (batch, num_losses): d value / d losses
    saved: Tensor

    def scaled_weights(self, grad: Tensor) -> Tensor:
        return self.weights * (grad[:, None] if self.network.reduction == "none" else grad)


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Tensor, phi: Tensor, network: CombinerNetwork) -> Tensor:
        save = network.saves_activations(losses.shape[0], losses.element_size())
        value, weights, saved = _forward(losses, phi, network.packed, save)
        ctx.save_for_backward(losses, phi)
        ctx.record = _Record(network, weights, saved)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        losses, phi = ctx.saved_tensors
        record: _Record = ctx.record
        to_losses, to_phi = ctx.next_functions
        with_graph = torch.is_grad_enabled()
        _check_transforms(grad, with_graph)
        grad_losses = grad_phi = None
        if to_losses[0] is not None:
            grad_losses = _apply_gradient(grad, losses, phi, record) if with_graph else record.scaled_weights(grad)
        if _is_needed(to_phi):
            if with_graph:  # d^2/dphi^2 is nobody's hot path: the reference records it
                value = combiner_reference(losses, phi, record.network)
                (grad_phi,) = torch.autograd.grad(value, phi, grad, create_graph=True)
            else:
                grad_phi = _backward_phi(grad, losses, phi, record.saved, record.network.packed)
        return grad_losses, grad_phi, None


class _Gradient(torch.autograd.Function):
    """grad * d value / d losses, of which the backward is a Hessian-vector and mixed product."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, losses: Tensor, phi: Tensor, record: _Record) -> Tensor:
        ctx.save_for_backward(grad, losses, phi)
        ctx.record = record
        return record.scaled_weights(grad)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, ...]:
        grad, losses, phi = ctx.saved_tensors
        to_grad, _, to_phi = ctx.next_functions
        with_grad, with_phi = to_grad[0] is not None, _is_needed(to_phi)
        with_graph = torch.is_grad_enabled()
        _check_transforms(tangent, with_graph)
        if with_graph:
            return _apply_second_order(tangent, grad, losses, phi, ctx.record, with_grad, with_phi)
        return _second_derivatives(tangent, grad, losses, phi, ctx.record, with_grad, with_phi)


def _second_derivatives(
    tangent: Tensor, grad: Tensor, losses: Tensor, phi: Tensor, record: _Record, with_grad: bool, with_phi: bool
) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
    """Derivatives of <tangent, grad * weights> in grad, losses and phi; in grad and phi if wanted."""
    network = record.network
    grad_losses, grad_phi = _second_order(tangent, grad, losses, phi, record.saved, network.packed, with_phi)
    grad_grad = None
    if with_grad:
        grad_grad = (tangent * record.weights).sum(-1)
        if network.reduction != "none":  # piece by piece: torch divides larger sums among its threads
            grad_grad = torch.stack([piece.sum() for piece in grad_grad.split(1 << 14)]).sum()
    return grad_grad, grad_losses, grad_phi if with_phi else None, None


class _SecondOrder(torch.autograd.Function):
    """`_second_derivatives` in a graph: it has values, and an error where its derivatives would be."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        return _second_derivatives(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "auxfast's combiner kernels have first and second derivatives, and this asks for a third. Call the "
            "combiner within auxfast.reference_kernels() to differentiate it to any order."
        )


# apply() without its preparations for torch.func, which `combiner` has ruled out by then: they take 3.5 us.
_apply_value, _apply_gradient, _apply_second_order = (
    super(torch.autograd.Function, function).apply  # type: ignore[misc]
    for function in (_Value, _Gradient, _SecondOrder)
)


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
    losses = present_losses(losses, mask, network.num_losses)
    phi = full_precision(phi)
    _check_phi(phi, losses, network)
    if _is_transformed() or not (network.fits_kernels and use_native(losses.device) and losses.numel() > 0):
        return combiner_reference(losses, phi, network)
    if not (torch.is_grad_enabled() and (losses.requires_grad or phi.requires_grad)):
        value: Tensor = _forward(losses, phi, network.packed, False)[0]
        return value
    if phi.is_leaf and phi.requires_grad:
        phi = phi.view(-1)  # the engine answers _is_needed for inner nodes only
    return _apply_value(losses, phi, network)


def _is_transformed() -> bool:
    """Whether something that the Functions know nothing of is under way, and would get errors or silent zeros."""
    in_forward_mode = torch.autograd.forward_ad._current_level >= 0
    return torch.compiler.is_compiling() or in_forward_mode or torch._C._are_functorch_transforms_active()


def present_losses(losses: Tensor, mask: Tensor | None, num_losses: int) -> Tensor:
    """`losses` checked, 0 where the mask is 0, and in float32 if they came in less; see `combiner`."""
    if losses.dim() != 2 or losses.shape[1] != num_losses:
        raise ValueError(f"losses must be (batch, {num_losses}), got {tuple(losses.shape)}")
    if not losses.dtype.is_floating_point:
        raise TypeError(f"losses must be floating point, got {losses.dtype}")
    if mask is not None:
        if mask.shape != losses.shape:
            raise ValueError(f"mask must have the losses' shape {tuple(losses.shape)}, got {tuple(mask.shape)}")
        if mask.device != losses.device:
            raise RuntimeError(f"losses are on {losses.device} and mask is on {mask.device}: move one to the other")
        losses = torch.where(mask.bool(), losses, 0.0)
    return full_precision(losses)


def full_precision(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 as float32, others as they are."""
    return tensor.float() if tensor.dtype in _LOW_PRECISION else tensor


def _check_phi(phi: Tensor, losses: Tensor, network: CombinerNetwork) -> None:
    if phi.dim() != 1 or phi.shape[0] != network.num_parameters:
        raise ValueError(f"phi must be ({network.num_parameters},), got {tuple(phi.shape)}")
    if losses.dtype != phi.dtype:
        raise TypeError(f"losses are {losses.dtype} and phi is {phi.dtype}: convert one, e.g. combiner.to(losses)")
    if losses.device != phi.device:
        raise RuntimeError(f"losses are on {losses.device} and phi is on {phi.device}: move one to the other")
