"""The time loop, forward and backward, for any cell.

A slice of the batch runs through the whole sequence on one thread and meets no other. Where a batch
is too small for that, a part is a slice of the units instead, for the whole batch, and the parts
meet at each step. Names and shapes (Hp is H rounded up to whole registers, G and R are the cell's
`gates` and `tape`):

x      (T, B, I) floats, or (T, B) int32 tokens
h      (T+1, B, H)   h[0] is the initial state, h[1:] the output
carry  (S+1, B, cell.carries*Hp)   further states; S is T where a tape is kept, else 0
tape   (S', B, R*Hp)   the cell's s before its step, then its tape; in backward the gradient of s.
       S' is T where a tape is kept, else `chunk`
w_x, w_h, bias   weights packed by `pack_transposed`, for slices of units gate by gate; both biases
       in R runs of Hp
meeting  see `fastrnn.meeting`; empty for slices of the batch
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from fastrnn.cells.cell import (
    backward,
    gates,
    load_carry,
    load_tape,
    output,
    store_runs,
)
from fastrnn.gemm import accumulate, multiply, panel_scratch, scatter, strip_scratch
from fastrnn.jit import helper, kernel
from fastrnn.meeting import arrive, gather, wait
from fastrnn.simd import (
    at,
    flush_denormals,
    keep_alive,
    load,
    load_n,
    restore_denormals,
    store,
    store_n,
    width_of,
)
from fastrnn.units import multiply_units, units_of


@helper
def _slice(part, parts, meeting, batch, size, w):
    """(first sequence, sequences, first unit, end of the units) of a part."""
    run = (size + w - 1) // w * w
    if meeting.size == 0:
        first = batch * part // parts
        return first, batch * (part + 1) // parts - first, 0, run
    low, high = units_of(part, parts, size, w)
    return 0, batch, low, high


def _project(x, t, steps, first, rows, low, high, pieces, w_x, bias, tape, slot, n):
    """tape[slot + s] = W_x x[t + s] + bias, for `steps` steps and `rows` sequences from `first`.

    The n columns are `pieces` times the units from `low` to `high`.
    """


@overload(_project)
def _project_overload(x, t, steps, first, rows, low, high, pieces, w_x, bias, tape, slot, n):
    def dense(x, t, steps, first, rows, low, high, pieces, w_x, bias, tape, slot, n):
        batch, size = x.shape[1:]
        row = tape.shape[2]
        start = (t * batch + first) * size
        into = (slot * batch + first) * row
        whole = rows == batch
        for piece in range(pieces):
            left = n // pieces * piece + low
            multiply(
                1 if whole else steps, steps * rows if whole else rows, high - low, size,
                at(x, start), size, batch * size, at(w_x, left * size),
                at(bias, left), 0, at(tape, into + left), row, batch * row,
            )  # fmt: skip

    def tokens(x, t, steps, first, rows, low, high, pieces, w_x, bias, tape, slot, n):
        batch = x.shape[1]
        row = tape.shape[2]
        w = width_of(tape)
        for s in range(steps):
            for r in range(rows):
                source = x[t + s, first + r] * n
                target = ((slot + s) * batch + first + r) * row
                for left in range(0, n, n // pieces):
                    for j in range(left + low, left + high, w):
                        store(tape, target + j, load(w_x, source + j) + load(bias, j))

    return tokens if isinstance(x.dtype, types.Integer) else dense


@helper
def _fill_tail(first, rows, low, high, run, n, bias, tape, slot, steps):
    """Begin the sums that have no part of x, the columns from n on, with their bias."""
    batch, row = tape.shape[1:]
    for s in range(steps):
        for r in range(rows):
            target = ((slot + s) * batch + first + r) * row
            for left in range(n, row, run):
                for j in range(left + low, left + high, width_of(tape)):
                    store(tape, target + j, load(bias, j))


@kernel
def forward_slice(part, parts, meeting, cell, tail, chunk, keep, x, w_x, w_h, bias, h, carry, tape):
    """Fill h, carry and tape for the part'th slice; keep is 1 with a tape, else 0."""
    if meeting.size > 0:
        parts = gather(meeting, part, parts)
        if parts == 0:
            return
    mode = flush_denormals()
    steps, batch = x.shape[:2]
    size = h.shape[2]
    w = width_of(h)
    run = (size + w - 1) // w * w
    n = w_h.size // size
    row = tape.shape[2]
    carry_row = carry.shape[2]
    first, rows, low, high = _slice(part, parts, meeting, batch, size, w)
    together = meeting.size > 0 and parts > 1
    # One piece of all columns, or the units of each gate.
    pieces = 1 if meeting.size == 0 else n // run
    end = n if meeting.size == 0 else high
    for start in range(0, steps, chunk):
        length = min(chunk, steps - start)
        slot = start * keep
        _project(x, start, length, first, rows, low, end, pieces, w_x, bias, tape, slot, n)
        _fill_tail(first, rows, low, high, run, n, bias, tape, slot, length)
        for t in range(start, start + length):
            h_old = at(h, (t * batch + first) * size)
            if together:
                wait(meeting, parts, t)
            s = at(tape, ((slot + t - start) * batch + first) * row + tail * run)
            multiply_units(pieces, low, end, rows, n, size, h_old, size, at(w_h, 0), s, row, s, row)
            for r in range(rows):
                b = first + r
                here = (t * batch + b) * size
                there = here + batch * size
                kept = ((slot + t - start) * batch + b) * row
                before = (t * keep * batch + b) * carry_row
                after = ((t + 1) * keep * batch + b) * carry_row
                for u in range(low, min(high, size), w):
                    tape_new, carry_new = gates(
                        cell,
                        load_tape(cell, tape, kept + u, run),
                        load_n(h, here + u, size - u),
                        load_carry(cell, carry, before + u, run),
                    )
                    store_runs(tape, kept + u, run, tape_new)
                    store_runs(carry, after + u, run, carry_new)
                for u in range(low, min(high, size), w):
                    h_new, tape_new = output(
                        cell,
                        load_tape(cell, tape, kept + u, run),
                        load_n(h, here + u, size - u),
                        load_carry(cell, carry, after + u, run),
                    )
                    store_runs(tape, kept + u, run, tape_new)
                    store_n(h, there + u, h_new, size - u)
            if together:
                arrive(meeting, part, t + 1)
    restore_denormals(mode)


@kernel
def backward_slice(part, parts, meeting, cell, tail, d_output, w_h, h, carry, tape, d_h, d_carry):
    """Turn the tape into gradients of the gates, for the part'th slice.

    d_output  (T, B, H), or (1, 1, H): the same for all
    w_h       packed by `pack`
    d_h, d_carry  (B, Hp), (B, carries*Hp): gradient of the final state in, of the initial state out
    """
    if meeting.size > 0:
        parts = gather(meeting, part, parts)
        if parts == 0:
            return
    mode = flush_denormals()
    steps, batch = h.shape[0] - 1, h.shape[1]
    size = h.shape[2]
    w = width_of(h)
    run = (size + w - 1) // w * w
    row = tape.shape[2]
    depth = w_h.size // run
    carry_row = carry.shape[2]
    first, rows, low, high = _slice(part, parts, meeting, batch, size, w)
    together = meeting.size > 0 and parts > 1
    end = min(high, size)
    d_row = size if d_output.shape[1] > 1 or batch == 1 else 0
    d_step = batch * size if d_output.shape[0] > 1 or steps == 1 else 0
    for t in range(steps - 1, -1, -1):
        for b in range(first, first + rows):
            here = (t * batch + b) * size
            there = here + batch * size
            kept = (t * batch + b) * row
            before = (t * batch + b) * carry_row
            after = before + batch * carry_row
            for u in range(low, end, w):
                gradient = load_n(d_output, t * d_step + b * d_row + u, size - u)
                d_gates, d_h_prev, d_carry_prev = backward(
                    cell,
                    load_tape(cell, tape, kept + u, run),
                    load_n(h, here + u, size - u),
                    load_n(h, there + u, size - u),
                    load_carry(cell, carry, before + u, run),
                    load_carry(cell, carry, after + u, run),
                    load(d_h, b * run + u) + gradient,
                    load_carry(cell, d_carry, b * carry_row + u, run),
                )
                store_runs(tape, kept + u, run, d_gates)
                store(d_h, b * run + u, d_h_prev)
                store_runs(d_carry, b * carry_row + u, run, d_carry_prev)
        d_a = at(tape, (t * batch + first) * row + tail * run)
        if together:
            arrive(meeting, part, steps - t)
            wait(meeting, parts, steps - t)
        c = at(d_h, first * run + low)
        multiply(1, rows, end - low, depth, d_a, row, 0, at(w_h, low * depth), c, run, c, run, 0)
    restore_denormals(mode)


def _input_gradient(part, parts, x, tape, n, w_x, zeros, d_x):
    """d_x from the gate gradients of x, for a slice of rows."""


def _weight_gradients(part, parts, tail, x, h, tape, order_x, order_h, d_w_x, d_w_h, d_b_x, d_b_h):
    """Add to the gradients of weights and biases, for a slice of gate blocks."""


@overload(_input_gradient)
def _input_gradient_overload(part, parts, x, tape, n, w_x, zeros, d_x):
    def dense(part, parts, x, tape, n, w_x, zeros, d_x):
        rows = d_x.shape[0]
        size = zeros.size
        row = tape.shape[2]
        first = rows * part // parts
        m = rows * (part + 1) // parts - first
        multiply(
            1, m, size, n, at(tape, first * row), row, 0,
            at(w_x, 0), at(zeros, 0), 0, at(d_x, first * size), size, 0,
        )  # fmt: skip

    def tokens(part, parts, x, tape, n, w_x, zeros, d_x):
        pass

    return tokens if isinstance(x.dtype, types.Integer) else dense


@helper
def _width(order, runs, g, m_x, m_h):
    """How many columns the gradients of run g have."""
    return (m_x if order[g] >= 0 else 0) + (m_h if order[runs + g] >= 0 else 0)


@helper
def _first_block(part, parts, order, runs, blocks, m_x, m_h):
    """Where the part'th slice of the register blocks begins, if all are to have as much work."""
    total = 0
    for g in range(runs):
        total += blocks * _width(order, runs, g, m_x, m_h)
    rest = total * part // parts
    for g in range(runs):
        width = _width(order, runs, g, m_x, m_h)
        if rest < blocks * width:
            return g * blocks + rest // width
        rest -= blocks * width
    return runs * blocks


@helper
def _add_both(part, parts, tail, x, m_x, h, tape, order_x, order_h, d_w_x, d_w_h, d_b_x, d_b_h):
    """`accumulate` for W_x (if m_x is not 0) and W_h."""
    steps, batch, size = h.shape[0] - 1, h.shape[1], h.shape[2]
    w = width_of(h)
    blocks = (size + w - 1) // w
    runs = max(order_x.size, tail + order_h.size)
    order = np.full(2 * runs, -1, np.intp)
    if m_x:
        order[: order_x.size] = order_x
    order[runs + tail : runs + tail + order_h.size] = order_h
    first = _first_block(part, parts, order, runs, blocks, m_x, size)
    end = _first_block(part + 1, parts, order, runs, blocks, m_x, size)
    panel, strips = panel_scratch(h, m_x, size), strip_scratch(h)
    accumulate(
        steps, batch, at(tape, 0), tape.shape[2], size, runs, at(order, 0), first, end,
        at(x, 0), m_x, at(d_w_x, 0), at(d_b_x, 0),
        at(h, 0), size, at(d_w_h, 0), at(d_b_h, 0), at(panel, 0), at(strips, 0),
    )  # fmt: skip
    keep_alive(order)
    keep_alive(panel)
    keep_alive(strips)


@overload(_weight_gradients)
def _weight_gradients_overload(
    part, parts, tail, x, h, tape, order_x, order_h, d_w_x, d_w_h, d_b_x, d_b_h
):
    def dense(part, parts, tail, x, h, tape, order_x, order_h, d_w_x, d_w_h, d_b_x, d_b_h):
        inputs = x.shape[2]
        _add_both(
            part, parts, tail, x, inputs, h, tape, order_x, order_h, d_w_x, d_w_h, d_b_x, d_b_h
        )

    def tokens(part, parts, tail, x, h, tape, order_x, order_h, d_w_x, d_w_h, d_b_x, d_b_h):
        w = width_of(h)
        n = d_b_x.size
        first, end = n // w * part // parts * w, n // w * (part + 1) // parts * w
        scatter(x, tape, 0, tape.shape[2], n, first, end, d_w_x, d_b_x)
        _add_both(part, parts, tail, h, 0, h, tape, order_x, order_h, d_w_h, d_w_h, d_b_h, d_b_h)

    return tokens if isinstance(x.dtype, types.Integer) else dense


@kernel
def gradients(
    part, parts, tail, x, h, tape, order_x, order_h, w_x, zeros, d_x, d_w_x, d_w_h, d_b_x, d_b_h
):
    """Add the gradients of all weights, and fill d_x, from the gate gradients on the tape.

    Dense input: d_w_x (G*H, I), d_b_x (G*H,) in PyTorch's gate order; d_x (T*B, I) or (0, I) if it
    is not wanted; w_x packed by `pack`. Tokens: d_w_x (V, G*Hp), d_b_x (G*Hp,) in the tape's order.
    """
    mode = flush_denormals()
    _weight_gradients(part, parts, tail, x, h, tape, order_x, order_h, d_w_x, d_w_h, d_b_x, d_b_h)
    w = width_of(h)
    run = (h.shape[2] + w - 1) // w * w
    _input_gradient(part, parts, x, tape, order_x.size * run, w_x, zeros, d_x)
    restore_denormals(mode)
