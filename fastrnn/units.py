"""Slices of the hidden units: how threads share one step of a sequence.

A slice has whole panels of each gate. Weights are packed gate by gate for that (`apart`), and a
product with them is one of the units of each gate. Without slices it is one of all columns.
"""

from __future__ import annotations

from typing import Any

from fastrnn.gemm import multiply
from fastrnn.jit import helper
from fastrnn.parallel import get_num_threads, parts_for
from fastrnn.simd import at, lanes
from fastrnn.tile import COLS

# Multiply-adds of a step from which threads share it, bytes of weights that do not stay in the
# second-level cache, and sequences of a thread that make up for reading them.
_SHARED = 1 << 15
_LARGE = 1 << 20
_FEW = 12


def parts_of_units(cell: Any, steps: int, batch: int, size: int, dtype: Any) -> int:
    """How many threads are to share the units of a step, rather than the sequences: if above 1.

    They do where there are fewer sequences than threads, and where weights that do not stay in the
    second-level cache would be read by each thread for a few sequences. Never where a step needs
    all units at once, for a projection or to normalise them.
    """
    if cell.projected or cell.normed:
        return 1
    threads = get_num_threads()
    weights = cell.gates * size * size
    panels = -(-size // (COLS * lanes(dtype)))
    parts = min(threads, panels)
    few = weights * dtype.itemsize > _LARGE and batch < _FEW * threads
    if batch * weights < _SHARED or parts < min(threads, batch) or not (batch < threads or few):
        return 1
    return parts_for(steps * batch * weights, parts)


@helper
def units_of(part, parts, size, w):
    """(first, end) of a slice, in whole registers."""
    wide = COLS * w
    panels = (size + wide - 1) // wide
    run = (size + w - 1) // w * w
    return panels * part // parts * wide, min(run, panels * (part + 1) // parts * wide)


@helper
def multiply_units(
    apart, runs, run, low, high, groups, m, k, a, a_row, a_group, p, init, init_row,
    c, c_row, c_group,
):  # fmt: skip
    """`multiply` for the units from `low` to `high` of each of the runs, whose panels are `apart`.

    Otherwise all runs together have panels, and the units are all there are.
    """
    pieces = runs if apart else 1
    n = high - low if apart else runs * run
    for piece in range(pieces):
        left = piece * run + low
        multiply(
            groups, m, n, k, a, a_row, a_group, at(p, left * k), at(init, left), init_row,
            at(c, left), c_row, c_group,
        )  # fmt: skip
