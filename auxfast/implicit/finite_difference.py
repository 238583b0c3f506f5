"""Products with second derivatives by differences of gradients, for networks with operators that have no others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import compress

import torch
from torch import Tensor

from auxfast.implicit.curvature import one_by_one
from auxfast.implicit.losses import LossFn, check_connected, mean_gradient


class FiniteDifference:
    """`H v` as a central difference of gradients, `(g(W + h v) - g(W - h v)) / 2h`, and the mixed product likewise.

    Only first derivatives are taken. The step `h` moves the parameters by `eps^(1/3) (1 + ||W||)` in norm, with the
    machine precision `eps` of their dtype: there the errors of truncation, about `h^2`, and of rounding, about
    `eps / h`, balance, at a relative error of the order of `eps^(2/3)` (2e-5 in float32, 4e-11 in float64) times what
    the third derivatives make of it. Parameters whose natural scale is far below 1 should be rescaled. They are moved
    in place and have their old bits back after each product.

    Args:
        loss_fns: functions that compute the loss of each micro-batch, the same at each call.
        params: tensors that it is differentiated in. Those that the gradient does not depend on are left out, which is
            seen by moving all along a random direction.

    Raises:
        ValueError: the loss depends on none of `params`.
    """

    def __init__(self, loss_fns: Sequence[LossFn], params: Sequence[Tensor]) -> None:
        self._loss_fns = loss_fns
        before = mean_gradient(loss_fns, params)
        check_connected("inner_loss", before)
        used = [grad is not None for grad in before]
        self.params = list(compress(params, used))
        self._distance = torch.finfo(params[0].dtype).eps ** (1 / 3) * (1 + _norm(self.params))
        direction = [torch.randn_like(w) for w in self.params]
        with self._moved(direction, self._distance / _norm(direction)):
            after = mean_gradient(loss_fns, params)
        self.in_system = [
            a is not None and b is not None and not torch.equal(a, b) for a, b in zip(before, after, strict=True)
        ]
        self.params = list(compress(params, self.in_system))

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        products = self._difference(vectors, self.params)
        return [torch.zeros_like(v) if p is None else p for p, v in zip(products, vectors, strict=True)]

    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return one_by_one(self, vectors)

    def mixed(self, vectors: Sequence[Tensor], outer_params: Sequence[Tensor]) -> list[Tensor | None]:
        return self._difference(vectors, outer_params)

    def _difference(self, vectors: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[Tensor | None]:
        """Derivative along `vectors` of the gradient in `wanted`."""
        norm = _norm(vectors)
        if norm == 0 or not wanted:
            return [None] * len(wanted)
        step = self._distance / norm
        with self._moved(vectors, step):
            ahead = mean_gradient(self._loss_fns, wanted)
        with self._moved(vectors, -step):
            behind = mean_gradient(self._loss_fns, wanted)
        return [None if a is None or b is None else (a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]

    @contextmanager
    def _moved(self, vectors: Sequence[Tensor], step: float) -> Iterator[None]:
        """Moves the parameters to `params + step * vectors`, through `.data`, so that graphs that the user made before
        stay valid, and back."""
        data = [w.data for w in self.params]
        saved = [tensor.clone() for tensor in data]
        try:
            torch._foreach_add_(data, list(vectors), alpha=step)
            yield
        finally:
            torch._foreach_copy_(data, saved)


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm([t.detach().double() for t in tensors]))
