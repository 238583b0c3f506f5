"""The hypergradient with the interface and the scale of `auxilearn.implicit_diff`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress
from typing import Literal, get_args

import torch
from torch import Tensor

from auxfast.autograd.engine import spread, vjp, zeros_for_none
from auxfast.implicit import hypergradient
from auxfast.implicit.arguments import as_tuple
from auxfast.implicit.curvature import Hessian
from auxfast.implicit.losses import LossGraph
from auxfast.solvers import Identity, Neumann, Solver
from auxfast.solvers.base import SolverState

Scale = Literal["auxilearn", "exact"]
_SCALES = get_args(Scale)


class Hypergrad:
    """Hypergradients by a truncated Neumann series (the paper's Algorithm 2).

    Args:
        learning_rate: the paper's alpha; it scales the Hessian in the series.
        truncate_iter: Hessian-vector products, the paper's J; the series has J + 1 terms.
        scale: "auxilearn": the sum of the terms as it is, as in Algorithm 2, which tends to 1 / alpha times the
            hypergradient for many terms; the direct gradient of `loss_val` is left out. "exact": with the factor alpha
            and the direct gradient, as `auxfast.hypergradient` has them, and with its warnings.

    All three may be changed between calls. That `loss_train` has second derivatives (a Function of yours may drop out
    of the graph without a word) is checked in the first call only.

    Raises:
        ValueError: a negative `truncate_iter`, or an unknown `scale`.
    """

    def __init__(self, learning_rate: float = 0.1, truncate_iter: int = 3, scale: Scale = "auxilearn") -> None:
        self.learning_rate = learning_rate
        self.truncate_iter = truncate_iter
        self.scale: Scale = scale
        self._state = SolverState()  # it holds which warnings were given
        self._has_second_derivatives = False  # whether that was seen of a loss_train
        self._check()

    def grad(
        self,
        loss_val: Tensor,
        loss_train: Tensor,
        aux_params: Iterable[Tensor] | Tensor,
        params: Iterable[Tensor] | Tensor,
    ) -> list[Tensor]:
        """The hypergradient of `loss_val` in each of `aux_params`; zeros for one that plays no part.

        Args:
            loss_val: the outer loss, a scalar; its graph is kept.
            loss_train: the inner loss, a scalar that depends on both; its graph may be spent.
            aux_params: the outer parameters.
            params: the inner parameters; those that a loss does not use count as 0 in its gradient. Any iterables,
                generators included.

        Raises:
            TypeError, ValueError, RuntimeError: as `auxfast.hypergradient`.
        """
        self._check()
        outer, inner = listed("aux_params", aux_params), listed("params", params)
        if self.scale == "exact":
            solver: Solver = Identity(self.learning_rate)
            if self.truncate_iter:
                solver = Neumann(self.truncate_iter, self.learning_rate, certify=False)
            losses = loss_val, loss_train
            return list(hypergradient(*losses, inner, outer, solver=solver, state=self._state, retain_graph=True).grads)
        active = [phi for phi in outer if phi.requires_grad]
        grads = self._sum_of_terms(loss_val, loss_train, active, [w for w in inner if w.requires_grad])
        return zeros_for_none(spread(grads, [phi.requires_grad for phi in outer]), outer)

    def _sum_of_terms(
        self, loss_val: Tensor, loss_train: Tensor, outer: Sequence[Tensor], inner: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Algorithm 2, for parameters that all require gradients; `None` for those that play no part."""
        val_grads = _gradient("loss_val", loss_val, inner)
        train_grads = _gradient("loss_train", loss_train, inner, create_graph=True)
        in_system = [grad is not None and grad.requires_grad for grad in train_grads]
        w = list(compress(inner, in_system))
        grads = [grad for grad in train_grads if grad is not None and grad.requires_grad]
        b = zeros_for_none(compress(val_grads, in_system), w)
        if not grads or not outer:
            return [None] * len(outer)
        if not self._has_second_derivatives:
            Hessian(LossGraph("loss_train", loss_train), w, retain_graph=True)(b)  # its errors say what to do
            self._has_second_derivatives = True
        p = [t.clone() for t in b]
        for _ in range(self.truncate_iter):  # Horner's scheme for the same sum: p <- b + (1 - alpha H) p
            torch._foreach_add_(p, zeros_for_none(vjp(grads, w, p), w), alpha=-self.learning_rate)
            torch._foreach_add_(p, b)
        return [grad if grad is None else -grad for grad in vjp(grads, outer, p)]

    def _check(self) -> None:
        if self.truncate_iter < 0:
            raise ValueError(f"truncate_iter must be at least 0, got {self.truncate_iter}")
        if self.scale not in _SCALES:
            raise ValueError(f"scale must be one of {', '.join(_SCALES)}, got {self.scale!r}")


def listed(name: str, params: Iterable[Tensor] | Tensor) -> tuple[Tensor, ...]:
    """A tensor stands for itself. Raises TypeError or ValueError for what is no iterable of tensors, or empty."""
    return as_tuple(name, (params,) if isinstance(params, Tensor) else params)


def _gradient(name: str, loss: Tensor, params: Sequence[Tensor], create_graph: bool = False) -> list[Tensor | None]:
    grads = LossGraph(name, loss).gradient(params, retain_graph=True, create_graph=create_graph)
    if all(grad is None for grad in grads):
        raise ValueError(
            f"{name} depends on none of params: were they replaced since it was computed, or do all have "
            "requires_grad=False?"
        )
    return grads
