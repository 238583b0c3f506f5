"""A run that was interrupted, wherever that was, ends with the numbers of one that was not, to the bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from auxfast.experiments.report.notes import notes
from auxfast.solvers import (
    MINRES,
    Chebyshev,
    ConjugateGradient,
    Dense,
    Identity,
    Jacobi,
    Neumann,
    Nystrom,
    OneStep,
    SingleLoop,
)
from auxfast.train import Component, Run, RunError, read_run
from auxfast.train.files import load_checkpoint
from train.problems import noisy_plan, without_seconds
from train.test_recording import run

ROOT = Path(__file__).resolve().parents[2]

CASES = {
    "stl": {},
    "equal": {},
    "uncertainty": {},
    "dwa": {},
    "gradnorm": {},
    "gcs": {},
    "mgda": {},
    "linear": {"inner_optimizer": Component("Adam", {"lr": 0.01}), "outer_optimizer": Component("Adam", {"lr": 0.02})},
    "deep-linear": {"inner_optimizer": Component("AdamW", {"lr": 0.01}), "weight_decay": 1e-2},
    "polynomial": {"inner_scheduler": Component("OneCycleLR", {"max_lr": 0.1, "total_steps": 100}), "patience": 2},
    "nonlinear": {"inner_scheduler": Component("MultiStepLR", {"milestones": (5, 14)}), "amp": True},
    "nonlinear-free": {"solver": Neumann(steps=3, step_size="auto", warm_start=True), "max_inner_grad_norm": 0.1},
    "nonlinear-frozen": {"inner_optimizer": Component("RMSprop", {"lr": 0.01, "momentum": 0.5})},
    "linear-frozen": {"inner_scheduler": Component("CosineAnnealingWarmRestarts", {"T_0": 4}), "patience": 30},
    "own": {"outer_optimizer": Component("Adam", {"lr": 0.1}), "patience": 30},
    "own-frozen": {},
    "auxilearn-labels": {"patience": 3},
    "auxilearn-labels-frozen": {},
    "maxl": {"inner_scheduler": Component("MultiStepLR", {"milestones": (5, 14)})},
    "maxl-f": {"outer_optimizer": Component("Adam", {"lr": 0.1})},
    "linear-free": {"solver": ConjugateGradient(steps=3, preconditioner=Jacobi(probes=2), warm_start=True)},
}
SOLVERS = {
    "minres": MINRES(steps=3, damping=0.1, warm_start=True),
    "chebyshev": Chebyshev(steps=4, preconditioner=Nystrom(rank=3, refresh=3)),
    "nystrom": Nystrom(rank=4, refresh=5),
    "one step": OneStep(0.1),
    "single loop": SingleLoop(0.1),
}


def _interrupt(out, method, step, **changes):
    """The run, as Ctrl-C after that outer step leaves it."""

    def interrupt(record):
        if record.step == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(out, method, on_outer_step=interrupt, **changes)


def _same(one: Run, other: Run) -> None:
    assert without_seconds(one.records) == without_seconds(other.records)
    scores = [(r.score, r.validation_score, r.outer_steps, r.stopped_early) for r in (one.result, other.result)]
    assert scores[0] == scores[1]
    states = [load_checkpoint(folder.path / "checkpoint.pt")["trainer"] for folder in (one, other)]
    assert all(map(torch.equal, *(state["model"].values() for state in states)))
    assert all(torch.equal(states[0][name], states[1][name]) for name in ("generator", "outer_generator", "random"))


@pytest.mark.parametrize("method", CASES)
def test_a_resumed_run_is_the_same(method, tmp_path):
    reference = run(tmp_path / "whole", method, **CASES[method])
    _interrupt(tmp_path / "cut", method, 4, **CASES[method])
    torch.rand(3)
    resumed = []
    again = run(tmp_path / "cut", method, resume=True, on_outer_step=resumed.append, **CASES[method])
    assert resumed[0].step == 4  # checkpoints are after every second outer step
    _same(again, reference)


LEARNING = {"outer_steps": 12, "keep_total": True, "max_weight_change": 0.15, "solver": Identity()}


@pytest.mark.parametrize("method", ["linear", "nonlinear"])
@pytest.mark.parametrize("step", [2, 6, 10], ids=["warm-up", "learning", "cool-down"])
def test_a_run_resumes_in_every_part_of_it(method, step, tmp_path):
    changes = {**LEARNING, "warmup": 0.34, "cooldown": 0.34}
    reference = run(tmp_path / "whole", method, **changes)
    _interrupt(tmp_path / "cut", method, step, **changes)
    _same(run(tmp_path / "cut", method, resume=True, **changes), reference)


def test_a_run_that_was_warned_of_something_resumes(tmp_path):
    optimizers = {"inner_optimizer": Component("SGD", {"lr": 1e-3}), "outer_optimizer": Component("SGD", {"lr": 300.0})}
    safeguards = {"keep_total": False, "max_weight_change": None}
    changes = {**LEARNING, **optimizers, **safeguards, "max_inner_grad_norm": 0.1}
    reference = run(tmp_path / "whole", "linear-free", **changes)
    assert "weights grew tenfold" in notes(reference)
    _interrupt(tmp_path / "cut", "linear-free", 6, **changes)
    checkpoint = load_checkpoint(noisy_plan(tmp_path / "cut", "linear-free").path / "checkpoint.pt")
    assert checkpoint["trainer"]["outer"]["watch"]["noticed"]["grown"]
    _same(run(tmp_path / "cut", "linear-free", resume=True, **changes), reference)


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_the_solver_has_learnt_is_kept(solver, tmp_path):
    changes = {"solver": SOLVERS[solver]}
    reference = run(tmp_path / "whole", "nonlinear", **changes)
    _interrupt(tmp_path / "cut", "nonlinear", 2, **changes)
    _same(run(tmp_path / "cut", "nonlinear", resume=True, **changes), reference)


@pytest.mark.parametrize("step", [0, 1, 5, 6])
def test_a_resumed_run_is_the_same_wherever_it_was_interrupted(step, tmp_path):
    reference = run(tmp_path / "whole")
    _interrupt(tmp_path / "cut", "linear", step)
    _same(run(tmp_path / "cut", resume=True), reference)


def test_a_run_that_is_interrupted_again_and_again_is_the_same(tmp_path):
    reference = run(tmp_path / "whole", patience=3)
    made = 0

    def interrupt(record):
        nonlocal made
        made += 1
        if made % 3 == 0:
            raise KeyboardInterrupt

    while True:
        try:
            resumed = run(tmp_path / "cut", resume=True, on_outer_step=interrupt, patience=3)
            break
        except KeyboardInterrupt:
            pass
    assert made > len(reference.records)
    _same(resumed, reference)


def test_a_run_killed_between_its_last_checkpoint_and_its_result_is_not_trained_again(tmp_path):
    reference = run(tmp_path, patience=3)
    (reference.path / "result.json").unlink()
    again = run(tmp_path, resume=True, on_outer_step=lambda _: pytest.fail("trained again"), patience=3)
    _same(again, reference)


def test_a_line_that_was_being_written_comes_again(tmp_path):
    reference = run(tmp_path / "whole")
    _interrupt(tmp_path / "cut", "linear", 4)
    folder = read_run(tmp_path / "cut" / "noisy-regression" / "linear" / "seed-0")
    with (folder.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "trai')
    assert read_run(folder.path) == folder
    _same(run(tmp_path / "cut", resume=True), reference)


def _as_before_0_2(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state_dict of a training loss with a combiner's layers by name and without a weighting's last weights."""
    old = {key: value for key, value in state.items() if key not in ("combiner.phi", "weighting.last_weights")}
    if "combiner.phi" in state:
        shapes = state._metadata["combiner"]["layers"]
        parts = state["combiner.phi"].split([torch.Size(shape).numel() for shape in shapes.values()])
        old |= {f"combiner.{name}": part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
    assert len(old) != len(state) or "combiner.weight" in old
    return old


@pytest.mark.parametrize("method", ["nonlinear", "polynomial", "uncertainty", "dwa", "mgda"])
def test_run_folders_of_before_0_2_resume(method, tmp_path):
    reference = run(tmp_path / "whole", method, patience=5)
    _interrupt(tmp_path / "cut", method, 4, patience=5)
    (path,) = (tmp_path / "cut").rglob("checkpoint.pt")
    state = load_checkpoint(path)
    for part in (state["trainer"], state["trainer"]["best"]):
        part["training_loss"] = _as_before_0_2(part["training_loss"])
    torch.save(state, path)
    description = json.loads((path.parent / "config.json").read_text())
    del description["losses"], description["config"]["labels"], description["config"]["combiner"]["weight_decay"]
    (path.parent / "config.json").write_text(json.dumps(description))
    _same(run(tmp_path / "cut", method, resume=True, patience=5), reference)


def test_a_run_of_before_generated_labels_gives_its_phi(tmp_path):
    finished = run(tmp_path)
    description = json.loads((finished.path / "config.json").read_text())
    del description["config"]["labels"]
    (finished.path / "config.json").write_text(json.dumps(description))
    fixed = run(tmp_path, "linear-fixed")
    assert json.loads((fixed.path / "config.json").read_text())["phi from"] == finished.path.name


def test_a_finished_run_is_only_read(tmp_path):
    reference = run(tmp_path)
    again = run(tmp_path, resume=True, on_outer_step=lambda _: pytest.fail("trained again"))
    assert again.result == reference.result


def test_a_run_that_is_not_there_starts(tmp_path):
    assert run(tmp_path, resume=True).result is not None


def test_another_configuration_is_refused_with_what_differs(tmp_path):
    made = run(tmp_path)
    with pytest.raises(RunError) as caught:
        run(tmp_path, resume=True, inner_steps=5, solver=Dense())
    message = str(caught.value)
    assert message.startswith(f"{made.path} holds another run, which this cannot go on with (")
    for difference in (
        "train.inner_steps was 3 and is 5",
        "train.solver.name was 'Neumann' and is 'Dense'",
        "train.solver.steps was 3 and is 'missing'",
    ):
        assert difference in message
    assert "outer_steps" not in message


def test_a_corrupt_checkpoint_can_be_deleted_to_start_again(tmp_path):
    reference = run(tmp_path / "whole")
    _interrupt(tmp_path / "cut", "linear", 4)
    checkpoint = tmp_path / "cut" / "noisy-regression" / "linear" / "seed-0" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(RunError, match=rf"{checkpoint} is corrupt .*: delete it to start that run again"):
        run(tmp_path / "cut", resume=True)
    checkpoint.unlink()
    _same(run(tmp_path / "cut", resume=True), reference)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    other = run(tmp_path, "deep-linear")
    _interrupt(tmp_path, "linear", 4)
    checkpoint = tmp_path / "noisy-regression" / "linear" / "seed-0" / "checkpoint.pt"
    checkpoint.write_bytes((other.path / "checkpoint.pt").read_bytes())
    with pytest.raises(RunError, match=rf"metrics.jsonl has 5 lines of 7|{checkpoint} does not fit this run"):
        run(tmp_path, resume=True)


def test_metrics_that_are_too_short_for_the_checkpoint_are_refused(tmp_path):
    _interrupt(tmp_path, "linear", 4)
    metrics = tmp_path / "noisy-regression" / "linear" / "seed-0" / "metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:1]))
    with pytest.raises(RunError, match=rf"{metrics} has 1 lines of 4: delete {metrics.parent} to start that run again"):
        run(tmp_path, resume=True)


# ------------------------------------------------------------------------------------------------------------ SIGKILL

COMMAND = (
    *(sys.executable, "-m", "auxfast", "train", "illustrative", "--method", "nonlinear", "--seeds", "3"),
    *("--set", "train.outer_steps=40", "--set", "train.inner_steps=20", "--set", "train.checkpoint_every=4"),
)


def _start(out: Path, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    return subprocess.Popen(
        [*COMMAND, "--out", str(out), *more], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _kill_after(lines: int, out: Path) -> int:
    """SIGKILL, once there are so many lines of metrics. Returns how many there were."""
    process = _start(out)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        metrics = [path.read_bytes().count(b"\n") for path in out.rglob("metrics.jsonl")]
        if metrics and metrics[0] >= lines:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    return next(out.rglob("metrics.jsonl")).read_bytes().count(b"\n")


def _finish(out: Path, *more: str) -> Path:
    process = _start(out, *more)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    return next(out.rglob("result.json")).parent


def _numbers(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    tables = [json.loads(line) for line in [*lines, (folder / "result.json").read_text()]]
    return [{key: value for key, value in table.items() if "seconds" not in key} for table in tables]


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_numbers(tmp_path):
    whole = _finish(tmp_path / "whole")
    cut = tmp_path / "cut"
    assert 10 <= _kill_after(10, cut) < 40
    assert not list(cut.rglob("result.json"))
    resumed = _finish(cut, "--resume")
    assert _numbers(resumed) == _numbers(whole)
    assert len(_numbers(whole)) == 41
