"""Fashion-MNIST with self-supervised auxiliaries: what is drawn, what is hidden, and that every method trains."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from auxfast.experiments.base import run_config, train_run
from auxfast.experiments.data.files import DatasetError
from auxfast.experiments.paper.fashion_selfsupervised import (
    EXPERIMENT,
    HOLE,
    LABELLED_BATCH,
    ORDERS,
    SIDE,
    UNLABELLED_BATCH,
    SelfSupervisedOptions,
    draw_views,
    findings,
    make_task,
    nt_xent,
)
from auxfast.experiments.paper.split_task import UNKNOWN
from auxfast.train.methods import parse_method
from tests.experiments.data.fixtures import write_fashion_mnist

from .handmade import runs_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_fashion_mnist(tmp_path_factory.mktemp("fashion-mnist")))


@pytest.fixture
def options(folder):
    return SelfSupervisedOptions(folder)


def _images(count):
    return torch.randn(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


def _views(images, seed=0):
    return draw_views(images, torch.Generator().manual_seed(seed))


def _quadrants(image):
    return sorted(q.flatten().tolist() for half in image.squeeze(0).chunk(2, dim=0) for q in half.chunk(2, dim=1))


def test_each_setting_has_its_share_of_labels_and_a_tenth_of_them_is_the_auxiliary_set(folder):
    for setting, labelled in (("1%", 600), ("5%", 3000)):
        config = run_config(EXPERIMENT, setting, {"task.folder": folder})
        task = make_task(3, config.task, hold_out=True)
        parts = (task.training, task.auxiliary, task.unlabelled, task.validation, task.test)
        sizes = [labelled * 9 // 10, labelled // 10, 59_500 - labelled, 500, 10_000]
        assert [len(part) for part in parts] == sizes
        assert len(torch.cat(parts).unique()) == 70_000
        assert torch.equal(task.test, torch.arange(60_000, 70_000))  # the official test part
        for part in (task.training, task.auxiliary, task.validation):
            counts = torch.bincount(task.labels[part], minlength=10)
            assert (counts - len(part) / 10).abs().max() <= 2


def test_without_an_auxiliary_set_its_images_are_trained_on_and_the_rest_is_the_same(options):
    held, spent = (make_task(3, options, hold_out=hold_out) for hold_out in (True, False))
    assert torch.equal(spent.training, torch.cat([held.training, held.auxiliary]))
    assert torch.equal(spent.unlabelled, held.unlabelled)
    assert torch.equal(spent.validation, held.validation)


def test_an_unlabelled_image_has_its_main_loss_masked_and_its_label_hidden(options):
    task = make_task(0, options, hold_out=True)
    assert (task.labels[task.unlabelled] == UNKNOWN).all()
    assert (task.labels[torch.cat([task.training, task.auxiliary])] != UNKNOWN).all()
    losses, mask = task.training_batch(torch.Generator().manual_seed(0))
    assert losses.shape == mask.shape == (LABELLED_BATCH + UNLABELLED_BATCH, 5)
    assert mask[:, 0].tolist() == [1] * LABELLED_BATCH + [0] * UNLABELLED_BATCH
    assert (mask[:, 1:] == 1).all()
    assert (losses[LABELLED_BATCH:, 0] == 0).all()
    assert (losses >= 0).all()


def test_a_batch_depends_on_its_generator_and_leaves_the_random_state_of_torch(options):
    task, before = make_task(0, options, hold_out=True), torch.get_rng_state()
    first = task.training_batch(torch.Generator().manual_seed(1)).losses
    assert torch.equal(task.training_batch(torch.Generator().manual_seed(1)).losses, first)
    assert not torch.equal(task.training_batch(torch.Generator().manual_seed(2)).losses, first)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_is_turned_by_the_angle_that_is_asked_for():
    images = _images(20)
    views = _views(images)
    assert views.turns.unique().tolist() == [0, 1, 2, 3]
    for image, turned, turns in zip(images, views.images[2], views.turns, strict=True):
        assert torch.equal(turned, image.rot90(int(turns), (1, 2)))


def test_quadrants_are_those_of_the_image_and_every_order_is_another_image():
    (image,) = _images(1)
    assert len({tuple(row) for row in image.flatten()[ORDERS].tolist()}) == len(ORDERS) == 24
    views = _views(image.expand(50, 1, SIDE, SIDE))
    assert len(views.orders.unique()) > 10
    for disordered, order in zip(views.images[3], views.orders, strict=True):
        assert _quadrants(disordered) == _quadrants(image)
        assert torch.equal(disordered.flatten(), image.flatten()[ORDERS[order]])


def test_a_hole_is_a_square_and_the_rest_of_the_view_is_whole():
    views = _views(_images(20))
    masked, inside = views.images[1].flatten(1), views.holes == 1
    assert (views.holes.sum(dim=1) == HOLE**2).all()
    assert (masked[inside] == 0).all()
    assert torch.equal(masked[~inside], views.whole[~inside])
    for hole in views.holes.view(-1, SIDE, SIDE):
        assert (hole.amax(dim=0).sum(), hole.amax(dim=1).sum()) == (HOLE, HOLE)


def test_augmented_views_are_moved_by_a_pixel_at_most_mirrored_and_of_another_contrast():
    images = _images(10)
    views = _views(images)
    assert not torch.equal(views.images[0].flatten(1), views.whole)
    for augmented in (views.images[0], views.whole.view_as(images)):
        for image, view in zip(images, augmented, strict=True):
            padded = F.pad(image, [1] * 4, mode="replicate")
            moved = [padded[:, i : i + SIDE, j : j + SIDE] for i in range(3) for j in range(3)]
            ratios = torch.stack([view / other for one in moved for other in (one, one.flip(2))]).flatten(1)
            closest = ratios[ratios.std(dim=1).argmin()]
            torch.testing.assert_close(closest, closest[:1].expand_as(closest))
            assert 0.6 <= closest[0] <= 1.4


def test_nt_xent_is_equation_1_of_its_paper():
    generator, temperature = torch.Generator().manual_seed(0), 0.3
    first, second = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    both = torch.cat([first, second])

    def similarity(i, k):
        return F.cosine_similarity(both[i], both[k], dim=0).item() / temperature

    def loss(i, j):
        others = [math.exp(similarity(i, k)) for k in range(10) if k != i]
        return -math.log(math.exp(similarity(i, j)) / sum(others))

    slow = torch.tensor([(loss(i, i + 5) + loss(i + 5, i)) / 2 for i in range(5)], dtype=torch.float64)
    torch.testing.assert_close(nt_xent(first, second, temperature), slow)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labelled": 0.0}, "labelled: got 0.0, must be from 0.001 to 0.5"),
        ({"labelled": float("nan")}, "labelled: got nan, must be from 0.001 to 0.5"),
        ({"auxiliary": 0.6}, "auxiliary: got 0.6, must be from 0.01 to 0.5"),
    ],
)
def test_options_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SelfSupervisedOptions(), **changes)


def test_the_fewest_labels_make_a_task(folder):
    task = make_task(0, SelfSupervisedOptions(folder, labelled=0.001, auxiliary=0.1), hold_out=True)
    assert (len(task.training), len(task.auxiliary)) == (54, 6)
    assert torch.isfinite(task.outer_loss())


def test_a_folder_without_the_data_is_named_and_so_is_the_way_to_get_them(tmp_path):
    with pytest.raises(DatasetError, match=f"{tmp_path}.*dataset-fashion-mnist"):
        make_task(0, SelfSupervisedOptions(str(tmp_path)), hold_out=True)


def test_findings_are_of_auxiliaries_at_all_and_of_learned_weights():
    scores = {"stl": [70, 71, 70, 71, 70], "equal": [75, 76, 75, 76, 75.1], "linear": [75, 76, 75.2, 75.9, 75]}
    runs = [run for method, own in scores.items() for run in runs_of(method, own, "1%")]
    found = {finding.text.partition(": the difference")[0]: finding.holds for finding in findings(runs)}
    assert found == {
        "1%: Equal (one common weight) scores above STL (main loss only)": True,
        "1%: Linear, learned scores above STL (main loss only)": True,
        "1%: Linear, learned scores above Equal (one common weight)": False,
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", EXPERIMENT.methods)
def test_every_method_trains(method, folder, tmp_path):
    short = {"train.outer_steps": 2, "train.inner_steps": 2, "task.folder": folder}
    run = train_run(EXPERIMENT, "1%", parse_method(method), 0, tmp_path, overrides=short)
    assert 0 <= run.result.score <= 100
    assert len(run.records) == 2
    assert all(weight >= 0 for weight in run.records[-1].loss_weights)
    assert (run.records[-1].residual is not None) == parse_method(method).learned
