"""Batches of data as losses: the mean over all of them, in the memory of one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

from torch import Tensor

from auxfast.implicit.arguments import shares_of

Weighted = tuple[float, Callable[[], Any]]


class MicroBatches(Sequence[Weighted]):
    """The mean of a loss over batches of data, as `outer_loss` or `inner_loss`: a list of `(weight, function)` pairs.

        inner = auxfast.MicroBatches(lambda batch: criterion(net(batch[0]), batch[1]), loader)
        auxfast.hypergradient(outer_loss, inner, net.parameters(), outer_params)

    Each batch's loss is evaluated anew for every product, so that one graph is in memory at a time. Products must all
    be with the same matrix, so the batches must be the same each time. A sequence (something with `len` and an index,
    such as a list) is indexed again for every product, and must return the same then. All else is read once, here, and
    its batches are kept: a DataLoader would shuffle and augment anew, and an iterator has them only once. Take a part
    of an endless one with `itertools.islice`. Let `loss_of_batch` move the batch to the device: what is kept then stays
    where the loader has put it.

    Args:
        loss_of_batch: from a batch to the mean of its samples' losses; for Gauss-Newton products of the inner loss, to
            `(loss, outputs)`.
        batches: a sequence, a DataLoader, an iterator of one, or any other iterable.
        weights: one number of at least 0 for each batch, whose mean they make; a batch of weight 0 is left out. `None`:
            the numbers of samples, by the first axis of the first tensor in each batch, in tuples, lists and dicts too.
            A short last batch then counts for its samples, and the mean is that of one large batch.

    Raises:
        TypeError: `loss_of_batch` is not a function, `batches` is not iterable, or weights are no numbers.
        ValueError: there is no batch; weights of another number, negative, not finite or all 0; or `weights=None` where
            a batch holds no tensor with an axis.
    """

    def __init__(
        self,
        loss_of_batch: Callable[[Any], Any],
        batches: Iterable[Any],
        weights: Iterable[float] | Tensor | None = None,
    ) -> None:
        check_batches(loss_of_batch, batches)
        given: Any = batches
        kept = given if _is_sequence(given) else list(given)
        if not len(kept):
            raise ValueError("batches is empty (an iterator that was used up before also is): pass the loader itself")
        if weights is None:
            weights = [_samples(kept[i], i) for i in range(len(kept))]
        numbers: Any = weights.tolist() if isinstance(weights, Tensor) else weights
        if not isinstance(numbers, Iterable):
            raise TypeError(f"weights must be a list of one number for each batch, not {weights!r:.60}")
        self._weights = list(numbers)
        if len(self._weights) != len(kept):
            raise ValueError(f"weights must be one for each of the {len(kept)} batches, not {len(self._weights)}")
        shares_of("weights", self._weights)
        self._loss_of_batch = loss_of_batch
        self._batches = kept

    def __len__(self) -> int:
        return len(self._weights)

    @overload
    def __getitem__(self, index: int) -> Weighted: ...

    @overload
    def __getitem__(self, index: slice) -> list[Weighted]: ...

    def __getitem__(self, index: int | slice) -> Weighted | list[Weighted]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        weight, i = self._weights[index], range(len(self))[index]
        return weight, lambda: self._loss_of_batch(self._batches[i])


def check_batches(loss_of_batch: Any, batches: Any) -> None:
    """Raises TypeError where `loss_of_batch` is not a function or `batches` cannot be iterated."""
    if not callable(loss_of_batch):
        raise TypeError(f"loss_of_batch must be a function of a batch, not a {type(loss_of_batch).__name__}")
    if isinstance(batches, (Tensor, Mapping, str)) or not (isinstance(batches, Iterable) or _is_sequence(batches)):
        hint = ": pass a list of batches, such as its split()" if isinstance(batches, Tensor) else ""
        raise TypeError(
            f"batches must be a list, a DataLoader or another iterable of batches, not a {type(batches).__name__}{hint}"
        )


def _is_sequence(batches: Any) -> bool:
    return hasattr(batches, "__getitem__") and hasattr(batches, "__len__")


def _samples(batch: Any, index: int) -> int:
    for tensor in _tensors(batch):
        if tensor.dim():
            return len(tensor)
    raise ValueError(
        f"weights must be given, since batch {index}, a {type(batch).__name__}, holds no tensor with an axis of samples"
    )


def _tensors(batch: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts, in their order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for item in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(item)
