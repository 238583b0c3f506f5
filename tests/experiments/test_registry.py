"""Experiments of one's own, in a file, a module, or another package's entry point."""

import re
import sys
from importlib.metadata import EntryPoint

import pytest

from auxfast.cli import main
from auxfast.experiments import registry
from auxfast.train import find_runs

pytest.importorskip("tqdm")

FILE = """
from __future__ import annotations
from dataclasses import dataclass
from auxfast.experiments import Experiment
from auxfast.train import RunConfig, TrainConfig
from my_helper import Mine

@dataclass(frozen=True)
class Options:
    start: float = 0.0

def make_task(seed, options):
    return Mine(options.start)

MINE = Experiment("mine", make_task, config=RunConfig(TrainConfig(outer_steps=2, inner_steps=2), task=Options()))
"""
HELPER = """
from train.problems import OneWeight as Mine
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with an experiment of one's own; what is imported from it is forgotten in the end."""
    (tmp_path / "my_task.py").write_text(FILE)
    (tmp_path / "my_helper.py").write_text(HELPER)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in sys.modules[name].__file__:
            del sys.modules[name]


def _train(place, folder, *more):
    out = str(folder / "out")
    return main(["train", str(place), "--method", "equal,linear", "--seeds", "0..1", "--out", out, *more])


def test_an_experiment_in_a_file_is_trained_resumed_and_reported(folder, capsys, monkeypatch):
    pytest.importorskip("jinja2")
    place = f"{folder / 'my_task.py'}:MINE"
    assert _train(place, folder, "--set", "task.start=0.5") == 0
    table = capsys.readouterr().out
    assert re.search(r"^Linear, learned .* \+- ", table, re.MULTILINE)
    assert {run.origin for run in find_runs([folder])} == {place}
    assert _train(place, folder, "--set", "task.start=0.5", "--resume") == 0
    assert capsys.readouterr().out == table
    monkeypatch.chdir("/")
    assert main(["report", str(folder / "out"), "--out", str(folder / "page.html")]) == 0
    assert "CAUTION: task.start is 0.5 here, and 0.0 in the experiment" in capsys.readouterr().out


def test_an_experiment_in_a_module_is_found_from_the_working_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert _train("my_task:MINE", folder) == 0
    assert {run.origin for run in find_runs([folder])} == {"my_task:MINE"}


def test_an_experiment_of_another_package_is_listed_and_trained_by_its_entry_point(folder, monkeypatch, capsys):
    points = [EntryPoint("theirs", "my_task:MINE", registry.GROUP), EntryPoint("broken", "nowhere:X", registry.GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "auxfast.experiments" else [])
    monkeypatch.chdir(folder)
    assert main(["train", "--list"]) == 0
    listed = capsys.readouterr().out
    assert re.search("^theirs +mine$", listed, re.MULTILINE)
    assert re.search("^broken +experiment: cannot import nowhere:X: ModuleNotFoundError", listed, re.MULTILINE)
    assert _train("theirs", folder) == 0
    assert {(run.experiment, run.origin) for run in find_runs([folder])} == {("mine", "my_task:MINE")}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("my_task.py:NONE", r"cannot import .*my_task\.py:NONE: AttributeError: .* no attribute 'NONE'"),
        ("my_task.py:make_task", r".*my_task\.py:make_task is a function, must be an auxfast\.experiments\.Experiment"),
        ("none.py:MINE", r"cannot import .*none\.py:MINE: FileNotFoundError: there is no .*none\.py"),
        ("broken.py:MINE", r"cannot import .*broken\.py:MINE: ZeroDivisionError: .* \(broken\.py, line 2\)"),
        ("leaves.py:MINE", r"cannot import .*leaves\.py:MINE: SystemExit: 0 \(leaves\.py, line 1\)"),
        ("odd [1].py:NONE", r"cannot import .*odd \[1\]\.py:NONE: AttributeError: .* no attribute 'NONE'"),
    ],
)
def test_what_cannot_be_imported_is_told_in_a_line(place, message, folder, capsys):
    (folder / "broken.py").write_text("\n1 / 0\n")
    (folder / "leaves.py").write_text("raise SystemExit(0)\n")
    (folder / "odd [1].py").write_text("")
    assert _train(folder / place, folder) == 2
    errors = capsys.readouterr().err
    assert re.fullmatch(f"auxfast: experiment: {message}\n", errors.replace(str(folder), "x"))


def test_an_experiment_that_is_gone_is_named_with_what_to_do(folder, capsys):
    assert _train(f"{folder / 'my_task.py'}:MINE", folder) == 0
    capsys.readouterr()
    (folder / "my_task.py").rename(folder / "moved.py")
    assert main(["report", str(folder / "out"), "--out", str(folder / "page.html")]) == 1
    error = capsys.readouterr().err
    assert "config.json names an experiment that is not there any more (experiment: cannot import " in error
    assert 'put it back, or write the new place as its "origin"' in error
    assert _train(f"{folder / 'moved.py'}:MINE", folder, "--resume") == 0  # the place is no part of the run


def test_an_experiment_may_not_have_the_name_of_a_shipped_one(folder, capsys):
    (folder / "my_task.py").write_text(FILE.replace('"mine"', '"digits"'))
    assert _train(f"{folder / 'my_task.py'}:MINE", folder) == 2
    assert "name: got 'digits', which is an experiment of auxfast: choose another" in capsys.readouterr().err
