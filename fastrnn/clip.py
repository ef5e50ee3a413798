"""Gradient clipping in place, by norm and by value, with PyTorch's names and meaning."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fastrnn.checks import as_number, for_kernel
from fastrnn.crew import divided
from fastrnn.jit import kernel
from fastrnn.parallel import ELEMENT, parts_for, run

_BLOCK = 4096


@kernel
def _squares(part, parts, x, block, sums):
    """Sums of squares of blocks in float64, in an order that depends on nothing but the size."""
    if divided(part, parts):
        return
    for k in range(sums.size * part // parts, sums.size * (part + 1) // parts):
        start, end = k * block, min(x.size, (k + 1) * block)
        a, b, c, d = 0.0, 0.0, 0.0, 0.0
        for i in range(start, end - 3, 4):
            a += np.float64(x[i]) * x[i]
            b += np.float64(x[i + 1]) * x[i + 1]
            c += np.float64(x[i + 2]) * x[i + 2]
            d += np.float64(x[i + 3]) * x[i + 3]
        for i in range(start + (end - start) // 4 * 4, end):
            a += np.float64(x[i]) * x[i]
        sums[k] = (a + b) + (c + d)


def _sum_of_squares(x: np.ndarray) -> float:
    sums = np.empty(-(-x.size // _BLOCK))
    run(_squares, parts_for(x.size * ELEMENT, sums.size), x, _BLOCK, sums)
    return float(sums.sum())


def _check_writable(grads: Mapping[str, np.ndarray]) -> None:
    for key, g in grads.items():
        if not g.flags.writeable:
            raise ValueError(f"grads[{key!r}]: expected a writable array, got a read-only one")


def _check(grads: Mapping[str, np.ndarray]) -> None:
    if not isinstance(grads, Mapping):
        raise TypeError(
            f"grads: expected a mapping of arrays, as backward returns it, "
            f"got {type(grads).__name__}"
        )


def grad_norm(grads: Mapping[str, np.ndarray], norm_type: float = 2.0) -> float:
    """The norm of all gradients as one vector; `norm_type` 2 or inf."""
    if norm_type == 2:
        total = 0.0
        for g in grads.values():
            total += _sum_of_squares(for_kernel(g).reshape(-1))
        largest = max(float(np.max(np.abs(g))) for g in grads.values()) if total == math.inf else 0
        if 0 < largest < math.inf:
            # The squares overflowed, the norm need not.
            return largest * grad_norm({key: g / largest for key, g in grads.items()})
        return math.sqrt(total)
    if norm_type == math.inf:
        # max() of Python would lose a NaN.
        return float(np.max([0.0, *(np.max(np.abs(g)) for g in grads.values())]))
    raise ValueError(f"norm_type: expected 2 or inf, got {norm_type!r}")


def clip_grad_norm_(
    grads: Mapping[str, np.ndarray],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> float:
    """Scale all gradients so that their common norm is at most `max_norm`.

    Returns the norm before clipping. If it is not finite the gradients stay as they are, or with
    `error_if_nonfinite` a ValueError tells.
    """
    _check(grads)
    limit = math.inf if max_norm == math.inf else as_number("max_norm", max_norm, 0, math.inf)
    _check_writable(grads)
    norm = grad_norm(grads, norm_type)
    if not math.isfinite(norm):
        if error_if_nonfinite:
            raise ValueError(f"grads: expected a finite norm, got {norm}")
        return norm
    if norm > limit:
        factor = limit / (norm + 1e-6)
        for g in grads.values():
            g *= g.dtype.type(factor)
    return norm


def clip_grad_value_(grads: Mapping[str, np.ndarray], clip_value: float) -> None:
    """Limit every element of the gradients to [-clip_value, clip_value]."""
    _check(grads)
    limit = as_number("clip_value", clip_value, 0, math.inf)
    _check_writable(grads)
    for g in grads.values():
        np.clip(g, -limit, limit, out=g)
