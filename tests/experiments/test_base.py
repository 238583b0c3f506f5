"""Experiments and their runs: settings, changes of the configuration, and what comes back."""

import pytest
from train.problems import Noisy, NoisyOptions

from auxfast.experiments import restore, train_run
from auxfast.train import RunError, parse_method, read_config, read_run
from experiments.problems import noisy_experiment

EXPERIMENT = noisy_experiment()


def run(out, method="linear", seed=0, setting="", **arguments):
    return train_run(EXPERIMENT, setting, parse_method(method), seed, out, **arguments)


def test_overrides_come_after_the_setting(tmp_path):
    seen = []
    made = run(tmp_path, "stl", 3, "more features", overrides={"train.outer_steps": 5}, on_outer_step=seen.append)
    assert made.path == tmp_path / "noisy-regression" / "more-features" / "stl" / "seed-3"
    assert len(seen) == made.result.outer_steps == 5
    assert read_config(EXPERIMENT.config, made).task == NoisyOptions(features=6)
    assert (made.experiment, made.setting) == (EXPERIMENT.name, "more features")


def test_settings_and_entries_that_there_are_not_are_refused(tmp_path):
    with pytest.raises(ValueError, match="setting: got 'x' for noisy regression, must be one of 'more features'"):
        run(tmp_path, setting="x")
    with pytest.raises(ValueError, match=r"task\.shots: no such entry, must be one of dropout, features"):
        run(tmp_path, overrides={"task.shots": 3})
    assert not any(tmp_path.iterdir())


def test_weightings_train_on_the_auxiliary_set_too(tmp_path):
    held = {method: restore(EXPERIMENT, run(tmp_path, method))[0] for method in ("linear-frozen", "stl")}
    assert {method: task.training.numel() for method, task in held.items()} == {"linear-frozen": 40, "stl": 60}


def test_task_and_combiner_are_restored_as_they_ended(tmp_path):
    made = run(tmp_path, setting="more features")
    task, combiner = restore(EXPERIMENT, read_run(made.path))
    assert isinstance(task, Noisy)
    assert task.score() == made.result.score
    assert combiner.phi.tolist() != [0, 1, 1]
    assert restore(EXPERIMENT, run(tmp_path, "stl"))[1] is None
    (made.path / "checkpoint.pt").unlink()
    with pytest.raises(RunError, match=r"cannot read .*checkpoint\.pt"):
        restore(EXPERIMENT, made)
