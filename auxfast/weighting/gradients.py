"""Exact gradients of one loss at a time."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, sqrt

import torch
from torch import Tensor


def loss_gradient(losses: Tensor, index: int, parameters: tuple[Tensor, ...]) -> Tensor:
    """The flat gradient of `losses[index]` in all `parameters`: (number of values in them,), in float32 at least.

    It is 0 where the loss does not reach a parameter. Frozen parameters are left out. The graph stays.

    Raises:
        ValueError: none of `parameters` requires a gradient, or there are none, or `losses` has no graph though some
            are not 0.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("parameters holds nothing that requires a gradient (a generator that was used up is empty)")
    found: tuple[Tensor | None, ...] = (None,) * len(trained)
    if losses.requires_grad:
        one_hot = torch.zeros_like(losses)
        one_hot[index] = 1
        found = torch.autograd.grad(losses, trained, one_hot, retain_graph=True, allow_unused=True)
    elif (losses != 0).any():  # if all are 0, every loss is absent
        raise ValueError("losses has no graph, so no gradients: pass it before detach()")
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]
    # Squares of float16 gradients would overflow.
    return torch.cat([g.flatten().to(torch.promote_types(g.dtype, torch.float32)) for g in flat])


def scaled_gradient(losses: Tensor, index: int, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The gradient of `loss_gradient` as a direction times a scale: (number of values,), the largest of which is 1 or
    -1, so that their squares stay in range, and (), float64. A gradient of 0 has the scale 1."""
    gradient = loss_gradient(losses, index, parameters)
    largest = gradient.abs().max()
    scale = torch.where(largest == 0, 1, largest)
    return gradient / scale, scale.double()


def out_of_range(norms: Sequence[float], values: Sequence[float], dtype: torch.dtype) -> list[int]:
    """Indices of norms that are wrong, since squares have left the range of their dtype or vanished. `values` are the
    losses: a norm of 0 is right if the loss is 0 too, and else a doubt."""
    smallest = torch.finfo(dtype).tiny ** 0.375  # 6e-15 in float32: the squares of a 1e-4th of it count
    pairs = zip(norms, values, strict=True)
    return [i for i, (norm, value) in enumerate(pairs) if not (smallest < norm < inf or norm == value == 0)]


def gradient_norms(losses: Tensor, values: Sequence[float], parameters: tuple[Tensor, ...]) -> Tensor:
    """(num_losses,): the norm of each loss's gradient, as in `loss_gradient`; `values` are the losses in numbers. In
    float64 where squares leave the range of float32. It waits for a GPU."""
    norms = torch.stack([loss_gradient(losses, i, parameters).norm() for i in range(len(losses))])
    if wrong := out_of_range(norms.tolist(), values, norms.dtype):
        norms = norms.double()
        for i in wrong:
            direction, scale = scaled_gradient(losses, i, parameters)
            norms[i] = direction.norm() * scale
    return norms


def gram_matrix(losses: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
    """(num_losses, num_losses): the inner product of the gradients of every two losses, as in `loss_gradient`. In
    float64 where squares leave the range of float32. It waits for a GPU."""
    gradients = torch.stack([loss_gradient(losses, i, parameters) for i in range(len(losses))])
    gram = _products(gradients)
    norms = [sqrt(square) for square in gram.diagonal().tolist()]
    vanished = 0 in norms and gradients[gram.diagonal() == 0].any()
    if vanished or out_of_range(norms, norms, gram.dtype):
        largest = gradients.abs().amax(dim=1)
        scale = torch.where(largest == 0, 1, largest)
        gram = _products(gradients / scale[:, None]) * torch.outer(scale.double(), scale.double())
    return gram


def _products(rows: Tensor) -> Tensor:
    return torch.stack([rows @ row for row in rows])  # one matmul could round to 1e-3 (TF32)
