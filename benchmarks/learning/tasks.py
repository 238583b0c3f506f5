"""The suite's tasks: five shipped experiments with their own inner training, and three that are made for it."""

from __future__ import annotations

from dataclasses import replace

from auxfast.experiments.paper import deep_supervision, diabetes, digits, noisy_auxiliaries, stereo
from benchmarks.learning import breast_cancer, cnn, wine
from benchmarks.learning.defaults import untuned

# A hundred auxiliaries at weight 1 would leave the main loss a hundredth of the training loss. The last setting has
# few and noisy main labels: there the auxiliaries can help.
_NOISY = replace(
    untuned(noisy_auxiliaries.EXPERIMENT, weight=0.1),
    settings={
        "as in the paper": {},
        "noisier auxiliaries": {"task.auxiliary_noise": 0.5},
        "few and noisy main labels": {"task.labelled": 100, "task.auxiliary": 20, "task.main_noise": 5.0},
    },
)

TASKS = {
    experiment.name: experiment
    for experiment in (
        untuned(diabetes.EXPERIMENT),
        untuned(digits.EXPERIMENT),
        untuned(stereo.EXPERIMENT),
        cnn.EXPERIMENT,
        breast_cancer.EXPERIMENT,
        wine.EXPERIMENT,
        untuned(deep_supervision.EXPERIMENT),
        _NOISY,
    )
}
CHOSEN_ON = ("diabetes", "cnn", "breast-cancer", "noisy-auxiliaries")
"""Tasks on which the defaults were chosen, on seeds from 1000 on; the others are reported as they come."""
