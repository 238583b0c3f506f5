"""Hypergradients for auxiliary learning by implicit differentiation, on fused C++/CUDA kernels."""

__version__ = "0.1.0"

from auxfast import nn, solvers
from auxfast._native import build_info, reference_kernels
from auxfast.implicit import HypergradientResult, HyperOptimizer, hypergradient

__all__ = [
    "HyperOptimizer",
    "HypergradientResult",
    "__version__",
    "build_info",
    "hypergradient",
    "nn",
    "reference_kernels",
    "solvers",
]
