"""`auxfast report`: runs as one HTML page that needs no other file, or as one picture."""

from __future__ import annotations

import base64
import io
import json
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from auxfast._version import __version__
from auxfast.experiments.data.extras import import_extra
from auxfast.experiments.report.plotting import NOTE, draw_sections
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
from auxfast.train.files import RunError, write_bytes


def write_report(all_results: Sequence[Results], out: Path) -> None:
    """Writes a page (`out` ends in .html) or a picture (.png) of finished runs.

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
        figure = draw_sections([section for results in finished for section in results.sections])
        write_bytes(out, _picture(figure, "png"))
    else:
        unfinished = [text for results in all_results for text in describe_unfinished(results)]
        write_bytes(out, _page(finished, unfinished).encode())


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
        story=overall([section for results in all_results for section in results.sections]),
        sentences=sentences,
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        command=_command(),
        machines=_machines(all_results),
        own_picture=_own_picture,
        courses=_courses,
        cautions=cautions,
        remarks=remarks,
        unfinished=unfinished,
        rows=rows,
        table=table,
        note=NOTE,
        version=__version__,
    )
    return html


def _command() -> str:
    """The command that makes the page."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *sys.argv[1:]])


def _machines(all_results: Sequence[Results]) -> list[str]:
    """Versions and machines that the runs were made with, each once."""
    return list(dict.fromkeys(_machine(run.environment) for results in all_results for run in results.runs))


def _machine(environment: Mapping[str, Any]) -> str:
    versions, cpu, cuda = (environment.get(key, {}) for key in ("versions", "cpu", "cuda"))
    if not versions:
        return "unknown versions, on an unknown machine"
    devices = cuda.get("devices", "none")
    processors = [
        f"{cpu.get('model')} ({cpu.get('logical cores')} logical cores)",
        *([] if devices == "none" else devices),
    ]
    return f"auxfast {versions.get('auxfast')}, torch {versions.get('torch')}, on {', '.join(processors)}"


def _own_picture(results: Results) -> str | None:
    """The experiment's own picture as SVG in base64; None if its runs do not suffice for one."""
    if results.experiment.draw is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.svg"
        with _text_as_text():
            results.experiment.draw(path, results.runs)
        return _base64(path.read_bytes()) if path.exists() else None


def _courses(section: Section) -> str:
    """Picture of scores, courses and cost, as SVG in base64."""
    with _text_as_text():
        return _base64(_picture(draw_sections([section]), "svg"))


def _text_as_text() -> Any:
    """A context in which letters of an SVG are letters, which a browser draws sharply in any size, and not outlines."""
    return import_extra("matplotlib", "matplotlib").rc_context({"svg.fonttype": "none"})


def _base64(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def _picture(figure: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind)
    return buffer.getvalue()
