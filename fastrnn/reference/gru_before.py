"""Gated recurrent unit in its reset-before form; rows of the weights: r, z, n.

    r  = σ(W_ir x + b_ir + W_hr h + b_hr)                 reset
    z  = σ(W_iz x + b_iz + W_hz h + b_hz)                 update: the part of h that stays
    m  = r ⊙ h
    n  = tanh(W_in x + b_in + W_hn m + b_hn)              new
    h' = (1 - z) ⊙ n + z ⊙ h

Source: K. Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical
machine translation", arXiv:1406.1078v3 (2014). Keras has it as reset_after=False, ONNX as
linear_before_reset=0. Its weights mean another network in the reset-after form.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrnn.reference.linear import input_backward, input_forward, sum_outer
from fastrnn.reference.loss import sigmoid
from fastrnn.reference.masks import in_full

Array = NDArray[Any]

GATES = ("r", "z", "n")
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

    Returns (output (T, B, H), final state, saved). The mask is on h in m, too: m = r ⊙ (mask ⊙ h).
    """
    weight_hh, bias_hh = params["weight_hh"], params.get("bias_hh", 0)
    a_x = input_forward(params["weight_ih"], x) + params.get("bias_ih", 0)
    T, (B, H) = len(x), state[0].shape
    mask = in_full(mask, 1, (B, H), weight_hh.dtype)
    zone = in_full(zone, 0, (T, B, H), weight_hh.dtype)
    h = np.empty((T + 1, B, H), weight_hh.dtype)  # h[t] enters step t, h[t + 1] leaves it
    r, z, n, m = np.empty((4, T, B, H), weight_hh.dtype)
    weight_hrz, weight_hn = np.split(weight_hh, [2 * H])
    bias_hrz, bias_hn = np.split(np.broadcast_to(bias_hh, 3 * H), [2 * H])
    h[0] = state[0]
    for t in range(T):
        a_ir, a_iz, a_in = np.split(a_x[t], 3, axis=1)
        a_hr, a_hz = np.split((mask * h[t]) @ weight_hrz.T + bias_hrz, 2, axis=1)
        r[t] = sigmoid(a_ir + a_hr)
        z[t] = sigmoid(a_iz + a_hz)
        m[t] = r[t] * (mask * h[t])
        n[t] = np.tanh(a_in + m[t] @ weight_hn.T + bias_hn)
        h_new = (1 - z[t]) * n[t] + z[t] * h[t]
        h[t + 1] = zone[t] * h[t] + (1 - zone[t]) * h_new
    saved = {"x": x, "h": h, "r": r, "z": z, "n": n, "m": m, "mask": mask, "zone": zone}
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
    x, h, r, z, n, m = (saved[name] for name in ("x", "h", "r", "z", "n", "m"))
    mask, zone = saved["mask"], saved["zone"]
    (d_h,) = d_state
    T, B, H = n.shape
    weight_hrz, weight_hn = np.split(weight_hh, [2 * H])
    d_a = np.empty((T, B, 3 * H), n.dtype)
    for t in reversed(range(T)):
        d_h = d_h + d_output[t]
        d_h_new = (1 - zone[t]) * d_h
        d_n = d_h_new * (1 - z[t])
        d_z = d_h_new * (h[t] - n[t])
        d_a_n = d_n * (1 - n[t] ** 2)
        d_m = d_a_n @ weight_hn
        d_r = d_m * (mask * h[t])
        d_a_r = d_r * r[t] * (1 - r[t])
        d_a_z = d_z * z[t] * (1 - z[t])
        d_a[t] = np.concatenate([d_a_r, d_a_z, d_a_n], axis=1)
        d_masked = d_m * r[t] + d_a[t][:, : 2 * H] @ weight_hrz
        d_h = zone[t] * d_h + d_h_new * z[t] + mask * d_masked
    d_x, d_weight_ih = input_backward(params["weight_ih"], x, d_a)
    d_weight_hrz = sum_outer(d_a[..., : 2 * H], mask * h[:-1])
    d_weight_hn = sum_outer(d_a[..., 2 * H :], m)
    grads = {"weight_ih": d_weight_ih, "weight_hh": np.concatenate([d_weight_hrz, d_weight_hn])}
    if "bias_ih" in params:
        grads["bias_ih"] = d_a.sum(axis=(0, 1))
        grads["bias_hh"] = d_a.sum(axis=(0, 1))
    return d_x, (d_h,), grads
