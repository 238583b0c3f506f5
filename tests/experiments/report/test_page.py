"""Pages and pictures of runs that were trained: small ones, and only for a few steps."""

import re
import sys
from dataclasses import replace

import pytest

from auxfast.cli import main
from auxfast.experiments.base import Finding, train_run
from auxfast.experiments.paper import EXPERIMENTS
from auxfast.train.methods import parse_method
from experiments.problems import noisy_experiment

pytest.importorskip("matplotlib")


def _draw(path, runs):
    from matplotlib.figure import Figure

    Figure().savefig(path)


@pytest.fixture
def experiment(monkeypatch):
    made = replace(
        noisy_experiment(outer_steps=3),
        about="Is 1 < 2 & so on?",
        draw=_draw,
        findings=lambda runs: [Finding(f"{len(runs)} finished", True), Finding("nothing <else>", False)],
    )
    monkeypatch.setitem(EXPERIMENTS, made.name, made)
    return made


def _train(experiment, out, methods, seeds=(0, 1), setting=""):
    for method in methods:
        for seed in seeds:
            train_run(experiment, setting, parse_method(method), seed, out)


def test_a_page_needs_no_other_file_and_says_everything(experiment, tmp_path, capsys):
    _train(experiment, tmp_path / "runs", ("stl", "equal", "linear-frozen", "linear"))
    _train(experiment, tmp_path / "runs", ("mgda",), (0,), "more features")
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "runs"), "--out", str(page)]) == 0
    html = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert html.count("data:image/png;base64,") == 3  # its own picture, and one for each setting
    assert "Is 1 &lt; 2 &amp; so on?" in html
    assert "<td>Linear, learned</td>" in html
    assert '<li class="holds">9 finished</li>' in html
    assert '<li class="fails">nothing &lt;else&gt;</li>' in html
    assert "more features" in html
    assert "&#34;inner_steps&#34;: 3" in html
    assert "&#34;torch&#34;" in html  # the environment
    output = capsys.readouterr().out
    assert re.search(r"^Linear, learned +-\d", output, re.MULTILINE)
    assert "NOT SHOWN:     nothing <else>" in output
    assert f"Wrote {page}" in output


@pytest.mark.parametrize(
    "methods",
    [
        ("stl",),
        ("linear",),
        ("nonlinear", "nonlinear-frozen", "nonlinear-fixed", "dwa"),
        ("polynomial-free", "deep-linear"),
    ],
)
def test_any_choice_of_methods_can_be_drawn(experiment, tmp_path, methods):
    _train(experiment, tmp_path / "runs", methods, (0,))
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "page.png")]) == 0
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_validation_scores_are_drawn_where_they_were_watched(monkeypatch, tmp_path):
    watched = noisy_experiment(outer_steps=4, patience=2)
    monkeypatch.setitem(EXPERIMENTS, watched.name, watched)
    _train(watched, tmp_path / "runs", ("linear",))
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "page.png")]) == 0


@pytest.mark.parametrize("package", ["jinja2", "matplotlib", "cattrs"])
def test_a_missing_package_is_named(experiment, tmp_path, monkeypatch, capsys, package):
    _train(experiment, tmp_path / "runs", ("stl",), (0,))
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "page.html")]) == 1
    assert capsys.readouterr().err == (
        f"auxfast: {package} is not installed, and this needs it. Get it with: pip install {package}\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 1, "there is no nowhere"),
        (["runs", "--out", "page.pdf"], 2, "page.pdf.*must end in .html or .png"),
        (["runs", "--out", "nowhere/page.html"], 1, "cannot write nowhere/page.html"),
    ],
)
def test_what_cannot_be_reported_is_told_in_a_line(experiment, tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    _train(experiment, tmp_path / "runs", ("stl",), (0,))
    assert main(["report", *arguments]) == code
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1


def test_unfinished_runs_are_told_on_the_page_and_in_the_text(experiment, tmp_path, monkeypatch, capsys):
    other = replace(experiment, name="other")
    monkeypatch.setitem(EXPERIMENTS, "other", other)
    _train(experiment, tmp_path, ("stl",))
    _train(other, tmp_path, ("linear",), (3,))
    for folder in (tmp_path / "noisy-regression/stl/seed-1", tmp_path / "other/linear/seed-3"):
        (folder / "result.json").unlink()
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    html, text = (tmp_path / "page.html").read_text(), capsys.readouterr().out
    for told in (
        "left out: 1 unfinished run of noisy regression (stl: seed 1); the same `auxfast train` with --resume",
        "left out: 1 unfinished run of other (linear: seed 3); the same `auxfast train` with --resume",
    ):
        assert told in text
        assert told in html
