"""Networks that `fully_shard` has cut: the hypergradient of the whole network on all data, from pieces of vectors."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
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
    solvers.CompactMINRES(20, dtype=torch.float64),
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

    def inner(self, start: int = 0, end: int = 20, penalised: bool = True) -> Callable[[], Any]:
        x, y = (t[start:end] for t in self.data["inner"])

        def loss() -> Tensor:
            self.last = self.net(x)
            errors = (self.last - y).square()
            loss = (errors * self.phi.exp()).mean()
            return loss + 0.5 * self.decay() if penalised else loss

        return loss

    def with_outputs(self, loss: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: (loss(), self.last)

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


@dataclass(frozen=True)
class Watched:
    """MINRES that notes how many numbers this rank has of each vector."""

    sizes: list[int] = field(default_factory=list, repr=False)

    def solve(self, matvec: Any, rhs: Any, **settings: Any) -> Any:
        solution, stats = solvers.MINRES(20).solve(matvec, rhs, **settings)
        self.sizes.extend(sum(t.numel() for t in tensors) for tensors in (rhs, solution, matvec(rhs)))
        return solution, stats


def variants(rank: int) -> dict[str, Any]:
    """The gradient, by micro-batches, Gauss-Newton products, two axes of the mesh and offloaded pieces."""
    from torch.distributed.fsdp import CPUOffloadPolicy
    from torch.distributed.tensor import init_device_mesh

    found = {}
    halves = [(7, 7), (7, 7)] if rank == 0 else [(3, 3), (3, 3)]
    start = 0 if rank == 0 else 14
    for name, settings in {
        "plain": {},
        "micro-batches": {},
        "replicas": {"mesh": init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))},
        "pieces of replicas": {"mesh": init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))},
        "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    }.items():
        problem, solver = Problem().shard(**settings), Watched()
        outer, inner = problem.losses_of_rank(rank)
        if name == "micro-batches":
            count = halves[0][0]
            inner = [(count, problem.inner(start + i * count, start + (i + 1) * count)) for i in range(2)]
        found[name] = problem.hypergradient(outer, inner, solver, process_group=group()).grads[0], solver.sizes
    gauss_newton = problem.hypergradient(
        outer,
        [(n, problem.with_outputs(f)) for n, f in inner],
        solvers.MINRES(20),
        curvature="gauss-newton",
        process_group=group(),
    )
    return {**found, "gauss-newton": (gauss_newton.grads[0], [])}


def test_micro_batches_meshes_and_offloaded_pieces_change_nothing_and_a_rank_has_half_of_each_vector():
    problem = Problem()
    whole = problem.hypergradient(problem.outer(), problem.inner(), solvers.MINRES(20)).grads[0]
    gauss_newton = problem.hypergradient(
        problem.outer(), problem.with_outputs(problem.inner()), solvers.MINRES(20), curvature="gauss-newton"
    ).grads[0]
    for rank, found in enumerate(on_ranks(variants)):
        for name, (grad, sizes) in found.items():
            expected = gauss_newton if name == "gauss-newton" else whole
            assert grad == pytest.approx(expected, rel=1e-10, abs=1e-12), name
            if sizes:  # 69 numbers that require gradients, of which the first rank has the larger halves
                assert set(sizes) == {69} if name == "replicas" else {41, 28}, (rank, name)


def trained(problem: Problem, rank: int | None) -> list[Tensor]:
    """Inner and outer steps in turn: the parameters after them."""
    inner = torch.optim.Adam([p for p in problem.net.parameters() if p.requires_grad], lr=0.01)
    outer = auxfast.HyperOptimizer(
        torch.optim.SGD([problem.phi], lr=0.1), warn=False, process_group=None if rank is None else group()
    )
    start, end = (0, 20) if rank is None else (10 * rank, 10 * rank + 10)
    for _ in range(3):
        inner.zero_grad()
        problem.inner(start, end, penalised=False)().backward()
        inner.step()
        outer.step(problem.outer(), problem.inner(start, end), problem.net.parameters())
    return [problem.phi.detach(), *(p.detach() for p in problem.net.parameters())]


def trained_in_pieces(rank: int) -> list[Tensor]:
    problem = Problem().shard()
    params, hooks = list(problem.net.parameters()), [list(m._forward_pre_hooks.items()) for m in problem.net.modules()]
    phi, *pieces = trained(problem, rank)
    assert all(map(operator.is_, params, problem.net.parameters()))
    assert hooks == [list(m._forward_pre_hooks.items()) for m in problem.net.modules()]
    return [phi, *(piece.full_tensor() for piece in pieces)]


def test_training_goes_on_as_before_after_outer_steps():
    expected = trained(Problem(), None)
    for found in on_ranks(trained_in_pieces):
        for tensor, other in zip(found, expected, strict=True):
            torch.testing.assert_close(tensor, other, rtol=1e-8, atol=1e-10)


def after_a_timeout(rank: int) -> list[str]:
    """The collectives that follow one that has raised."""
    problem, followed = Problem().shard(), []

    def timed_out(*args: Any, **settings: Any) -> None:
        for name in ("all_gather", "all_reduce", "broadcast", "all_gather_object"):
            patch.setattr(distributed, name, lambda *args, name=name, **settings: followed.append(name))
        raise RuntimeError("timed out")

    name = "reduce_scatter_single" if hasattr(distributed, "reduce_scatter_single") else "reduce_scatter_tensor"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, name, timed_out)
        with pytest.raises(RuntimeError, match="timed out"):
            problem.hypergradient(problem.outer(), problem.inner(), solvers.Identity(), process_group=group())
    return followed


def test_no_collective_follows_one_that_has_raised():
    assert on_ranks(after_a_timeout) == [[], []]


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
