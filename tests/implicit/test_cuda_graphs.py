"""Graphs of a hypergradient where CUDA is one that only notes operations: replays read what they should."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from auxfast import engine_only
from auxfast.implicit.cuda_graphs import CapturedProgram
from auxfast.solvers import MINRES, ConjugateGradient, Identity, Neumann

from .test_graphed import Bilevel


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Recorded(TorchDispatchMode):
    """Operations, which a replay computes again, in the same memory; it then spoils what was free at the end of the
    recording, since the memory may have been used again within it."""

    everything: list[tuple[Any, Any, Any, Any]]  # of all graphs that are recorded together
    made: dict[int, Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.start = len(self.everything)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {*map(_memory, _tensors([args, kwargs]))}
        self.made.update((_memory(t), t.detach()) for t in _tensors(result) if _memory(t) not in given)
        # Tensors of the recording's own tell whether anything else still holds the memory.
        self.everything.append(
            tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, (func, args, kwargs or {}, result))
        )
        return result

    def end(self) -> None:
        gc.collect()
        self.operations = self.everything[self.start :]
        own: dict[int, int] = {}
        for tensor in [*_tensors(self.everything), *self.made.values()]:
            own[_memory(tensor)] = own.get(_memory(tensor), 0) + 1
        self.free = [t for key, t in self.made.items() if torch._C._storage_Use_Count(key) <= own[key]]

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            given = {*map(_memory, _tensors([args, kwargs]))}
            for old, new in zip(_tensors(result), _tensors(func(*args, **kwargs)), strict=True):
                if _memory(old) not in given:
                    old.copy_(new)
        for tensor in self.free:
            tensor.fill_(math.nan if tensor.is_floating_point() else 1)


class Event:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture
def _noted_operations(monkeypatch):
    """Recordings of operations stand in for CUDA graphs."""

    @contextmanager
    def graph(recorded: Recorded, **options: Any) -> Iterator[None]:
        with recorded:
            yield
        recorded.end()

    def zeros(*sizes: int, pin_memory: bool = False, **options: Any) -> Tensor:
        return plain_zeros(*sizes, **options)

    plain_zeros: Callable[..., Tensor] = torch.zeros
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(Recorded, "everything", [], raising=False)
    monkeypatch.setattr(Recorded, "made", {}, raising=False)
    for name, stand_in in {"CUDAGraph": Recorded, "graph": graph, "graph_pool_handle": int, "Event": Event}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)


SOLVERS = {
    "Neumann": Neumann(6, 0.05),
    "growth": Neumann(6, 2.0),
    "not certified": Neumann(18, 0.05, certify=False),
    "identity": Identity(0.1),
    "MINRES": MINRES(4, tol=None, warm_start=True),
    "chunks": MINRES(21, tol=1e-9, damping=1.0),
    "chunks, early": MINRES(60, tol=1e-2, damping=3.0),
    "chunks, warm": MINRES(60, tol=1e-3, warm_start=True, damping=1.0),
    "chunks of conjugate gradients": ConjugateGradient(29, tol=1e-9, warm_start=True, damping=3.0),
}
FAST = "Neumann", "chunks, warm"


@pytest.mark.usefixtures("_noted_operations")
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in SOLVERS]
)
def test_replays_compute_the_same_in_memory_that_others_have_used_between(name):
    solver = SOLVERS[name]
    problem = Bilevel(nn.BatchNorm1d(6), nn.Tanh())
    graphed, plain = problem.graphed(solver), problem.graphed(solver)
    program: Any = CapturedProgram(graphed._static, None)
    graphed.reset()
    for seed in (0, 1, 1, 2):
        inputs = problem.inputs(seed)
        graphed._copy([*inputs[0], *inputs[1]])
        steps, wanted = program.run(), plain(*inputs)
        (grads,), numbers = program.results()
        assert torch.equal(grads, wanted.grads[0])
        found, stats = (replace(s, matvecs=0) for s in (graphed._outcome(numbers, steps, None)[0], wanted.stats))
        assert repr(found) == repr(stats)  # NaN is no equal of NaN; graphs are one chunk ahead of what the host knows
        with torch.no_grad():
            for tensor in (*problem.w, *problem.phi):
                tensor.mul_(0.98)


@pytest.mark.slow
@pytest.mark.usefixtures("_noted_operations")
def test_replays_of_products_by_the_engine_compute_the_same():
    with engine_only():
        test_replays_compute_the_same_in_memory_that_others_have_used_between("chunks, warm")
