"""Pages and pictures of runs that were trained: small ones, and only for a few steps."""

import csv
import re
import sys
from base64 import b64decode
from dataclasses import replace

import pytest

import auxfast
from auxfast.cli import main
from auxfast.experiments.base import Finding, train_run
from auxfast.experiments.paper import EXPERIMENTS
from auxfast.train import find_runs, parse_method
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
    pictures = [b64decode(text) for text in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', html)]
    assert len(pictures) == 3  # its own, and one for each setting
    assert all(b"<svg" in picture for picture in pictures)
    assert b">Linear, learned</text>" in pictures[1]  # letters, which a browser can draw in any size
    assert "Is 1 &lt; 2 &amp; so on?" in html
    assert "<td>Linear, learned</td>" in html
    assert '<li class="unknown">9 finished (not known: 2 seeds, a verdict takes 5)</li>' in html
    assert "nothing &lt;else&gt;" in html
    assert "Linear, learned: against STL, Equal and its frozen start not known: 2 seeds, a verdict takes 5." in html
    assert "<b>" not in html
    assert "more features" in html
    assert "&#34;inner_steps&#34;: 3" in html
    assert "&#34;torch&#34;" in html  # the environment
    output = capsys.readouterr().out
    assert re.search(r"^Linear, learned +-\d", output, re.MULTILINE)
    assert "not known:     nothing <else>" in output
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


def test_the_page_says_when_how_and_where_it_was_made(experiment, tmp_path, monkeypatch):
    _train(experiment, tmp_path / "runs", ("stl",), (0,))
    (run,) = find_runs([tmp_path])
    monkeypatch.setattr(sys, "argv", ["/usr/bin/auxfast", "report", "my runs"])
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "page.html")]) == 0
    html = (tmp_path / "page.html").read_text()
    version, torch_version = auxfast.__version__, run.environment["versions"]["torch"]
    assert re.search(r"Made on \d{4}-\d\d-\d\d \d\d:\d\d ", html)
    assert f"by <code>auxfast report &#39;my runs&#39;</code> with auxfast {version}." in html
    assert f"Trained with auxfast {version}, torch {torch_version}, on " in html
    (run.path / "environment.json").unlink()
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "page.html")]) == 0
    assert "Trained with unknown versions, on an unknown machine." in (tmp_path / "page.html").read_text()


def test_runs_of_versions_that_recorded_no_validation_scores_can_be_drawn(experiment, tmp_path):
    _train(experiment, tmp_path / "runs", ("linear", "stl"))
    for path in tmp_path.rglob("metrics.jsonl"):
        path.write_text(re.sub('"validation_score": [^,]*,', '"validation_score": null,', path.read_text()))
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "page.html")]) == 0
    (_, picture) = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', (tmp_path / "page.html").read_text())
    assert b"Held-out score: not recorded in these runs" in b64decode(picture)


def test_runs_are_rows_for_other_programs(experiment, tmp_path, capsys):
    _train(experiment, tmp_path / "runs", ("stl", "linear"))
    assert main(["report", str(tmp_path / "runs"), "--csv", str(tmp_path / "runs.csv")]) == 0
    assert capsys.readouterr().out.endswith(f"Wrote {tmp_path / 'runs.csv'}\n")
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    runs = find_runs([tmp_path])
    assert [(row["method"], int(row["seed"])) for row in rows] == [("linear", 0), ("linear", 1), ("stl", 0), ("stl", 1)]
    for row, run in zip(rows, runs, strict=True):
        assert row["experiment"] == "noisy regression"
        assert float(row["score"]) == run.result.score
        assert float(row["validation_score"]) == run.result.validation_score
        assert float(row["seconds"]) == run.result.seconds
        assert (row["outer_steps"], row["skipped_steps"]) == ("3", "0")
    assert [int(row["matvecs"]) for row in rows] == [sum(r.matvecs or 0 for r in run.records) for run in runs]


def test_tables_for_a_paper_are_escaped(experiment, tmp_path, monkeypatch):
    pytest.importorskip("jinja2")
    monkeypatch.setitem(
        EXPERIMENTS, experiment.name, replace(experiment, title="50% & more_{~^\\} <|>", score_name="R2, %")
    )
    _train(experiment, tmp_path / "runs", ("stl", "linear"))
    files = ["--latex", str(tmp_path / "table.tex"), "--out", str(tmp_path / "page.html")]
    assert main(["report", str(tmp_path / "runs"), *files]) == 0
    assert (tmp_path / "page.html").exists()
    table = (tmp_path / "table.tex").read_text()
    caption = r"\caption{50\% \& more\_\{\textasciitilde{}\textasciicircum{}\textbackslash{}\} "
    assert caption + r"\textless{}\textbar{}\textgreater{}. Mean" in table
    assert r"method & R2, \% & minus stl & time / stl & seeds \\" in table
    assert re.search(r"^Linear, learned & \$-[\d.]+ \\pm [\d.]+\$ & \$[+-][\d.]+ \\pm [\d.]+\$ & ", table, re.MULTILINE)


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
