"""Parameters that `fully_shard` (FSDP2) has cut into pieces, one for each rank: whole within a call, where losses are
differentiated, and in pieces where the linear system is solved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from itertools import compress
from typing import Any

import torch
from torch import Tensor, distributed, nn

from auxfast.autograd.fsdp import as_plain_modules, modules_of_fully_shard
from auxfast.implicit.distributed import is_distributed
from auxfast.implicit.ranks import ProcessGroup, Ranks, check_group
from auxfast.solvers.space import LOCAL, Floats, VectorSpace


@dataclass(frozen=True)
class _Cut:
    """How a parameter is cut.

    Attributes:
        shape: that of the whole.
        axis: along which it is cut.
        sizes: of the pieces along the axis, by rank.
    """

    shape: torch.Size
    axis: int
    sizes: tuple[int, ...]

    def piece(self, rank: int) -> torch.Size:
        return torch.Size((*self.shape[: self.axis], self.sizes[rank], *self.shape[self.axis + 1 :]))


@dataclass(frozen=True)
class Shards:
    """Parameters in pieces, and collectives that join vectors like them and cut sums of them. Every rank must make the
    same calls in the same order.

    Attributes:
        params: the parameters as they were given, DTensors.
        ranks: all that have pieces.
        cuts: one for each of `params`.
        group: the ranks that have the other pieces of what this one has a piece of.
        replicas: those that have the same piece (a mesh of two axes, HSDP); `None`: no other.
        owners: a module and a name for each of `params`.
        modules: of `fully_shard`, those with these parameters and all that belong to the same networks, in the same
            order on all ranks.
    """

    params: Sequence[Tensor]
    ranks: Ranks
    cuts: Sequence[_Cut]
    group: ProcessGroup
    replicas: ProcessGroup | None
    owners: Sequence[tuple[nn.Module, str]]
    modules: Sequence[Any]

    @property
    def piece(self) -> int:
        """The number of the pieces that this rank has."""
        return distributed.get_rank(self.group)

    @property
    def space(self) -> Sharded:
        return Sharded(self)

    def only(self, chosen: Sequence[bool]) -> Shards:
        """The shards of some of the parameters."""
        return replace(
            self,
            params=list(compress(self.params, chosen)),
            cuts=list(compress(self.cuts, chosen)),
            owners=list(compress(self.owners, chosen)),
        )

    @contextmanager
    def whole_params(self) -> Iterator[list[Tensor]]:
        """The parameters whole, as leaves that the losses depend on while this is active.

        Raises:
            NotImplementedError: they are of another dtype than the pieces (a MixedPrecisionPolicy), or still DTensors
                (tensor parallelism beside FSDP).
        """
        with as_plain_modules(self.modules):
            whole: list[Tensor] = [getattr(module, name) for module, name in self.owners]
            for i, (param, given) in enumerate(zip(whole, self.params, strict=True)):
                if is_distributed(param):
                    raise NotImplementedError(
                        f"inner_params[{i}] is cut by tensor parallelism beside fully_shard: hypergradients take "
                        "parameters of fully_shard alone"
                    )
                if param.dtype != given.dtype:
                    raise NotImplementedError(
                        f"inner_params[{i}] is {given.dtype}, and {param.dtype} in forward passes, by the "
                        "MixedPrecisionPolicy of fully_shard: leave out its param_dtype, and compute the losses within "
                        "torch.autocast"
                    )
            yield whole

    def join(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Vectors like the parameters, from this rank's pieces of them and those of the others, by one all-gather. Each
        tensor may have one more axis in front."""
        if not pieces:
            return []
        lead = pieces[0].shape[: pieces[0].dim() - len(self.cuts[0].shape)]
        own = torch.cat([piece.reshape(*lead, -1) for piece in pieces], dim=-1)
        most = max(map(self._numel, range(self._size)))
        own = torch.nn.functional.pad(own, (0, most - own.shape[-1]))  # collectives take pieces of one size
        rows = own.new_empty(self._size, *own.shape)
        gather = _function("all_gather_single", "all_gather_into_tensor")
        self.ranks.collective(gather, rows.view(-1), own.view(-1), group=self.group)
        parts = [
            [
                part.reshape(*lead, *shape)
                for part, shape in zip(self._split(row, rank), self._shapes(rank), strict=True)
            ]
            for rank, row in enumerate(rows)
        ]
        return [
            torch.cat(column, dim=len(lead) + cut.axis)
            for cut, column in zip(self.cuts, zip(*parts, strict=True), strict=True)
        ]

    def sum(self, terms: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
        """This rank's pieces of the sums over ranks, by one reduce-scatter of the widest of the dtypes, float32 at
        least; over the replicas too, by an all-reduce of the pieces.

        Args:
            terms: whole, those of this rank; `None` is 0.
            like: tensors of the shapes, the dtypes and on the device of the pieces.
        """
        if not like:
            return []
        dtype = reduce(torch.promote_types, {tensor.dtype for tensor in like}, torch.float32)
        lead = like[0].shape[: like[0].dim() - len(self.cuts[0].shape)]
        most = max(map(self._numel, range(self._size)))
        rows = like[0].new_zeros(self._size, *lead, most, dtype=dtype)
        chunks = [
            [None] * self._size if term is None else term.detach().split(cut.sizes, dim=len(lead) + cut.axis)
            for term, cut in zip(terms, self.cuts, strict=True)
        ]
        for rank, row in enumerate(rows):
            for target, column in zip(self._split(row, rank), chunks, strict=True):
                if (chunk := column[rank]) is not None:
                    target.copy_(chunk.reshape(target.shape))
        if self.ranks.has_failed:
            rows.fill_(torch.nan)
        own = torch.empty_like(rows[0])
        scatter = _function("reduce_scatter_single", "reduce_scatter_tensor")
        self.ranks.collective(scatter, own.view(-1), rows.view(-1), group=self.group)
        if self.replicas is not None:
            self.ranks.collective(distributed.all_reduce, own, group=self.replicas)
        pieces = self._split(own, self.piece)
        return [piece.reshape(t.shape).to(t.dtype) for piece, t in zip(pieces, like, strict=True)]

    def sum_where_any(self, terms: Sequence[Tensor | None], whole: Sequence[Tensor]) -> list[Tensor | None]:
        """The pieces as `sum` has them, of the terms of a gradient in `whole` parameters, with `None` where all ranks
        have `None`."""
        present = self.ranks.any([term is not None for term in terms])
        shapes = self._shapes(self.piece)
        pieces = self.sum(terms, [w.new_empty(shape) for w, shape in zip(whole, shapes, strict=True)])
        return [piece if some else None for piece, some in zip(pieces, present, strict=True)]

    def zeros_for_none(self, pieces: Sequence[Tensor | None], whole: Sequence[Tensor]) -> list[Tensor | None]:
        """The pieces, with zeros like those of `whole` parameters for `None`."""
        shapes = self._shapes(self.piece)
        triples = zip(pieces, whole, shapes, strict=True)
        return [w.new_zeros(shape) if piece is None else piece for piece, w, shape in triples]

    @property
    def _size(self) -> int:
        return distributed.get_world_size(self.group)

    def _shapes(self, rank: int) -> list[torch.Size]:
        return [cut.piece(rank) for cut in self.cuts]

    def _numel(self, rank: int) -> int:
        return sum(shape.numel() for shape in self._shapes(rank))

    def _split(self, row: Tensor, rank: int) -> Sequence[Tensor]:
        """(..., n) -> the parts of `row` of each parameter, views."""
        parts: Sequence[Tensor] = row[..., : self._numel(rank)].split(
            [shape.numel() for shape in self._shapes(rank)], dim=-1
        )
        return parts


class Sharded(VectorSpace):
    """Every rank holds a piece of each vector, and dot products are summed over the pieces."""

    is_whole = False

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self.piece = shards.piece

    def sum(self, terms: Tensor) -> Tensor:
        return self._reduced(terms, distributed.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        return self._reduced(values.nan_to_num(torch.inf, torch.inf, -torch.inf), distributed.ReduceOp.MAX)

    def dots(self, a: Tensor, b: Tensor) -> Tensor:
        return self.sum(LOCAL.dots(a, b))

    def read(self, numbers: Tensor) -> Floats:
        # Sums are the same on all ranks that they go over, and those of replicas as far as they round alike.
        replicas = self._shards.replicas is not None
        return LOCAL.read(self._shards.ranks.of_first(numbers.contiguous()) if replicas else numbers)

    def all(self, flag: bool) -> bool:
        return not self._shards.ranks.any_rank(not flag)

    def _reduced(self, numbers: Tensor, operation: Any) -> Tensor:
        numbers = numbers.detach().clone(memory_format=torch.contiguous_format)
        self._shards.ranks.collective(distributed.all_reduce, numbers, operation, group=self._shards.group)
        return numbers


def _function(name: str, older_name: str) -> Callable[..., Any]:
    """A function of `torch.distributed`, which has renamed it."""
    function: Callable[..., Any] = getattr(distributed, name, None) or getattr(distributed, older_name)
    return function


def whole_params(shards: Shards | None, params: list[Tensor]) -> Any:
    """A context manager that yields the parameters themselves, or whole ones in the place of pieces."""
    return nullcontext(params) if shards is None else shards.whole_params()


def shards_of(params: Sequence[Tensor], process_group: ProcessGroup | None) -> Shards | None:
    """How the inner parameters are cut; `None` where they are not.

    Raises:
        ValueError: `process_group` is not given, or is not all ranks that have pieces; only some of the parameters are
            cut; they are of several meshes; or whole for now, as after a forward pass.
        NotImplementedError: they are cut by something else than `fully_shard`.
    """
    cut = [is_distributed(param) for param in params]
    if not all(cut):
        _refuse_unsharded(params)
    if not any(cut):
        return None
    if not all(cut):
        raise ValueError(
            f"inner_params must all be of fully_shard, or none: number {cut.index(True)} is a DTensor, and number "
            f"{cut.index(False)} is not"
        )
    modules = modules_of_fully_shard()
    owners = _owners(params, modules)
    if any(id(param) not in owners for param in params):
        for module in modules:  # parameters that a forward pass has left whole are none of those that were given
            module.reshard()
        owners = _owners(params, modules)
    for i, param in enumerate(params):
        if id(param) not in owners:
            raise NotImplementedError(
                f"inner_params[{i}] is a DTensor of no module that fully_shard was applied to: parameters that tensor "
                "parallelism (parallelize_module, distribute_tensor) has cut are not supported"
            )
    if process_group is None:
        raise ValueError(
            f"process_group must be given for inner_params of fully_shard (number 0 is a {type(params[0]).__name__}): "
            "the ranks that have the other pieces, such as torch.distributed.group.WORLD"
        )
    mesh: Any = params[0].device_mesh  # type: ignore[attr-defined]
    others = [i for i, param in enumerate(params) if param.device_mesh != mesh]  # type: ignore[attr-defined]
    if others:
        raise ValueError(f"inner_params must be cut by one mesh, but numbers 0 and {others[0]} are by two")
    _check_group(mesh, process_group)
    axis = mesh.ndim - 1
    size, rank = mesh.size(axis), mesh.get_local_rank(axis)
    return Shards(
        params,
        Ranks(process_group, torch.device(mesh.device_type)),
        [_cut_of(i, param, size, rank) for i, param in enumerate(params)],
        mesh.get_group(axis),
        mesh.get_group(0) if mesh.ndim == 2 else None,
        [owners[id(param)] for param in params],
        _networks(params, modules),
    )


def _owners(params: Sequence[Tensor], modules: Sequence[Any]) -> dict[int, tuple[nn.Module, str]]:
    """A module and the name of the parameter in it, by the id of each of `params`."""
    wanted = {id(param) for param in params}
    return {
        id(param): (part, name)
        for module in modules
        for part in module.modules()
        for name, param in part.named_parameters(recurse=False, remove_duplicate=False)
        if id(param) in wanted
    }


def _networks(params: Sequence[Tensor], modules: Sequence[Any]) -> list[Any]:
    """The modules of `fully_shard` of all networks that have one of the parameters, in an order that is the same on all
    ranks: that of the parameters, and then of each network's modules."""
    places = {id(param): i for i, param in enumerate(params)}
    parts = {id(module): list(module.modules()) for module in modules}
    inside = {id(part) for module in modules for part in parts[id(module)] if part is not module}
    networks = []
    for module in modules:
        found = [places[id(param)] for param in module.parameters() if id(param) in places]
        if found and id(module) not in inside:
            networks.append((min(found), module))
    ids = {id(module): module for module in modules}
    networks.sort(key=lambda pair: pair[0])
    return [ids[id(part)] for _, network in networks for part in parts[id(network)] if id(part) in ids]


def _check_group(mesh: Any, process_group: ProcessGroup) -> None:
    check_group(process_group)
    wanted, given = sorted(mesh.mesh.flatten().tolist()), sorted(distributed.get_process_group_ranks(process_group))
    if wanted != given:
        raise ValueError(f"process_group must be the ranks that have pieces of inner_params, {wanted}, and not {given}")


def _cut_of(i: int, param: Any, size: int, rank: int) -> _Cut:
    *outer, placement = param.placements
    if len(outer) > 1 or any(not each.is_replicate() for each in outer) or type(placement).__name__ != "Shard":
        raise NotImplementedError(
            f"inner_params[{i}] has the placements {param.placements}: hypergradients take those of fully_shard alone, "
            "Shard, and Replicate before it"
        )
    axis, length = placement.dim, param.shape[placement.dim]
    each = -(-length // size)
    cut = _Cut(param.shape, axis, tuple(min(each, max(0, length - each * r)) for r in range(size)))
    own = param.to_local().shape
    if cut.piece(rank) != own:
        raise NotImplementedError(
            f"inner_params[{i}] of shape {tuple(param.shape)} has a piece of shape {tuple(own)} on this rank, where "
            f"fully_shard would have one of {tuple(cut.piece(rank))}"
        )
    return cut


def _refuse_unsharded(params: Sequence[Tensor]) -> None:
    """Raises ValueError where parameters are whole for now, and belong to modules of `fully_shard`."""
    modules = modules_of_fully_shard()
    whole = {id(param) for module in modules for param in module.parameters()} if modules else set()
    for i, param in enumerate(params):
        if id(param) in whole:
            raise ValueError(
                f"inner_params[{i}] belongs to a module of fully_shard, and is whole for now, as forward passes leave "
                "them: call reshard() of that module, and then take its parameters()"
            )
