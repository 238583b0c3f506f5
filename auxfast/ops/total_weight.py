"""The sum of a sample's loss weights: what a combiner multiplies training with, as a function of `phi`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from auxfast.autograd.function import call_backward_directly, direct_apply
from auxfast.autograd.torch_calls import without_frame
from auxfast.ops.inputs import runs_on_kernels, without_autocast
from auxfast.ops.network import CombinerNetwork

_forward = without_frame(torch.ops.auxfast.combiner_forward.default)
_second_order = without_frame(torch.ops.auxfast.combiner_second_order.default)


def total_weight_reference(losses: Tensor, phi: Tensor, network: CombinerNetwork) -> Tensor:
    """The total in PyTorch operations, differentiable to any order in `phi`: the derivative of the value along a step
    of 1 in every loss, forward beside the value."""
    parts = network.split(phi)
    h, slope = losses, torch.ones_like(losses)
    with without_autocast(losses):
        for layer in range(len(network.hidden)):
            weight = parts[f"{layer}.weight"]
            h, slope = F.linear(h, weight, parts.get(f"{layer}.bias")), F.linear(slope, weight)
            if network.activation == "softplus":
                h, slope = F.softplus(h, threshold=40.0), h.sigmoid() * slope
        total = (slope @ parts["out.weight"]).sum()
    return total if network.main is None else total + len(losses)


class _TotalWeight(torch.autograd.Function):
    """The total by the combiner's kernels. Its gradient in phi is the second order along a tangent of ones."""

    twice_differentiable = True  # so that auxfast.autograd.double_backward need not find out

    @staticmethod
    def forward(ctx: Any, phi: Tensor, losses: Tensor, network: CombinerNetwork) -> Tensor:
        ctx.save_for_backward(phi, losses)
        ctx.network = network
        return _total(losses, phi, network)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        phi, losses = ctx.saved_tensors
        if torch.is_grad_enabled():  # nobody's hot path: the reference records it
            total = total_weight_reference(losses, phi, ctx.network)
            (to_phi,) = torch.autograd.grad(total, phi, grad, create_graph=True)
            return to_phi, None, None
        one, nothing = losses.new_ones(()), losses.new_empty(0)
        _, to_phi = _second_order(torch.ones_like(losses), one, losses, phi, nothing, ctx.network.packed)
        return grad * to_phi, None, None


_apply = direct_apply(_TotalWeight)
call_backward_directly(_TotalWeight)


def total_weight_at(losses: Tensor, phi: Tensor, network: CombinerNetwork) -> Tensor:
    """The sum over a sample's losses of d value / d loss, added up over the samples; differentiable to any order in
    `phi`, and constant in the losses.

    Args:
        losses: (batch, num_losses), float32 or float64, without a graph.
        phi: (network.num_parameters,), of the dtype of the losses and on their device.
        network: the architecture, with the reduction "sum".
    """
    if not runs_on_kernels(losses, network):
        return total_weight_reference(losses, phi, network)
    if not (phi.requires_grad and torch.is_grad_enabled()):
        return _total(losses, phi, network)
    total: Tensor = _apply(phi, losses, network)
    return total


def _total(losses: Tensor, phi: Tensor, network: CombinerNetwork) -> Tensor:
    total: Tensor = _forward(losses, phi, network.packed, False)[1].sum()
    return total
