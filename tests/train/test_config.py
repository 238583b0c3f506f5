import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Literal

import pytest
import torch

from auxfast.solvers import BlockDiagonal, ConjugateGradient, Dense, Jacobi, Neumann, Nystrom, OneStep
from auxfast.train import CombinerConfig, Component, RunConfig
from auxfast.train.optimizers import OPTIMIZERS, SCHEDULERS
from auxfast.train.serialization import SOLVERS, flattened, override, to_table
from train.problems import NoisyOptions, train_config


@dataclass(frozen=True)
class Options(NoisyOptions):
    sizes: tuple[int, ...] = (1, 2)
    kind: Literal["easy", "hard"] = "easy"
    limit: float | None = None


CONFIG = RunConfig(train_config(), weighting={"equal": {"auxiliary_weight": 0.2}}, task=Options())


# --------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("outer_steps", 0, "an integer of at least 1"),
        ("inner_steps", 2.5, "an integer of at least 1"),
        ("checkpoint_every", -1, "an integer of at least 1"),
        ("threads", True, "an integer of at least 1"),
        ("threads", 2**40, "at most 1024"),
        ("patience", 0, "an integer of at least 1"),
        ("weight_decay", -1e-3, "a finite number of at least 0"),
        ("weight_decay", math.nan, "a finite number of at least 0"),
        ("max_inner_grad_norm", 0.0, "a finite number above 0"),
        ("max_outer_grad_norm", math.inf, "a finite number above 0"),
        ("outer_set", "test", "'auxiliary' or 'training'"),
        ("device", "toaster", "a device of torch"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(name, value, allowed):
    with pytest.raises(ValueError, match=rf"train\.{name}: got {value!r}, must be {allowed}"):
        train_config(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden", ()),
        ("channels", (4, 0)),
        ("degree", 0),
        ("initial_weight", -1.0),
        ("positive", "log"),
        ("weight_decay", 0.1),
    ],
)
def test_combiners_that_cannot_be_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"combiner\.{name}: got .*, must be"):
        CombinerConfig(**{name: value})


@pytest.mark.parametrize(
    ("component", "message"),
    [
        (Component("Sgd"), "inner_optimizer.name: got 'Sgd'; must be one of .*Adam.*SGD"),
        (Component("LBFGS"), "inner_optimizer.name: got 'LBFGS', which needs a closure; must be one of"),
        (
            Component("SGD", {"learning_rate": 1}),
            "inner_optimizer.learning_rate: not an option of SGD, which has lr, mo",
        ),
        (
            Component("SGD", {"lr": -1.0}),
            "inner_optimizer: SGD cannot be made with {'lr': -1.0}: Invalid learning rate",
        ),
        (Component("AdamW", {"weight_decay": 0.1}), "inner_optimizer.weight_decay: the trainer sets it to 0"),
        (Component("Adm"), r"inner_optimizer.name: got 'Adm' \(did you mean Adam or .*\?\); must be one of"),
        (Component("sgd"), r"inner_optimizer.name: got 'sgd'; must be one of"),
        (Component("SGD", {"lr": math.nan}), "inner_optimizer.lr: got nan, must be finite"),
        (Component("Adam", {"eps": math.inf}), "inner_optimizer.eps: got inf, must be finite"),
        (Component("Adam", {"betas": (math.nan, 0.9)}), r"inner_optimizer.betas: got \(nan, 0.9\), must be finite"),
        (
            Component("Adam", {"betas": (0.9, 1.0)}),
            "inner_optimizer: Adam cannot be made with .*Invalid beta parameter",
        ),
        (Component("Adam", {"betas": 0.9}), "inner_optimizer: Adam cannot be made with {'betas': 0.9}: TypeError: "),
        (Component("Adam", {"betas": (0.9,)}), "inner_optimizer: Adam cannot be made with .*: IndexError: "),
        (Component("SGD", {"lr": "fast"}), "inner_optimizer.lr: got 'fast', must be a number"),
        (Component("SGD", {"momentum": True}), "inner_optimizer.momentum: got True, must be a number"),
        (Component("SGD", {"nesterov": 1}), "inner_optimizer.nesterov: got 1, must be true or false"),
        (Component("SGD", {"differentiable": True}), "inner_optimizer: SGD cannot be made with .* in-place operation"),
    ],
)
def test_optimizers_that_cannot_be_are_refused_with_what_is_allowed(component, message):
    with pytest.raises(ValueError, match=message):
        train_config(inner_optimizer=component)
    with pytest.raises(ValueError, match=message.replace("inner", "outer", 1)):
        train_config(outer_optimizer=component)


@pytest.mark.parametrize(
    ("component", "message"),
    [
        (
            Component("LambdaLR"),
            "inner_scheduler.name: got 'LambdaLR', which needs a function; must be one of .*StepLR",
        ),
        (Component("StepLR"), "inner_scheduler: StepLR cannot be made with {}: .*step_size"),
        (
            Component("StepLR", {"steps": 3}),
            "inner_scheduler.steps: not an option of StepLR, which has step_size, gamma",
        ),
    ],
)
def test_schedulers_that_cannot_be_are_refused_with_what_is_allowed(component, message):
    with pytest.raises(ValueError, match=message):
        train_config(inner_scheduler=component)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("StepLR", {"step_size": 0}),
        ("CosineAnnealingLR", {"T_max": 0}),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.2, "step_size_up": 0}),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.2, "step_size_up": 0, "step_size_down": 2}),
        ("CosineAnnealingWarmRestarts", {"T_0": 0}),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 500, "div_factor": 0}),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 2, "pct_start": 0.5}),
        ("ConstantLR", {"factor": 0}),  # divides at its last step only
        ("PolynomialLR", {"total_iters": 300, "power": -1}),
        ("StepLR", {"step_size": "x"}),
        ("StepLR", {"step_size": 3, "gamma": "x"}),
        ("MultiStepLR", {"milestones": 3}),
        ("ExponentialLR", {"gamma": 1e308}),
    ],
)
def test_schedulers_that_fail_in_the_course_of_the_run_are_refused_before_it(name, options):
    with pytest.raises(
        ValueError, match=r"train\.inner_scheduler(\.gamma: got 'x'|: \w+ cannot be made with )"
    ) as caught:
        train_config(inner_scheduler=Component(name, options))
    assert "\n" not in str(caught.value)


def test_a_cycle_that_is_shorter_than_the_run_is_refused_unless_the_run_may_stop_before():
    one_cycle = Component("OneCycleLR", {"max_lr": 0.1, "total_steps": 399})
    with pytest.raises(ValueError, match="its total_steps are 399, and the run takes 400 inner steps"):
        train_config(inner_scheduler=one_cycle)
    assert train_config(inner_scheduler=one_cycle, patience=3)
    assert train_config(inner_scheduler=Component("OneCycleLR", {"max_lr": 0.1, "total_steps": 400}))


def test_only_classes_that_can_be_made_are_offered():
    assert {"SGD", "Adam", "AdamW", "RMSprop"} <= OPTIMIZERS.keys()
    assert {"StepLR", "CosineAnnealingLR", "OneCycleLR"} <= SCHEDULERS.keys()
    assert not {"Optimizer", "LBFGS"} & OPTIMIZERS.keys()
    assert not {"LRScheduler", "ReduceLROnPlateau"} & SCHEDULERS.keys()


@pytest.mark.parametrize("options", [{"lookahead": True}, {"mixed": "difference"}])
def test_one_step_at_other_parameters_is_refused(options):
    with pytest.raises(ValueError, match=r"train\.solver: got OneStep.*must have lookahead=False and mixed='exact'"):
        train_config(solver=OneStep(0.1, **options))


def test_an_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match=r"weighting\.same: no such weighting, must be one of stl, equal"):
        RunConfig(train_config(), weighting={"same": {}})


# ------------------------------------------------------------------------------------------------------------- tables


NEEDED = {"Neumann": {"step_size": 0.1}, "OneStep": {"lr": 0.1}, "SingleLoop": {"step_size": 0.1}}


def _solver(name):
    return SOLVERS[name](**NEEDED.get(name, {}))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_table_holds_everything(name):
    config = RunConfig(
        train_config(
            solver=_solver(name),
            inner_optimizer=Component("Adam", {"lr": 0.01, "betas": (0.8, 0.9)}),
            inner_scheduler=Component("MultiStepLR", {"milestones": (3, 5)}),
            patience=3,
        ),
        CombinerConfig(hidden=(4,)),
        {"dwa": {"period": 5}},
        Options(sizes=(5,), kind="hard", limit=2.0),
    )
    table = json.loads(json.dumps(to_table(config)))
    assert override(config, table) == config
    other = RunConfig(train_config(), task=Options())
    assert override(other, table) == config


def test_a_solver_that_a_table_cannot_hold_is_refused_with_the_names_of_those_that_it_can():
    config = RunConfig(replace(train_config(), solver=BlockDiagonal()))
    with pytest.raises(ValueError, match=r"train.solver: got no name, must be a table .*, of Neumann, Chebyshev, "):
        override(config, {})


def test_the_solver_s_table_of_an_older_version_has_no_certify():
    table = {"name": "Neumann", "steps": 3, "step_size": 0.05, "tol": None, "damping": 0.0, "warm_start": False}
    assert override(CONFIG, {"train.solver": table}).train.solver == Neumann(3, 0.05)
    changed = override(CONFIG, {"train.solver": {**table, "certify": False}})
    assert changed.train.solver == Neumann(3, 0.05, certify=False)
    assert to_table(changed)["train"]["solver"]["certify"] is False


@pytest.mark.parametrize("preconditioner", [Jacobi(probes=4), Nystrom(rank=3), None])
def test_a_table_holds_the_solver_s_preconditioner(preconditioner):
    config = train_config(solver=ConjugateGradient(preconditioner=preconditioner))
    assert override(train_config(), json.loads(json.dumps(to_table(config)))) == config


def test_tables_and_dotted_keys_change_entries():
    changed = override(
        CONFIG,
        {
            "train": {"inner_steps": 5, "inner_optimizer": {"lr": 0.2}, "patience": 4},
            "train.solver.steps": 7,
            "train.max_outer_grad_norm": "none",
            "labels.combiner": "none",
            "combiner.hidden": [3],
            "weighting.equal.auxiliary_weight": 1,
            "weighting.dwa": {"period": 9},
            "task": {"sizes": [4, 5], "limit": 2, "kind": "hard"},
        },
    )
    assert changed.train.inner_steps == 5
    assert changed.train.inner_optimizer == Component("SGD", {"lr": 0.2, "momentum": 0.9})
    assert changed.train.patience == 4
    assert changed.train.solver == Neumann(steps=7, step_size=0.05)
    assert changed.train.max_outer_grad_norm is None
    assert changed.labels.combiner is None
    assert changed.train.outer_optimizer == CONFIG.train.outer_optimizer
    assert changed.combiner.hidden == (3,)
    assert changed.weighting == {"equal": {"auxiliary_weight": 1}, "dwa": {"period": 9}}
    assert changed.task == Options(sizes=(4, 5), kind="hard", limit=2.0)
    assert type(changed.task.limit) is float
    assert CONFIG.weighting == {"equal": {"auxiliary_weight": 0.2}}


@pytest.mark.parametrize(
    "given", [{"train.solver": {"name": "Dense"}}, {"train.solver.name": "Dense"}, {"train": {"solver": "Dense"}}]
)
def test_another_name_is_another_component(given):
    assert override(CONFIG, given).train.solver == Dense()


def test_options_come_after_the_name():
    changed = override(CONFIG, {"train.inner_optimizer.name": "Adam", "train.inner_optimizer.lr": 0.01})
    assert changed.train.inner_optimizer == Component("Adam", {"lr": 0.01})
    changed = override(CONFIG, {"train.solver": {"name": "ConjugateGradient"}, "train.solver.preconditioner": "Jacobi"})
    assert changed.train.solver == ConjugateGradient(preconditioner=Jacobi())
    assert override(changed, {"train.solver.preconditioner.probes": 3}).train.solver.preconditioner == Jacobi(probes=3)
    assert override(changed, {"train.solver.preconditioner": "none"}).train.solver == ConjugateGradient()


def test_objects_are_taken_as_they_are():
    changed = override(
        CONFIG, {"train.solver": Dense(), "train.inner_scheduler": Component("StepLR", {"step_size": 2})}
    )
    assert changed.train.solver == Dense()
    assert override(changed, {"train.inner_scheduler": None}) == override(CONFIG, {"train.solver": Dense()})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"training.steps": 3}, "training: no such entry, must be one of train, combiner, weighting, task"),
        ({"train.step": 3}, "train.step: no such entry, must be one of outer_steps, inner_steps"),
        ({"train.inner_steps.more": 3}, "train.inner_steps.more: no such entry"),
        ({"train.inner_steps": "ten"}, "train.inner_steps: got 'ten', must be an integer"),
        ({"train.inner_steps": 2.5}, "train.inner_steps: got 2.5, must be an integer"),
        ({"train.inner_steps": True}, "train.inner_steps: got True, must be an integer"),
        ({"train.inner_steps": 0}, "train.inner_steps: got 0, must be an integer of at least 1"),
        ({"train.amp": 1}, "train.amp: got 1, must be true or false"),
        ({"train.patience": "never"}, "train.patience: got 'never', must be an integer or \"none\""),
        ({"train": 3}, "train: got 3, must be a table"),
        ({"train.outer_set": "test"}, 'train.outer_set: got \'test\', must be "auxiliary" or "training"'),
        ({"train.solver": {"name": "Neuman"}}, "train.solver.name: got 'Neuman', must be one of Neumann, Chebyshev"),
        ({"train.solver.step": 3}, "train.solver.step: not an option of Neumann, which has steps, step_size"),
        ({"train.solver.steps": "ten"}, "train.solver.steps: got 'ten', must be an integer"),
        ({"train.solver.steps": 0}, "train.solver: steps must be an integer of at least 1, not 0"),
        ({"train.solver": 3}, r"train.solver: got 3, must be a table"),
        ({"train.solver": Component("SGD")}, r"train.solver: got Component.*, must be a table"),
        ({"train.inner_optimizer": Dense()}, r"train.inner_optimizer: got Dense.*, must be a table"),
        ({"train.solver.warm_start": "none"}, "train.solver.warm_start: got 'none', must be true or false"),
        ({"train.solver": "none"}, "train.solver.name: got 'none', must be one of"),
        ({"train.inner_scheduler.gamma": 3}, r"train.inner_scheduler: got no name, must be a table"),
        ({"train.inner_optimizer.rate": 3}, "train.inner_optimizer.rate: not an option of SGD"),
        ({"combiner.hidden": 3}, "combiner.hidden: got 3, must be a list, each entry an integer"),
        ({"combiner.hidden": ["x"]}, "combiner.hidden: got 'x', must be an integer"),
        ({"weighting": 3}, "weighting: got 3, must be a table"),
        ({"weighting.equal": 3}, "weighting.equal: got 3, must be a table"),
        ({"task": "none"}, "task: got 'none', must be a table"),
        ({"train.solver": None}, r"train.solver: got None, must be a table"),
        ({"train.device": {}}, "train.device: got {}, must be a string"),
        ({"task.kind": "odd"}, 'task.kind: got \'odd\', must be "easy" or "hard"'),
        ({"task.limit": "x"}, "task.limit: got 'x', must be a number or \"none\""),
        ({"task.limit": math.inf}, "task.limit: got inf, must be finite"),
        ({"weighting.gcs.weighted": [math.nan, 1]}, "weighting.gcs.weighted: got nan, must be finite"),
        ({"weighting.dwa.period": date(2026, 1, 1)}, "weighting.dwa.period: got 2026-01-01, must be a number, true or"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(given, message):
    with pytest.raises(ValueError, match=message):
        override(CONFIG, given)


def test_a_diagonal_of_tensors_cannot_be_in_a_table():
    solver = ConjugateGradient(preconditioner=Jacobi(diagonal=[torch.ones(1)]))
    with pytest.raises(ValueError, match="a table cannot hold Jacobi's diagonal"):
        to_table(train_config(solver=solver))


def test_an_experiment_without_options_says_so():
    with pytest.raises(ValueError, match="task: this experiment has no options"):
        override(RunConfig(train_config()), {"task.shots": 3})


def test_nested_tables_are_flattened_to_dotted_keys():
    assert flattened({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}


_WITHOUT_CATTRS = """
import sys
sys.modules["cattrs"] = None  # importing it raises
from auxfast.train import RunConfig, Trainer, make_training_loss, override, parse_method
from train.problems import OneWeight, train_config
task, config = OneWeight(), RunConfig(train_config(outer_steps=2))
Trainer(task, make_training_loss(parse_method("linear"), config, task), config.train, seed=0).run()
override(config, {"train.outer_steps": 3})
"""


@pytest.mark.slow
def test_without_cattrs_the_trainer_trains_and_tables_say_what_to_install():
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    command = [sys.executable, "-W", "error", "-c", _WITHOUT_CATTRS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: cattrs is not installed, and configurations in tables need it. Get it with: pip install "
        "cattrs"
    )
