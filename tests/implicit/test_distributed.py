"""Networks that are spread over processes: with a process group DistributedDataParallel gives the hypergradient of all
data, and training goes on as before; whatever else joins processes is refused, however losses are passed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import error_of, on_ranks
from torch import Tensor, nn

import auxfast

distributed = pytest.importorskip("torch.distributed")
if not distributed.is_available():
    pytest.skip("torch has no torch.distributed", allow_module_level=True)

from torch.nn.parallel import DistributedDataParallel  # noqa: E402

SAMPLES = 12
Net = Callable[[Tensor], Tensor]


class Network(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), norm, nn.Linear(4, 1))
        self.raises = False

    def forward(self, x: Tensor) -> Any:
        if self.raises:
            raise KeyError("no such sample")
        return self.layers(x)


class Problem:
    """A network with buffers."""

    def __init__(self, norm: nn.Module | None = None, has_unused: bool = False) -> None:
        torch.manual_seed(0)
        self.net = Network(norm or nn.BatchNorm1d(4, momentum=0.5)).double()
        self.params = list(self.net.layers.parameters())
        if has_unused:
            self.net.unused = nn.Linear(2, 2).double()
        self.phi = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        self.x = torch.randn(SAMPLES, 3, dtype=torch.float64)

    def part(self, rank: int | None) -> slice:
        return slice(None) if rank is None else slice(rank * SAMPLES // 2, (rank + 1) * SAMPLES // 2)

    def loss(
        self, net: Net, rank: int | None = None, target: float = 0.0, params: Sequence[Tensor] = ()
    ) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            decay = self.phi.exp() * sum(p.square().sum() for p in params or self.params)
            return (net(self.x[self.part(rank)]) - target).square().mean() + decay

        return loss

    def hypergradient(self, outer: Any, inner: Any, **settings: Any) -> Tensor:
        solver = auxfast.solvers.MINRES(tol=1e-10)
        result = auxfast.hypergradient(
            outer, inner, self.net.parameters(), [self.phi], solver=solver, warn=False, **settings
        )
        return result.grads[0]

    def of_minimum(self, inner: Any, rank: int, **settings: Any) -> Tensor:
        params = dict(self.net.named_parameters())
        solver = auxfast.solvers.MINRES(tol=1e-10)
        solved = auxfast.implicit_minimum(inner, params, [self.phi], solver=solver, warn=False, **settings)
        used = [value for name, value in solved.items() if name.startswith("layers")]
        outer = self.loss(partial(torch.func.functional_call, self.net, solved), rank, 1.0, used)
        return torch.autograd.grad(outer(), [self.phi])[0]


# ------------------------------------------------------------------------------------------------ without process_group


def refused(rank: int) -> dict[str, str]:
    problem = Problem()
    ddp = DistributedDataParallel(problem.net)
    wrapped, bare = problem.loss(ddp), problem.loss(problem.net)
    params = list(problem.net.parameters())
    tensors = wrapped(), wrapped()
    alone = [distributed.new_group([each]) for each in range(2)][rank]
    errors = {
        "a group of one": lambda: problem.hypergradient(wrapped, bare, process_group=alone),
        "outer_loss went": lambda: problem.hypergradient(wrapped, bare),
        "inner_loss went": lambda: problem.hypergradient(bare, wrapped),
        "inner_params belong": lambda: problem.hypergradient(*tensors),
        "params belong": lambda: auxfast.auxiliary_usefulness(*tensors, [wrapped()], params),
        "loss went": lambda: auxfast.curvature.Hessian(wrapped, params),
        "loss params belong": lambda: auxfast.curvature.Hessian(wrapped(), params),
        "implicit_minimum": lambda: auxfast.implicit_minimum(wrapped, params, [problem.phi]),
        "implicit_minimum params": lambda: auxfast.implicit_minimum(wrapped(), params, [problem.phi]),
        "implicit_root": lambda: auxfast.implicit_root(
            lambda: torch.autograd.grad(wrapped(), params, create_graph=True), params, [problem.phi]
        ),
        "verify_hypergradient": lambda: auxfast.verify_hypergradient(wrapped, bare, params, [problem.phi]),
    }
    found = {name: error_of(compute) for name, compute in errors.items()}
    assert problem.hypergradient(bare, bare).isfinite()
    with auxfast.preserved_state():
        wrapped()  # whoever computes a loss alone may do so
    return found


def test_distributed_data_parallel_is_refused_without_a_process_group():
    for errors in on_ranks(refused):
        for name, error in errors.items():
            assert error.startswith("RuntimeError: "), (name, error)
            assert "DistributedDataParallel" in error, name
            assert "process_group=torch.distributed.group.WORLD" in error, name
        assert errors["outer_loss went"].startswith("RuntimeError: outer_loss went through DistributedDataParallel")
        assert errors["inner_loss went"].startswith("RuntimeError: inner_loss went through DistributedDataParallel")
        assert errors["inner_params belong"].startswith("RuntimeError: inner_params belong to a Distributed")


# --------------------------------------------------------------------------------------------------- with process_group

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "bucket views": {"gradient_as_bucket_view": True},
}


def tensors_of(losses: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """Losses on buffers of their own: with torch 2.11 each call of DistributedDataParallel writes to the module's,
    which the graphs before need."""
    found = []
    for loss in losses:
        with auxfast.preserved_state():
            found.append(loss())
    return found


def through_ddp(rank: int, kind: str) -> dict[str, Any]:
    """Hypergradients in a training loop, by the way in which the losses are passed; and the trained parameters, with
    hypergradients in between and without."""
    group = distributed.group.WORLD
    found: dict[str, Any] = {"hypergradients": [], "params": [], "buffers": []}
    for between in (True, False):
        problem = Problem(has_unused=kind == "find_unused_parameters")
        ddp = DistributedDataParallel(problem.net, **KINDS[kind])
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        for _ in range(3):
            ddp.eval()
            if between:
                wrapped, inside = (
                    [problem.loss(net, rank, target) for target in (1.0, 0.0)] for net in (ddp, problem.net)
                )
                ways = {"DDP": wrapped, "the module in DDP": inside}
                if kind != "static_graph":
                    ways["tensors"] = tensors_of(wrapped)
                grads = {name: problem.hypergradient(*losses, process_group=group) for name, losses in ways.items()}
                grads["implicit_minimum"] = problem.of_minimum(wrapped[1], rank, process_group=group)
                bare = [(rank * 3.0, problem.loss(ddp, rank, 1.0))] if rank else [], wrapped[1]
                grads["a rank without outer data"] = problem.hypergradient(*bare, process_group=group)
                problem_of_all = [problem.loss(problem.net, None, target) for target in (1.0, 0.0)]
                found["hypergradients"].append((grads, problem.hypergradient(*problem_of_all)))
            ddp.train()
            optimizer.zero_grad()
            loss = problem.loss(ddp, rank)()
            if between:
                problem.hypergradient(*wrapped, process_group=group)
            loss.backward()
            optimizer.step()
        found["params"].append([p.detach() for p in problem.net.parameters()])
        found["buffers"].append(list(problem.net.buffers()))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_distributed_data_parallel_gives_the_hypergradient_of_all_data(kind):
    """Through it, through the module in it, or as a tensor computed before; and training is what it is without."""
    both = on_ranks(through_ddp, kind)
    for found in both:
        for name in ("params", "buffers"):
            assert all(map(torch.equal, *found[name])), name
    assert all(map(torch.equal, *(found["params"][0] for found in both)))
    for (grads, _), (others, _) in zip(*(found["hypergradients"] for found in both), strict=True):
        assert grads == others
    grads, whole = both[0]["hypergradients"][0]  # the buffers of ranks are still the same
    for name in grads.keys() - {"a rank without outer data"}:
        torch.testing.assert_close(grads[name], whole, rtol=1e-8, atol=1e-12)


def refused_of_ranks(rank: int) -> dict[str, str]:
    group = distributed.group.WORLD
    static = Problem()
    ddp = DistributedDataParallel(static.net, static_graph=True)
    losses = [static.loss(ddp, rank) for _ in range(2)]
    joined = Problem(nn.SyncBatchNorm(4))
    mixed = DistributedDataParallel(Problem().net)
    mixed.mixed_precision = "a setting"  # the CPU has none
    errors = {
        "outer_loss was computed by DistributedDataParallel with static_graph": lambda: static.hypergradient(
            losses[0](), losses[1], process_group=group
        ),
        "inner_loss was computed by DistributedDataParallel with static_graph": lambda: static.hypergradient(
            losses[0], losses[1](), process_group=group
        ),
        "inner_loss went through SyncBatchNorm in training mode": lambda: joined.hypergradient(
            joined.loss(joined.net.eval(), rank), lambda: joined.loss(joined.net.train(), rank)(), process_group=group
        ),
        "outer_loss went through DistributedDataParallel with mixed_precision": lambda: static.hypergradient(
            static.loss(mixed, rank), static.loss(static.net, rank), process_group=group
        ),
    }
    return {text: error_of(compute) for text, compute in errors.items()}


def test_what_else_joins_processes_is_refused():
    for errors in on_ranks(refused_of_ranks):
        for text, error in errors.items():
            assert error.startswith(f"RuntimeError: {text}"), error


def compiled(rank: int) -> str:
    problem = Problem()
    net = torch.compile(DistributedDataParallel(problem.net), backend="eager")
    losses = problem.loss(net, rank), problem.loss(problem.net, rank)
    return error_of(partial(problem.hypergradient, *losses, process_group=distributed.group.WORLD))


@pytest.mark.slow
def test_compiled_distributed_data_parallel_is_refused():
    for error in on_ranks(compiled):
        assert error.startswith("RuntimeError: outer_loss went through torch.compile of a module that holds"), error


def training_after_an_error(rank: int) -> list[Tensor]:
    problem = Problem()
    problem.net.raises = True
    ddp = DistributedDataParallel(problem.net)
    losses = problem.loss(ddp, rank), problem.loss(ddp, rank)
    assert "no such sample" in error_of(partial(problem.hypergradient, *losses, process_group=distributed.group.WORLD))
    problem.net.raises = False
    problem.loss(ddp, rank)().backward()
    return [p.grad for p in problem.net.parameters()]


def test_training_goes_on_after_a_loss_has_raised():
    assert all(map(torch.equal, *on_ranks(training_after_an_error)))


# ---------------------------------------------------------------------------------------------------------- one process


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("process_group", [False, True])
def test_distributed_data_parallel_of_one_process(group, process_group):
    problem = Problem()
    settings = {"process_group": distributed.group.WORLD if process_group else None}
    wrapped, bare = problem.loss(DistributedDataParallel(problem.net)), problem.loss(problem.net)
    expected = problem.hypergradient(bare, bare)
    torch.testing.assert_close(problem.hypergradient(wrapped, wrapped, **settings), expected)
    torch.testing.assert_close(problem.hypergradient(*tensors_of([wrapped, wrapped]), **settings), expected)


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


def test_process_group_must_be_one(group):
    problem = Problem()
    loss = problem.loss(problem.net)
    with pytest.raises(TypeError, match=r"process_group must be .*ProcessGroup.*not int"):
        problem.hypergradient(loss, loss, process_group=2)
    with pytest.raises(ValueError, match="process_group must be one that this process belongs to"):
        problem.hypergradient(loss, loss, process_group=distributed.GroupMember.NON_GROUP_MEMBER)


# ------------------------------------------------------------------------------------------------------- no group given


CALLS: dict[str, Callable[[Problem], Any]] = {
    "hypergradient": lambda p: auxfast.hypergradient(p.loss(p.net), p.loss(p.net), p.params, [p.phi]),
    "implicit_minimum": lambda p: auxfast.implicit_minimum(p.loss(p.net), p.params, [p.phi]),
    "HyperOptimizer": lambda p: auxfast.HyperOptimizer(torch.optim.SGD([p.phi])),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_group_that_is_none_since_nothing_has_started_it_is_told_under_torchrun(call, monkeypatch):
    """`group.WORLD` is None before `init_process_group()`, and each process would be alone, unnoticed."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.warns(RuntimeWarning, match=r"process_group is None.*init_process_group\(\): call that first"):
        call(Problem())
