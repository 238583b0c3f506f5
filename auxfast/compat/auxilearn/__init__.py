"""A drop-in for AuxiLearn (github.com/AvivNavon/AuxiLearn): change the import, and everything else may stay.

    import auxfast.compat.auxilearn as auxilearn
    from auxfast.compat.auxilearn.optim import MetaOptimizer

docs/compat.md shows three programs, what is the same, and what is mended.
"""

from auxfast.compat.auxilearn import hypernet, implicit_diff, optim
from auxfast.compat.auxilearn.hypernet import (
    HyperNet,
    Identity,
    LinearHyperNet,
    MonoHyperNet,
    MonoLinearHyperNet,
    MonoNoFCCNNHyperNet,
    MonoNonlinearHyperNet,
    NoFCCNNHyperNet,
    NonlinearHyperNet,
)
from auxfast.compat.auxilearn.implicit_diff import Hypergrad
from auxfast.compat.auxilearn.optim import MetaOptimizer

__all__ = [
    "HyperNet",
    "Hypergrad",
    "Identity",
    "LinearHyperNet",
    "MetaOptimizer",
    "MonoHyperNet",
    "MonoLinearHyperNet",
    "MonoNoFCCNNHyperNet",
    "MonoNonlinearHyperNet",
    "NoFCCNNHyperNet",
    "NonlinearHyperNet",
    "hypernet",
    "implicit_diff",
    "optim",
]
