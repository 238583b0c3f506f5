"""Networks that are spread over processes are refused, whichever way their losses are passed; alone, they are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import auxfast

distributed = pytest.importorskip("torch.distributed")
if not distributed.is_available():
    pytest.skip("torch has no torch.distributed", allow_module_level=True)

from torch.nn.parallel import DistributedDataParallel  # noqa: E402

WHY = "a process group will come"


class Problem:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net, self.phi, self.x = nn.Linear(3, 1), torch.zeros(1, requires_grad=True), torch.randn(5, 3)

    def loss(self, net: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        decay = self.net.parameters
        return lambda: net(self.x).square().mean() + self.phi.exp() * sum(p.square().sum() for p in decay())

    def hypergradient(self, outer: Any, inner: Any) -> Tensor:
        return auxfast.hypergradient(outer, inner, self.net.parameters(), [self.phi]).grads[0]


def of_two_processes(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    problem = Problem()
    wrapped, bare = problem.loss(DistributedDataParallel(problem.net)), problem.loss(problem.net)
    for name, losses in {"outer": (wrapped, bare), "inner": (bare, wrapped)}.items():
        with pytest.raises(RuntimeError, match=f"{name}_loss went through DistributedDataParallel.*{WHY}"):
            problem.hypergradient(*losses)
    losses = wrapped(), wrapped()
    with pytest.raises(RuntimeError, match=f"inner_params belong to a DistributedDataParallel.*{WHY}"):
        problem.hypergradient(*losses)
    with pytest.raises(RuntimeError, match=f"params belong to a DistributedDataParallel.*{WHY}"):
        auxfast.auxiliary_usefulness(*losses, [wrapped()], problem.net.parameters())
    assert problem.hypergradient(bare, bare).isfinite()
    with auxfast.preserved_state():
        wrapped()  # whoever computes a loss alone may do so
    distributed.destroy_process_group()


@pytest.mark.slow
def test_distributed_data_parallel_of_two_processes(tmp_path):
    torch.multiprocessing.spawn(of_two_processes, (str(tmp_path),), nprocs=2)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_distributed_data_parallel_of_one_process(group):
    problem = Problem()
    wrapped, bare = problem.loss(DistributedDataParallel(problem.net)), problem.loss(problem.net)
    expected = problem.hypergradient(bare, bare)
    torch.testing.assert_close(problem.hypergradient(wrapped, wrapped), expected)
    torch.testing.assert_close(problem.hypergradient(wrapped(), wrapped()), expected)


@pytest.mark.parametrize(
    ("name", "text"),
    [("inner_params", "DTensor of no module that fully_shard"), ("outer_params", "number 0 is a DTensor, a piece")],
)
def test_distributed_tensors(group, name, text):
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    spread = nn.Parameter(distribute_tensor(torch.ones(3), init_device_mesh("cpu", (1,))))
    params = {"inner_params": [torch.ones(1)], "outer_params": [torch.ones(1)], name: [spread]}
    with pytest.raises((ValueError, NotImplementedError), match=f"{name}.*{text}"):
        auxfast.hypergradient(spread.sum(), spread.sum(), **params)
