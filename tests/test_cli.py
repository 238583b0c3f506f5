"""The commands but for `auxfast train`, `auxfast report` and what `auxfast demo` computes: see tests/train."""

import os
import re
import subprocess
import sys

import pytest
import torch

import auxfast
from auxfast.cli import main


def test_no_command_shows_how_to_use_it(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "usage: auxfast" in capsys.readouterr().err


def test_info_says_what_a_bug_report_needs(capsys):
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    for line in (
        f"auxfast: {auxfast.__version__}",
        f"torch: {torch.__version__}",
        "cpu: native",
        f"cpu_kernels_in_use: {auxfast.build_info()['cpu_kernels_in_use']}",
    ):
        assert f"  {line}\n" in output
    packages = ("numpy", "scipy", "scikit-learn", "matplotlib", "cattrs", "jinja2")
    for name in ("python", *packages, "model", "driver", "devices", "compiler"):
        assert re.search(rf"^  {name}: \S", output, re.MULTILINE)


def test_as_a_module_and_without_the_extras():
    """`python -m auxfast info`, with every optional package hidden; importing auxfast loads none of them."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys('sklearn skimage scipy matplotlib tqdm jinja2 cattrs'.split())); "
        "import auxfast, runpy; sys.argv = ['auxfast', 'info']; runpy.run_module('auxfast', run_name='__main__')"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "kernels:" in done.stdout
