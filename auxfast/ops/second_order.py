"""Autograd of the combiners' ops: value, gradient and second order from three kernels, and an error beyond.

The Functions are in the old style, without setup_context: that costs 12 us an apply, and all it buys is torch.func,
where the ops run their references anyway. Each takes what it differentiates first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from auxfast.autograd.function import call_backward_directly, direct_apply, reaches
from auxfast.autograd.transforms import in_batch, in_forward_mode


class SavedForward(ABC):
    """A forward pass, as its kernels left it for the later ones; every op has its own. Of autograd's tensors only the
    op's inputs are in it, so ctx may hold it as it is: `save_for_backward` and `saved_tensors` take 4% of a step.

    Attributes:
        op: name of the op in messages.
        inputs: losses and phi.
        versions: version counters of the inputs, which change if they are written to.
        weights: d value / d losses, of the shape of the losses.
        per_sample: whether the value is (batch,) instead of one number.
        value: what the forward pass returned, until it gets its node.
        to_phi: the node that phi's gradient goes to; `None` if it needs none. The engine is asked whether it will run.
    """

    op: str
    inputs: tuple[Tensor, Tensor]
    versions: tuple[int, int]
    weights: Tensor
    per_sample: bool
    value: Tensor | None
    to_phi: Any

    @abstractmethod
    def backward_phi(self, grad: Tensor, losses: Tensor, phi: Tensor) -> Tensor:
        """grad * d value / d phi."""

    @abstractmethod
    def second_order(
        self, tangent: Tensor, grad: Tensor, losses: Tensor, phi: Tensor, with_phi: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Derivatives of <tangent, grad * weights> in losses, and in phi if wanted."""

    @abstractmethod
    def reference(self, losses: Tensor, phi: Tensor) -> Tensor:
        """The value in PyTorch operations."""

    def scaled_weights(self, grad: Tensor) -> Tensor:
        per_sample = grad.view(-1, *(1,) * (self.weights.dim() - 1)) if self.per_sample else grad
        return self.weights * per_sample

    def grad_of_grad(self, tangent: Tensor) -> Tensor:
        """<tangent, weights>, of each sample or of all. On the CPU the sum is taken piece by piece: torch divides
        larger sums among its threads, and the bits would depend on their number. A GPU has an order of its own."""
        products = (tangent * self.weights).flatten(1)
        if not products.is_cpu:
            return products.sum(-1) if self.per_sample else products.sum()
        sums = torch.stack([piece.sum(-1) for piece in products.split(1 << 14, dim=1)]).sum(0)
        return sums if self.per_sample else torch.stack([piece.sum() for piece in sums.split(1 << 14)]).sum()


def differentiable_value(losses: Tensor, phi: Tensor, saved: SavedForward) -> Tensor:
    """Value of `saved`'s op, differentiable twice in losses and phi."""
    if phi.is_leaf and phi.requires_grad:
        phi = phi[...]  # the engine can be asked about inner nodes only; `expand` takes 1.5 us more, `view` 3
    saved.to_phi = phi.grad_fn
    saved.inputs = losses, phi
    saved.versions = losses._version, phi._version
    value: Tensor = _apply_value(losses, phi, saved)
    return value


def batch_over_tangents(op: str, *passes: str) -> None:
    """Makes `torch.func.vmap` of these passes of `op` over tangents, their first argument, one call for all of them."""

    def register(name: str) -> None:
        function = getattr(torch.ops.auxfast, name)

        def rule(info: Any, in_dims: tuple[int | None, ...], tangents: Tensor, *args: Any) -> tuple[Any, Any]:
            if in_dims[0] is None or any(dim is not None for dim in in_dims[1:] if not isinstance(dim, list)):
                raise NotImplementedError(f"auxfast's {op} batches second derivatives over the tangents only")
            out = function(tangents.movedim(in_dims[0], 0), *args)
            return out, 0 if isinstance(out, Tensor) else (0, 0)

        torch.library.register_vmap(f"auxfast::{name}", rule)

    for name in passes:
        register(f"{op}_{name}")


def _inputs(ctx: Any, saved: SavedForward) -> tuple[Tensor, Tensor]:
    """Losses and phi. Raises RuntimeError where `save_for_backward` would have: they were written to, or the graph was
    freed."""
    ctx.saved_tensors  # there are none, but autograd asks whether the graph was freed  # noqa: B018
    losses, phi = saved.inputs
    if (losses._version, phi._version) != saved.versions:
        raise _overwritten(saved.op)
    return losses, phi


def _overwritten(op: str) -> RuntimeError:
    """Error for tensors that were written to; `detach_()` counts as an inplace operation."""
    return RuntimeError(
        f"one of the tensors that auxfast's {op} needs for gradient computation has been modified by an inplace "
        "operation since it was called: the losses, phi, or the gradient that came in"
    )


def _unsupported(op: str) -> NotImplementedError:
    """The error for a backward pass that would lose derivatives without a word."""
    if in_forward_mode():
        what = "forward-mode AD through their backward pass"
    else:
        what = "batched gradients that have a graph (is_grads_batched=True with create_graph=True)"
    return NotImplementedError(
        f"auxfast's {op} kernels do not support {what}. Call it within auxfast.reference_kernels()."
    )


class _Value(torch.autograd.Function):
    twice_differentiable = True  # so that auxfast.autograd.double_backward need not find out

    @staticmethod
    def forward(ctx: Any, losses: Tensor, phi: Tensor, saved: SavedForward) -> Tensor | None:
        ctx.saved = saved
        value, saved.value = saved.value, None  # the value will hold this node, which holds `saved`: no cycle
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        saved: SavedForward = ctx.saved
        losses, phi = _inputs(ctx, saved)
        with_graph = torch.is_grad_enabled()
        if in_forward_mode() or (with_graph and in_batch(grad)):
            raise _unsupported(saved.op)
        for_losses, for_phi, _ = ctx.needs_input_grad
        if with_graph and ((for_losses and not losses.requires_grad) or (for_phi and not phi.requires_grad)):
            raise _overwritten(saved.op)
        grad_losses = grad_phi = None
        if for_losses:
            grad_losses = _apply_gradient(grad, losses, phi, saved) if with_graph else saved.scaled_weights(grad)
        if saved.to_phi is not None and reaches(saved.to_phi):
            if with_graph:  # d^2/dphi^2 is nobody's hot path: the reference records it
                value = saved.reference(losses, phi)
                (grad_phi,) = torch.autograd.grad(value, phi, grad, create_graph=True)
            else:
                grad_phi = saved.backward_phi(grad, losses, phi)
        return grad_losses, grad_phi, None

    @staticmethod
    def batched_backward(ctx: Any, wanted: Collection[int], grads: Tensor) -> tuple[Tensor | None, ...]:
        """`backward` for k gradients, outside of the engine (auxfast.autograd.batched_backward). grads: (k, *value)."""
        saved: SavedForward = ctx.saved
        losses, phi = _inputs(ctx, saved)
        to_losses = torch.stack([*map(saved.scaled_weights, grads)]) if 0 in wanted else None
        to_phi = torch.stack([saved.backward_phi(grad, losses, phi) for grad in grads]) if 1 in wanted else None
        return to_losses, to_phi


class _Gradient(torch.autograd.Function):
    """grad * d value / d losses, of which the backward is a Hessian-vector and mixed product."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, losses: Tensor, phi: Tensor, saved: SavedForward) -> Tensor:
        ctx.saved, ctx.grad, ctx.version = saved, grad, grad._version
        return saved.scaled_weights(grad)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, ...]:
        saved: SavedForward = ctx.saved
        grad, (losses, phi) = ctx.grad, _inputs(ctx, saved)
        if grad._version != ctx.version:
            raise _overwritten(saved.op)
        with_grad = ctx.needs_input_grad[0] and (grad.grad_fn is None or reaches(grad.grad_fn))
        with_phi = saved.to_phi is not None and reaches(saved.to_phi)
        with_graph = torch.is_grad_enabled()
        if in_forward_mode() or (with_graph and in_batch(tangent)):
            raise _unsupported(saved.op)
        if with_graph:
            return _apply_second_order(tangent, grad, losses, phi, saved, with_grad, with_phi)
        to_losses, to_phi = saved.second_order(tangent, grad, losses, phi, with_phi)
        return saved.grad_of_grad(tangent) if with_grad else None, to_losses, to_phi, None

    @staticmethod
    def batched_backward(ctx: Any, wanted: Collection[int], tangents: Tensor) -> tuple[Tensor | None, ...]:
        """`backward` for k tangents, which the kernels take at once. tangents: (k, *losses)."""
        saved: SavedForward = ctx.saved
        grad, (losses, phi) = ctx.grad, _inputs(ctx, saved)
        if grad._version != ctx.version:
            raise _overwritten(saved.op)
        to_grad = torch.stack([*map(saved.grad_of_grad, tangents)]) if 0 in wanted else None
        return to_grad, *saved.second_order(tangents, grad, losses, phi, 2 in wanted)


class _SecondOrder(torch.autograd.Function):
    """`_Gradient.backward` in a graph: it has values, and an error where its derivatives would be."""

    @staticmethod
    def forward(
        ctx: Any,
        tangent: Tensor,
        grad: Tensor,
        losses: Tensor,
        phi: Tensor,
        saved: SavedForward,
        with_grad: bool,
        with_phi: bool,
    ) -> tuple[Tensor | None, ...]:
        ctx.op = saved.op
        to_losses, to_phi = saved.second_order(tangent, grad, losses, phi, with_phi)
        return saved.grad_of_grad(tangent) if with_grad else None, to_losses, to_phi, None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"auxfast's {ctx.op} kernels have first and second derivatives, and this asks for a third. Call the "
            "combiner within auxfast.reference_kernels() to differentiate it to any order."
        )


_apply_value, _apply_gradient, _apply_second_order = map(direct_apply, (_Value, _Gradient, _SecondOrder))
for _function in (_Value, _Gradient, _SecondOrder):
    call_backward_directly(_function)
