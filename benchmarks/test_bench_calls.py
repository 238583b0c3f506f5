"""Whole calls, each beside what people write by hand for the same result: forward passes, warnings and checks included.

Every row has its floor, the part of the by-hand time that the call may take at most. The two sides run interleaved in
one process and are checked to be equal first.

The damping makes H positive definite and leaves ten steps a residual, as networks do. Of 0.5, with which nine steps
reach float32's precision, comes a product that certifies: CG(10) 1.02, with weight decay 0.98, MINRES(10) 1.09, 1.05.

8 outer losses through `implicit_minimum` take 0.71 of 8 hypergradients, above their floor of 0.45, and 0.60 to 0.65
where glibc keeps freed memory, as it does once a tensor of 32 MB was freed: 2600 page faults a call do not come then.
Of these, 0.32 are the 11 batched products, 2.2 ms each, where 8 vectors one by one take 3.7 to 4: their matrix products
alone take 1.65, at 80 of the 90 GFLOP/s that large ones reach here. Then 0.09 are MINRES's vectors, the same for 8 rows
as for 8 times one; 0.08 the checks of the batches with the product that they compare with; 0.03 the mixed products, one
by one (a batch of 8, with its plan and check, took longer); the rest recording, planning and copies. Products by hand
(0.25), vectors and mixed products come to 0.37, without outer losses, recording, checks and a certificate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import mlp
from timing import interleaved
from torch import Tensor, nn

import auxfast
from auxfast.implicit import hypergradient
from auxfast.solvers import MINRES, SAMA, ConjugateGradient, OneStep, SingleLoop, SolverState

pytestmark = [
    pytest.mark.benchmark(group="whole calls beside the same by hand, one thread"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

LR, DECAY = 0.1, 1e-3
DAMPING = 0.003  # makes H positive definite, and leaves ten steps a residual of 0.02 to 0.2, as networks do
Tensors = Sequence[Tensor]


@dataclass
class Problem:
    """A bilevel problem. The losses are functions of the parameters as they are."""

    outer: Callable[[], Tensor]
    inner: Callable[[], Tensor]
    w: list[Tensor]
    phi: list[Tensor]
    optimizer: torch.optim.Optimizer | None = None

    def by_solver(self, solver: Any, state: SolverState | None = None) -> Tensors:
        return hypergradient(self.outer(), self.inner(), self.w, self.phi, solver=solver, state=state).grads


def classifier(*widths: int, decay: float = 0.0) -> Problem:
    """An MLP on 64 examples, each with a weight in the inner loss, after 200 steps of Adam. With `decay`, the loss also
    has the squares of all parameters."""
    torch.manual_seed(0)
    net, x = mlp(*widths, batch=64)
    x_outer, (y, y_outer) = torch.randn_like(x), torch.randint(widths[-1], (2, 64))
    w, log_weights = list(net.parameters()), torch.zeros(64, requires_grad=True)

    def inner() -> Tensor:
        loss = (log_weights.exp() * F.cross_entropy(net(x), y, reduction="none")).mean()
        return loss + decay * sum(p.square().sum() for p in w) if decay else loss

    optimizer = torch.optim.Adam(w, lr=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        inner().backward(inputs=w)
        optimizer.step()
    return Problem(lambda: F.cross_entropy(net(x_outer), y_outer), inner, w, [log_weights], optimizer)


def logistic(rows: int, weights: int) -> Problem:
    """A logistic regression in float64 at its minimum, with a penalty for each weight; features of different scales."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, x_outer = (normal(rows, weights) * torch.logspace(0, -1, weights, dtype=torch.float64) for _ in range(2))
    truth = normal(weights)
    y, y_outer = ((z @ truth + normal(rows) > 0).double() for z in (x, x_outer))
    w = torch.zeros(weights, dtype=torch.float64, requires_grad=True)
    penalty = torch.full((weights,), math.log(1e-3), dtype=torch.float64, requires_grad=True)

    def inner() -> Tensor:
        return F.binary_cross_entropy_with_logits(x @ w, y) + 0.5 * (penalty.exp() * w.square()).sum()

    optimizer = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = inner()
        loss.backward(inputs=[w])
        return loss

    optimizer.step(closure)
    return Problem(lambda: F.binary_cross_entropy_with_logits(x_outer @ w, y_outer), inner, [w], [penalty])


def compare(
    benchmark: Any,
    ours: Callable[[], Tensors],
    by_hand: Callable[[], Tensors],
    floor: float,
    rtol: float = 1e-3,
    rounds: int = 40,
) -> None:
    """Checks that the two are equal, and times them."""
    found, expected = ours(), by_hand()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))
    seconds = interleaved({"ours": ours, "by hand": by_hand}, rounds=rounds if benchmark.enabled else 1)
    benchmark.pedantic(ours, rounds=1)
    benchmark.extra_info |= {
        "ms": seconds["ours"] * 1e3,
        "by hand ms": seconds["by hand"] * 1e3,
        "x by hand": seconds["ours"] / seconds["by hand"],
        "floor": floor,
    }


# ------------------------------------------------------------------------------------------------------------- by hand


def textbook_cg(problem: Problem, steps: int, damping: float = 0.0, tol: float = 0.0) -> Tensors:
    """Conjugate gradients on a retained graph, until the recurrence's residual is `tol`. No certificate."""
    w, phi = problem.w, problem.phi
    b = torch.autograd.grad(problem.outer(), w)
    grads = torch.autograd.grad(problem.inner(), w, create_graph=True)
    x, r, p = [torch.zeros_like(t) for t in b], [t.clone() for t in b], [t.clone() for t in b]
    rr = first = dot(r, r)
    for _ in range(steps):
        product = torch.autograd.grad(grads, w, p, retain_graph=True)
        if damping:
            product = [h + damping * q for h, q in zip(product, p, strict=True)]
        alpha = rr / dot(p, product)
        x = [a + alpha * q for a, q in zip(x, p, strict=True)]
        r = [a - alpha * h for a, h in zip(r, product, strict=True)]
        new = dot(r, r)
        if new <= tol**2 * first:
            break
        p = [a + new / rr * q for a, q in zip(r, p, strict=True)]
        rr = new
    return [-g for g in torch.autograd.grad(grads, phi, x)]


def dot(a: Tensors, b: Tensors) -> float:
    return sum(torch.dot(s.flatten(), t.flatten()).item() for s, t in zip(a, b, strict=True))


def one_step_by_hand(problem: Problem) -> Tensors:
    """T1-T2: the derivative of one step of descent."""
    v = torch.autograd.grad(problem.outer(), problem.w)
    grads = torch.autograd.grad(problem.inner(), problem.w, create_graph=True)
    return [-LR * g for g in torch.autograd.grad(grads, problem.phi, v)]


def darts_by_hand(problem: Problem) -> Tensors:
    """DARTS: the outer gradient after one step, and a central difference for the mixed product."""
    w, phi = problem.w, problem.phi
    step = torch.autograd.grad(problem.inner(), w)
    with torch.no_grad():
        kept = [p.clone() for p in w]
        for p, g in zip(w, step, strict=True):
            p.sub_(g, alpha=LR)
    v = torch.autograd.grad(problem.outer(), w)
    with torch.no_grad():
        for p, q in zip(w, kept, strict=True):
            p.copy_(q)
    return [-LR * g for g in central_difference(problem.inner, w, phi, v)]


def central_difference(inner: Callable[[], Tensor], w: Tensors, phi: Tensors, v: Tensors) -> Tensors:
    """The mixed product with v, as DARTS has it."""
    eps = 0.01 / torch.cat([t.flatten() for t in v]).norm().item()
    sides = []
    for move in (eps, -2 * eps):
        with torch.no_grad():
            for p, t in zip(w, v, strict=True):
                p.add_(t, alpha=move)
        sides.append(torch.autograd.grad(inner(), phi))
    with torch.no_grad():
        for p, t in zip(w, v, strict=True):
            p.add_(t, alpha=eps)
    return [(a - b) / (2 * eps) for a, b in zip(*sides, strict=True)]


def soba_by_hand(problem: Problem, v: list[Tensor]) -> Tensors:
    """SOBA: one product with the vector of the call before, which then takes a step; `v` is updated."""
    b = torch.autograd.grad(problem.outer(), problem.w)
    grads = torch.autograd.grad(problem.inner(), problem.w, create_graph=True)
    both = torch.autograd.grad(grads, [*problem.w, *problem.phi], v)
    product, mixed = both[: len(v)], both[len(v) :]
    for i, (h, g) in enumerate(zip(product, b, strict=True)):
        v[i] = v[i] - LR * (h - g)
    return [-g for g in mixed]


def sama_by_hand(problem: Problem) -> Tensors:
    """SAMA for Adam, betty's with the bias corrections that it leaves out: the outer gradient times the derivative of
    Adam's update in the gradient, and a central difference."""
    v = torch.autograd.grad(problem.outer(), problem.w)
    assert problem.optimizer is not None
    (group,) = problem.optimizer.param_groups
    (beta1, beta2), adapted = group["betas"], []
    for p, t in zip(problem.w, v, strict=True):
        state, last = problem.optimizer.state[p], p.grad
        first, second = 1 - beta1 ** state["step"].item(), 1 - beta2 ** state["step"].item()
        mean, root = state["exp_avg"] / first, (state["exp_avg_sq"] / second).sqrt()
        below = root + group["eps"]
        curved = (1 - beta2) / second * mean * last / root.clamp(min=1e-38) / below
        adapted.append(t * group["lr"] * ((1 - beta1) / first - curved) / below)
    return [-g for g in central_difference(problem.inner, problem.w, problem.phi, adapted)]


# ---------------------------------------------------------------------------------------------------------------- rows

MLP = (64, 128, 128, 10)


def test_one_step_takes_at_most_a_quarter_more_than_by_hand(benchmark: Any) -> None:
    problem, solver = classifier(*MLP), OneStep(LR)
    compare(benchmark, lambda: problem.by_solver(solver), lambda: one_step_by_hand(problem), floor=1.25)


def test_darts_takes_at_most_a_quarter_more_than_by_hand(benchmark: Any) -> None:
    problem = classifier(*MLP)
    solver = OneStep(LR, lookahead=True, mixed="difference")

    def ours() -> Tensors:
        return hypergradient(problem.outer, problem.inner, problem.w, problem.phi, solver=solver).grads

    compare(benchmark, ours, lambda: darts_by_hand(problem), floor=1.25, rtol=1e-2)


def test_a_single_loop_takes_at_most_a_seventh_more_than_by_hand(benchmark: Any) -> None:
    problem, solver, state = classifier(*MLP), SingleLoop(LR), SolverState()
    v = [LR * g for g in torch.autograd.grad(problem.outer(), problem.w)]
    compare(benchmark, lambda: problem.by_solver(solver, state), lambda: soba_by_hand(problem, v), floor=1.15)


def test_sama_takes_at_most_a_quarter_more_than_by_hand(benchmark: Any) -> None:
    problem = classifier(*[256] * 12, 10)
    solver = SAMA(problem.optimizer)

    def ours() -> Tensors:
        return hypergradient(problem.outer, problem.inner, problem.w, problem.phi, solver=solver).grads

    compare(benchmark, ours, lambda: sama_by_hand(problem), floor=1.25, rtol=1e-2, rounds=15)


SOLVERS = {
    "CG(10)": (ConjugateGradient(10, tol=None, damping=DAMPING), 0.95, 1e-3),
    "MINRES(10)": (MINRES(10, tol=None, damping=DAMPING), 1.05, 0.5),  # another iterate of the same Krylov space
}


@pytest.mark.parametrize("decay", [0.0, DECAY], ids=["no weight decay", "weight decay in the loss"])
@pytest.mark.parametrize("name", SOLVERS)
def test_ten_certified_steps_take_no_longer_than_textbook_cg(benchmark: Any, name: str, decay: float) -> None:
    problem, (solver, floor, rtol) = classifier(*MLP, decay=decay), SOLVERS[name]
    ours = lambda: problem.by_solver(solver)  # noqa: E731
    compare(benchmark, ours, lambda: textbook_cg(problem, 10, DAMPING), floor, rtol)


def test_cg_in_50_parameters_takes_no_longer_than_textbook_cg(benchmark: Any) -> None:
    problem, solver = logistic(200, 50), ConjugateGradient(20, tol=None)
    compare(benchmark, lambda: problem.by_solver(solver), lambda: textbook_cg(problem, 20), floor=1.1)


def test_cg_to_a_tolerance_takes_no_longer_than_textbook_cg(benchmark: Any) -> None:
    """jit-compiled JAX, with its loop in the compiled code, took 3.9 ms where textbook CG took 10.6."""
    problem, solver = logistic(1000, 300), ConjugateGradient(tol=1e-3)
    compare(benchmark, lambda: problem.by_solver(solver), lambda: textbook_cg(problem, 100, tol=1e-3), floor=0.95)


def test_the_minimum_as_a_function_costs_what_a_hypergradient_costs(benchmark: Any) -> None:
    net, x_outer, y_outer, problem = _with_functional_outer()
    solver = MINRES(10, tol=None, damping=DAMPING)

    def ours() -> Tensors:
        w = auxfast.implicit_minimum(problem.inner(), problem.w, problem.phi, solver=solver)
        loss = F.cross_entropy(torch.func.functional_call(net, _named(net, w), x_outer), y_outer)
        return torch.autograd.grad(loss, problem.phi)

    def by_hypergradient() -> Tensors:
        outer = F.cross_entropy(torch.func.functional_call(net, _named(net, problem.w), x_outer), y_outer)
        return hypergradient(outer, problem.inner(), problem.w, problem.phi, solver=solver).grads

    compare(benchmark, ours, by_hypergradient, floor=1.03)


def test_eight_outer_losses_share_one_batched_solve(benchmark: Any) -> None:
    net, x_outer, y_outer, problem = _with_functional_outer()
    solver = MINRES(10, tol=None, damping=DAMPING)

    def losses(w: Tensors) -> Tensor:
        """(8,)"""
        each = F.cross_entropy(torch.func.functional_call(net, _named(net, w), x_outer), y_outer, reduction="none")
        return each.view(8, 8).mean(1)

    def ours() -> Tensors:
        w = auxfast.implicit_minimum(problem.inner(), problem.w, problem.phi, solver=solver)
        return torch.autograd.grad(losses(w), problem.phi, torch.eye(8), is_grads_batched=True)

    def by_hypergradients() -> Tensors:
        rows = [
            hypergradient(losses(problem.w)[i], problem.inner(), problem.w, problem.phi, solver=solver).grads
            for i in range(8)
        ]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    compare(benchmark, ours, by_hypergradients, floor=0.45, rtol=1e-2, rounds=15)  # float32, and an ill-conditioned H


def _with_functional_outer() -> tuple[nn.Module, Tensor, Tensor, Problem]:
    problem = classifier(*MLP)
    net, x_outer = mlp(*MLP, batch=64)
    return net, x_outer, torch.randint(MLP[-1], (64,)), problem


def _named(net: nn.Module, w: Tensors) -> dict[str, Tensor]:
    return dict(zip(dict(net.named_parameters()), w, strict=True))
