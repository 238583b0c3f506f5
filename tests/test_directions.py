"""`benchmarks/learning/directions.py`: the trainings that the figures of docs/outer-loop.md are of."""

from __future__ import annotations

import pytest
from pages import ROOT

import auxfast

pytest.importorskip("sklearn")


@pytest.mark.slow
def test_early_and_converged_training_of_a_linear_model_go_where_hypergradients_point(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.learning.directions import Retraining, solvers

    for name in ("diabetes, early", "diabetes"):
        retraining = Retraining(name)
        report = auxfast.verify_against_retraining(
            retraining, [retraining.logs], seeds=[1000, 1001], step=0.2, solver=solvers(retraining)
        )
        assert {prediction.outcome for prediction in report.predictions.values()} == {"right"}
        assert 0.9 < report.predictions["MINRES, 50"].size < 1.1
        assert report.outer_losses.min() > 0.5  # the outer loss's samples are not trained on
