"""Runs are read: plain records of what their folders hold, without the experiment that they are of."""

import json
import math
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch

from auxfast.train import RunConfig, RunError, find_runs, read_config, read_run, record_run
from auxfast.train.run import metrics_line
from train.problems import noisy_plan, train_config


def run(out, method="linear", seed=0):
    return record_run(noisy_plan(out, method, seed))


def test_a_run_is_a_plain_record_that_knows_its_experiment_by_name(tmp_path):
    made = run(tmp_path)
    assert made.experiment == "noisy regression"
    assert json.loads(json.dumps(made.config)) == made.config
    with pytest.raises(FrozenInstanceError):
        made.seed = 3


def test_a_configuration_that_is_not_of_its_experiment_any_more_is_named(tmp_path):
    made = run(tmp_path)
    assert read_config(noisy_plan(tmp_path).config, made) == noisy_plan(tmp_path).config
    with pytest.raises(RunError, match=r"config\.json does not describe a run of this version: task: .* no options"):
        read_config(RunConfig(train_config()), made)


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    made = run(tmp_path)
    record = made.records[0]._replace(residual=math.inf, loss_weights=(math.nan, 1.0, 2.0))
    (made.path / "metrics.jsonl").write_bytes(metrics_line(record))
    (read,) = read_run(made.path).records
    assert read.residual is None
    assert math.isnan(read.loss_weights[0])
    assert read.loss_weights[1:] == (1.0, 2.0)


def test_further_scores_of_a_task_are_in_its_result_and_older_results_have_none(tmp_path):
    plan = noisy_plan(tmp_path)

    def make_task():
        task = plan.make_task()
        task.further_scores = lambda: {"top 3": 88.5, "undefined": math.nan}
        return task

    made = record_run(replace(plan, make_task=make_task))
    assert made.result.further_scores["top 3"] == 88.5
    assert math.isnan(made.result.further_scores["undefined"])
    older = json.loads((made.path / "result.json").read_text())
    del older["further_scores"]
    (made.path / "result.json").write_text(json.dumps(older))
    assert read_run(made.path).result == made.result._replace(further_scores={})


def test_records_of_versions_that_did_not_count_skipped_steps_are_read(tmp_path):
    made = run(tmp_path)
    older = [record._asdict() for record in made.records]
    for record in older:
        del record["skipped"], record["validation_seconds"]
        record["validation_score"] = None
    (made.path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in older))
    assert {(record.skipped, record.validation_score) for record in read_run(made.path).records} == {(False, None)}


def test_runs_are_found_wherever_they_are(tmp_path):
    for seed in (10, 2):
        run(tmp_path, "stl", seed)
    run(tmp_path, "equal", 2)
    found = find_runs([tmp_path, tmp_path / "noisy-regression" / "stl"])
    assert [(each.method.name, each.seed) for each in found] == [("equal", 2), ("stl", 2), ("stl", 10)]
    with pytest.raises(RunError, match=f"there is no {tmp_path / 'x'}"):
        find_runs([tmp_path / "x"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=f"no runs in {tmp_path / 'empty'}"):
        find_runs([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "cannot read .*config.json: No such file"),
        ("config.json", b"{", "config.json is corrupt"),
        ("config.json", b"{}", "config.json does not describe a run of this version"),
        ("config.json", b"[]", "config.json does not describe a run of this version"),
        (
            "config.json",
            b'{"experiment": "a", "setting": "", "method": "stl", "seed": "x", "config": {}}',
            "config.json does not describe a run of this version: seed: got 'x'",
        ),
        ("environment.json", b"", "environment.json is corrupt"),
        ("metrics.jsonl", b'{"step": 0}\n', "metrics.jsonl, line 1, is corrupt"),
        ("result.json", b'{"score": 1}', "result.json is corrupt"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    path = run(tmp_path, "stl").path
    (path / name).unlink()
    if content is not None:
        (path / name).write_bytes(content)
    with pytest.raises(RunError, match=message):
        read_run(path)


def test_the_split_is_in_the_folder_and_a_run_goes_on_with_no_other(tmp_path):
    plan = noisy_plan(tmp_path, outer_steps=3)

    def make_task(first=40):
        task = plan.make_task()
        task.split_indices = lambda: {"training": torch.arange(20, 60).flip(0), "test": torch.arange(first, 60)}
        return task

    made = record_run(replace(plan, make_task=make_task))
    with np.load(made.path / "split.npz") as split:
        assert split["training"].tolist() == list(range(20, 60))
    (made.path / "result.json").unlink()
    assert record_run(replace(plan, make_task=make_task), resume=True).result.score == made.result.score
    (made.path / "result.json").unlink()
    with pytest.raises(RunError, match=r"split\.npz has other samples in its part test than the task draws now"):
        record_run(replace(plan, make_task=lambda: make_task(41)), resume=True)
    (made.path / "split.npz").write_bytes(b"PK")
    with pytest.raises(RunError, match=r"split\.npz is corrupt"):
        record_run(replace(plan, make_task=make_task), resume=True)
