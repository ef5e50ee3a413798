"""Simple recurrent network, tanh or relu, as in PyTorch.

    h' = φ(W_ih x + b_ih + W_hh h + b_hh)

Source: J. L. Elman, "Finding structure in time", Cognitive Science 14 (1990) 179-211,
doi:10.1207/s15516709cog1402_1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrnn.reference.linear import input_backward, input_forward, sum_outer
from fastrnn.reference.masks import in_full

Array = NDArray[Any]

GATES = ("h",)
STATES = ("h",)
# φ(a), and φ'(a) written in the output h = φ(a); the derivative of relu at 0 is 0, as in PyTorch
NONLINEARITIES: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "tanh": (np.tanh, lambda h: 1 - h**2),
    "relu": (lambda a: np.maximum(a, 0), lambda h: h > 0),
}


def forward(
    params: dict[str, Array],
    x: Array,
    state: tuple[Array, ...],
    *,
    nonlinearity: str = "tanh",
    mask: Array | None = None,
    zone: Array | float | None = None,
) -> tuple[Array, tuple[Array, ...], dict[str, Any]]:
    """One layer, one direction: x (T, B, I) or tokens (T, B), state (h,) of (B, H).

    ``nonlinearity`` is "tanh" or "relu". Returns (output (T, B, H), final state, saved).
    """
    weight_hh, bias_hh = params["weight_hh"], params.get("bias_hh", 0)
    a_x = input_forward(params["weight_ih"], x) + params.get("bias_ih", 0)
    phi, _ = NONLINEARITIES[nonlinearity]
    T, (B, H) = len(x), state[0].shape
    mask = in_full(mask, 1, (B, H), weight_hh.dtype)
    zone = in_full(zone, 0, (T, B, H), weight_hh.dtype)
    h = np.empty((T + 1, B, H), weight_hh.dtype)  # h[t] enters step t, h[t + 1] leaves it
    h_new = np.empty((T, B, H), weight_hh.dtype)
    h[0] = state[0]
    for t in range(T):
        h_new[t] = phi(a_x[t] + (mask * h[t]) @ weight_hh.T + bias_hh)
        h[t + 1] = zone[t] * h[t] + (1 - zone[t]) * h_new[t]
    saved = {"x": x, "h": h, "h_new": h_new, "mask": mask, "zone": zone}
    return h[1:].copy(), (h[T].copy(),), saved | {"nonlinearity": nonlinearity}


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
    x, h, h_new, mask, zone = (saved[name] for name in ("x", "h", "h_new", "mask", "zone"))
    _, d_phi = NONLINEARITIES[saved["nonlinearity"]]
    (d_h,) = d_state
    d_a = np.empty_like(h_new)
    for t in reversed(range(len(d_a))):
        d_h = d_h + d_output[t]
        d_h_new = (1 - zone[t]) * d_h
        d_a[t] = d_h_new * d_phi(h_new[t])
        d_h = zone[t] * d_h + mask * (d_a[t] @ weight_hh)
    d_x, d_weight_ih = input_backward(params["weight_ih"], x, d_a)
    grads = {"weight_ih": d_weight_ih, "weight_hh": sum_outer(d_a, mask * h[:-1])}
    if "bias_ih" in params:
        grads["bias_ih"] = d_a.sum(axis=(0, 1))
        grads["bias_hh"] = d_a.sum(axis=(0, 1))
    return d_x, (d_h,), grads
