"""The programs in examples/ run, and what each shows is so; the picture of the README is drawn from the first."""

from __future__ import annotations

import inspect
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pages import DOCS, ROOT

import auxfast.solvers
from auxfast.solvers import MINRES

EXAMPLES = ROOT / "examples"


def load(program: Path) -> SimpleNamespace:
    """The names that a program defines."""
    return SimpleNamespace(**runpy.run_path(str(program)))


def example(name: str) -> SimpleNamespace:
    return load(EXAMPLES / f"{name}.py")


def test_learned_weights_of_auxiliary_losses_drop_the_harmful_one():
    errors, history = example("auxiliary_losses").main()
    learned = errors.pop("learned weights")
    assert all(learned < 0.5 * error for error in errors.values())
    _, helpful, harmful = history[-1]
    assert harmful < 0.1 < 1 < helpful


def test_a_weight_decay_for_each_group_is_better_than_the_best_common_one():
    program = example("weight_decay")
    result = program.main()
    assert result["learned"] < 0.8 * result["common"]
    effective, weak, useless = (result[name] for name in program.GROUPS)
    assert effective < weak < useless


def test_weights_of_training_examples_find_the_wrong_labels():
    result = example("data_weights").main()
    assert result["wrong"] < 0.6 < 1 < result["right"]
    others = ("equal weights", "held-out samples alone", "both")
    assert all(result["learned weights"] < 0.5 * result[name] for name in others)


def test_scores_of_auxiliaries_predict_what_training_with_them_does():
    changes = example("usefulness").main()
    for predicted, measured in changes.values():
        assert measured == pytest.approx(predicted, rel=0.1)
    assert changes["the same target, without noise"][0] < 0 < changes["the opposite"][0]


def test_shared_weights_are_learned_from_which_tasks_adapt_better():
    found = example("imaml").main()
    assert found["learned"] < 0.5 * found["as drawn"]


def test_a_solver_of_ones_own_serves_and_is_judged_by_its_true_residual():
    found = example("custom_solver").main()
    error, products = found["SteepestDescent"]
    assert error < 1e-5
    assert 1 < found["MINRES"][1] < products


def test_a_solver_of_ones_own_has_the_signature_of_the_protocol():
    own, protocol = example("custom_solver").SteepestDescent.solve, auxfast.solvers.Solver.solve
    assert list(inspect.signature(own).parameters) == list(inspect.signature(protocol).parameters)


@pytest.mark.filterwarnings("ignore")  # curvlinops' own
def test_kfacs_inverse_saves_nearly_all_products_where_it_is_exact():
    pytest.importorskip("curvlinops")
    results = example("kfac").main()
    assert results["KFAC"].stats.matvecs <= 4 < results["none"].stats.matvecs / 10
    assert results["KFAC"].grads[0].item() == pytest.approx(results["none"].grads[0].item(), rel=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_weights_of_training_sequences_find_the_corrupted_ones():
    pytest.importorskip("transformers")
    history = example("lora_reweighting").main()
    assert len(history) == 21
    assert history[-1][0] < 0.4 * history[0][0]
    assert all(clean > 1 > corrupted for _, clean, corrupted in history[1:])
    assert history[-1][2] < 0.1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_the_hypergradient_of_a_transformer_agrees_with_differences_through_inner_problems_solved_anew():
    pytest.importorskip("transformers")
    task = example("lora_reweighting").Reweighting()
    model = task.model.double()
    model.transformer.h = model.transformer.h[:1]
    task.adapters = [w for name, w in model.named_parameters() if name.endswith("up")]
    task.training, task.held_out, task.decay = task.training[9:15], task.held_out[:6], 0.2  # three are corrupted
    task.logits = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS(task.adapters, max_iter=100, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        lbfgs.zero_grad()
        loss = task.inner_loss()
        loss.backward()
        return loss

    lbfgs.step(closure)
    args = task.outer_loss, task.inner_loss, task.adapters, [task.logits]
    report = auxfast.verify_hypergradient(*args, max_directions=2, max_dense=0)
    assert report.verdict.startswith("right")
    (exact,) = auxfast.hypergradient(*args, solver=MINRES(tol=1e-5)).grads
    for name, w in model.named_parameters():  # the same numbers in bfloat16, adapters in float32 apart
        w.data = w.data.to(torch.float32 if name.endswith(("down", "up")) else torch.bfloat16)
    (mixed,) = auxfast.hypergradient(*args, solver=MINRES(), warn=False).grads
    assert (mixed - exact).norm() < 0.05 * exact.norm()


def test_weights_learned_by_processes_find_the_harmful_loss():
    found = example("distributed").main()  # in one process
    assert found["harmful"] < 0.2 < 2 < found["helpful"]
    assert found["error"] < 0.1


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(capfd):
    example("distributed").main()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    alone, together = capfd.readouterr().out, output_of([*command, str(EXAMPLES / "distributed.py")])
    assert figures_in(together) == pytest.approx(figures_in(alone), rel=0.01)


def figures_in(text: str) -> list[float]:
    return [float(figure) for figure in re.findall(r"\d+\.\d+", text)]


def test_each_example_has_a_test_here_and_is_about_sixty_lines():
    losses = {"auxiliary_losses", "usefulness"}
    tested = {"weight_decay", "data_weights", "custom_solver", "imaml", "kfac", "lora_reweighting", "distributed"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == losses | tested
    assert all(len(path.read_text().splitlines()) <= 80 for path in EXAMPLES.glob("*.py"))


@pytest.mark.slow
def test_an_example_runs_as_a_program():
    assert "SteepestDescent" in output_of([sys.executable, str(EXAMPLES / "custom_solver.py")])


def output_of(command: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=120).stdout


def test_the_picture_is_drawn_from_the_first_example(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "weights.svg"
    load(ROOT / "tools" / "docs" / "draw_weights.py").main(path)
    for picture in (path, DOCS / "pictures" / "weights.svg"):
        assert "<svg" in picture.read_text()
        assert picture.stat().st_size < 60_000
