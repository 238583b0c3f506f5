"""`auxfast demo`: learned loss weights against their controls, on real data; two data sets in about a minute."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from auxfast.experiments.command import plan_comparison, train_all
from auxfast.experiments.data.extras import import_extra
from auxfast.experiments.registry import get_experiment
from auxfast.experiments.report.page import write_report
from auxfast.experiments.report.rows import Results, Row, results_of, rows
from auxfast.experiments.report.story import overall, sentences
from auxfast.experiments.report.text import describe
from auxfast.experiments.timing import describe_timing, time_hypergradient
from auxfast.train.environment import environment
from auxfast.train.files import finite, write_json, writing
from auxfast.train.run import Run
from auxfast.train.trainer import OuterRecord

EXPERIMENTS = ("diabetes", "digits", "stereo")
DEFAULT = ("diabetes", "digits")


def run_demo(seeds: Sequence[int], out: Path, names: Sequence[str] = DEFAULT) -> dict[str, Any]:
    """Trains the experiments, prints tables and timing, and writes results.json, report.html and report.png.

    Args:
        names: names of experiments.

    Returns:
        The content of results.json.

    Raises:
        MissingExtraError: an experiment's package, cattrs, Jinja2, matplotlib or tqdm is not installed.
        RunError: `out` cannot be written to. Both are raised before training starts.
    """
    start = time.perf_counter()
    for package in ("matplotlib", "jinja2"):
        import_extra(package, package)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:  # made in `out`, so that one that refuses files fails now
        comparisons = [plan_comparison(name, seeds=seeds, out=Path(folder)) for name in names]
        found = [results_of(comparison.experiment, train_all(comparison)) for comparison in comparisons]
        for page in ("report.png", "report.html"):
            write_report(found, out / page)
    print(f"\n{describe(*found)}")
    timing = time_hypergradient(get_experiment(names[-1]))
    print(f"\n{describe_timing(timing)}")
    summary = {
        "environment": environment(),
        "seeds": list(seeds),
        "story": overall([section for results in found for section in results.sections]),
        "experiments": {results.experiment.name: _summary(results) for results in found},
        "hypergradient": timing,
        "seconds": round(time.perf_counter() - start, 2),
    }
    write_json(out / "results.json", finite(summary))
    written = ", ".join(str(out / name) for name in ("results.json", "report.html", "report.png"))
    print(f"\n{summary['seconds']:.0f} s. Wrote {written}")
    return summary


def _summary(results: Results) -> dict[str, Any]:
    """Entry of an experiment in results.json: settings, scores by seed, differences, and each run's records."""
    experiment = results.experiment
    (section,) = results.sections
    methods = {
        row.method.name: {
            "label": row.method.label,
            "scores": list(row.scores.values()),
            **row.mean._asdict(),
            **{f"paired difference to {base}": d._asdict() for base, d in row.differences.items()},
            "inner seconds": row.inner_seconds,
            "outer seconds": row.outer_seconds,
            **({"history": _histories(results.runs, row)} if row.method.learned else {}),
        }
        for row in rows(section)
    }
    return {
        "title": experiment.title,
        "score": experiment.score_name,
        "losses": list(experiment.loss_names),
        "config": results.runs[0].config,
        "story": sentences(section),
        "findings": [finding._asdict() for finding in results.findings],
        "methods": methods,
    }


def _histories(runs: Sequence[Run], row: Row) -> list[dict[str, Any]]:
    """Fields of `OuterRecord` of each run, each a list over the outer steps."""
    return [
        {"seed": run.seed, **{name: [getattr(r, name) for r in run.records] for name in OuterRecord._fields}}
        for run in runs
        if run.method == row.method
    ]
