"""Random bits that are a function of a seed and a place, so that no mask is ever stored.

They are the same for any number of threads, and are computed again in backward. A place is a row, a
step of a sequence or a row of a weight, and a number in it; what the bits are for sets them apart,
too: one seed serves all.
"""

from __future__ import annotations

import numpy as np

from fastrnn.jit import helper

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# What bits are for: dropout of every step, of all steps alike, zoneout, dropout of weights.
STEP, LOCKED, ZONE, WEIGHT = range(4)


@helper
def _mix(x):
    """A bijection of 64-bit numbers that looks random: SplitMix64's finaliser (Steele 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))


@helper
def random_bits(seed, row, unit):
    """64 random bits for one number of a matrix."""
    golden = np.uint64(_GOLDEN)
    key = _mix(seed + golden * (np.uint64(row) + np.uint64(1)))
    return _mix(key + golden * (np.uint64(unit) + np.uint64(1)))


@helper
def dropped(key, use, unit, limit):
    """Whether a number falls to the lot of probability `limit` (see `limit_of`).

    key  `random_bits` of the seed, a step (or a row of a weight) and a sequence
    """
    return random_bits(key, use, unit) >> np.uint64(11) < limit


def limit_of(p: float) -> np.uint64:
    """A probability as kernels take it."""
    return np.uint64(int(p * 2**53))


def stream(seed: int, number: int) -> int:
    """The seed of another stream of bits, of as many as one wants."""
    mask = 2**64 - 1
    x = (seed + _GOLDEN * (number + 1)) & mask
    x = ((x ^ (x >> 30)) * _FIRST) & mask
    x = ((x ^ (x >> 27)) * _SECOND) & mask
    return x ^ (x >> 31)
