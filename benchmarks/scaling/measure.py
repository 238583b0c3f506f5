"""Seconds and bytes of hypergradients on several ranks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from auxfast.curvature import Hessian
from auxfast.solvers import (
    DEFAULT_SOLVER,
    GMRES,
    MINRES,
    Chebyshev,
    ConjugateGradient,
    Identity,
    Neumann,
    Nystrom,
    OneStep,
    SingleLoop,
    Solver,
    SolverState,
)
from benchmarks.scaling.problem import Network, Problem

Ways = dict[str, tuple[int, Callable[[], Any]]]
"""Ways of a call by name: the number of ranks that run it, the first ones, and the function."""
Row = dict[str, Any]
IN_A_ROW = 5  # all-reduces in one timed stretch


def timed(ways: Ways, rounds: int) -> dict[str, Row]:
    """Seconds of a call on the first rank for each way, in alternating rounds after one that is not counted: the
    median, the least, and the median of the CPU's, of the rank that took most. All ranks make this call, and those that
    a way does not need wait."""
    rank = distributed.get_rank()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    on_cpu: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, (size, function) in ways.items():
            distributed.barrier()
            start, start_on_cpu = time.perf_counter(), time.process_time()
            if rank < size:
                function()
            if i:
                seconds[name].append(time.perf_counter() - start)
                on_cpu[name].append(time.process_time() - start_on_cpu)
    most = torch.tensor([statistics.median(each) for each in on_cpu.values()])
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    return {
        name: {"median": statistics.median(each), "least": min(each), "cpu": cpu}
        for (name, each), cpu in zip(seconds.items(), most.tolist(), strict=True)
    }


def speeds(groups: dict[int, Any], widths: Sequence[int], batches: Sequence[int], rounds: int) -> list[Row]:
    """Whole hypergradients of each number of ranks and of samples, of `rounds` in all for the largest number of samples
    and more for others; of one rank also those of its part of them."""
    rank, problem, rows = distributed.get_rank(), Problem(widths, max(batches)), []

    def call(size: int, batch: int) -> Callable[[], Any]:
        group = groups[size] if size > 1 else None
        return lambda: problem.hypergradient(rank, size, batch, group)

    parts = {batch // size for size in groups for batch in batches}
    for batch in sorted({*batches, *parts}):
        sizes = groups if batch in batches else [1]
        found = timed({str(size): (size, call(size, batch)) for size in sizes}, rounds * max(batches) // batch)
        rows += [{"ranks": int(size), "batch": batch, **row} for size, row in found.items()]
    return rows


def waits(group: Any, widths: Sequence[int], batches: Sequence[int], rounds: int) -> list[Row]:
    """Where the time of a call goes, median seconds on the first rank: in waiting for the other ranks to come to an
    all-reduce, which a barrier before it tells, and in all-reduces."""
    rank, size, rows = distributed.get_rank(), distributed.get_world_size(group), []
    problem, all_reduce = Problem(widths, max(batches)), distributed.all_reduce
    spent = {"waiting": 0.0, "all-reduces": 0.0}

    def watched(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        distributed.barrier(group)
        middle = time.perf_counter()
        all_reduce(*args, **options)
        spent["waiting"] += middle - start
        spent["all-reduces"] += time.perf_counter() - middle

    for batch in batches:
        found = []
        for _ in range(1 + rounds * max(batches) // batch):
            spent.update(dict.fromkeys(spent, 0.0))
            distributed.barrier(group)
            start = time.perf_counter()
            with _replaced({"all_reduce": watched}):
                problem.hypergradient(rank, size, batch, group)
            found.append({"call": time.perf_counter() - start, **spent})
        rows.append({"batch": batch, **{key: statistics.median(row[key] for row in found[1:]) for key in found[0]}})
    return rows


def small_calls(groups: dict[int, Any], rounds: int) -> dict[str, Row]:
    """Calls of milliseconds: without `process_group`, with a group of one rank, without one again, which differs from
    the first by noise, and on two ranks with half of the samples each."""
    rank, problem, batch = distributed.get_rank(), Problem((64, 128, 128, 10), 64), 64
    ways = {"none": (1, None), "one rank": (1, groups[1]), "none again": (1, None), "two ranks": (2, groups[2])}

    def call(size: int, group: Any) -> Callable[[], Any]:
        return lambda: problem.hypergradient(rank, size, batch, group)

    return timed({name: (size, call(size, group)) for name, (size, group) in ways.items()}, rounds)


def all_reduces(groups: dict[int, Any], sizes: Sequence[int], rounds: int) -> list[Row]:
    """All-reduces of float32 numbers, several in a row: ranks, bytes, and seconds of one."""
    buffers = {size: torch.zeros(size // 4) for size in sizes}

    def call(ranks: int, size: int) -> Callable[[], Any]:
        def several() -> None:
            for _ in range(IN_A_ROW):
                distributed.all_reduce(buffers[size], group=groups[ranks])

        return several

    grid = [(ranks, size) for ranks in groups if ranks > 1 for size in sizes]
    found = timed({f"{ranks} {size}": (ranks, call(ranks, size)) for ranks, size in grid}, rounds)
    return [
        {
            "ranks": ranks,
            "bytes": size,
            **{name: found[f"{ranks} {size}"][name] / IN_A_ROW for name in ("median", "least")},
        }
        for ranks, size in grid
    ]


def products(networks: dict[str, Callable[[], Network]], rounds: int) -> list[Row]:
    """A product with the Hessian beside a gradient with its forward pass, on one rank and no other."""
    rows = []
    for name, make in networks.items():
        torch.manual_seed(0)
        network = make()
        params, vectors = network.params, [torch.randn_like(w) for w in network.params]
        hessian = Hessian(network.loss(), params)
        ways: Ways = {
            "gradient": (1, lambda: torch.autograd.grad(network.loss(), params)),  # noqa: B023, called below
            "product": (1, lambda: hessian.matvec(vectors)),  # noqa: B023
        }
        found = timed(ways, rounds)
        gradient, product = (found[way]["least"] for way in ways)
        numbers = {"gradient": gradient, "product": product, "tail": _tail(hessian, params, vectors)}
        rows.append({"network": name, "parameters": sum(w.numel() for w in params), **numbers})
    return rows


def _tail(hessian: Hessian, params: Sequence[Tensor], vectors: Sequence[Tensor]) -> float:
    """The part of a product's time after half of its numbers are known: what communication could hide behind."""
    known: list[tuple[float, int]] = []
    handles = [w.register_hook(lambda grad: known.append((time.perf_counter(), grad.numel()))) for w in params]
    start = time.perf_counter()
    hessian.matvec(vectors)
    end = time.perf_counter()
    for handle in handles:
        handle.remove()
    half, count = sum(numel for _, numel in known) / 2, 0
    for moment, numel in known:
        count += numel
        if count >= half:
            return (end - moment) / (end - start)
    return 0.0


SOLVERS: dict[str, Solver | None] = {  # by how they are written
    "none, the default": DEFAULT_SOLVER,
    "MINRES()": MINRES(),
    "ConjugateGradient()": ConjugateGradient(),
    "ConjugateGradient(preconditioner=Nystrom(rank=20))": ConjugateGradient(preconditioner=Nystrom(rank=20)),
    "Chebyshev()": Chebyshev(),
    "Neumann(3, 0.1)": Neumann(3, 0.1),
    "GMRES()": GMRES(),
    "Identity()": Identity(),
    "OneStep(0.1)": OneStep(0.1),
    "SingleLoop(0.1)": SingleLoop(0.1),
}


def communication(group: Any) -> list[Row]:
    """What one call sends, by solver: collectives of as many numbers as W and as phi, and all others."""
    rank, size, batch = distributed.get_rank(), distributed.get_world_size(group), 64
    rows = []
    for name, solver in SOLVERS.items():
        problem = Problem((20, 30, 10), batch)
        num_inner, num_outer = sum(w.numel() for w in problem.params), problem.phi.numel()
        with _counted() as sent:
            stats = problem.hypergradient(rank, size, batch, group, solver, state=SolverState()).stats
        of_inner = [count for count in sent if count >= num_inner]
        of_outer = [count for count in sent if count == num_outer]
        others = [count for count in sent if count < num_inner and count != num_outer]
        rows.append(
            {
                "solver": name,
                "products": stats.matvecs,
                "of W": sum(count // num_inner for count in of_inner),  # a batch of vectors is one collective
                "of phi": len(of_outer),
                "others": len(others),
                "most numbers of others": max(others, default=0),
            }
        )
    return rows


@contextmanager
def _counted() -> Iterator[list[int]]:
    """A list that grows by the number of numbers that each collective sends."""
    sent: list[int] = []
    plain = {name: getattr(distributed, name) for name in ("all_reduce", "all_gather", "broadcast")}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            sent.append(args[name == "all_gather"].numel())
            return plain[name](*args, **options)

        return call

    with _replaced({name: counting(name) for name in plain}):
        yield sent


@contextmanager
def _replaced(functions: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Functions of torch.distributed are others meanwhile."""
    plain = {name: getattr(distributed, name) for name in functions}
    for name, function in functions.items():
        setattr(distributed, name, function)
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(distributed, name, function)
