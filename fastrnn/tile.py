"""The micro-kernel of every product: a block of C in registers, and one loop over k.

Each element is one chain of multiply-adds in the order of k. The loop is written out `LINKS` links
at a time with constant distances, so that little is left in it but loads and multiply-adds: where
two programs share a core, it is the number of instructions that counts.

A tile asks for what comes after it: for the next panel where panels lie beyond the second-level
cache, link by link, else at once for the rows of C below its own. Tiles of a shape that lie below
each other are one call: with 64 links, calling takes a tenth of a tile.
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
# Panels that few rows take together: a chain waits four cycles for each link, and one or two panels
# do not have chains enough to fill them.
TOGETHER = 4
# Registers of rows in a strip.
STRIP = 3
LINKS = 4
# Bytes that a prefetch brings.
LINE = 64


# How many panels a tile of 0, 1, ... ROWS rows takes at the most.
PANELS = (1, *(max(1, min(TOGETHER, ROWS // height)) for height in range(1, ROWS + 1)))


def _tile(of_strip):
    """C[rows, cols registers] = init + sum over k of A[row, k] * P[k, column], on pointers.

    That is a tile; there are `count` of them, from 1, each on the rows below the last one's.

    A[row, k] is at a[row*a_row + k], of a strip at a[k*STRIP*lanes + row]. `last` lanes of the last
    register of columns exist in init and C. Distances are in elements. More than COLS registers are
    those of several panels, `p_step` apart; see PANELS. If `fetch` is 1, not 0, there are COLS
    registers of columns, and each link asks for a line from `ahead` on; else, with as many columns,
    each tile asks for the rows of C below it, the last one if `more` is 1, not 0.
    """
    shapes = [(0, height, width) for height in range(1, ROWS + 1) for width in range(1, COLS + 1)]
    if not of_strip:
        shapes += [(1, height, COLS) for height in range(1, ROWS + 1)]
        shapes += [
            (0, height, panels * COLS)
            for height in range(1, ROWS + 1)
            for panels in range(2, PANELS[height] + 1)
        ]
    widest = max(width for _, _, width in shapes)

    @intrinsic
    def tile(
        typingctx, count, rows, cols, last, depth, a, a_row, fetch, p, p_step, ahead, init,
        init_row, c, c_row, more,
    ):  # fmt: skip
        vec = Vec(c.dtype)
        i = types.intp

        def codegen(context, builder, sig, args):
            count, rows, cols, last, depth, a, a_row, fetch, p, p_step, *others = args
            ahead, init, init_row, c, c_row, more = others
            number = rows.type
            line = LINE * 8 // vec.dtype.bitwidth
            mask = first_lanes(builder, vec, last)
            whole = builder.icmp_signed("==", last, number(vec.lanes))
            along = STRIP * vec.lanes if of_strip else 1
            turns = builder.sdiv(depth, number(LINKS))
            left_over = builder.srem(depth, number(LINKS))
            done = builder.append_basic_block("tile.done")
            shape = builder.add(builder.mul(fetch, number(ROWS + 1)), rows)
            shape = builder.add(builder.mul(shape, number(widest + 1)), cols)
            choice = builder.switch(shape, done)

            def move(pointer, distance, times=1, plus=0):
                offset = builder.add(builder.mul(distance, number(times)), number(plus))
                return builder.gep(pointer, [offset])

            def loop(count, links, fetch, width, starts, p, ahead, sums):
                """`count` times `links` links of every chain; all pointers and sums move on."""
                before = builder.block
                body = builder.append_basic_block("tile.loop")
                after_all = builder.append_basic_block("tile.end")
                builder.cbranch(builder.icmp_signed(">", count, number(0)), body, after_all)
                builder.position_at_end(body)
                state = [number(0), p, ahead, *starts, *sums]
                phis = [builder.phi(value.type) for value in state]
                turn, p, ahead, *rest = phis
                starts, sums = rest[: len(starts)], rest[len(starts) :]
                for i in range(links if fetch else 0):
                    prefetch(builder, builder.gep(ahead, [number(i * line)]))
                side = min(width, COLS)
                begins = [move(p, p_step, i) if i else p for i in range(width // side)]

                def column(link, col):
                    at = (link * side + col % side) * vec.lanes
                    return read(builder, vec, builder.gep(begins[col // side], [number(at)]))

                def element(link, row):
                    start, at = (starts[0], row) if of_strip else (starts[row], 0)
                    found = builder.load(builder.gep(start, [number(link * along + at)]))
                    return splat(builder, vec, found)

                height = len(sums) // width
                for link in range(links):
                    # What there is less of stays in registers.
                    if width > COLS:
                        found = [element(link, row) for row in range(height)]
                        for col in range(width):
                            y = column(link, col)
                            for row in range(height):
                                at = row * width + col
                                sums[at] = multiply_add(builder, vec, found[row], y, sums[at])
                    else:
                        found = [column(link, col) for col in range(width)]
                        for row in range(height):
                            x = element(link, row)
                            for col in range(width):
                                at = row * width + col
                                sums[at] = multiply_add(builder, vec, x, found[col], sums[at])
                turn = builder.add(turn, number(1))
                p = builder.gep(p, [number(links * side * vec.lanes)])
                if fetch:
                    ahead = builder.gep(ahead, [number(links * line)])
                starts = [builder.gep(at, [number(links * along)]) for at in starts]
                after = [turn, p, ahead, *starts, *sums]
                for phi, first, next_one in zip(phis, state, after, strict=True):
                    phi.add_incoming(first, before)
                    phi.add_incoming(next_one, body)
                builder.cbranch(builder.icmp_signed("<", turn, count), body, after_all)
                builder.position_at_end(after_all)
                merged = []
                for first, last_one in zip(state[1:], after[1:], strict=True):
                    phi = builder.phi(first.type)
                    phi.add_incoming(first, before)
                    phi.add_incoming(last_one, body)
                    merged.append(phi)
                p, ahead, *rest = merged
                return rest[: len(starts)], p, ahead, rest[len(starts) :]

            def begun(init, height, width):
                """The registers of init."""
                places = [
                    [move(init, init_row, row, col * vec.lanes) for col in range(width)]
                    for row in range(height)
                ]
                found = [[read(builder, vec, place) for place in row[:-1]] for row in places]
                with builder.if_else(whole) as (all_lanes, some):
                    with all_lanes:
                        full = [read(builder, vec, row[-1]) for row in places]
                        from_full = builder.block
                    with some:
                        part = [read_masked(builder, vec, row[-1], mask) for row in places]
                        from_part = builder.block
                for row, one, other in zip(found, full, part, strict=True):
                    row.append(builder.phi(vec.llvm))
                    row[-1].add_incoming(one, from_full)
                    row[-1].add_incoming(other, from_part)
                return [value for row in found for value in row]

            def end(c, width, sums):
                """Store the registers of C."""
                rest = []
                for at, value in enumerate(sums):
                    row, col = divmod(at, width)
                    target = move(c, c_row, row, col * vec.lanes)
                    if col < width - 1:
                        write(builder, vec, value, target)
                    else:
                        rest.append((value, target))
                # Some CPUs are slow at a store with a mask.
                with builder.if_else(whole) as (all_lanes, some):
                    with all_lanes:
                        for value, target in rest:
                            write(builder, vec, value, target)
                    with some:
                        for value, target in rest:
                            write_masked(builder, vec, value, target, mask)

            def below(c, after, height, width):
                """Ask for the rows of C there, if the next tile or `more` have them."""
                there = builder.or_(after, builder.icmp_signed("!=", more, number(0)))
                first = builder.select(there, move(c, c_row, height), c)
                for row in range(height):
                    for at in range(0, width * vec.lanes, line):
                        prefetch(builder, move(first, c_row, row, at))

            def block(fetch, height, width):
                """`count` tiles."""
                before = builder.block
                body = builder.append_basic_block(f"tile.{height}x{width}")
                builder.branch(body)
                builder.position_at_end(body)
                state = [number(0), a, ahead, init, c]
                phis = [builder.phi(value.type) for value in state]
                turn, a_here, ahead_here, init_here, c_here = phis
                turn = builder.add(turn, number(1))
                after = builder.icmp_signed("<", turn, count)
                sums = begun(init_here, height, width)
                if width == COLS and not fetch:
                    below(c_here, after, height, width)
                starts = [a_here]
                if not of_strip:
                    starts = [move(a_here, a_row, row) for row in range(height)]
                links = starts, p, ahead_here, sums
                links = loop(turns, LINKS, fetch, width, *links)
                *_, ahead_here, sums = loop(left_over, 1, fetch, width, *links)
                end(c_here, width, sums)
                moved = [
                    turn,
                    move(a_here, number(1) if of_strip else a_row, height),
                    ahead_here,
                    move(init_here, init_row, height),
                    move(c_here, c_row, height),
                ]
                for phi, first, next_one in zip(phis, state, moved, strict=True):
                    phi.add_incoming(first, before)
                    phi.add_incoming(next_one, builder.block)
                builder.cbranch(after, body, done)

            for fetch, height, width in shapes:
                start = builder.append_basic_block("tile.start")
                which = (fetch * (ROWS + 1) + height) * (widest + 1) + width
                choice.add_case(number(which), start)
                builder.position_at_end(start)
                block(fetch, height, width)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(i, i, i, i, i, a, i, i, p, i, ahead, init, i, c, i, i), codegen

    return tile


_of_rows = _tile(of_strip=False)
_of_strip = _tile(of_strip=True)


def _by_rows(dtype):
    i, p = types.intp, types.CPointer(dtype)
    return types.void(i, i, i, i, i, p, i, i, p, i, p, p, i, p, i, i)


def _by_strip(dtype):
    i, p = types.intp, types.CPointer(dtype)
    return types.void(i, i, i, i, i, p, p, p, i, p, i, i)


# Functions of their own, since they are most of the machine code of every kernel.


@linked(_by_rows)
def tiles(
    count, rows, cols, last, depth, a, a_row, fetch, p, p_step, ahead, init, init_row, c, c_row,
    more,
):  # fmt: skip
    """See `_tile`: A by rows."""
    _of_rows(
        count, rows, cols, last, depth, a, a_row, fetch, p, p_step, ahead, init, init_row, c, c_row,
        more,
    )  # fmt: skip


@linked(_by_strip)
def tiles_of_strip(count, rows, cols, last, depth, a, p, init, init_row, c, c_row, more):
    """See `_tile`: A is a strip."""
    _of_strip(count, rows, cols, last, depth, a, 1, 0, p, 0, p, init, init_row, c, c_row, more)
