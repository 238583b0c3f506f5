from __future__ import annotations

import math

import pytest
import torch

from auxfast.experiments.base import train_run
from auxfast.experiments.data.files import DatasetError
from auxfast.experiments.data.scenes import UNKNOWN
from auxfast.experiments.paper.cityscapes import EXPERIMENT, CityscapesOptions, make_task
from auxfast.train.methods import parse_method
from experiments.data.fixtures_scenes import write_cityscapes

SMALL = {"widths": (4, 4, 4, 4, 4), "batch_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_cityscapes(tmp_path_factory.mktemp("cityscapes"), train=12, val=2, height=32, width=32))


def test_losses_are_three_segmentations_and_the_depth_and_known_where_their_targets_are(folder):
    task = make_task(0, CityscapesOptions(folder, **SMALL), hold_out=True)
    assert task.loss_names == EXPERIMENT.loss_names == ("19 classes", "7 classes", "2 classes", "depth")
    losses, mask = task.training_batch(torch.Generator().manual_seed(0))
    assert losses.shape == mask.shape == (4, 4, 32, 32)
    rows = task.test
    losses, mask = task.losses(rows)
    *labels, depths = task.read(rows, torch.zeros(2, dtype=torch.bool)).targets
    for j, (own, classes) in enumerate(zip(labels, (19, 7, 2), strict=True)):
        assert own.max() == classes - 1
        assert torch.equal(mask[:, j].bool(), own != UNKNOWN)
    assert torch.equal(mask[:, 3].bool(), depths[:, 0] != 0)
    assert (losses[~mask.bool()] == 0).all()
    assert [len(head[-1].weight) for head in task.model.heads] == [19, 7, 2, 1]


def test_the_main_task_needs_labels_of_19_classes(tmp_path):
    folder = write_cityscapes(tmp_path / "coarse", train=3, val=1, height=32, width=32, labels={"label_7": 7})
    with pytest.raises(DatasetError, match=r"coarse: labels of at most 7 classes, expected those of 19"):
        make_task(0, CityscapesOptions(str(folder), **SMALL), hold_out=True)


def test_training_lasts_150_epochs_of_the_papers_split():
    validation = int(0.1 * 2975)
    auxiliary = int(0.025 * (2975 - validation))
    epoch = math.ceil((2975 - validation - auxiliary) / 8)
    train = EXPERIMENT.config.train
    assert 0 <= train.outer_steps * train.inner_steps - 150 * epoch < train.inner_steps
    assert train.inner_scheduler.options["step_size"] == 100 * epoch


@pytest.mark.slow
def test_two_epochs_train_end_to_end(folder, tmp_path):
    changes = {f"task.{name}": value for name, value in SMALL.items()}
    changes |= {"task.folder": folder, "train.outer_steps": 2, "train.inner_steps": 3}
    for method in ("equal", "linear", "conv"):
        run = train_run(EXPERIMENT, "", parse_method(method), 0, tmp_path, overrides=changes)
        assert 0 <= run.result.score <= 100
        assert len(run.records[-1].loss_weights) == 4
