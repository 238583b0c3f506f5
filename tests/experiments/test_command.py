import os
import re
import signal
import sys
from dataclasses import replace

import pytest

from auxfast.cli import main
from auxfast.experiments import command
from auxfast.experiments.paper import EXPERIMENTS
from auxfast.solvers import Dense
from auxfast.train import Component, find_runs, read_config
from auxfast.train.trainer import OuterRecord
from experiments.problems import noisy_experiment

pytest.importorskip("tqdm")


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Calls `auxfast train noisy ...` with an out in tmp_path."""
    monkeypatch.setitem(EXPERIMENTS, "noisy", replace(noisy_experiment(), name="noisy"))

    def call(*arguments, setting=""):
        if setting is not None:
            arguments = (*arguments, "--setting", setting)
        return main(["train", "noisy", "--out", str(tmp_path / "out"), *arguments])

    return call


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(command, "record_run", lambda *_, **__: pytest.fail("training started"))


def found(tmp_path):
    return {(run.setting, run.method.name, run.seed) for run in find_runs([tmp_path])}


def test_every_method_is_trained_from_every_seed(train, tmp_path, capsys):
    assert train("--method", "linear-fixed, stl,linear", "--seeds", "0..1,5") == 0
    assert found(tmp_path) == {("", m, s) for m in ("stl", "linear", "linear-fixed") for s in (0, 1, 5)}
    output = capsys.readouterr()
    for label in ("STL (main loss only)", "Linear, learned", "Linear, fixed at the learned"):
        assert re.search(rf"^{re.escape(label)} .* \+- ", output.out, re.MULTILINE)
    assert re.search(r"outer steps' share of the training time: linear \d+%", output.out)
    assert output.out.endswith(f"auxfast report {tmp_path / 'out' / 'noisy'}\n")


def test_where_nobody_watches_each_run_is_a_line(train, capsys):
    assert train("--method", "stl,linear", "--seeds", "3") == 0
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\[1/2\] noisy, seed 3, stl: score -?\d\.\d+, \d+\.\d s", first)
    assert second.startswith("[2/2] noisy, seed 3, linear: score ")


def test_in_a_terminal_there_is_a_bar_and_lines_are_of_runs_to_look_at(train, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(command, "notes", lambda run: ["a note"] * run.method.learned)
    assert train("--method", "stl,linear", "--seeds", "3") == 0
    error = capsys.readouterr().err
    assert "100%" in error
    assert "14/14" in error
    assert re.search(r"\[2/2\] noisy, seed 3, linear: score .*, a note\n", error)
    assert "[1/2]" not in error


def test_the_progress_bar_shows_losses_weights_and_how_the_outer_step_went():
    """The text is tested by itself, since how often a bar is drawn depends on the machine."""
    learned = OuterRecord(
        3, 0.5, 0.4, 0.25, None, 0.125, 7, (1.0, 0.5, 2.0), None, inner_seconds=3.0, outer_seconds=1.0
    )
    assert command.progress(learned, ("main", "a", "b")) == {
        "training": "0.5",
        "outer": "0.25",
        "residual": "0.125",
        "weights": "b: 2.00, main: 1.00",
        "outer time": "25%",
    }
    weighted = learned._replace(outer_loss=None, residual=None)
    assert list(command.progress(weighted, ("main", "a", "b"))) == ["training", "weights"]
    skipped = learned._replace(skipped=True)
    assert command.progress(skipped, ("main", "a", "b"), ["skipped 2 steps"])["note"] == "skipped 2 steps"


def test_by_default_all_settings_and_the_experiment_s_methods_are_trained(train, tmp_path, capsys):
    assert train("--seeds", "0", setting=None) == 0
    assert found(tmp_path) == {(s, m, 0) for s in ("", "more features") for m in ("stl", "linear")}
    assert "Noisy; more features" in capsys.readouterr().out


def test_overrides_of_the_file_come_before_those_of_the_command_line(train, tmp_path):
    train_table = '[train]\nouter_steps = 2\ninner_steps = 2\nsolver = {name = "Dense"}'
    (tmp_path / "c.toml").write_text(f"{train_table}\n[task]\nfeatures = 5\n")
    changes = (
        "--set",
        "train.inner_steps=4",
        "--set",
        "train.inner_optimizer=Adam",
        "--set",
        "train.solver.damping=0.1",
    )
    assert train("--method", "linear", "--seeds", "7", "--config", str(tmp_path / "c.toml"), *changes) == 0
    (run,) = find_runs([tmp_path])
    config = read_config(EXPERIMENTS["noisy"].config, run)
    assert (config.train.outer_steps, config.train.inner_steps, config.task.features) == (2, 4, 5)
    assert config.train.inner_optimizer == Component("Adam")
    assert config.train.solver == Dense(damping=0.1)


def test_a_second_time_is_refused_before_training_unless_it_resumes(train, tmp_path, capsys, monkeypatch):
    assert train("--method", "stl", "--seeds", "0") == 0
    first = capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(command, "record_run", lambda *_, **__: pytest.fail("training started"))
        assert train("--method", "equal,stl", "--seeds", "0") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"auxfast: .*noisy/stl/seed-0 holds a run already: --resume \(.*\) goes on .*; or .*", message)
    assert train("--method", "stl", "--seeds", "0", "--resume") == 0
    assert capsys.readouterr().out == first


def test_an_interrupted_comparison_goes_on_with_resume(train, tmp_path, capsys, monkeypatch):
    real = command.record_run

    def interrupted(*arguments, on_outer_step, **more):
        def interrupt(record):
            on_outer_step(record)
            if record.step == 3:
                raise KeyboardInterrupt

        return real(*arguments, on_outer_step=interrupt, **more)

    monkeypatch.setattr(command, "record_run", interrupted)
    assert train("--seeds", "0") == 130
    assert capsys.readouterr().err.endswith(
        "\nauxfast: interrupted; what was saved is kept, and the same command with --resume goes on from there\n"
    )
    assert [len(run.records) for run in find_runs([tmp_path])] == [4]
    monkeypatch.setattr(command, "record_run", real)
    assert train("--seeds", "0", "--resume") == 0
    assert [run.result.outer_steps for run in find_runs([tmp_path])] == [7, 7]
    assert "[2/2] noisy, seed 0, linear" in capsys.readouterr().err


def test_sigterm_ends_a_comparison_like_ctrl_c(train, tmp_path, capsys, monkeypatch):
    real = command.record_run

    def terminated(*arguments, on_outer_step, **more):
        def terminate(record):
            on_outer_step(record)
            if record.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        return real(*arguments, on_outer_step=terminate, **more)

    monkeypatch.setattr(command, "record_run", terminated)
    assert train("--seeds", "0") == 143
    assert capsys.readouterr().err.endswith(
        "\nauxfast: terminated; what was saved is kept, and the same command with --resume goes on from there\n"
    )
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not list(tmp_path.rglob("lock"))
    monkeypatch.setattr(command, "record_run", real)
    assert train("--seeds", "0", "--resume") == 0
    assert [run.result.outer_steps for run in find_runs([tmp_path])] == [7, 7]


def test_a_path_that_is_too_long_is_one_line(train, capsys):
    assert main(["report", "x" * 300]) == 1
    assert capsys.readouterr().err == f"auxfast: cannot use {'x' * 300}: File name too long\n"


def test_a_loss_that_is_not_finite_is_one_line(train, capsys):
    assert train("--set", "train.inner_optimizer.lr=1e30", "--seeds", "0", "--method", "equal") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"auxfast: noisy, equal, seed 0: the training loss is (nan|inf) at outer step 0: try .*", message
    )


def test_a_folder_that_cannot_be_written_is_one_line(train, tmp_path, capsys):
    (tmp_path / "out").touch()
    assert train("--seeds", "0") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"auxfast: cannot write {tmp_path / 'out'}")


def test_fixed_without_learned_is_refused_before_training(train, no_training, capsys):
    assert train("--method", "stl,linear-fixed") == 1
    assert "auxfast: linear-fixed takes phi from linear, of which" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "best"], "method: got 'best', must be one of stl, equal"),
        (["--set", "train.inner_steps"], "--set: got 'train.inner_steps', must be key=value"),
        (["--set", "train.inner_steps=ten"], "train.inner_steps: got 'ten', must be an integer"),
        (["--set", "train.steps=1"], "train.steps: no such entry, must be one of outer_steps"),
        (
            ["--set", "weighting.dwa.period=0", "--method", "dwa"],
            "weighting.dwa: got {'period': 0}: period must be at least 1",
        ),
        (["--set", "train.inner_optimizer.name=Adm"], "train.inner_optimizer.name: got 'Adm' (did you mean Adam or "),
        (["--set", "train.inner_optimizer.lr=nan"], "train.inner_optimizer.lr: got nan, must be finite"),
        (
            ["--set", "train.inner_scheduler={name='StepLR',step_size=0}"],
            "train.inner_scheduler: StepLR cannot be made",
        ),
        (["--set", "train.inner_optimizer={name=Adam}"], "train.inner_optimizer: got {name=Adam}, which is not TOML: "),
        (["--set", "train.patience=" + "[" * 5000], "train.patience: got [["),
        (["--set", "combiner.hidden=[100000000,100000000]", "--method", "nonlinear"], "combiner (nonlinear): "),
        (["--config", "none.toml"], "cannot read none.toml: No such file or directory"),
        (["--setting", "fewer features"], "setting: got 'fewer features' for noisy, must be one of 'more features'"),
    ],
)
def test_what_cannot_be_asked_for_is_said_before_training(arguments, message, train, no_training, capsys):
    assert train(*arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"auxfast: {message}")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("content", [b"train = ", b"\xff"])
def test_a_file_that_is_not_toml_is_named(content, train, no_training, tmp_path, capsys):
    (tmp_path / "c.toml").write_bytes(content)
    assert train("--config", str(tmp_path / "c.toml")) == 2
    assert capsys.readouterr().err.startswith(f"auxfast: {tmp_path / 'c.toml'} is not TOML: ")


def test_entries_of_a_file_need_a_section(train, no_training, tmp_path, capsys):
    (tmp_path / "c.toml").write_text("train = 3")
    assert train("--config", str(tmp_path / "c.toml")) == 2
    assert capsys.readouterr().err == "auxfast: train: got 3, must be a table\n"


@pytest.mark.parametrize("seeds", ["", "x", "3..1", "0..", "1.5", "0;1", "-1"])
def test_seeds_that_are_none_are_refused(seeds, train, no_training, capsys):
    with pytest.raises(SystemExit, match="2"):
        train(f"--seeds={seeds}")
    assert f"must be like 0..9 or 0,3,5, in ascending order, not {seeds!r}" in capsys.readouterr().err


def test_more_seeds_than_anybody_trains_are_refused_with_their_number(train, no_training, capsys):
    for seeds, message in {
        "0..99999999999": "0..99999999999 names 100000000000 seeds or more, must be at most 10000",
        "3,0..9999": "3,0..9999 names 10001 seeds or more, must be at most 10000",
        f"{2**64}": f"{2**64} is too large, a seed is at most {2**63 - 1}",
        "9" * 5000: "must be like 0..9 or 0,3,5",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            train(f"--seeds={seeds}")
        assert message in capsys.readouterr().err


def test_experiments_are_listed_and_unknown_ones_refused(capsys):
    assert main(["train", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(EXPERIMENTS)
    assert all(experiment.title in line for experiment, line in zip(EXPERIMENTS.values(), lines, strict=True))
    assert main(["train", "nothing"]) == 2
    assert f"experiment: got 'nothing', must be one of {', '.join(EXPERIMENTS)}" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert "auxfast train --list" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "package"), [("tqdm", "tqdm"), ("sklearn", "scikit-learn"), ("cattrs", "cattrs")])
def test_a_missing_extra_is_named_before_training(module, package, no_training, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["train", "diabetes", "--out", str(tmp_path)]) == 1
    message = f"auxfast: {package} is not installed, and this needs it. Get it with: pip install {package}\n"
    assert capsys.readouterr().err == message
