"""Matrix products on packed panels: A @ P and A.T @ B; every product of the library is one.

Each element of a result is one chain of multiply-adds over k in a fixed order, started from what
the result held before. Tile shapes, panels, blocks and threads decide when a link is added, never
in which order: that is why results have the same bits however the work is cut.

A *panel* is a block of `COLS` registers of columns (fewer in the last one), stored k by k:
`panel[k][column]`. A *strip* is its counterpart on the left: up to 3 registers of rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from fastrnn.crew import divided
from fastrnn.jit import helper, kernel, linked
from fastrnn.simd import (
    at,
    flush_denormals,
    keep_alive,
    lanes,
    load,
    load_n,
    machine,
    padded,
    restore_denormals,
    store,
    store_n,
    width_of,
)
from fastrnn.tile import COLS, LINE, PANELS, ROWS, STRIP, tiles, tiles_of_strip

# Bytes of a register.
WIDTH = machine().width
# Columns of k worked on at a time: a block of a panel, 128 KiB at most, comes from the second-level
# cache; deeper, C is loaded and stored less often.
DEPTH = 512
# Rows of x and d worked on at a time, likewise: their strips are packed and stay closer.
RUN = 256
# Bytes of panels that are thought to stay in the second-level cache.
NEAR = 1 << 19
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
def integers(count):
    """`count` uninitialised integers; what fills arrays takes Numba seconds to compile."""
    return np.empty(count, np.intp)


@helper
def panel_scratch(like, m_x, m_h):
    """Memory for the panels of `accumulate`."""
    w = width_of(like)
    return scratch(like, RUN * ((m_x + w - 1) // w + (m_h + w - 1) // w) * w)


@helper
def strip_scratch(like):
    """Memory for the strips of `accumulate`."""
    return scratch(like, GROUP * RUN * STRIP * width_of(like))


def scratch_size(m_x: int, m_h: int, dtype: Any) -> int:
    """Numbers in `panel_scratch` and `strip_scratch`."""
    return RUN * (padded(m_x, dtype) + padded(m_h, dtype) + GROUP * STRIP * lanes(dtype))


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
    wide = COLS * w
    line = w * LINE // WIDTH
    far = n * k * WIDTH // w > NEAR
    for top in range(0, m, HEIGHT):
        height = min(HEIGHT, m - top)
        count = (height + ROWS - 1) // ROWS
        # Tiles of as many rows, some of one more.
        least = height // count
        higher = height - least * count
        most = PANELS[min(height, ROWS)]
        left = 0
        while left < n:
            # As many whole panels as few rows take together.
            panels = 1 if most == 1 else max(1, min(most, (n - left) // wide))
            width = min(panels * wide, n - left)
            cols = (width + w - 1) // w
            last = width - (cols - 1) * w
            for deep in range(0, k, DEPTH):
                depth = min(DEPTH, k - deep)
                panel = at(p, left * k + deep * min(cols, COLS) * w)
                # The next block follows this one; after the last comes the first again.
                size = depth * cols * w
                ahead = p if left + width == n and deep + depth == k else at(panel, size)
                # As many tiles ask as there are lines for, if there are as many.
                asking = 0
                if far and cols == COLS and size <= count * groups * depth * line:
                    asking = size // (depth * line)
                for group in range(groups):
                    row, q = top, 0
                    while q < count:
                        # Those of one shape.
                        rows, end = (least + 1, higher) if q < higher else (least, count)
                        turn = group * count + q
                        fetch = 1 if turn < asking else 0
                        if fetch:
                            end = min(end, q + asking - turn)
                        into = at(c, group * c_group + row * c_row + left)
                        first = at(a, group * a_group + row * a_row + deep)
                        start, start_row = into, c_row
                        if deep == 0:
                            start, start_row = at(init, row * init_row + left), init_row
                        tiles(
                            end - q, rows, cols, last, depth, first, a_row, fetch, panel, k * wide,
                            at(ahead, turn * depth * line), start, start_row, into, c_row,
                            1 if end < count else 0,
                        )  # fmt: skip
                        row += rows * (end - q)
                        q = end
            left += width


@helper
def _fill_panel(x, x_row, m, rows, depth, panel):
    """Panels of `depth` of the rows of x, of m numbers each, x_row apart."""
    w = width_of(x)
    wide = COLS * w
    whole = m // w * w
    for j in range(depth):
        source = rows[j] * x_row
        for left in range(0, m, wide):
            right = min(left + wide, m)
            target = left * depth + j * ((right - left + w - 1) // w * w) - left
            for col in range(left, min(right, whole), w):
                store(panel, target + col, load(x, source + col))
            if right > whole:
                store(panel, target + whole, load_n(x, source + whole, m - whole))


@helper
def _strip(block, end, blocks):
    """The run that `block` lies in, its place there, and how many registers its strip has."""
    run = block // blocks
    inside = block - run * blocks
    return run, inside, min(STRIP, end - block, blocks - inside)


@helper
def _group(block, end, blocks):
    """Where the group of up to GROUP strips that begins with `block` ends."""
    for _ in range(GROUP):
        block += _strip(block, end, blocks)[2]
        if block == end:
            break
    return block


@helper
def _fill_strips(d, d_row, size, first, end, blocks, rows, depth, strips):
    """The strips of blocks [first, end): row after row, since memory is read best that way."""
    w = width_of(d)
    start = first % blocks
    for j in range(depth):
        target = j * STRIP * w
        source = rows[j] * d_row + first * w
        block, inside = first, start
        while block < end:
            take = min(STRIP, end - block, blocks - inside)
            left = size - inside * w
            if take == STRIP and left >= STRIP * w:
                for i in range(0, STRIP * w, w):
                    store(strips, target + i, load(d, source + i))
            else:
                for i in range(0, take * w, w):
                    store(strips, target + i, load_n(d, source + i, left - i))
            block += take
            inside += take
            if inside == blocks:
                inside = 0
            source += take * w
            target += RUN * STRIP * w


@helper
def _add_sums(strips, first, end, blocks, size, depth, order, sums):
    """Add up the rows of the strips of blocks [first, end)."""
    w = width_of(sums)
    block, strip = first, strips
    while block < end:
        run, inside, take = _strip(block, end, blocks)
        left = size - inside * w
        into = at(sums, order[run] * size + inside * w)
        if order[run] >= 0 and take == STRIP and left >= STRIP * w:
            # Side by side, since each sum waits for its own last addition.
            one, two, three = load(into, 0), load(into, w), load(into, 2 * w)
            for j in range(0, depth * STRIP * w, STRIP * w):
                one = one + load(strip, j)
                two = two + load(strip, j + w)
                three = three + load(strip, j + 2 * w)
            store(into, 0, one)
            store(into, w, two)
            store(into, 2 * w, three)
        elif order[run] >= 0:
            for i in range(0, take * w, w):
                total = load_n(into, i, left - i)
                for j in range(0, depth * STRIP * w, STRIP * w):
                    total = total + load(strip, j + i)
                store_n(into, i, total, left - i)
        block += take
        strip = at(strip, RUN * STRIP * w)


@helper
def _add_products(strips, first, end, blocks, size, depth, order, panel, m, out):
    """Add the products of the strips of blocks [first, end) and a panel."""
    w = width_of(out)
    wide = COLS * w
    for left in range(0, m, wide):
        width = min(wide, m - left)
        cols = (width + w - 1) // w
        last = width - (cols - 1) * w
        block, strip = first, strips
        while block < end:
            run, inside, take = _strip(block, end, blocks)
            height = min(take * w, size - inside * w)
            if order[run] >= 0:
                count = (height + ROWS - 1) // ROWS
                least = height // count
                higher = height - least * count
                top = 0
                for rows, same in ((least + 1, higher), (least, count - higher)):
                    if same > 0:
                        c = at(out, (order[run] * size + inside * w + top) * m + left)
                        top += rows * same
                        tiles_of_strip(
                            same, rows, cols, last, depth, at(strip, top - rows * same),
                            at(panel, left * depth), c, m, c, m, 1 if top < height else 0,
                        )  # fmt: skip
            block += take
            strip = at(strip, RUN * STRIP * w)


def _accumulate_signature(dtype):
    i, p, n = types.intp, types.CPointer(dtype), types.CPointer(types.intp)
    return types.void(i, n, n, p, i, i, i, n, i, i, p, i, p, p, p, i, i, p, p, p, p)


@linked(_accumulate_signature)
def accumulate(
    count, rows, rows_h, d, d_row, size, runs, order, first, end,
    x, m_x, out_x, sums_x, h, h_row, m_h, out_h, sums_h, panel, strips,
):  # fmt: skip
    """Add d.T @ x to out_x and d.T @ h to out_h, and the sums of d's columns to sums_x and sums_h.

    A row of d has `runs` runs of `size` numbers, each rounded up to whole registers if there are
    several. Run g adds to the rows of out_x from order[g]*size on, and to those of out_h from
    order[runs + g]*size; below 0: to none. Only the register blocks [first, end) of d are done.
    Row rows[j] of d and x and row rows_h[j] of h belong together; they are added up in the order of
    j, of which there are `count`. Rows of h lie h_row apart. panel and strips: memory from
    `panel_scratch` and `strip_scratch`.
    """
    w = width_of(d)
    blocks = (size + w - 1) // w
    order_h = at(order, runs)
    panel_h = at(panel, RUN * ((m_x + w - 1) // w) * w)
    for start in range(0, count, RUN):
        depth = min(RUN, count - start)
        here = at(rows, start)
        _fill_panel(x, m_x, m_x, here, depth, panel)
        _fill_panel(h, h_row, m_h, at(rows_h, start), depth, panel_h)
        block = first
        while block < end:
            after = _group(block, end, blocks)
            _fill_strips(d, d_row, size, block, after, blocks, here, depth, strips)
            _add_sums(strips, block, after, blocks, size, depth, order, sums_x)
            _add_sums(strips, block, after, blocks, size, depth, order_h, sums_h)
            _add_products(strips, block, after, blocks, size, depth, order, panel, m_x, out_x)
            _add_products(strips, block, after, blocks, size, depth, order_h, panel_h, m_h, out_h)
            block = after


@helper
def scatter(tokens, rows, d, d_at, d_row, n, first, end, out, sums):
    """out[token, first:end] += d[row, first:end]: `accumulate` for rows that are one-hot.

    tokens (N,), one for each row of d; rows (N,): the order; out (V, n). sums[first:end] adds up d.
    """
    w = width_of(out)
    for row in rows:
        source = d_at + row * d_row
        target = tokens[row] * n
        for j in range(first, end, w):
            value = load_n(d, source + j, end - j)
            store_n(out, target + j, load_n(out, target + j, end - j) + value, end - j)
            store_n(sums, j, load_n(sums, j, end - j) + value, end - j)


@kernel
def affine(part, parts, x, p, bias, y):
    """y (N, O) = x (N, I) @ P + bias, for the part'th slice of rows; P by `pack_transposed`."""
    if divided(part, parts):
        return
    mode = flush_denormals()
    count, size = x.shape
    n = y.shape[1]
    first = count * part // parts
    rows = count * (part + 1) // parts - first
    c = at(y, first * n)
    multiply(1, rows, n, size, at(x, first * size), size, 0, at(p, 0), at(bias, 0), 0, c, n, 0)
    restore_denormals(mode)


@kernel
def affine_gradients(part, parts, rows, x, d_y, p, zeros, d_x, d_weight, d_bias):
    """Add to d_weight (O, I) and d_bias (O,), fill d_x (N, I) or (0, I), from d_y (N, O).

    x (N, I); rows (N,): the order in which they are added; P is the weight by `pack`; zeros (I,).
    """
    if divided(part, parts):
        return
    mode = flush_denormals()
    n = d_y.shape[1]
    size = x.shape[1]
    w = width_of(x)
    blocks = (n + w - 1) // w
    first, end = blocks * part // parts, blocks * (part + 1) // parts
    order = integers(2)
    order[0], order[1] = 0, -1
    panel, strip = panel_scratch(x, size, 0), strip_scratch(x)
    accumulate(
        rows.size, at(rows, 0), at(rows, 0), at(d_y, 0), n, n, 1, at(order, 0), first, end,
        at(x, 0), size, at(d_weight, 0), at(d_bias, 0),
        at(x, 0), 0, 0, at(d_weight, 0), at(d_bias, 0), at(panel, 0), at(strip, 0),
    )  # fmt: skip
    keep_alive(order)
    keep_alive(panel)
    keep_alive(strip)
    count = d_x.shape[0]
    top = count * part // parts
    rest = count * (part + 1) // parts - top
    c = at(d_x, top * size)
    multiply(1, rest, size, n, at(d_y, top * n), n, 0, at(p, 0), at(zeros, 0), 0, c, size, 0)
    restore_denormals(mode)


@kernel
def scatter_rows(part, parts, tokens, rows, d, out, sums):
    """out[token] += d[row], for the part'th slice of columns.

    tokens (N,), d (N, E); rows (N,): the order; out (V, E), sums (E,).
    """
    if divided(part, parts):
        return
    mode = flush_denormals()
    n = out.shape[1]
    w = width_of(out)
    blocks = (n + w - 1) // w
    first, end = blocks * part // parts * w, min(n, blocks * (part + 1) // parts * w)
    scatter(tokens, rows, d, 0, n, n, first, end, out, sums)
    restore_denormals(mode)
