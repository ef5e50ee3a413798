"""The products: right to every tile's edge, inside their bounds, and one chain for each element."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import agree, each_dtype, same
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrnn import gemm
from fastrnn.cells import CELLS
from fastrnn.jit import kernel
from fastrnn.layout import even
from fastrnn.pack import pack, pack_layer, pack_transposed
from fastrnn.simd import at, broadcast, fma, lanes, store

CANARY = -123.25


@kernel
def _multiply(
    groups, m, n, k, a, a_at, a_row, a_group, p, init, init_at, init_row, c, c_at, c_row, c_group
):
    gemm.multiply(
        groups, m, n, k, at(a, a_at), a_row, a_group, at(p, 0), at(init, init_at), init_row,
        at(c, c_at), c_row, c_group,
    )  # fmt: skip


@kernel
def _accumulate(
    rows, rows_h, d, d_at, d_row, size, runs, order, first, end,
    x, m_x, out_x, sums_x, h, h_row, m_h, out_h, sums_h, panel, strips,
):  # fmt: skip
    gemm.accumulate(
        rows.size, at(rows, 0), at(rows_h, 0),
        at(d, d_at), d_row, size, runs, at(order, 0), first, end,
        at(x, 0), m_x, at(out_x, 0), at(sums_x, 0),
        at(h, 0), h_row, m_h, at(out_h, 0), at(sums_h, 0), at(panel, 0), at(strips, 0),
    )  # fmt: skip


@kernel
def _scatter(tokens, rows, d, d_at, d_row, n, first, end, out, sums):
    gemm.scatter(tokens, rows, d, d_at, d_row, n, first, end, out, sums)


@kernel
def _chain(a, b, register, c):
    """c[i, j] += a[i, k] * b[k, j], link after link in the order of k, rounded as in a tile."""
    m, depth = a.shape
    n = c.shape[1]
    for i in range(m):
        for j in range(n):
            total = broadcast(c, c[i, j])
            for k in range(depth):
                total = fma(broadcast(c, a[i, k]), broadcast(c, b[k, j]), total)
            store(register, 0, total)
            c[i, j] = register[0]


def chain(a, b, start):
    """The promised value of a product, bit for bit."""
    c = np.array(start, a.dtype)
    _chain(np.ascontiguousarray(a), np.ascontiguousarray(b), np.empty(lanes(a.dtype), a.dtype), c)
    return c


def panels(b, cols=gemm.COLS):
    """b (k, n) as the docstring of gemm has it: blocks of COLS registers, the last one narrower."""
    w = lanes(b.dtype)
    k, n = b.shape
    blocks = []
    for left in range(0, n, cols * w):
        width = min(cols * w, n - left)
        block = np.zeros((k, -(-width // w) * w), b.dtype)
        block[:, :width] = b[:, left : left + width]
        blocks.append(block.reshape(-1))
    return np.concatenate(blocks)


def numbers(rng, dtype, *shape):
    return rng.standard_normal(shape).astype(dtype)


def strided(rng, dtype, rows, width, gap, before=3, after=5):
    """`rows` of `width` numbers in the middle of NaN: (flat memory, offset, distance, the rows)."""
    distance = width + gap
    memory = np.full(before + rows * distance + after, np.nan, dtype)
    view = memory[before : before + rows * distance].reshape(rows, distance)[:, :width]
    view[...] = numbers(rng, dtype, rows, width)
    return memory, before, distance, view


def multiply(a, b, start, rng, groups=1, gap=0, parts=1):
    """`gemm.multiply` among canaries: a (groups, m, k), start (m, n) or (n,) -> (groups, m, n)."""
    dtype = a.dtype
    m, k = a.shape[1:]
    n = b.shape[1]
    memory, start_of_a, row, view = strided(rng, dtype, groups * m, k, gap)
    view[...] = a.reshape(groups * m, k)
    first = np.full(7 + start.size + gap * m, np.nan, dtype)
    init_row = 0 if start.ndim == 1 else n + gap
    for i, values in enumerate(np.atleast_2d(start)):
        first[7 + i * init_row :][:n] = values
    c_row, c_group = n + 2 * gap, m * (n + 2 * gap) + 11
    c = np.full(groups * c_group + 20, CANARY, dtype)
    p = panels(b)
    for part in range(parts):
        top = m * part // parts
        rows = m * (part + 1) // parts - top
        _multiply(
            groups, rows, n, k, memory, start_of_a + top * row, row, m * row, p,
            first, 7 + top * init_row, init_row, c, 9 + top * c_row, c_row, c_group,
        )  # fmt: skip
    found = np.empty((groups, m, n), dtype)
    outside = np.ones(c.size, bool)
    for g in range(groups):
        for i in range(m):
            here = 9 + g * c_group + i * c_row
            found[g, i] = c[here : here + n]
            outside[here : here + n] = False
    assert (c[outside] == CANARY).all(), "numbers outside of C were written"
    return found


def around(*edges):
    return sorted({n + d for n in edges for d in (-1, 0, 1) if n + d > 0})


ROWS = around(1, gemm.ROWS, 2 * gemm.ROWS, gemm.HEIGHT, 2 * gemm.HEIGHT)
DEPTHS = around(1, gemm.DEPTH, 2 * gemm.DEPTH)


def columns(dtype):
    w = lanes(dtype)
    return around(1, w, 3 * w, gemm.COLS * w, 2 * gemm.COLS * w)


def check_multiply(dtype, m, n, k, rng, groups=1, gap=0, repeat=False):
    a, b = numbers(rng, dtype, groups, m, k), numbers(rng, dtype, k, n)
    start = numbers(rng, dtype, n) if repeat else numbers(rng, dtype, m, n)
    got = multiply(a, b, start, rng, groups, gap)
    want = a.astype(np.float64) @ b.astype(np.float64) + start
    agree(got, want, dtype, k, f"m {m} n {n} k {k}")
    return a, b, start, got


@each_dtype
@pytest.mark.parametrize("m", ROWS)
def test_multiply_at_the_edges_of_rows(dtype, m, rng):
    for n in (1, lanes(dtype) + 1):
        check_multiply(dtype, m, n, 5, rng)


@each_dtype
@pytest.mark.parametrize("k", DEPTHS)
def test_multiply_at_the_edges_of_depth(dtype, k, rng):
    w = lanes(dtype)
    for n in (1, gemm.COLS * w + w + 1):
        check_multiply(dtype, 7, n, k, rng)


@each_dtype
def test_multiply_at_the_edges_of_columns(dtype, rng):
    for n in columns(dtype):
        for m in (1, gemm.ROWS + 1):
            check_multiply(dtype, m, n, 3, rng)


@each_dtype
def test_multiply_with_every_height_and_width_of_a_tile(dtype, rng):
    w = lanes(dtype)
    for m in range(1, gemm.ROWS + 1):
        for cols in range(1, gemm.COLS + 1):
            for n in {cols * w, cols * w - 1, (cols - 1) * w + 1}:
                a, b, start, got = check_multiply(dtype, m, n, 9, rng)
                same(got[0], chain(a[0], b, start))


@each_dtype
@pytest.mark.parametrize("m", range(1, gemm.ROWS + 1))
def test_multiply_of_few_rows_takes_several_panels(dtype, m, rng):
    wide = gemm.COLS * lanes(dtype)
    for panels_taken in range(1, 2 * max(gemm.PANELS) + 2):
        for over in (-1, 0, 1, lanes(dtype)):
            n, k = panels_taken * wide + over, gemm.DEPTH + 6 if panels_taken == 5 else 11
            a, b, start, got = check_multiply(dtype, m, n, k, rng)
            same(got[0], chain(a[0], b, start))


@each_dtype
@pytest.mark.parametrize("gap", [0, 1, 13])
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_multiply_groups_and_repeated_rows(dtype, gap, groups, rng):
    for m, n, k in ((1, 1, 1), (3, lanes(dtype) + 2, 6), (97, 5, 129)):
        a, b, start, got = check_multiply(dtype, m, n, k, rng, groups, gap, repeat=True)
        for g in range(groups):
            same(got[g], chain(a[g], b, np.broadcast_to(start, (m, n))))


@each_dtype
def test_multiply_may_start_from_its_own_result(dtype, rng):
    w = lanes(dtype)
    for m, n, k in ((1, 1, 1), (7, w + 1, 5), (97, 5 * w, 130)):
        a, b, c = numbers(rng, dtype, m, k), numbers(rng, dtype, k, n), numbers(rng, dtype, m, n)
        want = chain(a, b, c)
        flat = c.reshape(-1)
        _multiply(
            1, m, n, k, a.reshape(-1), 0, k, 0, panels(b), flat, 0, n, flat, 0, n, 0
        )  # fmt: skip
        same(c, want)


@each_dtype
def test_multiply_takes_every_element_along_one_chain(dtype, rng):
    w = lanes(dtype)
    m, n, k = gemm.HEIGHT + 7, gemm.COLS * w + w + 3, 2 * gemm.DEPTH + 3
    a, b, start = numbers(rng, dtype, 1, m, k), numbers(rng, dtype, k, n), numbers(rng, dtype, m, n)
    want = chain(a[0], b, start)
    same(multiply(a, b, start, rng)[0], want)
    for parts in (2, 3, 7):
        same(multiply(a, b, start, rng, parts=parts)[0], want, f"{parts} parts")
    for rows in (slice(0, 1), slice(5, 11), slice(m - 2, m)):
        for cols in (slice(0, 1), slice(w - 1, w + 1), slice(n - w - 1, n)):
            got = multiply(a[:, rows], b[:, cols], start[rows, cols], rng)
            same(got[0], want[rows, cols])


@each_dtype
def test_multiply_of_nothing(dtype, rng):
    start = numbers(rng, dtype, 3, 5)
    none = np.empty((1, 0, 4), dtype)
    assert multiply(none, numbers(rng, dtype, 4, 5), start[:0], rng).shape == (1, 0, 5)


small = st.integers(1, 2 * gemm.ROWS + 1)
shapes = st.tuples(
    st.sampled_from([np.float32, np.float64]),
    st.one_of(small, st.sampled_from(ROWS)),
    st.one_of(small, st.integers(1, 140)),
    st.one_of(small, st.sampled_from(DEPTHS)),
    st.integers(1, 3),
    st.integers(0, 3),
    st.booleans(),
    st.integers(0, 99),
)


@given(shapes)
def test_multiply_random_shapes(shape):
    dtype, m, n, k, groups, gap, repeat, seed = shape
    check_multiply(dtype, m, n, k, np.random.default_rng(seed), groups, gap, repeat)


@pytest.mark.slow
@settings(max_examples=3000)
@given(shapes)
def test_multiply_many_random_shapes(shape):
    dtype, m, n, k, groups, gap, repeat, seed = shape
    rng = np.random.default_rng(seed)
    a, b, start, got = check_multiply(dtype, m, n, k, rng, groups, gap, repeat)
    same(got[0], chain(a[0], b, np.broadcast_to(start, (m, n))))


def backward_order(array):
    """Rows (T, B, ...) as accumulate takes them: last step first, sequences in order."""
    return np.ascontiguousarray(array[::-1]).reshape(-1, array.shape[-1])


def check_accumulate(dtype, T, B, size, m_x, m_h, rng, order=((0,), (0,)), gap=0, parts=1):
    """Gradients of two matrices and biases, whose gates are found in `order`, chain by chain."""
    w = lanes(dtype)
    runs = len(order[0])
    run = -(-size // w) * w if runs > 1 else size
    d_row, d_at = runs * run + gap * w, 2 * w
    memory = np.full(d_at + T * B * d_row, np.nan, dtype)
    d = memory[d_at:].reshape(T, B, d_row)[..., : runs * run].reshape(T, B, runs, run)
    d[..., :size] = numbers(rng, dtype, T, B, runs, size)
    blocks = -(-size // w)
    registers = gemm.RUN * (-(-m_x // w) + -(-m_h // w))
    panel = np.full(registers * w + w, np.nan, dtype)
    strips = np.full(gemm.GROUP * gemm.RUN * gemm.STRIP * w + w, np.nan, dtype)
    panel[-w:] = strips[-w:] = CANARY
    rows = rng.permutation(T * B), rng.permutation(T * B)
    sides = []
    # Rows of the second may have something between them.
    for gates, m, row in ((order[0], m_x, m_x), (order[1], m_h, m_h + gap)):
        count = (max(gates) + 1) * size
        x = np.full((T * B * row + w), np.nan, dtype)
        x[: T * B * row].reshape(T * B, row)[:, :m] = numbers(rng, dtype, T * B, m)
        out, sums = np.full(count * m + 2 * w, CANARY, dtype), np.full(count + 2 * w, CANARY, dtype)
        out[w:-w], sums[w:-w] = numbers(rng, dtype, count * m), numbers(rng, dtype, count)
        sides.append((x, row, m, out, sums, out[w:-w].reshape(count, m).copy(), sums[w:-w].copy()))
    for part in range(parts):
        _accumulate(
            *rows, memory, d_at, d_row, size, runs, np.array(order).reshape(-1),
            runs * blocks * part // parts, runs * blocks * (part + 1) // parts,
            *(
                a
                for i, (x, row, m, out, sums, *_) in enumerate(sides)
                for a in (x, *((row, m) if i else (m,)), out[w:-w], sums[w:-w])
            ),
            panel, strips,
        )  # fmt: skip
    for array in (panel, strips):
        assert (array[-w:] == CANARY).all()
    d = d.reshape(T * B, runs, run)[rows[0]]
    for gates, side, found in zip(order, sides, rows, strict=True):
        x, row, m, out, sums, want, want_sums = side
        for array in (out, sums):
            assert (array[:w] == CANARY).all()
            assert (array[-w:] == CANARY).all()
        x = x[: T * B * row].reshape(T * B, row)[found, :m]
        for run_number, gate in enumerate(gates):
            if gate < 0:
                continue
            part = d[:, run_number, :size]
            here = slice(gate * size, (gate + 1) * size)
            start = want[here].copy()
            want[here] = chain(part.T, x, start)
            # accumulate adds one after the other, unlike sum
            want_sums[here] = np.add.accumulate(np.vstack([want_sums[here], part]))[-1]
            exact = part.T.astype(np.float64) @ x.astype(np.float64) + start
            agree(want[here], exact, dtype, T * B)
        same(out[w:-w].reshape(want.shape), want, f"T {T} B {B} size {size} m {m}")
        same(sums[w:-w], want_sums, "sums")


@each_dtype
@pytest.mark.parametrize("rows", around(1, gemm.RUN, 2 * gemm.RUN))
def test_accumulate_at_the_edges_of_depth(dtype, rows, rng):
    check_accumulate(dtype, rows, 1, 3, 4, 2, rng)
    check_accumulate(dtype, 1, rows, 3, 4, 2, rng)


@each_dtype
@pytest.mark.parametrize("batch", [2, 3, 43, 61, 127, 131])
def test_accumulate_takes_steps_from_the_end_and_sequences_in_order(dtype, batch, rng):
    check_accumulate(dtype, 1 + 260 // batch, batch, 3, 4, 5, rng)


@each_dtype
def test_accumulate_at_the_edges_of_strips_and_panels(dtype, rng):
    w = lanes(dtype)
    for size in around(1, w, 2 * w, 3 * w, 4 * w, 6 * w, 24 * w, 27 * w):
        check_accumulate(dtype, 2, 3, size, 3, 1, rng)
        check_accumulate(dtype, 2, 3, size, 3, 1, rng, order=((0, 1), (1, 0)))
    for m in columns(dtype):
        check_accumulate(dtype, 2, 3, 5, m, 3, rng)
        check_accumulate(dtype, 2, 3, 5, 3, m, rng)


# The gates of the first and of the second matrix that each run of d is of.
ORDERS = [
    ((0,), (0,)),
    ((0,), (-1,)),
    ((2, 0, 1, -1), (-1, 0, 1, 2)),
    ((0, 1, 2, 3), (3, 1, 2, 0)),
    ((-1, -1), (1, 0)),
]


@each_dtype
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("order", ORDERS)
def test_accumulate_gates_and_parts(dtype, parts, order, rng):
    w = lanes(dtype)
    for size in (1, w + 1, 3 * w, 4 * w - 1):
        check_accumulate(dtype, 3, 2, size, w + 2, 7, rng, order, 1, parts)


@given(
    st.sampled_from([np.float32, np.float64]),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 70),
    st.integers(0, 70),
    st.integers(0, 70),
    st.sampled_from(ORDERS),
    st.integers(1, 4),
)
def test_accumulate_random_shapes(dtype, steps, batch, size, m_x, m_h, order, parts):
    rng = np.random.default_rng([steps, batch, size, m_x, m_h])
    check_accumulate(dtype, steps, batch, size, m_x, m_h, rng, order, parts=parts)


@each_dtype
@pytest.mark.parametrize("T", [1, 2, 7])
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_scatter(dtype, T, B, parts, rng):
    w = lanes(dtype)
    for n in around(1, w, 2 * w):
        vocabulary, d_row, d_at = 4, n + 3, 5
        tokens = rng.integers(vocabulary, size=(T, B)).astype(np.int32)
        memory = np.full(d_at + T * B * d_row, np.nan, dtype)
        d = memory[d_at:].reshape(T, B, d_row)[..., :n]
        d[...] = numbers(rng, dtype, T, B, n)
        out = np.full((vocabulary + 2, n), CANARY, dtype)
        sums = np.full(n + w, CANARY, dtype)
        out[1:-1], sums[:n] = numbers(rng, dtype, vocabulary, n), numbers(rng, dtype, n)
        want, want_sums = out.copy(), sums.copy()
        for t in reversed(range(T)):
            for b in range(B):
                want[1 + tokens[t, b]] += d[t, b]
                want_sums[:n] += d[t, b]
        blocks = -(-n // w)
        for part in range(parts):
            first, end = blocks * part // parts * w, min(n, blocks * (part + 1) // parts * w)
            order = even(T, B, 0).rows
            _scatter(tokens.reshape(-1), order, memory, d_at, d_row, n, first, end, out[1:-1], sums)
        same(out, want)
        same(sums, want_sums)


def affine(x, weight, bias, parts=1):
    y = np.full((len(x) + 2, len(weight)), CANARY, x.dtype)
    packed = pack_transposed(weight, (0,))
    for part in range(parts):
        gemm.affine(part, parts, x, packed, bias, y[1:-1])
    assert (y[[0, -1]] == CANARY).all()
    return y[1:-1]


@each_dtype
def test_affine(dtype, rng):
    w = lanes(dtype)
    for rows, n_in, n_out in ((1, 1, 1), (5, 3, w + 1), (97, w + 1, 3), (7, 130, 5 * w)):
        x, weight = numbers(rng, dtype, rows, n_in), numbers(rng, dtype, n_out, n_in)
        bias = numbers(rng, dtype, n_out)
        want = chain(x, weight.T, np.tile(bias, (rows, 1)))
        for parts in (1, 2, 3, rows + 1):
            same(affine(x, weight, bias, parts), want)
        exact = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
        agree(want, exact, dtype, n_in)


@each_dtype
@pytest.mark.parametrize("need_d_x", [True, False])
def test_affine_gradients(dtype, need_d_x, rng):
    w = lanes(dtype)
    for T, B, n_in, n_out in (
        (1, 1, 1, 1),
        (3, 5, w + 1, 3),
        (2, 65, 3, 3 * w + 1),
        (4, 2, 70, 70),
    ):
        x, d_y = numbers(rng, dtype, T, B, n_in), numbers(rng, dtype, T, B, n_out)
        weight = numbers(rng, dtype, n_out, n_in)
        start, start_bias = numbers(rng, dtype, n_out, n_in), numbers(rng, dtype, n_out)
        zeros = np.zeros(n_in, dtype)
        want_d_x = chain(d_y.reshape(-1, n_out), weight, np.zeros((T * B, n_in)))
        want = chain(backward_order(d_y).T, backward_order(x), start)
        want_bias = np.add.accumulate(np.vstack([start_bias, backward_order(d_y)]))[-1]
        for parts in (1, 2, 3):
            d_weight, d_bias = start.copy(), start_bias.copy()
            d_x = np.full((T * B if need_d_x else 0, n_in), np.nan, dtype)
            for part in range(parts):
                flat = [array.reshape(T * B, -1) for array in (x, d_y)]
                packed = pack(weight, (0,), n_out)
                gemm.affine_gradients(
                    part, parts, even(T, B, 0).rows, *flat, packed, zeros, d_x, d_weight, d_bias
                )
            same(d_weight, want)
            same(d_bias, want_bias)
            if need_d_x:
                same(d_x, want_d_x)


ORDERS = [(0,), (2, 0, 1), (0, 1, 2, 3)]


@each_dtype
@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("rows", [False, True], ids=["panels", "rows"])
def test_pack_transposed(dtype, order, rows, rng, threads):
    w = lanes(dtype)
    for size in around(1, w, 2 * w):
        for k in (1, w - 1, w, 2 * w + 3):
            weight = numbers(rng, dtype, len(order) * size, k)
            padded = np.zeros((len(order), -(-size // w) * w, k), dtype)
            padded[:, :size] = weight.reshape(len(order), size, k)[list(order)]
            columns = padded.reshape(-1, k).T
            want = columns.reshape(-1) if rows else panels(columns)
            for count in (1, 3):
                threads(count)
                same(pack_transposed(weight, order, rows=rows), want)


@each_dtype
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_pack(dtype, order, rng, threads):
    w = lanes(dtype)
    for size in (1, w, w + 1):
        for gap in (size, size + 3):
            for n in columns(dtype):
                weight = numbers(rng, dtype, len(order) * size, n)
                spread = np.zeros((len(order), gap, n), dtype)
                spread[:, :size] = weight.reshape(len(order), size, n)[list(order)]
                for count in (1, 3):
                    threads(count)
                    same(pack(weight, order, gap), panels(spread.reshape(-1, n)))


@each_dtype
@pytest.mark.parametrize("bias", [True, False])
def test_pack_layer(dtype, bias, rng):
    w = lanes(dtype)
    size = w + 1
    w_x, w_h = numbers(rng, dtype, 3 * size, 5), numbers(rng, dtype, 3 * size, size)
    b_x, b_h = (numbers(rng, dtype, 3 * size) for _ in range(2)) if bias else (None, None)
    n_x, r_x, z_x = b_x.reshape(3, size)[[2, 0, 1]] if bias else np.zeros((3, size), dtype)
    r_h, z_h, n_h = b_h.reshape(3, size) if bias else np.zeros((3, size), dtype)
    sums = {"gru": [n_x, r_x + r_h, z_x + z_h, n_h]}
    sums["gru_before"] = [*sums["gru"], np.zeros(size)]
    for name, wanted in sums.items():
        cell = CELLS[name]
        values, places = pack_layer(cell, w_x, w_h, b_x, b_h, None, None, tokens=False, apart=False)
        assert places[0] == 5
        x, h, late, own, *others = np.split(values, places[2:])
        same(x, pack_transposed(w_x, cell.order_x))
        same(h, pack_transposed(w_h[: len(cell.order_h) * size], cell.order_h))
        same(late, pack_transposed(w_h[2 * size :], (0,)) if cell.order_late else late[:0])
        runs = np.zeros((cell.tape, 2 * w), dtype)
        runs[:, :size] = wanted
        same(own, runs.reshape(-1))
        assert all(other.size == 0 for other in others)


@each_dtype
def test_pack_layer_with_vectors(dtype, rng):
    w = lanes(dtype)
    size = w + 1
    weight, v = numbers(rng, dtype, 4 * size, size), numbers(rng, dtype, 3, size)
    cell = CELLS["lstm_peephole"]
    packed = pack_layer(
        cell, weight, weight, None, None, [v[:1], v[1:]], None, tokens=True, apart=True
    )
    assert packed.places[0] == 0
    runs = np.zeros((3, 2 * w), dtype)
    runs[:, :size] = v
    same(packed.values[packed.places[5] :], runs.reshape(-1))
