"""Layer normalisation of rows: what a cell with `normed` has beside its pointwise functions.

Ba, Kiros and Hinton 2016, arXiv:1607.06450. A row has runs of H numbers, each rounded up to whole
registers; what is normalised together are G of them, or one. Sums over a row have one order.
"""

from __future__ import annotations

import math

from fastrnn.cells.cell import apart_of, of_x, tape_of
from fastrnn.crew import divided
from fastrnn.jit import helper, kernel
from fastrnn.simd import (
    at,
    flush_denormals,
    fma,
    load,
    load_n,
    restore_denormals,
    store_n,
    sum_of,
    width_of,
    zero,
)

# As in torch.nn.LayerNorm.
EPS = 1e-5


@helper
def normalise(s, runs, size, run):
    """In place, s at `runs` runs: less their mean, over their deviation; returns 1 / deviation."""
    w = width_of(s)
    total = zero(load(s, 0))
    for left in range(0, runs * run, run):
        for u in range(0, size, w):
            total = total + load_n(s, left + u, size - u)
    mean = sum_of(total) / (runs * size)
    spread = zero(total)
    for left in range(0, runs * run, run):
        for u in range(0, size, w):
            store_n(s, left + u, load_n(s, left + u, size - u) - mean, size - u)
            # Read again, for zeros beyond the last unit.
            distance = load_n(s, left + u, size - u)
            spread = fma(distance, distance, spread)
    scale = 1 / math.sqrt(sum_of(spread) / (runs * size) + EPS)
    for left in range(0, runs * run, run):
        for u in range(0, size, w):
            store_n(s, left + u, load_n(s, left + u, size - u) * scale, size - u)
    return scale


@helper
def normalise_carry(cell, s, size, run, carry, place):
    """Into the last register but one of s; returns 1 / deviation."""
    into = at(s, (tape_of(cell) - 2) * run)
    for u in range(0, size, width_of(s)):
        store_n(into, u, load_n(carry, place + u, size - u), size - u)
    return normalise(into, 1, size, run)


@helper
def back(cell, of_h, s, size, run, v, scale, into):
    """Gradients of products, from those of what gains and biases make of their normalised values.

    of_h  1: of h, else 0: of x; both stand in the row s of the tape
    into  G runs: receives them; may be where the normalised values are
    """
    w = width_of(s)
    G = of_x(cell)
    first = zero(load(s, 0))
    second = zero(first)
    for g in range(G):
        here = (of_h * G + g) * run
        d = (2 * G + g + (apart_of(cell) if of_h * (g + 1) == G else 0)) * run
        for u in range(0, size, w):
            value = load_n(s, d + u, size - u) * load(v, here + u)
            first = first + value
            second = fma(value, load_n(s, here + u, size - u), second)
    mean, along = sum_of(first) / (G * size), sum_of(second) / (G * size)
    for g in range(G):
        here = (of_h * G + g) * run
        d = (2 * G + g + (apart_of(cell) if of_h * (g + 1) == G else 0)) * run
        for u in range(0, size, w):
            value = load_n(s, d + u, size - u) * load(v, here + u)
            normed = load_n(s, here + u, size - u)
            store_n(into, g * run + u, (value - mean - normed * along) * scale, size - u)


@helper
def back_carry(cell, s, size, run, d, scale, d_carry, place):
    """Add to the gradient of a carry that of its normalised values, d; both are rows."""
    w = width_of(s)
    normed = at(s, (tape_of(cell) - 2) * run)
    first = zero(load(s, 0))
    second = zero(first)
    for u in range(0, size, w):
        value = load_n(d, u, size - u)
        first = first + value
        second = fma(value, load_n(normed, u, size - u), second)
    mean, along = sum_of(first) / size, sum_of(second) / size
    for u in range(0, size, w):
        value = (load_n(d, u, size - u) - mean - load_n(normed, u, size - u) * along) * scale
        store_n(d_carry, place + u, load(d_carry, place + u) + value, size - u)


@kernel
def norm_gradients(part, parts, cell, size, v, stats, tape):
    """Turn the normalised products on the tape into gradients of products, for a slice of rows."""
    if divided(part, parts):
        return
    mode = flush_denormals()
    rows, row = tape.shape
    run = row // tape_of(cell)
    for r in range(rows * part // parts, rows * (part + 1) // parts):
        s = at(tape, r * row)
        back(cell, 0, s, size, run, v, stats[r, 0], s)
        back(cell, 1, s, size, run, v, stats[r, 1], at(s, of_x(cell) * run))
    restore_denormals(mode)
