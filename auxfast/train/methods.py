"""The methods that can be compared, by name: ways to turn several losses into one, and to make up auxiliary labels."""

from __future__ import annotations

from dataclasses import dataclass

WEIGHTING_LABELS = {
    "stl": "STL (main loss only)",
    "equal": "Equal (one common weight)",
    "uncertainty": "Uncertainty",
    "dwa": "DWA",
    "gradnorm": "GradNorm",
    "gcs": "GCS",
    "mgda": "MGDA",
}
COMBINER_LABELS = {
    "linear": "Linear",
    "deep-linear": "Deep linear",
    "nonlinear": "Nonlinear",
    "polynomial": "Polynomial",
    "conv": "Convolutional",
}
LABELS = "auxilearn-labels"
LABEL_LABELS = {
    LABELS: "AuxiLearn labels",
    "maxl": "MAXL",
    "maxl-f": "MAXL-F (random labels)",
}
OWN = "own"  # the training loss that the task brings: see `Task`
_PHI_LABELS = {"frozen": "frozen", "fixed": "fixed at the learned"}


@dataclass(frozen=True)
class Method:
    """A way to combine the losses, or to make up labels for one more.

    Args:
        family: a key of WEIGHTING_LABELS, COMBINER_LABELS or LABEL_LABELS, or OWN.
        monotone: whether a combiner is kept among the monotone ones.
        phi: treatment of the outer parameters: "learned"; "frozen" at their start, which is the control; or "fixed"
            at those which the learned method ended with from the first seed (paper, C.6).
    """

    family: str
    monotone: bool = True
    phi: str = "learned"

    @property
    def name(self) -> str:
        """Name on the command line: the family, then `-free` if not monotone, then `-frozen` or `-fixed`."""
        free = "" if self.monotone else "-free"
        phi = "" if self.phi == "learned" else f"-{self.phi}"
        return self.family + free + phi

    @property
    def label(self) -> str:
        """Label in tables and pictures."""
        if not self.holds_out:
            return {**WEIGHTING_LABELS, **LABEL_LABELS}[self.family]
        free = "" if self.monotone else ", not monotone"
        name = {**COMBINER_LABELS, **LABEL_LABELS}.get(self.family, "Own")
        return f"{name}{free}, {_PHI_LABELS.get(self.phi, self.phi)}"

    @property
    def labels(self) -> bool:
        """Whether it trains on auxiliary labels that the task's generator makes."""
        return self.family in LABEL_LABELS

    @property
    def holds_out(self) -> bool:
        """Whether the auxiliary set is kept from training, for outer steps to measure the outer loss on. Weightings and
        MAXL need none, and train on its labels too."""
        return self.family in COMBINER_LABELS or self.family in (OWN, LABELS)

    @property
    def learned(self) -> bool:
        """Whether outer steps move its parameters."""
        return (self.holds_out and self.phi == "learned") or self.family == "maxl"


def parse_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: there is none; says which there are.
    """
    family, phi, monotone = name, "learned", True
    for ending in _PHI_LABELS:
        if family.endswith(f"-{ending}"):
            family, phi = family.removesuffix(f"-{ending}"), ending
    if family.endswith("-free"):
        family, monotone = family.removesuffix("-free"), False
    plain = family == name and (family in WEIGHTING_LABELS or family in LABEL_LABELS)
    if plain or family in COMBINER_LABELS or (family in (OWN, LABELS) and monotone):
        return Method(family, monotone, phi)
    raise ValueError(
        f"method: got {name!r}, must be one of {', '.join(WEIGHTING_LABELS)}, maxl, maxl-f; or one of "
        f"{', '.join(COMBINER_LABELS)}, {LABELS}, {OWN} (the task's own training loss), which may end in -free (not "
        f"monotone; not for the last two) and then in -frozen (the control) or -fixed (at the learned parameters)"
    )
