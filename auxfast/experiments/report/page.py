"""`auxfast report`: runs as one HTML page that needs no other file, or as one picture."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from auxfast._version import __version__
from auxfast.experiments.base import Finding
from auxfast.experiments.data.extras import import_extra
from auxfast.experiments.report.figure import NOTE, draw_sections
from auxfast.experiments.report.rows import Results, Section, cautions, describe, rows, table
from auxfast.train.files import RunError, write_bytes

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1150px; margin: 2em auto; padding: 0 1em }
h2 { margin-top: 2.5em; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .25em .9em; border-bottom: 1px solid #e4e4e4 }
th:first-child, td:first-child { text-align: left }
th { border-bottom: 2px solid #999 }
img { max-width: 100% }
.note { color: #666; font-size: 13px }
.caution { background: #fff3cd; padding: .4em .8em }
li.holds::marker { content: "\\2714  " }
li.fails::marker { content: "\\2718  " }
li.unknown::marker { content: "?  " }
pre { font-size: 12px; overflow-x: auto }
"""
_CLASSES = {True: "holds", False: "fails", None: "unknown"}


def write_report(all_results: Sequence[Results], out: Path) -> str:
    """Writes a page (`out` ends in .html) or a picture (.png) of finished runs.

    Returns:
        The tables and the findings in plain text.

    Raises:
        ValueError: `out` has another ending.
        MissingExtraError: matplotlib is not installed.
        RunError: no run is finished, or `out` cannot be written.
    """
    if out.suffix not in (".html", ".png"):
        raise ValueError(f"out: got {str(out)!r}, must end in .html or .png")
    import_extra("matplotlib", "matplotlib")
    finished = [results for results in all_results if results.runs]
    if not finished:
        raise RunError("no run is finished yet: `auxfast train` with --resume goes on with them")
    if out.suffix == ".png":
        write_bytes(out, _png(draw_sections([section for results in finished for section in results.sections])))
    else:
        write_bytes(out, _page(finished).encode())
    return "\n\n".join(map(describe, finished))


def _page(all_results: Sequence[Results]) -> str:
    body = []
    for results in all_results:
        experiment = results.experiment
        body += [f"<h2>{escape(experiment.title)}</h2>", f"<p>{escape(experiment.about)}</p>"]
        if results.unfinished:
            body.append(f'<p class="caution">{results.unfinished} unfinished runs are left out.</p>')
        if results.findings:
            body += ["<h3>What it shows</h3>", _list(results.findings)]
        if experiment.draw is not None:
            body += _own_picture(results)
        for section in results.sections:
            body += [f"<h3>{escape(section.setting or 'Scores')}</h3>", *_cautions(section), _table(section)]
            body.append(_image(_png(draw_sections([section])), f"Scores and courses of {section.title}"))
        body.append(_configuration(results.sections))
    body.append(_details("Environment of the first run", all_results[0].runs[0].environment))
    title = ", ".join(results.experiment.name for results in all_results)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>auxfast: {escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>auxfast: {escape(title)}</h1>\n"
        f'{"".join(part + chr(10) for part in body)}<p class="note">{escape(NOTE)} Made by auxfast {__version__}.</p>\n'
        "</body></html>\n"
    )


def _list(found: Sequence[Finding]) -> str:
    items = [f'<li class="{_CLASSES[finding.holds]}">{escape(finding.text)}</li>' for finding in found]
    return f"<ul>{''.join(items)}</ul>"


def _own_picture(results: Results) -> list[str]:
    """What the experiment draws of itself, if its runs suffice for that."""
    assert results.experiment.draw is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        results.experiment.draw(path, results.runs)
        return [_image(path.read_bytes(), f"Picture of {results.experiment.title}")] if path.exists() else []


def _table(section: Section) -> str:
    made = rows(section)
    titles, *lines = [[escape(cell) for cell in line] for line in table(section, made)]
    html = [f"<tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr>"]
    for (label, *figures), row in zip(lines, made, strict=True):
        figures = [figure.replace("+-", "&plusmn;").replace("-", "&minus;") for figure in figures]
        if row.best:
            label, figures[0] = f"<b>{label}</b>", f"<b>{figures[0]}</b>"
        html.append(f"<tr><td>{label}</td>{''.join(f'<td>{figure}</td>' for figure in figures)}</tr>")
    note = (
        "Mean ± standard error over seeds; differences are paired. Bold: better than every other method beyond noise "
        "(paired t test, 5%)."
    )
    return f'<table>{"".join(html)}</table><p class="note">{note}</p>'


def _cautions(section: Section) -> list[str]:
    return [f'<p class="caution">Caution: {escape(text)}.</p>' for text in cautions(section)]


def _configuration(own: Sequence[Section]) -> str:
    return "".join(
        _details(f"Configuration{f', {section.setting}' if section.setting else ''}", section.runs[0].config)
        for section in own
    )


def _details(summary: str, content: Any) -> str:
    text = escape(json.dumps(content, indent=1))
    return f"<details><summary>{escape(summary)}</summary><pre>{text}</pre></details>"


def _image(png: bytes, description: str) -> str:
    return f'<p><img alt="{escape(description)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>'


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
