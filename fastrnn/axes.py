"""How the caller's arrays lie: time or batch first, one sequence or many; inside (T, B, ...)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from fastrnn.checks import (
    as_array,
    as_flags,
    as_floats,
    as_lengths,
    as_places,
    as_tokens,
    check_shape,
    mask_lengths,
)


class Axes(NamedTuple):
    """Of all arrays of a call.

    first      (B, T, ...) instead of (T, B, ...)
    unbatched  (T, ...): one sequence
    """

    steps: int
    batch: int
    first: bool
    unbatched: bool

    def names(self, *rest: str) -> str:
        """(T, B, ...) as the caller has it."""
        return _names(self.first, self.unbatched, *rest)

    def shape(self, *rest: int) -> tuple[int, ...]:
        """The same in numbers."""
        if self.unbatched:
            return (self.steps, *rest)
        return (self.batch, self.steps, *rest) if self.first else (self.steps, self.batch, *rest)

    def inward(self, array: np.ndarray) -> np.ndarray:
        """(T, B, ...), C-contiguous."""
        if self.unbatched:
            return array[:, None]
        return np.ascontiguousarray(array.swapaxes(0, 1)) if self.first else array

    def outward(self, array: np.ndarray) -> np.ndarray:
        """The opposite, a view."""
        if self.unbatched:
            return array[:, 0]
        return array.swapaxes(0, 1) if self.first else array

    def gradient(self, name: str, value: Any, size: int, letter: str, dtype: Any) -> np.ndarray:
        """A gradient of the output, which has `size` units."""
        return self.inward(as_floats(name, value, dtype, self.shape(size), self.names(letter)))

    def flags(self, name: str, array: np.ndarray) -> np.ndarray:
        """(T, B), checked."""
        check_shape(name, array, self.shape(), self.names())
        return self.inward(array)

    def lengths(self, value: Any) -> np.ndarray:
        """How many steps each sequence has, (B,), from numbers, a mask, or None: all."""
        if value is None:
            return np.full(self.batch, self.steps)
        array = as_array("lengths", value)
        if array.dtype == bool:
            return mask_lengths(self.flags("lengths", array))
        # One number of one sequence of one step means the same either way.
        if array.ndim == 2 or array.shape == self.shape() != (1,):
            raise TypeError(
                f"lengths: expected a mask {self.names()} of booleans, got {array.dtype}; "
                "write .astype(bool)"
            )
        return as_lengths(array.reshape(-1) if self.unbatched else array, self.steps, self.batch)

    def resets(self, value: Any) -> np.ndarray | None:
        """(T, B) booleans."""
        return None if value is None else self.flags("resets", as_flags("resets", value))

    def sequences(self, value: Any) -> np.ndarray | None:
        """(B,) numbers of sequences."""
        if value is None:
            return None
        array = as_array("sequences", value)
        return as_places("sequences", array.reshape(-1) if self.unbatched else array, self.batch)


@functools.cache
def _names(first: bool, unbatched: bool, *rest: str) -> str:
    if unbatched:
        return f"({', '.join(('T', *rest))})"
    return f"({', '.join(('B', 'T', *rest) if first else ('T', 'B', *rest))})"


def read_input(
    value: Any, first: bool, size: int, dtype: np.dtype, vectors: np.ndarray | None
) -> tuple[np.ndarray, Axes]:
    """x, floats (T, B, I) or int32 tokens (T, B), and how it lay.

    size     I
    vectors  what tokens stand for, (V, I); None: tokens below I, one-hot
    """
    array = as_array("x", value)
    tokens = array.dtype.kind in "iu"
    if vectors is not None and not tokens:
        raise TypeError(f"x: expected integer tokens beside vectors, got {array.dtype}")
    if tokens and array.ndim == 3:
        raise TypeError(
            f"x: expected features of {dtype}, got {array.dtype}; convert them with "
            f".astype(np.{dtype}) (integers are tokens, without the I axis)"
        )
    unbatched = array.ndim == (1 if tokens else 2)
    names = _names(first, unbatched, *(() if tokens else ("I",)))
    shape: tuple = (None,) if unbatched else (None, None)
    if tokens:
        array = as_tokens("x", array, size if vectors is None else len(vectors), shape, names)
    else:
        array = as_floats("x", array, dtype, (*shape, size), names)
    if unbatched:
        axes = Axes(len(array), 1, first, True)
    else:
        steps, batch = array.shape[1::-1] if first else array.shape[:2]
        axes = Axes(steps, batch, first, False)
    return axes.inward(array), axes
