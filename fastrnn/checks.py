"""What arguments may be: each check names the argument, what was expected and what came."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Steps and sequences whose masks are drawn are below this.
FAR = 2**31


def as_dtype(dtype: Any, name: str = "dtype") -> np.dtype:
    """float32 or float64."""
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    # NumPy takes None for float64, in np.dtype and in comparisons.
    if dtype is None or found is None or found not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise ValueError(f"{name}: expected float32 or float64, got {dtype!r}")
    return found


def as_size(name: str, value: Any, least: int = 1) -> int:
    """An integer from `least`."""
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None
    if size < least:
        raise ValueError(f"{name}: expected at least {least}, got {shown(size)}")
    return size


def as_place(name: str, value: Any) -> int:
    """An integer from 0, below `FAR`."""
    place = as_size(name, value, 0)
    if place >= FAR:
        raise ValueError(f"{name}: expected an integer from 0 to {FAR - 1}, got {shown(place)}")
    return place


def as_seed(seed: Any) -> int | None:
    """An integer from 0, or None."""
    return None if seed is None else as_size("seed", seed, 0)


def as_number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> float:
    """A finite number in [low, high), or in (low, high) with `open_low`."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None
    if not (low < number < high or (number == low and not open_low)):
        bracket = "(" if open_low else "["
        raise ValueError(
            f"{name}: expected a number in {bracket}{low:g}, {high:g}), got {shown(value)}"
        )
    return number


def shown(value: Any) -> str:
    """As Python writes it, but for numbers that it refuses to write."""
    try:
        return repr(value)
    except ValueError:
        if isinstance(value, int):
            return f"an integer of {value.bit_length()} bits"
        return f"a {type(value).__name__} that is too long to write"


def as_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of a few words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {shown(value)}")
    return value


def as_array(name: str, value: Any) -> np.ndarray:
    """Anything that NumPy takes for a numeric array."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name}: expected an array, got {type(value).__name__} ({error})"
        ) from None
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected an array of numbers, got dtype {array.dtype}")
    return array


def for_kernel(array: np.ndarray, dtype: Any = None) -> np.ndarray:
    """`array` as kernels take it (contiguous, aligned), copied only if it has to be.

    Kernels are compiled for writable arrays and never write into their inputs: a read-only array is
    lent as a writable view.
    """
    if array.flags.carray and (dtype is None or array.dtype == dtype):
        return array
    array = np.require(array, dtype, ["C", "A"])
    return array if array.flags.writeable else np.asarray(_Lent(array))


class _Lent:
    """A read-only array that says it is writable."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        interface = dict(array.__array_interface__)
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}


def check_shape(name: str, array: np.ndarray, shape: Sequence[int | None], names: str) -> None:
    """`shape` has None where any size from 1 will do; `names` is how it is written, (T, B, I)."""
    fits = array.ndim == len(shape)
    # A generator would take longer than all else here.
    for found, size in zip(array.shape, shape, strict=False):
        fits = fits and (found >= 1 if size is None else found == size)
    if not fits:
        letters = names.strip("()").split(", ") if shape else []
        wanted = ", ".join(
            letter if size is None else str(size)
            for letter, size in zip(letters, shape, strict=True)
        )
        note = "" if 0 not in array.shape else "; no axis may be empty"
        raise ValueError(f"{name}: expected shape {names} = ({wanted}), got {array.shape}{note}")


def as_floats(
    name: str, value: Any, dtype: np.dtype, shape: Sequence[int | None], names: str
) -> np.ndarray:
    """An array of `dtype` and `shape` that a kernel can take, copied only if it has to be."""
    array = as_array(name, value)
    if array.dtype != dtype:
        raise TypeError(
            f"{name}: expected {dtype}, got {array.dtype}; "
            f"convert it with .astype(np.{dtype}) or choose another dtype= for the layer"
        )
    check_shape(name, array, shape, names)
    return for_kernel(array)


def as_tokens(
    name: str, value: Any, size: int, shape: Sequence[int | None], names: str
) -> np.ndarray:
    """int32 tokens, each in [0, size)."""
    array = as_array(name, value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integer tokens, got {array.dtype}")
    check_shape(name, array, shape, names)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= size:
        wrong = low if low < 0 else high
        raise ValueError(f"{name}: expected tokens in [0, {size}), got {wrong}")
    return for_kernel(array, np.int32)


def as_lengths(array: np.ndarray, steps: int, batch: int) -> np.ndarray:
    """How many steps each of `batch` sequences has: (B,) integers from 0 to `steps`."""
    kinds = "integers or a boolean mask"
    return _one_each("lengths", array, batch, steps, f"T = {steps}", kinds).astype(np.intp)


def as_places(name: str, array: np.ndarray, batch: int) -> np.ndarray:
    """(B,) integers from 0, below `FAR`."""
    return _one_each(name, array, batch, FAR - 1, str(FAR - 1), "integers").astype(np.int64)


def _one_each(
    name: str, array: np.ndarray, batch: int, most: int, told: str, kinds: str
) -> np.ndarray:
    """(B,) integers from 0 to `most`; errors say `told` for that, and `kinds` for integers."""
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected {kinds}, got {array.dtype}")
    check_shape(name, array, (batch,), "(B)")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > most:
        wrong = low if low < 0 else high
        raise ValueError(f"{name}: expected integers from 0 to {told}, got {wrong}")
    return array


def mask_lengths(mask: np.ndarray) -> np.ndarray:
    """The same from a mask (T, B) that is True up to each sequence's end and False after it."""
    again = (mask[1:] > mask[:-1]).any(axis=0)
    if again.any():
        raise ValueError(
            "lengths: expected a mask that is True up to each sequence's end and False after it, "
            f"got one that is True again in sequence {int(again.argmax())}; "
            "move the padding to the end"
        )
    return mask.sum(axis=0)


def as_flags(name: str, value: Any) -> np.ndarray:
    """Booleans, also as the numbers 0 and 1."""
    array = as_array(name, value)
    if not ((array == 0) | (array == 1)).all():
        raise ValueError(
            f"{name}: expected True or False (1 or 0), got other numbers; "
            "write .astype(bool) where all but 0 mean True"
        )
    return array.astype(bool)


def as_token(name: str, value: Any, size: int) -> int:
    """A token in [0, size)."""
    token = as_size(name, value, 0)
    if token >= size:
        raise ValueError(f"{name}: expected a token in [0, {size}), got {token}")
    return token


def check_in_place(name: str, value: Any, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """`value`, used by address: a contiguous, writable array of `dtype` and `shape`."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name}: expected an array, got {type(value).__name__}")
    if value.dtype != dtype or value.shape != shape or not value.flags.carray:
        layout = "" if value.flags.carray else ", not contiguous or not writable"
        raise ValueError(
            f"{name}: expected a contiguous, writable {dtype} array of shape {shape}, "
            f"got {value.dtype} of shape {value.shape}{layout}"
        )
    return value


def load_params(
    params: Mapping[str, np.ndarray], mapping: Mapping[str, Any], name: str = "state_dict"
) -> None:
    """Copy every array of `mapping` into `params`; all keys and shapes must match."""
    if not isinstance(mapping, Mapping):
        raise TypeError(f"{name}: expected a mapping of arrays, got {type(mapping).__name__}")
    missing = [key for key in params if key not in mapping]
    unknown = [key for key in mapping if key not in params]
    if missing or unknown:
        raise ValueError(
            f"{name}: expected keys {sorted(params)}; missing {missing}, unknown {unknown}"
        )
    for key, value in params.items():
        check_in_place(f"params[{key!r}]", value, value.dtype, value.shape)
    arrays = {key: as_array(f"{name}[{key!r}]", mapping[key]) for key in params}
    for key, array in arrays.items():
        if array.shape != params[key].shape:
            raise ValueError(
                f"{name}[{key!r}]: expected shape {params[key].shape}, got {array.shape}"
            )
    for key, array in arrays.items():
        params[key][...] = array
