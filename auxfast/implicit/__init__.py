"""Hypergradients by implicit differentiation."""

from auxfast.autograd.preserved_state import preserved_state
from auxfast.implicit.finite import NotFiniteError
from auxfast.implicit.fresh_batches import FreshBatches
from auxfast.implicit.graphed import GraphedHypergradient, GraphedResult
from auxfast.implicit.hypergradient import HypergradientResult, hypergradient
from auxfast.implicit.micro_batches import MicroBatches
from auxfast.implicit.minimum import implicit_minimum
from auxfast.implicit.optimizer import HyperOptimizer
from auxfast.implicit.report import Agreement, HypergradientReport
from auxfast.implicit.retraining import verify_against_retraining
from auxfast.implicit.retraining_report import RetrainingReport
from auxfast.implicit.root import implicit_root
from auxfast.implicit.usefulness import UsefulnessResult, auxiliary_usefulness
from auxfast.implicit.verify import verify_hypergradient

__all__ = [
    "Agreement",
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
    "auxiliary_usefulness",
    "hypergradient",
    "implicit_minimum",
    "implicit_root",
    "preserved_state",
    "verify_against_retraining",
    "verify_hypergradient",
]
