"""Products with the transposed Jacobian of a function that need be no gradient, from its recorded graph."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from auxfast.autograd.engine import vjp, zeros_for_none
from auxfast.autograd.pullback import Pullback
from auxfast.implicit.curvature import slope


class TransposedJacobian:
    """`J^T` with `J = d outputs / d params`, a square matrix, as the operator of an adjoint problem: every product is
    one backward pass through the graph of `outputs`.

    Args:
        outputs: tensors with a graph, of the shapes of `params`.
        params: tensors that they are differentiated in.

    Attributes:
        symmetric, transposed: see `auxfast.solvers.LinearOperator`.
    """

    symmetric = False

    def __init__(self, outputs: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        self.outputs = list(outputs)
        self.params = list(params)
        self.in_system = [True] * len(self.params)
        self._pullback = Pullback(self.outputs, self.params)

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return zeros_for_none(self._pullback(vectors), vectors)

    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return zeros_for_none(self._pullback.batched(vectors), vectors)

    def slope(self, vectors: Sequence[Tensor]) -> Tensor:
        """`<v, outputs>`."""
        return slope(vectors, self.outputs)

    @cached_property
    def transposed(self) -> _Jacobian:
        """J."""
        return _Jacobian(self.outputs, self.params)

    def mixed(self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradient of `<v, outputs>` in each of `outer_params`; `None` where there is no dependence."""
        return list(vjp(self.outputs, outer_params, vectors))


class _Jacobian:
    """Products `J v`, by double backward through a cotangent: `J^T c` is linear in c, and J is its transposed."""

    symmetric = False

    def __init__(self, outputs: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        cotangents = [torch.zeros_like(output, requires_grad=True) for output in outputs]
        with torch.enable_grad():
            pulled = vjp(outputs, params, cotangents, create_graph=True)
        self._reaches = [grad is not None and grad.requires_grad for grad in pulled]
        self._pullback = Pullback([grad for grad in pulled if grad is not None and grad.requires_grad], cotangents)

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return zeros_for_none(self._pullback(self._chosen(vectors)), vectors)

    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return zeros_for_none(self._pullback.batched(self._chosen(vectors)), vectors)

    def _chosen(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return [vector for vector, reached in zip(vectors, self._reaches, strict=True) if reached]
