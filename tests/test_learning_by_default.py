"""The first programs of the documentation learn with any combiner and seed, and nothing is tuned for it."""

from __future__ import annotations

import re

import pytest
from pages import DOCS, ROOT, fenced

COMBINERS = (
    "LinearCombiner(3, main=0)",
    "LinearCombiner(3)",
    "DeepLinearCombiner(3)",
    "NonlinearCombiner(3)",
    "NonlinearCombiner(3, (10, 10))",
    "PolynomialCombiner(3)",
)
ANY_SIGN = (
    "LinearCombiner(3, monotone=False)",
    "NonlinearCombiner(3, monotone=False)",
    "PolynomialCombiner(3, monotone=False)",
)
OUTER_STEP = re.compile(r"^ *outer\.step\(.*$", re.MULTILINE)
EVERY = pytest.mark.parametrize("combiner", COMBINERS)
SEEDS = [2, 7, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(20) if seed not in (2, 7))]
MANY = pytest.mark.parametrize("seed", SEEDS)
ERROR = 0.01  # of the quickstart's network on held-out samples, at most


def changed(program: str, combiner: str, seed: int) -> str:
    """The program with another combiner and another seed."""
    assert program.count("LinearCombiner(3, main=0)") == program.count("torch.manual_seed(0)") == 1
    return program.replace("LinearCombiner(3, main=0)", combiner).replace("manual_seed(0)", f"manual_seed({seed})")


def quickstart(combiner: str, seed: int, *, learn: bool = True) -> dict:
    """The names that the quickstart's first two programs define, with its outer steps or without."""
    program = changed("\n".join(fenced(DOCS / "quickstart.md", "python")[:2]), combiner, seed)
    assert len(OUTER_STEP.findall(program)) == 1
    names: dict = {}
    exec(program if learn else OUTER_STEP.sub("        pass", program), names)
    return names


@pytest.mark.parametrize("combiner", [*COMBINERS, *ANY_SIGN])
def test_without_learning_the_quickstart_ends_badly(combiner):
    assert quickstart(combiner, 0, learn=False)["held_out_loss"]() > 2 * ERROR


@EVERY
@MANY
def test_the_quickstart_ends_well(combiner, seed):
    learned = quickstart(combiner, seed)
    assert learned["held_out_loss"]() < ERROR
    weights = learned["combiner"].mean_weights(learned["losses"]().detach())
    main, helpful, harmful = weights.tolist()
    assert harmful < 0.2 * helpful
    assert 0.1 < main + helpful < 10  # nothing has died or exploded
    assert learned["outer"].skipped_steps == 0


@pytest.mark.filterwarnings("ignore:The weights of all auxiliary losses")  # they may pass 0 on their way
@pytest.mark.parametrize("combiner", ANY_SIGN)
@MANY
def test_the_quickstart_ends_well_with_weights_of_both_signs(combiner, seed):
    learned = quickstart(combiner, seed)
    assert learned["held_out_loss"]() < ERROR
    assert learned["outer"].skipped_steps == 0
    assert "grown" not in learned["outer"].watch.noticed


# On its 100 samples and 30 features a polynomial combiner may lead astray, of which HyperOptimizer warns then.
@pytest.mark.parametrize("combiner", COMBINERS[:-1])
@pytest.mark.parametrize("seed", SEEDS[:8])
def test_the_first_example_ends_better_than_without_learning(combiner, seed):
    program = changed((ROOT / "examples" / "auxiliary_losses.py").read_text(), combiner, seed)
    names: dict = {"__name__": "example"}
    exec(program, names)
    learned, _ = names["train"]("learned weights")
    names["STEPS_PER_OUTER_STEP"] = names["STEPS"] + 1
    frozen, _ = names["train"]("learned weights")
    assert learned < 0.8 * frozen
