import pytest

from auxfast.train.experiments.base import METHODS
from auxfast.train.figure import draw_report

pytest.importorskip("matplotlib")


def _method(method, seeds, losses):
    history = {
        "training_loss": [1.0, 0.5],
        "outer_loss": [1.0, 0.9],
        "residual": [0.5, None],  # None: was not finite
        "loss_weights": [[1.0] * losses, [0.5] * losses],
    }
    filled = {"label": method.label, "scores": [50.0] * seeds, "mean": 50.0, "sem": 1.0 if seeds > 1 else None}
    filled["paired difference to stl"] = {"mean": -1.0, "sem": filled["sem"]}
    return {**filled, "history": [history] * seeds} if method.learned else filled


@pytest.mark.parametrize(("seeds", "losses"), [(1, 2), (3, 4), (2, 9)])
def test_any_number_of_seeds_and_losses_can_be_drawn(tmp_path, seeds, losses):
    experiment = {
        "title": "Title",
        "score": "R2 x 100",
        "losses": [f"loss {j}" for j in range(losses)],
        "methods": {method.name: _method(method, seeds, losses) for method in METHODS},
    }
    path = tmp_path / "report.png"
    draw_report(path, {"seeds": list(range(seeds)), "experiments": {"one": experiment}})
    assert path.read_bytes().startswith(b"\x89PNG")
