"""Dropout whose mask is a function of (seed, step, sequence, unit), so it is never stored.

The mask is the same for any number of threads and is computed again in backward.
"""

from __future__ import annotations

import numpy as np

from fastrnn.jit import helper, kernel
from fastrnn.layout import Layout, even
from fastrnn.parallel import ELEMENT, parts_for, run


@helper
def _mix(x):
    """A bijection of 64-bit numbers that looks random: SplitMix64's finaliser (Steele 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@helper
def random_bits(seed, row, unit):
    """64 random bits for one number of a matrix."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    key = _mix(seed + golden * (np.uint64(row) + np.uint64(1)))
    return _mix(key + golden * (np.uint64(unit) + np.uint64(1)))


@kernel
def _dropout(part, parts, x, source, batch, seed, limit, scale, y):
    """y = x * scale where the bits reach `limit`, else 0; x and y are (N, units)."""
    rows, units = x.shape
    for row in range(rows * part // parts, rows * (part + 1) // parts):
        t, b = source[row] // batch, source[row] % batch
        key = random_bits(seed, t, b)
        for unit in range(units):
            if random_bits(key, 0, unit) >> np.uint64(11) < limit:
                y[row, unit] = 0
            else:
                y[row, unit] = x[row, unit] * scale


def dropout(
    x: np.ndarray, p: float, seed: int, y: np.ndarray, layout: Layout | None = None
) -> np.ndarray:
    """Fill y with x where the mask of `seed` keeps it, scaled by 1 / (1 - p), and with 0 elsewhere.

    x and y are C-contiguous (T, B, H), or (N, H) with the rows of a layout; they may be the same
    array. Returns y.
    """
    rows = y
    if layout is None:
        layout = even(*x.shape[:2], 0)
        x, rows = (array.reshape(-1, array.shape[2]) for array in (x, y))
    limit = np.uint64(int(p * 2**53))
    scale = x.dtype.type(1 / (1 - p))
    parts = parts_for(x.size * ELEMENT, len(x))
    batch = layout.batch
    run(_dropout, parts, x, layout.source, batch, np.uint64(seed % 2**64), limit, scale, rows)
    return y
