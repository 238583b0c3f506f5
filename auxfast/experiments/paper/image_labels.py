"""Learned auxiliary labels for image classification from few labels: the paper's Tables 3, 8 and 9 (section 5.4, B.3).

A teacher divides each class into five auxiliary classes, as soft labels; the student learns to tell these apart beside
the main task, and the teacher follows the hypergradient of the main loss on the auxiliary set. Both have the same
architecture, and neither is pretrained: VGG-16 for CIFAR-10 and CIFAR-100, a 4-layer ConvNet for SVHN, and ResNet-18
for the fine-grained sets of photographs, CUB-200-2011, Oxford-IIIT Pet and Cars.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from auxfast.experiments.base import Axis, Experiment
from auxfast.experiments.data import allocate_auxiliary, draw_per_class, split
from auxfast.experiments.data.catalogue import load_copy
from auxfast.experiments.data.image_data import ImageData
from auxfast.experiments.models import VGG16, ConvNet, ResNet18, TwoHeads
from auxfast.experiments.models.heads import make_head
from auxfast.experiments.paper.label_task import METHODS, LabelTask, findings
from auxfast.experiments.paper.options import PaperCombiner, PaperTraining, check_range, training_length
from auxfast.experiments.paper.preparation import (
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    Preparation,
    channel_statistics,
)
from auxfast.nn import LabelGenerator
from auxfast.solvers import Identity
from auxfast.train.config import Component, LabelsConfig, RunConfig

AUXILIARY_CLASSES = 5  # of each main class (section 5.4)
_FEWEST_AUXILIARY = 2  # BatchNorm cannot be trained on one image
_ALL = 0  # as many labelled images a class as there are


@dataclass(frozen=True)
class ImageLabelsOptions:
    """Options of these experiments.

    folder: where the copy of the data set is.
    share: share of the official training part whose labels are known, drawn after the validation part was.
    shots: number of labelled images a class; 0: as many as `share` leaves.
    validation: share of the part that validation images are taken from.
    validation_from: which of the two official parts that is.
    auxiliary: share of the labelled images that is the auxiliary set; two images at least.
    batch_size: images in a training batch.
    crop: height and width of the networks' inputs, in pixels.
    width: channels of the networks' first block.
    """

    folder: str
    share: float = 1.0
    shots: int = _ALL
    validation: float = 0.3
    validation_from: Literal["training", "test"] = "training"
    auxiliary: float = 0.025
    batch_size: int = 64
    crop: int = 224
    width: int = 64

    def __post_init__(self) -> None:
        check_range("share", self.share, 1e-6, 1)
        check_range("shots", self.shots, _ALL, 1e6)
        check_range("validation", self.validation, 1e-6, 0.9)
        check_range("auxiliary", self.auxiliary, 1e-6, 0.5)
        check_range("batch_size", self.batch_size, 2, 1e6)
        check_range("crop", self.crop, 1, 1e4)
        check_range("width", self.width, 1, 1e4)


@dataclass(frozen=True)
class _ImageSet:
    """The part of an experiment that its data set decides.

    name: its name in the catalogue.
    network: makes the backbone of student and teacher.
    hidden: units of a hidden layer in each head; None for linear heads.
    padding, flip: see `Preparation`.
    is_photographs: whether ImageNet's channel statistics are taken, and not those of the labelled images.
    """

    name: str
    network: Callable[..., Any]
    hidden: int | None = None
    padding: int = 0
    flip: bool = True
    is_photographs: bool = False


def make_task(images: _ImageSet, seed: int, options: ImageLabelsOptions, *, hold_out: bool) -> LabelTask:
    """The task that `seed` draws: the split, all parts of it stratified, and the first weights (see `MakeTask`)."""
    data: ImageData = load_copy(images.name, options.folder)
    generator = torch.Generator().manual_seed(seed)
    labelled, validation, test = _split(data, options, generator)
    count = max(_FEWEST_AUXILIARY, round(options.auxiliary * len(labelled)))
    training, auxiliary = allocate_auxiliary(labelled, count, generator, data.labels[labelled], hold_out=hold_out)
    if images.is_photographs:
        mean, deviation = IMAGENET_MEAN, IMAGENET_DEVIATION
    else:
        mean, deviation = channel_statistics(data.images, labelled)
    classes = len(data.class_names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        of_student, of_teacher = images.network(width=options.width), images.network(width=options.width)
        features, invented = of_student.num_features, AUXILIARY_CLASSES * classes
        student = TwoHeads(of_student, features, classes, invented, images.hidden)
        teacher = nn.Sequential(of_teacher, make_head(features, invented, images.hidden))
    return LabelTask(
        images=data.images,
        labels=data.labels,
        num_classes=classes,
        label_generator=LabelGenerator(teacher, hierarchy=[AUXILIARY_CLASSES] * classes),
        batch_size=options.batch_size,
        prepare=Preparation(mean, deviation, options.crop, images.padding, images.flip),
        training=training,
        auxiliary=auxiliary,
        validation=validation,
        test=test,
        model=student,
    )


def _split(data: ImageData, options: ImageLabelsOptions, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Labelled, validation and test images."""
    official = {"training": torch.nonzero(~data.is_test).squeeze(1), "test": torch.nonzero(data.is_test).squeeze(1)}
    source = official[options.validation_from]
    count = math.ceil(options.validation * len(source))
    validation, official[options.validation_from] = split(
        source, (count, len(source) - count), generator, data.labels[source]
    )
    labelled = official["training"]
    known = round(options.share * int((~data.is_test).sum()))
    if known < len(labelled):
        (labelled,) = split(labelled, (known,), generator, data.labels[labelled])
    if options.shots != _ALL:
        labelled = labelled[draw_per_class(data.labels[labelled], options.shots, generator)[0]]
    return labelled, validation, official["test"]


def _small_images(
    name: str,
    images: _ImageSet,
    title: str,
    lr: float,
    epochs: int,
    settings: Mapping[str, tuple[float, int]],
    validation: float,
) -> Experiment:
    """An experiment on images of 32 x 32 pixels.

    settings: for each, the share of labelled images and their number in the official training part.
    """
    batch_size, inner_steps = 100, 25
    lengths = {setting: training_length(epochs, n, batch_size, inner_steps) for setting, (_, n) in settings.items()}
    return Experiment(
        name=name,
        make_task=partial(make_task, images),
        title=f"{title}: learned auxiliary labels",
        about=_about(title),
        score_name="accuracy, %",
        loss_names=LabelTask.loss_names,
        config=RunConfig(
            train=PaperTraining(
                inner_optimizer=Component("SGD", {"lr": lr, "momentum": 0.9}),
                weight_decay=5e-4,
                **_OUTER_LOOP,
            ),
            labels=_LABELS,
            task=ImageLabelsOptions(f"data/{images.name}", validation=validation, batch_size=batch_size, crop=32),
        ),
        methods=METHODS,
        settings={
            setting: {
                "task.share": share,
                **_prefixed(lengths[setting]),
                "train.inner_scheduler": Component(
                    "CosineAnnealingLR", {"T_max": lengths[setting]["outer_steps"] * inner_steps}
                ),
            }
            for setting, (share, _) in settings.items()
        },
        grid=(
            *_LABEL_AXES,
            Axis("train.inner_steps", (5, 15, 25), ("auxilearn-labels",)),
            Axis("task.auxiliary", (0.015, 0.025), ("auxilearn-labels",)),
        ),
        package=("scipy", "scipy") if images.name == "svhn" else None,
        findings=findings,
    )


def _photographs(
    name: str,
    images: _ImageSet,
    title: str,
    settings: Mapping[str, tuple[int, int]],
    inner_steps: tuple[int, int],
    batch_size: int,
    **split_options: Any,
) -> Experiment:
    """An experiment on a fine-grained set.

    settings: for each, `shots`, and the number of labelled images. inner_steps: those of the grid, of which the first
    is the default.
    """
    return Experiment(
        name=name,
        make_task=partial(make_task, images),
        title=f"{title}: learned auxiliary labels",
        about=_about(title),
        score_name="accuracy, %",
        loss_names=LabelTask.loss_names,
        config=RunConfig(
            train=PaperTraining(
                inner_optimizer=Component("Adam", {"lr": 1e-4}),
                weight_decay=5e-3,
                **_OUTER_LOOP,
            ),
            combiner=PaperCombiner(hidden=(10, 10)),
            labels=replace(_LABELS, combiner="nonlinear"),
            task=ImageLabelsOptions(f"data/{images.name}", batch_size=batch_size, auxiliary=0.0168, **split_options),
        ),
        methods=METHODS,
        settings={
            setting: {"task.shots": shots, **_prefixed(training_length(150, count, batch_size, inner_steps[0]))}
            for setting, (shots, count) in settings.items()
        },
        grid=(
            *_LABEL_AXES,
            Axis("train.inner_steps", inner_steps, ("auxilearn-labels",)),
            Axis("task.auxiliary", (0.00084, 0.0168, 0.0333), ("auxilearn-labels",)),
            Axis("combiner.hidden", ((10, 10), (10, 10, 10)), ("auxilearn-labels",)),
        ),
        package=("PIL.Image", "pillow"),
        findings=findings,
    )


def _about(title: str) -> str:
    return (
        f"Of which class is an image of {title}? Few are labelled. A teacher divides each class into five auxiliary "
        "ones, and the student learns to tell these apart beside the main task. The teacher is trained so that this "
        "helps the main task on a few labelled images that are set apart."
    )


def _prefixed(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of `TrainConfig` by their keys in a configuration."""
    return {f"train.{name}": value for name, value in entries.items()}


# Appendix B trains auxiliary networks by SGD with momentum, where it names an optimizer. With small learning rates and
# the few terms of the authors' code, Algorithm 2 multiplies the gradient of the main loss by the number of its terms,
# and hardly turns it: the identity stands for it, without that factor. The limit on the norm is that of their code.
_OUTER_LOOP: dict[str, Any] = {
    "outer_optimizer": Component("SGD", {"lr": 1e-2, "momentum": 0.9}),
    "solver": Identity(),
    "max_outer_grad_norm": 10.0,
}
_LABELS = LabelsConfig(lr=1e-3, weight_decay=1e-4, entropy_weight=0.4)
_LABEL_AXES = (
    Axis("labels.lr", (1e-3, 5e-4), ("maxl", "auxilearn-labels")),
    Axis("labels.weight_decay", (5e-4, 1e-4, 5e-5), ("maxl", "auxilearn-labels")),
    Axis("labels.entropy_weight", (0.2, 0.4, 0.6), ("maxl",)),
)

# Without a search, the middle of each grid is taken, but for the inner steps: the fewer there are, the more time goes
# into validation. The paper does not say the batch size of CIFAR and SVHN, nor how many images validate there: 100 and
# some 2,000 are ours. Its "30-shot" of CUB and Cars are all images of the training part, some 30 a class (B.3).
CIFAR10 = _small_images(
    "cifar10-labels",
    _ImageSet("cifar10", VGG16, padding=4),
    "CIFAR-10",
    lr=0.1,
    epochs=200,
    settings={"5%": (0.05, 2_500), "10%": (0.1, 5_000), "15%": (0.15, 7_500), "100%": (1.0, 48_000)},
    validation=0.04,
)
CIFAR100 = _small_images(
    "cifar100-labels",
    _ImageSet("cifar100", VGG16, padding=4),
    "CIFAR-100",
    lr=0.01,
    epochs=200,
    settings={"5%": (0.05, 2_500)},
    validation=0.04,
)
SVHN = _small_images(
    "svhn-labels",
    _ImageSet("svhn", ConvNet, padding=4, flip=False),
    "SVHN",
    lr=0.1,
    epochs=50,
    settings={"5%": (0.05, 3_663)},
    validation=0.03,
)
_Photographs = partial(_ImageSet, network=ResNet18, hidden=512, is_photographs=True)
CUB = _photographs(
    "cub-labels",
    _Photographs("cub"),
    "CUB-200-2011",
    {"30-shot": (_ALL, 5_994), "15-shot": (15, 3_000)},
    inner_steps=(40, 80),
    batch_size=64,
    validation=0.5,
    validation_from="test",
)
PETS = _photographs(
    "pet-labels",
    _Photographs("pets"),
    "Oxford-IIIT Pet",
    {"30-shot": (30, 1_110), "15-shot": (15, 555)},
    inner_steps=(30, 60),
    batch_size=16,
)
CARS = _photographs(
    "cars-labels", _Photographs("cars"), "Cars", {"30-shot": (_ALL, 5_700)}, inner_steps=(40, 80), batch_size=64
)
EXPERIMENTS = (CIFAR10, CIFAR100, SVHN, CUB, PETS, CARS)
