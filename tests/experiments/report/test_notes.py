"""Notes on runs, of records made by hand."""

from dataclasses import replace

import pytest

from auxfast.experiments.report.notes import notes, notes_on_runs
from auxfast.experiments.report.rows import results_of
from auxfast.experiments.report.text import describe
from experiments.problems import noisy_experiment
from experiments.report.handmade import record, run_of, runs_of


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([{}] * 30, []),
        ([{}, {"skipped": True}, {}], ["skipped 1 step"]),
        ([{"skipped": True}] * 3, ["skipped 3 steps"]),
        ([{}, {"loss_weights": (2.0, 0.01, 0.009)}], ["auxiliaries below 1%"]),  # together
        ([{}, {"loss_weights": (2.0, 0.01, 0.011)}], []),
        ([{}, {"loss_weights": (1.0, 1.0, 30.0)}], ["weights grew tenfold"]),
        ([{"outer_loss": 1.0 + 0.02 * step} for step in range(30)], ["outer loss rising"]),
        ([{"outer_loss": 2.0 - 0.02 * step} for step in range(30)], []),
        ([{"outer_loss": 5.0 if step == 29 else 4.0} for step in range(30)], []),  # one batch says little
        ([{"outer_loss": None, "loss_weights": (2.0, 0.0, 0.0)}] * 3, []),
        ([], []),
    ],
)
def test_what_records_warn_of_is_noted(changes, expected):
    run = replace(run_of(noisy_experiment(), "linear", 0, 1.0), records=[record(**change) for change in changes])
    assert notes(run) == expected


def test_the_main_loss_need_not_be_the_first():
    run = run_of(noisy_experiment(), "linear", 0, 1.0)
    run.records[-1] = record(loss_weights=(0.001, 0.001, 1.0))
    assert notes(run) == []
    assert notes(replace(run, main=2)) == ["auxiliaries below 1%"]


def test_runs_with_the_same_note_share_a_line_in_the_report():
    experiment = noisy_experiment()
    runs = runs_of(experiment, {"stl": [1.0] * 3, "linear": [1.0] * 3})
    for run in runs[3:]:
        run.records[-1] = record(loss_weights=(1.0, 0.0, 0.0), skipped=run.seed == 1)
    told = "linear: auxiliaries below 1% (seeds 0, 1, 2); skipped 1 step (seed 1)"
    assert notes_on_runs(runs) == [told]
    assert f"CAUTION: {told}" in describe(results_of(experiment, runs))
