from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from auxfast.train.experiments import diabetes, digits, stereo
from auxfast.train.experiments.base import IMAGE_METHODS, METHODS, as_function, main_loss, make_combiner, run_method

pytest.importorskip("sklearn")

EXPERIMENTS = (diabetes.EXPERIMENT, digits.EXPERIMENT, stereo.EXPERIMENT)
needs_skimage = pytest.mark.skipif(find_spec("skimage") is None, reason="needs scikit-image")


def _case(experiment, *others):
    marks = [needs_skimage] if experiment is stereo.EXPERIMENT else []
    return pytest.param(experiment, *others, marks=marks, id="-".join(case.name for case in (experiment, *others)))


each_experiment = pytest.mark.parametrize("experiment", [_case(experiment) for experiment in EXPERIMENTS])
each_method = pytest.mark.parametrize(
    ("experiment", "method"), [_case(experiment, method) for experiment in EXPERIMENTS for method in experiment.methods]
)


def _short(experiment, outer_steps):
    return replace(experiment, config=replace(experiment.config, outer_steps=outer_steps, inner_steps=3))


def _rows(task):
    unlabelled = getattr(task, "unlabelled", torch.tensor([], dtype=torch.int64))
    return task.training, unlabelled, task.auxiliary, task.test


@each_experiment
def test_with_the_auxiliary_set_held_out_all_parts_are_disjoint(experiment):
    together = torch.cat(_rows(experiment.make_task(3, hold_out=True)))
    assert len(together.unique()) == len(together)


@each_experiment
def test_without_an_auxiliary_set_its_samples_are_trained_on_and_the_rest_is_the_same(experiment):
    held = experiment.make_task(3, hold_out=True)
    spent = experiment.make_task(3, hold_out=False)
    assert torch.equal(spent.training, torch.cat([held.training, held.auxiliary]))
    assert torch.equal(spent.test, held.test)
    assert len(held.auxiliary) <= 0.1 * len(spent.training)
    for one, other in zip(spent.model.parameters(), held.model.parameters(), strict=True):
        assert torch.equal(one, other)


@each_experiment
def test_losses_are_as_named_and_scores_are_percentages(experiment):
    task = experiment.make_task(0, hold_out=True)
    losses, mask = task.training_batch(torch.Generator().manual_seed(0))
    assert losses.shape[1] == len(experiment.loss_names) == len(task.loss_names)
    assert mask is None or mask.shape == losses.shape
    assert (losses >= 0).all()
    assert task.outer_loss().shape == ()
    assert task.score() <= 100


def test_digits_are_ten_shot_with_one_auxiliary_shot_a_class():
    task = digits.EXPERIMENT.make_task(1, hold_out=True)
    assert torch.bincount(task.labels[task.training]).tolist() == [9] * 10
    assert torch.bincount(task.labels[task.auxiliary]).tolist() == [1] * 10
    counts = torch.bincount(task.labels[task.test], minlength=10)
    assert (counts - len(task.test) / 10).abs().max() <= 5  # stratified


def test_a_scan_without_main_label_has_that_loss_masked_and_its_label_hidden():
    task = digits.EXPERIMENT.make_task(1, hold_out=True)
    assert (task.labels[task.unlabelled] == digits.UNKNOWN).all()
    losses, mask = task.training_batch(torch.Generator().manual_seed(0))
    labelled = digits.LABELLED_BATCH
    assert mask[:, 0].tolist() == [1] * labelled + [0] * (len(losses) - labelled)
    assert (mask[:, 1:] == 1).all()
    assert (losses[labelled:, 0] == 0).all()


def test_attributes_are_wrong_as_often_as_their_name_says():
    task = digits.EXPERIMENT.make_task(1, hold_out=True)
    wrong = (task.attributes != digits.load_digits().attributes()).float().mean(dim=0)
    torch.testing.assert_close(wrong, digits.FLIPS, atol=0.04, rtol=0)


def test_diabetes_labels_are_what_their_names_say():
    task = diabetes.EXPERIMENT.make_task(2, hold_out=True)
    related = torch.corrcoef(torch.cat([task.target[:, None], task.labels], dim=1).T)[0, 1:]
    main, helpful, harmful, shuffled = related.tolist()
    assert 0.3 < main < 0.65  # 1 / sqrt(1 + 2^2), and a little for the labels given with care
    assert helpful > 0.8
    assert harmful < -0.8
    assert abs(shuffled) < 0.2
    torch.testing.assert_close(task.labels[task.auxiliary, 0], task.target[task.auxiliary])  # with care
    training = task.features[task.training]
    torch.testing.assert_close(training.mean(dim=0), torch.zeros(10), atol=1e-5, rtol=0)


def test_single_task_learning_is_a_linear_combiner_with_no_weight_on_auxiliaries():
    losses, mask = torch.rand(6, 9), torch.ones(6, 9)
    mask[3:, 0] = 0
    equal = next(method for method in METHODS if method.name == "equal")
    combiner = make_combiner(replace(digits.EXPERIMENT, equal_weight=0.0), equal, 0)
    for given in (mask, None):
        torch.testing.assert_close(main_loss(losses, given), combiner(losses, given))


@each_method
def test_a_run_depends_on_its_seed_and_nothing_else(experiment, method):
    short = _short(experiment, 2)
    first = run_method(short, method, 0)
    torch.manual_seed(1234)
    torch.rand(5)
    again, other = run_method(short, method, 0), run_method(short, method, 1)
    assert again.score == first.score
    assert again.records == first.records
    assert other.records != first.records
    assert len(first.records) == 2
    assert (first.records[0].residual is not None) == method.learned


@each_experiment
def test_frozen_combiners_stay_and_learned_ones_move(experiment):
    short = _short(experiment, 4)
    weights = {m.name: [r.loss_weights for r in run_method(short, m, 0).records] for m in experiment.methods}
    assert weights["linear-frozen"][0] == pytest.approx(weights["linear-frozen"][-1])
    assert weights["linear"][0] == pytest.approx(weights["linear-frozen"][0])
    assert weights["linear"][-1] != pytest.approx(weights["linear"][0], abs=1e-4)
    last = experiment.methods[-1].name
    assert weights[last][0] == pytest.approx(weights[f"{last}-frozen"][0])
    assert weights[last][-1] != pytest.approx(weights[f"{last}-frozen"][-1], abs=1e-4)


# --------------------------------------------------------------------------------------------------- losses of pixels


def test_combiners_start_with_the_auxiliaries_weight_they_are_told():
    for method in IMAGE_METHODS[2:]:
        combiner = make_combiner(replace(stereo.EXPERIMENT, initial_weight=0.3), method, 0)
        losses = torch.ones(1, 2, 64, 64, requires_grad=True)
        (weights,) = torch.autograd.grad(as_function(combiner)(losses, None), losses)
        assert weights[:, 1].sum().item() == pytest.approx(0.3, rel=1e-4)
        assert weights[:, 0].sum().item() >= 1


def test_a_combiner_of_samples_takes_pixels_for_samples():
    losses, mask = torch.rand(2, 2, 3, 4), torch.rand(2, 2, 3, 4) > 0.3
    linear = make_combiner(stereo.EXPERIMENT, IMAGE_METHODS[1], 0)
    expected = (losses * mask)[:, 0].mean() + stereo.EXPERIMENT.equal_weight * (losses * mask)[:, 1].mean()
    torch.testing.assert_close(as_function(linear)(losses, mask), expected)
    torch.testing.assert_close(as_function(None)(losses, mask), (losses * mask)[:, 0].mean())


@needs_skimage
def test_tiles_without_labels_and_pixels_without_disparity_are_masked():
    task = stereo.EXPERIMENT.make_task(1, hold_out=True)
    assert (task.labels[task.unlabelled] == stereo.UNKNOWN).all()
    losses, mask = task.training_batch(torch.Generator().manual_seed(0))
    assert losses.shape == mask.shape == (2 * stereo.BATCH, 2, stereo.TILE, stereo.TILE)
    assert not mask[stereo.BATCH :, 0].any()
    assert mask[: stereo.BATCH, 0].float().mean() > 0.5
    assert 0.8 < mask[:, 1].float().mean() < 1
    seen = torch.cat([task.training, task.unlabelled])
    known = task.disparity[seen][task.valid[seen]]
    torch.testing.assert_close(torch.stack([known.mean(), known.std()]), torch.tensor([0.0, 1.0]), atol=1e-4, rtol=0)


@needs_skimage
def test_the_score_is_the_mean_intersection_over_union():
    task = stereo.EXPERIMENT.make_task(1, hold_out=True)
    labels = task.labels[task.test]
    known = labels != stereo.UNKNOWN
    with torch.no_grad():
        for parameter in task.model[-1].parameters():
            parameter.zero_()
        task.model[-1].bias[0] = 1.0  # every pixel is grey
    share = (labels[known] == 0).float().mean().item()
    assert task.score() == pytest.approx(100 * share / 3, rel=1e-5)
