import pytest
import torch

from auxfast.experiments.base import restore, train_run
from auxfast.experiments.paper import digits
from auxfast.experiments.paper.fixed_auxiliary import EXPERIMENT, draw, findings
from auxfast.train.files import RunError
from auxfast.train.methods import parse_method

from .handmade import runs_of, unfinished

pytest.importorskip("sklearn")
SHORT = {"train.outer_steps": 2, "train.inner_steps": 2}


def _run(method, seed, out):
    return train_run(EXPERIMENT, "", parse_method(method), seed, out, overrides=SHORT)


def test_everything_but_the_methods_is_as_with_the_digits():
    assert EXPERIMENT.make_task is digits.make_task
    assert EXPERIMENT.config == digits.EXPERIMENT.config
    assert EXPERIMENT.methods == ("nonlinear", "nonlinear-fixed", "nonlinear-frozen")


def test_fixed_trains_with_what_the_first_seed_learned(tmp_path):
    with pytest.raises(RunError, match="takes phi from nonlinear"):
        _run("nonlinear-fixed", 1, tmp_path)
    learned = [_run("nonlinear", seed, tmp_path) for seed in (0, 1)]
    fixed, frozen = _run("nonlinear-fixed", 1, tmp_path), _run("nonlinear-frozen", 1, tmp_path)
    first, second, fixed_phi, frozen_phi = (restore(EXPERIMENT, run)[1].phi for run in (*learned, fixed, frozen))
    assert torch.equal(fixed_phi, first)
    assert not torch.equal(fixed_phi, second)
    assert not torch.equal(frozen_phi, second)


def test_findings_are_the_paired_differences():
    runs = [
        *runs_of("nonlinear", [90, 92, 91, 91, 91]),
        *runs_of("nonlinear-fixed", [85, 86, 87, 86, 86]),
        *unfinished("nonlinear-frozen"),
    ]
    against_fixed, against_frozen, fixed_against_frozen = findings(runs)
    assert against_fixed.holds is True
    assert "+5.0 +- 0.3, paired over 5 seeds" in against_fixed.text
    assert against_frozen.holds is None
    assert fixed_against_frozen.holds is None


def test_the_picture_shows_what_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    draw(tmp_path / "none.png", unfinished("nonlinear"))
    assert not (tmp_path / "none.png").exists()
    weights = [(1.0, 0.5), (1.2, 0.4)]
    runs = [*runs_of("nonlinear", [90, 92], weights=weights), *runs_of("nonlinear-fixed", [88], weights=weights)]
    draw(tmp_path / "some.png", runs)
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")
