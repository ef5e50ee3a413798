"""Rows of arrays in another order: gathered, scattered, joined, added, on all threads."""

from __future__ import annotations

import numpy as np

from fastrnn.crew import divided
from fastrnn.jit import kernel
from fastrnn.memory import empty
from fastrnn.parallel import ELEMENT, parts_for, run
from fastrnn.simd import load_n, store_n, width_of

NO_ORDER = np.empty(0, np.intp)


@kernel
def _gather(part, parts, order, start, scale, add, x, y):
    """y[r] = x[order[r], start:...] * scale, or that more if `add`; without an order of x[r]."""
    if divided(part, parts):
        return
    rows, width = y.shape
    for r in range(rows * part // parts, rows * (part + 1) // parts):
        source = (order[r] if order.size > 0 else r) * x.shape[1] + start
        for u in range(0, width, width_of(y)):
            value = load_n(x, source + u, width - u) * scale
            if add:
                value = load_n(y, r * width + u, width - u) + value
            store_n(y, r * width + u, value, width - u)


@kernel
def _scatter(part, parts, order, x, y):
    """y[order[r]] = x[r]."""
    if divided(part, parts):
        return
    rows, width = x.shape
    for r in range(rows * part // parts, rows * (part + 1) // parts):
        for u in range(0, width, width_of(y)):
            store_n(y, order[r] * width + u, load_n(x, r * width + u, width - u), width - u)


@kernel
def _clear(part, parts, order, y):
    """y[order] = 0."""
    if divided(part, parts):
        return
    width = y.shape[1]
    for r in range(order.size * part // parts, order.size * (part + 1) // parts):
        for u in range(order[r] * width, (order[r] + 1) * width):
            y[0, u] = 0


@kernel
def _join(part, parts, order, beside, scale, one, other, y):
    """y[r] = one[r] and other[order[r]], beside each other, or (their sum) * scale."""
    if divided(part, parts):
        return
    rows, width = one.shape
    for r in range(rows * part // parts, rows * (part + 1) // parts):
        for u in range(0, width, width_of(y)):
            a = load_n(one, r * width + u, width - u)
            b = load_n(other, order[r] * width + u, width - u)
            if beside:
                store_n(y, 2 * r * width + u, a, width - u)
                store_n(y, (2 * r + 1) * width + u, b, width - u)
            else:
                store_n(y, r * width + u, (a + b) * scale, width - u)


def _parts(array: np.ndarray) -> int:
    return parts_for(array.size * ELEMENT, len(array))


def gather(order: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x[order], for x (N, ...)."""
    if x.ndim != 2 or x.dtype.kind != "f":
        return x[order]
    y = empty((len(order), x.shape[1]), x.dtype)
    run(_gather, _parts(y), order, 0, x.dtype.type(1), False, x, y)
    return y


def scatter(order: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """y[order] = x."""
    if x.ndim != 2 or not (x.flags.c_contiguous and y.flags.c_contiguous):
        y[order] = x
    else:
        run(_scatter, _parts(x), order, x, y)


def clear(order: np.ndarray, y: np.ndarray) -> None:
    """y[order] = 0, for y (N, H)."""
    parts = parts_for(order.size * y.shape[1] * ELEMENT, max(1, order.size))
    run(_clear, parts, order, y)


def join(order: np.ndarray, one: np.ndarray, other: np.ndarray, merge: str, y: np.ndarray) -> None:
    """y = one and other[order], (N, H) each, as a bidirectional layer's outputs are joined."""
    scale = y.dtype.type(0.5 if merge == "mean" else 1)
    run(_join, _parts(y), order, merge == "concat", scale, one, other, y)


def part_of(
    d_y: np.ndarray, side: int, order: np.ndarray | None, merge: str, size: int
) -> np.ndarray:
    """The opposite: the gradient (N, size) of one of both, from that of y, in the order given."""
    y = empty((len(d_y if order is None else order), size), d_y.dtype)
    scale = d_y.dtype.type(0.5 if merge == "mean" else 1)
    start = side * size if merge == "concat" else 0
    arguments = NO_ORDER if order is None else order, start, scale, False
    run(_gather, _parts(y), *arguments, d_y, y)
    return y


def put(order: np.ndarray | None, x: np.ndarray, y: np.ndarray, *, add: bool) -> None:
    """y = x[order], or y += x[order]."""
    arguments = NO_ORDER if order is None else order, 0, x.dtype.type(1), add
    run(_gather, _parts(y), *arguments, x, y)
