"""Products with the second derivatives of the inner loss, reverse over reverse from one retained graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Curvature:
    """`H v` and `v^T d grad / d phi` for `grad`, the gradient of the inner loss in some parameters `W`.

    The graph of `grad` is recorded once, by the caller (`torch.autograd.grad` with `create_graph=True`), and
    every product is one backward pass through it.

    Args:
        grads: the gradient in each parameter; all of them have a graph.
        params: those parameters, in the same order and of the same shapes.
    """

    def __init__(self, grads: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        self.grads = list(grads)
        self.params = list(params)

    def matvec(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """`H v`: like `vectors`, one tensor per parameter; zeros where no gradient depends on it."""
        return list(
            torch.autograd.grad(
                self.grads, self.params, vectors, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        )

    def mixed(
        self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor], retain_graph: bool
    ) -> list[Tensor | None]:
        """`sum of <vector, d grad / d phi>` for each `phi` in `outer_params`, of its shape; `None` where no
        gradient depends on it."""
        if not outer_params:
            return []
        return list(
            torch.autograd.grad(self.grads, outer_params, vectors, retain_graph=retain_graph, allow_unused=True)
        )
