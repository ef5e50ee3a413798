"""One layer: memory and packed weights for its kernels, for one direction or both at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from fastrnn import gemm, recurrence
from fastrnn.cells import Cell
from fastrnn.layout import Layout, even
from fastrnn.meeting import NOBODY, together
from fastrnn.memory import empty, zeros
from fastrnn.pack import Packed, indices, pack, pack_layer
from fastrnn.parallel import ELEMENT, get_num_threads, parts_for, run, run_all
from fastrnn.simd import lanes, padded
from fastrnn.units import parts_of_units

# A chunk of pre-activations of one slice of the batch stays within the second-level cache, unless
# too few rows would then share a pass over the weights.
_CHUNK_BYTES = 1 << 18


class Weights(NamedTuple):
    """Of one direction, or their gradients; no biases, no vectors: None.

    x, h, b_x, b_h   as in `params`
    v       the cell's vectors (vectors, H); of gradients (trained, H)
    packed  what they were packed to, where they do not change any more
    """

    x: np.ndarray
    h: np.ndarray
    b_x: np.ndarray | None
    b_h: np.ndarray | None
    v: np.ndarray | None = None
    packed: dict[tuple, Packed] | None = None

    def pack(self, cell: Cell, tokens: bool, apart: bool, table: np.ndarray | None) -> Packed:
        """The weights as forward takes them."""
        lasting = self.packed if table is None else None
        if lasting is not None and (tokens, apart) in lasting:
            return lasting[tokens, apart]
        packed = pack_layer(cell, *self[:5], tokens=tokens, apart=apart, table=table)
        if lasting is not None:
            lasting[tokens, apart] = packed
        return packed


@dataclass
class Kept:
    """What one direction of a layer keeps for backward; rows as in `fastrnn.layout`."""

    layout: Layout
    x: np.ndarray
    h: np.ndarray
    carry: np.ndarray
    tape: np.ndarray
    vectors: np.ndarray | None

    @property
    def nbytes(self) -> int:
        return self.h.nbytes + self.carry.nbytes + self.tape.nbytes

    @property
    def output(self) -> np.ndarray:
        """(N, H)."""
        return self.h[self.layout.columns :]

    def final(self, carries: int) -> list[np.ndarray]:
        """The parts of the final state, (B, H) each."""
        layout, size = self.layout, self.h.shape[1]
        hidden = padded(size, self.h.dtype)
        # Without a tape there is but the latest of each column.
        rows = layout.last if len(self.carry) == len(self.h) else layout.final
        parts = [self.carry[rows, i * hidden : i * hidden + size] for i in range(carries)]
        return [self.h[layout.last], *parts]

    def copy(self) -> Kept:
        """With a tape of its own, which backward overwrites."""
        return replace(self, tape=self.tape.copy())


def _sharing(
    cell: Cell, layout: Layout, size: int, dtype: Any, work: int, sides: int
) -> tuple[int, int]:
    """(parts of the units of one of `sides` directions, parts of the columns of all)."""
    meet = parts_of_units(cell, layout.steps, layout.columns, size, dtype)
    # Two directions feed two threads without meeting.
    if sides > 1 and sides * layout.columns >= get_num_threads():
        meet = 1
    return meet, parts_for(sides * work, sides * layout.columns)


def _run(function: Any, meet: int, parts: int, calls: list[tuple]) -> None:
    if meet > 1:
        for arguments in calls:
            together(function, meet, *arguments)
    else:
        run_all(function, parts, [(NOBODY, *arguments) for arguments in calls])


def forward(
    cell: Cell,
    weights: list[Weights],
    layouts: list[Layout],
    xs: list[np.ndarray],
    vectors: np.ndarray | None,
    states: list[list[np.ndarray]],
    *,
    keep: bool,
) -> list[Kept]:
    """Each direction's run over its x (N, I) from its state, (B, H) for each part of it."""
    done, calls = [], []
    for of, layout, x, state in zip(weights, layouts, xs, states, strict=True):
        size, dtype = of.h.shape[1], of.h.dtype
        columns, count = layout.columns, layout.count
        hidden = padded(size, dtype)
        tokens = x.dtype == np.int32
        work = count * cell.gates * hidden * (size + (0 if tokens else of.x.shape[1]))
        meet, parts = _sharing(cell, layout, size, dtype, work, len(weights))
        row = cell.tape * hidden
        rows, width = columns, row // meet
        if meet == 1:
            rows = -(-columns // -(-parts // len(weights)))
        chunk = max(_CHUNK_BYTES // (rows * width * dtype.itemsize), gemm.HEIGHT // rows)
        chunk = max(1, min(layout.steps, chunk))
        h = empty((columns + count, size), dtype)
        h[:columns] = 0
        h[layout.first] = layout.begin(state[0])
        carry = empty((columns + count if keep else columns, cell.carries * hidden), dtype)
        carry[:columns] = 0
        for i, value in enumerate(state[1:]):
            carry[layout.first, i * hidden : i * hidden + size] = layout.begin(value)
        tape = empty((count if keep else min(count, chunk * columns), row), dtype)
        packed = of.pack(cell, tokens, meet > 1, vectors)
        call: tuple = (cell, chunk, int(keep), layout.starts, layout.ends)
        calls.append((*call, x, *packed, h, carry, tape))
        # A view, since backward relies on the shape.
        view = None if vectors is None else vectors.view()
        done.append(Kept(layout, x, h, carry, tape, view))
    _run(recurrence.forward_slice, meet, parts, calls)
    return done


def backward(
    cell: Cell,
    weights: list[Weights],
    grads: list[Weights],
    kept: list[Kept],
    d_ys: list[np.ndarray],
    d_last: list[list[np.ndarray]],
    *,
    want_d_x: bool,
) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Each direction's d_x (N, I) and the gradient of its initial state.

    d_ys   (N, H), or (1, H) for all steps alike
    d_x of tokens is empty, with vectors their gradient
    grads  are added to
    """
    calls, states = [], []
    for of, side, d_y, last in zip(weights, kept, d_ys, d_last, strict=True):
        layout, size, dtype = side.layout, of.h.shape[1], of.h.dtype
        hidden = padded(size, dtype)
        work = layout.count * cell.gates * hidden * size
        meet, count = _sharing(cell, layout, size, dtype, work, len(weights))
        d_h = np.zeros((layout.columns, hidden), dtype)
        d_h[layout.final, :size] = last[0]
        d_carry = np.zeros((layout.columns, cell.carries * hidden), dtype)
        for i, value in enumerate(last[1:]):
            d_carry[layout.final, i * hidden : i * hidden + size] = value
        none = d_h[0]
        late, d_m = none, d_h[:0]
        if cell.order_late:
            late = pack(of.h, cell.order_late, hidden, size=size)
            d_m = np.empty_like(d_h)
        v = none
        if of.v is not None:
            v = np.zeros((cell.vectors, hidden), dtype)
            v[:, :size] = of.v
            v = v.reshape(-1)
        packed = pack(of.h, cell.order_h, hidden, size=size)
        call: tuple = (cell, layout.starts, layout.ends, d_y, packed, late)
        zero = np.zeros(hidden, dtype)
        calls.append((*call, zero, v, side.h, side.carry, side.tape, d_h, d_carry, d_m))
        states.append((d_h, d_carry))
    _run(recurrence.backward_slice, meet, count, calls)
    d_xs, firsts = [], []
    for of, out, side, (d_h, d_carry) in zip(weights, grads, kept, states, strict=True):
        d_xs.append(_gradients(cell, of, out, side, want_d_x))
        size, first = of.h.shape[1], side.layout.first
        hidden = d_h.shape[1]
        parts = [d_carry[first, i * hidden : i * hidden + size] for i in range(cell.carries)]
        firsts.append([side.layout.begin(part) for part in (d_h[first, :size], *parts)])
    return d_xs, firsts


def _gradients(cell: Cell, of: Weights, out: Weights, kept: Kept, want_d_x: bool) -> np.ndarray:
    """Those of the weights, added to `out`, and d_x, from the gradients of the gates."""
    layout, size, dtype = kept.layout, of.h.shape[1], of.h.dtype
    hidden, inputs, count = padded(size, dtype), of.x.shape[1], layout.count
    tokens = kept.x.dtype == np.int32
    unused = np.zeros(len(of.x), dtype)
    d_b_x = unused if out.b_x is None else out.b_x
    d_b_h = out.b_h
    if d_b_h is None:
        d_b_h = unused if tokens else unused.copy()
    gates, order = (cell.gates, size), list(cell.order_x)
    if tokens:
        kinds = inputs if kept.vectors is None else len(kept.vectors)
        rows = zeros((kinds, cell.gates, hidden), dtype)
        if kept.vectors is None:
            rows[:, :, :size] = out.x.reshape(*gates, inputs)[order].transpose(2, 0, 1)
        sums = np.zeros((cell.gates, hidden), dtype)
        sums[:, :size] = d_b_x.reshape(gates)[order]
        d_x = np.empty((0, inputs), dtype)
        into = rows.reshape(kinds, -1), sums.reshape(-1)
    else:
        d_x = empty((count if want_d_x else 0, inputs), dtype)
        into = out.x, d_b_x
    need = want_d_x and not tokens
    packed = pack(of.x, cell.order_x, hidden) if need else np.zeros(hidden, dtype)
    parts = parts_for(count * cell.gates * hidden * size, cell.gates * hidden // lanes(dtype))
    run(
        recurrence.gradients,
        parts,
        cell.tail,
        cell.operand,
        cell.into,
        layout.rows,
        layout.before,
        kept.x,
        kept.h,
        kept.tape,
        indices(cell.order_x),
        indices(cell.order_h),
        indices(cell.order_late),
        packed,
        np.zeros(inputs, dtype),
        d_x,
        into[0],
        out.h,
        into[1],
        d_b_h,
    )
    if out.v is not None:
        sums_v = np.zeros((cell.trained, hidden), dtype)
        sums_v[:, :size] = out.v
        blocks = hidden // lanes(dtype)
        arguments = (cell, layout.rows, layout.before, kept.h, kept.carry, kept.tape)
        share = parts_for(count * hidden * ELEMENT, blocks)
        run(recurrence.vector_gradients, share, *arguments, sums_v.reshape(-1))
        out.v[...] = sums_v[:, :size]
    if tokens:
        if kept.vectors is None:
            out.x.reshape(*gates, inputs)[order] = rows[:, :, :size].transpose(1, 2, 0)
        else:
            d_x = _gradient_of_vectors(cell, of, out, kept.vectors, into[0], want_d_x)
        d_b_x.reshape(gates)[order] = sums[:, :size]
    return d_x


def _gradient_of_vectors(
    cell: Cell, of: Weights, out: Weights, vectors: np.ndarray, d_table: np.ndarray, want: bool
) -> np.ndarray:
    """The gradient of vectors, from that of their products with W_x; adds to that of W_x."""
    size, dtype = of.h.shape[1], of.h.dtype
    (count, n), inputs = d_table.shape, vectors.shape[1]
    hidden = n // cell.gates
    d_vectors = empty((count if want else 0, inputs), dtype)
    same_order = out.x.shape[0] == n and cell.order_x == tuple(range(cell.gates))
    d_w = out.x if same_order else zeros((n, inputs), dtype)
    run(
        gemm.affine_gradients,
        parts_for(count * n * inputs, n // lanes(dtype)),
        even(1, count).rows,
        vectors,
        d_table,
        pack(of.x, cell.order_x, hidden) if want else np.zeros(inputs, dtype),
        np.zeros(inputs, dtype),
        d_vectors,
        d_w,
        np.zeros(n, dtype),
    )
    if not same_order:
        found = d_w.reshape(cell.gates, hidden, inputs)[:, :size]
        out.x.reshape(cell.gates, size, inputs)[list(cell.order_x)] += found
    return d_vectors
