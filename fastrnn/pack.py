"""Weights as the products want them: panels, their gates in whole registers.

Packing is done at every call, since the arrays of `params` belong to the user and may have changed;
`freeze` is for those that will not.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np

from fastrnn.crew import divided
from fastrnn.gemm import COLS, affine
from fastrnn.jit import kernel
from fastrnn.memory import empty
from fastrnn.parallel import ELEMENT, parts_for, run
from fastrnn.simd import lanes, load_n, padded, store, transpose, width_of


@kernel
def _pack_transposed(part, parts, weight, order, size, cols, stretch, p):
    """Panels of `weight.T`: column g*run + u is row order[g]*size + u, zero in the padding.

    `cols` registers make a panel: COLS for `multiply`; all of them for rows to be gathered. Each
    `stretch` of registers has panels of its own.
    """
    if divided(part, parts):
        return
    w = width_of(weight)
    k = weight.shape[1]
    blocks = (size + w - 1) // w
    total = blocks * order.size
    for q in range(total * part // parts, total * (part + 1) // parts):
        g = q // blocks
        u = (q - g * blocks) * w
        row = order[g] * size + u
        valid = min(w, size - u)
        begin = q // stretch * stretch
        begin += (q - begin) // cols * cols
        step = min(cols, q // stretch * stretch + stretch - begin) * w
        base = begin * w * k + (q - begin) * w
        whole = k - k % w if valid == w else 0
        for j in range(0, whole, w):
            transpose(weight, row * k + j, k, p, base + j * step, step)
        for j in range(whole, k):
            for i in range(valid):
                p[base + j * step + i] = weight[row + i, j]
            for i in range(valid, w):
                p[base + j * step + i] = 0


@kernel
def _pack(part, parts, weight, order, size, run, p):
    """Panels of `weight`: row g*run + u of the panels is row order[g]*size + u, zero in between."""
    if divided(part, parts):
        return
    w = width_of(weight)
    n = weight.shape[1]
    depth = order.size * run
    for k in range(depth * part // parts, depth * (part + 1) // parts):
        g = k // run
        u = k - g * run
        row = order[g] * size + u
        for left in range(0, n, COLS * w):
            cols = (min(COLS * w, n - left) + w - 1) // w
            for col in range(left, left + cols * w, w):
                at = left * depth + k * cols * w + col - left
                store(p, at, load_n(weight, row * n + col, n - col if u < size else 0))


@functools.cache
def indices(order: tuple[int, ...]) -> np.ndarray:
    """An order of gates as kernels take it."""
    return np.array(order, np.intp)


@functools.cache
def _rows(order: tuple[int, ...]) -> np.ndarray | slice:
    """The same for NumPy, which is quicker with a slice."""
    if order == tuple(range(order[0], order[0] + len(order))):
        return slice(order[0], order[0] + len(order))
    return indices(order)


def pack_transposed(
    weight: np.ndarray,
    order: tuple[int, ...],
    *,
    size: int | None = None,
    rows: bool = False,
    apart: bool = False,
    packed: np.ndarray | None = None,
) -> np.ndarray:
    """Panels of weight.T with padded gates; `rows` instead lays out one row for each column.

    size    rows of a gate, if the order does not have all of them
    apart   no panel has columns of two gates
    packed  memory for the result
    """
    size = size or len(weight) // len(order)
    w = lanes(weight.dtype)
    registers = len(order) * -(-size // w)
    if packed is None:
        packed = empty(weight.shape[1] * registers * w, weight.dtype)
    cols = registers if rows else COLS
    parts = parts_for(packed.size * ELEMENT, registers)
    stretch = registers // len(order) if apart else registers
    run(_pack_transposed, parts, weight, indices(order), size, cols, stretch, packed)
    return packed


def pack(
    weight: np.ndarray, order: tuple[int, ...], gap: int, *, size: int | None = None
) -> np.ndarray:
    """Panels of weight, its gates `gap` rows apart; `size` as above."""
    size = size or len(weight) // len(order)
    depth = len(order) * gap
    packed = empty(depth * padded(weight.shape[1], weight.dtype), weight.dtype)
    parts = parts_for(packed.size * ELEMENT, depth)
    run(_pack, parts, weight, indices(order), size, gap, packed)
    return packed


def _pack_bias(
    cell: Any, size: int, b_x: np.ndarray | None, b_h: np.ndarray | None, packed: np.ndarray
) -> None:
    """Both biases where the cell wants them in its sums, in runs of whole registers."""
    packed.fill(0)
    if b_x is None or b_h is None:
        return
    runs = packed.reshape(cell.tape, -1)[:, :size]
    for bias, order, start in (
        (b_x, cell.order_x, 0),
        (b_h, cell.order_h, cell.tail),
        (b_h, cell.order_late, cell.into),
    ):
        if order:
            runs[start : start + len(order)] += bias.reshape(-1, size)[_rows(order)]


def _pack_table(
    weight: np.ndarray,
    order: tuple[int, ...],
    bias: np.ndarray,
    vectors: np.ndarray,
    table: np.ndarray,
) -> None:
    """What each of `vectors` (V, I) adds to the sums, bias and all, as rows to be gathered.

    The part of `bias` (see `_pack_bias`) that it takes over becomes -0.0, which changes no number
    that it is added to, not even the sign of a zero.
    """
    packed = pack_transposed(weight, order)
    shared = bias[: packed.size // weight.shape[1]]
    parts = parts_for(table.size * vectors.shape[1], len(vectors))
    run(affine, parts, vectors, packed, shared, table.reshape(len(vectors), -1))
    shared.fill(-0.0)


class Packed(NamedTuple):
    """The weights of a layer as the recurrence takes them, all in one array.

    values  W_x, W_h, the late rows of W_h, bias, vectors, projection, zeros as its bias
    places  width of the input (0: tokens), and where in `values` each of these begins
    """

    values: np.ndarray
    places: np.ndarray


def pack_layer(
    cell: Any,
    w_x: np.ndarray,
    w_h: np.ndarray,
    b_x: np.ndarray | None,
    b_h: np.ndarray | None,
    v: list[np.ndarray] | None,
    r: np.ndarray | None,
    *,
    tokens: bool,
    apart: bool,
    table: np.ndarray | None = None,
) -> Packed:
    """Everything forward needs of a layer.

    v       the cell's vectors, arrays (n, H)
    r       its projection (P, H)
    tokens  W_x as rows to be gathered, of tokens or, with `table` (V, I), of what they stand for
    apart   for slices of the units
    """
    inputs, (rows, width), dtype = w_x.shape[1], w_h.shape, w_h.dtype
    size = rows // cell.gates
    kinds = None if table is None else len(table)
    places, end = _places(cell, inputs, kinds, size, width, dtype, tokens)
    values = empty(end, dtype)
    _, x, h, late, bias, own, out, none = places.tolist()
    _pack_bias(cell, size, b_x, b_h, values[bias:own])
    if table is None:
        only = apart and not tokens
        pack_transposed(w_x, cell.order_x, size=size, rows=tokens, apart=only, packed=values[x:h])
    else:
        _pack_table(w_x, cell.order_x, values[bias:own], table, values[x:h])
    pack_transposed(w_h, cell.order_h, size=size, apart=apart, packed=values[h:late])
    if cell.order_late:
        pack_transposed(w_h, cell.order_late, size=size, apart=apart, packed=values[late:bias])
    if v is not None:
        runs = values[own:out].reshape(cell.vectors, -1)
        runs[:, size:] = 0
        np.concatenate(v, out=runs[:, :size])
    if r is not None:
        pack_transposed(r, (0,), size=width, packed=values[out:none])
        values[none:] = 0
    return Packed(values, places)


@functools.lru_cache(maxsize=64)
def _places(
    cell: Any, inputs: int, kinds: int | None, size: int, width: int, dtype: Any, tokens: bool
) -> tuple[np.ndarray, int]:
    """(places, where all of it ends)."""
    counts = (
        (inputs if kinds is None else kinds) * len(cell.order_x),
        width * len(cell.order_h),
        width * len(cell.order_late),
        cell.tape,
        cell.vectors,
    )
    numbers = [count * padded(size, dtype) for count in counts]
    projected = padded(width, dtype) if cell.projected else 0
    *ends, end = itertools.accumulate([*numbers, size * projected, projected])
    return np.array([0 if tokens else inputs, 0, *ends], np.int64), end
