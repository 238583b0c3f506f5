"""The story of a report: what came out, in a sentence for each learned method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from auxfast.experiments.report.rows import Row, Section, rows
from auxfast.experiments.report.statistics import Estimate, not_known

_NAMES = {"stl": "STL", "equal": "Equal", "frozen": "its frozen start"}


def sentences(section: Section) -> list[str]:
    """A sentence for each learned method in a setting; where there is none, for each method with a baseline."""
    told = []
    for row in _subjects(section):
        grouped = _grouped((_against(difference), _NAMES[base]) for base, difference in row.differences.items())
        parts = [text.format(_listed(bases)) for text, bases in grouped.items()]
        told.append(f"{row.method.label}: {', '.join(parts)}.")
    return told


def overall(sections: Sequence[Section]) -> list[str]:
    """A sentence for each of these methods on all sections that it was run in; nothing for fewer than two sections."""
    if len(sections) < 2:
        return []
    differences: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for section in sections:
        name = section.experiment.name + (f" ({section.setting})" if section.setting else "")
        for row in _subjects(section):
            for base, difference in row.differences.items():
                own = differences.setdefault(row.method.label, {})
                own.setdefault(_NAMES[base], []).append((_verdict(difference), name))
    told = []
    for label, bases in differences.items():
        verdicts = [
            (", ".join(f"{verdict} on {_listed(names)}" for verdict, names in _grouped(found).items()), base)
            for base, found in bases.items()
        ]
        parts = [f"against {_listed(names)} {text}" for text, names in _grouped(verdicts).items()]
        told.append(f"{label}: {'; '.join(parts)}.")
    return told


def _subjects(section: Section) -> list[Row]:
    made = [row for row in rows(section) if row.differences]
    return [row for row in made if row.method.learned] or made


def _against(difference: Estimate) -> str:
    """The verdict on a difference, with a place for the baseline's name."""
    beyond, figure = difference.beyond_noise(), _figure(difference)
    if beyond is None:
        return f"against {{}} {not_known(difference.seeds)}"
    if not beyond:
        return "no better than {}"
    return f"{figure} over {{}}" if difference.mean > 0 else f"worse than {{}} ({figure})"


def _verdict(difference: Estimate) -> str:
    beyond, figure = difference.beyond_noise(), _figure(difference)
    if beyond is None:
        return "not known"
    if not beyond:
        return "no better"
    return figure if difference.mean > 0 else f"worse ({figure})"


def _figure(difference: Estimate) -> str:
    """The difference without its standard error."""
    return difference.signed().partition(" ")[0]


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names by what is said of them."""
    found: dict[str, list[str]] = {}
    for said, name in pairs:
        found.setdefault(said, []).append(name)
    return found


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
