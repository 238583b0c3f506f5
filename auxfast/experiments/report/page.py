"""`auxfast report`: runs as one HTML page that needs no other file, or as one picture."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from auxfast._version import __version__
from auxfast.experiments.data.extras import import_extra
from auxfast.experiments.report.plotting import NOTE, draw_sections
from auxfast.experiments.report.rows import Results, Section, cautions, describe, describe_unfinished, rows, table
from auxfast.train.files import RunError, write_bytes


def write_report(all_results: Sequence[Results], out: Path) -> str:
    """Writes a page (`out` ends in .html) or a picture (.png) of finished runs.

    Returns:
        The tables and the findings in plain text.

    Raises:
        ValueError: `out` has another ending.
        MissingExtraError: matplotlib or (for a page) Jinja2 is not installed.
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
        unfinished = [text for results in all_results for text in describe_unfinished(results)]
        write_bytes(out, _page(finished, unfinished).encode())
    return "\n\n".join(map(describe, all_results))


def _page(all_results: Sequence[Results], unfinished: Sequence[str]) -> str:
    jinja2 = import_extra("jinja2", "jinja2")
    pages = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    pages.filters["pretty"] = lambda content: json.dumps(content, indent=1)
    pages.filters["typeset"] = lambda figure: figure.replace("+-", "±").replace("-", "\N{MINUS SIGN}")
    html: str = pages.get_template("page.html.j2").render(
        all_results=all_results,
        title=", ".join(results.experiment.name for results in all_results),
        own_picture=_own_picture,
        courses=_courses,
        cautions=cautions,
        unfinished=unfinished,
        rows=rows,
        table=table,
        note=NOTE,
        version=__version__,
    )
    return html


def _own_picture(results: Results) -> str | None:
    """The experiment's own picture in base64; None if its runs do not suffice for one."""
    if results.experiment.draw is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        results.experiment.draw(path, results.runs)
        return _base64(path.read_bytes()) if path.exists() else None


def _courses(section: Section) -> str:
    """Picture of scores, learning curves and weights, in base64."""
    return _base64(_png(draw_sections([section])))


def _base64(png: bytes) -> str:
    return base64.b64encode(png).decode()


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
