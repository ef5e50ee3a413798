"""The time loop, forward and backward, for any cell.

A slice of the batch runs through the whole sequence on one thread and meets no other. Where a batch
is too small for that, a part is a slice of the units instead, for the whole batch, and the parts
meet at each step, with a late product twice. Names and shapes (Hp is H rounded up to whole
registers, G and R are the cell's `gates` and `tape`):

starts, ends, rows, before   of a `Layout` of N steps in C columns
x      (N, I) floats, or (N,) int32 tokens
h      (C + N, H)   the initial states, then the output
carry  (C + N, cell.carries*Hp)   further states; where no tape is kept (C, ...), the latest ones
tape   (N, R*Hp)   the cell's s before its step, then its tape; in backward the gradient of s.
       Where it is not kept (`chunk` * C, ...), C rows for each step of a chunk
values, places   the weights, by `pack_layer`
meeting  see `fastrnn.meeting`; empty for slices of the batch
"""

from __future__ import annotations

import numpy as np
from numba import types

from fastrnn.cells.cell import (
    backward,
    backward_normed,
    backward_operand,
    backward_vectors,
    into_of,
    late_of,
    load_carry,
    load_tape,
    load_trained,
    load_vectors,
    normed_carry_of,
    of_h,
    of_x,
    operand_of,
    projected_of,
    store_carry,
    store_tape,
    store_trained,
    tail_of,
    tape_of,
)
from fastrnn.crew import divided
from fastrnn.gemm import accumulate, integers, multiply, panel_scratch, scatter, strip_scratch
from fastrnn.jit import helper, kernel, overload
from fastrnn.meeting import arrive, gather, wait
from fastrnn.noise import (
    fed_by,
    mask_row,
    multiply_back,
    passing,
    room,
    settle,
    staying,
    weigh,
)
from fastrnn.norm import back, back_carry, normalise, normalise_carry
from fastrnn.row import fill_tail, first_half, gather_input, project, second_half
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
    zero,
)
from fastrnn.units import multiply_units, units_of


@helper
def _column(ends, part, parts):
    """Where the part'th slice of the columns begins, if all are to have as many steps."""
    share = ends[ends.size - 1] * part // parts
    column = 0
    while column < ends.size - 1 and ends[column + 1] <= share:
        column += 1
    return column


@helper
def _slice(part, parts, meeting, ends, size, w):
    """(first column, columns, first unit, end of the units) of a part."""
    run = (size + w - 1) // w * w
    if meeting.size == 0:
        first = _column(ends, part, parts)
        return first, _column(ends, part + 1, parts) - first, 0, run
    low, high = units_of(part, parts, size, w)
    return 0, ends.size - 1, low, high


@helper
def _active(starts, t, first, columns):
    """How many of the columns take step t."""
    return max(0, min(starts[t + 2] - starts[t + 1] - first, columns))


@helper
def _tape_row(starts, t, begin, slots):
    """Where the rows of step t begin; see `_project`."""
    return (t - begin) * slots if slots else starts[t + 1] - starts[1]


def _project(cell, x, starts, t, steps, first, columns, low, high, apart, w_x, bias, tape, slots):
    """Begin the sums of `steps` steps from t on: tape = W_x x + bias.

    Rows of the tape are those of a layout if `slots` is 0, else so many for each of these steps.
    """


@overload(_project)
def _project_overload(
    cell, x, starts, t, steps, first, columns, low, high, apart, w_x, bias, tape, slots
):
    def dense(cell, x, starts, t, steps, first, columns, low, high, apart, w_x, bias, tape, slots):
        size = x.shape[1]
        row = tape.shape[1]
        run = row // tape_of(cell)
        begin, end = t, t + steps
        # Steps of as many sequences are one product; those of all sequences have no gaps anyway.
        while t < end:
            total = starts[t + 2] - starts[t + 1]
            gap = slots if slots else total
            rows = _active(starts, t, first, columns)
            count = 1
            while t + count < end and starts[t + count + 2] - starts[t + count + 1] == total:
                count += 1
            whole = rows == total and gap == total
            start = (starts[t + 1] - starts[1] + first) * size
            into = (_tape_row(starts, t, begin, slots) + first) * row
            multiply_units(
                apart, of_x(cell), run, low, high,
                1 if whole else count, count * rows if whole else rows, size,
                at(x, start), size, total * size, w_x, bias, 0, at(tape, into), row, gap * row,
            )  # fmt: skip
            t += count

    def tokens(cell, x, starts, t, steps, first, columns, low, high, apart, w_x, bias, tape, slots):
        row = tape.shape[1]
        run = row // tape_of(cell)
        for step in range(t, t + steps):
            here = _tape_row(starts, step, t, slots) + first
            before = starts[step + 1] - starts[1] + first
            for r in range(_active(starts, step, first, columns)):
                s = at(tape, (here + r) * row)
                gather_input(cell, low, high, run, w_x, x[before + r], bias, s)

    return tokens if isinstance(x.dtype, types.Integer) else dense


@helper
def _note(flow, place, total, n):
    """Keep a register of the gradient of h, if that is asked for."""
    if flow is not None:
        store_n(flow, place, total, n)


@kernel
def forward_slice(
    part, parts, meeting, cell, size, chunk, keep, starts, ends, x, values, places,
    h, carry, tape, stats, drawn,
):  # fmt: skip
    """Fill h, carry and tape for the part'th slice; keep is 1 with a tape, else 0.

    stats  (rows of the tape, 3) with normalisation, 1 / deviations of a row; else None
    """
    if divided(part, parts):
        return
    if meeting.size > 0:
        parts = gather(meeting, part, parts)
        if parts == 0:
            return
    mode = flush_denormals()
    steps = starts.size - 2
    width = h.shape[1]
    w = width_of(h)
    row = tape.shape[1]
    run = row // tape_of(cell)
    carry_row = carry.shape[1]
    w_x, w_h, w_late = at(values, places[1]), at(values, places[2]), at(values, places[3])
    bias, v = at(values, places[4]), at(values, places[5])
    first, columns, low, high = _slice(part, parts, meeting, ends, size, w)
    end = min(high, size)
    apart = meeting.size > 0
    together = apart and parts > 1
    meetings = 1 + late_of(cell)
    fed, fresh = fed_by(drawn, h), room(drawn, h)
    # Others may be in another chunk: no row is theirs now and then.
    slots = 0 if keep else ends.size - 1
    for start in range(0, steps, chunk):
        length = min(chunk, steps - start)
        _project(
            cell, x, starts, start, length, first, columns, low, high, apart, w_x, bias, tape, slots
        )
        if stats is not None:
            for t in range(start, start + length):
                here = _tape_row(starts, t, start, slots) + first
                for r in range(here, here + _active(starts, t, first, columns)):
                    stats[r, 0] = normalise(at(tape, r * row), of_x(cell), size, run)
        for t in range(start, start + length):
            rows = _active(starts, t, first, columns)
            # Rows of the tape, and of the states before and after.
            here = _tape_row(starts, t, start, slots) + first
            old, new = starts[t] + first, starts[t + 1] + first
            c_old, c_new = (old, new) if keep else (first, first)
            for r in range(here, here + rows):
                fill_tail(cell, low, high, run, bias, at(tape, r * row))
            if together:
                wait(meeting, parts, t * meetings)
            s = at(tape, here * row + tail_of(cell) * run)
            multiply_units(
                apart, of_h(cell), run, low, high, 1, rows, width,
                at(fed, old * width), width, 0, w_h, s, row, s, row, 0,
            )  # fmt: skip
            if stats is not None:
                for r in range(here, here + rows):
                    into = at(tape, r * row + tail_of(cell) * run)
                    stats[r, 1] = normalise(into, of_h(cell), size, run)
            for r in range(rows):
                before, after, s = (old + r) * width, (new + r) * width, at(tape, (here + r) * row)
                c_before, c_after = (c_old + r) * carry_row, (c_new + r) * carry_row
                first_half(cell, low, end, size, run, h, before, v, s, carry, c_before, c_after)
                if stats is not None and normed_carry_of(cell) == 1:
                    stats[here + r, 2] = normalise_carry(cell, s, size, run, carry, c_after)
                if late_of(cell) == 0:
                    second_half(
                        cell, low, end, size, run, h, before, h, after, v, s, carry, c_after
                    )
            if late_of(cell) == 1:
                for r in range(rows):
                    m = at(tape, (here + r) * row + operand_of(cell) * run)
                    mask_row(drawn, first + r, low, end, m)
                if together:
                    arrive(meeting, part, t * meetings + 1)
                    wait(meeting, parts, t * meetings + 1)
                m = at(tape, here * row + operand_of(cell) * run)
                s = at(tape, here * row + into_of(cell) * run)
                multiply_units(
                    apart, 1, run, low, high, 1, rows, size, m, row, 0, w_late, s, row, s, row, 0
                )
                for r in range(rows):
                    before, after = (old + r) * width, (new + r) * width
                    s, c_after = at(tape, (here + r) * row), (c_new + r) * carry_row
                    second_half(
                        cell, low, end, size, run, h, before, h, after, v, s, carry, c_after
                    )
            if projected_of(cell) == 1:
                project(cell, rows, size, row, at(tape, here * row), values, places, h, new * width)
            step = starts[t + 1] - starts[1] + first
            for r in range(rows):
                before, after = (old + r) * width, (new + r) * width
                settle(drawn, low, min(high, width), h, before, after, step + r, first + r, fresh)
            if together:
                arrive(meeting, part, (t + 1) * meetings)
    restore_denormals(mode)


@kernel
def backward_slice(
    part, parts, meeting, cell, size, starts, ends, d_output, order, w_h, w_late, w_r, zeros, v,
    h, carry, tape, stats, d_h, d_carry, d_m, d_s, d_r, drawn, flow,
):  # fmt: skip
    """Turn the tape into gradients of the gates, for the part'th slice.

    d_output  (..., H); order (N,): which of its rows belongs to each step
    w_h, w_late, w_r   packed by `pack`; zeros (Hp,); v as in `pack_layer`
    d_h, d_carry  (C, Hp), (C, carries*Hp): gradient of the final state in, of the initial state out
    d_m       (C, Hp) with a late product, a projection, a mask or normalisation: scratch
    d_s       (C, G*Hp) with normalisation: scratch, zeros in the padding
    d_r       (N, P) with a projection: filled with the gradients of what it gives
    flow      (N, H), filled with the gradients of h at each step, or None
    """
    if divided(part, parts):
        return
    if meeting.size > 0:
        parts = gather(meeting, part, parts)
        if parts == 0:
            return
    mode = flush_denormals()
    steps = starts.size - 2
    width = h.shape[1]
    w = width_of(h)
    row = tape.shape[1]
    run = row // tape_of(cell)
    depth = of_h(cell) * run
    carry_row, wide = carry.shape[1], d_h.shape[1]
    first, columns, low, high = _slice(part, parts, meeting, ends, size, w)
    together = meeting.size > 0 and parts > 1
    meetings = 1 + late_of(cell)
    end = min(high, size)
    sees = 1 - projected_of(cell)
    fresh = room(drawn, h)
    for t in range(steps - 1, -1, -1):
        rows = _active(starts, t, first, columns)
        here = starts[t + 1] - starts[1] + first
        old, new = starts[t] + first, starts[t + 1] + first
        met = (steps - 1 - t) * meetings
        if projected_of(cell) == 1:
            for r in range(rows):
                b, given = first + r, order[here + r] * width
                weigh(drawn, here + r, 0, width, fresh)
                for u in range(0, width, w):
                    total = load(d_h, b * wide + u)
                    total = total + load_n(d_output, given + u, width - u)
                    _note(flow, (here + r) * width + u, total, width - u)
                    passed = passing(drawn, fresh, u, total)
                    store_n(d_r, (here + r) * width + u, passed, width - u)
                    store(d_h, b * wide + u, staying(drawn, fresh, u, total, zero(total)))
            multiply(
                1, rows, size, width, at(d_r, here * width), width, 0, at(w_r, 0),
                at(zeros, 0), 0, at(d_m, first * run), run, 0,
            )  # fmt: skip
        for r in range(rows):
            before, after = (old + r) * width, (new + r) * width
            c_before, c_after = (old + r) * carry_row, (new + r) * carry_row
            kept = (here + r) * row
            b, given = first + r, order[here + r] * width
            if projected_of(cell) == 0:
                weigh(drawn, here + r, low, end, fresh)
            if stats is not None and normed_carry_of(cell) == 1:
                for u in range(low, end, w):
                    gradient = load_n(d_output, given + u, size - u)
                    total = load(d_h, b * run + u) + gradient
                    d_tape, d_normed = backward_normed(
                        cell,
                        load_tape(cell, tape, kept + u, run),
                        passing(drawn, fresh, u, total),
                        load_vectors(cell, v, u, run),
                    )
                    store_tape(cell, tape, kept + u, run, d_tape)
                    store(d_m, b * run + u, d_normed)
                s, d = at(tape, kept), at(d_m, b * run)
                back_carry(cell, s, size, run, d, stats[here + r, 2], d_carry, b * carry_row)
            for u in range(low, end, w):
                if projected_of(cell) == 1:
                    total = load_n(d_m, b * run + u, size - u)
                    passed = total
                else:
                    gradient = load_n(d_output, given + u, size - u)
                    total = load(d_h, b * run + u) + gradient
                    _note(flow, (here + r) * size + u, total, size - u)
                    passed = passing(drawn, fresh, u, total)
                d_gates, d_h_prev, d_carry_prev = backward(
                    cell,
                    load_tape(cell, tape, kept + u, run),
                    load_n(h, before + u, (size - u) * sees),
                    load_n(h, after + u, (size - u) * sees),
                    load_carry(cell, carry, c_before + u, run),
                    load_carry(cell, carry, c_after + u, run),
                    passed,
                    load_carry(cell, d_carry, b * carry_row + u, run),
                    load_vectors(cell, v, u, run),
                )
                store_tape(cell, tape, kept + u, run, d_gates)
                if projected_of(cell) == 0:
                    store(d_h, b * run + u, staying(drawn, fresh, u, total, d_h_prev))
                store_carry(cell, d_carry, b * carry_row + u, run, d_carry_prev)
        if late_of(cell) == 1:
            if together:
                arrive(meeting, part, met + 1)
                wait(meeting, parts, met + 1)
            d_late = at(tape, here * row + into_of(cell) * run)
            multiply(
                1, rows, end - low, run, d_late, row, 0, at(w_late, low * run),
                at(zeros, 0), 0, at(d_m, first * run + low), run, 0,
            )  # fmt: skip
            for r in range(rows):
                kept, b = (here + r) * row, first + r
                mask_row(drawn, b, low, end, at(d_m, b * run))
                for u in range(low, end, w):
                    d_gates, more = backward_operand(
                        cell,
                        load_tape(cell, tape, kept + u, run),
                        load_n(h, (old + r) * size + u, size - u),
                        load_n(d_m, b * run + u, size - u),
                    )
                    store_tape(cell, tape, kept + u, run, d_gates)
                    store(d_h, b * run + u, load(d_h, b * run + u) + more)
        d_a, d_a_row = at(tape, here * row + tail_of(cell) * run), row
        if stats is not None:
            d_a, d_a_row = at(d_s, first * depth), depth
            for r in range(rows):
                s, into = at(tape, (here + r) * row), at(d_s, (first + r) * depth)
                back(cell, 1, s, size, run, v, stats[here + r, 1], into)
        if together:
            arrive(meeting, part, met + meetings)
            wait(meeting, parts, met + meetings)
        n = width if projected_of(cell) == 1 else end - low
        p = at(w_h, low * depth)
        multiply_back(drawn, first, rows, low, n, depth, d_a, d_a_row, p, zeros, d_m, d_h)
    restore_denormals(mode)


def _input_gradient(part, parts, x, tape, n, w_x, zeros, d_x):
    """d_x from the gate gradients of x, for a slice of rows."""


def _weight_gradients(
    part, parts, tail, size, rows, before, x, h, tape, order_x, order_h, d_w_x, d_w_h, d_b_x, d_b_h
):  # fmt: skip
    """Add to the gradients of weights and biases, for a slice of gate blocks."""


@overload(_input_gradient)
def _input_gradient_overload(part, parts, x, tape, n, w_x, zeros, d_x):
    def dense(part, parts, x, tape, n, w_x, zeros, d_x):
        rows = d_x.shape[0]
        size = zeros.size
        row = tape.shape[1]
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
def _add_both(
    part, parts, tail, size, rows, before, x, m_x, h, tape, order_x, order_h,
    d_w_x, d_w_h, d_b_x, d_b_h,
):  # fmt: skip
    """`accumulate` for W_x (if m_x is not 0) and W_h."""
    width = h.shape[1]
    w = width_of(h)
    blocks = (size + w - 1) // w
    runs = max(order_x.size, tail + order_h.size)
    order = integers(2 * runs)
    for g in range(runs):
        order[g] = order_x[g] if m_x and g < order_x.size else -1
        order[runs + g] = order_h[g - tail] if tail <= g < tail + order_h.size else -1
    first = _first_block(part, parts, order, runs, blocks, m_x, width)
    end = _first_block(part + 1, parts, order, runs, blocks, m_x, width)
    panel, strips = panel_scratch(h, m_x, width), strip_scratch(h)
    accumulate(
        rows.size, at(rows, 0), at(before, 0), at(tape, 0), tape.shape[1], size, runs, at(order, 0),
        first, end, at(x, 0), m_x, at(d_w_x, 0), at(d_b_x, 0),
        at(h, 0), width, width, at(d_w_h, 0), at(d_b_h, 0), at(panel, 0), at(strips, 0),
    )  # fmt: skip
    keep_alive(order)
    keep_alive(panel)
    keep_alive(strips)


@overload(_weight_gradients)
def _weight_gradients_overload(
    part, parts, tail, size, rows, before, x, h, tape, order_x, order_h, d_w_x, d_w_h, d_b_x, d_b_h
):  # fmt: skip
    def dense(
        part, parts, tail, size, rows, before, x, h, tape, order_x, order_h,
        d_w_x, d_w_h, d_b_x, d_b_h,
    ):  # fmt: skip
        _add_both(
            part, parts, tail, size, rows, before, x, x.shape[1], h, tape, order_x, order_h,
            d_w_x, d_w_h, d_b_x, d_b_h,
        )  # fmt: skip

    def tokens(
        part, parts, tail, size, rows, before, x, h, tape, order_x, order_h,
        d_w_x, d_w_h, d_b_x, d_b_h,
    ):  # fmt: skip
        w = width_of(h)
        n = d_b_x.size
        first, end = n // w * part // parts * w, n // w * (part + 1) // parts * w
        scatter(x, rows, tape, 0, tape.shape[1], n, first, end, d_w_x, d_b_x)
        _add_both(
            part, parts, tail, size, rows, before, h, 0, h, tape, order_x, order_h,
            d_w_h, d_w_h, d_b_h, d_b_h,
        )  # fmt: skip

    return tokens if isinstance(x.dtype, types.Integer) else dense


@helper
def _add_late(part, parts, operand, into, rows, h, tape, order, d_w_h, d_b_h):
    """`accumulate` for the rows of W_h in the late product."""
    size = h.shape[1]
    w = width_of(h)
    row = tape.shape[1]
    run = (size + w - 1) // w * w
    blocks = run // w
    first, end = blocks * part // parts, blocks * (part + 1) // parts
    places = integers(2)
    places[0], places[1] = -1, order[0]
    panel, strips = panel_scratch(h, 0, size), strip_scratch(h)
    accumulate(
        rows.size, at(rows, 0), at(rows, 0), at(tape, into * run), row, size, 1, at(places, 0),
        first, end, at(h, 0), 0, at(d_w_h, 0), at(d_b_h, 0),
        at(tape, operand * run), row, size, at(d_w_h, 0), at(d_b_h, 0), at(panel, 0), at(strips, 0),
    )  # fmt: skip
    keep_alive(places)
    keep_alive(panel)
    keep_alive(strips)


@kernel
def gradients(
    part, parts, tail, operand, into, size, rows, before, x, h, tape, order_x, order_h, order_late,
    w_x, zeros, d_x, d_w_x, d_w_h, d_b_x, d_b_h,
):  # fmt: skip
    """Add the gradients of W_x and W_h, and fill d_x, from the gate gradients on the tape.

    h as products saw it.

    Dense input: d_w_x (G*H, I), d_b_x (G*H,) in the weights' order of gates; d_x (N, I) or (0, I)
    if it is not wanted; w_x packed by `pack`. Tokens: d_w_x (V, G*Hp), d_b_x (G*Hp,) in the tape's.
    """
    if divided(part, parts):
        return
    mode = flush_denormals()
    _weight_gradients(
        part, parts, tail, size, rows, before, x, h, tape, order_x, order_h,
        d_w_x, d_w_h, d_b_x, d_b_h,
    )  # fmt: skip
    if order_late.size > 0:
        _add_late(part, parts, operand, into, rows, h, tape, order_late, d_w_h, d_b_h)
    w = width_of(h)
    run = (size + w - 1) // w * w
    _input_gradient(part, parts, x, tape, order_x.size * run, w_x, zeros, d_x)
    restore_denormals(mode)


@kernel
def projection_gradients(part, parts, size, rows, d_r, tape, registers, d_w_r):
    """Add to the gradient (P, H) of a projection, from d_r (N, P) and the last register of a row.

    H is `size`.
    """
    if divided(part, parts):
        return
    mode = flush_denormals()
    row, width = tape.shape[1], d_r.shape[1]
    w = width_of(d_r)
    blocks = (width + w - 1) // w
    first, end = blocks * part // parts, blocks * (part + 1) // parts
    places, sums = integers(2), np.zeros(width, d_r.dtype)
    places[0], places[1] = -1, 0
    panel, strips = panel_scratch(d_r, 0, size), strip_scratch(d_r)
    accumulate(
        rows.size, at(rows, 0), at(rows, 0), at(d_r, 0), width, width, 1, at(places, 0), first, end,
        at(d_r, 0), 0, at(d_w_r, 0), at(sums, 0),
        at(tape, row // registers * (registers - 1)), row, size, at(d_w_r, 0), at(sums, 0),
        at(panel, 0), at(strips, 0),
    )  # fmt: skip
    keep_alive(places)
    keep_alive(sums)
    keep_alive(panel)
    keep_alive(strips)
    restore_denormals(mode)


@kernel
def vector_gradients(part, parts, cell, size, rows, before, h, carry, tape, d_v):
    """Add to the gradients (trained*Hp) of a cell's vectors, for the part'th slice of the units."""
    if divided(part, parts):
        return
    mode = flush_denormals()
    width, n = h.shape[1], size * (1 - projected_of(cell))
    w = width_of(h)
    row, carry_row = tape.shape[1], carry.shape[1]
    run = row // tape_of(cell)
    blocks = run // w
    columns = h.shape[0] - rows.size
    for u in range(blocks * part // parts * w, blocks * (part + 1) // parts * w, w):
        total = load_trained(cell, d_v, u, run)
        for j in range(rows.size):
            old, new = before[j], columns + rows[j]
            total = backward_vectors(
                cell,
                total,
                load_tape(cell, tape, rows[j] * row + u, run),
                load_n(h, old * width + u, n - u),
                load_n(h, new * width + u, n - u),
                load_carry(cell, carry, old * carry_row + u, run),
                load_carry(cell, carry, new * carry_row + u, run),
            )
        store_trained(cell, d_v, u, run, total)
    restore_denormals(mode)
