"""The programs of the migration page run, AuxiLearn's with nothing but their imports changed, and do what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from auxfast.nn import Combiner

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compat.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
BEFORE, AFTER = 1, 2
both = pytest.mark.parametrize("version", [BEFORE, AFTER])


def run(example: int, version: int) -> dict[str, Any]:
    """The names that an example leaves behind, and the outer loss from which it started as `start`."""
    setup, program = PROGRAMS[3 * example], PROGRAMS[3 * example + version]
    assert ("from auxilearn." in program) == (version == BEFORE)
    program = re.sub(r"^from auxilearn\.", "from auxfast.compat.auxilearn.", program, flags=re.MULTILINE)
    names: dict[str, Any] = {}
    exec(compile(setup, str(PAGE), "exec"), names)
    names["start"] = names["outer_loss"]().item()
    exec(compile(program, str(PAGE), "exec"), names)
    return names


def test_the_page_has_three_examples():
    assert len(PROGRAMS) == 9


@both
def test_combining_losses(version, capsys):
    names = run(0, version)
    _, helpful, harmful = next(names["combiner"].parameters()).flatten().tolist()
    assert harmful < 0.1 < 1 < helpful
    assert names["outer_loss"]() < 0.01 * names["start"]
    assert "tensor" in capsys.readouterr().out


@both
def test_losses_of_pixels(version):
    names = run(1, version)
    losses = names["losses"]().detach().requires_grad_()
    names["combiner"](losses).backward()
    _, helpful, harmful = losses.grad.sum((0, 2, 3)).tolist()
    assert helpful > harmful
    assert names["outer_loss"]() < 0.5 * names["start"]
    combiner = names["combiner"]
    parts = combiner.layers() if isinstance(combiner, Combiner) else combiner.state_dict()
    assert all((part >= 0).all() for name, part in parts.items() if name.endswith("weight"))


@both
def test_learned_labels(version):
    names = run(2, version)
    assert names["outer_loss"]() < names["start"]
    labels = names["generator"](names["x"]).argmax(1)
    assert len(labels.unique()) > 1
