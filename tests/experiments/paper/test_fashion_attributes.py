"""Fashion-MNIST and its attributes: the split, who has which loss, and two outer steps of each method."""

import pytest
import torch
import torch.nn.functional as F

from auxfast.experiments.base import run_config, train_run
from auxfast.experiments.data.fashion_mnist import FASHION_ATTRIBUTES, fashion_attributes
from auxfast.experiments.data.files import DatasetError
from auxfast.experiments.paper.fashion_attributes import (
    EXPERIMENT,
    FLIPS,
    LABELLED_BATCH,
    SIDE,
    UNLABELLED_BATCH,
    VALIDATION,
    FashionAttributesOptions,
    displaced,
    findings,
    make_task,
)
from auxfast.experiments.paper.split_task import UNKNOWN
from auxfast.train import parse_method
from experiments.data.fixtures import write_fashion_mnist

from .handmade import runs_of

pytestmark = pytest.mark.filterwarnings("ignore:the auxiliary set takes:UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_fashion_mnist(tmp_path_factory.mktemp("fashion-mnist")))


def _task(folder, setting="10-shot", seed=1, hold_out=True, **options):
    changes = {"task.folder": folder, **{f"task.{name}": value for name, value in options.items()}}
    return make_task(seed, run_config(EXPERIMENT, setting, changes).task, hold_out=hold_out)


@pytest.mark.parametrize(("setting", "shots"), [("5-shot", 5), ("10-shot", 10)])
def test_main_labels_are_as_many_a_class_as_the_setting_says_and_all_parts_are_disjoint(folder, setting, shots):
    task = _task(folder, setting)
    labelled = torch.cat([task.training, task.auxiliary])
    assert torch.bincount(task.labels[labelled]).tolist() == [shots] * 10
    assert torch.bincount(task.labels[task.auxiliary]).max() == 1
    assert (len(task.unlabelled), len(task.validation)) == (2000, VALIDATION)
    together = torch.cat(list(task.split_indices().values()))
    assert len(together.unique()) == len(together)
    assert task.test.tolist() == list(range(60_000, 70_000))  # the official test part


def test_without_an_auxiliary_set_its_images_are_trained_on_and_the_rest_is_the_same(folder):
    held, spent = _task(folder), _task(folder, hold_out=False)
    assert torch.equal(spent.training, torch.cat([held.training, held.auxiliary]))
    for name in ("unlabelled", "validation", "labels", "attributes"):
        assert torch.equal(getattr(spent, name), getattr(held, name))
    for one, other in zip(spent.model.parameters(), held.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(_task(folder, seed=2).training, held.training)


def test_an_image_without_main_label_has_that_loss_masked_and_its_label_hidden(folder):
    task = _task(folder)
    assert (task.labels[task.unlabelled] == UNKNOWN).all()
    losses, mask = task.training_batch(torch.Generator().manual_seed(0))
    assert losses.shape == mask.shape == (LABELLED_BATCH + UNLABELLED_BATCH, len(EXPERIMENT.loss_names))
    assert mask[:, 0].tolist() == [1] * LABELLED_BATCH + [0] * UNLABELLED_BATCH
    assert (losses[LABELLED_BATCH:, 0] == 0).all()
    assert (mask[:, 1:] == 1).all()


def test_attributes_are_wrong_as_often_as_their_name_says_and_unknown_of_the_test_part(folder):
    task = _task(folder)
    official = torch.arange(60_000) % 10  # the labels of the copy; its pictures are black, and have no attributes
    given = torch.cat([fashion_attributes(official), torch.zeros(60_000, 6)], dim=1)
    wrong = (task.attributes[:60_000] != given).float().mean(dim=0)
    torch.testing.assert_close(wrong, FLIPS, atol=0.01, rtol=0)
    assert not task.attributes[60_000:].any()
    for name, loss, share in zip(FASHION_ATTRIBUTES, EXPERIMENT.loss_names[1:], wrong.tolist(), strict=False):
        assert loss.startswith(f"{name}, ")
        assert share == pytest.approx(float(loss.split()[-2].rstrip("%")) / 100, abs=0.01)


def test_gradient_methods_compare_the_losses_in_the_layers_that_they_share(folder):
    task = _task(folder)
    shared = {id(parameter) for parameter in task.shared_parameters()}
    alone = [id(parameter) for parameter in task.model.parameters() if id(parameter) not in shared]
    assert alone == [id(task.model[-1].weight), id(task.model[-1].bias)]


def test_scores_are_percentages_of_the_part_that_their_name_says(folder):
    task = _task(folder)
    with torch.no_grad():
        for parameter in task.model[-1].parameters():
            parameter.zero_()
        task.model[-1].bias[3] = 1.0  # every image is a dress
    assert task.score() == pytest.approx(10.0)
    task.validation = task.validation[task.labels[task.validation] == 3]
    assert task.validation_score() == 100


def test_displaced_images_are_moved_by_a_pixel_and_mirrored():
    image = torch.zeros(1, SIDE, SIDE)
    image[0, 5, 4] = 1
    found = {tuple(copy.nonzero()[0].tolist()) for copy in displaced(image)[:, 0]}
    moves = [(y, x) for y in (4, 5, 6) for x in (3, 4, 5)]
    assert found == {*moves, *((y, SIDE - 1 - x) for y, x in moves)}


def test_the_outer_loss_is_the_mean_over_displaced_auxiliary_images(folder):
    task = _task(folder, auxiliary=3)
    task.images = torch.rand_like(task.images[: task.auxiliary.max() + 1])
    images, labels = task.images[task.auxiliary].view(3, SIDE, SIDE), task.labels[task.auxiliary]
    alone = [F.cross_entropy(task.model(copy.flatten(1))[:, :10], labels) for copy in displaced(images)]
    torch.testing.assert_close(task.outer_loss(), torch.stack(alone).mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": 1}, "shots: got 1, must be from 2 to 1000"),
        ({"shots": 5, "auxiliary": 50}, "auxiliary: got 50, must be from 1 to 49"),
        ({"auxiliary": 0}, "auxiliary: got 0, must be from 1 to 99"),
        ({"unlabelled": 59_401}, "unlabelled: got 59401, must be from 0 to 59400"),
    ],
)
def test_options_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FashionAttributesOptions(**changes)


def test_options_at_the_ends_of_their_ranges_make_tasks(folder):
    for options in ({"shots": 2, "auxiliary": 1, "unlabelled": 0}, {"shots": 10, "unlabelled": 59_400}):
        batch = _task(folder, **options).training_batch(torch.Generator().manual_seed(0))
        assert torch.isfinite(batch.losses).all()


def test_where_the_data_are_missing_the_error_says_how_to_get_them(tmp_path):
    with pytest.raises(DatasetError, match=r"no such file.*Debian's package dataset-fashion-mnist"):
        make_task(0, FashionAttributesOptions(folder=str(tmp_path)), hold_out=True)


def test_findings_compare_the_methods_and_settings_that_were_run():
    scores = {"stl": [60, 61, 60, 61, 60], "equal": [64, 65, 64, 65, 64], "linear": [66, 67.1, 66, 67.1, 66]}
    runs = [run for method, own in scores.items() for run in runs_of(method, own, "5-shot")]
    found = findings(runs)
    assert [finding.holds for finding in found] == [True, True, True]
    assert "5-shot" in found[0].text
    assert "10-shot" not in found[0].text


@pytest.mark.slow
@pytest.mark.parametrize("method", EXPERIMENT.methods)
def test_two_outer_steps_of_each_method_from_end_to_end(folder, method, tmp_path):
    changes = {"task.folder": folder, "train.outer_steps": 2, "train.inner_steps": 1, "train.cooldown": 0.0}
    run = train_run(EXPERIMENT, "5-shot", parse_method(method), 0, tmp_path, overrides=changes)
    assert 0 <= run.result.score <= 100
    assert len(run.records) == 2
    assert (run.records[-1].residual is not None) == parse_method(method).learned
