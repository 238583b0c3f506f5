"""`verify_against_retraining`: it tells a hypergradient that points where retraining goes from one that does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import auxfast
from auxfast import verify_against_retraining
from auxfast.solvers import MINRES, GradientFlow, Identity

CURVATURES = torch.tensor([10.0, 1.0], dtype=torch.float64)
PULL = torch.tensor([[1.0, 1.0], [-0.2, -0.19]], dtype=torch.float64)


def parameters(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


class Valley:
    """A quadratic whose minimum lies at the end of a flat valley.

    After short training the outer loss falls where phi falls, since steps across the valley have done all that was
    done; at the minimum it falls where phi grows. The identity approximation is right in the first case, and the exact
    inverse in the second.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.phi = parameters(0.5, 0.4)
        self.trainings = 0

    def __call__(self, seed: int):
        self.trainings += 1
        generator = torch.Generator().manual_seed(seed)
        start = 0.1 * torch.randn(2, generator=generator, dtype=torch.float64)
        w = start.requires_grad_()

        def inner_loss():
            return 0.5 * (CURVATURES * w * w).sum() - w @ PULL @ self.phi

        optimizer = torch.optim.SGD([w], lr=0.1)
        for _ in range(self.steps):
            optimizer.zero_grad()
            inner_loss().backward()
            optimizer.step()
        return w.sum(), inner_loss(), [w]


def test_a_hypergradient_of_converged_training_points_right():
    problem = Valley(steps=150)
    report = verify_against_retraining(problem, [problem.phi], seeds=range(3))
    torch.testing.assert_close(report.predictions["MINRES"].predicted, report.retrained, rtol=1e-3, atol=1e-6)
    # d (w_1 + w_2) / d phi = PULL^T CURVATURES^-1 (1, 1), and each entry is moved by a quarter of itself
    expected = (PULL.T @ (1 / CURVATURES)) * problem.phi.detach() / 4
    torch.testing.assert_close(report.retrained.mean(0), expected, rtol=1e-3, atol=1e-6)
    assert report.predictions["MINRES"].outcome == "right"
    assert report.verdict.startswith("points right (cosine +1.00 +- 0.00, size 1)")
    assert report.agreement.mean > 0.999


def test_the_identity_approximation_is_told_to_be_wrong_where_the_curvature_turns_the_direction():
    problem = Valley(steps=150)
    report = verify_against_retraining(problem, [problem.phi], solver=Identity(0.1), seeds=range(3))
    assert report.predictions["Identity"].outcome == "wrong"
    assert "does not point where retraining goes" in report.verdict
    assert "learning will not help here" in report.verdict


def test_an_exact_solve_is_told_to_be_wrong_where_training_stopped_early():
    problem = Valley(steps=5)
    solvers = {"exact": MINRES(), "one step": Identity(0.1)}
    report = verify_against_retraining(problem, [problem.phi], solver=solvers, seeds=range(3))
    exact, one_step = report.predictions["exact"], report.predictions["one step"]
    assert exact.outcome == "wrong"
    assert exact.cosine.mean < -0.9
    assert exact.signs == 0
    assert max(stats.residual for stats in exact.stats) < 1e-3  # which tells nothing of it
    assert one_step.outcome == "right"
    assert one_step.cosine_of_means > 0.9
    assert float(report.inner_gradient_norms.min()) > 0.01
    assert "exact: the hypergradient does not point" in report.verdict
    assert "one step: points right" in str(report)


def test_the_largest_stable_learning_rate_is_told_where_a_solver_knows_it():
    problem = Valley(steps=5)
    report = verify_against_retraining(problem, [problem.phi], solver=GradientFlow(time=0.5), seeds=range(2))
    assert report.largest_eigenvalue == pytest.approx(10)
    assert "stable up to a learning rate of 0.2" in str(report)
    assert report.predictions["GradientFlow"].outcome == "right"


def test_several_solvers_share_the_trainings():
    problem = Valley(steps=2)
    solvers = {"exact": MINRES(), "one step": Identity(0.1), "another": Identity(1.0)}
    verify_against_retraining(problem, [problem.phi], solver=solvers, seeds=[4, 7, 8])
    assert problem.trainings == 3 * (2 * 2 + 1) + 1


def noisy(phi: torch.Tensor):
    """A training whose end depends chaotically on the outer parameters, and otherwise not."""

    def train(seed: int):
        generator = torch.Generator().manual_seed(1000 * seed + int(1e6 * phi.detach().sum()) % 997)
        w = torch.randn(3, generator=generator, dtype=torch.float64).requires_grad_()
        return w.sum(), 0.5 * (w - phi).square().sum(), [w]

    return train


def test_noise_is_told_from_a_direction():
    phi = parameters(1.0, 2.0, 3.0)
    report = verify_against_retraining(noisy(phi), [phi])
    assert report.predictions["MINRES"].outcome == "noise"
    assert "not distinguishable from noise" in report.verdict
    assert "more seeds" in report.verdict
    assert report.agreement.lower < 0


def test_noise_is_rarely_mistaken_for_a_direction():
    phi = parameters(1.0, 2.0, 3.0)
    outcomes = [
        verify_against_retraining(noisy(phi), [phi], seeds=range(5 * i, 5 * i + 5)).predictions["MINRES"].outcome
        for i in range(40)
    ]
    assert outcomes.count("noise") >= 34


def test_one_outer_parameter_needs_more_than_a_sign():
    phi = parameters(1.0)
    outcomes = [
        verify_against_retraining(noisy(phi), [phi], seeds=[2 * i, 2 * i + 1]).predictions["MINRES"].outcome
        for i in range(20)
    ]
    assert outcomes.count("noise") >= 17


def test_ridge_regression_in_closed_form():
    """A weight decay of each feature, trained by solving the normal equations."""
    log_decay = parameters(*([-1.0] * 4))

    def train(seed: int):
        generator = torch.Generator().manual_seed(seed)
        x, held = (torch.randn(30, 4, generator=generator, dtype=torch.float64) for _ in range(2))
        y = x[:, 0] + torch.randn(30, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            w = torch.linalg.solve(x.T @ x / 30 + torch.diag(log_decay.exp()), x.T @ y / 30)
        w.requires_grad_()
        return (
            lambda: (held @ w - held[:, 0]).square().mean(),
            lambda: 0.5 * (x @ w - y).square().mean() + 0.5 * (log_decay.exp() * w.square()).sum(),
            [w],
        )

    report = verify_against_retraining(train, [log_decay], step=0.01)
    assert report.share is None
    assert str(report).startswith("5 seeds, each entry of the outer parameters moved up and down by 0.01\n")
    torch.testing.assert_close(report.moves, 0.01 * torch.eye(4, dtype=torch.float64))
    predicted = report.predictions["MINRES"].predicted
    assert float((predicted - report.retrained).norm() / report.retrained.norm()) < 2e-3
    assert report.predictions["MINRES"].outcome == "right"
    assert float(report.inner_gradient_norms.max()) < 1e-12


def test_entries_next_to_zero_are_moved_by_a_share_of_the_typical_size():
    small, zero = parameters(3.0, 0.001, -4.0), parameters(0.0)
    frozen = torch.zeros(2)

    def train(seed: int):
        w = torch.full((), float(seed), dtype=torch.float64, requires_grad=True)
        end = (small.detach().sum() + zero.detach().sum()).requires_grad_()
        return end + 0 * w, 0.5 * (w - small.sum() - zero.sum()).square(), [w]

    typical = (torch.tensor(25.0) / 3).sqrt().item()
    report = verify_against_retraining(train, [small, frozen, zero], share=0.1, seeds=[1, 2])
    expected = torch.tensor([0.3, 0.1 * typical, 0.4, 0.1], dtype=torch.float64)
    torch.testing.assert_close(report.moves, torch.diag(expected), rtol=1e-6, atol=0)


def test_many_outer_parameters_are_moved_together_with_random_signs():
    phi = torch.linspace(1, 2, 20, requires_grad=True)
    before = phi.detach().clone()

    def train(seed: int):
        w = phi.detach().clone().requires_grad_()  # the minimum
        target = torch.randn(20, generator=torch.Generator().manual_seed(seed))
        return (w - 5 * target).square().sum(), 0.5 * (w - phi).square().sum(), [w]

    report = verify_against_retraining(train, [phi], max_directions=6)
    assert report.moves.shape == (6, 20)
    torch.testing.assert_close(report.moves.abs(), (before / 4).double().expand(6, 20))
    assert report.predictions["MINRES"].outcome == "right"
    assert report.predictions["MINRES"].cosine.mean > 0.999
    assert "direction 5" in str(report)


def test_gauss_newton_and_micro_batches():
    weight = torch.tensor(0.5, requires_grad=True)

    def train(seed: int):
        torch.manual_seed(seed)
        net, x = nn.Linear(3, 1), torch.randn(40, 3)
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=50)

        def batch(rows: slice):
            y = net(x[rows])
            return (y - x[rows, :1]).square().mean() + weight * (y + x[rows, 1:2]).square().mean(), y

        batches = [lambda: batch(slice(20)), lambda: batch(slice(20, 40))]

        def closure():
            optimizer.zero_grad()
            loss = sum(b()[0] for b in batches) / 2
            loss.backward()
            return loss

        optimizer.step(closure)
        return [lambda: (net(x) - x[:, :1]).square().mean()], batches, net.parameters()

    report = verify_against_retraining(train, [weight], curvature="gauss-newton", share=0.1)
    assert report.predictions["MINRES"].outcome == "right"
    assert report.predictions["MINRES"].size == pytest.approx(1, abs=0.05)


def test_parameters_and_their_gradients_are_put_back():
    problem = Valley(steps=3)
    problem.phi.grad = torch.ones_like(problem.phi)
    before = problem.phi.detach().clone()
    verify_against_retraining(problem, [problem.phi], seeds=range(2))
    assert torch.equal(problem.phi, before)
    assert torch.equal(problem.phi.grad, torch.ones_like(before))

    def fails(seed: int):
        if not torch.equal(problem.phi, before):
            raise KeyError("after the move")
        return problem(seed)

    with pytest.raises(KeyError, match="after the move"):
        verify_against_retraining(fails, [problem.phi])
    assert torch.equal(problem.phi, before)
    assert torch.equal(problem.phi.grad, torch.ones_like(before))


def test_training_that_ignores_the_outer_parameters_is_told_at_once():
    problem = Valley(steps=3)
    copy = problem.phi.detach().clone().requires_grad_()
    with pytest.raises(ValueError, match="train ignores outer_params: with seed 0"):
        verify_against_retraining(problem, [copy])
    assert problem.trainings == 2 * 2 + 2


def test_training_that_is_not_deterministic_is_told_at_once():
    problem = Valley(steps=3)

    def train(seed: int):
        return problem(problem.trainings)

    with pytest.raises(ValueError, match="train is not deterministic: two trainings with seed 0"):
        verify_against_retraining(train, [problem.phi])
    assert problem.trainings == 2


def test_training_that_diverges_or_moves_the_outer_parameters_is_told():
    problem = Valley(steps=3)

    def diverges(seed: int):
        outer_loss, inner_loss, params = problem(seed)
        return outer_loss / (float(problem.phi.detach()[0]) == 0.5), inner_loss, params

    with pytest.raises(auxfast.NotFiniteError, match="after training with seed 0: inner training has diverged"):
        verify_against_retraining(diverges, [problem.phi])

    def moves(seed: int):
        with torch.no_grad():
            problem.phi.add_(1)
        return problem(seed)

    with pytest.raises(ValueError, match="train changes outer_params"):
        verify_against_retraining(moves, [problem.phi])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train": torch.ones(())}, TypeError, "train must be a function of a seed, not a Tensor"),
        ({"train": lambda seed: None}, TypeError, r"train must return a tuple .* not a NoneType"),
        ({"train": lambda seed: (1, 2)}, TypeError, r"train must return a tuple .* not 2 things"),
        ({"seeds": [3]}, ValueError, "seeds must be at least two different ones"),
        ({"seeds": [3, 3, 4]}, ValueError, "seeds must be at least two different ones"),
        ({"seeds": 3}, TypeError, r"seeds must be an iterable, such as range\(5\), not a int"),
        ({"solver": {}}, ValueError, "solver is empty"),
        ({"solver": {"a": 3}}, TypeError, "solver"),
        ({"share": 0.0}, ValueError, "share"),
        ({"step": -1.0}, ValueError, "step"),
        ({"max_directions": 0}, ValueError, "max_directions"),
        ({"curvature": "flat"}, ValueError, "curvature"),
        ({"outer_params": []}, ValueError, "outer_params is empty"),
        ({"outer_params": [torch.ones(2)]}, ValueError, "outer_params has no parameter with requires_grad=True"),
        ({"outer_params": [torch.ones(2, requires_grad=True) * 2]}, ValueError, "outer_params must be leaves"),
    ],
)
def test_wrong_arguments_are_named(options, error, message):
    problem = Valley(steps=1)
    arguments = {"train": problem, "outer_params": [problem.phi], **options}
    with pytest.raises(error, match=message):
        verify_against_retraining(**arguments)
