"""One layer over a whole sequence: its directions, joined, and its pieces, one after the other.

Usually there is one piece, and what backward needs of it is kept. If there are more, only the
states between them are kept, and backward runs each piece again before it goes back through it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastrnn.cells import Cell
from fastrnn.layout import Layout
from fastrnn.memory import empty
from fastrnn.single import Kept, Sums, Weights, backward, forward

Parts = list[np.ndarray]  # of a state, (B, H) each


@dataclass
class Made:
    """What a layer keeps for backward.

    xs     of each piece
    begun  the states that each side had before each turn
    kept   of the one piece, of each side; None if there are more
    """

    xs: list[np.ndarray]
    begun: list[list[Parts]]
    kept: list[Kept] | None

    @property
    def nbytes(self) -> int:
        if self.kept is not None:
            return sum(side.nbytes for side in self.kept)
        return sum(part.nbytes for turn in self.begun for side in turn for part in side)

    def copy(self) -> Made:
        """With tapes of its own, which backward overwrites."""
        kept = self.kept
        return Made(self.xs, self.begun, None if kept is None else [side.copy() for side in kept])


def _turns(pieces: list[Layout], sides: int) -> list[list[int]]:
    """Which piece each side takes at each turn: the second direction begins with the last."""
    count = len(pieces)
    return [[turn, count - 1 - turn][:sides] for turn in range(count)]


def _layouts(pieces: list[Layout], at: list[int]) -> list[Layout]:
    return [pieces[p].turned if side else pieces[p] for side, p in enumerate(at)]


def _inputs(pieces: list[Layout], xs: list[np.ndarray], at: list[int]) -> list[np.ndarray]:
    return [xs[p][pieces[p].flip] if side else xs[p] for side, p in enumerate(at)]


def forward_layer(
    cell: Cell,
    weights: list[Weights],
    pieces: list[Layout],
    xs: list[np.ndarray],
    table: np.ndarray | None,
    states: list[Parts],
    *,
    merge: str,
    keep: bool,
) -> tuple[list[np.ndarray], list[Parts], Made]:
    """(output of each piece, final states of each side, what backward needs)."""
    sides, whole = len(weights), len(pieces) == 1
    outputs: list[list[np.ndarray]] = [[] for _ in range(sides)]
    begun: list[list[Parts]] = []
    kept = None
    if not whole:
        weights = _packed_once(weights)
        # The caller may go on with the arrays.
        states = [[part.copy() for part in side] for side in states]
    for at in _turns(pieces, sides):
        if keep and not whole:
            begun.append(states)
        inputs = _inputs(pieces, xs, at)
        layouts = _layouts(pieces, at)
        done = forward(cell, weights, layouts, inputs, table, states, keep=keep and whole)
        states = [side.final(cell.carries) for side in done]
        for output, side in zip(outputs, done, strict=True):
            output.append(side.output)
        if keep and whole:
            kept = done
    if sides == 1:
        ys = outputs[0]
    else:
        both = zip(pieces, outputs[0], reversed(outputs[1]), strict=True)
        ys = [_join(one, other[piece.flip], merge) for piece, one, other in both]
    return ys, states, Made(xs, begun, kept)


def _packed_once(weights: list[Weights]) -> list[Weights]:
    """For several pieces."""
    return [of if of.packed is not None else of._replace(packed={}) for of in weights]


def _join(one: np.ndarray, other: np.ndarray, merge: str) -> np.ndarray:
    """Both directions' outputs (N, H), in the order of the first."""
    count, size = one.shape
    if merge == "concat":
        y = empty((count, 2 * size), one.dtype)
        y[:, :size] = one
        y[:, size:] = other
        return y
    y = empty((count, size), one.dtype)
    np.add(one, other, out=y)
    if merge == "mean":
        y *= one.dtype.type(0.5)
    return y


def _part_of(d_y: np.ndarray, layout: Layout, side: int, sides: int, merge: str) -> np.ndarray:
    """The opposite: the gradient of the output of a side."""
    if sides == 1:
        return d_y
    if merge == "concat":
        size = d_y.shape[1] // 2
        d_y = d_y[:, side * size : (side + 1) * size]
    elif merge == "mean":
        d_y = d_y * d_y.dtype.type(0.5)
    # What is the same for all steps has no order.
    if side and len(d_y) == layout.count:
        d_y = d_y[layout.flip]
    return np.ascontiguousarray(d_y)


def backward_layer(
    cell: Cell,
    weights: list[Weights],
    sums: list[Sums],
    pieces: list[Layout],
    made: Made,
    table: np.ndarray | None,
    d_ys: list[np.ndarray],
    d_states: list[Parts],
    *,
    merge: str,
    want_d_x: bool,
) -> tuple[list[np.ndarray], list[Parts]]:
    """(d_x of each piece, empty for tokens; gradients of the initial states of each side).

    d_ys  of each piece, (N, H) or (1, H) for all steps alike
    """
    sides = len(weights)
    if made.kept is None:
        weights = _packed_once(weights)
    d_xs: list[np.ndarray | None] = [None] * len(pieces)
    turns = _turns(pieces, sides)
    for turn in reversed(range(len(turns))):
        at = turns[turn]
        kept = made.kept
        if kept is None:
            inputs, layouts = _inputs(pieces, made.xs, at), _layouts(pieces, at)
            kept = forward(cell, weights, layouts, inputs, table, made.begun[turn], keep=True)
        parts = [_part_of(d_ys[p], pieces[p], side, sides, merge) for side, p in enumerate(at)]
        found, d_states = backward(cell, weights, sums, kept, parts, d_states, want_d_x=want_d_x)
        for side, (p, d_x) in enumerate(zip(at, found, strict=True)):
            if side and len(d_x):
                d_x = d_x[pieces[p].flip]
            before = d_xs[p]
            d_xs[p] = d_x if before is None else np.add(before, d_x, out=before)
    return [d_x for d_x in d_xs if d_x is not None], d_states
