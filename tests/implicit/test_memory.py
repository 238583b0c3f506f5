"""Bytes that a hypergradient holds at its peak: of micro-batches, checkpoints, and each order of differentiation."""

from __future__ import annotations

import pytest
import torch

from benchmarks.memory import Problem, peak_bytes


def peak(curvature: str, problem: Problem) -> int:
    problem.hypergradient(curvature)  # what is loaded once does not count
    return peak_bytes(lambda: problem.hypergradient(curvature))


@pytest.mark.slow
@pytest.mark.parametrize("curvature", ["hessian", "hessian-jvp"])
def test_eight_micro_batches_take_the_memory_of_one(curvature):
    peaks = []
    for batches in (1, 8):
        problem = Problem(batches, checkpointed=False, layers=1)
        problem.data = [(x[:2, :64].clone(), y[:2]) for x, y in problem.data]
        peaks.append(peak(curvature, problem))
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.slow
def test_products_without_a_graph_of_the_gradient_and_checkpoints_take_half_the_memory():
    plain, checkpointed = (Problem(1, checkpointed, layers=4) for checkpointed in (False, True))
    recorded = peak("hessian", plain)
    assert peak("hessian-jvp", plain) < 0.75 * recorded
    assert peak("hessian-jvp", checkpointed) < 0.55 * recorded


def test_checkpoints_change_nothing_beyond_rounding():
    found = []
    for checkpointed in (False, True):
        problem = Problem(2, checkpointed, layers=1)
        problem.net.double()
        problem.data = [(x[:2, :8].double(), y[:2]) for x, y in problem.data]
        problem.phi = torch.zeros(10, dtype=torch.float64, requires_grad=True)
        found.append([problem.hypergradient(curvature).grads for curvature in ("hessian", "hessian-jvp")])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found[0][0], found[0][1], rtol=1e-12, atol=1e-14)
