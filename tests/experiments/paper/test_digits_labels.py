from pathlib import Path

import pytest
import torch

from auxfast.experiments.base import train_run
from auxfast.experiments.paper.digits_labels import EXPERIMENT, SETTINGS, DigitsLabelsOptions, draw, make_task
from auxfast.train.methods import parse_method

from .handmade import runs_of, unfinished

pytest.importorskip("sklearn")


def _task(hold_out=True, **options):
    return make_task(1, DigitsLabelsOptions(**options), hold_out=hold_out)


def test_parts_are_disjoint_and_the_digit_itself_is_in_no_label():
    task = _task()
    parts = [task.training, task.auxiliary, task.validation, task.test]
    assert [len(part) for part in parts] == [90, 10, 90, 1000]
    assert len(torch.cat(parts).unique()) == 1190
    assert task.labels.unique().tolist() == [0, 1]
    assert torch.bincount(task.labels[task.auxiliary]).tolist() == [5, 5]
    assert torch.equal(_task(hold_out=False).training[-10:], task.auxiliary)


def test_a_scan_has_five_soft_labels_those_of_its_own_class():
    task = _task()
    soft_labels = task.soft_labels(task.test[:40])
    of_class = soft_labels.view(40, 2, 5).sum(dim=2)
    torch.testing.assert_close(of_class, torch.eye(2)[task.labels[task.test[:40]]])


@pytest.mark.parametrize(
    ("options", "message"), [({"shots": 500}, "shots: got 500"), ({"auxiliary_shots": 50}, "auxiliary_shots: got 50")]
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DigitsLabelsOptions(**options)


@pytest.mark.slow
def test_the_picture_is_of_the_learned_labels_and_needs_some(tmp_path):
    pytest.importorskip("matplotlib")
    changes = {"train.outer_steps": 2, "train.inner_steps": 1, "train.cooldown": 0.0}
    setting = next(iter(SETTINGS))
    run = train_run(EXPERIMENT, setting, parse_method("auxilearn-labels"), 0, tmp_path, overrides=changes)
    nothing, picture = tmp_path / "none.svg", tmp_path / "one.svg"
    draw(nothing, [*runs_of("stl", [88], setting), *unfinished("auxilearn-labels", setting)])
    assert not nothing.exists()
    draw(picture, [run])
    assert "<svg" in picture.read_text()


def test_the_picture_of_the_documentation_is_small():
    picture = Path(__file__).resolve().parents[3] / "docs" / "pictures" / "labels.svg"
    assert "<svg" in picture.read_text()
    assert picture.stat().st_size < 60_000


def test_findings_compare_learned_labels_with_what_was_run():
    setting = "no entropy term"
    (against_stl,) = EXPERIMENT.findings(
        [*runs_of("auxilearn-labels", [87] * 5, setting), *runs_of("stl", [88] * 5, setting)]
    )
    assert against_stl.text.startswith("no entropy term: ")
    assert against_stl.holds is False
