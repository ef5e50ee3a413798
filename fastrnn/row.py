"""A row of a step, one sequence's: how its sums begin, and the two halves of the cell.

s is the row, at its first register; `low` to `high` (or `end`, without padding) are the units of a
part, `run` is Hp; places in other arrays count elements.
"""

from __future__ import annotations

from fastrnn.cells.cell import (
    gates,
    load_carry,
    load_tape,
    load_vectors,
    of_x,
    output,
    store_runs,
    sums_of,
)
from fastrnn.jit import helper
from fastrnn.simd import load, load_n, store, store_n, width_of


@helper
def gather_input(cell, low, high, run, w_x, token, bias, s):
    """Begin the sums that have a part of x: W_x of a token, and the bias."""
    source = token * of_x(cell) * run
    for left in range(0, of_x(cell) * run, run):
        for j in range(left + low, left + high, width_of(s)):
            store(s, j, load(w_x, source + j) + load(bias, j))


@helper
def fill_tail(cell, low, high, run, bias, s):
    """Begin the sums that have no part of x with their bias."""
    for left in range(of_x(cell) * run, sums_of(cell) * run, run):
        for j in range(left + low, left + high, width_of(s)):
            store(s, j, load(bias, j))


@helper
def first_half(cell, low, end, size, run, h, before, v, s, carry, c_before, c_after):
    """`gates`."""
    for u in range(low, end, width_of(h)):
        tape_new, carry_new = gates(
            cell,
            load_tape(cell, s, u, run),
            load_n(h, before + u, size - u),
            load_carry(cell, carry, c_before + u, run),
            load_vectors(cell, v, u, run),
        )
        store_runs(s, u, run, tape_new)
        store_runs(carry, c_after + u, run, carry_new)


@helper
def second_half(cell, low, end, size, run, h, before, h_new, after, v, s, carry, c_after):
    """`output`."""
    for u in range(low, end, width_of(h)):
        h_next, tape_new = output(
            cell,
            load_tape(cell, s, u, run),
            load_n(h, before + u, size - u),
            load_carry(cell, carry, c_after + u, run),
            load_vectors(cell, v, u, run),
        )
        store_runs(s, u, run, tape_new)
        store_n(h_new, after + u, h_next, size - u)
