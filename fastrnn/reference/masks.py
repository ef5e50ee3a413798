"""Random masks of dropout and zoneout: every number is a function of a seed and of its place.

    mix(x)                SplitMix64's finaliser, a bijection of 64-bit numbers
    stream(seed, n)       = mix(seed + golden (n + 1)): what SplitMix64 seeded so gives as number n
    bits(seed, row, unit) = stream(stream(seed, row), unit)
    drawn with p          where bits(bits(seed, step, sequence), use, unit) >> 11 < p 2⁵³

in unsigned 64-bit arithmetic, modulo 2⁶⁴. The use is 0 for dropout, 1 for dropout that is the same
at all steps (step 0), 2 for zoneout, 3 for dropout of a weight (its row is the step, sequence 0).

Source: G. L. Steele, D. Lea and C. H. Flood, "Fast splittable pseudorandom number generators",
OOPSLA (2014), doi:10.1145/2660193.2660195.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
DROPOUT, LOCKED, ZONE, WEIGHT = range(4)


def _uint64(n: ArrayLike) -> Array:
    """Integers modulo 2**64."""
    return np.asarray(n % 2**64 if isinstance(n, int) else n).astype(np.uint64)


def _mix(x: Any) -> Any:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _streams(seed: ArrayLike, number: ArrayLike) -> Any:
    """mix(seed + golden (number + 1)) of integers that broadcast."""
    with np.errstate(over="ignore"):  # NumPy warns where a single number wraps
        return _mix(_uint64(seed) + GOLDEN * (_uint64(number) + np.uint64(1)))


def stream(seed: int, number: int) -> int:
    """The seed of an independent stream, number 0, 1, …"""
    return int(_streams(seed, number))


def bits(seed: ArrayLike, row: ArrayLike, unit: ArrayLike) -> Any:
    """64 random bits for one number of a matrix, uint64, of integers that broadcast."""
    return _streams(_streams(seed, row), unit)


def _drawn(place: Array, use: int, units: int, p: float) -> Array:
    """Which units are drawn with p, (..., units), for place = bits(seed, step, sequence) (...)."""
    limit = np.uint64(int(p * 2**53))
    return bits(place[..., None], use, np.arange(units)) >> np.uint64(11) < limit


def dropout_mask(seed: int, steps: Array, sequences: Array, units: int, p: float) -> Array:
    """0 where drawn, else 1/(1 - p): (T, B, units) for steps (T,) and sequences (B,)."""
    place = bits(seed, steps[:, None], sequences)
    return np.where(_drawn(place, DROPOUT, units, p), 0, 1 / (1 - p))


def locked_mask(seed: int, sequences: Array, units: int, p: float) -> Array:
    """0 where drawn, else 1/(1 - p), at all steps: (B, units) for sequences (B,)."""
    place = bits(seed, 0, sequences)
    return np.where(_drawn(place, LOCKED, units, p), 0, 1 / (1 - p))


def zone_mask(seed: int, steps: Array, sequences: Array, units: int, p: float) -> Array:
    """1 where drawn, so that h stays, else 0: (T, B, units) for steps (T,) and sequences (B,)."""
    place = bits(seed, steps[:, None], sequences)
    return _drawn(place, ZONE, units, p).astype(np.float64)


def weight_mask(seed: int, rows: int, columns: int, p: float) -> Array:
    """0 where drawn, else 1/(1 - p): (rows, columns)."""
    place = bits(seed, np.arange(rows), 0)
    return np.where(_drawn(place, WEIGHT, columns, p), 0, 1 / (1 - p))


def in_full(mask: Array | float | None, none: float, shape: tuple[int, ...], dtype: Any) -> Array:
    """The mask of a cell in its full shape, from an array of it, a number, or None for ``none``."""
    return np.broadcast_to(np.asarray(none if mask is None else mask, dtype), shape)
