"""One layer over a whole sequence: its directions, joined, and its pieces, one after the other.

Usually there is one piece, and what backward needs of it is kept. If there are more, only the
states between them are kept, and backward runs each piece again before it goes back through it;
but for the last of the last layer, which it begins with.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastrnn.cells import Cell
from fastrnn.layout import Layout
from fastrnn.memory import empty
from fastrnn.noise import Noise
from fastrnn.rows import clear, gather, join, part_of, put
from fastrnn.single import Kept, Sums, Weights, backward, forward

Parts = list[np.ndarray]  # of a state, (B, H) each


class Rows(NamedTuple):
    """Rows of all pieces.

    whole    of all together, if they follow one another in memory
    outside  each part is the array of the caller's, where rows are at `Layout.source`
    """

    parts: list[np.ndarray]
    whole: np.ndarray | None
    outside: bool = False


def in_order(pieces: list[Layout]) -> bool:
    """Whether their rows, one piece after the other, are the caller's in the caller's order."""
    if len(pieces) == 1:
        return pieces[0].plain
    starts = itertools.accumulate((piece.count for piece in pieces), initial=0)
    # The last start is the end.
    return all(
        piece.plain and piece.begin == start and piece.columns == piece.batch
        for piece, start in zip(pieces, starts, strict=False)
    )


def rows_for(pieces: list[Layout], width: int, dtype: Any, *, states: bool = False) -> Rows:
    """Memory; with `states` a row more for each column in front of those of a piece.

    Where pieces follow one another these are the last rows of the piece before, as they should be
    unless a sequence begins anew there.
    """
    if len(pieces) == 1:
        (only,) = pieces
        before = only.columns if states else 0
        rows = empty((before + only.count, width), dtype)
        return Rows([rows], rows[before:] if only.plain else None)
    ends = list(itertools.accumulate(piece.count for piece in pieces))
    anew = states and any(piece.fresh is not None for piece in pieces)
    if in_order(pieces) and not anew:
        starts = [0, *ends[:-1]]
        before = pieces[0].batch if states else 0
        whole = empty((before + ends[-1], width), dtype)
        bounds = zip(starts, ends, strict=True)
        return Rows([whole[start : before + end] for start, end in bounds], whole[before:])
    extra = [p.columns if states else 0 for p in pieces]
    counts = zip(extra, pieces, strict=True)
    return Rows([empty((more + piece.count, width), dtype) for more, piece in counts], None)


def as_outside(pieces: list[Layout], rows: Rows, steps: int) -> np.ndarray:
    """The rows of all pieces where the caller has them, (T*B, ...); zeros where no step is."""
    total, count = steps * pieces[0].batch, sum(piece.count for piece in pieces)
    if count == total and rows.whole is not None:
        return rows.whole
    one = rows.parts[0]
    array = empty((total, one.shape[1]), one.dtype)
    for piece, values in zip(pieces, rows.parts, strict=True):
        piece.scatter(values, array)
    if count < total:
        left = np.ones(total, bool)
        for piece in pieces:
            left[piece.source] = False
        clear(np.flatnonzero(left), array)
    return array


@dataclass
class Made:
    """What a layer keeps for backward.

    xs     of each piece
    noises of each side
    begun  the states that each side had before each turn, but for one that is kept
    kept   of the last turn, of each side; None if it has to run again, too
    """

    xs: Rows
    noises: list[Noise | None]
    begun: list[list[Parts]]
    kept: list[Kept] | None

    @property
    def nbytes(self) -> int:
        states = sum(part.nbytes for turn in self.begun for side in turn for part in side)
        return states + sum(side.nbytes for side in self.kept or ())

    def copy(self) -> Made:
        """With tapes of its own, which backward overwrites."""
        kept = self.kept
        copies = None if kept is None else [side.copy() for side in kept]
        return Made(self.xs, self.noises, self.begun, copies)


def _turns(pieces: list[Layout], sides: int) -> list[list[int]]:
    """Which piece each side takes at each turn: the second direction begins with the last."""
    count = len(pieces)
    return [[turn, count - 1 - turn][:sides] for turn in range(count)]


def _layouts(pieces: list[Layout], at: list[int]) -> list[Layout]:
    return [pieces[p].turned if side else pieces[p] for side, p in enumerate(at)]


def _inputs(pieces: list[Layout], xs: Rows, at: list[int]) -> list[np.ndarray]:
    return [
        gather(pieces[p].flip, xs.parts[p]) if side else xs.parts[p] for side, p in enumerate(at)
    ]


def forward_layer(
    cell: Cell,
    weights: list[Weights],
    pieces: list[Layout],
    xs: Rows,
    table: np.ndarray | None,
    states: list[Parts],
    noises: list[Noise | None],
    *,
    merge: str,
    keep: bool,
    last: bool,
) -> tuple[Rows, list[Parts], Made]:
    """(output of each piece, final states of each side, what backward needs).

    last  whether backward begins with this layer
    """
    sides, whole = len(weights), len(pieces) == 1
    outputs: list[list[np.ndarray]] = [[] for _ in range(sides)]
    (rows, width), dtype = weights[0].h.shape, weights[0].h.dtype
    size = rows // cell.gates
    begun: list[list[Parts]] = []
    kept = None
    one = Rows([], None)
    if sides == 1:
        one = rows_for(pieces, width, dtype, states=True)
    if whole and table is not None:
        # It may be another the next time.
        weights = [of._replace(packed=None) for of in weights]
    if not whole:
        weights = _packed_once(weights)
        # The caller may go on with the arrays.
        states = [[part.copy() for part in side] for side in states]
    turns = _turns(pieces, sides)
    most = 0 if whole else max(piece.steps * piece.columns for piece in pieces)
    for turn, at in enumerate(turns):
        kept_on = keep and (whole or (last and turn == len(turns) - 1))
        if keep and not kept_on:
            begun.append(states)
        inputs = _inputs(pieces, xs, at)
        layouts = _layouts(pieces, at)
        hs = [one.parts[at[0]]] if sides == 1 else [None] * sides
        run = cell, weights, layouts, inputs, table, states, hs, noises
        done = forward(*run, keep=kept_on, most=most)
        states = [side.final(cell, size) for side in done]
        if not whole or sides > 1:
            # Views would keep memory that is of no use any more.
            states = [[part.copy() for part in side] for side in states]
        for output, side in zip(outputs, done, strict=True):
            output.append(side.output)
        if kept_on:
            kept = done
        # Its memory is there for the next turn.
        del done, inputs, side
    if sides == 1:
        ys = Rows(outputs[0], one.whole)
    else:
        ys = rows_for(pieces, 2 * width if merge == "concat" else width, dtype)
        for piece, first, second, y in zip(
            pieces, outputs[0], reversed(outputs[1]), ys.parts, strict=True
        ):
            join(piece.flip, first, second, merge, y)
    return ys, states, Made(xs, noises, begun, kept)


def _packed_once(weights: list[Weights]) -> list[Weights]:
    """For several pieces."""
    return [of._replace(packed={}) for of in weights]


def _part_of(
    d_ys: Rows, piece: Layout, p: int, side: int, sides: int, merge: str
) -> tuple[np.ndarray, np.ndarray]:
    """The gradient of the output of a side, and which row of it belongs to each step."""
    d_y = d_ys.parts[p]
    alike = len(d_y) == 1
    if sides == 1:
        order = piece.source if d_ys.outside else piece.alone
        return d_y, np.zeros_like(order) if alike else order
    size = d_y.shape[1] // 2 if merge == "concat" else d_y.shape[1]
    layout = piece.turned if side else piece
    if alike:
        return part_of(d_y, side, None, merge, size), np.zeros_like(piece.alone)
    order = layout.source if d_ys.outside else piece.flip if side else piece.alone
    return part_of(d_y, side, order, merge, size), piece.alone


def backward_layer(
    cell: Cell,
    weights: list[Weights],
    sums: list[Sums],
    pieces: list[Layout],
    made: Made,
    table: np.ndarray | None,
    d_ys: Rows,
    d_states: list[Parts],
    *,
    merge: str,
    want_d_x: bool,
    norms: np.ndarray | None = None,
) -> tuple[Rows, list[Parts]]:
    """(d_x of each piece, none if it is not wanted; gradients of the initial states of each side).

    d_ys   of each piece; a part (1, H) is that of all steps
    norms  (sides, T*B) in float64, filled with the norms of the gradients of h
    """
    sides = len(weights)
    if len(pieces) > 1:
        weights = _packed_once(weights)
    d_xs = Rows([], None)
    if want_d_x:
        d_xs = rows_for(pieces, weights[0].x.shape[1], weights[0].x.dtype)
    fresh = [True] * len(pieces)
    turns = _turns(pieces, sides)
    for turn in reversed(range(len(turns))):
        at = turns[turn]
        # Its memory is there for the next turn.
        kept, made.kept = made.kept, None
        if kept is None:
            inputs, layouts = _inputs(pieces, made.xs, at), _layouts(pieces, at)
            begun, nowhere = made.begun[turn], [None] * sides
            kept = forward(
                cell, weights, layouts, inputs, table, begun, nowhere, made.noises, keep=True
            )
        parts = [_part_of(d_ys, pieces[p], p, side, sides, merge) for side, p in enumerate(at)]
        watch = norms is not None
        d_states, d_rs, flows = backward(cell, weights, kept, parts, d_states, watch=watch)
        for side, flow in enumerate(flows):
            if norms is not None and flow is not None:
                squares = np.einsum("nh,nh->n", flow, flow, dtype=np.float64)
                norms[side, kept[side].layout.source] = np.sqrt(squares)
        for side, (p, total) in enumerate(zip(at, sums, strict=True)):
            d_x = d_xs.parts[p] if want_d_x else None
            if d_x is None or (fresh[p] and not side):
                total.add(kept[side], d_x, d_rs[side])
            else:
                own = empty(d_x.shape, d_x.dtype)
                total.add(kept[side], own, d_rs[side])
                put(pieces[p].flip if side else None, own, d_x, add=not fresh[p])
            fresh[p] = False
        del kept, parts, d_rs, flows, flow, total
    return d_xs, d_states
