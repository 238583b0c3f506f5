"""Modules: combiners of losses."""

from auxfast.nn.combiner_base import Combiner
from auxfast.nn.combiners import (
    DeepLinearCombiner,
    LinearCombiner,
    NonlinearCombiner,
    PolynomialCombiner,
)

__all__ = ["Combiner", "DeepLinearCombiner", "LinearCombiner", "NonlinearCombiner", "PolynomialCombiner"]
