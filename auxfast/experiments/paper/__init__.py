"""The shipped experiments, by name."""

from __future__ import annotations

from auxfast.experiments.base import Experiment
from auxfast.experiments.paper import (
    cityscapes,
    cub_attributes,
    deep_supervision,
    diabetes,
    digits,
    digits_labels,
    fashion_attributes,
    fashion_labels,
    fashion_selfsupervised,
    fixed_auxiliary,
    illustrative,
    image_labels,
    missing_labels,
    noisy_auxiliaries,
    nyuv2,
    polynomial_kernel,
    sensitivity,
    shapenet_part,
    stereo,
    weight_decay,
)

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        illustrative.EXPERIMENT,
        noisy_auxiliaries.EXPERIMENT,
        polynomial_kernel.EXPERIMENT,
        fixed_auxiliary.EXPERIMENT,
        diabetes.EXPERIMENT,
        digits.EXPERIMENT,
        digits_labels.EXPERIMENT,
        missing_labels.EXPERIMENT,
        sensitivity.SIZE,
        sensitivity.DEPTH,
        deep_supervision.EXPERIMENT,
        stereo.EXPERIMENT,
        weight_decay.EXPERIMENT,
        fashion_attributes.EXPERIMENT,
        fashion_labels.EXPERIMENT,
        fashion_selfsupervised.EXPERIMENT,
        nyuv2.EXPERIMENT,
        cityscapes.EXPERIMENT,
        shapenet_part.LEARNED,
        shapenet_part.PRETEXT,
        cub_attributes.EXPERIMENT,
        *image_labels.EXPERIMENTS,
    )
}
