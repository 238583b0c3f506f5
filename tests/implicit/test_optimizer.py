"""The optimizer of outer parameters: what it writes, what it leaves alone, and that it learns."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

from auxfast.implicit import HyperOptimizer, hypergradient
from auxfast.nn import Combiner, LinearCombiner, NonlinearCombiner
from auxfast.solvers import MINRES, Chebyshev, ConjugateGradient, Jacobi, Neumann, Nystrom, SolveStats

from .problems import Dense, Ridge


def setup(problem: Ridge, **options) -> HyperOptimizer:
    optimizer = torch.optim.SGD([{"params": [problem.decay]}, {"params": [problem.weights], "lr": 0.2}], lr=0.1)
    return HyperOptimizer(optimizer, solver=Dense(), **options)


def test_a_step_follows_the_hypergradient_of_all_groups():
    problem = Ridge()
    decay, weights, exact = problem.decay.detach().clone(), problem.weights.detach().clone(), problem.exact()
    problem.decay.grad = torch.full_like(problem.decay, 100)  # left by the inner loss's backward()
    stats = setup(problem).step(problem.outer_loss(), problem.inner_loss(), [problem.w])
    torch.testing.assert_close(problem.decay.detach(), decay - 0.1 * exact[0])
    torch.testing.assert_close(problem.weights.detach(), weights - 0.2 * exact[1])
    assert stats.residual == 0
    assert problem.w.grad is None


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_clips_the_total_norm(factor):
    problem = Ridge()
    exact = problem.exact()
    norm = torch.cat(exact).norm()
    optimizer = setup(problem, max_grad_norm=factor * float(norm))
    optimizer.step(problem.outer_loss(), problem.inner_loss(), [problem.w])
    for param, grad in zip((problem.decay, problem.weights), exact, strict=True):
        torch.testing.assert_close(param.grad, min(factor, 1.0) * grad)


def test_clipping_of_zero_and_of_mixed_dtypes():
    w = torch.ones(2, requires_grad=True)
    a, b = torch.ones(2, requires_grad=True), torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = HyperOptimizer(torch.optim.SGD([a, b], lr=1.0), solver=Dense(), max_grad_norm=1.0, warn=False)
    optimizer.step(w.sum(), w.square().sum(), [w])
    assert torch.equal(a.grad, torch.zeros(2))
    assert b.grad.dtype == torch.float64
    optimizer.step(w.sum() + 3 * a.sum() + (4 * b).sum(), w.square().sum(), [w])
    norm = (a.grad.double().square().sum() + b.grad.square().sum()).sqrt()
    torch.testing.assert_close(norm.item(), 1.0)


def test_clipping_leaves_the_hypergradient_itself_alone(monkeypatch):
    problem, results = Ridge(), []

    def spy(*args, **kwargs):
        results.append(hypergradient(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr("auxfast.implicit.optimizer.hypergradient", spy)
    setup(problem, max_grad_norm=1e-3).step(problem.outer_loss(), problem.inner_loss(), [problem.w])
    exact = Ridge().exact()
    torch.testing.assert_close(results[0].grads, exact)


class Bounded(nn.Module):
    def __init__(self, phi: Tensor) -> None:
        super().__init__()
        self.phi = nn.Parameter(phi)

    def project_(self) -> None:
        with torch.no_grad():
            self.phi.clamp_(min=0)


def test_projects_after_the_update():
    w, module = torch.ones(2, requires_grad=True), Bounded(torch.tensor([0.1, 0.2]))
    optimizer = HyperOptimizer(
        torch.optim.SGD(module.parameters(), lr=1.0), solver=Dense(), project=[module], warn=False
    )
    optimizer.step(w.sum() + (module.phi * torch.tensor([1.0, -1.0])).sum(), w.square().sum(), [w])
    torch.testing.assert_close(module.phi.detach(), torch.tensor([0.0, 1.2]))


def test_frozen_outer_parameters_stay():
    w, phi = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    frozen = torch.ones(3)
    sgd = torch.optim.SGD([{"params": [phi]}, {"params": [frozen]}], lr=1.0, weight_decay=0.5)
    HyperOptimizer(sgd, solver=Dense()).step(w.sum(), (phi * w.square()).sum(), [w])
    assert torch.equal(frozen, torch.ones(3))
    assert not torch.equal(phi.detach(), torch.ones(2))


def test_a_solve_that_found_nothing_changes_nothing_and_says_so_once():
    problem = Ridge()
    before = problem.decay.detach().clone()
    sgd = torch.optim.SGD([problem.decay], lr=0.1, momentum=0.9)
    optimizer = HyperOptimizer(sgd, solver=Neumann(500, 1e3))
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for _ in range(3):
            stats = optimizer.step(problem.outer_loss(), problem.inner_loss(), [problem.w])
    assert [warning.filename for warning in record] == [__file__, __file__]
    assert "take a smaller one, step_size='auto'" in str(record[0].message)
    assert "An outer step was skipped" in str(record[1].message)
    assert stats.stop_reason == "diverged"
    assert torch.equal(problem.decay.detach(), before)
    assert optimizer.skipped_steps == 3
    assert not sgd.state


@pytest.mark.parametrize("solver", [Neumann(), Chebyshev(steps=20)], ids=repr)
def test_eigenvalues_of_a_wild_batch_do_not_end_all_steps(solver):
    w, phi = torch.tensor([1.0, 2.0], requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = HyperOptimizer(torch.optim.SGD([phi], lr=1e-3), solver=solver, warn=False)
    for scale in (1.0, 1e20, 1.0, 1.0, 1.0):
        stats = optimizer.step(w.sum(), scale * (phi * w.square()).sum(), [w])
    assert optimizer.skipped_steps == 1
    assert stats.residual < 1e-3


@pytest.mark.parametrize("value", [1.0, torch.inf, torch.nan])
def test_an_uncertified_solve_changes_nothing(value):
    class Overflows:
        def solve(self, matvec, rhs, **options):
            return [torch.full_like(b, value) for b in rhs], SolveStats(1, 1, torch.inf, False, "diverged")

    problem = Ridge()
    before = problem.decay.detach().clone()
    optimizer = HyperOptimizer(torch.optim.SGD([problem.decay], lr=1.0), solver=Overflows(), warn=False)
    optimizer.step(problem.outer_loss(), problem.inner_loss(), [problem.w])
    assert torch.equal(problem.decay.detach(), before)
    assert optimizer.skipped_steps == 1


def test_the_default_solver_and_the_curvature_are_passed_on():
    problem = Ridge()
    fit = problem.x @ problem.w
    loss = 0.5 * (problem.weights * (fit - problem.y).square()).sum()
    loss = loss + 0.5 * (problem.decay.exp() * problem.w.square()).sum()
    optimizer = HyperOptimizer(torch.optim.SGD([problem.decay], lr=1.0), curvature="gauss-newton")
    exact = problem.exact()[0]
    optimizer.step(problem.outer_loss(), loss, [problem.w], outputs=fit)  # linear: G is the Hessian
    torch.testing.assert_close(problem.decay.grad, exact, rtol=1e-2, atol=1e-2)


def test_the_state_serves_the_next_step():
    problem = Ridge()
    solver = MINRES(tol=1e-8, warm_start=True)
    optimizer = HyperOptimizer(torch.optim.SGD([problem.decay], lr=1e-12), solver=solver)
    steps = [optimizer.step(problem.outer_loss, problem.inner_loss, [problem.w]).iterations for _ in range(2)]
    assert steps[1] < steps[0]
    optimizer.load_state_dict(optimizer.optimizer.state_dict())  # torch's own, without what the solver has learnt
    assert optimizer.step(problem.outer_loss, problem.inner_loss, [problem.w]).iterations == steps[0]


@pytest.mark.parametrize(
    "solver",
    [
        Neumann(steps=3, warm_start=True),
        ConjugateGradient(steps=2, preconditioner=Jacobi(probes=2)),
        ConjugateGradient(steps=2, preconditioner=Nystrom(rank=3)),
        Nystrom(rank=4),
    ],
)
def test_a_saved_state_goes_on_with_the_same_numbers(solver):
    problem, file = Ridge(), io.BytesIO()
    optimizer = HyperOptimizer(torch.optim.Adam([problem.decay], lr=0.1), solver=solver, warn=False)

    def steps(optimizer, count):
        stats = [optimizer.step(problem.outer_loss, problem.inner_loss, [problem.w]) for _ in range(count)]
        return stats, problem.decay.detach().clone()

    steps(optimizer, 2)
    torch.save([optimizer.state_dict(), problem.decay.detach()], file)
    expected = steps(optimizer, 3)
    file.seek(0)
    state, decay = torch.load(file, weights_only=True)
    with torch.no_grad():
        problem.decay.copy_(decay)
    other = HyperOptimizer(torch.optim.Adam([problem.decay], lr=0.3), solver=solver, warn=False)
    other.load_state_dict(state)
    stats, decay = steps(other, 3)
    assert stats == expected[0]
    assert torch.equal(decay, expected[1])


def test_zero_grad_and_state():
    problem = Ridge()
    optimizer = HyperOptimizer(torch.optim.Adam([problem.decay], lr=0.1), solver=Dense())
    optimizer.step(problem.outer_loss(), problem.inner_loss(), [problem.w])
    optimizer.zero_grad()
    assert problem.decay.grad is None
    other = HyperOptimizer(torch.optim.Adam([problem.decay], lr=0.3), solver=Dense())
    other.load_state_dict(optimizer.state_dict())
    assert other.optimizer.param_groups[0]["lr"] == 0.1
    assert other.state_dict()["state"][0]["step"] == 1


def test_learns_a_better_weight_decay():
    """Few rows and many useless features: the decay that the outer loss wants is far from the initial one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 10, generator=generator, dtype=torch.float64)
    truth = torch.cat([torch.tensor([2.0, -1.0]), torch.zeros(8)]).double()
    y = x @ truth + torch.randn(60, generator=generator, dtype=torch.float64)
    log_decay = nn.Parameter(torch.full((10,), -3.0, dtype=torch.float64))
    w = nn.Parameter(torch.zeros(10, dtype=torch.float64))
    inner_optimizer = torch.optim.SGD([w], lr=0.1)
    outer_optimizer = HyperOptimizer(torch.optim.Adam([log_decay], lr=0.1), solver=Neumann(30, 0.1), max_grad_norm=5.0)

    def outer_loss() -> Tensor:
        return (x[15:] @ w - y[15:]).square().mean()

    def inner_loss() -> Tensor:
        return 0.5 * (x[:15] @ w - y[:15]).square().mean() + 0.5 * (log_decay.exp() * w.square()).sum()

    history = []
    for _ in range(60):
        for _ in range(20):
            inner_optimizer.zero_grad()
            inner_loss().backward()
            inner_optimizer.step()
        history.append(outer_loss().item())
        outer_optimizer.zero_grad()
        stats = outer_optimizer.step(outer_loss(), inner_loss(), [w])
    assert history[-1] < 0.8 * history[0]
    assert stats.residual < 0.1
    assert log_decay[2:].mean() > log_decay[:2].mean() + 0.5  # it shrinks the useless features


def test_settings_are_checked():
    sgd = torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=1.0)
    lbfgs = torch.optim.LBFGS([torch.ones(1, requires_grad=True)])
    with pytest.raises(TypeError, match=r"optimizer must be one whose step\(\) needs no closure, not LBFGS"):
        HyperOptimizer(lbfgs)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, not a list"):
        HyperOptimizer([], solver=Dense())
    with pytest.raises(ValueError, match=r"curvature must be one of hessian, .*, not 'Hessian'"):
        HyperOptimizer(sgd, curvature="Hessian")
    for state in (LinearCombiner(2).state_dict(), None):
        with pytest.raises(ValueError, match="state_dict must be that of a HyperOptimizer or of a torch optimizer"):
            HyperOptimizer(sgd).load_state_dict(state)
    with pytest.raises(ValueError, match="max_grad_norm must be a finite number above 0"):
        HyperOptimizer(sgd, solver=Dense(), max_grad_norm=0.0)
    for project, given in [
        ([Bounded(torch.ones(1)), nn.Linear(1, 1)], "got one with a Linear"),
        (Bounded(torch.ones(1)), "got a Bounded"),
        (3, "got a int"),
        (None, "got a NoneType"),
    ]:
        with pytest.raises(TypeError, match=rf"project must be a list of modules that have project_\(\), {given}"):
            HyperOptimizer(sgd, solver=Dense(), project=project)


class _Wrapper(nn.Module):
    """A module that projects a combiner of its own."""

    def __init__(self, combiner: Combiner) -> None:
        super().__init__()
        self.combiner = combiner

    def project_(self) -> None:
        self.combiner.project_()


class _Projection:
    """Something that is no module, and may project anything."""

    def project_(self) -> None: ...


def _loaded_by_assignment(combiner: Combiner) -> Combiner:
    combiner.load_state_dict(combiner.state_dict(), assign=True)
    return combiner


@pytest.mark.parametrize(
    "made",
    [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), nn.Module.double, _loaded_by_assignment],
    ids=["copy", "deepcopy", "pickle", "double", "assigned"],
)
def test_a_monotone_combiner_that_nothing_projects_is_warned_of(made):
    combiner = made(LinearCombiner(3))
    with pytest.warns(RuntimeWarning, match=r"monotone LinearCombiner monotone: pass project=\[combiner\]") as caught:
        HyperOptimizer(torch.optim.SGD([{"params": combiner.parameters()}], lr=1.0), project=[LinearCombiner(2)])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    HyperOptimizer(torch.optim.SGD(combiner.parameters(), lr=1.0), warn=False)


def test_other_combiners_are_not_warned_of():
    """What is projected, by itself or by something else, and what need not be."""
    combiner, free = NonlinearCombiner(3), NonlinearCombiner(3, monotone=False)
    others = _Wrapper(combiner), _Projection(), copy.copy(combiner)
    for project in ([combiner], (combiner,), iter([combiner]), *([other] for other in others)):
        optimizer = HyperOptimizer(torch.optim.SGD(combiner.parameters(), lr=1.0), project=project)
        assert len(optimizer.project) == 1
    HyperOptimizer(torch.optim.SGD(free.parameters(), lr=1.0))
