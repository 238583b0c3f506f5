"""The suite's tasks: five shipped experiments with their own inner training, and three that are made for it."""

from __future__ import annotations

from dataclasses import replace

from auxfast.experiments.paper import deep_supervision, diabetes, digits, noisy_auxiliaries, stereo
from auxfast.train.config import Component
from benchmarks.learning import breast_cancer, cnn, wine
from benchmarks.learning.defaults import untuned

# Their own inner learning rates are for weights of 0.1 and 0.3: at 1, training without any outer loop can diverge.
_STEREO = untuned(stereo.EXPERIMENT, outer_steps=25, inner_optimizer=Component("SGD", {"lr": 0.03, "momentum": 0.9}))
_DEEP_SUPERVISION = untuned(
    deep_supervision.EXPERIMENT, inner_optimizer=Component("SGD", {"lr": 0.02, "momentum": 0.9})
)
# A hundred auxiliaries at weight 1 would leave the main loss a hundredth of the training loss. The last setting has
# few and noisy main labels: there the auxiliaries can help; in the others, a main loss alone is best.
_NOISY = replace(
    untuned(noisy_auxiliaries.EXPERIMENT, weight=0.1),
    settings={
        "as in the paper": {},
        "noisier auxiliaries": {"task.auxiliary_noise": 0.5},
        "few and noisy main labels": {"task.labelled": 60, "task.auxiliary": 12, "task.main_noise": 3.0},
    },
)

TASKS = {
    experiment.name: experiment
    for experiment in (
        untuned(diabetes.EXPERIMENT),
        untuned(digits.EXPERIMENT),
        _STEREO,
        cnn.EXPERIMENT,
        breast_cancer.EXPERIMENT,
        wine.EXPERIMENT,
        _DEEP_SUPERVISION,
        _NOISY,
    )
}
CHOSEN_ON = ("diabetes", "cnn", "breast-cancer", "noisy-auxiliaries")
"""Tasks on which the defaults were chosen, on seeds from 1000 on; the others are reported as they come."""
