"""Real data sets for demos and experiments, one a module, and the splits that auxiliary learning needs."""

from auxfast.data.diabetes import DiabetesData, load_diabetes
from auxfast.data.digits import DigitsData, load_digits
from auxfast.data.splits import draw_per_class, split, standardise, warn_if_auxiliary_set_is_large

__all__ = [
    "DiabetesData",
    "DigitsData",
    "draw_per_class",
    "load_diabetes",
    "load_digits",
    "split",
    "standardise",
    "warn_if_auxiliary_set_is_large",
]
