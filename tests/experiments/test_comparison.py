"""One's own task, compared in one call."""

import math
import re
import shlex
from pathlib import Path

import pytest
from train.problems import Noisy, NoisyOptions, OneWeight, train_config

from auxfast.cli import main
from auxfast.experiments import command, compare
from auxfast.solvers import Dense
from auxfast.train import Component, RunConfig, RunError, find_runs

pytest.importorskip("tqdm")

SHORT = {"train.outer_steps": 3, "train.inner_steps": 2}


class Mine(OneWeight):
    """A task with a start that the seed draws: `Mine` is the `make_task`."""

    def __init__(self, seed):
        super().__init__(seed / 10)


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(command, "record_run", lambda *_, **__: pytest.fail("training started"))


def test_every_method_is_trained_from_every_seed_and_the_table_is_printed(tmp_path, capsys):
    result = compare(Mine, seeds=range(2), config=SHORT, out=tmp_path / "runs")
    methods = ["stl", "equal", "linear-frozen", "linear"]
    assert {method: list(scores) for method, scores in result.scores.items()} == {name: [0, 1] for name in methods}
    assert result.scores["linear"][1] == next(
        run.result.score for run in result.runs if (run.method.name, run.seed) == ("linear", 1)
    )
    printed = capsys.readouterr().out
    assert str(result) in printed
    assert re.search(r"^Linear, learned .* \+- ", str(result), re.MULTILINE)
    assert "CAUTION" not in str(result)
    assert "Linear, learned scores above Linear, frozen" in str(result)
    assert {run.path.relative_to(tmp_path / "runs").parts[0] for run in result.runs} == {"Mine"}
    assert result.runs[0].losses == Mine.loss_names


def test_differences_are_paired_by_seed(tmp_path):
    result = compare(Mine, ["stl", "equal"], seeds=[0, 1, 4], config=SHORT, out=tmp_path)
    difference = result.difference("equal", "stl")
    assert difference.seeds == 3
    assert difference.mean == pytest.approx(
        sum(result.scores["equal"][seed] - result.scores["stl"][seed] for seed in (0, 1, 4)) / 3
    )


def test_a_comparison_goes_on_where_it_was_stopped(tmp_path):
    first = compare(Mine, ["stl"], seeds=[0], config=SHORT, out=tmp_path)
    with pytest.raises(RunError, match="holds a run already"):
        compare(Mine, ["stl"], seeds=[0], config=SHORT, out=tmp_path)
    again = compare(Mine, ["stl", "equal"], seeds=[0, 1], config=SHORT, out=tmp_path, resume=True)
    assert again.runs[0] == first.runs[0]
    assert len(again.runs) == 4


def test_a_report_needs_nothing_but_the_runs(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    result = compare(Mine, ["equal", "linear"], seeds=range(2), config=SHORT, out=tmp_path, name="my task")
    result.report(tmp_path / "page.html")
    assert "my task" in (tmp_path / "page.html").read_text()
    capsys.readouterr()
    assert main(["report", str(tmp_path / "my-task"), "--out", str(tmp_path / "again.html")]) == 0
    assert str(result) in capsys.readouterr().out


def test_a_configuration_may_be_one_or_changes_of_the_default_one(tmp_path):
    changes = {"train.solver": Dense(damping=0.5), "train": {"inner_optimizer": Component("SGD", {"lr": 0.1})}, **SHORT}
    compare(Mine, ["stl"], seeds=[0], config=changes, out=tmp_path / "changes")
    compare(Mine, ["stl"], seeds=[0], config=RunConfig(train_config(outer_steps=2)), out=tmp_path / "config")
    changed, given = (find_runs([tmp_path / name])[0].config["train"] for name in ("changes", "config"))
    assert (changed["solver"]["name"], changed["solver"]["damping"], changed["outer_steps"]) == ("Dense", 0.5, 3)
    assert changed["inner_optimizer"] == {"name": "SGD", "lr": 0.1}
    assert given["outer_steps"] == 2


def test_weightings_train_on_the_auxiliary_set_too_if_the_task_can_tell(tmp_path):
    drawn = []

    def make_task(seed, hold_out):
        drawn.append(hold_out)
        return Noisy(seed, NoisyOptions(), hold_out)

    result = compare(make_task, ["stl", "linear-frozen", "own"], seeds=[0], config=SHORT, out=tmp_path)
    assert drawn == [True, False, True, True]  # the first one is checked
    assert [run.method.name for run in result.runs] == ["stl", "linear-frozen", "own"]
    assert len(result.runs[2].records[0].phi) == 60


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"make_task": 3}, "make_task: got int, must be a function make_task"),
        ({"methods": "linear"}, "methods: got 'linear', must be a list of names"),
        ({"methods": []}, r"methods: got \[\], must be a list of names"),
        ({"methods": ["best"]}, "method: got 'best', must be one of stl, equal"),
        ({"methods": ["own"]}, r"task\.training_loss: there is none, and the method own needs it"),
        ({"seeds": 5}, "seeds: got 5, must be integers of at least 0, such as range"),
        ({"seeds": []}, r"seeds: got \[\], must be integers"),
        ({"seeds": [0.5]}, r"seeds: got \[0\.5\], must be integers"),
        ({"config": 3}, "config: got int, must be a RunConfig, or a dict of changes"),
        ({"config": {"train.steps": 3}}, "train.steps: no such entry, must be one of outer_steps"),
        ({"config": RunConfig(task=NoisyOptions())}, r"config\.task: got NoisyOptions.*make_task takes no `options`"),
        ({"name": "digits"}, "name: got 'digits', which is an experiment of auxfast: choose another"),
        ({"name": ".."}, r"name: got '\.\.', must be a name for a folder"),
    ],
)
def test_what_cannot_be_asked_for_is_said_before_training(changes, message, tmp_path, no_training):
    with pytest.raises((TypeError, ValueError), match=message):
        compare(**{"make_task": Mine, "seeds": [0], "out": tmp_path, **changes})
    assert not any(tmp_path.iterdir())


def test_a_task_that_is_none_is_told_before_training(tmp_path, no_training):
    class NoScore(Mine):
        def score(self):
            return math.nan

    with pytest.raises(ValueError, match=r"task\.validation_score: got nan before the first step"):
        compare(NoScore, out=tmp_path)
    with pytest.raises(ValueError, match=r"task\.loss_names: NoneType has none"):
        compare(lambda seed: None, out=tmp_path)
    with pytest.raises(ValueError, match=r"make_task: raised KeyError: .* \(test_comparison\.py, line \d+"):
        compare(lambda seed: {}["x"], out=tmp_path)


def test_the_command_that_is_printed_finds_the_runs_whatever_the_name(tmp_path, capsys):
    compare(Mine, ["equal"], seeds=[0], config=SHORT, out=tmp_path / "my runs", name="my odd/name & more")
    command_line = re.search(r"auxfast report (.*)", capsys.readouterr().out).group(1)
    (folder,) = shlex.split(command_line)
    assert len(find_runs([Path(folder)])) == 1


class MainLast(Mine):
    main = 2


def test_runs_know_their_main_loss(tmp_path):
    (run,) = compare(MainLast, ["linear"], seeds=[0], config=SHORT, out=tmp_path).runs
    assert run.main == 2
