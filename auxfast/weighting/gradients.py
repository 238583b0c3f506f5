"""Exact gradients of one loss at a time."""

from __future__ import annotations

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


def gram_matrix(losses: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
    """(num_losses, num_losses): the inner product of the gradients of every two losses, as in `loss_gradient`."""
    gradients = torch.stack([loss_gradient(losses, i, parameters) for i in range(len(losses))])
    return torch.stack([gradients @ gradient for gradient in gradients])  # one matmul could round to 1e-3 (TF32)
