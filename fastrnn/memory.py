"""Arrays for kernels: on a register boundary, from memory that is used again.

A training step needs the same large arrays every time. Fresh memory costs a page fault for every
4 KiB, a tenth of a small step; so the memory of an array that nobody refers to any more is kept,
up to a limit, for the next one of its size.
"""

from __future__ import annotations

import math
import os
import threading
from typing import Any

import numpy as np

ALIGNMENT = 64
# Below this the allocator of NumPy is as good; in all, this much idle memory is kept.
_SMALLEST = 1 << 14
_KEPT = 1 << 28

_lock = threading.Lock()
_idle: dict[int, list[np.ndarray]] = {}
_idle_bytes = 0


class _Block:
    """Memory of one array; NumPy's views refer to it, and the last of them gives it back."""

    __slots__ = ("__array_interface__", "_raw")

    def __init__(self, raw: np.ndarray, count: int, dtype: np.dtype) -> None:
        self._raw = raw
        address = raw.ctypes.data
        self.__array_interface__ = {
            "version": 3,
            "shape": (count,),
            "typestr": dtype.str,
            "data": (address + -address % ALIGNMENT, False),
        }

    def __del__(self) -> None:
        global _idle_bytes
        raw = self._raw
        # Never wait: the collector may run this inside the lock. None: the interpreter is ending.
        if _lock is not None and raw.nbytes <= _KEPT and _lock.acquire(blocking=False):
            try:
                # The sizes that were last used longest ago make room.
                while _idle_bytes + raw.nbytes > _KEPT:
                    oldest = next(iter(_idle))
                    _idle_bytes -= oldest * len(_idle.pop(oldest))
                _idle.setdefault(raw.nbytes, []).append(raw)
                _idle_bytes += raw.nbytes
            finally:
                _lock.release()


def empty(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised C-contiguous array that starts on a register boundary."""
    global _idle_bytes
    dtype = np.dtype(dtype)
    shape = (shape,) if isinstance(shape, int) else shape
    count = math.prod(shape)
    size = count * dtype.itemsize + ALIGNMENT
    raw = None
    # Never wait here either: a signal handler may have interrupted the holder of the lock.
    if size >= _SMALLEST and _lock.acquire(blocking=False):
        try:
            if idle := _idle.pop(size, None):
                raw = idle.pop()
                _idle_bytes -= size
                if idle:
                    _idle[size] = idle
        finally:
            _lock.release()
    if raw is None:
        raw = np.empty(size, np.uint8)
    if size >= _SMALLEST:
        return np.asarray(_Block(raw, count, dtype)).reshape(shape)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + count * dtype.itemsize].view(dtype).reshape(shape)


def zeros(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """`empty`, filled with zeros."""
    array = empty(shape, dtype)
    array.fill(0)
    return array


def _start_over() -> None:
    global _lock, _idle_bytes
    _lock = threading.Lock()
    _idle.clear()
    _idle_bytes = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_over)
