"""Modules: combiners of losses."""

from auxfast.nn.combiner_base import Combiner
from auxfast.nn.combiners import (
    DeepLinearCombiner,
    LinearCombiner,
    NonlinearCombiner,
    PolynomialCombiner,
)
from auxfast.nn.conv_combiner import ConvCombiner

__all__ = [
    "Combiner",
    "ConvCombiner",
    "DeepLinearCombiner",
    "LinearCombiner",
    "NonlinearCombiner",
    "PolynomialCombiner",
]
