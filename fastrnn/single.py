"""One layer: memory and packed weights for its kernels, for one direction or both at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from fastrnn import gemm, norm, recurrence
from fastrnn.cells import Cell
from fastrnn.layout import Layout, even
from fastrnn.meeting import NOBODY, together
from fastrnn.memory import empty, zeros
from fastrnn.noise import Drawn, Noise, draw
from fastrnn.pack import Packed, indices, pack, pack_layer
from fastrnn.parallel import ELEMENT, get_num_threads, parts_for, run, run_all
from fastrnn.simd import lanes, padded
from fastrnn.units import parts_of_units

# A chunk of pre-activations of one slice of the batch stays within the second-level cache, unless
# too few rows would then share a pass over the weights.
_CHUNK_BYTES = 1 << 18


class Weights(NamedTuple):
    """Of one direction, or their gradients; no biases, no vectors, no projection: None.

    x, h, b_x, b_h   as in `params`
    v       the cell's vectors, arrays (n, H) of several; of gradients those that are trained
    r       the projection (P, H)
    packed  what they were packed to, where they do not change for now
    """

    x: np.ndarray
    h: np.ndarray
    b_x: np.ndarray | None
    b_h: np.ndarray | None
    v: list[np.ndarray] | None = None
    r: np.ndarray | None = None
    packed: dict[tuple, Any] | None = None

    def pack(self, cell: Cell, tokens: bool, apart: bool, table: np.ndarray | None) -> Packed:
        """The weights as forward takes them."""
        kept = {} if self.packed is None else self.packed
        if (tokens, apart) not in kept:
            packed = pack_layer(cell, *self[:6], tokens=tokens, apart=apart, table=table)
            kept[tokens, apart] = packed
        return kept[tokens, apart]

    def pack_back(self, name: str, order: tuple[int, ...], gap: int, size: int) -> np.ndarray:
        """The gates `order`, of `size` rows, of x, h or r (`name`) as backward takes them."""
        kept = {} if self.packed is None else self.packed
        if (name, order) not in kept:
            kept[name, order] = pack(getattr(self, name), order, gap, size=size)
        return kept[name, order]


@dataclass
class Kept:
    """What one direction of a layer keeps for backward; rows as in `fastrnn.layout`."""

    layout: Layout
    x: np.ndarray
    h: np.ndarray
    carry: np.ndarray
    tape: np.ndarray
    stats: np.ndarray | None
    drawn: Drawn | None

    @property
    def nbytes(self) -> int:
        more = 0 if self.stats is None else self.stats.nbytes
        if self.fed is not self.h:
            more += self.fed.nbytes
        return self.h.nbytes + self.carry.nbytes + self.tape.nbytes + more

    @property
    def fed(self) -> np.ndarray:
        """h as products saw it."""
        return self.h if self.drawn is None else self.drawn.fed

    @property
    def output(self) -> np.ndarray:
        """(N, H)."""
        return self.h[self.layout.columns :]

    def final(self, cell: Cell, size: int) -> list[np.ndarray]:
        """The parts of the final state, (B, H) each; views, where they may be."""
        layout, hidden = self.layout, padded(size, self.h.dtype)
        # Without a tape there is but the latest of each column.
        rows = layout.last if len(self.carry) == len(self.h) else layout.final
        parts = [self.carry[rows, i * hidden : i * hidden + size] for i in range(cell.carries)]
        return [self.h[layout.last], *parts]

    def inside(self, cell: Cell, size: int) -> dict[str, np.ndarray]:
        """Gates and further states of all steps, (N, H) each, by their names."""
        hidden, columns = padded(size, self.h.dtype), self.layout.columns
        found = {}
        for names, array in (
            (cell.gate_names, self.tape),
            (cell.carry_names, self.carry[columns:]),
        ):
            for i, name in enumerate(names):
                if name:
                    found[name] = array[:, i * hidden : i * hidden + size]
        return found

    def copy(self) -> Kept:
        """With a tape of its own, which backward overwrites."""
        return replace(self, tape=self.tape.copy())


def scratch_rows(row: int, columns: int, most: int, dtype: np.dtype, threads: int) -> int:
    """Rows of a tape that is not kept, as many as any piece of a call needs; see `forward`."""
    chunks = threads * max(_CHUNK_BYTES // (row * dtype.itemsize) + 1, gemm.HEIGHT)
    return min(most, max(columns, chunks))


def _sharing(cell: Cell, layouts: list[Layout], of: Weights, work: int) -> tuple[int, int]:
    """(parts of the units of one direction, parts of the columns of all)."""
    # Both directions have as many.
    steps, columns = layouts[0].steps, layouts[0].columns
    total = columns * len(layouts)
    meet = parts_of_units(cell, steps, columns, len(of.h) // cell.gates, of.h.dtype)
    # Two directions feed two threads without meeting.
    if len(layouts) > 1 and total >= get_num_threads():
        meet = 1
    return meet, parts_for(work, total)


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
    table: np.ndarray | None,
    states: list[list[np.ndarray]],
    hs: Sequence[np.ndarray | None],
    noises: Sequence[Noise | None],
    *,
    keep: bool,
    most: int = 0,
) -> list[Kept]:
    """Each direction's run over its x (N, I) from its state, (B, H) for each part of it.

    table   (V, I): x are tokens that stand for its rows
    hs      memory for h, if there is any
    keep    the tape, for backward
    most    steps times columns of the largest of several pieces; 0: this one is the only one.
            The memory of a tape that is not kept is then of one size, so that it does for all
    """
    rows, width = weights[0].h.shape
    size, dtype = rows // cell.gates, weights[0].h.dtype
    hidden = padded(size, dtype)
    tokens = xs[0].dtype == np.int32
    inputs = 0 if tokens else weights[0].x.shape[1]
    work = layouts[0].count * len(layouts) * cell.gates * hidden * (width + inputs)
    meet, parts = _sharing(cell, layouts, weights[0], work)
    row = cell.tape * hidden
    done, calls = [], []
    for of, layout, x, state, h, noise in zip(
        weights, layouts, xs, states, hs, noises, strict=True
    ):
        columns, count = layout.columns, layout.count
        rows, share = columns, row // meet
        if meet == 1:
            rows = -(-columns // -(-parts // len(weights)))
        chunk = max(_CHUNK_BYTES // (rows * share * dtype.itemsize), gemm.HEIGHT // rows)
        chunk = max(1, min(layout.steps, chunk))
        if h is None:
            h = empty((columns + count, width), dtype)
        if columns > layout.batch:
            h[:columns] = 0
        h[layout.first] = layout.heard(state[0])
        carry = empty((columns + count if keep else columns, cell.carries * hidden), dtype)
        if columns > layout.batch or hidden > size:
            carry[:columns] = 0
        for i, value in enumerate(state[1:]):
            carry[layout.first, i * hidden : i * hidden + size] = layout.heard(value)
        taped = count if keep else chunk * columns
        if most and not keep:
            alike = scratch_rows(row, columns, most, dtype, get_num_threads())
            taped = max(taped, alike)
        tape = empty((taped, row), dtype)
        stats = np.empty((len(tape), 3), dtype) if cell.normed else None
        packed = of.pack(cell, tokens, meet > 1, table)
        drawn = draw(noise, layout, h)
        call: tuple = (cell, size, chunk, int(keep), layout.starts, layout.ends)
        calls.append((*call, x, *packed, h, carry, tape, stats, drawn))
        done.append(Kept(layout, x, h, carry, tape, stats, drawn))
    _run(recurrence.forward_slice, meet, parts, calls)
    return done


def backward(
    cell: Cell,
    weights: list[Weights],
    kept: list[Kept],
    d_ys: list[tuple[np.ndarray, np.ndarray]],
    d_last: list[list[np.ndarray]],
    *,
    watch: bool = False,
) -> tuple[list[list[np.ndarray]], list[np.ndarray | None], list[np.ndarray | None]]:
    """Turns each direction's tape into gradients of its gates.

    d_ys  gradients (..., H) and which row of them belongs to each step, (N,)
    Returns for each direction the gradients of its initial state, those of what its projection
    gives (N, P), if it has one, and with `watch` those of h at each step (N, H).
    """
    rows, width = weights[0].h.shape
    size, dtype = rows // cell.gates, weights[0].h.dtype
    hidden, wide = padded(size, dtype), padded(width, dtype)
    layouts = [side.layout for side in kept]
    work = layouts[0].count * len(layouts) * cell.gates * hidden * width
    meet, parts = _sharing(cell, layouts, weights[0], work)
    calls, states, projected, flows = [], [], [], []
    for of, side, d_y, last in zip(weights, kept, d_ys, d_last, strict=True):
        layout = side.layout
        d_h = np.zeros((layout.columns, wide), dtype)
        d_h[layout.final, :width] = last[0]
        d_carry = np.zeros((layout.columns, cell.carries * hidden), dtype)
        for i, value in enumerate(last[1:]):
            d_carry[layout.final, i * hidden : i * hidden + size] = value
        none = np.zeros(hidden, dtype)
        late, back, v, d_m, d_s, d_r = none, none, none, d_h[:0], d_h[:0], d_h[:0]
        if cell.order_late:
            late = of.pack_back("h", cell.order_late, hidden, size)
        if of.r is not None:
            back = of.pack_back("r", (0,), width, width)
            d_r = empty((layout.count, width), dtype)
        if cell.normed:
            d_s = np.zeros((layout.columns, cell.gates * hidden), dtype)
        if cell.order_late or cell.normed or of.r is not None or side.fed is not side.h:
            d_m = np.empty((layout.columns, hidden), dtype)
        if of.v is not None:
            v = _in_registers(of.v, hidden)
        flow = empty((layout.count, width), dtype) if watch else None
        packed = of.pack_back("h", cell.order_h, hidden, size)
        call: tuple = (cell, size, layout.starts, layout.ends, *d_y, packed, late, back, none, v)
        memory = side.h, side.carry, side.tape, side.stats, d_h, d_carry, d_m, d_s, d_r
        calls.append((*call, *memory, side.drawn, flow))
        states.append((d_h, d_carry))
        projected.append(None if of.r is None else d_r)
        flows.append(flow)
    _run(recurrence.backward_slice, meet, parts, calls)
    firsts = []
    for side, (d_h, d_carry) in zip(kept, states, strict=True):
        first = side.layout.first
        carries = [d_carry[first, i * hidden : i * hidden + size] for i in range(cell.carries)]
        firsts.append([side.layout.heard(part) for part in (d_h[first, :width], *carries)])
    return firsts, projected, flows


def _in_registers(vectors: list[np.ndarray], hidden: int) -> np.ndarray:
    """All rows of vectors (n, H), zeros behind them up to whole registers, as one (rows * Hp)."""
    rows = np.concatenate(vectors)
    spread = np.zeros((len(rows), hidden), rows.dtype)
    spread[:, : rows.shape[1]] = rows
    return spread.reshape(-1)


class Sums:
    """Gradients of one direction's weights while they are being added up, piece after piece.

    Those of tokens stand in rows, one for each, until the end.
    """

    def __init__(
        self, cell: Cell, of: Weights, out: Weights, *, tokens: bool, table: np.ndarray | None
    ) -> None:
        # Pieces need the same.
        self.cell, self.of, self.out = cell, of._replace(packed={}), out
        self.table, self.tokens = table, tokens
        self.size, dtype = len(of.h) // cell.gates, of.h.dtype
        size = self.size
        self.hidden = padded(size, dtype)
        unused = np.zeros(len(of.x), dtype)
        self.d_b_x = unused if out.b_x is None else out.b_x
        self.d_b_h = out.b_h
        if out.b_h is None:
            self.d_b_h = unused if tokens else unused.copy()
        self.into: tuple[np.ndarray, np.ndarray] = (out.x, self.d_b_x)
        if tokens:
            rows = zeros((self._kinds, cell.gates, self.hidden), dtype)
            if table is None:
                rows[:, :, :size] = self._by_gate(out.x).transpose(2, 0, 1)
            biases = np.zeros((cell.gates, self.hidden), dtype)
            biases[:, :size] = self._by_gate(self.d_b_x)
            self.into = rows.reshape(self._kinds, -1), biases.reshape(-1)
        if out.v is not None:
            self.d_v = _in_registers(out.v, self.hidden)

    @property
    def _kinds(self) -> int:
        return self.of.x.shape[1] if self.table is None else len(self.table)

    def _by_gate(self, array: np.ndarray) -> np.ndarray:
        """(G*H, ...) as (G, H, ...) in the cell's order: a copy."""
        gates = array.reshape(self.cell.gates, -1, *array.shape[1:])
        return gates[list(self.cell.order_x)]

    def add(self, kept: Kept, d_x: np.ndarray | None, d_r: np.ndarray | None) -> None:
        """Those of a piece, from the gradients of its gates and projection; fills d_x (N, I)."""
        cell, of, layout, dtype = self.cell, self.of, kept.layout, kept.h.dtype
        size, inputs, count = self.size, of.x.shape[1], layout.count
        blocks = self.hidden // lanes(dtype)
        if self.out.v is not None:
            parts = parts_for(count * self.hidden * ELEMENT, blocks)
            states = kept.h, kept.carry, kept.tape
            run(
                recurrence.vector_gradients,
                parts,
                cell,
                size,
                layout.rows,
                layout.before,
                *states,
                self.d_v,
            )
        if kept.stats is not None and of.v is not None:
            # After the gradients of gains, before those of weights.
            parts = parts_for(count * kept.tape.shape[1] * ELEMENT, count)
            v = _in_registers(of.v, self.hidden)
            run(norm.norm_gradients, parts, cell, size, v, kept.stats, kept.tape)
        nothing = np.zeros(max(inputs, self.hidden), dtype)
        packed = nothing
        if d_x is None:
            d_x = np.empty((0, inputs), dtype)
        else:
            packed = of.pack_back("x", cell.order_x, self.hidden, size)
        run(
            recurrence.gradients,
            parts_for(count * cell.gates * self.hidden * size, cell.gates * blocks),
            cell.tail,
            cell.operand,
            cell.into,
            size,
            layout.rows,
            layout.before,
            kept.x,
            kept.fed,
            kept.tape,
            indices(cell.order_x),
            indices(cell.order_h),
            indices(cell.order_late),
            packed,
            nothing[:inputs],
            d_x,
            self.into[0],
            self.out.h,
            self.into[1],
            self.d_b_h,
        )
        if d_r is not None:
            width = d_r.shape[1]
            parts = parts_for(count * width * size, padded(width, dtype) // lanes(dtype))
            arrays = d_r, kept.tape, cell.tape, self.out.r
            run(recurrence.projection_gradients, parts, size, layout.rows, *arrays)

    def close(self, want_d_table: bool) -> np.ndarray | None:
        """Put the sums where they belong; returns the gradient of the table, if there is one."""
        size, cell, d_table = self.size, self.cell, None
        # Packed weights make room for those of the next layer.
        self.of = self.of._replace(packed=None)
        if self.out.v is not None:
            rows = self.d_v.reshape(-1, self.hidden)[:, :size]
            for vectors in self.out.v:
                vectors[...], rows = rows[: len(vectors)], rows[len(vectors) :]
        if self.tokens:
            rows, biases = (a.reshape(*a.shape[:-1], cell.gates, -1) for a in self.into)
            if self.table is None:
                gates = self.out.x.reshape(cell.gates, size, -1)
                gates[list(cell.order_x)] = rows[:, :, :size].transpose(1, 2, 0)
            else:
                d_table = self._gradient_of_table(self.table, self.into[0], want_d_table)
            self.d_b_x.reshape(cell.gates, size)[list(cell.order_x)] = biases[:, :size]
        return d_table

    def _gradient_of_table(
        self, table: np.ndarray, d_products: np.ndarray, want: bool
    ) -> np.ndarray:
        """Its gradient, from that of its products with W_x; adds to that of W_x."""
        cell, of, d_w_x, dtype = self.cell, self.of, self.out.x, table.dtype
        (count, n), inputs = d_products.shape, of.x.shape[1]
        d_table = empty((count if want else 0, inputs), dtype)
        same_order = len(d_w_x) == n and cell.order_x == tuple(range(cell.gates))
        d_w = d_w_x if same_order else zeros((n, inputs), dtype)
        run(
            gemm.affine_gradients,
            parts_for(count * n * inputs, n // lanes(dtype)),
            even(1, count, 0).rows,
            table,
            d_products,
            pack(of.x, cell.order_x, self.hidden, size=self.size)
            if want
            else np.zeros(inputs, dtype),
            np.zeros(inputs, dtype),
            d_table,
            d_w,
            np.zeros(n, dtype),
        )
        if not same_order:
            found = d_w.reshape(cell.gates, self.hidden, inputs)[:, : self.size]
            d_w_x.reshape(cell.gates, -1, inputs)[list(cell.order_x)] += found
        return d_table
