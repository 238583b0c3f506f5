"""Every solver on tensors that say they are on a GPU: that shows, without one, where tensors of the host are mixed with
its own, and what comes of looks at the numbers after eight steps."""

from __future__ import annotations

import pytest
import torch
from build_backend import ROOT

from auxfast.solvers import CompactMINRES

from .systems import SIZE, Operator, flat, gaussian, symmetric, with_eigenvalues
from .test_every_solver import SOLVERS, UNIFORM

pytestmark = pytest.mark.slow  # all solvers together take some seconds

COMPACT = {
    "CompactMINRES": CompactMINRES(tol=1e-8),
    "CompactMINRES, on the host": CompactMINRES(tol=1e-8, device="cpu"),
}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.gpu.emulation import EmulatedGPU

    return EmulatedGPU()


def solvers(**more):
    return pytest.mark.parametrize("solver", [*SOLVERS.values(), *more.values()], ids=[*SOLVERS, *more])


@solvers(**COMPACT)
def test_a_solver_keeps_to_one_device(solver, gpu):
    system = symmetric()
    with gpu:
        x, _ = solver.solve(system.matvec, system.rhs)
        assert all(tensor.is_cuda for tensor in x)
    assert gpu.launches.total() > 0
    torch.testing.assert_close(flat(x), flat(solver.solve(system.matvec, system.rhs)[0]), rtol=1e-6, atol=1e-6)


@solvers()
def test_a_solver_of_several_right_hand_sides_keeps_to_one_device(solver, gpu):
    operator, rhs = Operator(with_eigenvalues(UNIFORM)), [gaussian(3, SIZE)]
    with gpu:
        (x,), _ = solver.solve(operator, rhs, batched=True)
        assert x.is_cuda
    torch.testing.assert_close(x, solver.solve(operator, rhs, batched=True)[0][0], rtol=1e-6, atol=1e-6)
