"""Modules: combiners of losses, and the label generator with its losses."""

from auxfast.nn.combiner_base import Combiner
from auxfast.nn.combiners import (
    DeepLinearCombiner,
    LinearCombiner,
    NonlinearCombiner,
    PolynomialCombiner,
)
from auxfast.nn.conv_combiner import ConvCombiner
from auxfast.nn.label_generator import LabelGenerator
from auxfast.nn.label_losses import focal_loss, negative_entropy, soft_cross_entropy

__all__ = [
    "Combiner",
    "ConvCombiner",
    "DeepLinearCombiner",
    "LabelGenerator",
    "LinearCombiner",
    "NonlinearCombiner",
    "PolynomialCombiner",
    "focal_loss",
    "negative_entropy",
    "soft_cross_entropy",
]
