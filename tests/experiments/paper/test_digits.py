from dataclasses import replace

import pytest
import torch

from auxfast.experiments.base import train_run
from auxfast.experiments.data import load_digits
from auxfast.experiments.paper.digits import (
    EXPERIMENT,
    FLIPS,
    LABELLED_BATCH,
    DigitsOptions,
    findings,
    make_task,
)
from auxfast.experiments.paper.missing_labels import EXPERIMENT as MISSING_LABELS
from auxfast.experiments.paper.split_task import UNKNOWN
from auxfast.train.methods import parse_method
from auxfast.train.training_loss import make_training_loss, mean_losses
from auxfast.weighting import make_weighting

from .handmade import runs_of

pytest.importorskip("sklearn")


def _task(seed=1, **options):
    return make_task(seed, DigitsOptions(**options), hold_out=True)


def test_digits_are_ten_shot_with_one_auxiliary_shot_a_class():
    task = _task()
    assert torch.bincount(task.labels[task.training]).tolist() == [9] * 10
    assert torch.bincount(task.labels[task.auxiliary]).tolist() == [1] * 10
    assert (len(task.validation), len(task.test)) == (90, 600)
    for part in (task.validation, task.test):
        counts = torch.bincount(task.labels[part], minlength=10)
        assert (counts - len(part) / 10).abs().max() <= 5  # stratified


def test_shots_are_those_of_the_options():
    task = _task(shots=20, auxiliary_shots=2, unlabelled=30)
    assert torch.bincount(task.labels[task.training]).tolist() == [18] * 10
    assert torch.bincount(task.labels[task.auxiliary]).tolist() == [2] * 10
    assert len(task.unlabelled) == 30


def test_a_large_auxiliary_set_is_warned_of():
    with pytest.warns(UserWarning, match=r"20 of 100 main labels \(20%\)"):
        _task(auxiliary_shots=2)


def test_a_scan_without_main_label_has_that_loss_masked_and_its_label_hidden():
    task = _task()
    assert (task.labels[task.unlabelled] == UNKNOWN).all()
    losses, mask = task.training_batch(torch.Generator().manual_seed(0))
    assert mask[:, 0].tolist() == [1] * LABELLED_BATCH + [0] * (len(losses) - LABELLED_BATCH)
    assert (mask[:, 1:] == 1).all()
    assert (losses[LABELLED_BATCH:, 0] == 0).all()


def test_attributes_are_wrong_as_often_as_their_name_says():
    task = _task()
    wrong = (task.attributes != load_digits().attributes()).float().mean(dim=0)
    torch.testing.assert_close(wrong, FLIPS, atol=0.04, rtol=0)


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_unknown_attributes_are_masked_and_hidden(share):
    task = _task(unknown_attributes=share)
    assert (1 - task.known).mean().item() == pytest.approx(share, abs=0.02)
    assert (task.attributes[task.known == 0] == 0).all()
    losses, mask = task.training_batch(torch.Generator().manual_seed(0))
    assert torch.isfinite(losses).all()
    assert (1 - mask[:, 1:]).mean().item() == pytest.approx(share, abs=0.1)
    whole = _task(unknown_attributes=0.0)  # nothing else is drawn differently
    assert torch.equal(whole.training, task.training)
    assert torch.equal(whole.attributes * task.known, task.attributes)


@pytest.mark.parametrize("method", ["equal", "nonlinear"])
def test_what_an_unknown_attribute_holds_changes_nothing(method, tmp_path):
    """The losses behind the mask, of any value, neither train the model nor move the combiner."""

    def make_task_with(filling):
        def make(seed, options, *, hold_out):
            task = make_task(seed, options, hold_out=hold_out)
            task.attributes = torch.where(task.known == 0, filling, task.attributes)
            return task

        return make

    changes = {"train.outer_steps": 2, "train.inner_steps": 2}
    runs = [
        train_run(
            replace(MISSING_LABELS, make_task=make_task_with(filling)),
            "50% unknown",
            parse_method(method),
            0,
            tmp_path / str(filling),
            overrides=changes,
        )
        for filling in (0.0, 1.0)
    ]
    assert runs[0].records[-1].training_loss == runs[1].records[-1].training_loss
    assert runs[0].records[-1].loss_weights == runs[1].records[-1].loss_weights


def test_findings_compare_seed_by_seed():
    scores = {"stl": [88, 87, 88, 87, 88], "equal": [92, 91, 92, 91, 92], "nonlinear": [92, 91.1, 92, 91.1, 92]}
    runs = [run for method, own in scores.items() for run in runs_of(method, own)]
    helps, learned, than_equal, than_frozen = findings(runs)
    assert [f.holds for f in (helps, learned, than_equal, than_frozen)] == [True, True, False, None]
    assert helps.text.startswith("Equal (one common weight) scores above STL")


def test_gradient_methods_compare_the_losses_in_the_layer_that_they_share():
    task = make_task(0, DigitsOptions(), hold_out=False)
    loss = make_training_loss(parse_method("mgda"), EXPERIMENT.config, task)
    batch = task.training_batch(torch.Generator().manual_seed(0))
    loss(*batch)
    means = mean_losses(*batch)
    in_shared = make_weighting("mgda", len(task.loss_names))(means, list(task.shared_parameters()))
    torch.testing.assert_close(torch.tensor(loss.mean_weights(batch)), in_shared)
    in_all = make_weighting("mgda", len(task.loss_names))(means, list(task.model.parameters()))
    assert (in_all - in_shared).abs().max() > 1e-3
    assert {id(p) for p in task.shared_parameters()} == {id(task.model[0].weight), id(task.model[0].bias)}
