"""Products with weights: linear layer, embedding, and the input product of a recurrent layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def linear_forward(params: dict[str, Array], x: Array) -> tuple[Array, Array]:
    """y = x weightᵀ + bias for x (..., I), weight (O, I), bias (O,) or absent.

    Returns (y (..., O), saved).
    """
    y = x @ params["weight"].T + params.get("bias", 0)
    return y, x


def linear_backward(
    params: dict[str, Array], saved: Array, d_output: Array
) -> tuple[Array, dict[str, Array]]:
    """d_x = d_y weight, d_weight = Σ d_yᵀ x, d_bias = Σ d_y; the sums run over the leading axes.

    Returns (d_x (..., I), grads).
    """
    weight, x = params["weight"], saved
    n_out, n_in = weight.shape
    d_y = d_output.reshape(-1, n_out)
    d_x = d_output @ weight
    grads = {"weight": d_y.T @ x.reshape(-1, n_in)}
    if "bias" in params:
        grads["bias"] = d_y.sum(axis=0)
    return d_x, grads


def embedding_forward(params: dict[str, Array], ids: Array) -> tuple[Array, Array]:
    """y = weight[ids] for integer ids (...) in [0, V) and weight (V, E).

    Returns (y (..., E), saved).
    """
    return params["weight"][ids], ids


def embedding_backward(params: dict[str, Array], saved: Array, d_output: Array) -> dict[str, Array]:
    """d_weight[v] = Σ d_y over the places where ids = v. Returns grads."""
    d_weight = np.zeros_like(params["weight"])
    np.add.at(d_weight, saved, d_output)  # unlike +=, adds every occurrence of a repeated id
    return {"weight": d_weight}


def is_tokens(x: Array) -> bool:
    """Whether x holds tokens (T, B) rather than features (T, B, I)."""
    return np.issubdtype(x.dtype, np.integer)


def input_forward(weight_ih: Array, x: Array) -> Array:
    """x weight_ihᵀ (T, B, G*H); a token picks column weight_ih[:, token], as its one-hot would."""
    return weight_ih.T[x] if is_tokens(x) else x @ weight_ih.T


def input_backward(weight_ih: Array, x: Array, d_a: Array) -> tuple[Array | None, Array]:
    """(d_x (T, B, I) or None for tokens, d_weight_ih (G*H, I)) from d_a (T, B, G*H)."""
    if not is_tokens(x):
        return d_a @ weight_ih, sum_outer(d_a, x)
    d_weight_ih = np.zeros_like(weight_ih)
    np.add.at(d_weight_ih.T, x, d_a)
    return None, d_weight_ih


def sum_outer(a: Array, b: Array) -> Array:
    """Σ_t Σ_b a[t, b] b[t, b]ᵀ, (M, N) from a (T, B, M) and b (T, B, N)."""
    return np.tensordot(a, b, axes=([0, 1], [0, 1]))
