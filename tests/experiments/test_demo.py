"""`auxfast demo`, with a few steps instead of hundreds."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch

import auxfast
from auxfast.cli import main
from auxfast.experiments import demo, timing
from auxfast.experiments.paper import EXPERIMENTS


@pytest.fixture
def short_demo(monkeypatch):
    for package in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    for name in demo.EXPERIMENTS:
        full = EXPERIMENTS[name]
        train = replace(full.config.train, outer_steps=3, inner_steps=3)
        monkeypatch.setitem(EXPERIMENTS, name, replace(full, config=replace(full.config, train=train)))
    monkeypatch.setattr(timing, "REPEATS", 2)


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(demo, "train_all", lambda plan: pytest.fail("training started"))


@pytest.mark.slow
def test_the_demo_writes_what_it_measured_and_the_same_scores_again(short_demo, tmp_path, capsys):
    threads = torch.get_num_threads()
    first, second = tmp_path / "a", tmp_path / "b" / "nested"
    assert main(["demo", "--seeds", "2", "--out", str(first)]) == 0
    output = capsys.readouterr()
    assert torch.get_num_threads() == threads
    assert sorted(path.name for path in first.iterdir()) == ["report.html", "report.png", "results.json"]
    assert (first / "report.png").read_bytes().startswith(b"\x89PNG")

    results = json.loads((first / "results.json").read_text())
    assert results["seeds"] == [0, 1]
    assert results["environment"]["build"]["auxfast"] == auxfast.__version__
    assert set(results["hypergradient"]["milliseconds"]) == {"native", "reference"}
    assert list(results["experiments"]) == ["diabetes", "digits"]
    for experiment in results["experiments"].values():
        _check_methods(experiment["methods"], len(experiment["losses"]))

    for label in ("STL (main loss only)", "Equal", "Linear, frozen", "Linear, learned", "Nonlinear, learned"):
        assert len(re.findall(rf"^{re.escape(label)}.* \+- ", output.out, re.MULTILINE)) == 2
    assert "minus stl" in output.out
    assert re.search(r"native \d+\.\d\d ms, reference \d+\.\d\d ms: (\d\.\d\d times|NOT) faster", output.out)
    assert "[12/12] digits, seed 1, nonlinear: score " in output.err
    told = "Linear, learned: against STL, Equal and its frozen start not known on diabetes and digits."
    assert results["story"][0] == told
    assert output.out.startswith(f"\n{told}\n")
    assert results["experiments"]["digits"]["story"][1].startswith(
        "Nonlinear, learned: against STL, Equal and its frozen"
    )

    assert main(["demo", "--seeds", "2", "--out", str(second)]) == 0
    again = json.loads((second / "results.json").read_text())
    assert _without_times(again["experiments"]) == _without_times(results["experiments"])


@pytest.mark.slow
def test_the_demo_trains_on_pixel_losses(short_demo, tmp_path, capsys):
    pytest.importorskip("skimage")
    assert main(["demo", "--experiment", "stereo", "--seeds", "1", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["experiments"]) == ["stereo"]
    assert results["experiments"]["stereo"]["methods"]["conv"]["sem"] is None  # of one seed
    output = capsys.readouterr().out
    assert re.search(r"^Convolutional, learned", output, re.MULTILINE)
    assert re.search(r"losses \(16, 2, 24, 24\), .*\n  native \d+\.\d\d ms", output)


def test_every_experiment_can_be_asked_for(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--experiment", "none"])
    message = capsys.readouterr().err
    assert all(name in message for name in demo.EXPERIMENTS)


def _check_methods(methods, num_losses):
    assert list(methods) == ["stl", "equal", "linear-frozen", "linear", "nonlinear-frozen", "nonlinear"]
    for name, method in methods.items():
        one, two = method["scores"]
        assert method["mean"] == pytest.approx((one + two) / 2)
        assert method["sem"] == pytest.approx(abs(one - two) / 2)  # sqrt(2 (d/2)^2 / 1) / sqrt(2), d the difference
        assert ("paired difference to stl" in method) == (name != "stl")
        assert ("history" in method) == (name in ("linear", "nonlinear"))
        for run in method.get("history", []):
            assert len(run["residual"]) == len(run["training_loss"]) == len(run["outer_loss"]) == 3
            assert [len(weights) for weights in run["loss_weights"]] == [num_losses] * 3


def _without_times(experiments):
    for experiment in experiments.values():
        for method in experiment["methods"].values():
            del method["inner seconds"], method["outer seconds"]
            for run in method.get("history", []):
                del run["inner_seconds"], run["outer_seconds"], run["validation_seconds"]
    return experiments


def test_a_folder_that_cannot_be_written_is_named_before_training(no_training, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "file")]) == 1
    assert main(["demo", "--out", str(tmp_path / "file" / "below")]) == 1
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == 2
    assert all(message.startswith(f"auxfast: cannot write {tmp_path / 'file'}") for message in messages)


@pytest.mark.parametrize(
    ("module", "package"),
    [("sklearn", "scikit-learn"), *((name, name) for name in ("matplotlib", "jinja2", "tqdm", "cattrs"))],
)
def test_a_missing_extra_is_named_before_training(module, package, no_training, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"auxfast: {package} is not installed, and this needs it. Get it with: pip install {package}\n"
    )


def test_an_interrupted_demo_says_that_nothing_was_written(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupt)
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\nauxfast: interrupted; no results were written\n"


@pytest.mark.parametrize("seeds", ["0", "-1", "two", "1.5"])
def test_a_number_of_seeds_that_is_none_is_refused(seeds, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["demo", f"--seeds={seeds}"])
    assert f"must be a whole number from 1 to 1000, not {seeds!r}" in capsys.readouterr().err
