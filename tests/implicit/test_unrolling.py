"""Steps of training as a reference for hypergradients: `verify_hypergradient(unrolled=K, optimizer=...)`."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from auxfast import MicroBatches
from auxfast.implicit import verify_hypergradient
from auxfast.solvers import MINRES, Identity

from .problems import Ridge

EXACT = MINRES(tol=1e-10)


def verify(problem: Ridge, **options):
    args = (problem.outer_loss, problem.inner_loss, [problem.w], [problem.decay, problem.weights])
    return verify_hypergradient(*args, **{"solver": EXACT, "max_directions": 17, **options})


def unrolled(problem: Ridge, steps: int, optimizer: torch.optim.Optimizer, **options) -> Tensor:
    """The derivatives alone, which need no solved inner problem."""
    report = verify(problem, unrolled=steps, optimizer=optimizer, solve_inner=lambda: None, **options)
    return report.unrolled.derivatives


def by_autograd(problem: Ridge, steps: int, update) -> Tensor:
    """Derivative of the outer loss after steps of `update(w, gradient, state) -> w`, through the graph of all."""
    phi = [problem.decay.detach().requires_grad_(), problem.weights.detach().requires_grad_()]
    w, state = problem.w.detach().requires_grad_(), {}
    for _ in range(steps):
        fit = (phi[1] * (problem.x @ w - problem.y).square()).sum()
        loss = 0.5 * fit + 0.5 * (phi[0].exp() * w.square()).sum()
        w = update(w, torch.autograd.grad(loss, w, create_graph=True)[0], state)
    outer = 0.5 * (problem.outer_x @ w - problem.outer_y).square().sum() + phi[0].square().sum()
    return torch.cat(torch.autograd.grad(outer, phi))


def moved(problem: Ridge) -> Ridge:
    with torch.no_grad():
        problem.w.add_(1)
    return problem


def test_one_step_is_the_step_size_times_the_mixed_derivative():
    problem = moved(Ridge())
    report = verify(problem, unrolled=1, optimizer=torch.optim.SGD([problem.w], lr=0.01))
    expected = by_autograd(problem, 1, lambda w, grad, state: w - 0.01 * grad)
    torch.testing.assert_close(report.unrolled.derivatives, expected)
    assert report.training.relative_error > 0.1


def test_one_step_at_the_minimum_is_the_identity_approximation():
    problem = Ridge()
    sgd = torch.optim.SGD([problem.w], lr=1e-6)
    report = verify(problem, unrolled=1, optimizer=sgd, solver=Identity(1e-6))
    assert report.training.relative_error < 1e-4  # the step moves the place of the outer gradient by next to nothing
    assert "off the derivative of 1 step of SGD" in report.verdict


def momentum(w: Tensor, grad: Tensor, state: dict) -> Tensor:
    state["m"] = 0.8 * state.get("m", 0) + grad if state else grad
    return w - 0.01 * state["m"]


def adam(w: Tensor, grad: Tensor, state: dict) -> Tensor:
    state["t"] = t = state.get("t", 0) + 1
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * grad
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * grad.square()
    return w - 0.05 * (state["m"] / (1 - 0.9**t)) / ((state["v"] / (1 - 0.999**t)).sqrt() + 1e-8)


@pytest.mark.parametrize(
    ("update", "make"),
    [
        (momentum, lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.8)),
        (adam, lambda params: torch.optim.Adam(params, lr=0.05)),
    ],
)
@pytest.mark.parametrize("steps", [2, 20])
def test_it_is_the_derivative_through_all_steps(update, make, steps):
    problem = moved(Ridge())
    expected = by_autograd(problem, steps, update)
    torch.testing.assert_close(unrolled(problem, steps, make([problem.w])), expected)


def test_many_steps_are_the_hypergradient():
    problem = Ridge()
    sgd = torch.optim.SGD([problem.w], lr=0.02, momentum=0.5)
    reports = [verify(problem, unrolled=k, optimizer=sgd, max_directions=2) for k in (1, 10, 400)]
    errors = [report.training.relative_error for report in reports]
    assert errors[0] > errors[1] > 0.05
    assert errors[2] < 1e-6
    exact = reports[2].directions @ torch.cat(problem.exact()).detach()
    torch.testing.assert_close(reports[2].unrolled.derivatives, exact)


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda params: torch.optim.AdamW(params, lr=0.02, amsgrad=True, foreach=True),
        lambda params: torch.optim.Adam(params, lr=0.02, weight_decay=0.1, maximize=True),
        lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, dampening=0.5),
    ],
    ids=["Nesterov", "AdamW", "Adam", "dampened"],
)
def test_it_is_what_differences_of_trainings_tend_to(make):
    problem = moved(Ridge())
    start, decay = problem.w.detach().clone(), problem.decay.detach().clone()
    optimizer = make([problem.w])
    for _ in range(2):  # a state to go on from
        problem.w.grad = torch.randn(5, dtype=torch.float64)
        optimizer.step()
    saved = deepcopy(optimizer.state_dict())

    def trained(step: float) -> float:
        with torch.no_grad():
            problem.w.copy_(start)
            problem.decay.copy_(decay)
            problem.decay[0] += step
        optimizer.load_state_dict(deepcopy(saved))
        for _ in range(6):
            problem.w.grad = torch.autograd.grad(problem.inner_loss(), problem.w)[0]
            optimizer.step()
        return problem.outer_loss().item()

    expected = (trained(1e-5) - trained(-1e-5)) / 2e-5
    trained(0.0)
    with torch.no_grad():
        problem.w.copy_(start)
    optimizer.load_state_dict(saved)
    assert unrolled(problem, 6, optimizer)[0].item() == pytest.approx(expected, rel=1e-6)


def test_relus_that_switch_on_the_way_and_float32_do_no_harm():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    x, y, held_out = torch.randn(32, 4), torch.randn(32, 2), torch.randn(16, 4)
    phi = torch.zeros(2, requires_grad=True)

    def inner(values: dict) -> Tensor:
        return (phi.exp() * (torch.func.functional_call(net, values, x) - y).square().mean(0)).sum()

    values = {name: w.detach().clone().requires_grad_() for name, w in net.named_parameters()}
    for _ in range(50):
        grads = torch.autograd.grad(inner(values), list(values.values()), create_graph=True)
        values = {name: w - 0.1 * g for (name, w), g in zip(values.items(), grads, strict=True)}
    expected = torch.autograd.grad(torch.func.functional_call(net, values, held_out).square().mean(), phi)[0]
    report = verify_hypergradient(
        lambda: net(held_out).square().mean(),
        lambda: inner(dict(net.named_parameters())),
        net.parameters(),
        [phi],
        unrolled=50,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        solve_inner=lambda: None,
    )
    torch.testing.assert_close(report.unrolled.derivatives, expected.double(), rtol=1e-4, atol=1e-6)


def test_entries_whose_gradient_is_0_do_not_spoil_adam():
    """Dead units: the root of their squared gradients has no derivative."""
    w, phi = torch.zeros(3).double().requires_grad_(), torch.ones(2).double().requires_grad_()

    def inner() -> Tensor:
        return (w[:2] - phi).square().sum() + 0 * w[2]

    def by_adam(entries: Tensor) -> Tensor:
        state: dict = {}
        for _ in range(3):
            entries = adam(entries, 2 * (entries - phi), state)
        return torch.autograd.grad(entries.sum(), phi)[0]

    report = verify_hypergradient(
        lambda: w.sum(), inner, [w], [phi], unrolled=3, optimizer=torch.optim.Adam([w], lr=0.05)
    )
    expected = by_adam(torch.zeros(2).double().requires_grad_())
    torch.testing.assert_close(report.unrolled.derivatives, expected)


def test_the_optimizer_goes_on_from_its_state_and_is_left_alone():
    problem = moved(Ridge())
    adam = torch.optim.Adam([problem.w], lr=0.05)
    fresh = unrolled(problem, 3, adam)
    for _ in range(5):
        problem.w.grad = torch.randn(5, dtype=torch.float64)
        adam.step()
    before, w = deepcopy(adam.state_dict()), problem.w.detach().clone()
    moment = adam.state[problem.w]["exp_avg"]
    found = unrolled(problem, 3, adam)
    assert adam.state[problem.w]["exp_avg"] is moment
    torch.testing.assert_close(adam.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(problem.w.detach(), w)
    with torch.no_grad():
        problem.w.copy_(moved(Ridge()).w)
    assert not torch.allclose(unrolled(problem, 3, adam), fresh)
    assert found.isfinite().all()


def test_the_report_says_how_far_an_unconverged_training_is_from_it():
    problem = Ridge()
    report = verify(problem, unrolled=3, optimizer=torch.optim.SGD([problem.w], lr=1e-3))
    assert report.verdict.startswith("right: less than 0.01% off the finite differences; against the derivative of 3")
    assert "against 3 of SGD" in str(report)
    assert "unrolled" not in str(verify(problem))
    sgd = torch.optim.SGD([problem.w], lr=1e6)
    diverging = verify(problem, unrolled=60, optimizer=sgd, max_directions=1)
    assert diverging.verdict.endswith("; the derivative of 60 steps of SGD is not finite: training diverges")


def test_micro_batches_are_verified_and_unrolled_as_their_mean():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1)).double()
    x, y = torch.randn(11, 3).double(), torch.randn(11, 1).double()
    decay = torch.tensor(-1.0).double().requires_grad_()
    batches = [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])]

    def inner(batch) -> Tensor:
        penalty = sum(p.square().sum() for p in net.parameters())
        return (net(batch[0]) - batch[1]).square().mean() + decay.exp() * penalty

    def verified(outer, inner):
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        options = {"unrolled": 4, "optimizer": sgd, "solver": MINRES(tol=1e-8)}
        return verify_hypergradient(outer, inner, net.parameters(), [decay], **options)

    lbfgs = torch.optim.LBFGS(net.parameters(), max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")
    net.eval()

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = inner((x, y))
        loss.backward()
        return loss

    lbfgs.step(closure)
    outer = lambda batch: (net(batch[0]) - 2 * batch[1]).square().mean()  # noqa: E731
    parts = verified(MicroBatches(outer, batches), MicroBatches(inner, batches))
    whole = verified(lambda: outer((x, y)), lambda: inner((x, y)))
    assert parts.verdict.startswith("right: ")
    torch.testing.assert_close(parts.finite_differences, whole.finite_differences, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(parts.unrolled.derivatives, whole.unrolled.derivatives, rtol=1e-8, atol=1e-10)
    assert parts.recorded_error < 1e-6
    net.train()
    assert verified(MicroBatches(outer, batches), MicroBatches(inner, batches)).solver.relative_error < 1e-6


class Signed(torch.optim.SGD):
    def step(self):
        for w in self.param_groups[0]["params"]:
            w.grad.sign_()
        super().step()


def test_what_is_refused():
    problem = Ridge()
    other = torch.ones(2, requires_grad=True)
    for options, error, message in (
        ({"unrolled": 3}, ValueError, "unrolled, the number of steps, and optimizer, .* give both or none"),
        ({"optimizer": torch.optim.SGD([problem.w])}, ValueError, "give both or none"),
        ({"unrolled": 0, "optimizer": torch.optim.SGD([problem.w])}, ValueError, "unrolled must be an integer of at"),
        ({"unrolled": 1, "optimizer": torch.optim.SGD}, TypeError, "optimizer must be a torch.optim.SGD, Adam or"),
        ({"unrolled": 1, "optimizer": torch.optim.LBFGS([problem.w])}, TypeError, "AdamW, whose .*, not a LBFGS"),
        ({"unrolled": 1, "optimizer": Signed([problem.w])}, RuntimeError, "optimizer moves .* in another way than"),
        ({"unrolled": 1, "optimizer": torch.optim.SGD([other])}, ValueError, "it lacks 1 of them, and holds 1 others"),
    ):
        with pytest.raises(error, match=message):
            verify(problem, **options)
