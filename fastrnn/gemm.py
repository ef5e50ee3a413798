"""Matrix products on packed panels: A @ P and A.T @ B; every product of the library is one.

Each element of a result is one chain of multiply-adds over k in a fixed order, started from what
the result held before. Tile shapes, panels, blocks and threads decide when a link is added, never
in which order: that is why results have the same bits however the work is cut.

A *panel* is a block of `COLS` registers of columns (fewer in the last one), stored k by k:
`panel[k][column]`. A *strip* is its counterpart on the left: up to 3 registers of rows.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types

from fastrnn.jit import helper, intrinsic, kernel, linked
from fastrnn.simd import (
    Vec,
    at,
    first_lanes,
    flush_denormals,
    keep_alive,
    load_n,
    machine,
    multiply_add,
    read,
    read_masked,
    restore_denormals,
    splat,
    store,
    store_n,
    width_of,
    write,
    write_masked,
)

# Accumulators fill three quarters of the registers: 6 x 4 of 32, 6 x 2 of 16.
ROWS = 6
COLS = 4 if machine().registers == 32 else 2
# Columns of k worked on at a time, so that a block of a panel stays in the first-level cache.
DEPTH = 128
# Rows of A that pass over one panel block before the next.
HEIGHT = 96


@intrinsic
def _tile(typingctx, rows, cols, last, depth, a, a_row, a_k, p, init, init_row, c, c_row):
    """C[rows, cols registers] = init + sum over k of A[row, k] * P[k, column], on pointers.

    `last` lanes of the last register of columns exist in init and C. Distances between rows and
    between k are in elements.
    """
    vec = Vec(c.dtype)
    i = types.intp

    def codegen(context, builder, sig, args):
        rows, cols, last, depth, a_base, a_row, a_k, p_base, i_base, init_row, c_base, c_row = args
        intp = rows.type
        mask = first_lanes(builder, vec, last)
        done = builder.append_basic_block("tile.done")
        shape = builder.add(builder.mul(rows, ir.Constant(intp, COLS + 1)), cols)
        choice = builder.switch(shape, done)

        def element(base, row, distance, offset):
            at = builder.add(builder.mul(distance, ir.Constant(intp, row)), offset)
            return builder.gep(base, [at])

        def tile(height, width):
            """The loop over k with height x width registers of sums."""
            entry = builder.block
            starts = []
            for row in range(height):
                for col in range(width):
                    pointer = element(i_base, row, init_row, ir.Constant(intp, col * vec.lanes))
                    part = col == width - 1
                    value = (
                        read_masked(builder, vec, pointer, mask)
                        if part
                        else read(builder, vec, pointer)
                    )
                    starts.append(value)
            loop = builder.append_basic_block("tile.loop")
            end = builder.append_basic_block("tile.end")
            builder.cbranch(builder.icmp_signed(">", depth, ir.Constant(intp, 0)), loop, end)
            entry = builder.block
            builder.position_at_end(loop)
            k = builder.phi(intp)
            a_off = builder.phi(intp)
            p_off = builder.phi(intp)
            sums = [builder.phi(vec.llvm) for _ in starts]
            panel = [
                read(
                    builder,
                    vec,
                    builder.gep(p_base, [builder.add(p_off, ir.Constant(intp, col * vec.lanes))]),
                )
                for col in range(width)
            ]
            news = []
            for row in range(height):
                x = splat(builder, vec, builder.load(element(a_base, row, a_row, a_off)))
                for col in range(width):
                    news.append(multiply_add(builder, vec, x, panel[col], sums[row * width + col]))
            k_next = builder.add(k, ir.Constant(intp, 1))
            for phi, start, step in (
                (k, ir.Constant(intp, 0), k_next),
                (a_off, ir.Constant(intp, 0), builder.add(a_off, a_k)),
                (
                    p_off,
                    ir.Constant(intp, 0),
                    builder.add(p_off, ir.Constant(intp, width * vec.lanes)),
                ),
                *zip(sums, starts, news, strict=True),
            ):
                phi.add_incoming(start, entry)
                phi.add_incoming(step, loop)
            builder.cbranch(builder.icmp_signed("<", k_next, depth), loop, end)
            builder.position_at_end(end)
            results = []
            for start, new in zip(starts, news, strict=True):
                result = builder.phi(vec.llvm)
                result.add_incoming(start, entry)
                result.add_incoming(new, loop)
                results.append(result)
            for row in range(height):
                for col in range(width):
                    pointer = element(c_base, row, c_row, ir.Constant(intp, col * vec.lanes))
                    value = results[row * width + col]
                    if col == width - 1:
                        write_masked(builder, vec, value, pointer, mask)
                    else:
                        write(builder, vec, value, pointer)
            builder.branch(done)

        for height in range(1, ROWS + 1):
            for width in range(1, COLS + 1):
                block = builder.append_basic_block(f"tile.{height}x{width}")
                choice.add_case(ir.Constant(intp, height * (COLS + 1) + width), block)
                builder.position_at_end(block)
                tile(height, width)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(i, i, i, i, a, i, i, p, init, i, c, i), codegen


def _tile_signature(dtype):
    i, p = types.intp, types.CPointer(dtype)
    return types.void(i, i, i, i, p, i, i, p, p, i, p, i)


@linked(_tile_signature)
def tile(rows, cols, last, depth, a, a_row, a_k, p, init, init_row, c, c_row):
    """`_tile` as a function: it holds most of the machine code of every kernel."""
    _tile(rows, cols, last, depth, a, a_row, a_k, p, init, init_row, c, c_row)


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
    return scratch(like, DEPTH * ((m + w - 1) // w) * w)


@helper
def strip_scratch(like):
    """Memory for the strip of `accumulate`."""
    return scratch(like, DEPTH * 3 * width_of(like))


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
                            rows, cols, last, depth, first, a_row, 1,
                            panel, start, start_row, into, c_row,
                        )  # fmt: skip


def _accumulate_signature(dtype):
    i, p = types.intp, types.CPointer(dtype)
    return types.void(i, i, p, i, i, i, types.CPointer(i), i, i, p, i, i, p, p, p, p)


@linked(_accumulate_signature)
def accumulate(
    steps, batch, d, d_row, run, size, order, first, end, x, x_row, m, out, sums, panel, strip
):
    """out[order[g]*size + u, :] += sum of d[row, g*run + u] * x[row, :m]; sums likewise of d alone.

    Rows are (step, sequence) pairs, taken in the order in which backpropagation meets them: last
    step first, sequences in order. Only the register blocks [first, end) of the runs are done.
    panel and strip are memory to work in: DEPTH rows of m, and of 3 registers.
    """
    w = width_of(out)
    wide = COLS * w
    blocks = (size + w - 1) // w
    total = steps * batch
    # The row of d and x where a block of rows begins, and its place in its step.
    row_0, b_0 = (steps - 1) * batch, 0
    for start in range(0, total, DEPTH):
        depth = min(DEPTH, total - start)
        row, b = row_0, b_0
        for j in range(depth):
            for left in range(0, m, wide):
                cols = (min(wide, m - left) + w - 1) // w
                for col in range(left, left + cols * w, w):
                    value = load_n(x, row * x_row + col, m - col)
                    store(panel, left * depth + j * cols * w + col - left, value)
            row, b = _next_row(row, b, batch)
        next_row, next_b = row, b
        block = first
        while block < end:
            g = block // blocks
            u = (block - g * blocks) * w
            into = order[g] * size + u
            take = min(3, end - block, blocks - block % blocks)
            for i in range(0, take * w, w):
                total_d = load_n(sums, into + i, size - u - i)
                row, b = row_0, b_0
                for j in range(depth):
                    value = load_n(d, row * d_row + g * run + u + i, size - u - i)
                    total_d = total_d + value
                    store(strip, j * take * w + i, value)
                    row, b = _next_row(row, b, batch)
                store_n(sums, into + i, total_d, size - u - i)
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
                    tile(
                        rows, cols, last, depth, at(strip, top), 1, take * w,
                        at(panel, left * depth), c, m, c, m,
                    )  # fmt: skip
            block += take
        row_0, b_0 = next_row, next_b


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
        steps, batch, at(d_y, 0), n, n, n, at(order, 0), first, end, at(x, 0), size, size,
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
