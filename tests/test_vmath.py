"""exp, sigmoid and tanh to the bounds that vmath states, and the memory operations of `Vec`."""

from __future__ import annotations

import sys
from decimal import Context, Decimal, localcontext

import numpy as np
import pytest
from helpers import each_dtype, same

from fastrnn import vmath
from fastrnn.jit import kernel
from fastrnn.simd import (
    flush_denormals,
    lanes,
    load,
    load_n,
    machine,
    restore_denormals,
    store,
    store_n,
    transpose,
    width_of,
)

ULPS = {"exp": 2, "sigmoid": 4, "tanh": 4}
CANARY = -123.25


@kernel
def _exp(x, y):
    for j in range(0, x.size, width_of(x)):
        store_n(y, j, vmath.exp(load_n(x, j, x.size - j)), x.size - j)


@kernel
def _sigmoid(x, y):
    for j in range(0, x.size, width_of(x)):
        store_n(y, j, vmath.sigmoid(load_n(x, j, x.size - j)), x.size - j)


@kernel
def _tanh(x, y):
    for j in range(0, x.size, width_of(x)):
        store_n(y, j, vmath.tanh(load_n(x, j, x.size - j)), x.size - j)


KERNELS = {"exp": _exp, "sigmoid": _sigmoid, "tanh": _tanh}
each_function = pytest.mark.parametrize("name", sorted(KERNELS))


def run(name, x):
    y = np.full_like(x, CANARY)
    KERNELS[name](x, y)
    return y


def exact(name, x):
    """The function in float64, far more exact than a float32 result can be."""
    if name == "tanh":
        return np.tanh(x)
    power = np.exp(-np.abs(x))
    if name == "exp":
        return np.exp(x)
    return np.where(x >= 0, 1, power) / (1 + power)


def bounds(name, dtype):
    """The arguments for which vmath states a relative error."""
    low, high = vmath._RANGE[np.dtype(dtype).itemsize * 8]
    return {"exp": (low, high), "sigmoid": (low, np.inf), "tanh": (-np.inf, np.inf)}[name]


def ulps(got, want):
    """Distance in units in the last place of `got`'s type at `want`."""
    unit = np.spacing(np.abs(want).astype(got.dtype)).astype(np.float64)
    return np.abs(got.astype(np.float64) - want) / unit


def inside(name, x):
    low, high = bounds(name, x.dtype)
    return x[(x >= low) & (x <= high)]


def arguments(dtype, rng, count):
    """Dense where the functions bend, then random bits: all exponents, both signs."""
    low, high = vmath._RANGE[np.dtype(dtype).itemsize * 8]
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
    bits = rng.integers(0, np.iinfo(unsigned).max, count, unsigned, endpoint=True)
    random = bits.view(dtype)
    return np.concatenate(
        [
            np.linspace(low, high, count).astype(dtype),
            np.linspace(-20, 20, count).astype(dtype),
            rng.uniform(-1, 1, count).astype(dtype),
            random[np.isfinite(random)],
        ]
    )


@each_function
def test_error_in_float32(name, rng):
    x = inside(name, arguments(np.float32, rng, 300_000))
    assert x.size > 500_000
    assert ulps(run(name, x), exact(name, x.astype(np.float64))).max() <= ULPS[name]


@pytest.mark.slow
@each_function
def test_error_for_every_float32(name):
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for high in range(1 << 10):
            bits = np.arange(1 << 22, dtype=np.uint32) + np.uint32(high << 22)
            x = inside(name, bits.view(np.float32))
            if x.size:
                worst = ulps(run(name, x), exact(name, x.astype(np.float64))).max()
                assert worst <= ULPS[name], hex(high << 22)


def decimal(name, x):
    """The function to 50 digits."""
    x = Decimal(x)
    if name == "exp":
        return x.exp()
    if name == "sigmoid":
        return 1 / (1 + (-x).exp())
    if abs(x) < Decimal("1e-15"):
        return x - x**3 / 3
    power = (2 * x).exp()
    return (power - 1) / (power + 1)


@each_function
def test_error_in_float64(name, rng):
    x = inside(name, arguments(np.float64, rng, 1000))
    x = x[np.abs(x) < 1000]  # beyond, tanh and sigmoid are 1 and a decimal power takes long
    got = run(name, x)
    unit = np.spacing(np.abs(got))
    with localcontext(Context(prec=50, Emin=-5000)):
        for value, found, step in zip(x.tolist(), got.tolist(), unit.tolist(), strict=True):
            error = abs(Decimal(found) - decimal(name, value)) / Decimal(step)
            assert error <= ULPS[name], value


@each_dtype
def test_special_values(dtype):
    nan, inf, huge, tiny = np.nan, np.inf, np.finfo(dtype).max, np.finfo(dtype).tiny
    x = np.array([nan, inf, -inf, 0.0, -0.0, huge, -huge, tiny, -tiny], dtype)
    want = {
        "exp": [nan, inf, 0, 1, 1, inf, 0, 1, 1],
        "sigmoid": [nan, 1, None, 0.5, 0.5, 1, None, 0.5, 0.5],
        "tanh": [nan, 1, -1, 0, 0, 1, -1, tiny, -tiny],
    }
    for name, values in want.items():
        got = run(name, x)
        for argument, found, value in zip(x, got, values, strict=True):
            if value is None:
                assert 0 <= found <= 1e-37, (name, argument)
            else:
                assert np.array_equal(found, dtype(value), equal_nan=True), (name, argument)


@each_dtype
def test_exp_beyond_its_range(dtype):
    low, high = (dtype(v) for v in vmath._RANGE[np.dtype(dtype).itemsize * 8])
    low, high = np.nextafter(low, dtype(0)), np.nextafter(high, dtype(0))
    below, above = low - dtype(1), high + dtype(1)
    got = run("exp", np.array([below, low, high, above], dtype))
    assert got[0] == 0
    assert np.finfo(dtype).tiny <= got[1] < 1e-37
    assert 1e38 < got[2] < np.inf
    assert got[3] == np.inf


@each_function
@each_dtype
def test_never_leaves_its_interval(name, dtype, rng):
    """Gates stay gates: h = (1 - z) n + z h' would otherwise grow."""
    x = arguments(dtype, rng, 10_000)
    y = run(name, x)
    low, high = {"exp": (0, np.inf), "sigmoid": (0, 1), "tanh": (-1, 1)}[name]
    assert y.min() >= low
    assert y.max() <= high


@each_dtype
def test_tanh_is_nearly_odd_and_keeps_the_sign(dtype, rng):
    x = np.abs(arguments(dtype, rng, 10_000))
    x = x[x >= np.finfo(dtype).tiny]
    up, down = run("tanh", x), run("tanh", -x)
    assert (up > 0).all()
    assert (np.abs(up + down) <= 8 * np.spacing(up)).all()


@each_function
@each_dtype
def test_a_lane_knows_nothing_of_the_others(name, dtype, rng):
    """Each number alone, in any lane and among any company: the same bits."""
    w = lanes(dtype)
    x = rng.standard_normal(3 * w + 1).astype(dtype) * 4
    whole = run(name, x)
    for start in range(1, w + 1):
        same(run(name, x[start:].copy()), whole[start:])
    poisoned = np.full(w, np.nan, dtype)
    for lane in range(w):
        poisoned[lane] = x[lane]
        same(run(name, poisoned)[lane : lane + 1], whole[lane : lane + 1])
        poisoned[lane] = np.nan


@kernel
def _copy_n(x, start, n, y, into):
    store_n(y, into, load_n(x, start, n), n)


@kernel
def _read_n(x, start, n, y):
    store(y, 0, load_n(x, start, n))


@kernel
def _copy(x, start, y, into):
    store(y, into, load(x, start))


@each_dtype
def test_partial_loads_and_stores(dtype, rng):
    w = lanes(dtype)
    for n in range(-1, w + 3):
        for shift in (0, 1):  # on a register boundary or not
            x = rng.standard_normal(3 * w).astype(dtype)
            y = np.full(3 * w, CANARY, dtype)
            _copy_n(x, w + shift, n, y, w - shift)
            count = min(max(n, 0), w)
            want = np.full(3 * w, CANARY, dtype)
            want[w - shift : w - shift + count] = x[w + shift : w + shift + count]
            same(y, want, f"n {n}")
            register = np.full(w, CANARY, dtype)
            _read_n(x, w + shift, n, register)
            want = np.zeros(w, dtype)
            want[:count] = x[w + shift : w + shift + count]
            same(register, want, f"n {n}")


@each_dtype
def test_whole_loads_and_stores(dtype, rng):
    w = lanes(dtype)
    for start in range(w + 1):
        x = rng.standard_normal(2 * w).astype(dtype)
        y = np.full(3 * w, CANARY, dtype)
        _copy(x, start, y, w - start)
        want = np.full(3 * w, CANARY, dtype)
        want[w - start : 2 * w - start] = x[start : start + w]
        same(y, want)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a page that may not be touched")
@each_dtype
def test_partial_loads_and_stores_stay_off_the_next_page(dtype):
    """The last numbers before memory that must not be touched: a stray access would kill."""
    import ctypes
    import mmap

    page = mmap.PAGESIZE
    pages = mmap.mmap(-1, 2 * page)
    handle = ctypes.c_char.from_buffer(pages)
    start = ctypes.addressof(handle)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + page), page, 0) == 0
    try:
        x = np.frombuffer(pages, dtype, page // np.dtype(dtype).itemsize)
        x[:] = np.arange(x.size)
        y = np.full(lanes(dtype), CANARY, dtype)
        for n in range(1, lanes(dtype)):
            _copy_n(x, x.size - n, n, y, 0)
            same(y[:n], x[-n:])
            _copy_n(y, 0, n, x, x.size - n)
    finally:
        libc.mprotect(ctypes.c_void_p(start + page), page, mmap.PROT_READ | mmap.PROT_WRITE)
        del x, handle
        pages.close()


@kernel
def _transpose(source, start, row, target, into, step):
    transpose(source, start, row, target, into, step)


@each_dtype
def test_transpose(dtype, rng):
    w = lanes(dtype)
    for start, row, into, step in ((0, w, 0, w), (3, w + 2, 5, w + 7), (1, 3 * w, 2, 2 * w)):
        source = rng.standard_normal(start + w * row).astype(dtype)
        target = np.full(into + w * step + 1, CANARY, dtype)
        _transpose(source, start, row, target, into, step)
        want = np.full_like(target, CANARY)
        for i in range(w):
            for j in range(w):
                want[into + j * step + i] = source[start + i * row + j]
        same(target, want)


@kernel
def _halve(x, y):
    for j in range(x.size):
        y[j] = x[j] * x.dtype.type(0.5)


@kernel
def _halve_flushed(x, y):
    mode = flush_denormals()
    for j in range(x.size):
        y[j] = x[j] * x.dtype.type(0.5)
    restore_denormals(mode)


@kernel
def _halve_twice_flushed(x, y):
    outer = flush_denormals()
    inner = flush_denormals()
    restore_denormals(inner)
    for j in range(x.size):
        y[j] = x[j] * x.dtype.type(0.5)
    restore_denormals(outer)


@pytest.mark.skipif(not machine().x86, reason="the mode is not changed on this CPU")
@each_dtype
def test_denormals_are_flushed_and_the_mode_restored(dtype):
    tiny = np.finfo(dtype).tiny
    x = np.array([1, tiny, tiny / 4], dtype)
    plain, flushed = np.array([0.5, tiny / 2, tiny / 8], dtype), np.array([0.5, 0, 0], dtype)
    assert plain.all()
    y = np.empty_like(x)
    # A second flush inside gives back the mode it found, which was to flush.
    for function, want in (
        (_halve, plain),
        (_halve_flushed, flushed),
        (_halve, plain),
        (_halve_twice_flushed, flushed),
        (_halve, plain),
    ):
        y.fill(np.nan)
        function(x, y)
        same(y, want)
    assert x[1] * dtype(0.5) > 0
