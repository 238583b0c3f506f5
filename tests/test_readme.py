"""The README's programs run and do what the README says of them."""

import re
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parent.parent / "README.md"


def run(number: int) -> dict[str, Any]:
    """The names that a program of the README leaves behind."""
    program = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[number]
    names: dict[str, Any] = {}
    exec(compile(program, str(README), "exec"), names)
    return names


def test_the_first_program_finds_the_harmful_auxiliary(capsys):
    names = run(0)
    _, helpful, harmful = names["combiner"].loss_weights(names["losses"]())[0].tolist()
    assert harmful < 0.1 < 1 < helpful
    assert names["stats"].residual < 0.01
    assert "tensor" in capsys.readouterr().out


def test_the_second_program_tunes_decays_example_weights_and_a_mix(capsys):
    names = run(1)
    decay, weights = names["log_decay"].exp(), names["example_logits"].softmax(0)
    assert decay[3:].median() > 10 * decay[:3].max()
    assert weights[:20].sum() < 0.15
    assert names["mix"].item() != 0
    assert names["outer_loss"]() < 1e-3
    assert names["stats"].converged
    assert "tensor" in capsys.readouterr().out
