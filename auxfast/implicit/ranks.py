"""The ranks (processes) that share a call: each has a part of the data, and all get the same numbers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from auxfast.implicit.central_difference import norms_of
from auxfast.solvers.space import LOCAL, Floats, VectorSpace

ProcessGroup = Any
"""A `torch.distributed.ProcessGroup`, a name that not every build of torch has."""

Result = TypeVar("Result")

_SAME = 1e-5
"""Relative distance up to which norms of the same parameters on different ranks may be rounding."""


class Ranks:
    """Collectives over a process group, on flat buffers. Every rank must make the same calls in the same order.

    What one rank computes alone may raise on that rank alone, which must not leave while others wait for it. So it
    computes within `attempt`, goes on with NaN in its place in all sums, which soon ends every solver, and all ranks
    raise where `together` ends.

    Args:
        group: of two ranks or more.
        device: of the inner parameters.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self._group = group
        # What is exchanged beside sums are numbers on the host; NCCL takes those of its devices alone.
        self._device = torch.device("cpu") if distributed.get_backend(group) == "gloo" else device
        self._failure: Exception | None = None
        self._is_broken = False  # whether a collective has raised, after which none may follow
        self.size, self.rank = distributed.get_world_size(group), distributed.get_rank(group)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raises at the end what this rank has raised, or a RuntimeError with what another has. What an `attempt` has
        raised goes before what has come of it. Where a rank raises outside of `attempt`, the others have to come to the
        end too: those that wait for it in another collective do so until the time-out of the group."""
        self._failure = None
        try:
            yield
        except Exception as error:
            if not self._is_broken:
                self._raise_first(error)
            raise
        self._raise_first(None)

    def _raise_first(self, error: Exception | None) -> None:
        failure, self._failure = self._failure, None
        own = error if failure is None else failure
        try:
            # 2 goes before 1, which goes before 0: nothing was raised.
            grades = [row[0] for row in self.gather([0.0 if own is None else 1.0 if failure is None else 2.0])]
            first = grades.index(max(grades))
            if not grades[first]:
                return
            texts = self.texts("" if own is None else f"{type(own).__name__}: {own}")
            if own is not None and grades[self.rank] == grades[first]:
                raise own
            raise RuntimeError(
                f"Rank {first} of process_group has raised, and this one stops with it: {texts[first]}"
            ) from None
        finally:
            del failure, error, own  # their tracebacks hold graphs, and some of them this frame

    @property
    def has_failed(self) -> bool:
        """Whether an `attempt` on this rank has raised: what it adds to sums is then NaN."""
        return self._failure is not None

    def attempt(self, compute: Callable[[], Result], otherwise: Result) -> Result:
        """What `compute` returns; `otherwise` where it raises, or something before it in the same call has."""
        if self._failure is not None:
            return otherwise
        try:
            return compute()
        except Exception as error:
            self._failure = error
            return otherwise

    def sum(self, terms: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
        """The sums over ranks, by one all-reduce of the widest of the dtypes, float32 at least.

        Args:
            terms: this rank's; `None` is 0.
            like: tensors of the shapes and dtypes of the sums, the same on all ranks.
        """
        if not like:
            return []
        flat = self._flat(terms, like)
        if self.has_failed:
            flat.fill_(torch.nan)
        self.collective(distributed.all_reduce, flat)
        pieces = flat.split([tensor.numel() for tensor in like])
        return [piece.view(tensor.shape).to(tensor.dtype) for piece, tensor in zip(pieces, like, strict=True)]

    def sum_where_any(self, terms: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """The sums as `sum` has them, with `None` where all ranks have `None`. It waits for the device."""
        if not like:
            return []
        flags = like[0].new_tensor([float(term is not None) for term in terms])
        *sums, counts = self.sum([*terms, flags], [*like, flags])
        return [total if count else None for total, count in zip(sums, counts.tolist(), strict=True)]

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Flags of all ranks together: each says whether some rank has it."""
        return [any(column) for column in zip(*self.gather([*map(float, flags)]), strict=True)]

    def any_rank(self, flag: bool) -> bool:
        """Whether some rank has the flag."""
        return self.any([flag])[0]

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """The sum of each of the numbers over ranks."""
        return [sum(column) for column in zip(*self.gather(numbers), strict=True)]

    def texts(self, text: str) -> list[str]:
        """The text of each rank."""
        found: list[Any] = [None] * self.size
        self.collective(distributed.all_gather_object, found, text)
        return found

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of each rank, as many on each."""
        own = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        self.collective(distributed.all_gather, rows, own)
        gathered: list[list[float]] = torch.stack(rows).tolist()
        return gathered

    def of_first(self, numbers: Tensor) -> Tensor:
        """The numbers of the first rank, in place: what is decided from them is decided alike."""
        self.collective(distributed.broadcast, numbers, group_src=0)
        return numbers

    def check_same(self, facts: Mapping[str, str], params: Mapping[str, Sequence[Tensor]]) -> None:
        """Raises ValueError, on all ranks, where they differ in one of the facts, which have the names of arguments, or
        in the values of parameters."""
        named = {**facts, **{name: _description(tensors) for name, tensors in params.items()}}
        norms = [sum(norms_of(tensors)) for tensors in params.values()]
        rows = self.gather([*(float(zlib.crc32(text.encode())) for text in named.values()), *norms])
        for i, name in enumerate(named):
            if len({row[i] for row in rows}) > 1:
                texts = self.texts(named[name])
                other = next(k for k, text in enumerate(texts) if text != texts[0])
                raise ValueError(
                    f"{name} must be the same on all ranks: on rank 0 of process_group: {texts[0]}; on rank {other}: "
                    f"{texts[other]}"
                )
        for i, name in enumerate(params, len(named)):
            unlike = _unlike([row[i] for row in rows])
            if unlike is not None:
                raise ValueError(
                    f"{name} must have the same values on all ranks, but those of rank 0 and rank {unlike} of "
                    "process_group differ: broadcast them from one rank before training, as DistributedDataParallel "
                    "does, and make the same updates on all"
                )

    def check_same_solution(self, solution: Sequence[Tensor]) -> None:
        """Raises RuntimeError, on all ranks, where they have found different solutions."""
        for column in zip(*self.gather(norms_of(solution)), strict=True):
            other = _unlike(column)
            if other is not None:
                raise RuntimeError(
                    f"The solutions of rank 0 and rank {other} of process_group differ. Does the solver read an "
                    "optimizer (SAMA, FromOptimizer) whose state, or whose gradients, are not the same on all ranks? "
                    "If not, the machines round differently."
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

    def collective(self, call: Callable[..., Any], *args: Any, **settings: Any) -> None:
        """One of the group, or of the `group` in `settings`. None may follow it where it raises."""
        try:
            call(*args, **{"group": self._group, **settings})
        except Exception:
            self._is_broken = True
            raise


class Replicated(VectorSpace):
    """Every rank holds all of each vector. Their numbers are the same as far as the machines round alike; decisions
    are made from those of the first rank."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def read(self, numbers: Tensor) -> Floats:
        return LOCAL.read(self._ranks.of_first(numbers.contiguous()))

    def all(self, flag: bool) -> bool:
        return not self._ranks.any_rank(not flag)


def together(ranks: Ranks | None) -> AbstractContextManager[None]:
    """See `Ranks.together`; one process needs no such care."""
    return nullcontext() if ranks is None else ranks.together()


def attempt(ranks: Ranks | None, compute: Callable[[], Result], otherwise: Result) -> Result:
    """See `Ranks.attempt`; one process raises at once."""
    return compute() if ranks is None else ranks.attempt(compute, otherwise)


def ranks_of(process_group: ProcessGroup | None, device: torch.device) -> Ranks | None:
    """The ranks of a process group; `None` for no group, and for one of a single rank.

    Raises:
        TypeError: it is no process group. ValueError: this process does not belong to it.
    """
    if process_group is None:
        return None
    check_group(process_group)
    return Ranks(process_group, device) if distributed.get_world_size(process_group) > 1 else None


def check_group(process_group: ProcessGroup) -> None:
    """Raises as `ranks_of` does."""
    if not distributed.is_available():
        raise TypeError("process_group must be None: this torch has no torch.distributed")
    if process_group is distributed.GroupMember.NON_GROUP_MEMBER:  # what new_group() returns to the other processes
        raise ValueError("process_group must be one that this process belongs to")
    if not isinstance(process_group, distributed.ProcessGroup):
        kind = type(process_group).__name__
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup, such as torch.distributed.group.WORLD, not {kind}"
        )


def _unlike(norms: Sequence[float]) -> int | None:
    """The rank whose norm differs most from that of the first, if that is more than rounding."""
    if not max(norms) - min(norms) > _SAME * max(map(abs, norms)):
        return None
    return max(range(len(norms)), key=[abs(norm - norms[0]) for norm in norms].__getitem__)


def _description(tensors: Sequence[Tensor]) -> str:
    kinds = [f"{t.dtype} {tuple(t.shape)}{'' if t.requires_grad else ' (frozen)'}" for t in tensors]
    return f"{len(kinds)} tensors, {', '.join(kinds)}"
