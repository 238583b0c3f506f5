"""Several processes can share the batches of the experiments: their parts are the whole."""

import pytest

from auxfast.experiments.base import plan_run, run_config
from auxfast.experiments.paper import EXPERIMENTS
from auxfast.train import check_task, parse_method
from auxfast.train.recording import draw_task


@pytest.mark.parametrize(
    "name", ["illustrative", "noisy-auxiliaries", "diabetes", "digits", "digits-labels", "weight-decay"]
)
def test_the_parts_of_an_experiments_batches_are_the_whole(name, tmp_path):
    experiment = EXPERIMENTS[name]
    if experiment.package:
        pytest.importorskip(experiment.package[0])
    setting = next(iter(experiment.settings))
    plan = plan_run(experiment, setting, parse_method("linear"), 0, tmp_path, run_config(experiment, setting))
    check_task(draw_task(plan), processes=2)
