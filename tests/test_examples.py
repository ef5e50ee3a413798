"""What the examples say they show. `.ci/run` runs each of them for a moment, too."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NUMBER = r"(\d\S*\d|nan|inf)"


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(name, *arguments)` gives what an example prints."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_gradients_explode_unless_they_are_clipped(run):
    printed = run("exploding.py", "--steps", "20")
    found = re.findall(rf"clipping ([\w ]+): loss {NUMBER} at first, {NUMBER} at last", printed)
    losses = {name: (float(first), float(last)) for name, first, last in found}
    assert losses.keys() == {"none", "by norm", "by value"}
    assert len({first for first, _ in losses.values()}) == 1
    first, last = losses["none"]
    assert last > 1000 * first
    for name in ("by norm", "by value"):
        assert losses[name][1] < 2 * first, name
    norms = [float(norm) for norm in re.findall(rf"\d+: {NUMBER}", printed)]
    assert norms == sorted(norms)
    assert norms[-1] > 10 * norms[0]


def test_a_cell_of_ones_own_learns(run):
    printed = run("minimal_gated_unit.py", "--steps", "120")
    errors = [float(error) for error in re.findall(rf"mean squared error {NUMBER}", printed)]
    assert len(errors) == 4
    # Whoever answers t/2T, seeing nothing, is off by t/4T^2 in the mean of squares: 1/8T.
    assert errors[-1] < 0.5 * (1 / (8 * 30)) < errors[0]
