from __future__ import annotations

import pytest
import torch

from auxfast.experiments.base import train_run
from auxfast.experiments.data.shapenet_part import CATEGORIES, PARTS
from auxfast.experiments.paper.point_clouds import normalised, voxels
from auxfast.experiments.paper.shapenet_part import (
    LEARNED,
    PRETEXT,
    LearnedOptions,
    PretextOptions,
    make_learned_task,
    make_pretext_task,
)
from auxfast.train.methods import parse_method
from auxfast.train.task import LabelBatch
from experiments.data.fixtures_scenes import write_shapenet_part

SHAPES = {"shots": 3, "auxiliary_shots": 1, "points": 24, "batch_size": 6}
SMALL = {**SHAPES, "neighbours": 4, "width": 4, "embedding": 8}
# The fixture has three shapes a category, of which the auxiliary set cannot be a small share.
pytestmark = pytest.mark.filterwarnings("ignore:the auxiliary set takes:UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_shapenet_part(tmp_path_factory.mktemp("shapenet"), train=5, val=2, test=1, points=40))


def _learned(folder, seed=0, hold_out=True, **changes):
    return make_learned_task(seed, LearnedOptions(folder, **{**SMALL, **changes}), hold_out=hold_out)


def _pretext(folder, name, seed=0):
    return make_pretext_task(seed, PretextOptions(folder, **SMALL, pretext=name), hold_out=False)


def _categories(task, rows):
    return task.data.categories[rows].bincount(minlength=16).tolist()


def test_each_category_has_its_shots_and_the_auxiliary_set_its_share_of_them(folder):
    task = _learned(folder)
    assert _categories(task, task.training) == [2] * 16
    assert _categories(task, task.auxiliary) == [1] * 16
    assert _categories(task, task.validation) == [2] * 16
    assert torch.equal(task.test, task.data.test)
    parts = torch.cat([task.training, task.auxiliary, task.validation, task.test])
    assert len(parts.unique()) == len(parts)
    assert _categories(_learned(folder, hold_out=False), _learned(folder, hold_out=False).training) == [3] * 16
    assert _categories(task, _learned(folder, validation=0.5).validation) == [1] * 16


def test_both_experiments_draw_the_same_splits(folder):
    learned, pretext = _learned(folder, seed=4, hold_out=False), _pretext(folder, "rs", seed=4)
    for name in ("training", "auxiliary", "validation", "test", "auxiliary_points"):
        assert torch.equal(getattr(learned, name), getattr(pretext, name))


def test_a_batch_for_learned_labels_has_losses_of_points_and_the_shapes_categories(folder):
    task = _learned(folder)
    batch = task.training_batch(torch.Generator().manual_seed(0))
    assert isinstance(batch, LabelBatch)
    assert batch.losses.shape == batch.mask.shape == (6, 2, 24)
    assert batch.mask[:, 0].all()
    assert not batch.mask[:, 1].any()
    assert batch.auxiliary_logits.shape == (6, 96, 24)
    assert batch.inputs.shape == (6, 3, 24)
    soft_labels = task.label_generator(batch.inputs, batch.labels)
    for own, category in zip(soft_labels, batch.labels.tolist(), strict=True):
        torch.testing.assert_close(own[6 * category : 6 * category + 6].sum(dim=0), torch.ones(24))


def test_a_batch_draws_points_of_training_shapes_with_their_parts(folder):
    task = _learned(folder)
    points, parts, categories = task.draw(torch.Generator().manual_seed(1))
    for cloud, own, category in zip(points, parts, categories.tolist(), strict=True):
        assert set(own.tolist()) <= set(PARTS[CATEGORIES[category]])
        found = []
        for row in task.training.tolist():
            shape = task.data.shape(row)
            places = torch.cdist(cloud.T, normalised(shape.points)).min(dim=1)
            if places.values.max() < 1e-3:
                found.append(row)
                assert len(places.indices.unique()) == 24
                assert torch.equal(shape.parts[places.indices], own)
        assert len(found) == 1


def test_the_outer_loss_is_of_the_auxiliary_shapes_and_the_same_at_each_call(folder):
    task = _learned(folder)
    assert task.auxiliary_points.shape == (16, 3, 24)
    task.model.eval()
    logits = task.model(task.auxiliary_points)[:, :50]
    expected = torch.nn.functional.cross_entropy(logits, task.auxiliary_parts)
    assert task.outer_loss().item() == task.outer_loss().item() == pytest.approx(expected.item())


def test_scores_choose_among_the_parts_of_the_known_category_and_see_all_points(folder):
    task = _learned(folder)
    by_shape = {}
    task.model.eval()
    for row in task.test.tolist():
        shape, category = task.data.shape(row), CATEGORIES[int(task.data.categories[row])]
        with torch.no_grad():
            logits = task.model(normalised(shape.points).T[None])[0]
        ratios = []
        allowed = list(PARTS[category])
        guesses = [max(allowed, key=lambda part: logits[part, i].item()) for i in range(len(shape.parts))]
        for part in allowed:
            both = sum(g == t == part for g, t in zip(guesses, shape.parts.tolist(), strict=True))
            either = sum(part in (g, t) for g, t in zip(guesses, shape.parts.tolist(), strict=True))
            ratios.append(both / either if either else 1)
        by_shape[category] = 100 * sum(ratios) / len(ratios)
    task.model.train()
    assert task.score() == pytest.approx(sum(by_shape.values()) / 16)
    further = task.further_scores()
    assert further.pop("mean of categories") == pytest.approx(sum(by_shape.values()) / 16)
    assert further == pytest.approx(by_shape)
    assert task.model.training


@pytest.mark.parametrize("name", ["dae", "defrec", "rs"])
def test_a_batch_with_a_pretext_task_has_its_loss_beside_that_of_the_parts(folder, name):
    task = _pretext(folder, name)
    losses, mask = task.training_batch(torch.Generator().manual_seed(0))
    assert losses.shape == (6, 2, 24)
    assert mask is None
    assert (losses >= 0).all()
    assert losses[:, 1].mean() > 0
    points, _, _ = task.draw(torch.Generator().manual_seed(0))
    if name == "defrec":  # the loss is 0 outside of one voxel
        for own, loss in zip(voxels(points), losses[:, 1], strict=True):
            assert len(own[loss > 0].unique()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shots": 1}, "shots: got 1"),
        ({"auxiliary_shots": 30}, "auxiliary_shots: got 30, must be from 1 to 29"),
        ({"points": 19}, "points: got 19, must be from 20"),
        ({"validation": 1.1}, "validation: got 1.1"),
    ],
)
def test_options_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LearnedOptions(**change)


def test_training_lasts_150_epochs_of_the_papers_480_shapes():
    train = LEARNED.config.train
    assert (train.outer_steps, train.inner_steps) == (150, (480 - 2 * 16) // 32)
    assert train.inner_scheduler.options["T_max"] == 150 * 14


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "setting", "method"),
    [
        *((LEARNED, "", name) for name in ("stl", "maxl", "auxilearn-labels-frozen", "auxilearn-labels")),
        *((PRETEXT, name, "equal") for name in PRETEXT.settings),
        (PRETEXT, "rs", "linear"),
    ],
)
def test_two_epochs_train_end_to_end(folder, tmp_path, experiment, setting, method):
    changes = {f"task.{name}": value for name, value in SMALL.items()}
    changes |= {"task.folder": folder, "train.outer_steps": 2, "train.inner_steps": 3, "task.batch_size": 16}
    run = train_run(experiment, setting, parse_method(method), 0, tmp_path, overrides=changes)
    assert run.losses == experiment.loss_names
    assert 0 <= run.result.score <= 100
    assert set(run.result.further_scores) == {"mean of categories", *CATEGORIES}
    assert (run.records[-1].outer_loss is not None) == parse_method(method).learned
