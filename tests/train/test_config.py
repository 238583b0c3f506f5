import math

import pytest

from auxfast.solvers import Neumann
from auxfast.train import TrainConfig

GOOD = {
    "outer_steps": 2,
    "inner_steps": 3,
    "inner_lr": 0.1,
    "outer_lr": 0.2,
    "solver": Neumann(steps=2, step_size=0.1),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("outer_steps", 0),
        ("inner_steps", -1),
        ("inner_lr", 0.0),
        ("inner_lr", math.nan),
        ("outer_lr", math.inf),
        ("inner_momentum", 1.0),
        ("outer_momentum", -0.1),
        ("weight_decay", -1e-3),
        ("max_grad_norm", 0.0),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}: got {value}, must be .* 0 and below"):
        TrainConfig(**{**GOOD, name: value})


def test_no_momentum_and_no_decay_are_fine():
    config = TrainConfig(**GOOD, inner_momentum=0.0, outer_momentum=0.0, weight_decay=0.0)
    assert config.inner_steps == 3
