"""Networks that `fully_shard` has cut: the hypergradient of the whole network on all data, from pieces of vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

import auxfast
from auxfast import solvers
from auxfast.solvers.space import NotSharded

distributed = pytest.importorskip("torch.distributed")
if not distributed.is_available():
    pytest.skip("torch has no torch.distributed", allow_module_level=True)

PARTS = {"inner": [(0, 14), (14, 20)], "outer": [(0, 13), (13, 13)]}  # the second rank has no outer data
USUAL = [
    solvers.MINRES(20),
    solvers.ConjugateGradient(20, damping=1.0),
    solvers.Neumann(5, 0.05),
    solvers.Identity(0.1),
]
OTHERS = [
    solvers.MINRES(40, preconditioner=solvers.Jacobi(), tol=1e-13),
    solvers.ConjugateGradient(40, preconditioner=solvers.Jacobi(), tol=1e-13, damping=1.0),
    solvers.Neumann(20, 0.05, certify=False),
    solvers.Neumann(20),
    solvers.Neumann(20, 5.0, damping=0.1),
    solvers.Chebyshev(20),
    solvers.GMRES(20),
    solvers.NormalEquations(6, damping=1.0),
    solvers.GradientFlow(time=2.0),
    solvers.OneStep(0.1),
    solvers.OneStep(0.1, lookahead=True),
    solvers.SingleLoop(0.1),
    solvers.DEFAULT_SOLVER,
]


class Problem:
    """A network with an uneven layer, one of fewer rows than ranks, and a frozen one."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 1)).double()
        self.net[3].bias.requires_grad_(False)
        self.phi = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        self.data = {
            name: [torch.randn(count, columns, dtype=torch.float64) for columns in (5, 1)]
            for name, count in {"inner": 20, "outer": 13}.items()
        }

    def shard(self, **settings: Any) -> Problem:
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net[2], **settings)
        fully_shard(self.net, **settings)
        return self

    def inner(self, start: int = 0, end: int = 20) -> Callable[[], Any]:
        x, y = (t[start:end] for t in self.data["inner"])

        def loss() -> Tensor:
            errors = (self.net(x) - y).square()
            return (errors * self.phi.exp()).mean() + 0.5 * self.decay()

        return loss

    def decay(self) -> Tensor:
        terms = [(p * p).sum() for p in self.net.parameters()]
        return torch.stack(terms).sum()

    def outer(self, start: int = 0, end: int = 13) -> Callable[[], Tensor]:
        x, y = (t[start:end] for t in self.data["outer"])
        return lambda: (self.net(x) - y).square().mean() + 0.1 * self.phi.sum()

    def losses_of_rank(self, rank: int) -> list[Any]:
        return [
            [(end - start, getattr(self, name)(start, end))] if end > start else []
            for name, (start, end) in ((name, PARTS[name][rank]) for name in ("outer", "inner"))
        ]

    def hypergradient(self, outer: Any, inner: Any, solver: solvers.Solver, **settings: Any) -> Any:
        given = self.net.parameters()
        return auxfast.hypergradient(outer, inner, given, [self.phi], solver=solver, warn=False, **settings)


def group() -> Any:
    return distributed.group.WORLD


def of_rank(rank: int, methods: list[solvers.Solver]) -> list[Any]:
    problem = Problem().shard()
    losses, results = problem.losses_of_rank(rank), []
    for solver in methods:
        state = solvers.SolverState()
        for _ in range(2):
            result = problem.hypergradient(*losses, solver, process_group=group(), state=state)
            results.append((result.grads[0], result.stats))
    return results


def check_solvers(methods: list[solvers.Solver]) -> None:
    results = on_ranks(of_rank, methods)
    problem = Problem()
    for i, solver in enumerate(methods):
        state = solvers.SolverState()
        for call in range(2):
            whole = problem.hypergradient(problem.outer(), problem.inner(), solver, state=state)
            for result in results:
                grad, stats = result[2 * i + call]
                assert grad == pytest.approx(whole.grads[0], rel=1e-10, abs=1e-12), solver
                if getattr(solver, "preconditioner", None) is None:
                    assert (stats.matvecs, stats.stop_reason) == (whole.stats.matvecs, whole.stats.stop_reason), solver


def test_pieces_give_the_hypergradient_of_the_whole_network_on_all_data():
    check_solvers(USUAL)


@pytest.mark.slow
def test_every_solver_works_with_pieces_of_vectors():
    check_solvers(OTHERS)


def refusals(rank: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    problem = Problem().shard()
    losses = problem.outer(), problem.inner()

    def refused(error: type[Exception], text: str, *given: Any, of: Problem = problem, **settings: Any) -> None:
        settings = {"solver": solvers.Identity(), "process_group": group(), **settings}
        with pytest.raises(error, match=text):
            of.hypergradient(*(given or losses), settings.pop("solver"), **settings)

    refused(ValueError, "process_group must be given for inner_params of fully_shard", process_group=None)
    refused(
        ValueError,
        r"process_group must be the ranks.*not .[01]",
        process_group=distributed.new_group([rank], use_local_synchronization=True),
    )
    refused(
        TypeError,
        "outer_loss must be a function for inner_params of fully_shard",
        torch.ones((), requires_grad=True),
        losses[1],
    )
    refused(NotImplementedError, "finite differences do not take", curvature="finite-difference")
    refused(NotImplementedError, "mixed='exact'", solver=solvers.OneStep(0.1, mixed="difference"))
    refused(NotImplementedError, "free must be None", free=[None] * 6)
    for solver, way_out in [
        (solvers.Dense(), "take MINRES"),
        (solvers.Nystrom(), "take Jacobi"),
        (solvers.MINRES(preconditioner=solvers.Nystrom()), "take Jacobi"),
        (solvers.BlockDiagonal(solvers.MINRES()), "the solver itself"),
    ]:
        refused(NotSharded, f"needs whole vectors.*{way_out}", solver=solver)
    with pytest.raises(ValueError, match=r"inner_params must hold tensors that this process has whole.*DTensor"):
        auxfast.implicit_minimum(losses[1], problem.net.parameters(), [problem.phi], process_group=group())
    with pytest.raises(ValueError, match=r"outer_params must hold tensors that this process has whole.*DTensor"):
        auxfast.hypergradient(*losses, [problem.phi], problem.net.parameters(), process_group=group())
    with torch.no_grad():
        problem.net(problem.data["inner"][0])  # leaves the parameters of the outermost module whole
    refused(ValueError, r"inner_params\[0\] belongs to a module of fully_shard, and is whole for now.*reshard")

    mixed = Problem().shard(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    refused(NotImplementedError, "MixedPrecisionPolicy.*autocast", mixed.outer(), mixed.inner(), of=mixed)
    tensor_parallel = Problem()
    mesh = init_device_mesh("cpu", (2,))
    for module in tensor_parallel.net:
        for name, param in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(distribute_tensor(param.detach(), mesh)))
    refused(NotImplementedError, "tensor parallelism", of=tensor_parallel)
    teacher = Problem()
    fully_shard(teacher.net)
    student = Problem()
    refused(
        RuntimeError,
        "inner_loss went through FSDP.*no parameter",
        student.outer(),
        lambda: teacher.net(student.data["inner"][0]).sum() * student.phi.sum(),
        of=student,
    )
    old = Problem()
    wrapped = FullyShardedDataParallel(old.net, use_orig_params=True, device_id=torch.device("cpu"))
    x, y = old.data["inner"]
    refused(
        RuntimeError,
        "FullyShardedDataParallel.*fully_shard",
        lambda: (wrapped(x) - y).square().mean(),
        lambda: (wrapped(x) - y).square().mean(),
        of=old,
    )


def test_what_cannot_be_cut_is_refused_by_name():
    on_ranks(refusals)
