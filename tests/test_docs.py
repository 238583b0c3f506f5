"""The pages of the documentation: their programs run and do what the pages say, and what they name is there."""

from __future__ import annotations

import importlib
import json
import re
import runpy
from pathlib import Path

import pytest
from pages import DOCS, README, ROOT, fenced, run

from auxfast.cli import main

PAGES = [README, *sorted(DOCS.rglob("*.md"))]
# Tests of their own run these: test_theorem, compat/test_migration, and those of the kernels' pages.
TESTED_ELSEWHERE = [DOCS / "theorem.md", DOCS / "compat.md", *(DOCS / "kernels").glob("*.md")]
WITH_CLAIMS = [
    DOCS / f"{name}.md"
    for name in (
        "quickstart",
        "your-own-task",
        "hyperparameters",
        "trainer",
        "certificates",
        "outer-loop",
        "implicit-functions",
    )
]
API = {
    "curvature.md": "auxfast.curvature",
    "nn.md": "auxfast.nn",
    "solvers.md": "auxfast.solvers",
    "train.md": "auxfast.train",
    "experiments.md": "auxfast.experiments",
    "weighting.md": "auxfast.weighting",
    "compat.md": "auxfast.compat.auxilearn",
}


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if fenced(page, "python") and page not in (*TESTED_ELSEWHERE, *WITH_CLAIMS)],
    ids=title,
)
def test_programs_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page)


def test_the_quickstart_finds_the_harmful_auxiliary_and_verifies_a_hypergradient(capsys):
    names = run(DOCS / "quickstart.md")
    _, helpful, harmful = names["combiner"].loss_weights(names["losses"]())[0].tolist()
    assert harmful < 0.1 < 1 < helpful
    assert names["result"].stats.residual < 0.01
    assert [grad.shape for grad in names["result"].grads] == [(3,)]
    (shown,) = fenced(DOCS / "quickstart.md", "text")
    printed = capsys.readouterr().out
    assert "tensor" in printed
    for line in shown.splitlines():  # the words; figures differ with the processor
        assert line[:29] in printed


def test_the_comparison_with_retraining_prints_what_the_page_shows(capsys):
    run(DOCS / "outer-loop.md")
    (shown,) = fenced(DOCS / "outer-loop.md", "text")
    printed = capsys.readouterr().out
    assert [line[:16] for line in printed.splitlines()] == [line[:16] for line in shown.splitlines()]
    assert "points right" in printed


def test_the_program_of_the_hyperparameters_tunes_decays_example_weights_and_a_mix(capsys):
    names = run(DOCS / "hyperparameters.md")
    decay, weights = names["log_decay"].exp(), names["example_logits"].softmax(0)
    assert decay[3:].median() > 10 * decay[:3].max()
    assert weights[:20].sum() < 0.15
    assert names["mix"].item() != 0
    assert names["outer_loss"]() < 1e-3
    assert names["stats"].converged
    assert "tensor" in capsys.readouterr().out


def test_the_programs_of_implicit_functions_share_a_solve_and_differentiate_roots():
    names = run(DOCS / "implicit-functions.md")
    assert names["rows"].shape == (10, 2)
    (solve,) = names["stats"]
    assert len(solve.residuals) == 10
    assert names["W"].grad.any()
    assert all(parameter.grad.any() for parameter in names["meta"].parameters())


def test_the_programs_of_your_own_task_mask_losses_and_take_micro_batches(capsys):
    names = run(DOCS / "your-own-task.md")
    assert names["loss"].isfinite()
    assert names["weights"].shape == names["loss_image"].shape
    assert (names["weights"][names["pixel_mask"] == 0] == 0).all()
    assert len(names["micro_batches"]) == 4
    assert names["micro_batches"][3][0] == 4
    assert names["log_decay"].detach().ne(0).all()
    assert names["stats"].residual < 0.1
    assert "nan" not in capsys.readouterr().out


def test_the_programs_of_the_certificates_are_told_of_negative_curvature_and_of_a_kink():
    names = run(DOCS / "certificates.md")
    assert names["result"].stats.negative_curvature
    assert len(names["caught"]) == 1
    assert "curves downwards" in str(names["caught"][0].message)
    assert names["report"].verdict.startswith("direction right, size 1.67 times too large: kinks: 1 of 2 inner entries")
    assert names["wrong"].grads[0].item() == pytest.approx(-10 / 3)
    assert names["right"].grads[0].item() == pytest.approx(-2)


@pytest.mark.slow
def test_the_programs_of_the_trainer_compare_methods_on_a_task_of_ones_own(tmp_path, monkeypatch, capsys):
    for package in ("tqdm", "matplotlib", "jinja2", "scipy"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names = run(DOCS / "trainer.md")
    assert "Linear, learned" in capsys.readouterr().out
    _, helpful, harmful = names["result"].runs[-1].records[-1].loss_weights
    assert 0 <= harmful < 0.2 * helpful
    assert names["result"].difference("linear", "linear-frozen").above_noise()
    assert names["mixed"].difference("own", "own-frozen").above_noise()
    assert (tmp_path / "report.html").exists()


def test_the_configuration_file_is_one(tmp_path, capsys):
    """The trainer's TOML example, for a few steps."""
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")
    (text,) = fenced(DOCS / "trainer.md", "toml")
    file = tmp_path / "mine.toml"
    file.write_text(text)
    changes = ("train.outer_steps=2", "train.inner_steps=2", 'train.solver={name="MINRES", steps=20}')
    command = [
        "train",
        "digits",
        "--method",
        "nonlinear",
        "--seeds",
        "0",
        "--config",
        str(file),
        "--out",
        str(tmp_path),
    ]
    assert main([*command, *(part for change in changes for part in ("--set", change))]) == 0
    (written,) = tmp_path.rglob("config.json")
    config = json.loads(written.read_text())["config"]
    assert config["combiner"]["hidden"] == [10, 10, 10]
    assert config["train"]["inner_optimizer"] == {"name": "AdamW", "lr": 1e-3}
    assert config["train"]["inner_scheduler"] == {"name": "CosineAnnealingLR", "T_max": 1200}
    assert config["train"]["solver"]["steps"] == 20
    assert "Nonlinear, learned" in capsys.readouterr().out


def test_the_figures_of_the_examples_are_those_that_the_programs_print():
    table = (DOCS / "index.md").read_text()
    errors, _ = runpy.run_path(str(ROOT / "examples" / "auxiliary_losses.py"))["main"]()
    learned, others = errors.pop("learned weights"), min(errors.values())
    decays = runpy.run_path(str(ROOT / "examples" / "weight_decay.py"))["main"]()
    for name, *figures in (
        ("auxiliary_losses", learned, others),
        ("weight_decay", decays["learned"], decays["common"]),
    ):
        (row,) = re.findall(rf"`{name}.py` \|(.*)\|", table)
        assert [float(figure) for figure in re.findall(r"\d+\.\d+", row)] == pytest.approx(figures, rel=0.2)


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_files_that_a_page_names_exist(page):
    named = re.findall(r"(?<![\w/])(?:auxfast|benchmarks|csrc|docs|examples|tests|tools)/[\w/.-]*\w", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_commands_name_experiments_that_there_are(capsys):
    main(["train", "--list"])
    known = re.findall(r"^(\S+)", capsys.readouterr().out, re.MULTILINE)
    command = re.compile(r"auxfast train ([a-z][a-z-]+)(?![\w.:-])")  # and not a file or a module
    named = {name for page in PAGES for name in command.findall(page.read_text())}
    assert "illustrative" in named
    assert named <= set(known)


def test_the_reference_has_every_public_name():
    """Pages of modules list what is in `__all__` by themselves; that of `auxfast` is in an order of its own."""
    listed = re.findall(r"^::: ([\w.]+)$", (DOCS / "api" / "auxfast.md").read_text(), re.MULTILINE)
    public = set(importlib.import_module("auxfast").__all__) - {"__version__", "curvature", "nn", "solvers"}
    assert {name.rpartition(".")[2] for name in listed} == public
    for page, module in API.items():
        assert f"::: {module}\n" in (DOCS / "api" / page).read_text()
        assert importlib.import_module(module).__all__
