"""The optimizer of outer parameters with the interface of `auxilearn.optim`."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from auxfast.compat.auxilearn.implicit_diff import Hypergrad, Scale, listed
from auxfast.implicit.advice import warn_once
from auxfast.implicit.finite import NotFiniteError, all_finite
from auxfast.solvers import SolverState


class MetaOptimizer:
    """Steps a torch optimizer of the outer parameters along their hypergradient.

    Args:
        meta_optimizer: the torch optimizer, which holds the outer parameters.
        hpo_lr, truncate_iter, scale: see `Hypergrad`, which is there as `hypergrad`.
        max_grad_norm: a larger total norm of the hypergradients is scaled down to it for the step; `None`: none is.
    """

    def __init__(
        self,
        meta_optimizer: torch.optim.Optimizer,
        hpo_lr: float,
        truncate_iter: int = 3,
        max_grad_norm: float | None = 10,
        scale: Scale = "auxilearn",
    ) -> None:
        self.meta_optimizer = meta_optimizer
        self.hypergrad = Hypergrad(hpo_lr, truncate_iter, scale)
        self.max_grad_norm = max_grad_norm
        self._state = SolverState()  # remembers the warning

    def step(
        self,
        train_loss: Tensor,
        val_loss: Tensor,
        parameters: Iterable[Tensor] | Tensor,
        aux_params: Iterable[Tensor] | Tensor,
        return_grads: bool = False,
    ) -> list[Tensor] | None:
        """One update of the outer parameters `aux_params`; `train_loss`, `val_loss` and `parameters` are `loss_train`,
        `loss_val` and `params` of `Hypergrad.grad`, and go by these names in its errors.

        Where the hypergradient is not finite, parameters and momentum stay as they are, and a RuntimeWarning says so
        once.

        Returns:
            The hypergradients before clipping, with `return_grads`.
        """
        outer = listed("aux_params", aux_params)
        for group in self.meta_optimizer.param_groups:  # zero_grad() profiles itself, 4% of a small step
            for param in group["params"]:
                param.grad = None
        try:
            grads = self.hypergrad.grad(val_loss, train_loss, outer, parameters)
        except NotFiniteError:  # scale="exact" raises it
            grads = [torch.full_like(param, torch.nan) for param in outer]
        unclipped = [grad.clone() for grad in grads] if return_grads else None
        if all_finite(grads):
            for param, grad in zip(outer, self._clipped(grads), strict=True):
                if param.requires_grad:
                    param.grad = grad
            self.meta_optimizer.step()
        else:
            text = "A step of MetaOptimizer was skipped: the hypergradient holds NaN or inf"
            warn_once("skipped", text, self._state)
        return unclipped

    def _clipped(self, grads: list[Tensor]) -> list[Tensor]:
        """The result of `torch.nn.utils.clip_grad_norm_`, whose eight small operations take 3% of a small step."""
        scale = 1.0
        if self.max_grad_norm is not None:
            norms = [norm.item() for norm in torch._foreach_norm(grads)]
            scale = self.max_grad_norm / (math.sqrt(sum(norm * norm for norm in norms)) + 1e-6)
        return grads if scale >= 1 else [grad * scale for grad in grads]

    def zero_grad(self) -> None:
        self.meta_optimizer.zero_grad()
