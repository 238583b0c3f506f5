"""The ranks (processes) that share a call: each has a part of the data, and all get the same numbers."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, distributed

from auxfast.implicit.central_difference import norms_of
from auxfast.solvers.space import LOCAL, Floats, VectorSpace

ProcessGroup = Any
"""A `torch.distributed.ProcessGroup`, a name that not every build of torch has."""

_SAME = 1e-5
"""Relative distance up to which norms of the same parameters on different ranks may be rounding."""


class Ranks:
    """Collectives over a process group, on flat buffers. Every rank must make the same calls in the same order.

    Args:
        group: of two ranks or more.
        device: of the inner parameters, where numbers are exchanged.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self.size, self.rank = distributed.get_world_size(group), distributed.get_rank(group)

    def sum(self, terms: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
        """The sums over ranks, by one all-reduce of the widest of the dtypes, float32 at least.

        Args:
            terms: this rank's; `None` is 0.
            like: tensors of the shapes and dtypes of the sums, the same on all ranks.
        """
        if not like:
            return []
        flat = self._flat(terms, like)
        self._all_reduce(flat)
        pieces = flat.split([tensor.numel() for tensor in like])
        return [piece.view(tensor.shape).to(tensor.dtype) for piece, tensor in zip(pieces, like, strict=True)]

    def sum_where_any(self, terms: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """The same, with `None` where all ranks have `None`. It waits for the device."""
        if not like:
            return []
        flags = like[0].new_tensor([float(term is not None) for term in terms])
        *sums, counts = self.sum([*terms, flags], [*like, flags])
        return [total if count else None for total, count in zip(sums, counts.tolist(), strict=True)]

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether some rank has it."""
        return [any(column) for column in zip(*self.gather([*map(float, flags)]), strict=True)]

    def total(self, number: float) -> float:
        """The sum over ranks."""
        return sum(row[0] for row in self.gather([number]))

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of each rank, as many on each."""
        own = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(rows, own, group=self._group)
        gathered: list[list[float]] = torch.stack(rows).tolist()
        return gathered

    def of_first(self, numbers: Tensor) -> Tensor:
        """Those of the first rank, in place: what is decided from them is decided alike."""
        distributed.broadcast(numbers, group=self._group, group_src=0)
        return numbers

    def check_same(self, facts: Mapping[str, str], params: Mapping[str, Sequence[Tensor]]) -> None:
        """Raises ValueError, on all ranks, where they differ in one of the facts, which have the names of arguments, or in
        the values of parameters."""
        named = {**facts, **{name: _description(tensors) for name, tensors in params.items()}}
        norms = [sum(norms_of(tensors)) for tensors in params.values()]
        rows = self.gather([*(float(zlib.crc32(text.encode())) for text in named.values()), *norms])
        for i, name in enumerate(named):
            if len({row[i] for row in rows}) > 1:
                texts: list[Any] = [None] * self.size
                distributed.all_gather_object(texts, named[name], group=self._group)
                other = next(k for k, text in enumerate(texts) if text != texts[0])
                raise ValueError(
                    f"{name} must be the same on all ranks: on rank 0 of process_group: {texts[0]}; on rank {other}: "
                    f"{texts[other]}"
                )
        for i, name in enumerate(params, len(named)):
            column = [row[i] for row in rows]
            if max(column) - min(column) > _SAME * max(map(abs, column)):
                other = max(range(self.size), key=[abs(norm - column[0]) for norm in column].__getitem__)
                raise ValueError(
                    f"{name} must have the same values on all ranks, but those of rank 0 and rank {other} of "
                    "process_group differ: broadcast them from one rank before training, as DistributedDataParallel "
                    "does, and make the same updates on all"
                )

    def _flat(self, terms: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
        dtype = reduce(torch.promote_types, {tensor.dtype for tensor in like}, torch.float32)
        parts = [
            torch.zeros(tensor.numel(), dtype=dtype, device=tensor.device)
            if term is None
            else term.detach().reshape(-1).to(dtype)
            for term, tensor in zip(terms, like, strict=True)
        ]
        return torch.cat(parts)

    def _all_reduce(self, flat: Tensor) -> None:
        distributed.all_reduce(flat, group=self._group)


class Replicated(VectorSpace):
    """Every rank holds all of each vector. Their numbers are the same as far as the machines round alike; decisions
    are made from those of the first rank."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def read(self, numbers: Tensor) -> Floats:
        return LOCAL.read(self._ranks.of_first(numbers.contiguous()))

    def all(self, flag: bool) -> bool:
        return not self._ranks.any([not flag])[0]


def ranks_of(process_group: ProcessGroup | None, device: torch.device) -> Ranks | None:
    """`None` for no group, and for one of a single rank.

    Raises:
        TypeError: it is none. ValueError: this process does not belong to it.
    """
    if process_group is None:
        return None
    if not (distributed.is_available() and isinstance(process_group, distributed.ProcessGroup)):
        kind = type(process_group).__name__
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup, such as torch.distributed.group.WORLD, not {kind}"
        )
    if distributed.get_rank(process_group) < 0:
        raise ValueError("process_group must be one that this process belongs to")
    return Ranks(process_group, device) if distributed.get_world_size(process_group) > 1 else None


def _description(tensors: Sequence[Tensor]) -> str:
    kinds = [f"{t.dtype} {tuple(t.shape)}{'' if t.requires_grad else ' (frozen)'}" for t in tensors]
    return f"{len(kinds)} tensors, {', '.join(kinds)}"
