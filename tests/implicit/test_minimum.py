"""`implicit_minimum` against closed forms, `hypergradient` and inner problems that are solved again."""

from __future__ import annotations

import warnings
import weakref
from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import auxfast
from auxfast.autograd.pullback import Pullback
from auxfast.implicit import NotFiniteError, hypergradient, implicit_minimum
from auxfast.solvers import (
    MINRES,
    BlockDiagonal,
    ConjugateGradient,
    Dense,
    Identity,
    Neumann,
    Nystrom,
    SolverState,
    SolveStats,
)

from .problems import Ridge

D = torch.float64
EXACT = MINRES(200, tol=1e-13)


def outer_of(problem: Ridge, w: Tensor) -> Tensor:
    return 0.5 * (problem.outer_x @ w - problem.outer_y).square().sum() + problem.decay.square().sum()


def minimum_of(problem: Ridge, **options) -> Tensor:
    options = {"solver": EXACT} | options
    (w,) = implicit_minimum(problem.inner_loss, [problem.w], [problem.decay, problem.weights], **options)
    return w


class Classifier:
    """An MLP with a learned weight decay for each tensor and a weight for each class, at its minimum."""

    def __init__(self, dtype: torch.dtype = D) -> None:
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
        self.x, self.x_outer = torch.randn(2, 24, 3, dtype=dtype)
        self.y, self.y_outer = torch.randint(3, (2, 24))
        self.decay = torch.full((4,), -2.0, dtype=dtype, requires_grad=True)
        self.weights = torch.ones(3, dtype=dtype, requires_grad=True)
        self.phi = [self.decay, self.weights]
        self.w = dict(self.net.named_parameters())
        self.train()

    def inner(self) -> Tensor:
        penalties = [d.exp() * w.square().sum() for d, w in zip(self.decay, self.w.values(), strict=True)]
        return self.fit(self.net(self.x)) + sum(penalties)

    def fit(self, logits: Tensor) -> Tensor:
        each = nn.functional.cross_entropy(logits, self.y, reduction="none")
        return (self.weights.exp()[self.y] * each).mean()

    def outer(self, w: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(functional_call(self.net, w, (self.x_outer,)), self.y_outer)

    def train(self) -> None:
        optimizer = torch.optim.LBFGS(
            self.w.values(), max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.inner()
            loss.backward(inputs=list(self.w.values()))
            return loss

        optimizer.step(closure)
        optimizer.zero_grad()


def test_ridge_closed_form():
    problem, stats = Ridge(), []
    outer_of(problem, minimum_of(problem, on_solve=stats.append)).backward()
    for phi, exact in zip((problem.decay, problem.weights), problem.exact(), strict=True):
        torch.testing.assert_close(phi.grad, exact, rtol=1e-10, atol=1e-12)
    assert problem.w.grad is None
    (solve,) = stats
    assert solve.converged


def test_the_hypergradient_is_the_gradient_of_one_outer_loss():
    problem = Classifier()
    w = implicit_minimum(problem.inner(), problem.w, problem.phi, solver=EXACT)
    problem.outer(w).backward()
    result = hypergradient(problem.outer(problem.w), problem.inner(), problem.w.values(), problem.phi, solver=EXACT)
    torch.testing.assert_close([phi.grad for phi in problem.phi], list(result.grads), rtol=1e-10, atol=1e-14)


def test_the_results_are_the_inner_parameters():
    problem = Classifier()
    problem.net[0].bias.requires_grad_(False)
    for given in (problem.w, list(problem.w.values()), iter(problem.w.values())):
        found = implicit_minimum(problem.inner, given, problem.phi)
        assert isinstance(found, dict) == isinstance(given, dict)
        tensors = found.values() if isinstance(found, dict) else found
        for w, original in zip(tensors, problem.w.values(), strict=True):
            assert torch.equal(w, original)
            assert w.data_ptr() == original.data_ptr()
            assert w.requires_grad == original.requires_grad
    assert list(implicit_minimum(problem.inner, problem.w, problem.phi)) == list(problem.w)


def test_without_gradients_the_results_are_plain_tensors():
    problem = Ridge()
    with torch.no_grad():
        assert not minimum_of(problem).requires_grad
    (w,) = implicit_minimum(problem.inner_loss, [problem.w], [problem.decay.detach()])
    assert not w.requires_grad
    assert torch.equal(w, problem.w)


def test_any_number_of_backward_passes_share_one_recorded_gradient():
    problem, calls = Ridge(), []

    def inner() -> Tensor:
        calls.append(1)
        return problem.inner_loss()

    (w,) = implicit_minimum(inner, [problem.w], [problem.decay], solver=EXACT)
    both = torch.autograd.grad(w.sum() + w.square().sum(), problem.decay, retain_graph=True)[0]
    first = torch.autograd.grad(w.sum(), problem.decay, retain_graph=True)[0]
    second = torch.autograd.grad(w.square().sum(), problem.decay)[0]
    torch.testing.assert_close(first + second, both, rtol=1e-10, atol=1e-12)
    assert len(calls) == 1


def test_a_sum_of_losses_takes_one_solve():
    problem, stats = Ridge(), []
    w = minimum_of(problem, on_solve=stats.append)
    (outer_of(problem, w) + w.exp().sum()).backward()
    assert len(stats) == 1


def losses_of(problem: Classifier, w: dict[str, Tensor]) -> Tensor:
    """(9,): more rows than a batch of products needs."""
    logits = functional_call(problem.net, w, (problem.x_outer,))
    return nn.functional.cross_entropy(logits, problem.y_outer, reduction="none")[:9] + problem.decay.sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"solver": Dense()},
        {"solver": Neumann(3000, "auto", tol=1e-12)},
        {"solver": Nystrom(rank=35)},
        {"curvature": "finite-difference"},
        {"free": True},
        {"list": True},
    ],
    ids=lambda options: "-".join(map(str, options)) or "MINRES",
)
@pytest.mark.parametrize("way", ["is_grads_batched", "vmap"])
def test_rows_of_a_jacobian_share_one_solve(options, way):
    problem, stats = Classifier(), []
    options = {"solver": EXACT, "warn": False} | options
    rtol = 1e-5 if "curvature" in options or isinstance(options["solver"], Nystrom) else 1e-8
    inner = [problem.inner, problem.inner] if options.pop("list", False) else problem.inner
    if options.pop("free", False):
        options["free"] = [torch.rand(w.shape) > 0.3 for w in problem.w.values()]
    w = implicit_minimum(inner, problem.w, problem.phi, on_solve=stats.append, **options)
    losses, units = losses_of(problem, w), torch.eye(9, dtype=D)
    if way == "vmap":
        rows = torch.func.vmap(lambda unit: torch.autograd.grad(losses, problem.phi, unit, retain_graph=True))(units)
    else:
        rows = torch.autograd.grad(losses, problem.phi, units, is_grads_batched=True, retain_graph=True)
    (solve,) = stats
    assert len(solve.residuals) == 9
    one_by_one = [torch.autograd.grad(loss, problem.phi, retain_graph=True) for loss in losses]
    expected = [torch.stack(column) for column in zip(*one_by_one, strict=True)]
    torch.testing.assert_close(list(rows), expected, rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("way", ["is_grads_batched", "vmap"])
@pytest.mark.parametrize("solver", [MINRES(3, tol=None), Dense()], ids=["MINRES", "Dense"])
def test_products_go_in_batches_within_a_backward_pass(solver, way, monkeypatch):
    """Nodes called from Python compute what the pass under way wants of them, and it wants nothing of these."""
    problem = Classifier()
    w = implicit_minimum(problem.inner, problem.w, problem.phi, solver=solver, warn=False)
    losses, units = losses_of(problem, w), torch.eye(9, dtype=D)
    one_by_one = [torch.autograd.grad(loss, problem.phi, retain_graph=True) for loss in losses]
    monkeypatch.setattr(Pullback, "_one_by_one", lambda self, vectors: pytest.fail(str(self.refusal)))
    if way == "vmap":
        rows = torch.func.vmap(lambda unit: torch.autograd.grad(losses, problem.phi, unit, retain_graph=True))(units)
    else:
        rows = torch.autograd.grad(losses, problem.phi, units, is_grads_batched=True, retain_graph=True)
    expected = [torch.stack(column) for column in zip(*one_by_one, strict=True)]
    torch.testing.assert_close(list(rows), expected, rtol=1e-8, atol=1e-9)


def test_jacobian_of_torch():
    problem = Ridge()

    def predictions(decay: Tensor) -> Tensor:
        def inner() -> Tensor:
            return 0.5 * (problem.x @ problem.w - problem.y).square().sum() + 0.5 * (decay.exp() * problem.w**2).sum()

        (w,) = implicit_minimum(inner, [problem.w], [decay], solver=EXACT, warn=False)
        return problem.outer_x @ w

    found, expected = (
        torch.autograd.functional.jacobian(predictions, problem.decay.detach(), vectorize=together)
        for together in (True, False)
    )
    assert found.shape == (12, 5)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_gauss_newton_takes_the_outputs():
    problem = Classifier()
    logits = problem.net(problem.x)
    loss = problem.fit(logits) + 0.1 * sum(w.square().sum() for w in problem.w.values())
    options = {"curvature": "gauss-newton", "outputs": logits, "solver": EXACT, "warn": False}
    w = implicit_minimum(loss, problem.w, problem.phi, **options)
    found = torch.autograd.grad(problem.outer(w), problem.weights)[0]
    expected = hypergradient(problem.outer(problem.w), loss, problem.w.values(), problem.phi, **options).grads[1]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


def test_several_inner_problems_at_once():
    """Four linear tasks that are drawn to shared outer parameters, solved side by side: iMAML."""
    torch.manual_seed(0)
    x, y = torch.randn(4, 10, 3, dtype=D), torch.randn(4, 10, 1, dtype=D)
    phi, stats = torch.randn(3, dtype=D, requires_grad=True), []

    def solve(phi: Tensor) -> Tensor:
        return torch.linalg.solve(x.mT @ x + torch.eye(3, dtype=D), (x.mT @ y)[..., 0] + phi)

    w = solve(phi).detach().requires_grad_()

    def inner() -> Tensor:
        return 0.5 * (x @ w[..., None] - y).square().sum() + 0.5 * (w - phi).square().sum()

    (solved,) = implicit_minimum(inner, [w], [phi], solver=BlockDiagonal(EXACT), on_solve=stats.append)
    units = torch.eye(4, dtype=D)
    (rows,) = torch.autograd.grad(solved.sin().sum(1), [phi], units, is_grads_batched=True)
    expected = torch.autograd.functional.jacobian(lambda phi: solve(phi).sin().sum(1), phi)
    torch.testing.assert_close(rows, expected, rtol=1e-9, atol=1e-12)
    assert len(stats[0].residuals) == 16


class Logistic:
    """Logistic regression with a penalty for each weight, solved by Newton's method, by whose last step autograd can
    differentiate: at the minimum the derivative of one step is that of the minimum."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(40, 4, generator=generator, dtype=D)
        self.y = (torch.rand(40, generator=generator) > 0.5).double()
        self.x_outer = torch.randn(30, 4, generator=generator, dtype=D)
        self.penalty = torch.tensor([-1.0, -0.5, 0.0, 0.5], dtype=D, requires_grad=True)

    def inner(self, w: Tensor, phi: Tensor) -> Tensor:
        fit = nn.functional.binary_cross_entropy_with_logits(self.x @ w, self.y)
        return fit + 0.5 * (phi.exp() * w.square()).sum()

    def outer(self, w: Tensor, phi: Tensor) -> Tensor:
        return torch.tanh(self.x_outer @ w).square().mean() + 0.1 * (phi.sin() * w).sum()

    def solve(self, phi: Tensor) -> Tensor:
        w, phi = torch.zeros(4, dtype=D), phi.detach()
        for _ in range(30):
            gradient = torch.autograd.functional.jacobian(lambda w: self.inner(w, phi), w)
            hessian = torch.autograd.functional.hessian(lambda w: self.inner(w, phi), w)
            w = w - torch.linalg.solve(hessian, gradient)
        return w

    def minimum(self, phi: Tensor, solver=EXACT, **options) -> Tensor:
        w = self.solve(phi).requires_grad_()
        (result,) = implicit_minimum(lambda: self.inner(w, phi), [w], [phi], solver=solver, **options)
        return result


def differences(function, point: Tensor, step: float = 1e-5) -> Tensor:
    """Gradient of a function by central differences."""
    units = torch.eye(len(point), dtype=D) * step
    return torch.stack([(function(point + u) - function(point - u)) / (2 * step) for u in units])


def test_against_finite_differences_of_the_solved_inner_problem():
    problem = Logistic()
    found = torch.autograd.grad(problem.outer(problem.minimum(problem.penalty), problem.penalty), problem.penalty)[0]
    expected = differences(lambda phi: problem.outer(problem.solve(phi), phi), problem.penalty.detach())
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("solver", [EXACT, ConjugateGradient(200, tol=1e-13), Dense()], ids=lambda s: type(s).__name__)
def test_second_derivatives_against_finite_differences(solver):
    """The gradient of the square of the hypergradient, in a nonlinear inner problem."""
    problem = Logistic()

    def squared(phi: Tensor, create_graph: bool) -> Tensor:
        outer = problem.outer(problem.minimum(phi, solver), phi)
        (gradient,) = torch.autograd.grad(outer, phi, create_graph=create_graph)
        return gradient.square().sum() + (gradient * phi).sum() + outer

    phi = problem.penalty
    (found,) = torch.autograd.grad(squared(phi, True), phi)
    expected = differences(lambda p: squared(p.requires_grad_(), False).detach(), phi.detach())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_a_bilevel_problem_inside_a_third_level():
    """Ridge, whose penalties are a network of psi: the outer problem takes a step of descent in them, and the third
    level's loss is that of the inner parameters after the step."""
    problem = Ridge()
    torch.manual_seed(0)
    psi, mixing = torch.randn(3, dtype=D, requires_grad=True), torch.randn(5, 3, dtype=D)

    def closed_form(decay: Tensor) -> Tensor:
        weights = problem.weights.detach()
        matrix = problem.x.T @ (weights[:, None] * problem.x) + torch.diag(decay.exp())
        return torch.linalg.solve(matrix, problem.x.T @ (weights * problem.y))

    def implicit(decay: Tensor) -> Tensor:
        w = closed_form(decay.detach()).requires_grad_()

        def inner() -> Tensor:
            fit = (problem.weights.detach() * (problem.x @ w - problem.y).square()).sum()
            return 0.5 * fit + 0.5 * (decay.exp() * w.square()).sum()

        return implicit_minimum(inner, [w], [decay], solver=EXACT)[0]

    def third(minimum) -> Tensor:
        decay = torch.tanh(mixing @ psi)
        outer = (problem.outer_x @ minimum(decay) - problem.outer_y).square().sum()
        (step,) = torch.autograd.grad(outer, decay, create_graph=True)
        return (problem.x @ minimum(decay - 0.1 * step)).sin().sum()

    (found,), (expected,) = (torch.autograd.grad(third(minimum), psi) for minimum in (implicit, closed_form))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_second_derivatives_of_several_parameters_with_some_held_fixed():
    """Entries that are held fixed are those of a smaller problem."""
    problem = Logistic()
    free = torch.tensor([True, False, True, True])
    phi, w0 = problem.penalty, problem.solve(problem.penalty)

    def second(held: bool) -> Tensor:
        if held:
            w = w0.clone().requires_grad_()
            (solved,) = implicit_minimum(lambda: problem.inner(w, phi), [w], [phi], solver=EXACT, free=[free])
        else:
            first, rest = w0[:1].clone().requires_grad_(), w0[2:].clone().requires_grad_()

            def inner() -> Tensor:
                return problem.inner(torch.cat([first, w0[1:2], rest]), phi)

            a, b = implicit_minimum(inner, [first, rest], [phi], solver=EXACT)
            solved = torch.cat([a, w0[1:2], b])
        (gradient,) = torch.autograd.grad(problem.outer(solved, phi), phi, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), phi)[0]

    torch.testing.assert_close(second(True), second(False), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": Neumann(50, 0.02)}, "where the solver is MINRES, ConjugateGradient or Dense, not Neumann"),
        ({"curvature": "finite-difference"}, "for curvature='hessian' alone"),
        ({"list": True}, "an inner_loss that is no list"),
    ],
    ids=["solver", "curvature", "list"],
)
def test_a_second_derivative_that_there_is_not_is_an_error_and_not_before_it_is_asked_for(options, message):
    problem = Ridge()
    inner = [problem.inner_loss] if options.pop("list", False) else problem.inner_loss
    if isinstance(inner, list):
        inner = inner * 2
    (w,) = implicit_minimum(inner, [problem.w], [problem.decay], **{"solver": EXACT, "warn": False} | options)
    (gradient,) = torch.autograd.grad(w.sum(), problem.decay, create_graph=True)
    with pytest.raises(NotImplementedError, match=message):
        gradient.sum().backward()


def test_third_derivatives_are_refused():
    problem = Ridge()
    (first,) = torch.autograd.grad(minimum_of(problem).sum(), problem.decay, create_graph=True)
    with pytest.raises(NotImplementedError, match="no third: leave create_graph out of the last"):
        torch.autograd.grad(first.sum(), problem.decay, create_graph=True)


@pytest.mark.parametrize("way", ["is_grads_batched", "vmap"])
def test_second_derivatives_of_batches_are_refused(way):
    problem = Ridge()
    w, units = minimum_of(problem), torch.eye(5, dtype=D)

    def rows() -> object:
        if way == "vmap":
            return torch.func.vmap(lambda unit: torch.autograd.grad(w, problem.decay, unit, create_graph=True))(units)
        return torch.autograd.grad(w, problem.decay, units, is_grads_batched=True, create_graph=True)

    with pytest.raises(NotImplementedError, match="take a backward pass for each row"):
        rows()


def test_rows_of_second_derivatives_are_those_of_a_pass_each():
    problem = Ridge()
    units = torch.eye(5, dtype=D)
    (first,) = torch.autograd.grad(minimum_of(problem).pow(3).sum(), problem.decay, create_graph=True)
    each = [torch.autograd.grad(first, problem.decay, unit, retain_graph=True)[0] for unit in units]
    (rows,) = torch.autograd.grad(first, problem.decay, units, is_grads_batched=True, retain_graph=True)
    assert torch.equal(rows, torch.stack(each))
    with pytest.raises(NotImplementedError, match=r"no other transform of torch.func.*is_grads_batched=True"):
        torch.func.vmap(lambda unit: torch.autograd.grad(first, problem.decay, unit))(units)


def test_vmap_within_vmap_is_refused():
    problem = Ridge()
    w, units = minimum_of(problem), torch.eye(5, dtype=D)[None]
    with pytest.raises(NotImplementedError, match=r"one torch.func.vmap.*: put all cotangents on one axis"):
        torch.func.vmap(torch.func.vmap(lambda unit: torch.autograd.grad(w, problem.decay, unit)))(units)


def test_hooks_on_inner_parameters_act_as_in_a_hypergradient():
    """They change the gradients of both losses: here a hook holds an entry fixed, and another scales."""
    problem = Ridge()
    mask = torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0], dtype=D)
    problem.w.register_hook(lambda gradient: mask * gradient)
    phi = [problem.decay, problem.weights]
    expected = hypergradient(problem.outer_loss, problem.inner_loss, [problem.w], phi, solver=EXACT).grads
    w = minimum_of(problem)
    found = torch.autograd.grad(outer_of(problem, w), phi, retain_graph=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    (rows,) = torch.autograd.grad(w, problem.decay, torch.eye(5, dtype=D), is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(w[i], problem.decay, retain_graph=True)[0] for i in range(5)]
    torch.testing.assert_close(rows, torch.stack(each), rtol=1e-9, atol=1e-9)
    assert not rows[2].any()
    (first,) = torch.autograd.grad(w.sum(), problem.decay, create_graph=True)
    with pytest.raises(NotImplementedError, match="where no hook is registered on inner_params"):
        first.sum().backward()


def test_an_error_in_the_backward_pass_leaves_the_graph():
    problem = Ridge()
    seen: list[SolveStats] = []

    def once(stats: SolveStats) -> None:
        seen.append(stats)
        if len(seen) == 1:
            raise KeyError("not yet")

    w, ones = minimum_of(problem, on_solve=once), torch.ones(5, dtype=D)
    with pytest.raises(KeyError):
        w.backward(ones)
    w.backward(ones)
    x = torch.linalg.solve(problem.hessian(), ones)
    torch.testing.assert_close(problem.decay.grad, -(problem.decay.exp() * problem.w * x).detach())
    with pytest.raises(RuntimeError, match="a second time"):
        w.backward(ones)


def test_a_combiner_has_no_third_derivative_and_says_so():
    torch.manual_seed(0)
    combiner = auxfast.nn.NonlinearCombiner(3).double()
    w = torch.randn(4, dtype=D, requires_grad=True)
    x, phi = torch.randn(5, 4, 3, dtype=D), list(combiner.parameters())

    def inner() -> Tensor:
        return combiner(torch.einsum("bil,i->bl", x, w).square()) + w.square().sum()

    def second() -> None:
        (solved,) = implicit_minimum(inner, [w], phi, solver=EXACT, warn=False)
        (gradient,) = torch.autograd.grad(solved.sum(), phi, create_graph=True)
        gradient.square().sum().backward()

    with pytest.raises(RuntimeError, match=r"this asks for a third.*reference_kernels"):
        second()
    with auxfast.reference_kernels():
        second()
    assert phi[0].grad is not None


def test_an_optimizer_of_torch_descends():
    problem = Classifier(torch.float32)
    optimizer = torch.optim.Adam(problem.phi, lr=0.1)
    values = []
    for _ in range(5):
        problem.train()
        optimizer.zero_grad()
        loss = problem.outer(implicit_minimum(problem.inner, problem.w, problem.phi))
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0]


def test_outer_parameters_without_a_part_get_zeros():
    problem, unused, scalar = Ridge(), torch.ones(2, 3, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    (w,) = implicit_minimum(problem.inner_loss, [problem.w], [unused, scalar, problem.decay], solver=EXACT)
    w.sum().backward()
    assert torch.equal(unused.grad, torch.zeros(2, 3))
    assert torch.equal(scalar.grad, torch.zeros(()))
    (w,) = implicit_minimum(problem.inner_loss, [problem.w], [unused, problem.decay], solver=EXACT)
    (rows, _) = torch.autograd.grad(w, [unused, problem.decay], torch.eye(5, dtype=D), is_grads_batched=True)
    assert torch.equal(rows, torch.zeros(5, 2, 3))


def test_parameters_that_are_computed_pass_the_gradient_on():
    problem = Ridge()
    raw = torch.linspace(-1, 1, 5, dtype=D, requires_grad=True)
    expected = problem.exact()[0] - 2 * problem.decay.detach()
    problem.decay = problem.decay.detach() + 0.0 * raw
    (w,) = implicit_minimum(problem.inner_loss, [problem.w], [problem.decay], solver=EXACT)
    (0.5 * (problem.outer_x @ w - problem.outer_y).square().sum()).backward()
    torch.testing.assert_close(raw.grad, 0.0 * expected)
    (w,) = implicit_minimum(problem.inner_loss, [problem.w], [problem.decay], solver=EXACT)
    (found,) = torch.autograd.grad(0.5 * (problem.outer_x @ w - problem.outer_y).square().sum(), problem.decay)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_inner_parameters_of_several_dtypes():
    a, b = torch.tensor([2.0], dtype=D, requires_grad=True), torch.tensor([1.0], requires_grad=True)
    phi = torch.tensor([2.0, 1.0], dtype=D, requires_grad=True)

    def inner() -> Tensor:
        return 0.5 * (a - phi[0]).square().sum() + (b.double() - phi[1]).square().sum()

    x, y = implicit_minimum(inner, [a, b], [phi], solver=EXACT)
    assert (x.dtype, y.dtype) == (D, torch.float32)
    rows = torch.autograd.grad(torch.cat([x, y]), phi, torch.eye(2, dtype=D), is_grads_batched=True)[0]
    torch.testing.assert_close(rows, torch.eye(2, dtype=D))


def test_state_is_kept_from_one_call_to_the_next():
    problem, state, stats = Ridge(), SolverState(), []
    solver = MINRES(200, tol=1e-10, warm_start=True)
    for _ in range(2):
        outer_of(problem, minimum_of(problem, solver=solver, state=state, on_solve=stats.append)).backward()
    assert stats[0].iterations > 0 == stats[1].iterations


def test_functions_leave_no_trace():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    x, phi = torch.randn(16, 3), torch.zeros(16, 1, requires_grad=True)
    before, mean = torch.get_rng_state(), net[1].running_mean.clone()

    def inner() -> Tensor:
        return (phi.exp() * net(x).square()).mean() + sum(0.1 * w.square().sum() for w in net.parameters())

    for loss in (inner, [inner, inner]):
        w = implicit_minimum(loss, dict(net.named_parameters()), [phi], warn=False)
        sum(each.square().sum() for each in w.values()).backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(net[1].running_mean, mean)


class Square(torch.autograd.Function):
    """A square, whose nodes can be looked for."""

    twice_differentiable = True
    nodes: ClassVar[list[weakref.ref]] = []

    @staticmethod
    def forward(ctx, x):
        Square.nodes.append(weakref.ref(ctx))
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * grad * x


def test_the_recorded_gradient_goes_with_the_backward_pass_that_frees_the_graph():
    w, phi = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    (solved,) = implicit_minimum(lambda: (Square.apply(w) * phi).sum(), [w], [phi], warn=False)
    (node,) = Square.nodes
    solved.sum().backward(retain_graph=True)
    assert node() is not None
    solved.sum().backward()
    assert node() is None


# What is wrong, or may be.


def test_a_graph_that_was_freed():
    problem = Ridge()
    w = minimum_of(problem)
    w.sum().backward()
    with pytest.raises(RuntimeError, match=r"second time.*retain_graph=True"):
        w.sum().backward()


def test_an_inner_loss_whose_graph_was_freed():
    problem = Ridge()
    loss = problem.inner_loss()
    loss.backward()
    with pytest.raises(RuntimeError, match="graph of inner_loss was freed before"):
        implicit_minimum(loss, [problem.w], [problem.decay])


@pytest.mark.parametrize("which", ["w", "decay"])
def test_parameters_that_changed_before_the_backward_pass(which):
    problem = Ridge()
    w = minimum_of(problem)
    with torch.no_grad():
        getattr(problem, which).mul_(1.1)
    with pytest.raises(RuntimeError, match=r"Parameters were changed .* take the backward pass first, or call it anew"):
        w.sum().backward()


def test_parameters_that_are_not_at_a_minimum():
    problem = Ridge()
    with torch.no_grad():
        problem.w.mul_(1.5)
    with pytest.warns(RuntimeWarning, match="not at a minimum: along the outer loss's gradient a Newton") as caught:
        outer_of(problem, minimum_of(problem)).backward()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outer_of(problem, minimum_of(problem, warn=False)).backward()
        with torch.no_grad():
            problem.w.copy_(problem.solution() * 1.01)
        outer_of(problem, minimum_of(problem)).backward()


def test_parameters_that_are_all_zero_are_told_where_that_is_no_minimum():
    torch.manual_seed(0)
    x, phi = torch.randn(40, 3), torch.zeros(40, requires_grad=True)
    for y, is_minimum in ((x.sum(1), False), (torch.linalg.svd(x)[0][:, -1], True)):
        w = torch.zeros(3, requires_grad=True)
        loss = (phi.exp() * (x @ w - y).square()).mean()
        (solved,) = implicit_minimum(loss, [w], [phi], solver=MINRES())
        with nullcontext() if is_minimum else pytest.warns(RuntimeWarning, match="not at a minimum"):
            solved.sum().backward()


def test_what_is_far_from_a_minimum_is_told_by_the_whole_gradient():
    """That of linear terms, and of a weight decay, included; and where the outer loss is stationary, nothing is."""
    w, phi = torch.full((3,), 2.0, requires_grad=True), torch.full((3,), 2.0, requires_grad=True)
    for shift, far in ((0.0, False), (1.0, True)):
        (solved,) = implicit_minimum(lambda s=shift: (0.5 * w**2 - phi * w - s * w).sum(), [w], [phi], solver=EXACT)
        with pytest.warns(RuntimeWarning, match="not at a minimum") if far else warnings.catch_warnings():
            solved.sum().backward(retain_graph=True)
    (solved,) = implicit_minimum(lambda: (0.5 * w**2 + phi.exp() * (w - 2) ** 2).sum(), [w], [phi], solver=EXACT)
    (solved - 2).square().sum().backward()


def test_an_outer_loss_that_ignores_the_minimum_has_its_direct_gradient():
    problem, stats = Ridge(), []
    minimum_of(problem, on_solve=stats.append)
    problem.decay.square().sum().backward()
    torch.testing.assert_close(problem.decay.grad, 2 * problem.decay.detach())
    assert stats == []


def test_an_inner_loss_without_the_outer_parameters():
    problem, phi = Ridge(), torch.ones(2, requires_grad=True)
    (w,) = implicit_minimum(problem.inner_loss, [problem.w], [phi])
    with pytest.warns(RuntimeWarning, match="no outer parameter plays a part in the gradient of the inner loss"):
        w.sum().backward()
    assert torch.equal(phi.grad, torch.zeros(2))


def test_a_solve_that_missed_its_tolerance_warns_once_for_a_state():
    problem, state = Ridge(), SolverState()
    with pytest.warns(RuntimeWarning, match="not solved to the solver's tol"):
        minimum_of(problem, solver=MINRES(2, tol=1e-9), state=state).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minimum_of(problem, solver=MINRES(2, tol=1e-9), state=state).sum().backward()


def test_what_is_not_finite_is_named():
    problem = Ridge()
    with pytest.raises(NotFiniteError, match="gradients of outer_loss in inner_params hold NaN"):
        (minimum_of(problem).sum() * float("nan")).backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inner_params": lambda p: p.w}, TypeError, "inner_params must be an iterable of tensors, not a Tensor"),
        ({"inner_params": lambda p: []}, ValueError, "inner_params is empty"),
        ({"inner_params": lambda p: [p.w.detach()]}, ValueError, "requires_grad=False, all of them"),
        ({"inner_params": lambda p: [p.w, p.decay]}, ValueError, "is the same tensor as"),
        ({"outer_params": lambda p: [p.w * 2]}, ValueError, "is computed from inner_params"),
        ({"inner_loss": lambda p: p.w}, ValueError, r"inner_loss must be a scalar, not of shape \(5,\)"),
        ({"inner_loss": lambda p: lambda: p.w}, ValueError, r"inner_loss must be a scalar, not of shape \(5,\)"),
        ({"inner_loss": lambda p: 1.0}, TypeError, "inner_loss must be a tensor, a function"),
        ({"inner_loss": lambda p: p.decay.sum()}, ValueError, "inner_loss does not depend on any of inner_params"),
        ({"free": lambda p: [torch.ones(3, dtype=torch.bool)]}, ValueError, r"free\[0\] must have the shape"),
        ({"solver": lambda p: MINRES}, TypeError, "solver must be a solver and not its class"),
        ({"curvature": lambda p: "hesse"}, ValueError, "curvature must be one of"),
        ({"outputs": lambda p: p.w}, ValueError, "outputs are for curvature='gauss-newton'"),
    ],
)
def test_arguments_are_checked_by_the_call(change, error, message):
    problem = Ridge()
    arguments = {"inner_loss": problem.inner_loss, "inner_params": [problem.w], "outer_params": [problem.decay]}
    for name, make in change.items():
        arguments[name] = make(problem)
    with pytest.raises(error, match=message):
        implicit_minimum(**arguments)


class AsGiven:
    """A solver of one's own that returns the right-hand side itself."""

    def solve(self, matvec, rhs, *, batched=False, state=None):
        return rhs, SolveStats(0, 0, 0.5, False, "steps")


def test_a_solver_may_return_the_right_hand_side_itself():
    problem = Ridge()
    (w,) = implicit_minimum(problem.inner_loss, [problem.w], [problem.decay], solver=AsGiven(), warn=False)
    (found,) = torch.autograd.grad(w.sum(), problem.decay)
    torch.testing.assert_close(found, -problem.decay.detach().exp() * problem.w.detach())


def test_an_identity_approximation_is_what_the_solver_says():
    problem = Ridge()
    (w,) = implicit_minimum(problem.inner_loss, [problem.w], [problem.decay], solver=Identity(0.5))
    (found,) = torch.autograd.grad(w.sum(), problem.decay)
    torch.testing.assert_close(found, -0.5 * problem.decay.detach().exp() * problem.w.detach())
