"""A row of a step, one sequence's: how its sums begin, the halves of the cell, what follows.

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
    projected_of,
    store_carry,
    store_tape,
    sums_of,
    tape_of,
)
from fastrnn.gemm import multiply
from fastrnn.jit import helper
from fastrnn.simd import at, load, load_n, store, store_n, width_of


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
            load_n(h, before + u, (size - u) * (1 - projected_of(cell))),
            load_carry(cell, carry, c_before + u, run),
            load_vectors(cell, v, u, run),
        )
        store_tape(cell, s, u, run, tape_new)
        store_carry(cell, carry, c_after + u, run, carry_new)


@helper
def second_half(cell, low, end, size, run, h, before, h_new, after, v, s, carry, c_after):
    """`output`; what is to be projected stays in s."""
    for u in range(low, end, width_of(h)):
        h_next, tape_new = output(
            cell,
            load_tape(cell, s, u, run),
            load_n(h, before + u, (size - u) * (1 - projected_of(cell))),
            load_carry(cell, carry, c_after + u, run),
            load_vectors(cell, v, u, run),
        )
        store_tape(cell, s, u, run, tape_new)
        store_n(h_new, after + u, h_next, (size - u) * (1 - projected_of(cell)))


@helper
def project(cell, rows, size, row, s, values, places, h_new, after):
    """h (..., P), from `after` on, of that many rows at s, `row` apart, if it is projected.

    values, places  by `pack_layer`
    """
    width = h_new.shape[h_new.ndim - 1]
    m = at(s, row // tape_of(cell) * (tape_of(cell) - 1))
    multiply(
        1, rows, width, size, m, row, 0, at(values, places[6]), at(values, places[7]), 0,
        at(h_new, after), width, 0,
    )  # fmt: skip
