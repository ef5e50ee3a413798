"""Dropout whose mask is a function of (seed, step, sequence, unit): see `fastrnn.counter`."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastrnn.counter import LOCKED, STEP, WEIGHT, dropped, limit_of, random_bits
from fastrnn.crew import divided
from fastrnn.jit import kernel
from fastrnn.layout import Drawing, Layout, even
from fastrnn.memory import empty
from fastrnn.parallel import ELEMENT, parts_for, run


@kernel
def _dropout(part, parts, x, source, batch, use, seed, limit, scale, y):
    """y = x * scale, or 0 where `dropped`; x and y are (N, units).

    source  (N,): step * batch + sequence; of weights the row, with a batch of 1
    """
    if divided(part, parts):
        return
    rows, units = x.shape
    for row in range(rows * part // parts, rows * (part + 1) // parts):
        t, b = source[row] // batch, source[row] % batch
        key = random_bits(seed, 0 if use == LOCKED else t, b)
        for unit in range(units):
            if dropped(key, use, unit, limit):
                y[row, unit] = 0
            else:
                y[row, unit] = x[row, unit] * scale


def _drop(x: np.ndarray, source: Any, batch: int, use: int, p: float, seed: int, y: Any) -> None:
    scale = x.dtype.type(1 / (1 - p))
    parts = parts_for(x.size * ELEMENT, len(x))
    arguments = source, batch, use, np.uint64(seed % 2**64), limit_of(p), scale
    run(_dropout, parts, x, *arguments, y)


def dropout(
    x: np.ndarray,
    p: float,
    seed: int,
    y: np.ndarray,
    layout: Layout | None = None,
    *,
    locked: bool = False,
    drawing: Drawing | None = None,
) -> np.ndarray:
    """Fill y with x where the mask of `seed` keeps it, scaled by 1 / (1 - p), and with 0 elsewhere.

    x and y are C-contiguous (T, B, H), or (N, H) with the rows of a layout; they may be the same
    array. `locked`: the mask of a sequence is the same at all steps. `drawing`: whose masks these
    are. Returns y.
    """
    rows = y
    if layout is None:
        layout = even(*x.shape[:2], 0)
        x, rows = (array.reshape(-1, array.shape[2]) for array in (x, y))
    places = (drawing or Drawing()).places(layout)
    _drop(x, *places, LOCKED if locked else STEP, p, seed, rows)
    return y


def drop_weights(weight: np.ndarray, p: float, seed: int) -> np.ndarray:
    """A weight (rows, columns), or its gradient, with dropped numbers 0 and the others scaled."""
    kept = empty(weight.shape, weight.dtype)
    _drop(weight, np.arange(len(weight)), 1, WEIGHT, p, seed, kept)
    return kept


def rows_mask(rows: int, p: float, seed: int, dtype: Any) -> np.ndarray:
    """The same with whole rows dropped, (rows, 1): for vectors of tokens."""
    return drop_weights(np.ones((rows, 1), dtype), p, seed)
