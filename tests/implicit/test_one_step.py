"""One step in place of a solve: T1-T2, DARTS, SAMA and SOBA through the public calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import auxfast
from auxfast import HyperOptimizer, hypergradient
from auxfast.implicit.finite import NotFiniteError
from auxfast.nn import LinearCombiner
from auxfast.solvers import SAMA, OneStep, SingleLoop, Solver, SolverState

from .problems import Ridge

LR = 0.03
mixed_products = pytest.mark.parametrize("mixed", ["exact", "difference"])
lookaheads = pytest.mark.parametrize("lookahead", [False, True], ids=["present", "look-ahead"])


def away_from_the_minimum(problem: Ridge) -> Ridge:
    with torch.no_grad():
        problem.w += 0.3
    return problem


def of_solution(problem: Ridge, q: Tensor) -> tuple[Tensor, Tensor]:
    """The hypergradient in (decay, weights), at the w that is, where q is the solution of the linear system."""
    w, d = problem.w.detach(), problem.decay.detach()
    return -q * d.exp() * w + 2 * d, -(problem.x @ q) * (problem.x @ w - problem.y)


def ridge_gradients(problem: Ridge, solver: Solver, **options: object) -> tuple[Tensor, ...]:
    return hypergradient(
        problem.outer_loss, problem.inner_loss, [problem.w], [problem.decay, problem.weights], solver=solver, **options
    ).grads


class Network:
    """A small network with a weight for each sample of the inner loss and a weight decay of its own for each layer."""

    def __init__(self, dtype: torch.dtype = torch.float64, *extra: nn.Module) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), *extra, nn.Tanh(), nn.Linear(8, 3)).to(dtype)
        self.x, self.x_outer = torch.randn(2, 20, 4, dtype=dtype)
        self.y, self.y_outer = torch.randint(3, (2, 20))
        self.w = list(self.net.parameters())
        self.samples = torch.zeros(20, dtype=dtype, requires_grad=True)
        self.decay = torch.full((len(self.w),), -1.0, dtype=dtype, requires_grad=True)
        self.phi = [self.samples, self.decay]
        self.calls: list[str] = []

    def inner(self, w: Sequence[Tensor] | None = None, phi: Sequence[Tensor] | None = None) -> Tensor:
        self.calls.append("inner")
        samples, decay = self.phi if phi is None else phi
        w = self.w if w is None else w
        losses = F.cross_entropy(self._net(w)(self.x), self.y, reduction="none")
        return (samples.exp() * losses).mean() + sum(d.exp() * t.square().sum() for d, t in zip(decay, w, strict=True))

    def outer(self, w: Sequence[Tensor] | None = None, phi: Sequence[Tensor] | None = None) -> Tensor:
        self.calls.append("outer")
        samples, _ = self.phi if phi is None else phi
        loss = F.cross_entropy(self._net(self.w if w is None else w)(self.x_outer), self.y_outer)
        return loss + 0.1 * (samples - 0.5).square().sum()

    def _net(self, w: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        named = dict(zip(dict(self.net.named_parameters()), w, strict=True))
        return lambda x: torch.func.functional_call(self.net, named, x)

    def after_a_step(self, phi: Sequence[Tensor]) -> Tensor:
        """`outer(w - LR * d inner / d w, phi)`, with its graph."""
        w = [t.detach().requires_grad_() for t in self.w]
        grads = torch.autograd.grad(self.inner(w, phi), w, create_graph=True)
        return self.outer([t - LR * g for t, g in zip(w, grads, strict=True)], phi)

    def gradients(self, solver: Solver, **options: object) -> tuple[Tensor, ...]:
        return hypergradient(self.outer, self.inner, self.w, self.phi, solver=solver, **options).grads


# ------------------------------------------------------------------------------------------------------------- one step


@mixed_products
def test_one_step_is_the_closed_form_of_ridge(mixed):
    problem = away_from_the_minimum(Ridge())
    (b,) = torch.autograd.grad(problem.outer_loss(), problem.w)
    found = ridge_gradients(problem, OneStep(LR, mixed=mixed))
    torch.testing.assert_close(found, of_solution(problem, LR * b), rtol=1e-9, atol=1e-9)


@mixed_products
def test_look_ahead_is_the_derivative_of_an_unrolled_step(mixed):
    """The truth is that of autograd through the step, and of differences of the whole step, which need no autograd."""
    problem = Network()
    phi = [t.detach().clone().requires_grad_() for t in problem.phi]
    expected = torch.autograd.grad(problem.after_a_step(phi), phi)
    found = problem.gradients(OneStep(LR, lookahead=True, mixed=mixed))
    tolerance = 1e-9 if mixed == "exact" else 1e-4
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
    for which, i in ((0, 3), (1, 2)):
        ends = []
        for sign in (1, -1):
            moved = [t.detach().clone() for t in phi]
            moved[which][i] += sign * 1e-5
            ends.append(problem.after_a_step(moved).item())
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(found[which][i]), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@lookaheads
def test_the_difference_is_that_of_darts(dtype, lookahead):
    """Written out as DARTS has it, without a function of auxfast."""
    problem = Network(dtype)
    kept = [t.detach().clone() for t in problem.w]

    def move(vectors: Sequence[Tensor], alpha: float) -> None:
        with torch.no_grad():
            for t, k, v in zip(problem.w, kept, vectors, strict=True):
                t.copy_(k + alpha * v)

    if lookahead:
        move(torch.autograd.grad(problem.inner(), problem.w), -LR)
    outer = torch.autograd.grad(problem.outer(), [*problem.w, problem.samples])
    v, direct = outer[:-1], (outer[-1], torch.zeros_like(problem.decay))
    epsilon = 0.01 / torch.cat([t.flatten() for t in v]).norm()
    sides = []
    for sign in (1, -1):
        move(v, sign * epsilon)
        sides.append(torch.autograd.grad(problem.inner(), problem.phi))
    move(v, 0)
    found = problem.gradients(OneStep(LR, lookahead, mixed="difference"))
    for grad, d, ahead, behind in zip(found, direct, *sides, strict=True):
        expected = d - LR * (ahead - behind) / (2 * epsilon)
        tolerance = 1e-3 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(grad, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@mixed_products
@lookaheads
def test_each_loss_is_evaluated_no_more_often_than_needed(mixed, lookahead):
    problem = Network()
    problem.gradients(OneStep(LR, lookahead, mixed))
    assert problem.calls.count("outer") == 1
    assert problem.calls.count("inner") == (1 if mixed == "exact" else 3 if lookahead else 2)


@mixed_products
@lookaheads
def test_parameters_keep_their_bits_and_graphs_stay_valid(mixed, lookahead):
    problem = Network()
    before, graph = [t.detach().clone() for t in problem.w], problem.inner()
    problem.gradients(OneStep(LR, lookahead, mixed))
    assert all(torch.equal(t, b) for t, b in zip(problem.w, before, strict=True))
    expected = torch.autograd.grad(problem.inner(), problem.w)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(graph, problem.w), expected, strict=True))
    assert all(t.grad is None for t in problem.w)


def test_losses_may_be_tensors_where_they_are_not_evaluated_elsewhere():
    problem = Network()
    for solver, outer in (
        (OneStep(LR), problem.outer()),
        (SingleLoop(LR), problem.outer()),
        (OneStep(LR, lookahead=True), problem.outer),
    ):
        found = hypergradient(outer, problem.inner(), problem.w, problem.phi, solver=solver).grads
        torch.testing.assert_close(found, problem.gradients(solver))


def test_losses_may_share_their_graph():
    problem = Network()
    logits = problem.net(problem.x)
    losses = F.cross_entropy(logits, problem.y, reduction="none")
    found = hypergradient(
        losses.mean(), (problem.samples.exp() * losses).mean(), problem.w, [problem.samples], solver=OneStep(LR)
    )
    (b, slope) = (
        torch.autograd.grad(f(), problem.w, create_graph=True)
        for f in (
            lambda: F.cross_entropy(problem.net(problem.x), problem.y),
            lambda: (
                problem.samples.exp() * F.cross_entropy(problem.net(problem.x), problem.y, reduction="none")
            ).mean(),
        )
    )
    expected = torch.autograd.grad(slope, [problem.samples], [t.detach() for t in b])
    torch.testing.assert_close(found.grads[0], -LR * expected[0])


@mixed_products
@lookaheads
def test_micro_batches_are_their_mean(mixed, lookahead):
    problem = Network()
    parts = [lambda f=f: f * problem.inner() for f in (0.5, 1.5)]
    solver = OneStep(LR, lookahead, mixed)
    found = hypergradient([problem.outer, problem.outer], parts, problem.w, problem.phi, solver=solver).grads
    torch.testing.assert_close(found, problem.gradients(solver))


@mixed_products
@lookaheads
def test_held_entries_neither_step_nor_carry_anything(mixed, lookahead):
    """The parameters that are held count as constants."""
    problem, solver = Network(), OneStep(LR, lookahead, mixed)
    free = [None, None, *(torch.zeros_like(t, dtype=torch.bool) for t in problem.w[2:])]
    found = problem.gradients(solver, free=free)
    for t in problem.w[2:]:
        t.requires_grad_(False)
    torch.testing.assert_close(found, problem.gradients(solver))


@mixed_products
@lookaheads
def test_parameters_may_be_of_several_dtypes(mixed, lookahead):
    problem, solver = Network(), OneStep(LR, lookahead, mixed)
    expected = problem.gradients(solver)
    problem.net[0].float()
    problem.net[0].register_forward_pre_hook(lambda module, args: tuple(t.float() for t in args))
    problem.net[0].register_forward_hook(lambda module, args, result: result.double())
    problem.w = list(problem.net.parameters())
    for a, b in zip(problem.gradients(solver), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize("solver", [OneStep(LR, True, "difference"), OneStep(LR, True), SingleLoop(LR)], ids=str)
def test_buffers_and_random_states_stay(solver):
    """BatchNorm's statistics are left alone, and every evaluation of a loss draws the same dropout masks."""
    problem = Network(torch.float64, nn.BatchNorm1d(8), nn.Dropout(0.5))
    before = {name: t.clone() for name, t in problem.net.named_buffers()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    found = problem.gradients(solver)
    assert all(torch.equal(t, before[name]) for name, t in problem.net.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(problem.gradients(solver), found, rtol=0, atol=0)
    if isinstance(solver, OneStep) and solver.mixed == "difference":
        torch.testing.assert_close(found, problem.gradients(OneStep(LR, True)), rtol=1e-2, atol=1e-4)


def test_an_operator_without_second_derivatives_needs_the_difference():
    class OnceOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * (1 - x.tanh().square())

    problem = Network()
    expected = problem.gradients(OneStep(LR, mixed="difference"))
    problem.net[1].forward = OnceOnly.apply
    torch.testing.assert_close(problem.gradients(OneStep(LR, mixed="difference")), expected)
    with pytest.raises(RuntimeError, match="OnceOnly"):
        problem.gradients(OneStep(LR))


def test_a_gradient_that_is_none_of_a_loss_has_its_one_step_all_the_same():
    """A step of training goes along whatever the backward pass gives, so that nothing is not symmetric about it."""
    w, phi = torch.tensor([2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)

    def inner():
        return (phi * w.detach() * w).sum()  # gradient phi * w

    found = hypergradient(lambda: w.square().sum(), inner, [w], [phi], solver=OneStep(0.1), state=SolverState())
    assert float(found.grads[0]) == pytest.approx(-0.1 * 4 * 2)


# ---------------------------------------------------------------------------------------------------------- single loop


def test_single_loop_converges_to_the_closed_form_while_phi_is_fixed():
    problem, state = Ridge(), SolverState()
    step_size = 1.0 / float(torch.linalg.eigvalsh(problem.hessian()).max())
    for _ in range(2000):
        result = hypergradient(
            problem.outer_loss(),
            problem.inner_loss(),
            [problem.w],
            [problem.decay, problem.weights],
            solver=SingleLoop(step_size),
            state=state,
        )
        if result.stats.residual < 1e-9:
            break
    assert result.stats.residual < 1e-9
    torch.testing.assert_close(result.grads, problem.exact(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("parts", [1, 2])
def test_single_loop_returns_the_vector_that_it_multiplied(parts):
    """One evaluation of each loss a call; the residual is that of the vector whose mixed product is returned."""
    problem, state = Network(), SolverState()
    inner = problem.inner if parts == 1 else [problem.inner] * parts
    (b,) = [torch.autograd.grad(problem.outer(), problem.w)]
    slope = torch.autograd.grad(problem.inner(), problem.w, create_graph=True)
    v = [LR * t for t in b]
    for _ in range(4):
        problem.calls.clear()
        result = hypergradient(problem.outer, inner, problem.w, [problem.decay], solver=SingleLoop(LR), state=state)
        assert problem.calls.count("inner") <= 2 * parts
        product = torch.autograd.grad(slope, problem.w, v, retain_graph=True)
        (mixed,) = torch.autograd.grad(slope, [problem.decay], v, retain_graph=True)
        torch.testing.assert_close(result.grads[0], -mixed)
        left = torch.cat([(s - t).flatten() for s, t in zip(b, product, strict=True)]).norm()
        assert result.stats.residual == pytest.approx(float(left / torch.cat([t.flatten() for t in b]).norm()))
        assert (result.stats.matvecs, result.stats.iterations) == (1, 1)
        v = [t - LR * (h - s) for t, h, s in zip(v, product, b, strict=True)]


@pytest.mark.parametrize("curvature", ["gauss-newton", "finite-difference"])
def test_single_loop_takes_other_curvatures(curvature):
    """On a linear model with squared errors they are all the same."""
    problem = Ridge()
    state, other = SolverState(), SolverState()

    def inner() -> object:
        loss = problem.inner_loss()
        return (loss, problem.x @ problem.w) if curvature == "gauss-newton" else loss

    def with_outputs() -> object:
        z = problem.x @ problem.w
        fit = (problem.weights * (z - problem.y).square()).sum()
        return 0.5 * fit + 0.5 * (problem.decay.exp() * problem.w.square()).sum(), z

    given = with_outputs if curvature == "gauss-newton" else inner
    for _ in range(3):
        expected = ridge_gradients(problem, SingleLoop(0.01), state=state)
        found = hypergradient(
            problem.outer_loss,
            given,
            [problem.w],
            [problem.decay, problem.weights],
            solver=SingleLoop(0.01),
            state=other,
            curvature=curvature,
        ).grads
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_single_loop_that_diverges_is_told_and_starts_anew():
    problem, state = Ridge(), SolverState()
    with pytest.warns(RuntimeWarning, match="diverged"):
        result = hypergradient(
            problem.outer_loss, problem.inner_loss, [problem.w], [problem.decay], solver=SingleLoop(10.0), state=state
        )
    assert result.direct_only
    assert state.solution is None
    torch.testing.assert_close(result.grads[0], 2 * problem.decay.detach())


# ----------------------------------------------------------------------------------------------------------------- SAMA


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@mixed_products
def test_sama_is_the_derivative_of_the_last_update(kind, mixed):
    """The step `w - (update with the gradient in .grad)`, whose derivative in phi goes through that gradient."""
    problem = Network()
    optimizer = kind(problem.w, lr=LR)
    for _ in range(5):
        optimizer.zero_grad()
        problem.inner().backward(inputs=problem.w)
        optimizer.step()
    ones = [torch.ones_like(t) for t in problem.w]
    derivative, _ = SAMA(optimizer).solve(list, ones)
    b = torch.autograd.grad(problem.outer(), [*problem.w, problem.samples])
    slope = torch.autograd.grad(problem.inner(), problem.w, create_graph=True)
    x = [d * t for d, t in zip(derivative, b[:-1], strict=True)]
    expected = [-t for t in torch.autograd.grad(slope, problem.phi, x)]
    expected[0] = expected[0] + b[-1]
    found = problem.gradients(SAMA(optimizer, mixed))
    tolerance = 1e-9 if mixed == "exact" else 1e-4
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * float(e.abs().max()))


def test_sama_finds_its_parameters_in_any_order_and_under_masks():
    problem = Network()
    optimizer = torch.optim.Adam([{"params": problem.w[2:]}, {"params": problem.w[:2], "lr": 0.5}], lr=LR)
    problem.inner().backward(inputs=problem.w)
    optimizer.step()
    optimizer.zero_grad()
    solver = SAMA(optimizer, "exact")
    forward = problem.gradients(solver)
    backward = hypergradient(problem.outer, problem.inner, problem.w[::-1], problem.phi, solver=solver).grads
    torch.testing.assert_close(forward, backward)
    free = [None, None, *(torch.zeros_like(t, dtype=torch.bool) for t in problem.w[2:])]
    found = problem.gradients(solver, free=free)
    torch.testing.assert_close(
        found, hypergradient(problem.outer, problem.inner, problem.w[:2], problem.phi, solver=solver).grads
    )


def test_sama_refuses_parameters_of_others():
    problem = Network()
    solver = SAMA(torch.optim.SGD([torch.ones_like(t) for t in problem.w], lr=LR))
    with pytest.raises(ValueError, match="does not hold inner parameter 0 of the system"):
        problem.gradients(solver)


# ------------------------------------------------------------------------------------------------------- HyperOptimizer


def solvers_for(problem: Network) -> dict[str, Solver]:
    optimizer = torch.optim.Adam(problem.w, lr=LR)
    problem.inner().backward(inputs=problem.w)
    optimizer.step()
    return {
        "T1-T2": OneStep(LR),
        "DARTS": OneStep(LR, lookahead=True, mixed="difference"),
        "SingleLoop": SingleLoop(LR),
        "SAMA": SAMA(optimizer),
    }


@pytest.mark.parametrize("name", ["T1-T2", "DARTS", "SingleLoop", "SAMA"])
def test_outer_steps_go_along_the_hypergradient_without_a_warning(name):
    problem = Network()
    solver = solvers_for(problem)[name]
    outer = HyperOptimizer(torch.optim.SGD(problem.phi, lr=1.0), solver=solver)
    for _ in range(3):
        before = [t.detach().clone() for t in problem.phi]
        expected = problem.gradients(solver, state=SolverState(**vars(outer.state)))
        stats = outer.step(problem.outer, problem.inner, problem.w)
        for t, b, grad in zip(problem.phi, before, expected, strict=True):
            torch.testing.assert_close(t.detach(), b - grad)
        assert math.isnan(stats.residual) == (name != "SingleLoop")
    assert outer.skipped_steps == 0
    assert (outer.state.solution is not None) == (name == "SingleLoop")


@pytest.mark.parametrize("solver", [OneStep(0.5), OneStep(0.5, True, "difference"), SingleLoop(0.5)], ids=str)
def test_a_combiner_learns_which_loss_helps(solver):
    """The second loss pulls to where the outer loss is small, the third away from it."""
    combiner = LinearCombiner(3)
    w = torch.zeros(4, requires_grad=True)
    inner_optimizer = torch.optim.SGD([w], lr=0.5)
    outer = HyperOptimizer(torch.optim.SGD(combiner.parameters(), lr=0.5), solver=solver, project=[combiner])

    def inner() -> Tensor:
        return combiner(torch.stack([(w - t).square().sum() for t in (0.0, 1.0, -1.0)]).unsqueeze(0) / 8)

    start = combiner.phi.detach().clone()
    for _ in range(20):
        for _ in range(5):
            inner_optimizer.zero_grad()
            inner().backward(inputs=[w])
            inner_optimizer.step()
        outer.step(lambda: (w - 1).square().sum(), inner, [w])
    weights = combiner.loss_weights(torch.ones(1, 3))[0]
    assert not torch.equal(combiner.phi, start)
    assert weights[1] > weights[2]


@pytest.mark.parametrize("solver", [OneStep(LR), OneStep(LR, True, "difference"), SingleLoop(LR)], ids=str)
def test_what_is_not_finite_is_named_and_skipped(solver):
    problem, state = Network(), SolverState()
    with pytest.raises(NotFiniteError, match="gradients of outer_loss in inner_params hold NaN"):
        hypergradient(lambda: problem.outer() * math.nan, problem.inner, problem.w, problem.phi, solver=solver)
    outer = HyperOptimizer(torch.optim.SGD(problem.phi, lr=1.0), solver=solver)
    before = [t.detach().clone() for t in problem.phi]
    with pytest.warns(RuntimeWarning, match="An outer step was skipped"):
        stats = outer.step(problem.outer, lambda: problem.inner() * math.inf, problem.w)
    assert not stats.converged
    assert outer.skipped_steps == 1
    assert all(torch.equal(t, b) for t, b in zip(problem.phi, before, strict=True))
    assert state.solution is None


def test_a_step_to_nowhere_is_the_inner_gradients_fault():
    problem = Network()
    with pytest.raises(NotFiniteError, match="gradients of inner_loss in inner_params hold"):
        hypergradient(
            problem.outer, lambda: problem.inner() * math.inf, problem.w, problem.phi, solver=OneStep(LR, True)
        )
    assert all(t.isfinite().all() for t in problem.w)


# ------------------------------------------------------------------------------------------------------------ bad input


def test_losses_that_are_evaluated_elsewhere_must_be_functions():
    problem = Network()
    with pytest.raises(TypeError, match="outer_loss must be a function for a look-ahead"):
        hypergradient(problem.outer(), problem.inner, problem.w, problem.phi, solver=OneStep(LR, True))
    with pytest.raises(TypeError, match="inner_loss must be a function for mixed='difference'"):
        hypergradient(problem.outer, problem.inner(), problem.w, problem.phi, solver=OneStep(LR, mixed="difference"))


@mixed_products
@lookaheads
def test_losses_that_ignore_the_inner_parameters_are_refused(mixed, lookahead):
    problem, solver = Network(), OneStep(LR, lookahead, mixed)
    with pytest.raises(ValueError, match="outer_loss does not depend on any of inner_params"):
        hypergradient(lambda: problem.samples.sum(), problem.inner, problem.w, problem.phi, solver=solver)
    with pytest.raises(ValueError, match="inner_loss does not depend on any of inner_params"):
        hypergradient(problem.outer, lambda: problem.samples.sum(), problem.w, problem.phi, solver=solver)


@mixed_products
def test_outer_parameters_without_a_part_in_the_inner_loss_are_told(mixed):
    problem = Network()
    idle = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="no outer parameter plays a part"):
        result = hypergradient(problem.outer, problem.inner, problem.w, [idle], solver=OneStep(LR, mixed=mixed))
    assert not result.grads[0].any()


def test_a_graph_that_was_freed_is_refused():
    problem = Network()
    inner = problem.inner()
    torch.autograd.grad(inner, problem.w)
    with pytest.raises(RuntimeError, match="The graph of inner_loss was freed before"):
        hypergradient(problem.outer, inner, problem.w, problem.phi, solver=OneStep(LR))


@mixed_products
def test_an_outer_gradient_of_zero_gives_the_direct_gradient(mixed):
    problem = Network()

    def outer() -> Tensor:
        return sum((t - t.detach()).square().sum() for t in problem.w) + problem.samples.sum()

    result = hypergradient(outer, problem.inner, problem.w, problem.phi, solver=OneStep(LR, mixed=mixed))
    assert (result.stats.residual, result.stats.stop_reason, result.stats.converged) == (0.0, "trivial", True)
    assert torch.equal(result.grads[0], torch.ones(20).double())
    assert not result.grads[1].any()


@pytest.mark.parametrize("name", ["T1-T2", "SingleLoop", "SAMA"])
def test_the_minimum_as_a_function_takes_them(name):
    """Its mixed product is exact in any case."""
    problem = Network()
    solver = solvers_for(problem)[name]
    states = SolverState(), SolverState()
    for _ in range(3):
        w = auxfast.implicit_minimum(problem.inner, problem.w, problem.phi, solver=solver, state=states[0], warn=False)
        found = torch.autograd.grad(problem.outer(w), problem.phi)
        expected = problem.gradients(solver, state=states[1])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_the_minimum_as_a_function_cannot_look_ahead():
    problem = Network()
    with pytest.raises(ValueError, match="solver must take the outer gradient at the parameters as they are"):
        auxfast.implicit_minimum(problem.inner, problem.w, problem.phi, solver=OneStep(LR, lookahead=True))


def test_verify_takes_a_one_step_solver():
    problem = Ridge()
    report = auxfast.verify_hypergradient(
        problem.outer_loss, problem.inner_loss, [problem.w], [problem.decay], solver=OneStep(LR)
    )
    assert report.verdict
