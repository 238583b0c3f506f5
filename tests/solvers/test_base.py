"""What solvers return, and the operators that they take."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import pydoc

import pytest
import torch

from auxfast.solvers import MINRES, LinearOperator, SolverState, SolveStats, StopReason
from auxfast.solvers.iterative import steps_per_check

from .systems import Operator, gaussian, symmetric, with_eigenvalues

STATS = MINRES().solve(symmetric().matvec, symmetric().rhs)[1]


@pytest.mark.parametrize("cls", [SolveStats, SolverState])
def test_help_describes_every_field(cls):
    described = pydoc.render_doc(cls, renderer=pydoc.plaintext).split("Methods defined here")[0]
    for field in dataclasses.fields(cls):
        assert f" {field.name}: " in described.replace("|", " ").partition("Attributes:")[2]


def test_a_stop_reason_is_its_text():
    assert STATS.stop_reason == "converged"
    assert STATS.stop_reason is StopReason.CONVERGED
    assert (str(STATS.stop_reason), f"{STATS.stop_reason}", json.dumps(STATS.stop_reason)) == (
        *("converged", "converged"),
        '"converged"',
    )
    assert "stop_reason='converged'" in repr(STATS)
    assert {reason.value for reason in StopReason} == {
        *("converged", "steps", "negative curvature", "diverged", "stagnated"),
        *("not finite", "not symmetric", "inexact", "trivial"),
    }


def test_a_solver_of_ones_own_may_give_the_text():
    stats = SolveStats(1, 1, 0.5, False, "steps")
    assert stats.stop_reason is StopReason.STEPS
    with pytest.raises(ValueError, match=r"stop_reason must be one of converged, steps, .*, trivial, not 'tired'"):
        SolveStats(1, 1, 0.5, False, "tired")


def test_stop_reasons_say_what_to_do():
    assert {str(reason) for reason in StopReason if not reason.advice} == {"converged", "trivial"}
    assert "damping" in StopReason.STAGNATED.advice
    for reason in StopReason:
        assert reason.advice == "" or reason.advice.endswith(".")


def test_stats_can_be_copied_and_saved():
    for again in (copy.deepcopy(STATS), pickle.loads(pickle.dumps(STATS)), dataclasses.replace(STATS)):
        assert again == STATS
        assert again.stop_reason is StopReason.CONVERGED


def test_a_linear_operator_has_batched_products():
    operator = Operator(with_eigenvalues(torch.linspace(0.1, 1, 9, dtype=torch.float64)))
    assert isinstance(operator, LinearOperator)
    assert not isinstance(symmetric().matvec, LinearOperator)


def test_batched_products_are_used_where_there_are_several_rows():
    class Recorded(Operator):
        def __call__(self, vectors):
            calls.append(1)
            return super().__call__(vectors)

        def batched(self, vectors):
            calls.append(len(vectors[0]))
            return super().batched(vectors)

    calls: list[int] = []
    operator = Recorded(with_eigenvalues(torch.linspace(0.1, 1, 9, dtype=torch.float64)))
    MINRES(steps=2, tol=1e-12).solve(operator, [gaussian(4, 9)], batched=True)
    assert calls == [4, 4, 4]
    calls.clear()
    MINRES(steps=2, tol=1e-12).solve(operator, [gaussian(9)])
    assert calls == [1, 1, 1]


def test_the_device_is_read_every_8_steps_where_that_waits():
    assert steps_per_check(torch.device("cpu")) == 1
    assert steps_per_check(torch.device("cuda")) == steps_per_check(torch.device("meta")) == 8
