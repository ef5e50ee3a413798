"""Matrix products on packed panels: A @ P and A.T @ B; every product of the library is one.

Each element of a result is one chain of multiply-adds over k in a fixed order, started from what
the result held before. Tile shapes, panels, blocks and threads decide when a link is added, never
in which order: that is why results have the same bits however the work is cut.

A *panel* is a block of `COLS` registers of columns (fewer in the last one), stored k by k:
`panel[k][column]`. A *strip* is its counterpart on the left: up to 3 registers of rows.
"""

from __future__ import annotations

import numpy as np
from numba import types

from fastrnn.jit import helper, kernel, linked
from fastrnn.simd import (
    at,
    flush_denormals,
    keep_alive,
    load,
    load_n,
    restore_denormals,
    store,
    store_n,
    width_of,
)
from fastrnn.tile import COLS, ROWS, STRIP, tile, tile_of_strip

# Columns of k worked on at a time: a block of a panel, 128 KiB at most, comes from the second-level
# cache; deeper, C is loaded and stored less often.
DEPTH = 512
# Rows of x and d worked on at a time, likewise: their strips are packed and stay closer.
RUN = 256
# Rows of A that pass over one panel block before the next.
HEIGHT = 96
# Strips that are filled at once: they stay in the second-level cache.
GROUP = 4


@helper
def scratch(like, count):
    """`count` uninitialised numbers on a register boundary."""
    raw = np.empty(count + 16, like.dtype)
    skip = (-raw.ctypes.data % 64) // raw.itemsize
    return raw[skip : skip + count]


@helper
def panel_scratch(like, m):
    """Memory for the panels of `accumulate`."""
    w = width_of(like)
    return scratch(like, RUN * ((m + w - 1) // w) * w)


@helper
def strip_scratch(like):
    """Memory for the strips of `accumulate`."""
    return scratch(like, GROUP * RUN * STRIP * width_of(like))


@helper
def _next_row(row, b, batch):
    """The row that comes after in time reversed: the next sequence, or the step before."""
    if b + 1 < batch:
        return row + 1, b + 1
    return row + 1 - 2 * batch, 0


def _multiply_signature(dtype):
    i, p = types.intp, types.CPointer(dtype)
    return types.void(i, i, i, i, p, i, i, p, p, i, p, i, i)


@linked(_multiply_signature)
def multiply(groups, m, n, k, a, a_row, a_group, p, init, init_row, c, c_row, c_group):
    """C[m, n] = init[m, n] + A[m, k] @ P, for `groups` such blocks of A and C.

    Rows of A, init and C lie `_row` elements apart, groups `_group` apart. A distance of 0 repeats
    one row of init. P holds panels of depth k for n columns. C may be init if there is one group.
    """
    w = width_of(c)
    for top in range(0, m, HEIGHT):
        height = min(HEIGHT, m - top)
        tiles = (height + ROWS - 1) // ROWS
        for left in range(0, n, COLS * w):
            width = min(COLS * w, n - left)
            cols = (width + w - 1) // w
            last = width - (cols - 1) * w
            for deep in range(0, k, DEPTH):
                depth = min(DEPTH, k - deep)
                panel = at(p, left * k + deep * cols * w)
                for group in range(groups):
                    for q in range(tiles):
                        row = top + height * q // tiles
                        rows = top + height * (q + 1) // tiles - row
                        into = at(c, group * c_group + row * c_row + left)
                        first = at(a, group * a_group + row * a_row + deep)
                        start, start_row = into, c_row
                        if deep == 0:
                            start, start_row = at(init, row * init_row + left), init_row
                        tile(
                            rows, cols, last, depth, first, a_row,
                            panel, start, start_row, into, c_row,
                        )  # fmt: skip


@helper
def _fill_panel(x, x_row, m, row, b, batch, depth, panel):
    """Panels of `depth` rows of x, from (row, b) on; returns the row after them."""
    w = width_of(x)
    wide = COLS * w
    for j in range(depth):
        for left in range(0, m, wide):
            cols = (min(wide, m - left) + w - 1) // w
            for col in range(left, left + cols * w, w):
                value = load_n(x, row * x_row + col, m - col)
                store(panel, left * depth + j * cols * w + col - left, value)
        row, b = _next_row(row, b, batch)
    return row, b


@helper
def _group(block, end, blocks):
    """Where the group of up to GROUP strips that begins with `block` ends."""
    for _ in range(GROUP):
        block += min(STRIP, end - block, blocks - block % blocks)
        if block == end:
            break
    return block


@helper
def _fill_strips(d, d_row, size, first, end, blocks, row, b, batch, depth, strips):
    """The strips of blocks [first, end): row after row, since memory is read best that way."""
    w = width_of(d)
    start = first % blocks
    for j in range(depth):
        line = j * STRIP * w
        i, inside = 0, start
        for block in range(first, end):
            value = load_n(d, row * d_row + block * w, size - inside * w)
            store(strips, line + i * w, value)
            i += 1
            inside += 1
            if inside == blocks:
                inside = 0
            if i == STRIP or inside == 0:
                i = 0
                line += RUN * STRIP * w
        row, b = _next_row(row, b, batch)


@helper
def _add_strip(strip, take, depth, sums, left):
    """Add up the rows of a strip of `take` registers, of which `left` numbers exist."""
    w = width_of(sums)
    for i in range(0, take * w, w):
        total = load_n(sums, i, left - i)
        for j in range(depth):
            total = total + load(strip, j * STRIP * w + i)
        store_n(sums, i, total, left - i)


def _accumulate_signature(dtype):
    i, p = types.intp, types.CPointer(dtype)
    return types.void(i, i, p, i, i, types.CPointer(i), i, i, p, i, i, p, p, p, p)


@linked(_accumulate_signature)
def accumulate(
    steps, batch, d, d_row, size, order, first, end, x, x_row, m, out, sums, panel, strips
):
    """out[order[g]*size + u, :] += sum of d[row, g*run + u] * x[row, :m]; sums likewise of d alone.

    Rows are (step, sequence) pairs, taken in the order in which backpropagation meets them: last
    step first, sequences in order. run is size, rounded up to whole registers if there are several
    g. Only the register blocks [first, end) of the runs are done. panel and strips: memory from
    `panel_scratch` and `strip_scratch`.
    """
    w = width_of(out)
    wide = COLS * w
    blocks = (size + w - 1) // w
    total = steps * batch
    # The row of d and x where a block of rows begins, and its place in its step.
    row, b = (steps - 1) * batch, 0
    for start in range(0, total, RUN):
        depth = min(RUN, total - start)
        next_row, next_b = _fill_panel(x, x_row, m, row, b, batch, depth, panel)
        block = first
        while block < end:
            strip = strips
            group = _group(block, end, blocks)
            _fill_strips(d, d_row, size, block, group, blocks, row, b, batch, depth, strips)
            while block < group:
                g = block // blocks
                u = (block - g * blocks) * w
                into = order[g] * size + u
                take = min(STRIP, group - block, blocks - block % blocks)
                _add_strip(strip, take, depth, at(sums, into), size - u)
                height = min(take * w, size - u)
                tiles = (height + ROWS - 1) // ROWS
                for left in range(0, m, wide):
                    width = min(wide, m - left)
                    cols = (width + w - 1) // w
                    last = width - (cols - 1) * w
                    for q in range(tiles):
                        top = height * q // tiles
                        rows = height * (q + 1) // tiles - top
                        c = at(out, (into + top) * m + left)
                        tile_of_strip(
                            rows, cols, last, depth, at(strip, top),
                            at(panel, left * depth), c, m, c, m,
                        )  # fmt: skip
                block += take
                strip = at(strip, RUN * STRIP * w)
        row, b = next_row, next_b


@helper
def scatter(tokens, d, d_at, d_row, n, first, end, out, sums):
    """out[token, first:end] += d[row, first:end]: `accumulate` for rows that are one-hot.

    tokens (T, B); out (V, n). The same order of rows; sums[first:end] adds up d.
    """
    w = width_of(out)
    steps, batch = tokens.shape
    for t in range(steps - 1, -1, -1):
        for b in range(batch):
            source = d_at + (t * batch + b) * d_row
            target = tokens[t, b] * n
            for j in range(first, end, w):
                value = load_n(d, source + j, end - j)
                store_n(out, target + j, load_n(out, target + j, end - j) + value, end - j)
                store_n(sums, j, load_n(sums, j, end - j) + value, end - j)


@kernel
def affine(part, parts, x, p, bias, y):
    """y (N, O) = x (N, I) @ P + bias, for the part'th slice of rows; P by `pack_transposed`."""
    mode = flush_denormals()
    count, size = x.shape
    n = y.shape[1]
    first = count * part // parts
    rows = count * (part + 1) // parts - first
    c = at(y, first * n)
    multiply(1, rows, n, size, at(x, first * size), size, 0, at(p, 0), at(bias, 0), 0, c, n, 0)
    restore_denormals(mode)


@kernel
def affine_gradients(part, parts, x, d_y, p, zeros, d_x, d_weight, d_bias):
    """Add to d_weight (O, I) and d_bias (O,), fill d_x (N, I) or (0, I), from d_y (T, B, O).

    x (T, B, I); P is the weight by `pack`; zeros (I,).
    """
    mode = flush_denormals()
    steps, batch, n = d_y.shape
    size = x.shape[2]
    w = width_of(x)
    blocks = (n + w - 1) // w
    first, end = blocks * part // parts, blocks * (part + 1) // parts
    order = np.zeros(1, np.intp)
    panel, strip = panel_scratch(x, size), strip_scratch(x)
    accumulate(
        steps, batch, at(d_y, 0), n, n, at(order, 0), first, end, at(x, 0), size, size,
        at(d_weight, 0), at(d_bias, 0), at(panel, 0), at(strip, 0),
    )  # fmt: skip
    keep_alive(order)
    keep_alive(panel)
    keep_alive(strip)
    count = d_x.shape[0]
    top = count * part // parts
    rows = count * (part + 1) // parts - top
    c = at(d_x, top * size)
    multiply(1, rows, size, n, at(d_y, top * n), n, 0, at(p, 0), at(zeros, 0), 0, c, size, 0)
    restore_denormals(mode)


@kernel
def scatter_rows(part, parts, tokens, d, out, sums):
    """out[token] += d[row], for the part'th slice of columns.

    tokens (T, B), d (T, B, E), out (V, E), sums (E,).
    """
    mode = flush_denormals()
    n = out.shape[1]
    w = width_of(out)
    blocks = (n + w - 1) // w
    first, end = blocks * part // parts * w, min(n, blocks * (part + 1) // parts * w)
    scatter(tokens, d, 0, n, n, first, end, out, sums)
    restore_denormals(mode)
