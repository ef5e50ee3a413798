"""Dropout whose mask is a function of (seed, step, sequence, unit), so it is never stored.

The mask is the same for any number of threads and is computed again in backward.
"""

from __future__ import annotations

import numpy as np

from fastrnn.jit import helper, kernel
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
def _dropout(part, parts, x, seed, limit, scale, y):
    """y = x * scale where the bits reach `limit`, else 0; x and y are (T, B, units)."""
    steps, batch, units = x.shape
    rows = steps * batch
    for row in range(rows * part // parts, rows * (part + 1) // parts):
        t, b = row // batch, row % batch
        key = random_bits(seed, t, b)
        for unit in range(units):
            if random_bits(key, 0, unit) >> np.uint64(11) < limit:
                y[t, b, unit] = 0
            else:
                y[t, b, unit] = x[t, b, unit] * scale


def dropout(x: np.ndarray, p: float, seed: int, y: np.ndarray) -> None:
    """Fill y with x where the mask of `seed` keeps it, scaled by 1 / (1 - p), and with 0 elsewhere.

    x and y are C-contiguous (T, B, H); they may be the same array.
    """
    limit = np.uint64(int(p * 2**53))
    scale = x.dtype.type(1 / (1 - p))
    parts = parts_for(x.size * ELEMENT, x.shape[0] * x.shape[1])
    run(_dropout, parts, x, np.uint64(seed % 2**64), limit, scale, y)
