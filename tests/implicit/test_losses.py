"""Losses as functions and as micro-batches: the same hypergradient, in the memory of one, without a trace."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from auxfast.implicit import HyperOptimizer, hypergradient
from auxfast.solvers import MINRES

from .problems import Dense, Ridge

CURVATURES = ["hessian", "gauss-newton", "finite-difference"]


class Batches:
    """A small network on three micro-batches; the first does not use all parameters, `scale` is linear in the loss."""

    def __init__(self) -> None:
        torch.manual_seed(4)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.extra, self.scale = (nn.Parameter(torch.ones(2).double()) for _ in range(2))
        self.phi = nn.Parameter(torch.tensor([0.3, -0.2]).double())
        self.x, self.y = torch.randn(3, 5, 3).double(), torch.randn(3, 5, 2).double()
        self.inner_params = [*self.net.parameters(), self.extra, self.scale]

    def inner(self, i: int) -> tuple[Tensor, Tensor]:
        z = self.net(self.x[i])
        decay = sum(p.square().sum() for p in self.net.parameters())
        decay = decay + ((self.extra - self.phi).square().sum() * i if i else 0) + self.scale.sum()
        return (self.phi.exp() * (z - self.y[i]).square().mean(0)).sum() + 0.1 * decay, z

    def outer(self, i: int) -> Tensor:
        return (self.net(self.x[i].flip(0)) - self.y[i]).square().mean() + i * self.phi.sum() + self.extra.sum()

    def inner_functions(self, curvature: str, count: int = 3) -> list:
        return [lambda i=i: self.inner(i) if curvature == "gauss-newton" else self.inner(i)[0] for i in range(count)]

    def outer_functions(self, count: int = 3) -> list:
        return [lambda i=i: self.outer(i) for i in range(count)]


@pytest.mark.parametrize("curvature", CURVATURES)
def test_micro_batches_give_the_hypergradient_of_their_mean(curvature):
    case = Batches()
    losses, outputs = zip(*(case.inner(i) for i in range(3)), strict=True)
    whole = hypergradient(
        sum(case.outer(i) for i in range(3)) / 3,
        sum(losses) / 3,
        case.inner_params,
        [case.phi],
        solver=Dense(),
        **({"curvature": curvature, "outputs": outputs} if curvature == "gauss-newton" else {}),
    )
    parts = hypergradient(
        case.outer_functions(),
        case.inner_functions(curvature),
        case.inner_params,
        [case.phi],
        solver=Dense(),
        curvature=curvature,
    )
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if curvature == "finite-difference" else {}
    torch.testing.assert_close(parts.grads, whole.grads, **tolerance)
    assert parts.stats.matvecs == whole.stats.matvecs == 12 + 4 + 8 + 2 + 2  # without `scale`


@pytest.mark.parametrize("curvature", CURVATURES)
def test_functions_and_tensors_may_be_mixed(curvature):
    case = Batches()
    options = {"solver": Dense(), "curvature": curvature}
    (function,) = case.inner_functions(curvature, 1)
    params = list(case.net.parameters())
    by_function = hypergradient(lambda: case.outer(0), function, params, [case.phi], **options)
    by_list = hypergradient([lambda: case.outer(0)], [function], params, [case.phi], **options)
    half = hypergradient(case.outer(0), function, params, [case.phi], **options)
    assert torch.equal(by_function.grads[0], half.grads[0])
    assert torch.equal(by_function.grads[0], by_list.grads[0])
    if curvature == "hessian":
        other_half = hypergradient(lambda: case.outer(0), case.inner(0)[0], params, [case.phi], **options)
        assert torch.equal(by_function.grads[0], other_half.grads[0])


@pytest.mark.parametrize("curvature", CURVATURES)
def test_memory_is_that_of_one_micro_batch(curvature):
    """Counts the elements of tensors that graphs hold, as they are saved and as they go."""
    case, held, peak = Batches(), 0, 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal held, peak
            self.tensor = tensor.detach()  # an output would hold the graph that holds it
            held += tensor.numel()
            peak = max(peak, held)
            weakref.finalize(self, self.forget, tensor.numel())

        @staticmethod
        def forget(elements: int) -> None:
            nonlocal held
            held -= elements

    def measure(count: int, outer_count: int) -> int:
        nonlocal peak
        gc.collect()
        assert held == 0
        peak = 0
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            hypergradient(
                case.outer_functions(outer_count),
                case.inner_functions(curvature, count),
                list(case.net.parameters()),
                [case.phi],
                solver=MINRES(steps=4, tol=None),
                curvature=curvature,
                warn=False,
            )
        return peak

    case.x, case.y = case.x.repeat(4, 1, 1), case.y.repeat(4, 1, 1)
    assert 0 < measure(12, 12) <= 1.1 * measure(2, 2)  # every other micro-batch has one more term


def test_functions_are_called_as_often_as_they_must():
    case, calls = Batches(), {"outer": 0, "inner": 0}

    def counted(name: str, function):
        def call():
            calls[name] += 1
            return function()

        return call

    def run(inner, steps=3, **options):
        calls.update(outer=0, inner=0)
        outer = [counted("outer", f) for f in case.outer_functions()]
        params = list(case.net.parameters())
        result = hypergradient(
            outer, inner, params, [case.phi], solver=MINRES(steps=steps, tol=None), warn=False, **options
        )
        return calls["outer"], calls["inner"], result.stats.matvecs

    functions = [counted("inner", f) for f in case.inner_functions("hessian")]
    assert run(functions[0])[:2] == (3, 1)
    outer, inner, matvecs = run(functions)
    assert (outer, inner) == (3, 3 * (1 + matvecs + 1))  # which parameters couple, products, mixed product
    outer, inner, matvecs = run(functions, curvature="finite-difference")
    assert (outer, inner % 3) == (3, 0)
    _, more, more_matvecs = run(functions, steps=6, curvature="finite-difference")
    assert more - inner == 3 * 2 * (more_matvecs - matvecs)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


@pytest.mark.parametrize("curvature", ["hessian", "finite-difference"])
def test_functions_leave_no_trace_and_see_the_same_masks(curvature):
    torch.manual_seed(0)
    net, phi = Noisy().double(), nn.Parameter(torch.zeros((), dtype=torch.float64))
    x, masks = torch.randn(4, 6, 3).double(), [[], []]
    net.layers[3].register_forward_hook(lambda module, args, out: masks[current].append(out != 0))
    current = 0

    def inner(i: int) -> Tensor:
        nonlocal current
        current = i
        return net(x[i]) + phi.exp() * sum(p.square().sum() for p in net.parameters())

    saved = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    params = list(net.parameters())
    functions = [lambda: inner(0), lambda: inner(1)]
    with torch.no_grad():
        hypergradient(lambda: net(x[2]), functions, params, [phi], solver=MINRES(4), curvature=curvature, warn=False)
    assert all(torch.equal(value, saved[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    for mine in (masks[0][1:], masks[1]):  # the first is the outer loss's
        assert len(mine) > 4
        assert all(torch.equal(mask, mine[0]) for mask in mine)
    assert not torch.equal(masks[0][1], masks[1][0])
    assert all(p.grad is None for p in params)


def test_the_optimizer_takes_functions_and_keeps_its_state():
    problem = Ridge()
    optimizer = HyperOptimizer(torch.optim.SGD([problem.decay, problem.weights], lr=0.1), solver=MINRES(tol=1e-10))
    exact, decay = problem.exact(), problem.decay.detach().clone()
    stats = optimizer.step(problem.outer_loss, [problem.inner_loss], [problem.w])
    torch.testing.assert_close(problem.decay.detach(), decay - 0.1 * exact[0])
    assert stats.converged


@pytest.mark.parametrize("name", ["outer_loss", "inner_loss"])
def test_what_is_refused(name):
    problem = Ridge()

    def call(loss):
        losses = {"outer_loss": problem.outer_loss, "inner_loss": problem.inner_loss, name: loss}
        return hypergradient(**losses, inner_params=[problem.w], outer_params=[problem.decay])

    with pytest.raises(TypeError, match=f"{name} must be a tensor, or a function that returns one, not a tuple"):
        call(lambda: (problem.inner_loss(), problem.w))
    with pytest.raises(ValueError, match=rf"{name} must be a scalar, not of shape \(5,\)"):
        call(lambda: problem.w.square())
    with pytest.raises(ValueError, match=rf"{name}\[1\] has no graph"):
        call([problem.inner_loss, lambda: problem.inner_loss().detach()])
    with pytest.raises(TypeError, match=f"{name} must be .*list of such functions, not a list of tensors"):
        call([problem.inner_loss()])
    with pytest.raises(ValueError, match=f"{name} is empty"):
        call([])
    with pytest.raises(ValueError, match=f"{name} does not depend on any of inner_params"):
        call(lambda: problem.decay.square().sum())
    with pytest.raises(ZeroDivisionError):
        call(lambda: 1 / 0)


def test_a_function_that_keeps_its_graph_is_told_so():
    problem = Ridge()
    features = problem.x @ problem.w

    def inner() -> Tensor:
        return (problem.weights * (features - problem.y).square()).sum() + problem.w.square().sum()

    args = (problem.outer_loss, [inner, inner], [problem.w], [problem.weights])
    with pytest.raises(RuntimeError, match=r"graph of inner_loss\[1\] was freed before"):
        hypergradient(*args, curvature="finite-difference")
