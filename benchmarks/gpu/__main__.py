"""What auxfast and others take on a GPU, in one file of figures.

    python -m benchmarks.gpu                             all sections, 150 s: benchmarks/results/gpu-<name>.json
    python -m benchmarks.gpu --only vectors,combiner     some of them
    python -m benchmarks.gpu --small                     small sizes: does it run? On a CPU too, without GPU figures

Each section has a share of the seconds, and what others leave; what it has no time for is named. Figures are written as
they come; `benchmarks.gpu.timing` says what they are.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from auxfast.train.environment import environment
from benchmarks.gpu.ceilings import ceilings
from benchmarks.gpu.hypergradients import graphed, hypergradients, large_network
from benchmarks.gpu.operators import combiners, compiled, loss_images
from benchmarks.gpu.section import Section
from benchmarks.gpu.timing import Timer
from benchmarks.gpu.vectors import vectors

SECTIONS: dict[str, tuple[Callable[[Section], None], float]] = {
    "ceilings": (ceilings, 8),
    "hypergradients": (hypergradients, 30),
    "graphed": (graphed, 15),
    "large network": (large_network, 20),
    "vectors": (vectors, 15),
    "combiner": (combiners, 20),
    "loss image": (loss_images, 20),
    "compiled": (compiled, 20),
}
"""Functions, and their shares of the time."""

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="file of the figures (benchmarks/results/gpu-<name>.json)")
    parser.add_argument("--seconds", type=float, default=150, help="for all sections (150)")
    parser.add_argument("--figure-seconds", type=float, default=0.08, help="for the calls of one figure (0.08)")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--small", action="store_true", help="small sizes")
    parser.add_argument("--commit", help="what is measured (where there is a git repository: its commit)")
    given = parser.parse_args()
    names = given.only.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"--only: got {', '.join(sorted(unknown))}, must be of {', '.join(SECTIONS)}")
    if not torch.cuda.is_available() and not given.small:
        parser.error("there is no GPU that torch sees: with --small, small sizes run on the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = given.out or RESULTS / f"gpu-{_name(device)}.json"
    figures = {"commit": given.commit or _commit(), "small": given.small, "environment": environment(), "sections": {}}
    warnings.simplefilter("ignore")  # of solves that are cut short, again in each call
    errors = _measure(figures, names, Timer(device, given.figure_seconds), given.seconds, given.small, out)
    print(f"\nWrote {out}")
    if errors:
        sys.exit(f"{errors} figures have an error in their place")


def _measure(figures: dict[str, Any], names: list[str], timer: Timer, seconds: float, small: bool, out: Path) -> int:
    end, errors = time.monotonic() + seconds, 0
    for i, name in enumerate(names):
        measure, share = SECTIONS[name]
        left = max(0.0, end - time.monotonic()) * share / sum(SECTIONS[other][1] for other in names[i:])

        def save(name: str = name) -> None:
            figures["sections"][name] = section.report()  # noqa: B023, called before the next section
            out.write_text(json.dumps(figures, indent=1) + "\n")

        section = Section(timer, left, small, save)
        try:
            with timer.stream():
                measure(section)
        except Exception:  # on a lent machine the other sections must come all the same
            section.errors += 1
            section.figures["error"] = traceback.format_exc()[-2000:]
        save()
        errors += section.errors
        print(_as_text(name, figures["sections"][name]), flush=True)
        if timer.on_gpu:
            torch.cuda.empty_cache()
    return errors


def _as_text(name: str, report: dict[str, Any]) -> str:
    lines = [f"\n{name}: {report['seconds']} s, clocks {report['clocks']}"]
    for row, found in report["figures"].items():
        if not isinstance(found, dict):
            lines.append(f"  {row}: {found:.4g}" if isinstance(found, float) else f"  {row}: {found}")
            continue
        for way, figure in found.items():
            if "error" in figure:
                lines.append(f"  {row}, {way}: {figure['error']}")
                continue
            numbers = [f"{kind[:-3]} {figure[kind]:.1f}" for kind in ("eager us", "graph us") if figure.get(kind)]
            if "launches" in figure:
                numbers.append(f"launches {figure['launches']}")
            numbers += [f"{kind[:-3]} x{times:.2f}" for kind, times in figure.get("times", {}).items()]
            lines.append(f"  {f'{row}, {way}':64} {'  '.join(numbers)}")
    return "\n".join([*lines, *(f"  no time for {left_out}" for left_out in report["left out"])])


def _name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _commit() -> str:
    """The commit of the working tree, and whether something in it has changed since."""
    try:
        command = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not known"


if __name__ == "__main__":
    main()
