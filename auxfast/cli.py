"""The command line: `auxfast demo` and `auxfast info`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from auxfast import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in `arguments` (default: sys.argv). Returns the exit code: 0 done, 1 failed, 130
    interrupted. Bad arguments exit with 2, as argparse does."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "info":
            return _info()
        return _demo(options.seeds, options.out, options.experiment)
    except KeyboardInterrupt:
        print("\nauxfast: interrupted; no results were written", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="auxfast", description="Hypergradients for auxiliary learning, on fused kernels."
    )
    parser.add_argument("--version", action="version", version=f"auxfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="learn loss weights on two real data sets: about a minute on one core",
        description="Trains on scikit-learn's diabetes and digits data with single-task learning, equal "
        "weights, frozen and learned combiners; prints a table, and writes results.json and report.png. The third "
        "experiment, stereo, takes minutes: segmentation and depth of scikit-image's motorcycle, with a combiner of "
        "pixel losses.",
    )
    demo.add_argument(
        "--experiment",
        nargs="+",
        choices=("diabetes", "digits", "stereo"),
        default=("diabetes", "digits"),
        help="what to train on (default: diabetes digits)",
    )
    demo.add_argument("--seeds", type=_seed_count, default=10, help="seeds for each method (default: 10)")
    demo.add_argument(
        "--out", type=Path, default=Path("auxfast-demo"), help="folder to write to (default: ./auxfast-demo)"
    )
    commands.add_parser("info", help="what a bug report needs: versions, devices, build, kernels in use")
    return parser


def _seed_count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 1000, not {text!r}")
    return int(text)


def _demo(seeds: int, out: Path, experiments: Sequence[str]) -> int:
    from auxfast.data.extras import MissingExtraError
    from auxfast.train.experiments.demo import run_demo

    try:
        run_demo(range(seeds), out, experiments)
    except MissingExtraError as error:
        print(f"auxfast: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"auxfast: cannot write to {error.filename or out}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def _info() -> int:
    from auxfast.train.environment import environment

    for section, entries in environment().items():
        print(f"{section}:")
        for name, value in entries.items():
            print(f"  {name}: {_plain(value)}")
    return 0


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)
