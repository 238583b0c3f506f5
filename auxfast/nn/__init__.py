"""Modules: combiners of losses."""

from auxfast.nn.combiners import (
    Combiner,
    DeepLinearCombiner,
    LinearCombiner,
    NonlinearCombiner,
    PolynomialCombiner,
)

__all__ = ["Combiner", "DeepLinearCombiner", "LinearCombiner", "NonlinearCombiner", "PolynomialCombiner"]
