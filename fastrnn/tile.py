"""The micro-kernel of every product: a block of C in registers, and one loop over k.

Each element is one chain of multiply-adds in the order of k. The loop is written out `LINKS` links
at a time with constant distances, so that little is left in it but loads and multiply-adds: where
two programs share a core, it is the number of instructions that counts.

Where panels come from beyond the second-level cache, the next one is asked for on the way: a line or
two at each link, by the first tiles that work on the present one.
"""

from __future__ import annotations

from numba import types

from fastrnn.jit import intrinsic, linked
from fastrnn.simd import (
    Vec,
    first_lanes,
    machine,
    multiply_add,
    prefetch,
    read,
    read_masked,
    splat,
    write,
    write_masked,
)

# Accumulators fill three quarters of the registers: 6 x 4 of 32, 6 x 2 of 16.
ROWS = 6
COLS = 4 if machine().registers == 32 else 2
# Registers of rows in a strip.
STRIP = 3
LINKS = 4
# Bytes that one prefetch brings, and how many of them at each link there are tiles for.
LINE = 64
AHEAD = (1, 2)
# Rows from which a tile is large.
LARGE = 4


def _tile(of_strip):
    """C[rows, cols registers] = init + sum over k of A[row, k] * P[k, column], on pointers.

    A[row, k] is at a[row*a_row + k], of a strip at a[k*STRIP*lanes + row]. `last` lanes of the last
    register of columns exist in init and C. Distances are in elements. A large tile also asks for
    `lines` lines (0 or of AHEAD) from `ahead` on at each link.
    """

    @intrinsic
    def tile(typingctx, rows, cols, last, depth, a, a_row, p, lines, ahead, init, init_row, c, c_row):
        vec = Vec(c.dtype)
        i = types.intp

        def codegen(context, builder, sig, args):
            rows, cols, last, depth, a, a_row, p, lines, ahead, init, init_row, c, c_row = args
            number = rows.type
            line = LINE * 8 // vec.dtype.bitwidth
            mask = first_lanes(builder, vec, last)
            along = STRIP * vec.lanes if of_strip else 1
            done = builder.append_basic_block("tile.done")
            large = builder.and_(
                builder.icmp_signed(">=", rows, number(LARGE)),
                builder.icmp_signed("==", cols, number(COLS)),
            )
            lines = builder.select(large, lines, number(0))
            shape = builder.add(builder.mul(lines, number(ROWS + 1)), rows)
            shape = builder.add(builder.mul(shape, number(COLS + 1)), cols)
            choice = builder.switch(shape, done)

            def move(pointer, distance, times=1, plus=0):
                offset = builder.add(builder.mul(distance, number(times)), number(plus))
                return builder.gep(pointer, [offset])

            def loop(count, links, width, fetch, lines, p, ahead, sums):
                """`count` times `links` links of every chain; all pointers and sums move on."""
                before = builder.block
                body = builder.append_basic_block("tile.loop")
                end = builder.append_basic_block("tile.end")
                builder.cbranch(builder.icmp_signed(">", count, number(0)), body, end)
                builder.position_at_end(body)
                state = [number(0), p, ahead, *lines, *sums]
                phis = [builder.phi(value.type) for value in state]
                turn, p, ahead, *rest = phis
                lines, sums = rest[: len(lines)], rest[len(lines) :]
                for offset in range(0, links * fetch * line, line):
                    prefetch(builder, builder.gep(ahead, [number(offset)]))
                for link in range(links):
                    at = link * width * vec.lanes
                    panel = [
                        read(builder, vec, builder.gep(p, [number(at + col * vec.lanes)]))
                        for col in range(width)
                    ]
                    for row in range(len(sums) // width):
                        start, at = (lines[0], row) if of_strip else (lines[row], 0)
                        element = builder.gep(start, [number(link * along + at)])
                        x = splat(builder, vec, builder.load(element))
                        for col in range(width):
                            at = row * width + col
                            sums[at] = multiply_add(builder, vec, x, panel[col], sums[at])
                turn = builder.add(turn, number(1))
                p = builder.gep(p, [number(links * width * vec.lanes)])
                ahead = builder.gep(ahead, [number(links * fetch * line)])
                lines = [builder.gep(at, [number(links * along)]) for at in lines]
                after = [turn, p, ahead, *lines, *sums]
                for phi, first, next_one in zip(phis, state, after, strict=True):
                    phi.add_incoming(first, before)
                    phi.add_incoming(next_one, body)
                builder.cbranch(builder.icmp_signed("<", turn, count), body, end)
                builder.position_at_end(end)
                merged = []
                for first, last_one in zip(state[1:], after[1:], strict=True):
                    phi = builder.phi(first.type)
                    phi.add_incoming(first, before)
                    phi.add_incoming(last_one, body)
                    merged.append(phi)
                p, ahead, *rest = merged
                return rest[: len(lines)], p, ahead, rest[len(lines) :]

            def block(height, width, fetch):
                sums = []
                for row in range(height):
                    for col in range(width):
                        source = move(init, init_row, row, col * vec.lanes)
                        if col < width - 1:
                            sums.append(read(builder, vec, source))
                        else:
                            sums.append(read_masked(builder, vec, source, mask))
                lines = [a] if of_strip else [move(a, a_row, row) for row in range(height)]
                state = lines, p, ahead, sums
                state = loop(builder.sdiv(depth, number(LINKS)), LINKS, width, fetch, *state)
                state = loop(builder.srem(depth, number(LINKS)), 1, width, fetch, *state)
                for at, value in enumerate(state[3]):
                    row, col = divmod(at, width)
                    target = move(c, c_row, row, col * vec.lanes)
                    if col < width - 1:
                        write(builder, vec, value, target)
                    else:
                        write_masked(builder, vec, value, target, mask)
                builder.branch(done)

            for fetch in (0,) if of_strip else (0, *AHEAD):
                for height in range(LARGE if fetch else 1, ROWS + 1):
                    for width in range(COLS if fetch else 1, COLS + 1):
                        start = builder.append_basic_block(f"tile.{height}x{width}")
                        which = (fetch * (ROWS + 1) + height) * (COLS + 1) + width
                        choice.add_case(number(which), start)
                        builder.position_at_end(start)
                        block(height, width, fetch)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(i, i, i, i, a, i, p, i, ahead, init, i, c, i), codegen

    return tile


_of_rows = _tile(of_strip=False)
_of_strip = _tile(of_strip=True)


def _by_rows(dtype):
    i, p = types.intp, types.CPointer(dtype)
    return types.void(i, i, i, i, p, i, p, i, p, p, i, p, i)


def _by_strip(dtype):
    i, p = types.intp, types.CPointer(dtype)
    return types.void(i, i, i, i, p, p, p, i, p, i)


# Functions of their own, since they are most of the machine code of every kernel.


@linked(_by_rows)
def tile(rows, cols, last, depth, a, a_row, p, lines, ahead, init, init_row, c, c_row):
    """See `_tile`: A by rows."""
    _of_rows(rows, cols, last, depth, a, a_row, p, lines, ahead, init, init_row, c, c_row)


@linked(_by_strip)
def tile_of_strip(rows, cols, last, depth, a, p, init, init_row, c, c_row):
    """See `_tile`: A is a strip."""
    _of_strip(rows, cols, last, depth, a, 1, p, 0, p, init, init_row, c, c_row)
