"""The grid for pytest-benchmark: `pytest bench --benchmark-only`, compared from run to run."""

from __future__ import annotations

import pytest

from bench.cases import CELLS, GRID
from bench.peers import fastrnn
from fastrnn.parallel import get_num_threads

pytest.importorskip("pytest_benchmark")


@pytest.mark.parametrize("case", GRID, ids=lambda case: case.name)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("mode", ["training", "inference", "calling"])
def test_speed(benchmark, mode, cell, case):
    step, _ = getattr(fastrnn, mode)(case, cell, "float32", get_num_threads())
    step()
    benchmark(step)
