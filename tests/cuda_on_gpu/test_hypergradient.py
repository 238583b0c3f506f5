"""A whole bilevel training, inner and outer steps with a learned combiner, on the GPU against the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from auxfast import HyperOptimizer, hypergradient
from auxfast.nn import NonlinearCombiner
from auxfast.solvers import Neumann

pytestmark = pytest.mark.cuda
TASKS, ROWS = 4, 30


class Bilevel:
    """One network with an output for each task; the outer loss is that of the first on other data."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, TASKS)).to(device, dtype)
        self.combiner = NonlinearCombiner(TASKS, (10, 10), main=0).to(device, dtype)
        data = torch.randn(4, ROWS, 6).to(device, dtype)
        self.x, self.outer_x = data[:2]
        self.y, self.outer_y = data[2:, :, :TASKS]
        self.inner_params = list(self.net.parameters())

    def inner_loss(self) -> Tensor:
        decay = sum(p.square().sum() for p in self.inner_params)
        return self.combiner((self.net(self.x) - self.y).square()) + 0.05 * decay

    def outer_loss(self) -> Tensor:
        return (self.net(self.outer_x) - self.outer_y)[:, 0].square().mean()

    def train(self) -> list[float]:
        """Residuals of three outer steps, each after five inner ones."""
        inner = torch.optim.SGD(self.inner_params, lr=0.05, momentum=0.9)
        sgd = torch.optim.SGD(self.combiner.parameters(), lr=0.1, momentum=0.9)
        outer = HyperOptimizer(sgd, solver=Neumann(10, 0.05), max_grad_norm=0.1, project=[self.combiner])
        residuals = []
        for _ in range(3):
            for _ in range(5):
                inner.zero_grad()
                self.inner_loss().backward()
                inner.step()
            outer.zero_grad()
            residuals.append(outer.step(self.outer_loss(), self.inner_loss(), self.inner_params).residual)
        return residuals


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_training(dtype, rtol):
    on_cpu, on_gpu = Bilevel("cpu", dtype), Bilevel("cuda", dtype)
    start = on_cpu.combiner.phi.detach().clone()
    assert on_gpu.train() == pytest.approx(on_cpu.train(), rel=rtol)
    assert not torch.equal(on_cpu.combiner.phi, start)
    for module in ("net", "combiner"):
        states = [getattr(problem, module).state_dict() for problem in (on_cpu, on_gpu)]
        for key, tensor in states[0].items():
            torch.testing.assert_close(states[1][key].cpu(), tensor, rtol=rtol, atol=rtol)


def test_hypergradient_with_a_tolerance():
    """The residual is looked at after every 8th step only, on a GPU."""
    results = []
    for device in ("cpu", "cuda"):
        problem = Bilevel(device, torch.float64)
        problem.inner_params = [torch.zeros(6, dtype=torch.float64, device=device, requires_grad=True)]
        (w,) = problem.inner_params
        x, phi = problem.x, torch.tensor([0.3, 0.2, 0.4, 0.1], dtype=torch.float64, device=device, requires_grad=True)
        inner = ((x @ w)[:, None] - problem.y).square().mean(0) @ phi + 0.1 * w.square().sum()
        outer = (problem.outer_x @ w - problem.outer_y[:, 0]).square().mean()
        results.append(hypergradient(outer, inner, [w], [phi], solver=Neumann(500, 0.1, tol=1e-10)))
    on_cpu, on_gpu = results
    assert on_cpu.stats.converged
    assert on_gpu.stats.converged
    assert on_gpu.stats.iterations == -(-on_cpu.stats.iterations // 8) * 8
    torch.testing.assert_close(on_gpu.grads[0].cpu(), on_cpu.grads[0], rtol=1e-8, atol=1e-10)
