"""Gated recurrent unit in its reset-after form, as in PyTorch; rows of the weights: r, z, n.

    r  = σ(W_ir x + b_ir + W_hr h + b_hr)                 reset
    z  = σ(W_iz x + b_iz + W_hz h + b_hz)                 update: the part of h that stays
    n  = tanh(W_in x + b_in + r ⊙ (W_hn h + b_hn))        new
    h' = (1 - z) ⊙ n + z ⊙ h

Variant: layer normalisation, if params have norm_ih and norm_hh (3 H,); norm is that of norm.py,
over all rows of a product:

    W_i x  becomes  norm_ih ⊙ norm(W_i x)
    W_h h  becomes  norm_hh ⊙ norm(W_h h)

Sources: K. Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical
machine translation", arXiv:1406.1078v1 (2014), where the reset gate acts after the product with
W_hn, with biases as in PyTorch. From v3 on the paper has it act before, W_hn (r ⊙ h): another
network, not this one. Normalisation: J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer normalization",
arXiv:1607.06450 (2016).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrnn.reference.linear import input_backward, input_forward, sum_outer
from fastrnn.reference.loss import sigmoid
from fastrnn.reference.masks import in_full
from fastrnn.reference.norm import NORMS

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

    Returns (output (T, B, H), final state, saved). v_x and v_h are W_ih x and W_hh h, normalised
    if this layer does that.
    """
    weight_hh, bias_hh = params["weight_hh"], params.get("bias_hh", 0)
    norm, _ = NORMS["norm_ih" in params]
    norm_ih, norm_hh = params.get("norm_ih", 1), params.get("norm_hh", 1)
    v_x, scale_x = norm(input_forward(params["weight_ih"], x))
    a_x = norm_ih * v_x + params.get("bias_ih", 0)
    T, (B, H) = len(x), state[0].shape
    mask = in_full(mask, 1, (B, H), weight_hh.dtype)
    zone = in_full(zone, 0, (T, B, H), weight_hh.dtype)
    h = np.empty((T + 1, B, H), weight_hh.dtype)  # h[t] enters step t, h[t + 1] leaves it
    v_h, scale_h = np.empty(v_x.shape, weight_hh.dtype), np.empty((T, B, 1), weight_hh.dtype)
    r, z, n, a_hn = np.empty((4, T, B, H), weight_hh.dtype)
    h[0] = state[0]
    for t in range(T):
        v_h[t], scale_h[t] = norm((mask * h[t]) @ weight_hh.T)
        a_ir, a_iz, a_in = np.split(a_x[t], 3, axis=1)
        a_hr, a_hz, a_hn[t] = np.split(norm_hh * v_h[t] + bias_hh, 3, axis=1)
        r[t] = sigmoid(a_ir + a_hr)
        z[t] = sigmoid(a_iz + a_hz)
        n[t] = np.tanh(a_in + r[t] * a_hn[t])
        h_new = (1 - z[t]) * n[t] + z[t] * h[t]
        h[t + 1] = zone[t] * h[t] + (1 - zone[t]) * h_new
    saved = {"x": x, "h": h, "r": r, "z": z, "n": n, "a_hn": a_hn, "mask": mask, "zone": zone}
    saved |= {"v_x": v_x, "scale_x": scale_x, "v_h": v_h, "scale_h": scale_h}
    return h[1:].copy(), (h[T].copy(),), saved


def backward(
    params: dict[str, Array],
    saved: dict[str, Any],
    d_output: Array,
    d_state: tuple[Array, ...],
) -> tuple[Array | None, tuple[Array, ...], dict[str, Array]]:
    """Gradients from d_output (T, B, H) and d_state (d_h,) of the final state, (B, H).

    Returns (d_x or None, d_state of the initial state, grads). d_a_i and d_a_h are the gradients
    of W_ih x + b_ih and W_hh h + b_hh; they differ in the rows of n, where r stands between. d_u_x
    and d_u_h are those of the products alone, before they are normalised.
    """
    weight_hh = params["weight_hh"]
    _, norm_back = NORMS["norm_ih" in params]
    norm_ih, norm_hh = params.get("norm_ih", 1), params.get("norm_hh", 1)
    x, h, r, z, n, a_hn = (saved[name] for name in ("x", "h", "r", "z", "n", "a_hn"))
    v_x, scale_x, v_h, scale_h = (saved[name] for name in ("v_x", "scale_x", "v_h", "scale_h"))
    mask, zone = saved["mask"], saved["zone"]
    (d_h,) = d_state
    T, B, H = n.shape
    d_a_i, d_a_h, d_u_h = np.empty((3, T, B, 3 * H), n.dtype)
    for t in reversed(range(T)):
        d_h = d_h + d_output[t]
        d_h_new = (1 - zone[t]) * d_h
        d_n = d_h_new * (1 - z[t])
        d_z = d_h_new * (h[t] - n[t])
        d_a_n = d_n * (1 - n[t] ** 2)
        d_r = d_a_n * a_hn[t]
        d_a_hn = d_a_n * r[t]
        d_a_r = d_r * r[t] * (1 - r[t])
        d_a_z = d_z * z[t] * (1 - z[t])
        d_a_i[t] = np.concatenate([d_a_r, d_a_z, d_a_n], axis=1)
        d_a_h[t] = np.concatenate([d_a_r, d_a_z, d_a_hn], axis=1)
        d_u_h[t] = norm_back(norm_hh * d_a_h[t], v_h[t], scale_h[t])
        d_h = zone[t] * d_h + d_h_new * z[t] + mask * (d_u_h[t] @ weight_hh)
    d_u_x = norm_back(norm_ih * d_a_i, v_x, scale_x)
    d_x, d_weight_ih = input_backward(params["weight_ih"], x, d_u_x)
    grads = {"weight_ih": d_weight_ih, "weight_hh": sum_outer(d_u_h, mask * h[:-1])}
    if "bias_ih" in params:
        grads["bias_ih"] = d_a_i.sum(axis=(0, 1))
        grads["bias_hh"] = d_a_h.sum(axis=(0, 1))
    if "norm_ih" in params:
        grads["norm_ih"] = (d_a_i * v_x).sum(axis=(0, 1))
        grads["norm_hh"] = (d_a_h * v_h).sum(axis=(0, 1))
    return d_x, (d_h,), grads
