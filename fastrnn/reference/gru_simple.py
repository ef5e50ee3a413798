"""Gated recurrent unit without a reset gate; rows of the weights: z, n.

    z  = σ(W_iz x + b_iz + W_hz h + b_hz)                 update: the part of h that stays
    n  = tanh(W_in x + b_in + W_hn h + b_hn)              new
    h' = (1 - z) ⊙ n + z ⊙ h

The simplified unit that courses begin with (A. Ng, "Sequence models", deeplearning.ai, 2018), where
Γ_u is 1 - z: the rows of W_u and b_u with their signs changed. Both forms of the full unit are this
one where r is 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrnn.reference.linear import input_backward, input_forward, sum_outer
from fastrnn.reference.loss import sigmoid
from fastrnn.reference.masks import in_full

Array = NDArray[Any]

GATES = ("z", "n")
STATES = ("h",)


def forward(
    params: dict[str, Array],
    x: Array,
    state: tuple[Array, ...],
    *,
    mask: Array | None = None,
    zone: Array | float | None = None,
) -> tuple[Array, tuple[Array, ...], dict[str, Any]]:
    """One layer, one direction: x (T, B, I) or tokens (T, B), state (h,) of (B, H).

    Returns (output (T, B, H), final state, saved).
    """
    weight_hh, bias_hh = params["weight_hh"], params.get("bias_hh", 0)
    a_x = input_forward(params["weight_ih"], x) + params.get("bias_ih", 0)
    T, (B, H) = len(x), state[0].shape
    mask = in_full(mask, 1, (B, H), weight_hh.dtype)
    zone = in_full(zone, 0, (T, B, H), weight_hh.dtype)
    h = np.empty((T + 1, B, H), weight_hh.dtype)  # h[t] enters step t, h[t + 1] leaves it
    z, n = np.empty((2, T, B, H), weight_hh.dtype)
    h[0] = state[0]
    for t in range(T):
        a_z, a_n = np.split(a_x[t] + (mask * h[t]) @ weight_hh.T + bias_hh, 2, axis=1)
        z[t] = sigmoid(a_z)
        n[t] = np.tanh(a_n)
        h_new = (1 - z[t]) * n[t] + z[t] * h[t]
        h[t + 1] = zone[t] * h[t] + (1 - zone[t]) * h_new
    saved = {"x": x, "h": h, "z": z, "n": n, "mask": mask, "zone": zone}
    return h[1:].copy(), (h[T].copy(),), saved


def backward(
    params: dict[str, Array],
    saved: dict[str, Any],
    d_output: Array,
    d_state: tuple[Array, ...],
) -> tuple[Array | None, tuple[Array, ...], dict[str, Array]]:
    """Gradients from d_output (T, B, H) and d_state (d_h,) of the final state, (B, H).

    Returns (d_x or None, d_state of the initial state, grads).
    """
    weight_hh = params["weight_hh"]
    x, h, z, n, mask, zone = (saved[name] for name in ("x", "h", "z", "n", "mask", "zone"))
    (d_h,) = d_state
    T, B, H = n.shape
    d_a = np.empty((T, B, 2 * H), n.dtype)
    for t in reversed(range(T)):
        d_h = d_h + d_output[t]
        d_h_new = (1 - zone[t]) * d_h
        d_n = d_h_new * (1 - z[t])
        d_z = d_h_new * (h[t] - n[t])
        d_a_n = d_n * (1 - n[t] ** 2)
        d_a_z = d_z * z[t] * (1 - z[t])
        d_a[t] = np.concatenate([d_a_z, d_a_n], axis=1)
        d_h = zone[t] * d_h + d_h_new * z[t] + mask * (d_a[t] @ weight_hh)
    d_x, d_weight_ih = input_backward(params["weight_ih"], x, d_a)
    grads = {"weight_ih": d_weight_ih, "weight_hh": sum_outer(d_a, mask * h[:-1])}
    if "bias_ih" in params:
        grads["bias_ih"] = d_a.sum(axis=(0, 1))
        grads["bias_hh"] = d_a.sum(axis=(0, 1))
    return d_x, (d_h,), grads
