"""GraphedHypergradient without a GPU: the operations that a CUDA graph would hold are those of the eager call, and ask
nothing of the host."""

from __future__ import annotations

import dataclasses
import gc
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import auxfast
from auxfast import GraphedHypergradient, HyperOptimizer, MicroBatches, NotFiniteError, hypergradient, reference_kernels
from auxfast.nn import NonlinearCombiner
from auxfast.solvers import DEFAULT_SOLVER, MINRES, ConjugateGradient, Dense, Identity, Neumann, SolverState

from .test_random_problems import Problem, assert_true

ROWS, TASKS = 8, 3
SOLVERS = {
    "Neumann": Neumann(6, 0.05),
    "a series that grows": Neumann(6, 2.0),
    "not certified": Neumann(3, 0.05, certify=False),
    "conjugate gradients": ConjugateGradient(5, tol=None, damping=3.0),
    "MINRES": MINRES(5, tol=None),
    "chunks": MINRES(40, tol=1e-3, damping=1.0),
    "identity": Identity(0.1),
}
Inputs = tuple[Sequence[Tensor], Sequence[Tensor]]


class Bilevel:
    """A network with an output for each task, and a combiner of their losses."""

    def __init__(self, *middle: nn.Module, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 6), *(middle or (nn.Tanh(),)), nn.Linear(6, TASKS)).to(dtype)
        self.combiner = NonlinearCombiner(TASKS, (4,), main=0).to(dtype)
        self.w, self.phi = list(self.net.parameters()), list(self.combiner.parameters())
        self.factor: Callable[[Tensor], Any] = lambda x: 1
        self.dtype = dtype

    def outer_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.net(x) - y)[:, 0].square().mean()

    def inner_loss(self, x: Tensor, y: Tensor) -> Tensor:
        decay = sum(p.square().sum() for p in self.w)
        return self.factor(x) * self.combiner((self.net(x) - y).square()) + 0.2 * decay

    def inputs(self, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        x, y, ox, oy = (torch.randn(ROWS, k, generator=generator).to(self.dtype) for k in (4, TASKS, 4, TASKS))
        return (ox, oy), (x, y)

    def graphed(self, solver: Any = DEFAULT_SOLVER, **options: Any) -> GraphedHypergradient:
        outer, inner = self.inputs(0)
        settings = {"outer_inputs": outer, "inner_inputs": inner, "solver": solver, "warn": False, **options}
        return GraphedHypergradient(self.outer_loss, self.inner_loss, self.w, self.phi, **settings)

    def eager(self, inputs: Inputs, solver: Any, state: SolverState | None = None) -> auxfast.HypergradientResult:
        losses = (lambda: self.outer_loss(*inputs[0])), (lambda: self.inner_loss(*inputs[1]))
        return hypergradient(*losses, self.w, self.phi, solver=solver, state=state, warn=False)


def assert_equal(result: Any, wanted: Any, rtol: float = 1e-10) -> None:
    for grad, like in zip(result.grads, wanted.grads, strict=True):
        torch.testing.assert_close(grad, like, rtol=rtol, atol=rtol * float(like.abs().max()), equal_nan=True)
    stats, eager = result.stats, wanted.stats
    # That of an eager Krylov solver may be of its recurrence, and is then raised by what it may be off.
    assert stats.residual == pytest.approx(eager.residual, rel=0.01, nan_ok=True)
    assert (stats.iterations, stats.stop_reason, stats.converged) == (
        eager.iterations,
        eager.stop_reason,
        eager.converged,
    )
    assert stats.negative_curvature == eager.negative_curvature
    assert result.direct_only == wanted.direct_only


@pytest.fixture
def _same_products():
    """Lanczos vectors make much of rounding, and so of the way that products are computed."""
    with auxfast.engine_only():
        yield


@pytest.mark.usefixtures("_same_products")
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_calls_are_the_eager_ones_at_new_inputs_and_after_steps_in_place(solver):
    problem = Bilevel()
    graphed = problem.graphed(solver)
    sgd = torch.optim.SGD([*problem.w, *problem.phi], lr=0.01)
    for seed in range(3):
        inputs = problem.inputs(seed)
        result = graphed(*inputs)
        assert_equal(result, problem.eager(inputs, solver))
        problem.inner_loss(*inputs[1]).backward()
        sgd.step()


@pytest.mark.usefixtures("_same_products")
def test_a_warm_start_goes_from_call_to_call_until_reset():
    problem = Bilevel()
    graphed = problem.graphed()
    for _ in range(2):
        state = SolverState()
        for seed in (1, 1, 2):
            inputs = problem.inputs(seed)
            assert_equal(graphed(*inputs), problem.eager(inputs, DEFAULT_SOLVER, state), rtol=1e-8)
        graphed.reset()


def static_solver(problem: Problem) -> Any:
    """That of the problem, if it can be static, or another."""
    solver = problem.solver
    if isinstance(solver, (MINRES, ConjugateGradient)):
        return dataclasses.replace(solver, preconditioner=None)
    if isinstance(solver, Neumann) and solver.step_size != "auto":
        return solver
    return MINRES(20, 1e-6)


@pytest.mark.parametrize("first", [0, *(pytest.param(first, marks=pytest.mark.slow) for first in (8, 24, 40))])
def test_what_is_said_of_random_problems_is_true(first):
    for seed in range(first, first + (16 if first else 8)):
        problem = Problem.of(seed)
        problem.solver = static_solver(problem)
        if problem.curvature == "finite-difference":
            problem.curvature = "hessian"
        has_outputs = problem.curvature == "gauss-newton"

        def inner(problem: Problem = problem, has_outputs: bool = has_outputs) -> Any:
            outputs = problem.outputs(problem.w)
            loss = problem.inner_loss(problem.w, outputs)
            return (loss, outputs) if has_outputs else loss

        settings = {"solver": problem.solver, "curvature": problem.curvature, "warn": False}
        result = GraphedHypergradient(problem.outer_loss, inner, problem.w, problem.phi, **settings)()
        try:
            assert_true(problem, result)
        except Exception as error:
            raise AssertionError(f"problem {seed}: {problem.dtype}, {problem.solver}") from error


class NothingOfTheHost(TorchDispatchMode):
    """Counts what reads a number, or makes one of the host a tensor."""

    ASKING = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "lift_fresh", "unique", "item")

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in self.ASKING or any(i is not None and i.dtype == torch.bool for i in indices):
            self.asked.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernels", ["native", "reference"])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_a_call_asks_nothing_of_the_host_but_after_a_chunk(solver, kernels):
    problem = Bilevel()
    with reference_kernels() if kernels == "reference" else nullcontext():
        graphed = problem.graphed(solver)
        with NothingOfTheHost() as host:
            graphed(*problem.inputs(1))
    looks = ["aten::_local_scalar_dense"] * (1 if solver is SOLVERS["chunks"] else 0)
    assert host.asked[: len(looks)] == looks
    assert set(host.asked) <= set(looks)


def test_products_go_through_a_pass_of_our_own_unless_the_engine_is_asked_for():
    problem = Bilevel()
    solver, inputs = Neumann(4, 0.05), problem.inputs(1)
    with auxfast.engine_only():
        by_engine = problem.graphed(solver)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = problem.graphed(solver)
    ours = problem.graphed(solver)
    passes = [graphed._static._has_own_pass for graphed in (ours, by_engine, under_autocast)]
    assert passes == [True, False, False]
    assert_equal(ours(*inputs), by_engine(*inputs))


def test_a_loss_that_a_grad_scaler_has_scaled_is_that_loss():
    problem = Bilevel(dtype=torch.float32)
    plain, solver, inputs = problem.inner_loss, Neumann(4, 0.05), problem.inputs(1)
    wanted = problem.eager(inputs, solver)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    problem.inner_loss = lambda x, y: scaler.scale(plain(x, y))
    assert_equal(problem.graphed(solver)(*inputs), wanted, rtol=1e-4)


class DoublesBackward(torch.autograd.Function):
    """A function whose backward pass calls torch, as a hook does."""

    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_functions_of_the_user_go_as_the_eager_call_goes():
    problem = Bilevel()
    problem.factor = lambda x: DoublesBackward.apply(problem.phi[0].sum()) * 0.1 + 1
    solver, inputs = Neumann(4, 0.05), problem.inputs(1)
    assert_equal(problem.graphed(solver)(*inputs), problem.eager(inputs, solver))


def test_parameters_that_play_no_part_or_require_no_gradient():
    problem = Bilevel()
    unused, frozen = (torch.ones(2, dtype=torch.float64, requires_grad=flag) for flag in (True, False))
    narrow = torch.ones(3, requires_grad=True)
    problem.w += [unused, frozen]
    problem.phi += [torch.ones(2, requires_grad=True), torch.ones(2), narrow]
    problem.net[0].bias.requires_grad_(False)
    solver, inputs = MINRES(5, tol=None), problem.inputs(1)
    result = problem.graphed(solver)(*inputs)
    assert_equal(result, problem.eager(inputs, solver), rtol=1e-8)
    assert [(g.dtype, g.shape) for g in result.grads] == [(phi.dtype, phi.shape) for phi in problem.phi]
    assert not any(grad.any() for grad in result.grads[-3:])


def test_results_are_the_callers_to_keep():
    problem = Bilevel()
    graphed = problem.graphed(Neumann(4, 0.05))
    first = graphed(*problem.inputs(1))
    kept = [grad.clone() for grad in first.grads]
    graphed(*problem.inputs(2))
    assert all(torch.equal(grad, copy) for grad, copy in zip(first.grads, kept, strict=True))
    assert_equal(first, problem.eager(problem.inputs(1), Neumann(4, 0.05)))


def test_losses_leave_no_trace():
    problem = Bilevel(nn.BatchNorm1d(6), nn.Dropout(0.5))
    graphed = problem.graphed(Neumann(4, 0.05))
    mean, state = problem.net[1].running_mean.clone(), torch.get_rng_state()
    result = graphed(*problem.inputs(1))
    assert torch.equal(problem.net[1].running_mean, mean)
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(result, problem.eager(problem.inputs(1), Neumann(4, 0.05)))  # of the same masks


def test_each_loss_finds_the_buffers_as_they_were():
    """Both losses move the vectors of spectral normalisation on."""
    problem = Bilevel()
    nn.utils.parametrizations.spectral_norm(problem.net[0])
    problem.w = list(problem.net.parameters())
    solver, inputs = Neumann(4, 0.05), problem.inputs(1)
    assert_equal(problem.graphed(solver)(*inputs), problem.eager(inputs, solver))


def test_an_object_is_freed_with_its_last_reference():
    """Its graphs hold much memory: nothing waits until garbage is collected."""
    gc.collect()
    gc.disable()
    try:
        graphed = Bilevel().graphed(MINRES(3, tol=None))
        kept = [weakref.ref(graphed), weakref.ref(graphed._static)]
        del graphed
        assert [each() for each in kept] == [None, None]
    finally:
        gc.enable()


def test_the_default_device_of_torch_is_of_no_matter():
    problem = Bilevel()
    (outer, inner), solver = problem.inputs(1), MINRES(30, tol=1e-3)
    with torch.device("meta"):
        result = problem.graphed(solver, outer_inputs=outer, inner_inputs=inner)(outer, inner)
        assert result.stats.converged
    assert_equal(result, problem.eager((outer, inner), solver), rtol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_may_be_in_any_mode(mode):
    problem = Bilevel()
    with mode():
        result = problem.graphed(Neumann(4, 0.05))(*problem.inputs(1))
    assert not result.grads[0].is_inference()
    assert_equal(result, problem.eager(problem.inputs(1), Neumann(4, 0.05)))


def test_autocast_is_that_of_the_construction():
    problem = Bilevel(dtype=torch.float32)
    solver, inputs = Neumann(4, 0.05), problem.inputs(1)
    with torch.autocast("cpu", torch.bfloat16):
        graphed, wanted = problem.graphed(solver), problem.eager(inputs, solver)
    plain = problem.graphed(solver)
    assert_equal(graphed(*inputs), wanted, rtol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        again = plain(*inputs)
    assert_equal(again, problem.eager(inputs, solver), rtol=1e-4)


def test_an_optimizer_steps_along_results_as_along_the_losses():
    problems = [Bilevel() for _ in range(2)]
    solver, inputs = Neumann(4, 0.05), problems[0].inputs(1)
    optimizers = [
        HyperOptimizer(
            torch.optim.SGD(problem.phi, lr=0.1), solver=solver, max_grad_norm=0.01, project=[problem.combiner]
        )
        for problem in problems
    ]
    graphed = problems[0].graphed(solver)
    for _ in range(2):
        optimizers[0].accumulate_result(graphed(*inputs))
        stats = optimizers[0].step()
        losses = (lambda: problems[1].outer_loss(*inputs[0])), (lambda: problems[1].inner_loss(*inputs[1]))
        wanted = optimizers[1].step(*losses, problems[1].w)
        assert stats.residual == pytest.approx(wanted.residual)
        torch.testing.assert_close(problems[0].phi[0], problems[1].phi[0])
    (outer, (x, y)), before = inputs, problems[0].phi[0].clone()
    assert optimizers[0].accumulate_result(graphed(outer, (x, y * math.nan))).stop_reason == "not finite"
    with pytest.warns(RuntimeWarning, match="outer step was skipped.*NaN"):
        optimizers[0].step()
    assert torch.equal(problems[0].phi[0], before)
    with pytest.raises(ValueError, match="same outer_params"):
        HyperOptimizer(torch.optim.SGD(problems[0].w, lr=0.1)).accumulate_result(graphed(*inputs))
    with pytest.raises(TypeError, match=r"result must be what .* returns, not a tuple: accumulate\(\) takes losses"):
        optimizers[0].accumulate_result(graphed(*inputs).grads)


# ----------------------------------------------------------------------------------------- what is said when it is read


def test_warnings_come_with_the_stats_and_once():
    problem = Bilevel()
    graphed = problem.graphed(MINRES(1, tol=1e-6), warn=True)
    result = graphed(*problem.inputs(1))
    with pytest.warns(RuntimeWarning, match="not solved to the solver's tol") as given:
        assert result.stats.iterations == 1
    assert given[0].filename == __file__  # where the stats are read
    assert not result.stats.converged
    assert graphed(*problem.inputs(2)).stats.residual < 1


@pytest.mark.parametrize(
    ("solver", "match"),
    [
        (Neumann(5, 1e3), "diverged"),
        (Neumann(1, 1e-9), "little more than the identity"),
        (ConjugateGradient(3, tol=None), "curves downwards"),
        (MINRES(3, tol=None, damping=9.0), None),
    ],
    ids=repr,
)
def test_the_warnings_are_those_of_the_eager_call(solver, match):
    problem = Bilevel()
    graphed = problem.graphed(solver, warn=True)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        _ = graphed(*problem.inputs(1)).stats
    texts = [str(warning.message) for warning in given]
    assert len(texts) == (match is not None)
    assert match is None or match in texts[0]


def test_no_dependence_and_no_curvature_are_warned_of():
    w, phi = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.zeros((), dtype=torch.float64)
    options = {"inner_inputs": (weight,), "solver": MINRES(3)}

    def outer() -> Tensor:
        return (w * phi).sum()

    graphed = GraphedHypergradient(outer, lambda a: a * (w - 1).pow(4).sum(), [w], [phi], **options)
    with pytest.warns(RuntimeWarning, match="only the direct gradient"):
        assert graphed((), (weight,)).direct_only
    graphed = GraphedHypergradient(outer, lambda a: a * (w * phi - 1).square().sum(), [w], [phi], **options)
    with pytest.warns(RuntimeWarning, match="no curvature along"):
        assert graphed((), (weight,)).direct_only


@pytest.mark.usefixtures("_same_products")
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_what_is_not_finite_is_nan_at_once_and_an_error_when_it_is_read(solver):
    problem = Bilevel()
    graphed = problem.graphed(solver)
    (ox, oy), (x, y) = problem.inputs(1)
    for inputs, match in (
        (((ox * math.nan, oy), (x, y)), "gradients of outer_loss in inner_params hold NaN"),
        (((ox * math.inf, oy), (x, y)), "gradients of outer_loss in inner_params"),
        (((ox, oy), (x, y * math.nan)), "second derivatives of inner_loss in inner_params hold"),
    ):
        result = graphed(*inputs)
        assert all(grad.isnan().all() for grad in result.grads)
        with pytest.raises(NotFiniteError, match=match):
            _ = result.stats
    assert_equal(graphed((ox, oy), (x, y)), problem.eager(((ox, oy), (x, y)), solver))


def test_mixed_derivatives_that_are_not_finite_are_named():
    w, phi = (torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    graphed = GraphedHypergradient(
        lambda: w.sum(), lambda a: (w.square() + w * (phi - a).sqrt()).sum(), [w], [phi], inner_inputs=[torch.zeros(2)]
    )
    assert graphed((), [torch.zeros(2)]).stats.converged
    with pytest.raises(NotFiniteError, match="mixed second derivatives of inner_loss"):
        _ = graphed((), [torch.full((2,), 0.5)]).stats


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"solver": Dense()}, TypeError, "Dense"),
        ({"solver": Neumann()}, ValueError, "step_size='auto'"),
        ({"solver": None}, TypeError, "solver must be"),
        ({"curvature": "finite-difference"}, ValueError, "not 'finite-difference'"),
        ({"inner_inputs": torch.ones(3)}, TypeError, "inner_inputs must be a tuple or a list"),
        ({"inner_inputs": [torch.ones(3), 2]}, TypeError, "number 1 is a int"),
    ],
)
def test_what_cannot_be_static_is_refused_by_name(options, error, match):
    with pytest.raises(error, match=match):
        Bilevel().graphed(**options)


def test_losses_that_are_no_functions_are_refused():
    problem = Bilevel()
    outer, inner = problem.inputs(0)
    loss = problem.inner_loss(*inner)
    micro_batches = MicroBatches(problem.inner_loss, [inner])
    fresh = auxfast.FreshBatches(lambda batch: problem.inner_loss(*batch), [inner])
    for given in (loss, [lambda: loss], micro_batches, fresh):
        with pytest.raises(TypeError, match=f"inner_loss must be one function.*{type(given).__name__}"):
            GraphedHypergradient(problem.outer_loss, given, problem.w, problem.phi, outer_inputs=outer)


def test_parameters_that_do_not_stay_are_refused():
    w, phi = (torch.ones(2, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match=r"inner_params\[0\] must be a leaf"):
        GraphedHypergradient(lambda: w.sum(), lambda: (w * phi).sum(), [2 * w], [phi])
    with pytest.raises(ValueError, match="no second derivatives"):
        GraphedHypergradient(lambda: w.sum(), lambda: w.sum(), [w], [phi])


def test_inputs_unlike_the_examples_are_refused():
    problem = Bilevel()
    graphed = problem.graphed()
    (ox, oy), (x, y) = problem.inputs(1)
    with pytest.raises(ValueError, match=r"inner_inputs\[0\] must be of torch.float64 \(8, 4\) on cpu.*drop_last"):
        graphed((ox, oy), (x[1:], y))
    with pytest.raises(ValueError, match=r"outer_inputs\[1\] must be of torch.float64"):
        graphed((ox, oy.float()), (x, y))
    with pytest.raises(ValueError, match="inner_inputs must be 2 tensors"):
        graphed((ox, oy), (x,))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p: setattr(p.w[1], "data", p.w[1].data.clone()), r"inner_params\[1\] is no longer .* its memory"),
        (lambda p: p.phi[0].requires_grad_(False), r"outer_params\[0\] is no longer .* requires_grad was True"),
        (lambda p: setattr(p.w[4], "data", p.w[4].data.t()), r"inner_params\[4\] is no longer .* its strides"),
        (lambda p: p.net.eval(), "recorded with training=True"),
        (lambda p: p.net.float(), "is no longer what was recorded"),
        (lambda p: setattr(p.net[0], "weight", nn.Parameter(p.w[0].detach().clone())), "weight of a Linear .*replaced"),
        (lambda p: setattr(p.net[1], "running_var", p.net[1].running_var.clone()), "running_var of a BatchNorm1d"),
        (lambda p: HyperOptimizer.recommended(p.combiner), "positive='clip', and has positive='exp'"),
    ],
)
def test_parameters_and_modules_that_have_changed_are_an_error(change, match):
    problem = Bilevel(nn.BatchNorm1d(6), nn.Linear(6, 6))
    graphed = problem.graphed()
    change(problem)
    with pytest.raises(RuntimeError, match=f"(?s){match}.*make a new GraphedHypergradient"):
        graphed(*problem.inputs(1))
