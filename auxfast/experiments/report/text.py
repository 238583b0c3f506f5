"""Results in plain text: what they say, tables, and findings."""

from __future__ import annotations

from collections.abc import Sequence

from auxfast.experiments.base import Finding
from auxfast.experiments.report.rows import (
    Results,
    Section,
    cautions,
    describe_unfinished,
    remarks,
    rows,
    table,
)
from auxfast.experiments.report.story import overall, sentences

_VERDICTS = {True: "holds", False: "NOT SHOWN", None: "not known"}


def describe(*all_results: Results) -> str:
    """The story of all results, and of each: tables with what they say, what is not finished, and findings."""
    story = overall([section for results in all_results for section in results.sections])
    parts = ["\n".join(story)] if story else []
    for results in all_results:
        parts += [*map(_describe_section, results.sections), *describe_unfinished(results)]
        parts += [_describe_findings(results.findings)] if results.findings else []
    return "\n\n".join(parts)


def _describe_section(section: Section) -> str:
    """What a setting shows, and its table; `*`: best beyond noise."""
    made = rows(section)
    cells = table(section, made)
    width = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([line[0].ljust(width[0]), *(cell.rjust(w) for cell, w in zip(line[1:], width[1:], strict=True))])
        for line in cells
    ]
    lines = [
        lines[0],
        "-" * len(lines[0]),
        *(f"{line}  *" if row.best else line for line, row in zip(lines[1:], made, strict=True)),
    ]
    note = "mean +- SEM over seeds; differences are paired"
    best = next((row.method.label for row in made if row.best), None)
    if best is not None:
        note += "; * better than every other beyond noise (paired t test, 5%)"
    shares = [f"{row.method.name} {row.outer_share:.0%}" for row in made if row.method.learned]
    told = [f"outer steps' share of the training time: {', '.join(shares)}"] if shares else []
    told += remarks(section)
    told += [f"CAUTION: {text}" for text in cautions(section)]
    return "\n".join([section.title, *sentences(section), "", *lines, note, *told])


def _describe_findings(found: Sequence[Finding]) -> str:
    """Lines of text, one for each finding, with the verdict in front."""
    return "\n".join(f"{_VERDICTS[finding.holds] + ':':14} {finding.text}" for finding in found)
