"""A loss that takes the next batch of data whenever it is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from auxfast.implicit.micro_batches import check_batches

_END = object()


class FreshBatches:
    """The loss of the next batch, as `inner_loss`: every product takes another one, with new dropout masks.

        inner = auxfast.FreshBatches(lambda batch: criterion(net(batch[0]), batch[1]), loader)
        auxfast.hypergradient(outer_loss, inner, net.parameters(), outer_params, solver=Neumann(20, 0.1, certify=False))

    The terms of the Neumann series, each with a Hessian of its own batch, are right on average if batches are drawn
    independently, and so is the mixed product, which takes the batch after them: the stochastic hypergradient of
    stocBiO (Ji et al. 2021). The batches of an epoch without replacement are nearly independent where they are many. A
    product costs one batch, where `MicroBatches` takes all. Other solvers, which need the same matrix in every product,
    are refused. There is no certificate: `stats.residual` is NaN.

    As `outer_loss` it is the next batch's loss, once a hypergradient.

    Args:
        loss_of_batch: see `MicroBatches`.
        batches: an iterable of batches, such as a DataLoader, which is begun again where it ends; or an iterator, which
            must not end. Keep the object from call to call, to go on where the last one was. What the loader draws with
            torch's CPU generator (the order of samples, augmentations) comes from a stream of its own, which is seeded
            from the generator here: hypergradients put torch's random states back.

    Raises:
        TypeError: `loss_of_batch` is not a function, or `batches` is not iterable.
        ValueError: there is no batch (left); when the loss is computed.
    """

    def __init__(self, loss_of_batch: Callable[[Any], Any], batches: Iterable[Any]) -> None:
        check_batches(loss_of_batch, batches)
        self._loss_of_batch = loss_of_batch
        self._batches = batches
        self._iterator: Iterator[Any] | None = batches if isinstance(batches, Iterator) else None
        seed = int(torch.randint(2**62, ()))
        self._random = torch.Generator().manual_seed(seed).get_state()

    def __call__(self) -> Any:
        return self._loss_of_batch(self._next())

    def _next(self) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random)
            try:
                return self._next_or_first()
            finally:
                self._random = torch.get_rng_state()

    def _next_or_first(self) -> Any:
        if self._iterator is not None and (batch := next(self._iterator, _END)) is not _END:
            return batch
        if self._iterator is self._batches:
            raise ValueError(
                "batches of FreshBatches has no batch left, for it is an iterator: pass the loader itself, which is "
                "begun again where it ends"
            )
        self._iterator = iter(self._batches)
        if (batch := next(self._iterator, _END)) is _END:
            raise ValueError("batches of FreshBatches is empty: there is no batch to take")
        return batch
