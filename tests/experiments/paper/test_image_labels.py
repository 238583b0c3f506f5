"""Learned labels of images: the paper's splits, and two epochs of each experiment on tiny copies of its data."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from train.problems import without_seconds

from auxfast.cli import main
from auxfast.experiments.base import run_config, train_run
from auxfast.experiments.data.image_data import ImageData
from auxfast.experiments.paper import image_labels
from auxfast.train import LabelBatch, parse_method
from experiments.data.fixtures import write_cars, write_cifar10, write_cifar100, write_pets, write_svhn
from experiments.data.fixtures_scenes import write_cub
from experiments.paper.handmade import runs_of

EXPERIMENTS = {experiment.name: experiment for experiment in image_labels.EXPERIMENTS}
METHODS = ("stl", "maxl", "auxilearn-labels")
# Two outer steps are two epochs at least: no copy has more than 64 images to train on.
SMALL = {"task.width": 2, "task.batch_size": 16, "train.outer_steps": 2, "train.inner_steps": 4, "train.patience": 2}
PHOTOGRAPHS = {"task.crop": 32, "task.auxiliary": 0.2}
COPIES = {
    "cifar10-labels": (partial(write_cifar10, count_per_class=8), {"task.share": 0.5, "task.validation": 0.25}),
    "cifar100-labels": (write_cifar100, {"task.share": 0.5, "task.validation": 0.5}),
    "svhn-labels": (partial(write_svhn, count_per_class=8), {"task.share": 0.5, "task.validation": 0.25}),
    "cub-labels": (partial(write_cub, train=4, test=2), PHOTOGRAPHS),
    "pet-labels": (partial(write_pets, count_per_class=4, classes=3), {**PHOTOGRAPHS, "task.shots": 2}),
    "cars-labels": (partial(write_cars, count_per_class=4, classes=3), PHOTOGRAPHS),
}
pytestmark = pytest.mark.filterwarnings("ignore:the auxiliary set takes:UserWarning")


@pytest.fixture(scope="module")
def copy_of(tmp_path_factory):
    """The changes of an experiment's configuration by which it takes a tiny copy of its data."""
    pytest.importorskip("scipy")
    pytest.importorskip("PIL")
    made = {}

    def changes(name):
        if name not in made:
            write, options = COPIES[name]
            made[name] = {"task.folder": str(write(tmp_path_factory.mktemp(name))), **SMALL, **options}
        return made[name]

    return changes


def _task(name, changes, setting=None, seed=0, hold_out=True):
    experiment = EXPERIMENTS[name]
    config = run_config(experiment, setting or next(iter(experiment.settings)), changes)
    return experiment.make_task(seed, config.task, hold_out=hold_out)


def _made_up(training, test, classes, monkeypatch):
    """Lets the experiments find a set of so many photographs, which nobody looks at."""
    labels = torch.arange(training + test) % classes
    is_test = torch.arange(training + test) >= training
    data = ImageData(torch.empty(0), labels, is_test, tuple(map(str, range(classes))))
    monkeypatch.setattr(image_labels, "load_copy", lambda name, folder: data)


@pytest.mark.parametrize(
    ("name", "setting", "official", "parts"),
    [  # training, auxiliary, validation, test; appendix B.3 has the sizes of validation and test parts
        ("cub-labels", "30-shot", (5994, 5794, 200), (5893, 101, 2897, 2897)),
        ("cub-labels", "15-shot", (5994, 5794, 200), (2950, 50, 2897, 2897)),
        ("pet-labels", "30-shot", (3680, 3669, 37), (1091, 19, 1104, 3669)),
        ("pet-labels", "15-shot", (3680, 3669, 37), (546, 9, 1104, 3669)),
        ("cars-labels", "30-shot", (8144, 8041, 196), (5604, 96, 2444, 8041)),
    ],
)
def test_photographs_are_split_as_in_the_paper(name, setting, official, parts, monkeypatch):
    _made_up(*official, monkeypatch)
    task = _task(name, {"task.width": 1}, setting)
    assert tuple(map(len, (task.training, task.auxiliary, task.validation, task.test))) == parts


def test_parts_are_disjoint_and_stratified_and_of_their_official_sides(copy_of):
    task = _task("cifar10-labels", {**copy_of("cifar10-labels"), "task.auxiliary": 0.25})
    data = image_labels.load_copy("cifar10", copy_of("cifar10-labels")["task.folder"])
    for rows, count, in_test in (
        (task.training, 3, False),
        (task.auxiliary, 1, False),
        (task.validation, 2, False),
        (task.test, 2, True),
    ):
        assert data.labels[rows].bincount().tolist() == [count] * 10
        assert set(data.is_test[rows].tolist()) == {in_test}
    rows = torch.cat(list(task.split_indices().values()))
    assert len(rows.unique()) == len(rows)
    everyone = _task("cifar10-labels", {**copy_of("cifar10-labels"), "task.auxiliary": 0.25}, hold_out=False)
    assert set(everyone.training.tolist()) == {*task.training.tolist(), *task.auxiliary.tolist()}


def test_a_seed_draws_the_same_task_and_the_same_augmented_batches(copy_of):
    batches = []
    for seed in (0, 0, 1):
        task = _task("svhn-labels", copy_of("svhn-labels"), seed=seed)
        batches.append(task.training_batch(torch.Generator().manual_seed(5)))
    first, again, other = batches
    assert isinstance(first, LabelBatch)
    assert first.auxiliary_logits.shape == (16, 50)
    assert first.inputs.shape == (16, 3, 32, 32)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first.inputs, other.inputs)


def test_epochs_become_steps_of_the_trainer():
    train = run_config(EXPERIMENTS["cifar10-labels"], "5%").train  # 200 epochs of 2,500 images in batches of 100
    assert (train.outer_steps * train.inner_steps, train.patience) == (5_000, train.outer_steps)
    assert train.inner_scheduler.options == {"T_max": 5_000}
    train = run_config(EXPERIMENTS["pet-labels"], "15-shot").train  # 150 epochs of 555 images in batches of 16
    assert (train.inner_steps, train.outer_steps) == (30, 175)


def test_a_missing_copy_is_told_with_where_to_get_one(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "cifar10-labels", "--setting", "5%"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("auxfast: data/cifar10: no such folder")
    for part in (
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "--set task.folder=PATH",
        "auxfast data check cifar10 PATH",
    ):
        assert part in told


def test_options_out_of_range_are_named():
    options = run_config(EXPERIMENTS["cars-labels"], "30-shot").task
    for name, value in {"share": 0.0, "auxiliary": 0.6, "validation": 0.0, "batch_size": 1, "crop": 0}.items():
        with pytest.raises(ValueError, match=f"{name}: got {value}, must be from"):
            replace(options, **{name: value})


def test_learned_labels_are_held_against_the_controls_that_were_run():
    scores = {"stl": [1.0] * 5, "maxl": [3.0] * 5, "auxilearn-labels": [2.0, 2.1, 2.2, 2.1, 2.0]}
    runs = [run for method, own in scores.items() for run in runs_of(method, own, "5%")]
    against_stl, against_maxl = EXPERIMENTS["svhn-labels"].findings(runs)
    assert (against_stl.holds, against_maxl.holds) == (True, False)
    assert against_maxl.text.startswith("5%: AuxiLearn labels, learned scores above MAXL: the difference is -0.9")


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_two_epochs_end_to_end(name, copy_of, tmp_path):
    experiment = EXPERIMENTS[name]
    for method in METHODS if name != "svhn-labels" else experiment.methods:
        run = train_run(
            experiment, next(iter(experiment.settings)), parse_method(method), 0, tmp_path, overrides=copy_of(name)
        )
        assert run.result.outer_steps == 2
        assert 0 <= run.result.score <= 100
        assert (run.path / "split.npz").exists()


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on_with_the_same_augmented_batches(copy_of, tmp_path):
    experiment, method = EXPERIMENTS["svhn-labels"], parse_method("auxilearn-labels")
    changes = {**copy_of("svhn-labels"), "train.checkpoint_every": 1}

    def interrupt(record):
        raise KeyboardInterrupt

    whole = train_run(experiment, "5%", method, 0, tmp_path / "whole", overrides=changes)
    with pytest.raises(KeyboardInterrupt):
        train_run(experiment, "5%", method, 0, tmp_path / "cut", overrides=changes, on_outer_step=interrupt)
    resumed = train_run(experiment, "5%", method, 0, tmp_path / "cut", overrides=changes, resume=True)
    assert without_seconds(resumed.records) == without_seconds(whole.records)
    assert resumed.result.score == whole.result.score
