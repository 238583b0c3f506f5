"""`auxfast train`: every method of an experiment from every seed, with a progress bar and a table of the scores."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from auxfast.experiments.base import Experiment
from auxfast.experiments.data.extras import import_extra
from auxfast.experiments.paper import EXPERIMENTS, get_experiment
from auxfast.experiments.report.rows import describe, describe_findings, findings, sections
from auxfast.experiments.runs import RunFolder, check_new, learned_run, run_config, run_path, train_run
from auxfast.train.methods import Method, parse_method
from auxfast.train.trainer import OuterRecord
from auxfast.train.training_loss import make_method_weighting


@dataclass(frozen=True)
class Plan:
    """Runs to make, all that was asked for being possible."""

    experiment: Experiment
    settings: tuple[str, ...]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    overrides: Mapping[str, Any]
    out: Path
    resume: bool


def make_plan(
    experiment: str,
    *,
    methods: Sequence[str] = (),
    settings: Sequence[str] = (),
    seeds: Sequence[int],
    config: Path | None = None,
    changes: Sequence[str] = (),
    out: Path,
    resume: bool = False,
) -> Plan:
    """What to run. No methods, no settings: all of the experiment's.

    Args:
        config: a TOML file of overrides.
        changes: further ones, which come last, each "key=value" with a TOML value; a bare word is a string.

    Raises:
        ValueError: there is no such experiment, method, setting or entry of the configuration; says which there are.
        OSError: `config` cannot be read.
        MissingExtraError: the experiment's package or tqdm is not installed.
    """
    chosen = get_experiment(experiment)
    parsed = [parse_method(name) for name in methods or chosen.methods]
    plan = Plan(
        experiment=chosen,
        settings=tuple(settings or chosen.settings),
        methods=tuple(sorted(dict.fromkeys(parsed), key=lambda method: method.phi == "fixed")),  # they need the learned
        seeds=tuple(sorted(set(seeds))),
        overrides=_overrides(config, changes),
        out=out,
        resume=resume,
    )
    for setting in plan.settings:
        own = run_config(chosen, setting, plan.overrides)
        for method in plan.methods:
            if not method.is_combiner:
                make_method_weighting(method, own, len(chosen.loss_names))
    for package in (chosen.package, ("tqdm", "tqdm")):
        if package is not None:
            import_extra(*package)
    return plan


def run_plan(plan: Plan) -> None:
    """Makes the runs, and prints what they scored.

    Raises:
        RunError: see `train_run`; all runs before it are finished.
    """
    runs = train_all(plan)
    for section in sections(runs):
        print(f"\n{describe(section)}")
    found = findings(plan.experiment, runs)
    if found:
        print(f"\n{describe_findings(found)}")
    print(f"\nPictures, and what happened in training:  auxfast report {plan.out / plan.experiment.name}")


def list_experiments() -> None:
    """One line each."""
    width = max(map(len, EXPERIMENTS))
    for name, experiment in EXPERIMENTS.items():
        print(f"{name.ljust(width)}  {experiment.title}")


def _overrides(config: Path | None, changes: Sequence[str]) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    if config is not None:
        toml = _toml()
        try:
            tables = toml.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:  # of TOML, or of the encoding
            raise ValueError(f"{config} is not TOML: {error}") from error
        for section, entries in tables.items():  # dotted, so that a change does not replace a whole section
            dotted = isinstance(entries, dict)
            overrides.update({f"{section}.{key}": e for key, e in entries.items()} if dotted else {section: entries})
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"--set: got {change!r}, must be key=value, such as train.inner_steps=10")
        overrides[key.strip()] = _toml_value(text.strip())
    return overrides


def _toml_value(text: str) -> Any:
    toml = _toml()
    try:
        return toml.loads(f"value = {text}")["value"]
    except toml.TOMLDecodeError:
        return text


def _toml() -> Any:
    module = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    return import_extra(module, module)


def train_all(plan: Plan) -> list[RunFolder]:
    """Makes the runs. Seed by seed, so that an interrupted comparison has the same seeds of all methods."""
    experiment, tqdm = plan.experiment, import_extra("tqdm", "tqdm").tqdm
    wanted = [(setting, seed, method) for setting in plan.settings for seed in plan.seeds for method in plan.methods]
    for setting, seed, method in wanted:
        if not plan.resume:
            check_new(run_path(plan.out, experiment, setting, method, seed))
        if method.phi == "fixed" and replace(method, phi="learned") not in plan.methods:
            learned_run(plan.out, experiment, setting, method)
    steps = {s: run_config(experiment, s, plan.overrides).train.outer_steps for s in plan.settings}
    runs, done = [], 0
    with tqdm(total=sum(steps[setting] for setting, _, _ in wanted), unit="outer step", dynamic_ncols=True) as bar:

        def show(record: OuterRecord) -> None:
            bar.set_postfix(progress(record, experiment.loss_names), refresh=False)
            bar.update(done + record.step + 1 - bar.n)

        for setting, seed, method in wanted:
            names = [experiment.name, *([setting] if setting else []), f"seed {seed}", method.name]
            bar.set_description(", ".join(names), refresh=False)
            runs.append(
                train_run(
                    experiment,
                    setting,
                    method,
                    seed,
                    plan.out,
                    overrides=plan.overrides,
                    resume=plan.resume,
                    on_outer_step=show,
                )
            )
            done += steps[setting]
            bar.update(done - bar.n)
    return runs


def progress(record: OuterRecord, loss_names: Sequence[str]) -> dict[str, str]:
    """What the progress bar shows: losses, the two largest weights, and how the outer step went."""
    values = {"training": record.training_loss, "outer": record.outer_loss, "residual": record.residual}
    shown = {name: f"{value:.3g}" for name, value in values.items() if value is not None}
    weights = sorted(zip(record.loss_weights, loss_names, strict=True), key=lambda pair: -pair[0])
    shown["weights"] = ", ".join(f"{name}: {weight:.2f}" for weight, name in weights[:2])
    if record.outer_loss is not None:
        shown["outer time"] = f"{record.outer_seconds / (record.inner_seconds + record.outer_seconds):.0%}"
    return shown
