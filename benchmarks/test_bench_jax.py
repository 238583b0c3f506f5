"""A whole hypergradient by conjugate gradients beside jit-compiled JAX and a plain loop, on one core.

Logistic regression, 1000 x 300, float64, a learned penalty for each weight, to a relative residual of 1e-3. It needs
`pip install jax`, and skips without. CPU time of the process, since JAX computes in threads of its own.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import auxfast

pytestmark = pytest.mark.filterwarnings("ignore")  # JAX's own
ROUNDS, CALLS, TOL = 20, 5, 1e-3


@pytest.fixture(autouse=True)
def _one_core() -> Iterator[None]:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    torch.set_num_threads(1)
    yield
    os.sched_setaffinity(0, cores)


def problem() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The data (x, y, held-out x, held-out y), the weights (300,) at the minimum, and the penalties' logarithms."""
    torch.manual_seed(0)
    x, held_out = (torch.randn(1000, 300, dtype=torch.float64) * torch.logspace(0, -1, 300) for _ in range(2))
    truth = torch.randn(300, dtype=torch.float64)
    y, held_out_y = ((torch.sigmoid(z @ truth) > torch.rand(1000)).double() for z in (x, held_out))
    w = torch.zeros(300, dtype=torch.float64, requires_grad=True)
    penalty = torch.full((300,), math.log(1e-3), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w], max_iter=2000, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = inner_loss(x, y, w, penalty)
        loss.backward(inputs=[w])
        return loss

    optimizer.step(closure)
    return [x, y, held_out, held_out_y], w, penalty


def inner_loss(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(x @ w, y) + 0.5 * (penalty.exp() * w.square()).sum()


def plain_loop(outer: torch.Tensor, inner: torch.Tensor, w: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    (b,) = torch.autograd.grad(outer, w)
    (gradient,) = torch.autograd.grad(inner, w, create_graph=True)
    x, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), r @ r
    limit = TOL**2 * rr
    while rr > limit:
        (product,) = torch.autograd.grad(gradient, w, p, retain_graph=True)
        alpha = rr / (p @ product)
        x, r = x + alpha * p, r - alpha * product
        before, rr = rr, r @ r
        p = r + rr / before * p
    (mixed,) = torch.autograd.grad(gradient, penalty, x)
    return -mixed


def compiled(jax: Any, data: list[Any]) -> Callable[[Any, Any], Any]:
    """The same in JAX: `f(w, penalty)`, compiled as a whole."""
    jnp = jax.numpy
    from jax.scipy.sparse.linalg import cg

    x, y, held_out, held_out_y = data

    def cross_entropy(logits: Any, labels: Any) -> Any:
        return jnp.mean(jnp.logaddexp(0, logits) - labels * logits)

    def inner(w: Any, penalty: Any) -> Any:
        return cross_entropy(x @ w, y) + 0.5 * jnp.sum(jnp.exp(penalty) * w**2)

    def hypergradient(w: Any, penalty: Any) -> Any:
        b = jax.grad(lambda w: cross_entropy(held_out @ w, held_out_y))(w)
        _, product = jax.linearize(lambda w: jax.grad(inner)(w, penalty), w)
        solution, _ = cg(product, b, tol=TOL, maxiter=100)
        _, mixed = jax.vjp(lambda penalty: jax.grad(inner)(w, penalty), penalty)
        return -mixed(solution)[0]

    return jax.jit(hypergradient)


def test_conjugate_gradients_beside_jax(benchmark):
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    data, w, penalty = problem()
    x, y, held_out, held_out_y = data

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        return F.binary_cross_entropy_with_logits(held_out @ w, held_out_y), inner_loss(x, y, w, penalty)

    solver = auxfast.solvers.ConjugateGradient(tol=TOL)
    theirs = compiled(jax, [jax.numpy.asarray(t.numpy()) for t in data])
    at = [jax.numpy.asarray(t.detach().numpy()) for t in (w, penalty)]
    calls = {
        "auxfast": lambda: auxfast.hypergradient(*losses(), [w], [penalty], solver=solver).grads[0],
        "plain loop": lambda: plain_loop(*losses(), w, penalty),
        "JAX": lambda: theirs(*at).block_until_ready(),
    }
    results = {name: torch.as_tensor(calls[name]().tolist()) for name in calls}
    for result in results.values():
        torch.testing.assert_close(result, results["plain loop"], rtol=0.05, atol=1e-5)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.process_time()
            for _ in range(CALLS):
                call()
            samples[name].append((time.process_time() - start) / CALLS)
    milliseconds = {name: 1e3 * statistics.median(values) for name, values in samples.items()}
    benchmark.extra_info["milliseconds"] = milliseconds
    print({name: round(value, 2) for name, value in milliseconds.items()})
    benchmark.pedantic(calls["auxfast"], rounds=3)
