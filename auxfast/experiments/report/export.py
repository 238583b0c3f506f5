"""Results for other programs: a table of runs as CSV, and tables of methods for LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from auxfast.experiments.report.notes import notes, skipped_steps
from auxfast.experiments.report.rows import Results, Section, rows, table
from auxfast.train.files import write_bytes
from auxfast.train.serialization import flattened

_COLUMNS = (
    *("experiment", "setting", "method", "seed", "score", "validation_score", "outer_steps", "stopped_early"),
    *("skipped_steps", "matvecs", "inner_seconds", "outer_seconds", "seconds", "notes", "path"),
)
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{character: "\\" + character for character in "&%$#_{}"},
}


def write_csv(all_results: Sequence[Results], path: Path) -> None:
    """Writes a line of titles, and one for each finished run. The last columns are the tasks' further scores, as
    further_scores.NAME, empty for runs without.

    Raises:
        WriteError: `path` cannot be written.
    """
    lines = []
    for run in (run for results in all_results for run in results.runs):
        assert run.result is not None
        description = {"experiment": run.experiment, "setting": run.setting, "method": run.method.name}
        counts = {
            "skipped_steps": skipped_steps(run.records),
            "matvecs": sum(record.matvecs or 0 for record in run.records),
        }
        more = {"notes": "; ".join(notes(run)), "path": run.path}
        figures = flattened(run.result._asdict())
        lines.append({**description, "seed": run.seed, **figures, **counts, **more})
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, dict.fromkeys([*_COLUMNS, *(name for line in lines for name in line)]))
    writer.writeheader()
    writer.writerows(lines)
    write_bytes(path, text.getvalue().encode())


def write_latex(all_results: Sequence[Results], path: Path) -> None:
    r"""Writes a table for each setting, which needs `\usepackage{booktabs}`.

    Raises:
        WriteError: `path` cannot be written.
    """
    tables = [_latex(section) for results in all_results for section in results.sections]
    write_bytes(path, "\n".join(tables).encode())


def _latex(section: Section) -> str:
    made = rows(section)
    titles, *lines = table(section, made)
    cells = [[_escaped(label), *map(_figure, figures)] for label, *figures in lines]
    for row, line in zip(made, cells, strict=True):
        if row.best:
            line[:2] = rf"\textbf{{{line[0]}}}", rf"\boldmath{line[1]}"
    body = "\n".join(" & ".join(line) + r" \\" for line in [list(map(_escaped, titles)), *cells])
    head, _, rest = body.partition("\n")
    return rf"""\begin{{table}}
\caption{{{_escaped(section.title)}. Mean $\pm$ standard error over seeds; differences are paired by seed. Bold: better
than every other method (paired $t$ test, 5\%).}}
\begin{{tabular}}{{l{"r" * (len(titles) - 1)}}}
\toprule
{head}
\midrule
{rest}
\bottomrule
\end{{tabular}}
\end{{table}}
"""


def _escaped(text: str) -> str:
    return re.sub(r"[\\~^<>|&%$#_{}]", lambda match: _LATEX[match.group()], text)


def _figure(text: str) -> str:
    return "$" + text.replace("+-", r"\pm") + "$" if text else ""
