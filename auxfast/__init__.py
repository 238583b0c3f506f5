"""Hypergradients for auxiliary learning by implicit differentiation, on fused C++/CUDA kernels."""

from auxfast import curvature, nn, solvers
from auxfast._native import build_info, reference_kernels
from auxfast._version import __version__
from auxfast.autograd.preserved_state import preserved_state
from auxfast.autograd.pullback import engine_only
from auxfast.implicit import (
    FreshBatches,
    GraphedHypergradient,
    GraphedResult,
    HypergradientReport,
    HypergradientResult,
    HyperOptimizer,
    MicroBatches,
    NotFiniteError,
    RetrainingReport,
    UsefulnessResult,
    auxiliary_usefulness,
    hypergradient,
    implicit_minimum,
    implicit_root,
    verify_against_retraining,
    verify_hypergradient,
)

__all__ = [
    "FreshBatches",
    "GraphedHypergradient",
    "GraphedResult",
    "HyperOptimizer",
    "HypergradientReport",
    "HypergradientResult",
    "MicroBatches",
    "NotFiniteError",
    "RetrainingReport",
    "UsefulnessResult",
    "__version__",
    "auxiliary_usefulness",
    "build_info",
    "curvature",
    "engine_only",
    "hypergradient",
    "implicit_minimum",
    "implicit_root",
    "nn",
    "preserved_state",
    "reference_kernels",
    "solvers",
    "verify_against_retraining",
    "verify_hypergradient",
]
