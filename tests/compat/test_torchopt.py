from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from auxfast.compat.torchopt import LinearSolve
from auxfast.solvers import MINRES, ConjugateGradient


def ridge():
    torch.manual_seed(0)
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    log_decay = torch.full((6,), -1.0, dtype=torch.float64, requires_grad=True)

    def solution(log_decay):
        return torch.linalg.solve(x.T @ x / 40 + torch.diag(log_decay.exp()), x.T @ y / 40)

    def optimality(w, log_decay):  # the gradient of half the loss
        return x.T @ (x @ w - y) / 40 + log_decay.exp() * w

    return log_decay, solution, optimality


@pytest.mark.filterwarnings("ignore")  # torchopt's own, of functorch
def test_torchopts_roots_are_differentiated_by_a_solver_of_auxfast():
    pytest.importorskip("torchopt")
    from torchopt.diff.implicit import custom_root

    log_decay, solution, optimality = ridge()
    solve = LinearSolve(ConjugateGradient(tol=1e-10))
    wanted = torch.autograd.grad(solution(log_decay).square().sum(), log_decay)

    @custom_root(optimality, argnums=1, solve=solve)
    def one(w, log_decay):
        return solution(log_decay)

    @custom_root(lambda w, log_decay: (optimality(w[0], log_decay),), argnums=1, solve=solve)
    def several(w, log_decay):
        return (solution(log_decay),)

    zeros = torch.zeros(6, dtype=torch.float64)
    for w in (one(zeros, log_decay), several((zeros,), log_decay)[0]):
        torch.testing.assert_close(torch.autograd.grad(w.square().sum(), log_decay), wanted)
        assert solve.stats.converged
        assert solve.stats.matvecs <= 8


class Pair(NamedTuple):
    weight: Tensor
    bias: Tensor


@pytest.mark.parametrize("kind", [tuple, list, Pair._make])
def test_the_solution_is_like_the_right_hand_side(kind):
    b = kind([torch.ones(2, 2), torch.ones(3)])
    solve = LinearSolve()
    x = solve(lambda v: kind([2 * v[0], 4 * v[1]]), b)
    assert type(x) is type(b)
    assert [t.mean().item() for t in x] == pytest.approx([0.5, 0.25])
    assert solve.stats.residual < 1e-3
    assert solve(lambda v: 2 * v, torch.ones(3)).tolist() == pytest.approx([0.5] * 3)


def test_warm_starts_and_warnings_are_those_of_hypergradient():
    matrix = torch.diag(torch.linspace(1, 100, 30, dtype=torch.float64))
    b = torch.ones(30, dtype=torch.float64)
    solve = LinearSolve(MINRES(steps=100, tol=1e-6, warm_start=True))
    solve(lambda v: matrix @ v, b)
    first = solve.stats.matvecs
    solve(lambda v: matrix @ v, b)
    assert solve.stats.matvecs < first / 5
    short = LinearSolve(MINRES(steps=2, tol=1e-6))
    with pytest.warns(RuntimeWarning, match="not solved to the solver's tol"):
        short(lambda v: matrix @ v, b)
    LinearSolve(MINRES(steps=2, tol=1e-6), warn=False)(lambda v: matrix @ v, b)


def test_what_is_no_solver_and_no_tensor_is_refused():
    with pytest.raises(TypeError, match=r"solver must be a solver and not its class: write MINRES\(\)"):
        LinearSolve(MINRES)
    with pytest.raises(TypeError, match="b must be a tensor, or a tuple or list of tensors"):
        LinearSolve()(lambda v: v, {"a": torch.ones(2)})
