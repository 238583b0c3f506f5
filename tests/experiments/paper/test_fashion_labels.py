import pytest
import torch

from auxfast.experiments.base import run_config, train_run
from auxfast.experiments.data.files import DatasetError
from auxfast.experiments.paper.fashion_labels import (
    EXPERIMENT,
    SETTINGS,
    FashionLabelsOptions,
    draw,
    findings,
    make_task,
)
from auxfast.experiments.paper.label_task import labelled_images
from auxfast.train.methods import parse_method

from ..data.fixtures import write_fashion_mnist
from .handmade import runs_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_fashion_mnist(tmp_path_factory.mktemp("fashion-mnist")))


def _task(folder, setting="30-shot, ConvNet", hold_out=True):
    options = run_config(EXPERIMENT, setting, {"task.folder": folder}).task
    return make_task(1, options, hold_out=hold_out)


def test_parts_are_disjoint_stratified_and_of_the_official_split(folder):
    task = _task(folder)
    assert torch.bincount(task.labels[task.training]).tolist() == [28] * 10
    assert torch.bincount(task.labels[task.auxiliary]).tolist() == [2] * 10
    assert task.test.tolist() == list(range(60_000, 70_000))
    parts = torch.cat([task.training, task.auxiliary, task.validation])
    assert len(parts.unique()) == len(parts)
    assert parts.max() < 60_000
    assert len(_task(folder, hold_out=False).training) == 300


@pytest.mark.parametrize("network", ["ConvNet", "ResNet-8"])
def test_student_and_teacher_have_one_architecture_and_a_hundred_thousand_weights_at_most(network, folder):
    task = _task(folder, f"30-shot, {network}")
    batch = task.training_batch(torch.Generator().manual_seed(0))
    assert batch.losses.shape == batch.mask.shape == (32, 2)
    assert batch.auxiliary_logits.shape == (32, 50)
    assert batch.inputs.shape == (32, 1, 14, 14)
    shapes = [parameter.shape for parameter in task.model.backbone.parameters()]
    assert [parameter.shape for parameter in task.label_generator.backbone[0].parameters()] == shapes
    assert sum(shape.numel() for shape in shapes) < 100_000


def test_options_out_of_range_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="network: got 'vgg', must be 'convnet' or 'resnet8'"):
        FashionLabelsOptions(network="vgg")
    with pytest.raises(ValueError, match="shots: got 6000, must be from 2 to 5980"):
        FashionLabelsOptions(shots=6000)
    with pytest.raises(ValueError, match="auxiliary_shots: got 60, must be from 1 to 59"):
        FashionLabelsOptions(auxiliary_shots=60)
    with pytest.raises(DatasetError, match="dataset-fashion-mnist"):
        make_task(0, FashionLabelsOptions(folder=str(tmp_path)), hold_out=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", EXPERIMENT.methods)
def test_each_method_takes_two_outer_steps_and_learned_labels_can_be_drawn(method, folder, tmp_path):
    changes = {"task.folder": folder, "train.outer_steps": 2, "train.inner_steps": 1, "train.cooldown": 0.0}
    run = train_run(EXPERIMENT, "30-shot, ConvNet", parse_method(method), 0, tmp_path, overrides=changes)
    assert run.result.score >= 0
    learned = {"maxl", "auxilearn-labels"}
    assert [record.outer_loss is not None for record in run.records] == [method in learned] * 2
    if method == "auxilearn-labels":
        pytest.importorskip("sklearn")
        pytest.importorskip("matplotlib")
        draw(tmp_path / "labels.svg", [run])
        assert "<svg" in (tmp_path / "labels.svg").read_text()


def test_images_of_a_class_have_its_own_five_labels(folder):
    own = labelled_images(_task(folder), 8, "bag", 14)
    assert own.images.shape == (1000, 14, 14)
    torch.testing.assert_close(own.soft_labels.sum(dim=1), torch.ones(1000))


def test_findings_are_of_the_settings_that_were_run():
    setting = next(iter(SETTINGS))
    against_stl, *_ = findings([*runs_of("auxilearn-labels", [79] * 5, setting), *runs_of("stl", [78] * 5, setting)])
    assert "1%, ConvNet: +1.0" in against_stl.text
    assert against_stl.holds
