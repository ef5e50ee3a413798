"""Layer normalisation: a vector less its mean, divided by its standard deviation.

    norm(v) = (v - mean(v)) / sqrt(var(v) + 1e-5)         mean and biased variance of the last axis

Source: J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer normalization", arXiv:1607.06450 (2016).
Gains and shifts stand in the cells, which normalise a product over all its gates, as there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

EPS = 1e-5


def norm_forward(v: Array) -> tuple[Array, Array]:
    """norm(v) for v (..., N).

    Returns (normed (..., N), scale = 1 / sqrt(var + eps) (..., 1)).
    """
    scale = 1 / np.sqrt(v.var(axis=-1, keepdims=True) + EPS)
    normed = (v - v.mean(axis=-1, keepdims=True)) * scale
    return normed, scale


def norm_backward(d_normed: Array, normed: Array, scale: Array) -> Array:
    """d_v = scale (d_normed - mean(d_normed) - normed ⊙ mean(d_normed ⊙ normed))."""
    mean = d_normed.mean(axis=-1, keepdims=True)
    along = (d_normed * normed).mean(axis=-1, keepdims=True)
    return scale * (d_normed - mean - normed * along)


# Both directions for a cell that normalises (True), and for one that does not: v stays what it is
Forward = Callable[[Array], tuple[Array, Any]]
Backward = Callable[[Array, Array, Any], Array]
NORMS: dict[bool, tuple[Forward, Backward]] = {
    True: (norm_forward, norm_backward),
    False: (lambda v: (v, 1), lambda d_normed, normed, scale: d_normed),
}
