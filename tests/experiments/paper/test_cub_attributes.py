"""CUB's species and attributes: the paper's split, who has which loss, and two epochs on a tiny copy."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from auxfast.experiments.base import run_config, train_run
from auxfast.experiments.data.files import DatasetError
from auxfast.experiments.data.image_data import ImageData
from auxfast.experiments.paper import cub_attributes
from auxfast.experiments.paper.cub_attributes import EXPERIMENT, CubOptions, make_task
from auxfast.experiments.paper.split_task import UNKNOWN
from auxfast.train import parse_method
from experiments.data.fixtures_scenes import write_cub

pytestmark = pytest.mark.filterwarnings("ignore:the auxiliary set takes:UserWarning")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    pytest.importorskip("PIL")
    folder = str(write_cub(tmp_path_factory.mktemp("cub"), train=4, test=4))
    return partial(CubOptions, folder, weights="", shots=2, auxiliary=3, batch_size=8, crop=32, width=2)


@pytest.mark.parametrize(
    ("setting", "sizes"),
    [("5-shot", (980, 4994)), ("10-shot", (1980, 3994)), ("full", (5974, 0))],  # training with and without main label
)
def test_the_split_is_the_paper_s(setting, sizes, monkeypatch):
    count = 5994 + 5794
    labels, is_test = torch.arange(count) % 200, torch.arange(count) >= 5994
    names = tuple(map(str, range(200)))
    data = ImageData(torch.empty(0), labels, is_test, names, torch.zeros(count, 312), ("attribute",) * 312)
    monkeypatch.setattr(cub_attributes, "load_copy", lambda name, folder: data)
    config = run_config(EXPERIMENT, setting, {"task.weights": "", "task.width": 1})
    task = make_task(0, config.task, hold_out=True)
    assert (len(task.training), len(task.unlabelled)) == sizes
    assert tuple(map(len, (task.auxiliary, task.validation, task.test))) == (20, 2897, 2897)
    assert len(labels[task.auxiliary].unique()) == 20
    rows = torch.cat(list(task.split_indices().values()))
    assert len(rows.unique()) == len(rows) == count


def test_all_of_a_batch_have_attributes_and_half_a_main_loss(options):
    task = make_task(0, options(), hold_out=False)
    task.model.eval()
    losses, mask = task.training_batch(torch.Generator().manual_seed(0))
    assert losses.shape == mask.shape == (8, 313)
    assert mask[:, 0].tolist() == [1.0] * 4 + [0.0] * 4
    assert bool((mask[:, 1:] == 1).all())
    assert losses[4:, 0].tolist() == [0.0] * 4  # what the mask hides is not there either
    assert set(task.labels[task.unlabelled].tolist()) == {UNKNOWN}


def test_attributes_losses_are_scaled(options):
    plain, scaled = (
        make_task(0, options(scale=scale), hold_out=False).training_batch(torch.Generator().manual_seed(0)).losses
        for scale in (1.0, 0.1)
    )
    torch.testing.assert_close(scaled[:, 1:], 0.1 * plain[:, 1:])
    torch.testing.assert_close(scaled[:, 0], plain[:, 0])


def test_with_all_labels_every_sample_has_all_losses(options):
    task = make_task(0, options(shots=0), hold_out=True)
    batch = task.training_batch(torch.Generator().manual_seed(0))
    assert bool((batch.mask == 1).all())
    assert torch.equal(task.labels, cub_attributes.load_copy("cub", options().folder).labels)


def test_scores_are_top_1_and_top_3_of_the_middle_of_the_images(options):
    task = make_task(0, options(), hold_out=True)
    assert task.further_scores() == {"top-3 accuracy, %": 100.0}  # there are three species
    task.model.eval()
    logits = task.model(task.inputs(task.test))[:, :3]
    assert task.score() == pytest.approx(100 * (logits.argmax(dim=1) == task.labels[task.test]).double().mean().item())


def test_the_shared_parameters_are_reached_by_every_loss(options):
    task = make_task(0, options(), hold_out=True)
    batch = task.training_batch(torch.Generator().manual_seed(0))
    shared = list(task.shared_parameters())
    for loss in batch.losses.mean(dim=0)[[0, 1, 312]]:
        assert all(bool(grad.any()) for grad in torch.autograd.grad(loss, shared, retain_graph=True))


def test_the_outer_loss_is_the_main_loss_on_the_auxiliary_set(options):
    task = make_task(0, options(), hold_out=True)
    task.model.eval()
    logits = task.model(task.inputs(task.auxiliary))[:, :3]
    torch.testing.assert_close(task.outer_loss(), F.cross_entropy(logits, task.labels[task.auxiliary]))


def test_weights_that_are_not_there_are_told_with_where_to_get_them(options, tmp_path):
    lost = str(tmp_path / "resnet18.pth")
    with pytest.raises(DatasetError, match=r"resnet18\.pth: no such file, .* https://download\.pytorch\.org/models/"):
        make_task(0, options(weights=lost, width=64), hold_out=True)
    with pytest.raises(ValueError, match="width: got 32, must be 64 with weights"):
        CubOptions(weights=lost, width=32)


@pytest.mark.slow
def test_two_epochs_end_to_end(options, tmp_path):
    small = options()
    changes = {f"task.{name}": getattr(small, name) for name in CubOptions.__dataclass_fields__}
    changes |= {"train.outer_steps": 2, "train.inner_steps": 2, "train.patience": 2}  # four batches: two epochs
    for method in ("stl", "equal", "uncertainty", "dwa", "gradnorm", "gcs", "linear", "deep-linear", "nonlinear-free"):
        run = train_run(EXPERIMENT, "5-shot", parse_method(method), 0, tmp_path, overrides=changes)
        assert run.result.outer_steps == 2
        assert run.result.score <= run.result.further_scores["top-3 accuracy, %"] == 100
