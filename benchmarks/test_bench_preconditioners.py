"""Products of conjugate gradients to a residual of 1e-3 with each preconditioner, after training by an optimizer.

A classification of 500 points with 20 inputs into 5 classes by a linear model or a tanh network 20-20-5, float64, with
weight decay 1e-3, after 1000 steps; Gauss-Newton, so that there is no negative curvature before the minimum. Products
of preconditioners and certificates count.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import auxfast
from auxfast.solvers import ConjugateGradient, FromOptimizer, Jacobi, Nystrom

OPTIMIZERS = {"Adam": {"lr": 0.003}, "RMSprop": {"lr": 0.003}, "Adagrad": {"lr": 0.03}}


@pytest.mark.parametrize("model", ["linear", "network"])
@pytest.mark.parametrize("units", ["different", "equal"])
@pytest.mark.parametrize(
    ("optimizer", "batch"), [("Adam", 32), ("Adam", 500), ("RMSprop", 32), ("Adagrad", 32), ("LBFGS", 500)]
)
def test_products(benchmark, model, units, optimizer, batch):
    torch.manual_seed(0)
    scale = torch.logspace(-1, 1, 20, dtype=torch.float64) if units == "different" else 1
    x = torch.randn(500, 20, dtype=torch.float64) * scale
    y = (x[:, 10:] @ torch.randn(10, 5, dtype=torch.float64)).argmax(1)
    net = nn.Linear(20, 5) if model == "linear" else nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 5))
    w = list(net.double().parameters())
    decay = torch.full((1,), math.log(1e-3), dtype=torch.float64, requires_grad=True)
    steps = 1000 if benchmark.enabled else 20
    options = {"max_iter": steps} if optimizer == "LBFGS" else OPTIMIZERS[optimizer]
    inner_optimizer = getattr(torch.optim, optimizer)(w, **options)

    def outputs_and_loss(rows: Tensor) -> tuple[Tensor, Tensor]:
        z = net(x[rows])
        penalty = decay.exp().sum() / 2 * torch.stack([part.square().sum() for part in w]).sum()
        return z, F.cross_entropy(z, y[rows]) + penalty

    def closure() -> Tensor:
        inner_optimizer.zero_grad()
        loss = outputs_and_loss(torch.randperm(500)[:batch])[1]
        loss.backward(inputs=w)
        return loss

    for _ in range(1 if optimizer == "LBFGS" else steps):
        inner_optimizer.step(closure)
    products = {}
    for preconditioner in (None, FromOptimizer(inner_optimizer), Jacobi(), Nystrom(20)):
        z, inner = outputs_and_loss(torch.arange(500))
        solver = ConjugateGradient(steps=1000, preconditioner=preconditioner)
        outer = F.cross_entropy(net(x.flip(1)), y)
        result = auxfast.hypergradient(outer, inner, w, [decay], solver=solver, curvature="gauss-newton", outputs=z)
        assert result.stats.converged
        products[type(preconditioner).__name__] = result.stats.matvecs
    benchmark.extra_info["products"] = products
    print(f"{model}, {units} units, {optimizer}, batches of {batch}:", products)
    benchmark.pedantic(lambda: None)
