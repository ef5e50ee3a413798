"""What acts on the states of a run: recurrent dropout and zoneout.

Recurrent dropout (Gal and Ghahramani 2016, arXiv:1512.05287): wherever h enters a product it is
multiplied by a mask, one for all steps of a sequence. Zoneout (Krueger et al. 2017,
arXiv:1606.01305): units of h keep their old value, each at its own steps; where nothing is drawn
they move towards the new one by what is expected.

Kernels get a `Drawn`, or None, for which none of this is compiled.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastrnn.counter import LOCKED, ZONE, dropped, limit_of, random_bits
from fastrnn.crew import divided
from fastrnn.gemm import multiply, scratch
from fastrnn.jit import helper, kernel
from fastrnn.layout import Drawing, Layout
from fastrnn.memory import empty
from fastrnn.parallel import ELEMENT, parts_for, run
from fastrnn.simd import at, fma, load, load_n, padded, store, store_n, width_of


class Noise(NamedTuple):
    """Probabilities, the seed that draws (None: nothing is drawn), and for whom."""

    recurrent: float
    zoneout: float
    seed: int | None
    drawing: Drawing


class Drawn(NamedTuple):
    """What a run takes.

    fed     (C + N, H): h as products see it; without a mask h itself
    mask    (C, Hp), or (0, Hp): none
    source  (N,): step * batch + sequence, of each row, as a `Drawing` numbers them
    limit   zoneout's probability as `counter.limit_of`; 0: nothing is drawn
    fresh   how much of the new h counts then
    """

    fed: np.ndarray
    mask: np.ndarray
    source: np.ndarray
    batch: int
    seed: np.uint64
    limit: np.uint64
    fresh: np.floating


@kernel
def _masks(part, parts, who, seed, limit, scale, size, mask):
    """Rows of a mask (C, Hp) of the sequences `who` (C,), zeros in the padding."""
    if divided(part, parts):
        return
    count = mask.shape[0]
    for column in range(count * part // parts, count * (part + 1) // parts):
        key = random_bits(seed, 0, who[column])
        for unit in range(size):
            mask[column, unit] = 0 if dropped(key, LOCKED, unit, limit) else scale
        for unit in range(size, mask.shape[1]):
            mask[column, unit] = 0


def draw(noise: Noise | None, layout: Layout, h: np.ndarray) -> Drawn | None:
    """For a run whose h is (C + N, H); its first C rows are the states it begins with."""
    if noise is None:
        return None
    size, dtype = h.shape[1], h.dtype
    draws = noise.seed is not None
    seed = np.uint64((noise.seed or 0) % 2**64)
    fed, mask = h, np.empty((0, padded(size, dtype)), dtype)
    if draws and noise.recurrent:
        fed = empty(h.shape, dtype)
        mask = empty((layout.columns, padded(size, dtype)), dtype)
        scale = dtype.type(1 / (1 - noise.recurrent))
        parts = parts_for(mask.size * ELEMENT, len(mask))
        arguments = seed, limit_of(noise.recurrent), scale, size
        run(_masks, parts, noise.drawing.who(layout), *arguments, mask)
        # A state that is not finite stays so without a word.
        with np.errstate(all="ignore"):
            np.multiply(h[: layout.columns], mask[:, :size], out=fed[: layout.columns])
    elif not noise.zoneout:
        return None
    limit = limit_of(noise.zoneout if draws else 0)
    fresh = (None if draws else expected(noise.zoneout, dtype)) or dtype.type(1)
    return Drawn(fed, mask, *noise.drawing.places(layout), seed, limit, fresh)


def expected(zoneout: float, dtype: np.dtype) -> np.floating | None:
    """How much of a new h counts where nothing is drawn; None: all of it."""
    return dtype.type(1 - zoneout) if zoneout else None


@helper
def fed_by(drawn, h):
    """What products see of h (C + N, H)."""
    return h if drawn is None else drawn.fed


@helper
def room(drawn, h):
    """Memory for a row of `weigh`."""
    if drawn is None:
        # Of the same type.
        return h[0]
    w = width_of(h)
    row = scratch(h, (h.shape[1] + w - 1) // w * w)
    row[:] = 1
    return row


@helper
def weigh(drawn, row, low, end, fresh):
    """fresh[low:end] = how much of the new h counts, of each unit in a row."""
    if drawn is not None:
        if drawn.limit > np.uint64(0):
            t, b = drawn.source[row] // drawn.batch, drawn.source[row] % drawn.batch
            key = random_bits(drawn.seed, t, b)
            for u in range(low, end):
                fresh[u] = 0 if dropped(key, ZONE, u, drawn.limit) else 1
        elif drawn.fresh < 1:
            fresh[low:end] = drawn.fresh


@helper
def mixed(fresh, new, old):
    """What becomes of h where `fresh` of the new one counts."""
    return fma(fresh, new, (1.0 - fresh) * old)


@helper
def settle(drawn, low, end, h, before, after, row, column, fresh):
    """Zoneout and the mask, for units [low, end) of a new row of h.

    before, after  where the rows of the old h and of the new one begin
    row, column    of the step
    """
    if drawn is not None:
        zoned = drawn.limit > np.uint64(0) or drawn.fresh < 1
        wide = drawn.mask.shape[1] if drawn.mask.shape[0] > 0 else 0
        weigh(drawn, row, low, end, fresh)
        for u in range(low, end, width_of(h)):
            value = load_n(h, after + u, end - u)
            if zoned:
                value = mixed(load(fresh, u), value, load_n(h, before + u, end - u))
                store_n(h, after + u, value, end - u)
            if wide > 0:
                kept = value * load(drawn.mask, column * wide + u)
                store_n(drawn.fed, after + u, kept, end - u)


@helper
def passing(drawn, fresh, u, total):
    """The part of a gradient of h that goes on to the new h."""
    return total if drawn is None else load(fresh, u) * total


@helper
def staying(drawn, fresh, u, total, more):
    """The part that goes back to the old one, added to `more`."""
    return more if drawn is None else fma(1.0 - load(fresh, u), total, more)


@helper
def mask_row(drawn, column, low, end, row):
    """Multiply units [low, end) of a row, of what a product sees or its gradient, by the mask."""
    if drawn is not None and drawn.mask.shape[0] > 0:
        mask = at(drawn.mask, column * drawn.mask.shape[1])
        for u in range(low, end, width_of(row)):
            store_n(row, u, load_n(row, u, end - u) * load(mask, u), end - u)


@helper
def multiply_back(drawn, first, m, low, n, k, a, a_row, p, zeros, d_m, d_h):
    """Add A @ P, a gradient of what products see, to that of h: units [low, low + n), m columns.

    d_m  (C, n or more): scratch, if there is a mask
    """
    masked = False
    if drawn is not None:
        masked = drawn.mask.shape[0] > 0
    wide = d_h.shape[1]
    if masked:
        row = d_m.shape[1]
        into = at(d_m, first * row + low)
        multiply(1, m, n, k, a, a_row, 0, p, at(zeros, 0), 0, into, row, 0)
        for column in range(first, first + m):
            mask_row(drawn, column, low, low + n, at(d_m, column * row))
            for u in range(low, low + n, width_of(d_h)):
                more = load_n(d_m, column * row + u, low + n - u)
                store(d_h, column * wide + u, load(d_h, column * wide + u) + more)
    else:
        into = at(d_h, first * wide + low)
        multiply(1, m, n, k, a, a_row, 0, p, into, wide, into, wide, 0)
