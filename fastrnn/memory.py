"""Arrays for kernels: on a register boundary, from memory that is used again.

A training step needs the same large arrays every time. Fresh memory costs a page fault for every
4 KiB, a tenth of a small step; so the memory of an array that nobody refers to any more is kept,
up to a limit, for the next one of its size, or where there is none for one somewhat smaller: with
sequences of other lengths each time, sizes differ a little.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np

ALIGNMENT = 64
# Below this the allocator of NumPy is as good; in all, this much idle memory is kept.
SMALLEST = 1 << 17
_KEPT = 1 << 28

_lock = threading.Lock()
_idle: dict[int, list[tuple[_Memory, int]]] = {}
_idle_bytes = 0


class _Memory(np.ndarray):
    """Bytes. NumPy would let a view of a view of a plain array refer to that array at once."""


class _Block(np.ndarray):
    """A view of memory that one array refers to, and whose end gives the memory back."""

    # None in a view of a block, which is no block itself.
    raw: _Memory | None = None
    start = 0

    def __del__(self) -> None:
        global _idle_bytes
        raw = self.raw
        if raw is None:
            return
        # Never wait: the collector may run this inside the lock. None: the interpreter is ending.
        if _lock is not None and raw.nbytes <= _KEPT and _lock.acquire(blocking=False):
            try:
                # The sizes that were last asked for longest ago make room.
                while _idle and _idle_bytes + raw.nbytes > _KEPT:
                    oldest = next(iter(_idle))
                    _idle_bytes -= oldest * len(_idle.pop(oldest))
                _idle.setdefault(raw.nbytes, []).append((raw, self.start))
                _idle_bytes += raw.nbytes
            finally:
                _lock.release()


def address_of(array: np.ndarray) -> int:
    """Where a contiguous, writable array begins: what `array.ctypes` tells, four times as fast."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]


def _start(raw: np.ndarray) -> int:
    """Where in `raw` the first register boundary is."""
    return -address_of(raw) % ALIGNMENT


def fitting(sizes: Iterable[int], size: int) -> int | None:
    """The least of `sizes` that will do for `size`: up to a quarter more."""
    return min((other for other in sizes if size <= other <= size + size // 4), default=None)


def empty(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised C-contiguous array that starts on a register boundary."""
    global _idle_bytes
    dtype = np.dtype(dtype)
    count = shape if isinstance(shape, int) else math.prod(shape)
    size = count * dtype.itemsize + ALIGNMENT
    if size < SMALLEST:
        raw = np.empty(size, np.uint8)
        return np.ndarray(shape, dtype, raw, _start(raw))
    found = None
    # Never wait here either: a signal handler may have interrupted the holder of the lock.
    if _lock.acquire(blocking=False):
        try:
            fit = size if size in _idle else fitting(list(_idle), size)
            # A signal handler may have given up all of it by now.
            if fit is not None and (idle := _idle.pop(fit, None)):
                found = idle.pop()
                _idle_bytes -= fit
                if idle:
                    _idle[fit] = idle
        finally:
            _lock.release()
    if found is None:
        try:
            raw = _Memory(size, np.uint8)
        except MemoryError:
            _give_up_idle()
            raw = _Memory(size, np.uint8)
        found = raw, _start(raw)
    raw, start = found
    block = raw.view(_Block)
    block.raw, block.start = found
    return np.ndarray(shape, dtype, block, start)


def zeros(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """`empty`, filled with zeros."""
    array = empty(shape, dtype)
    array.fill(0)
    return array


def _give_up_idle() -> None:
    global _idle_bytes
    _idle.clear()
    _idle_bytes = 0


def _start_over() -> None:
    global _lock
    _lock = threading.Lock()
    _give_up_idle()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_over)
