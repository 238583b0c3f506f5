"""Several tasks that make one outer step: `HyperOptimizer.accumulate`."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import Tensor

from auxfast.implicit import HyperOptimizer
from auxfast.nn import LinearCombiner
from auxfast.solvers import MINRES, Neumann

from .problems import Dense


class Task:
    """inner(w) = scale / 2 |w - a phi|^2, outer(w) = 1/2 |w - b|^2: the hypergradient is a (w - b), and the minimum at
    w = a phi."""

    def __init__(self, phi: Tensor, a: float, b: float, scale: float = 1.0) -> None:
        self.phi, self.a, self.b, self.scale = phi, a, b, scale
        self.w = (a * phi.detach()).requires_grad_()

    def outer(self) -> Tensor:
        return 0.5 * (self.w - self.b).square().sum()

    def inner(self) -> Tensor:
        return 0.5 * self.scale * (self.w - self.a * self.phi).square().sum()

    def losses(self):
        return self.outer, self.inner, [self.w]

    def exact(self) -> Tensor:
        return self.a * (self.w.detach() - self.b)


class Overflows(Task):
    def inner(self) -> Tensor:
        return super().inner() * torch.inf


def setup(count: int = 3, solver=None, **options) -> tuple[Tensor, list[Task], HyperOptimizer]:
    phi = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    tasks = [Task(phi, 1.0 + i, 0.5 - i, scale=10.0**i) for i in range(count)]
    return phi, tasks, HyperOptimizer(torch.optim.SGD([phi], lr=0.1), solver=solver or Dense(), **options)


@pytest.mark.parametrize("last_in_step", [True, False])
def test_a_step_follows_the_sum_of_all_tasks(last_in_step):
    phi, tasks, outer = setup()
    before, exact = phi.detach().clone(), sum(task.exact() for task in tasks)
    for task in tasks[:2] if last_in_step else tasks:
        outer.accumulate(*task.losses())
        assert torch.equal(phi.detach(), before)
    stats = outer.step(*tasks[2].losses()) if last_in_step else outer.step()
    torch.testing.assert_close(phi.grad, exact)
    torch.testing.assert_close(phi.detach(), before - 0.1 * exact)
    assert stats.converged
    outer.step(*tasks[0].losses())  # nothing of the last step is left
    torch.testing.assert_close(phi.grad, tasks[0].exact())


def test_weights_make_the_sum_a_mean():
    phi, tasks, outer = setup()
    for task in tasks:
        outer.accumulate(*task.losses(), weight=1 / 3)
    outer.step()
    torch.testing.assert_close(phi.grad, sum(task.exact() for task in tasks) / 3)


def test_tensors_serve_and_inner_training_between_leaves_no_trace():
    phi, tasks, outer = setup()
    exact = sum(task.exact() for task in tasks)
    for task in tasks:
        outer.accumulate(task.outer(), task.inner(), [task.w])
        task.inner().backward()  # writes phi.grad
        outer.zero_grad()
    outer.step()
    torch.testing.assert_close(phi.grad, exact)


def test_the_sum_is_clipped():
    phi, tasks, outer = setup(max_grad_norm=0.5)
    exact = sum(task.exact() for task in tasks)
    for task in tasks:
        outer.accumulate(*task.losses())
    outer.step()
    torch.testing.assert_close(phi.grad, 0.5 * exact / exact.norm())


@pytest.mark.parametrize("names", [(None, None, None), ("a", "b", "c")])
def test_each_task_has_a_state_of_its_own(names):
    _, tasks, outer = setup(solver=Neumann(40, tol=1e-9), warn=False)
    order = [0, 1, 2]
    for _ in range(2):
        for i in order:
            stats = outer.accumulate(*tasks[i].losses(), task=names[i])
            assert stats.largest_eigenvalue == pytest.approx(10.0**i)
        outer.step()
        order = order if names[0] is None else order[::-1]
    states = [outer.state, *outer.task_states.values()] if names[0] is None else list(outer.task_states.values())
    assert [state.largest_eigenvalue for state in states] == pytest.approx([1.0, 10.0, 100.0])


def test_warm_starts_are_of_the_same_task():
    _, tasks, outer = setup(solver=MINRES(tol=1e-8, warm_start=True))
    outer.optimizer.param_groups[0]["lr"] = 1e-12
    for expected in ([1, 1, 1], [0, 0, 0]):
        assert [outer.accumulate(*task.losses()).iterations for task in tasks] == expected
        outer.step()


def test_a_task_that_is_not_finite_is_left_out_and_counted():
    phi, tasks, outer = setup()
    exact = tasks[0].exact() + tasks[1].exact()
    outer.accumulate(*tasks[0].losses())
    assert outer.accumulate(*Overflows(phi, 1.0, 2.0).losses()).stop_reason == "not finite"
    outer.accumulate(*tasks[1].losses())
    with pytest.warns(RuntimeWarning, match="A task was left out of an outer step, and HyperOptimizer.skipped_tasks"):
        stats = outer.step()
    assert stats.stop_reason == "not finite"
    torch.testing.assert_close(phi.grad, exact)
    assert (outer.skipped_tasks, outer.skipped_steps) == (1, 0)


def test_a_step_without_any_task_left_is_skipped():
    phi, _, outer = setup()
    before = phi.detach().clone()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for _ in range(2):
            for _ in range(2):
                outer.accumulate(*Overflows(phi, 1.0, 2.0).losses())
            outer.step()
    assert [str(warning.message)[:25] for warning in record] == ["An outer step was skipped"]
    assert record[0].filename == __file__
    assert torch.equal(phi.detach(), before)
    assert (outer.skipped_tasks, outer.skipped_steps) == (4, 2)
    assert outer.step(*Task(phi, 1.0, 2.0).losses()).converged


def test_a_warning_is_given_once_for_all_tasks():
    _, tasks, outer = setup(solver=MINRES(steps=1, tol=1e-12))
    for task in tasks:
        task.inner = lambda task=task: (torch.tensor([1.0, 3.0]) * (task.w - task.phi).square()).sum()
    with pytest.warns(RuntimeWarning, match="is not solved to the solver's tol"):
        outer.accumulate(*tasks[0].losses())
    for task in tasks[1:]:
        outer.accumulate(*task.losses())


def test_a_saved_state_goes_on_with_the_same_numbers():
    def steps(phi, outer, count):
        tasks = [Task(phi, 1.0 + i, 0.5 - i, scale=10.0**i) for i in range(3)]
        stats = []
        for _ in range(count):
            stats += [outer.accumulate(*task.losses(), task=name) for task, name in zip(tasks, "xyz", strict=True)]
            outer.step()
        return stats

    phi, _, outer = setup(solver=Neumann(3, warm_start=True), warn=False)
    steps(phi, outer, 2)
    file = io.BytesIO()
    torch.save([outer.state_dict(), phi.detach()], file)
    expected = steps(phi, outer, 3)
    file.seek(0)
    state, saved = torch.load(file, weights_only=True)
    other_phi, _, other = setup(solver=Neumann(3, warm_start=True), warn=False)
    with torch.no_grad():
        other_phi.copy_(saved)
    other.load_state_dict(state)
    assert steps(other_phi, other, 3) == expected
    assert torch.equal(other_phi, phi)
    assert all(task.warned is other.state.warned for task in other.task_states.values())


def test_the_limit_on_weights_and_the_watch_are_of_the_whole_step():
    combiner = LinearCombiner(2, init_value=1.0).double()
    outer = HyperOptimizer(
        torch.optim.SGD(combiner.parameters(), lr=100.0), solver=Dense(), project=[combiner], max_weight_change=0.1
    )
    for weight, target in ((1.0, 2.0), (3.0, 4.0)):
        w = torch.tensor([0.5, 0.5], dtype=torch.float64, requires_grad=True)
        losses = torch.stack([(w - 1).square().sum(), w.square().sum()])[None]
        outer.accumulate((w - target).square().sum(), combiner(losses), [w], weight=weight)
    outer.step()
    change = (combiner.mean_weights(losses.detach()) - 1).abs()
    assert 0.05 < change.max() <= 0.1
    assert outer.watch.latest_outer_loss == pytest.approx((1 * 2 * 1.5**2 + 3 * 2 * 3.5**2) / 4)


def test_what_is_refused():
    _, tasks, outer = setup()
    with pytest.raises(RuntimeError, match=r"step\(\) without losses needs accumulate\(\) or accumulate_result\(\)"):
        outer.step()
    with pytest.raises(TypeError, match=r"step takes outer_loss, inner_loss and inner_params, or none of them after"):
        outer.step(tasks[0].outer)
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="weight must be a finite number above 0"):
            outer.accumulate(*tasks[0].losses(), weight=weight)
    with pytest.raises(TypeError, match="task must be an integer, a text or None, not a float"):
        outer.accumulate(*tasks[0].losses(), task=1.5)
    with pytest.raises(RuntimeError, match=r"step\(\) without losses"):  # nothing was added
        outer.step()
    outer.accumulate(*tasks[0].losses())
    with pytest.raises(RuntimeError, match=r"state_dict\(\) between accumulate\(\) and step\(\) would lose"):
        outer.state_dict()


def test_parameters_that_came_between_the_tasks_and_the_step_are_told():
    phi, late = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    outer = HyperOptimizer(torch.optim.SGD([phi], lr=0.1), solver=MINRES())
    outer.accumulate(*Task(phi, 2.0, 1.0).losses())
    outer.optimizer.add_param_group({"params": [late]})
    with pytest.raises(
        RuntimeError, match=r"holds 2 parameters at the step, and held 1 .*: add parameter groups after"
    ):
        outer.step()
