"""Every solver, preconditioner and curvature in whole hypergradients on the GPU, against the same on the CPU; and what
else of the public interface works with a solve."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

import auxfast
from auxfast import FreshBatches, HyperOptimizer, MicroBatches, curvature, hypergradient
from auxfast.implicit import HypergradientResult, auxiliary_usefulness, implicit_minimum, implicit_root
from auxfast.implicit.derivatives import CurvatureName
from auxfast.nn import NonlinearCombiner
from auxfast.solvers import (
    DEFAULT_SOLVER,
    GMRES,
    MINRES,
    SAMA,
    BlockDiagonal,
    Chebyshev,
    CompactMINRES,
    ConjugateGradient,
    Dense,
    FromOptimizer,
    GradientFlow,
    Identity,
    InverseOperator,
    Jacobi,
    Neumann,
    NormalEquations,
    Nystrom,
    OneStep,
    SingleLoop,
    Solver,
    SolverState,
)
from auxfast.train import CombinerConfig, Component, RunConfig, TrainConfig, Trainer, make_training_loss, parse_method
from auxfast.train.task import Batch

cuda = pytest.mark.cuda
DEVICES = ("cpu", "cuda")
TASKS, ROWS, FEATURES = 3, 24, 5


class Problem:
    """A network of 33 weights with an output for each task, losses that a combiner mixes, and a weight decay that makes
    the inner loss convex, with a Hessian between 1 and some tens. The outer loss is that of the first task on other
    data. All numbers are drawn on the CPU, so that they are the same on every device."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(FEATURES, 3), nn.Tanh(), nn.Linear(3, TASKS), nn.Linear(TASKS, TASKS, bias=False))
        self.net = net.to(device, dtype)
        self.combiner = NonlinearCombiner(TASKS, (10, 10), main=0).to(device, dtype)
        data = torch.randn(4, ROWS, FEATURES).to(device, dtype)
        self.x, self.outer_x = data[:2]
        self.y, self.outer_y = data[2:, :, :TASKS]
        self.inner_params, self.outer_params = list(self.net.parameters()), list(self.combiner.parameters())

    def inner_with_outputs(self, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        outputs = self.net(self.x[rows])
        decay = sum(w.square().sum() for w in self.inner_params)
        return self.combiner((outputs - self.y[rows]).square()) + 0.5 * decay, outputs

    def inner(self) -> Tensor:
        return self.inner_with_outputs()[0]

    def outer(self) -> Tensor:
        return (self.net(self.outer_x) - self.outer_y)[:, 0].square().mean()

    def hypergradient(self, solver: Solver, as_functions: bool = True, **options: Any) -> HypergradientResult:
        losses = (self.outer, self.inner) if as_functions else (self.outer(), self.inner())
        return hypergradient(*losses, self.inner_params, self.outer_params, solver=solver, warn=False, **options)


def stepped(kind: type[torch.optim.Optimizer], problem: Problem, **settings: Any) -> torch.optim.Optimizer:
    """An optimizer of the inner parameters that has taken three steps."""
    optimizer = kind(problem.inner_params, **settings)

    def closure() -> float:
        optimizer.zero_grad()
        loss = problem.inner()
        loss.backward()
        return float(loss.detach())

    for _ in range(3):
        optimizer.step(closure)
    return optimizer


def halved(vectors: Sequence[Tensor]) -> list[Tensor]:
    return [v / 2 for v in vectors]


SOLVERS: dict[str, Callable[[Problem], Solver]] = {
    "the default": lambda _: DEFAULT_SOLVER,
    "Identity": lambda _: Identity(0.1),
    "OneStep": lambda _: OneStep(0.1),
    "OneStep, lookahead": lambda _: OneStep(0.1, lookahead=True),
    "OneStep, difference": lambda _: OneStep(0.1, mixed="difference"),
    "SAMA, SGD": lambda p: SAMA(stepped(torch.optim.SGD, p, lr=0.01, momentum=0.9), mixed="exact"),
    "SAMA, Adam": lambda p: SAMA(stepped(torch.optim.Adam, p, lr=0.01)),
    "SingleLoop": lambda _: SingleLoop(0.05),
    "Neumann": lambda _: Neumann(20, 0.05),
    "Neumann, not certified": lambda _: Neumann(20, 0.05, certify=False),
    "Neumann, damped": lambda _: Neumann(20, 0.05, damping=0.1),
    "Neumann, tolerance": lambda _: Neumann(500, 0.05, tol=1e-9),
    "Neumann, auto": lambda _: Neumann(500, tol=1e-9),
    "Chebyshev": lambda _: Chebyshev(200, (0.5, 40.0), tol=1e-9),
    "Chebyshev, auto": lambda _: Chebyshev(200, tol=1e-9),
    "Chebyshev, Jacobi": lambda _: Chebyshev(200, tol=1e-9, preconditioner=Jacobi()),
    "CG": lambda _: ConjugateGradient(tol=1e-9),
    "CG, a few steps": lambda _: ConjugateGradient(5, tol=None),
    "CG, Jacobi": lambda _: ConjugateGradient(tol=1e-9, preconditioner=Jacobi()),
    "CG, Nystrom": lambda _: ConjugateGradient(tol=1e-9, preconditioner=Nystrom(10)),
    "CG, Adam": lambda p: ConjugateGradient(tol=1e-9, preconditioner=FromOptimizer(stepped(torch.optim.Adam, p))),
    "CG, LBFGS": lambda p: ConjugateGradient(
        tol=1e-9, preconditioner=FromOptimizer(stepped(torch.optim.LBFGS, p, lr=0.1, max_iter=2))
    ),
    "CG, an inverse": lambda _: ConjugateGradient(tol=1e-9, preconditioner=InverseOperator(halved)),
    "MINRES": lambda _: MINRES(tol=1e-9),
    "MINRES, a few steps": lambda _: MINRES(5, tol=None),
    "MINRES, Jacobi": lambda _: MINRES(tol=1e-9, preconditioner=Jacobi()),
    "CompactMINRES": lambda _: CompactMINRES(tol=1e-9),
    "CompactMINRES, on the CPU": lambda _: CompactMINRES(tol=1e-9, device="cpu"),
    "GMRES": lambda _: GMRES(tol=1e-9),
    "NormalEquations": lambda _: NormalEquations(tol=1e-9),
    "Nystrom": lambda _: Nystrom(100, tol=1e-9),
    "Dense": lambda _: Dense(tol=1e-9),
    "GradientFlow": lambda _: GradientFlow(2.0, 30, tol=1e-9),
    "GradientFlow, floored": lambda _: GradientFlow(2.0, 30, floored=True, tol=1e-9),
}
NEED_FUNCTIONS = {"OneStep, lookahead", "OneStep, difference", "SAMA, Adam"}
NOT_FLOAT64 = {"OneStep, difference": 1e-6, "SAMA, Adam": 1e-6}
"""Relative errors of what is made of differences, which keep half of the digits."""


def relative_difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    a, b = (torch.cat([tensor.detach().cpu().double().reshape(-1) for tensor in some]) for some in (one, other))
    return float((a - b).norm() / b.norm())


def on_each_device(result: Callable[[Problem], Any], dtype: torch.dtype = torch.float64) -> list[Any]:
    return [result(Problem(device, dtype)) for device in DEVICES]


def assert_same(on_cpu: HypergradientResult, on_gpu: HypergradientResult, rtol: float) -> None:
    """The GPU's result is the CPU's but for rounding, and so are the statistics but for the number of products: a GPU
    asks less often whether to stop."""
    assert all(grad.device.type == DEVICES[1] for grad in on_gpu.grads)
    assert relative_difference(on_gpu.grads, on_cpu.grads) <= rtol
    assert on_gpu.direct_only == on_cpu.direct_only
    for name in ("converged", "stop_reason", "negative_curvature"):
        assert getattr(on_gpu.stats, name) == getattr(on_cpu.stats, name), name


def test_all_public_solvers_preconditioners_and_curvatures_are_here():
    offered = [getattr(auxfast.solvers, name) for name in auxfast.solvers.__all__]
    classes = [kind for kind in offered if inspect.isclass(kind) and dataclasses.is_dataclass(kind)]
    kinds = {
        kind for kind in classes if (hasattr(kind, "solve") or hasattr(kind, "build")) and not inspect.isabstract(kind)
    }
    tested = [make(Problem("cpu")) for make in SOLVERS.values()]
    preconditioners = {type(getattr(solver, "preconditioner", None)) for solver in tested} - {type(None)}
    assert kinds == {type(solver) for solver in tested} | preconditioners | {BlockDiagonal}
    assert set(CURVATURES) == set(get_args(CurvatureName))


@cuda
@pytest.mark.parametrize("as_functions", [False, True], ids=["tensors", "functions"])
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver(name, as_functions):
    if name in NEED_FUNCTIONS and not as_functions:
        pytest.skip("evaluates a loss at other parameters")
    results = on_each_device(lambda problem: problem.hypergradient(SOLVERS[name](problem), as_functions))
    assert_same(*results, NOT_FLOAT64.get(name, 1e-7))


@cuda
@pytest.mark.parametrize("name", ["the default", "SingleLoop", "Neumann, auto", "CG, Nystrom", "MINRES, Jacobi"])
def test_state_is_carried_from_call_to_call(name):
    def third(problem: Problem) -> HypergradientResult:
        solver, state = SOLVERS[name](problem), SolverState()
        results = [problem.hypergradient(solver, state=state) for _ in range(3)]
        return results[-1]

    assert_same(*on_each_device(third), 1e-7)


CURVATURES: dict[CurvatureName, float] = {
    "hessian": 1e-9,
    "gauss-newton": 1e-9,
    "hessian-jvp": 1e-9,
    "finite-difference": 1e-5,
}
"""Relative differences between devices that rounding may make."""


@cuda
@pytest.mark.parametrize("solver", [MINRES(40, tol=None), Neumann(20, 0.05), Dense()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", CURVATURES)
def test_every_curvature(name, solver):
    def result(problem: Problem) -> HypergradientResult:
        inner = problem.inner_with_outputs if name == "gauss-newton" else problem.inner
        given = problem.outer, inner, problem.inner_params, problem.outer_params
        return hypergradient(*given, solver=solver, curvature=name, warn=False)

    on_cpu, on_gpu = on_each_device(result)
    assert relative_difference(on_gpu.grads, on_cpu.grads) <= CURVATURES[name]


@cuda
@pytest.mark.parametrize("kind", [curvature.Hessian, curvature.GaussNewton])
def test_products_of_the_public_matrices(kind):
    def whole(problem: Problem) -> list[Tensor]:
        given = problem.inner_with_outputs if kind is curvature.GaussNewton else problem.inner
        matrix = kind(given, problem.inner_params)
        identity = torch.eye(len(matrix.matvec(torch.cat([w.detach().reshape(-1) for w in problem.inner_params]))))
        dense = matrix.matmat(identity.to(problem.x))
        return [dense, torch.stack([matrix.matvec(column) for column in identity.to(problem.x)[:3]])]

    (dense, rows), on_gpu = on_each_device(whole)
    assert relative_difference(on_gpu, (dense, rows)) <= 1e-12
    torch.testing.assert_close(on_gpu[1], on_gpu[0][:3])


@cuda
@pytest.mark.parametrize("as_functions", [False, True], ids=["tensors", "functions"])
def test_the_default_in_float32(as_functions):
    results = on_each_device(lambda problem: problem.hypergradient(DEFAULT_SOLVER, as_functions), torch.float32)
    assert_same(*results, 1e-3)


@cuda
@pytest.mark.parametrize(
    "solver", [MINRES(tol=1e-9), Neumann(20, 0.05), GMRES(tol=1e-9)], ids=lambda s: type(s).__name__
)
def test_problems_side_by_side(solver):
    """One network, adapted to each of three data sets."""

    def result(problem: Problem) -> HypergradientResult:
        stacked = [torch.stack([w, 0.9 * w, 1.1 * w]).detach().requires_grad_() for w in problem.inner_params]
        names = [name for name, _ in problem.net.named_parameters()]

        def losses(params: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
            outputs = torch.func.functional_call(problem.net, dict(zip(names, params, strict=True)), (x,))
            return (outputs - y).square()

        def inner() -> Tensor:
            terms = []
            for i in range(3):
                params = [w[i] for w in stacked]
                decay = sum(w.square().sum() for w in params)
                terms.append(problem.combiner(losses(params, problem.x[i:], problem.y[i:])) + 0.5 * decay)
            return torch.stack(terms).sum()

        def outer() -> Tensor:
            return sum(losses([w[i] for w in stacked], problem.outer_x, problem.outer_y)[:, 0].mean() for i in range(3))

        return hypergradient(outer, inner, stacked, problem.outer_params, solver=BlockDiagonal(solver), warn=False)

    assert_same(*on_each_device(result), 1e-7)


@cuda
def test_implicit_minimum_and_its_second_derivative():
    def result(problem: Problem) -> tuple[Tensor, ...]:
        names = dict(problem.net.named_parameters())
        w = implicit_minimum(problem.inner, names, problem.outer_params, solver=MINRES(tol=1e-12), warn=False)
        outputs = torch.func.functional_call(problem.net, w, (problem.outer_x,))
        outer = (outputs - problem.outer_y)[:, 0].square().mean()
        grads = torch.autograd.grad(outer, problem.outer_params, create_graph=True)
        (second,) = torch.autograd.grad(sum(grad.square().sum() for grad in grads), problem.outer_params)
        return grads[0], second

    with auxfast.reference_kernels():  # which have a third derivative
        on_cpu, on_gpu = on_each_device(result)
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert relative_difference([one], [other]) <= 1e-7


@cuda
@pytest.mark.parametrize(
    "solver", [GMRES(tol=1e-10), NormalEquations(tol=1e-10), Dense()], ids=lambda s: type(s).__name__
)
def test_implicit_root(solver):
    def result(problem: Problem) -> list[Tensor]:
        phi, w = problem.x[0].abs().add(3).requires_grad_(), problem.x[1].clone().requires_grad_()
        matrix = problem.x[2 : 2 + FEATURES]
        (root,) = implicit_root(lambda: matrix @ w + phi * w - 2 * phi, [w], [phi], solver=solver, warn=False)
        root.sin().sum().backward()
        return [phi.grad]

    on_cpu, on_gpu = on_each_device(result)
    assert relative_difference(on_gpu, on_cpu) <= 1e-8


@cuda
def test_micro_batches_are_one_large_batch():
    def result(problem: Problem, in_parts: bool) -> HypergradientResult:
        parts = [slice(0, 7), slice(7, 18), slice(18, ROWS)] if in_parts else [slice(None)]
        weights = [len(problem.x[part]) for part in parts]
        inner = MicroBatches(lambda part: problem.inner_with_outputs(part)[0], parts, weights)
        return hypergradient(problem.outer, inner, problem.inner_params, problem.outer_params, solver=MINRES(tol=1e-9))

    whole, on_gpu = result(Problem("cpu"), False), result(Problem(DEVICES[1]), True)
    assert_same(whole, on_gpu, 1e-7)


@cuda
def test_fresh_batches_draw_the_same_on_each_device():
    def result(problem: Problem) -> HypergradientResult:
        torch.manual_seed(1)
        batches = [slice(0, 8), slice(8, 16), slice(16, ROWS)]
        inner = FreshBatches(lambda part: problem.inner_with_outputs(part)[0], batches)
        solver = Neumann(7, 0.05, certify=False)
        return hypergradient(problem.outer, inner, problem.inner_params, problem.outer_params, solver=solver)

    assert_same(*on_each_device(result), 1e-9)


@cuda
def test_usefulness_of_auxiliary_losses():
    def result(problem: Problem) -> list[Tensor]:
        errors = (problem.net(problem.x) - problem.y).square().mean(0)
        main = errors[0] + 0.5 * sum(w.square().sum() for w in problem.inner_params)
        found = auxiliary_usefulness(problem.outer(), main, errors[1:], problem.inner_params, solver=MINRES(tol=1e-9))
        return [found.scores, found.normalized_scores]

    on_cpu, on_gpu = on_each_device(result)
    assert relative_difference(on_gpu, on_cpu) <= 1e-7


@cuda
def test_dropout_draws_the_same_masks_within_one_call():
    """The Hessian is one matrix, so that its certificate holds; and the random state is put back."""
    problem = Problem(DEVICES[1])
    problem.net.insert(2, nn.Dropout(0.3))
    before = torch.get_rng_state() if DEVICES[1] == "cpu" else torch.cuda.get_rng_state()
    first, again = (problem.hypergradient(MINRES(tol=1e-9)) for _ in range(2))
    after = torch.get_rng_state() if DEVICES[1] == "cpu" else torch.cuda.get_rng_state()
    assert first.stats.converged
    assert torch.equal(before, after)
    assert all(torch.equal(a, b) for a, b in zip(first.grads, again.grads, strict=True))


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_scaled_loss(dtype):
    """A loss scale changes no digit; narrow forward passes change the hypergradient by their rounding."""
    device = DEVICES[1]
    exact = Problem(device, torch.float32).hypergradient(MINRES(20, tol=None))
    problem, scaler = Problem(device, torch.float32), GradScaler(device, init_scale=256.0)

    def narrow(scaled: bool) -> HypergradientResult:
        def wide(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
            def of_outputs() -> Tensor:
                with torch.autocast(device, dtype):
                    value = loss()
                return scaler.scale(value) if scaled else value

            return of_outputs

        given = wide(problem.outer), wide(problem.inner), problem.inner_params, problem.outer_params
        return hypergradient(*given, solver=MINRES(20, tol=None), warn=False)

    plain, scaled = narrow(False), narrow(True)
    assert all(torch.equal(a, b) for a, b in zip(plain.grads, scaled.grads, strict=True))
    assert relative_difference(plain.grads, exact.grads) <= 0.1


@cuda
def test_verify_hypergradient():
    report_on_cpu, report_on_gpu = on_each_device(
        lambda problem: auxfast.verify_hypergradient(
            problem.outer, problem.inner, problem.inner_params, problem.outer_params, max_directions=2
        )
    )
    assert report_on_gpu.verdict == report_on_cpu.verdict


@cuda
@pytest.mark.parametrize("name", ["the default", "SingleLoop", "OneStep", "CompactMINRES"])
def test_outer_steps(name):
    """Three outer steps, each after two inner ones."""

    def trained(problem: Problem) -> list[Tensor]:
        inner = torch.optim.SGD(problem.inner_params, lr=0.02)
        sgd = torch.optim.SGD(problem.outer_params, lr=0.1, momentum=0.9)
        outer = HyperOptimizer(sgd, solver=SOLVERS[name](problem), max_grad_norm=0.1, project=[problem.combiner])
        for _ in range(3):
            for _ in range(2):
                inner.zero_grad()
                problem.inner().backward()
                inner.step()
            outer.step(problem.outer(), problem.inner(), problem.inner_params)
        return [*problem.outer_params, *problem.inner_params]

    on_cpu, on_gpu = on_each_device(trained)
    assert relative_difference(on_gpu, on_cpu) <= 1e-8


class Regression:
    """`Problem` as a task of the trainer, on the whole of its data."""

    loss_names = ("main", "first", "second")
    main = 0

    def __init__(self, device: str) -> None:
        self.problem = Problem(device)
        self.model = self.problem.net

    def training_batch(self, generator: torch.Generator) -> Batch:
        return Batch((self.model(self.problem.x) - self.problem.y).square(), None)

    def outer_loss(self) -> Tensor:
        return self.problem.outer()

    @torch.no_grad()
    def validation_score(self) -> float:
        return -self.outer_loss().item()

    score = validation_score


@cuda
@pytest.mark.parametrize("method", ["linear", "nonlinear", "dwa", "uncertainty"])
def test_the_trainer(method):
    def records(device: str) -> list[tuple[float, ...]]:
        optimizer = Component("SGD", {"lr": 0.05, "momentum": 0.9})
        train = TrainConfig(
            outer_steps=4, inner_steps=3, inner_optimizer=optimizer, outer_optimizer=optimizer, device=device
        )
        task, config = Regression(device), RunConfig(train, CombinerConfig(hidden=(4,)))
        torch.manual_seed(0)
        loss = make_training_loss(parse_method(method), config, task).to(device, torch.float64)
        return [tuple(record.loss_weights) for record in Trainer(task, loss, train, 0).run()]

    on_cpu, on_gpu = (torch.tensor(records(device)) for device in DEVICES)
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-6, atol=1e-9)
