"""What the machine could do at best, measured: multiply-adds from registers, and memory read."""

from __future__ import annotations

import functools
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

from fastrnn.crew import divided
from fastrnn.jit import kernel
from fastrnn.parallel import run, set_num_threads
from fastrnn.simd import fma, lanes, load, store, width_of

_CHAINS = 12
_TURNS = 100_000
# Larger than any cache.
_MEMORY = 1 << 28


@kernel
def _multiply_add(part, parts, x, turns):
    """12 chains of multiply-adds that wait for nothing but themselves."""
    if divided(part, parts):
        return
    v = load(x, 0)
    a = b = c = d = e = f = g = h = i = j = k = m = v
    for _ in range(turns):
        a, b, c, d = fma(v, v, a), fma(v, v, b), fma(v, v, c), fma(v, v, d)
        e, f, g, h = fma(v, v, e), fma(v, v, f), fma(v, v, g), fma(v, v, h)
        i, j, k, m = fma(v, v, i), fma(v, v, j), fma(v, v, k), fma(v, v, m)
    w = width_of(x)
    store(x, part * w, a + b + c + d + e + f + g + h + i + j + k + m)


@kernel
def _read(part, parts, x, sums):
    """The sum of a part of x, all of it read once."""
    if divided(part, parts):
        return
    w = width_of(x)
    count = x.size // parts // (4 * w) * 4 * w
    a = b = c = d = load(x, 0)
    for at in range(part * count, (part + 1) * count, 4 * w):
        a, b = a + load(x, at), b + load(x, at + w)
        c, d = c + load(x, at + 2 * w), d + load(x, at + 3 * w)
    store(sums, part * w, a + b + c + d)


def cpu() -> str:
    """Its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@functools.cache
def _memory(dtype: str) -> np.ndarray:
    # Not zeros: pages that nobody has written are one page.
    return np.ones(_MEMORY // np.dtype(dtype).itemsize, dtype)


def limits(threads: int, seconds: float, dtype: str) -> dict[str, float]:
    """Best of the time given: GFLOP/s of multiply-adds, GB/s of reading memory."""
    memory = _memory(dtype)
    sums = np.zeros(lanes(dtype) * max(1, threads), dtype)
    found = speed(threads, seconds / 2, dtype)
    return found | {"gbytes": _best(memory.nbytes, threads, seconds / 2, _read, memory, sums)}


def speed(threads: int, seconds: float, dtype: str) -> dict[str, float]:
    """Of these, GFLOP/s."""
    width = lanes(dtype)
    x = np.zeros(width * max(1, threads), dtype)
    work = 2 * _CHAINS * width * _TURNS * threads
    return {"gflops": _best(work, threads, seconds, _multiply_add, x, _TURNS)}


def _best(work: float, threads: int, seconds: float, function: Any, *arguments: Any) -> float:
    """Billions of `work` a second."""
    set_num_threads(threads)
    run(function, threads, *arguments)  # compiles
    fastest = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run(function, threads, *arguments)
        fastest = min(fastest, time.perf_counter() - start)
    return work / fastest / 1e9
