"""Hypergradients by implicit differentiation."""

from auxfast.implicit.hypergradient import HypergradientResult, hypergradient
from auxfast.implicit.optimizer import HyperOptimizer

__all__ = ["HyperOptimizer", "HypergradientResult", "hypergradient"]
