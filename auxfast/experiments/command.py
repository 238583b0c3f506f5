"""`auxfast train` and `auxfast report`: every method of an experiment from every seed, and what the runs show."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import distributed

from auxfast.experiments.base import Experiment, plan_run, run_config
from auxfast.experiments.data.extras import import_extra
from auxfast.experiments.data.files import DatasetError
from auxfast.experiments.registry import by_experiment, get_experiment, refuse_shipped_name, titles
from auxfast.experiments.report.export import write_csv, write_latex
from auxfast.experiments.report.notes import NoteTaker, notes
from auxfast.experiments.report.page import write_report
from auxfast.experiments.report.rows import Results, results_of
from auxfast.experiments.report.text import describe
from auxfast.implicit.ranks import ProcessGroup
from auxfast.train.averaging import of_first
from auxfast.train.methods import OWN, parse_method
from auxfast.train.recording import RunPlan, check_plans, draw_task, record_run
from auxfast.train.run import Run, find_runs
from auxfast.train.task import Task
from auxfast.train.task_check import check_task
from auxfast.train.trainer import OuterRecord
from auxfast.train.training_loss import check_method


@dataclass(frozen=True)
class Comparison:
    """Runs of an experiment's methods from the same seeds, all that was asked for being possible.

    mains: index of the main loss, for each setting.
    overrides: changes of the configuration that were asked for.
    process_group: processes that share each run, and call everything here alike; the first one shows the progress.
    """

    experiment: Experiment
    plans: tuple[RunPlan, ...]
    resume: bool
    mains: Mapping[str, int]
    overrides: Mapping[str, Any]
    process_group: ProcessGroup | None = None


def plan_comparison(
    name: str,
    *,
    methods: Sequence[str] = (),
    settings: Sequence[str] = (),
    seeds: Sequence[int],
    config: Path | None = None,
    changes: Sequence[str] = (),
    out: Path,
    resume: bool = False,
    processes: int = 1,
) -> Comparison:
    """The runs to make. No methods, no settings: all of the experiment's.

    Args:
        name: name of the experiment, or its place, see `get_experiment`.
        config: a TOML file of overrides.
        changes: further overrides, which come last, each "key=value" with a TOML value; a bare word is a string.
        processes: see `plan_runs`.

    Raises:
        ValueError, MissingExtraError, RunError: see `get_experiment` and `plan_runs`.
        OSError: `config` cannot be read.
    """
    import_extra("cattrs", "cattrs")
    return plan_runs(
        get_experiment(name),
        methods=methods,
        settings=settings,
        seeds=seeds,
        overrides=_overrides(config, changes),
        out=out,
        resume=resume,
        processes=processes,
    )


def plan_runs(
    experiment: Experiment,
    *,
    methods: Sequence[str] = (),
    settings: Sequence[str] = (),
    seeds: Sequence[int],
    overrides: Mapping[str, Any] | None = None,
    out: Path,
    resume: bool = False,
    processes: int = 1,
) -> Comparison:
    """The runs to make. No methods, no settings: all of the experiment's. A task of each setting is drawn and checked.

    Args:
        processes: how many will share each run, which not every task can bear.

    Raises:
        ValueError: there is no such method, setting or entry of the configuration, and says which there are; the
            experiment has the name of a shipped one; or its task is not what a task must be. A DatasetError is one:
            its data are not there.
        MissingExtraError: the experiment's package, cattrs or tqdm is not installed.
        RunError: there is no such device.
    """
    import_extra("cattrs", "cattrs")
    refuse_shipped_name(experiment)
    parsed = dict.fromkeys(parse_method(method) for method in methods or experiment.methods)
    ordered = sorted(parsed, key=lambda method: method.phi == "fixed")  # fixed ones need the learned ones
    configs = {setting: run_config(experiment, setting, overrides) for setting in settings or experiment.settings}
    for package in (experiment.package, ("tqdm", "tqdm")):
        if package is not None:
            import_extra(*package)
    plans = tuple(  # the order is seed by seed, so that an interrupted comparison has the same seeds of all methods
        plan_run(experiment, setting, method, seed, out, own)
        for setting, own in configs.items()
        for seed in sorted(set(seeds))
        for method in ordered
    )
    if not plans:
        raise ValueError("seeds: got none, must name one at least")
    mains = {}
    for setting in configs:
        own_plans = [plan for plan in plans if plan.setting == setting]
        task = _checked_task(own_plans, experiment.loss_names, processes)
        experiment, mains[setting] = replace(experiment, loss_names=tuple(task.loss_names)), task.main
    return Comparison(experiment, plans, resume, mains, overrides or {})


def _checked_task(plans: Sequence[RunPlan], expected: Sequence[str], processes: int) -> Task:
    """The task of a setting, which was checked with each of the plans' methods, and thereby spent.

    Raises:
        ValueError: the task, or a method with it, cannot be trained.
    """
    methods = {plan.method: plan for plan in plans}
    of_task = next((plan for method, plan in methods.items() if method.holds_out), plans[0])
    try:
        task = draw_task(of_task)
        check_task(
            task,
            own=any(method.family == OWN for method in methods),
            labels=any(method.labels for method in methods),
            processes=processes,
        )
        for method, plan in methods.items():
            check_method(method, plan.config, len(task.loss_names))
    except TypeError as error:
        raise ValueError(str(error)) from error
    except ValueError as error:
        if isinstance(error.__cause__, DatasetError):  # it says what is missing; where the task failed is no news
            raise error.__cause__ from None
        raise
    names = tuple(task.loss_names)
    if expected and names != tuple(expected):
        raise ValueError(f"task.loss_names: got {names}, must be the experiment's, {tuple(expected)}")
    return task


def run_comparison(comparison: Comparison) -> Results:
    """Makes the runs, and prints what they scored. Returns their results.

    Raises:
        RunError: see `record_run`; all runs before it are finished.
    """
    results = results_of(comparison.experiment, train_all(comparison))
    print(f"\n{describe(results)}")
    plan = comparison.plans[0]
    folder = plan.out / plan.path.relative_to(plan.out).parts[0]
    print(f"\nPictures, and what happened in training:  auxfast report {shlex.quote(str(folder))}")
    return results


def report(paths: Iterable[Path], out: Path | None = None, csv: Path | None = None, latex: Path | None = None) -> None:
    """Prints what the runs at or below `paths` show, and writes it to the files that are given.

    Args:
        out: a page or a picture, see `write_report`.
        csv, latex: see `write_csv` and `write_latex`.

    Raises:
        ValueError, MissingExtraError, RunError: see `write_report`.
    """
    import_extra("cattrs", "cattrs")
    found = [results_of(experiment, runs) for experiment, runs in by_experiment(find_runs(paths))]
    files = [(write, path) for write, path in ((write_report, out), (write_csv, csv), (write_latex, latex)) if path]
    for write, path in files:
        write(found, path)
    print(describe(*found))
    print(f"\nWrote {', '.join(str(path) for _, path in files)}")


def list_experiments() -> None:
    """Prints one line for each experiment."""
    listed = dict(titles())
    width = max(map(len, listed))
    for name, title in listed.items():
        print(f"{name.ljust(width)}  {title}")


def _overrides(config: Path | None, changes: Sequence[str]) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    if config is not None:
        toml = _toml()
        try:
            tables = toml.loads(config.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # the text is not TOML, or the bytes are not UTF-8
            raise ValueError(f"{config} is not TOML: {error}") from error
        for section, entries in tables.items():  # keys are dotted, so that a change does not replace a section
            dotted = isinstance(entries, dict)
            overrides.update({f"{section}.{key}": e for key, e in entries.items()} if dotted else {section: entries})
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"--set: got {change!r}, must be key=value, such as train.inner_steps=10")
        overrides[key.strip()] = _toml_value(key.strip(), text.strip())
    return overrides


def _toml_value(key: str, text: str) -> Any:
    toml = _toml()
    try:
        return toml.loads(f"value = {text}")["value"]
    except (toml.TOMLDecodeError, RecursionError) as error:
        if text.startswith(("{", "[", '"', "'")):  # it is no bare word
            raise ValueError(f"{key}: got {text}, which is not TOML: {error}") from error
        return text


def _toml() -> Any:
    module = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    return import_extra(module, module)


def train_all(comparison: Comparison, *, tell: bool = True) -> list[Run]:
    """Makes the runs, with a progress bar; where nobody watches it, with a line for each run.

    Args:
        tell: whether there are such lines, which say the test score.
    """
    plans, names, group = comparison.plans, comparison.experiment.loss_names, comparison.process_group
    tqdm = import_extra("tqdm", "tqdm").tqdm
    of_first(group, lambda: check_plans(plans, resume=comparison.resume))
    runs: list[Run] = []
    total = sum(plan.config.train.outer_steps for plan in plans)
    shows = group is None or distributed.get_rank(group) == 0
    quiet = None if shows else True  # None: unless in a terminal
    with tqdm(total=total, unit="outer step", dynamic_ncols=True, disable=quiet) as bar:
        done = 0
        for plan in plans:
            taker = NoteTaker(comparison.mains[plan.setting])

            def show(record: OuterRecord, done: int = done, taker: NoteTaker = taker) -> None:
                taker.add(record)
                bar.set_postfix(progress(record, names, taker.notes), refresh=False)
                bar.update(done + record.step + 1 - bar.n)

            bar.set_description(plan.title, refresh=False)
            runs.append(record_run(plan, resume=comparison.resume, on_outer_step=show, process_group=group))
            done += plan.config.train.outer_steps
            bar.update(done - bar.n)
            if tell and shows and (bar.disable or notes(runs[-1])):
                bar.write(f"[{len(runs)}/{len(plans)}] {plan.title}: {outcome(runs[-1])}", file=sys.stderr)
    return runs


def outcome(run: Run) -> str:
    """Words for how a finished run ended: its score, its time, and what is to be noted."""
    assert run.result is not None
    return ", ".join([f"score {run.result.score:.4g}", f"{run.result.seconds:.1f} s", *notes(run)])


def progress(record: OuterRecord, loss_names: Sequence[str], notes: Sequence[str] = ()) -> dict[str, str]:
    """Words of the progress bar: losses, the two largest weights, how the last outer step went, and the notes."""
    values = {"training": record.training_loss, "outer": record.outer_loss, "residual": record.residual}
    shown = {name: f"{value:.3g}" for name, value in values.items() if value is not None}
    weights = sorted(zip(record.loss_weights, loss_names, strict=True), key=lambda pair: -pair[0])
    shown["weights"] = ", ".join(f"{name}: {weight:.2f}" for weight, name in weights[:2])
    if record.outer_loss is not None:
        shown["outer time"] = f"{record.outer_seconds / (record.inner_seconds + record.outer_seconds):.0%}"
    if notes:
        shown["note"] = ", ".join(notes)
    return shown
