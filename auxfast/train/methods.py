"""The methods that can be compared, by name: ways to turn several losses into one."""

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
OWN = "own"  # the training loss that the task brings: see `Task`
_PHI_LABELS = {"frozen": "frozen", "fixed": "fixed at the learned"}


@dataclass(frozen=True)
class Method:
    """A way to combine the losses.

    Args:
        family: a key of WEIGHTING_LABELS or COMBINER_LABELS, or OWN.
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
        if not self.is_combiner:
            return WEIGHTING_LABELS[self.family]
        free = "" if self.monotone else ", not monotone"
        return f"{COMBINER_LABELS.get(self.family, 'Own')}{free}, {_PHI_LABELS.get(self.phi, self.phi)}"

    @property
    def is_combiner(self) -> bool:
        """Whether it has outer parameters, as the task's own training loss does: these keep the auxiliary set from
        training; weightings need none, and train on its labels too."""
        return self.family not in WEIGHTING_LABELS

    @property
    def learned(self) -> bool:
        """Whether outer steps move its parameters."""
        return self.is_combiner and self.phi == "learned"


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
    plain = family == name and family in WEIGHTING_LABELS
    if plain or family in COMBINER_LABELS or (family == OWN and monotone):
        return Method(family, monotone, phi)
    raise ValueError(
        f"method: got {name!r}, must be one of {', '.join(WEIGHTING_LABELS)}; or one of {', '.join(COMBINER_LABELS)}, "
        f"{OWN} (the task's own training loss), which may end in -free (not monotone; not for {OWN}) and then in "
        "-frozen (the control) or -fixed (at the learned parameters)"
    )
