"""Real data sets for demos and experiments, one a module, and the splits that auxiliary learning needs."""

from auxfast.experiments.data.breast_cancer import BreastCancerData, load_breast_cancer
from auxfast.experiments.data.diabetes import DiabetesData, load_diabetes
from auxfast.experiments.data.digits import DigitsData, load_digits
from auxfast.experiments.data.splits import (
    allocate_auxiliary,
    draw_batch,
    draw_per_class,
    split,
    standardise,
    warn_if_auxiliary_set_is_large,
)
from auxfast.experiments.data.stereo import StereoData, load_stereo
from auxfast.experiments.data.wine import WineData, load_wine

__all__ = [
    "BreastCancerData",
    "DiabetesData",
    "DigitsData",
    "StereoData",
    "WineData",
    "allocate_auxiliary",
    "draw_batch",
    "draw_per_class",
    "load_breast_cancer",
    "load_diabetes",
    "load_digits",
    "load_stereo",
    "load_wine",
    "split",
    "standardise",
    "warn_if_auxiliary_set_is_large",
]
