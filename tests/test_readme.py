"""The README's first screen is the quickstart's program, and nothing that the README points to is missing."""

from __future__ import annotations

import re

from pages import DOCS, README, ROOT, fenced, run

QUICKSTART = DOCS / "quickstart.md"
PROBLEM, LOOP, *_ = fenced(QUICKSTART, "python")
(DIFF,) = fenced(README, "diff")


def side(mark: str) -> str:
    """One side of the diff: "-" is the normal training loop, "+" the one with auxfast."""
    return "".join(line[2:] + "\n" for line in DIFF.splitlines() if line[:1] in (mark, " ", ""))


def code(text: str) -> list[str]:
    """Lines without their comments, and without blank ones."""
    lines = [re.sub(r"\s*#.*", "", line) for line in text.splitlines()]
    return [line for line in lines if line]


def test_the_diff_is_the_loop_of_the_quickstart():
    assert code(side("+")) == code(LOOP)


def test_the_diff_adds_six_lines_to_a_normal_loop_that_runs():
    assert sum(line.startswith("+") for line in DIFF.splitlines()) == 6
    names = run(QUICKSTART, [PROBLEM, side("-")])
    assert "auxfast" not in names
    assert names["held_out_loss"]() > 0.1  # the harmful auxiliary has done its harm


def test_the_program_with_the_six_lines_finds_the_harmful_auxiliary():
    names = run(QUICKSTART, [PROBLEM, side("+")])
    _, helpful, harmful = names["combiner"].mean_weights(names["losses"]().detach()).tolist()
    assert harmful < 0.1 < 1 < helpful
    assert names["held_out_loss"]() < 0.01


def test_first_screen_shows_what_to_type():
    lines = README.read_text().splitlines()
    assert lines.index("```diff") < 10
    assert len(lines) <= 120


def test_links_lead_to_files():
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", README.read_text())
    assert "docs/quickstart.md" in links
    assert [link for link in links if not (ROOT / link).exists()] == []
