"""The command line: `auxfast train`, `auxfast report`, `auxfast data`, `auxfast demo` and `auxfast info`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from auxfast._version import __version__
from auxfast.experiments import command, demo, grid
from auxfast.experiments.data.catalogue import DATASETS
from auxfast.experiments.data.extras import MissingExtraError
from auxfast.experiments.data.files import DatasetError
from auxfast.train.averaging import is_from_collective
from auxfast.train.environment import environment
from auxfast.train.files import RunError, described, one_line
from auxfast.train.launch import Launch, launch

_MOST_SEEDS = 10_000  # each is a run of every method, and a folder
_LARGEST_SEED = 2**63 - 1  # torch's generators take no larger one


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command like Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command in `arguments` (default: sys.argv).

    Returns:
        The exit code: 0 done, 1 failed, 2 asked for what there is not, 130 interrupted, 143 terminated. Arguments that
        argparse refuses raise SystemExit with 2.
    """
    options = _parser().parse_args(arguments)
    launched = launch()
    try:
        with _sigterm_raises():
            return _run(options) if launched is None else _run_shared(options, launched)
    except KeyboardInterrupt as error:
        kept = "no results were written"
        if options.command == "train":
            kept = "what was saved is kept, and the same command with --resume goes on from there"
        end, code = ("terminated", 143) if isinstance(error, _Terminated) else ("interrupted", 130)
        print(f"\nauxfast: {end}; {kept}", file=sys.stderr)
        return code
    except OSError as error:  # a path that is too long, or lies where nobody may look
        if error.filename is None:
            raise
        return _fail(f"cannot use {error.filename}: {error.strerror}", 1)


def _run(options: argparse.Namespace) -> int:
    if options.command == "info":
        return _info()
    if options.command == "train":
        return _train(options)
    if options.command == "report":
        return _report(options)
    if options.command == "data":
        return _list_data() if options.action == "list" else _check_data(options.dataset, options.folder)
    return _demo(options.seeds, options.out, options.experiment)


def _run_shared(options: argparse.Namespace, launched: Launch) -> int:
    """Runs the command as one of several processes."""
    if options.command != "train" or options.list:
        return _fail(f"{options.command} is for one process, and {launched.size} were started", 2)
    try:
        with nullcontext() if launched.rank == 0 else _silent_stdout():
            return _train(options, launched)
    except BaseException as error:
        if code := _end(error, described(error), 1, launched):
            return code
        raise


def _end(error: BaseException, reason: object, code: int, launched: Launch | None) -> int:
    """Prints why the command failed, and returns the exit code. Of several processes, the others are told; where it is
    one of them that has ended, this says which. 0, and nothing is printed, where all were interrupted alike."""
    if launched is None:
        return _fail(reason, code)
    ends_itself = not (isinstance(error, KeyboardInterrupt) or is_from_collective(error))
    if not ends_itself and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends all where one has ended
    lost = launched.end(one_line(reason) if ends_itself else "")
    if not lost and isinstance(error, KeyboardInterrupt):
        return 0
    if not lost:
        return _fail(f"rank {launched.rank}: {one_line(reason)}", code)
    kept = "what was saved is kept, and the same command with --resume goes on from there"
    return _fail(f"rank {launched.rank} ends, since {lost}; {kept}", 1)


@contextmanager
def _silent_stdout() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Lets SIGTERM raise an exception, unless there is a handler for it already."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def terminate(number: int, frame: object) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is terminate:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="auxfast", description="Hypergradients for auxiliary learning, on fused kernels."
    )
    parser.add_argument("--version", action="version", version=f"auxfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demonstration = commands.add_parser(
        "demo",
        help="learn loss weights on two real data sets: about a minute on one core",
        description="Trains on scikit-learn's diabetes and digits data with single-task learning, equal "
        "weights, frozen and learned combiners; prints a table, and writes report.html, report.png and "
        "results.json. The third experiment, stereo, takes minutes: segmentation and depth of scikit-image's "
        "motorcycle, with a combiner of pixel losses.",
    )
    demonstration.add_argument(
        "--experiment",
        nargs="+",
        choices=demo.EXPERIMENTS,
        default=demo.DEFAULT,
        help="what to train on (default: diabetes digits)",
    )
    demonstration.add_argument("--seeds", type=_seed_count, default=10, help="seeds for each method (default: 10)")
    demonstration.add_argument(
        "--out", type=Path, default=Path("auxfast-demo"), help="folder to write to (default: ./auxfast-demo)"
    )
    _add_train(commands)
    report = commands.add_parser(
        "report",
        help="tables and pictures of runs that `auxfast train` made",
        description="Prints the tables, says whether what each experiment set out to show holds, and writes a page "
        "with scores, learning curves, learned weights, residuals and cost.",
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, or folders that hold such")
    report.add_argument(
        "--out",
        type=Path,
        help="an .html page that needs no other file, or a .png (default: ./auxfast-report.html; none with --csv or "
        "--latex)",
    )
    report.add_argument("--csv", type=Path, metavar="FILE", help="write a row for each run, for other programs")
    report.add_argument("--latex", type=Path, metavar="FILE", help="write the tables for a paper (package booktabs)")
    _add_data(commands)
    commands.add_parser("info", help="what a bug report needs: versions, devices, build, kernels in use")
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train an experiment's methods from several seeds; auxfast train --list names the experiments",
        description="Trains every method from every seed, prints a table of the scores, and keeps each run in a folder "
        "of its own below OUT, where `auxfast report` finds it.",
    )
    train.add_argument("experiment", nargs="?", help="its name; or one's own, FILE.py:NAME or MODULE:NAME")
    train.add_argument("--list", action="store_true", help="list the experiments, and do nothing else")
    train.add_argument("--method", type=_names, default=(), metavar="A,B", help="methods (default: the experiment's)")
    train.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="NAME",
        help="one of the experiment's; repeatable (default: all)",
    )
    train.add_argument("--seeds", type=_seeds, default=range(5), metavar="0..9|0,3,5", help="seeds (default: 0..4)")
    train.add_argument(
        "--grid",
        type=_seeds,
        nargs="?",
        const=[1000],
        metavar="SEEDS",
        help="first search the experiment's grid of hyperparameters from these seeds (default: 1000), and train each "
        "method with those of the best validation score; runs of the search are in OUT-grid",
    )
    train.add_argument("--config", type=Path, metavar="FILE", help="a TOML file of changes to the configuration")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a change to the configuration that comes last, such as train.inner_steps=10; repeatable",
    )
    train.add_argument(
        "--out", type=Path, default=Path("auxfast-runs"), help="folder of all runs (default: ./auxfast-runs)"
    )
    train.add_argument("--resume", action="store_true", help="go on with unfinished runs, and skip finished ones")


def _add_data(commands: Any) -> None:
    data = commands.add_parser(
        "data", help="data sets that are read from files: where they are, and whether a copy is whole"
    )
    actions = data.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="names and titles of the data sets, and pages that say where they are to be had")
    check = actions.add_parser("check", help="whether a copy of a data set is complete: seconds")
    check.add_argument("dataset", metavar="DATASET", help="a name; auxfast data list names them")
    check.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of the copy")


def _fail(reason: object, code: int) -> int:
    """Prints why the command failed, in a line. Returns the exit code."""
    print(f"auxfast: {one_line(reason)}", file=sys.stderr)
    return code


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _is_number(text: str) -> bool:
    """Whether a text is a number without sign, of as many digits as Python converts."""
    return text.isdecimal() and len(text) < 1000


def _seeds(text: str) -> list[int]:
    """Seeds that a text such as 0..9 (with the 9) or 0,3,5 names."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        if not _is_number(first) or (dots and not (_is_number(last) and int(last) >= int(first))):
            raise argparse.ArgumentTypeError(f"must be like 0..9 or 0,3,5, in ascending order, not {text!r}")
        low, high = int(first), int(last if dots else first)
        if high > _LARGEST_SEED:
            raise argparse.ArgumentTypeError(f"{high} is too large, a seed is at most {_LARGEST_SEED}")
        if len(seeds) + high - low >= _MOST_SEEDS:
            raise argparse.ArgumentTypeError(
                f"{text} names {len(seeds) + high - low + 1} seeds or more, must be at most {_MOST_SEEDS}"
            )
        seeds += range(low, high + 1)
    return seeds


def _train(options: argparse.Namespace, launched: Launch | None = None) -> int:
    if options.list:
        command.list_experiments()
        return 0
    if options.experiment is None:
        return _fail("which experiment? auxfast train --list names them", 2)
    try:
        comparison = command.plan_comparison(
            options.experiment,
            methods=options.method,
            settings=options.setting,
            seeds=options.seeds,
            config=options.config,
            changes=options.set,
            out=options.out,
            resume=options.resume,
            processes=1 if launched is None else launched.size,
        )
    except OSError as error:
        return _end(error, f"cannot read {error.filename}: {error.strerror}", 2, launched)
    except ValueError as error:
        return _end(error, error, 2, launched)
    except (MissingExtraError, RunError) as error:
        return _end(error, error, 1, launched)
    try:
        if launched is not None:
            group = launched.join(plan.config.train.device for plan in comparison.plans)
            comparison = replace(comparison, process_group=group)
        if options.grid is not None:
            comparison = grid.search(comparison, options.grid)
        command.run_comparison(comparison)
    except ValueError as error:
        return _end(error, error, 2, launched)
    except RunError as error:
        return _end(error, error, 1, launched)
    if launched is not None:
        launched.leave()
    return 0


def _report(options: argparse.Namespace) -> int:
    out = options.out or (None if options.csv or options.latex else Path("auxfast-report.html"))
    try:
        command.report(options.runs, out, options.csv, options.latex)
    except ValueError as error:
        return _fail(error, 2)
    except (MissingExtraError, RunError) as error:
        return _fail(error, 1)
    return 0


def _list_data() -> int:
    width, title_width = max(map(len, DATASETS)), max(len(dataset.title) for dataset in DATASETS.values())
    for name, dataset in DATASETS.items():
        print(f"{name:{width}}  {dataset.title:{title_width}}  {dataset.address}")
    return 0


def _check_data(name: str, folder: Path) -> int:
    dataset = DATASETS.get(name)
    if dataset is None:
        return _fail(f"no data set {name}, there are {', '.join(DATASETS)}", 2)
    try:
        found = dataset.check(folder)
    except DatasetError as error:
        return _fail(f"{error} ({dataset.title}, to be had from {dataset.address})", 1)
    except MissingExtraError as error:
        return _fail(error, 1)
    print(*found, sep="\n")
    print(f"{dataset.title} in {folder} is complete")
    return 0


def _seed_count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 1000, not {text!r}")
    return int(text)


def _demo(seeds: int, out: Path, experiments: Sequence[str]) -> int:
    try:
        demo.run_demo(range(seeds), out, experiments)
    except (MissingExtraError, RunError) as error:
        return _fail(error, 1)
    return 0


def _info() -> int:
    for section, entries in environment().items():
        print(f"{section}:")
        for name, value in entries.items():
            print(f"  {name}: {_plain(value)}")
    return 0


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)
