"""The README's program runs and does what the README says of it."""

import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_example_finds_the_harmful_auxiliary(capsys):
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(program, str(README), "exec"), names)
    _, helpful, harmful = names["combiner"].loss_weights(names["losses"]())[0].tolist()
    assert harmful < 0.1 < 1 < helpful
    assert names["stats"].residual < 0.01
    assert "tensor" in capsys.readouterr().out
