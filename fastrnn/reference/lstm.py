"""Long short-term memory with a forget gate, as in PyTorch; rows of the weights: i, f, g, o.

    i  = σ(W_ii x + b_ii + W_hi h + b_hi)         input gate
    f  = σ(W_if x + b_if + W_hf h + b_hf)         forget gate
    g  = tanh(W_ig x + b_ig + W_hg h + b_hg)      new cell content
    o  = σ(W_io x + b_io + W_ho h + b_ho)         output gate
    c' = f ⊙ c + i ⊙ g
    h' = o ⊙ tanh(c')

Variants, in any combination:

    peephole   p_i ⊙ c, p_f ⊙ c and p_o ⊙ c' are added inside σ; params have them in this order as
               weight_ch (3, H)
    coupled    f = 1 - i; rows of the weights: i, g, o, of weight_ch: p_i, p_o
    clip       c' is cut off at ±clip; where it is, no gradient passes

Sources: S. Hochreiter and J. Schmidhuber, "Long short-term memory", Neural Computation 9 (1997)
1735-1780, doi:10.1162/neco.1997.9.8.1735; the forget gate: F. A. Gers, J. Schmidhuber and
F. Cummins, "Learning to forget", Neural Computation 12 (2000) 2451-2471,
doi:10.1162/089976600300015015; peepholes: F. A. Gers and J. Schmidhuber, "Recurrent nets that time
and count", IJCNN (2000), doi:10.1109/IJCNN.2000.861302; coupled gates: K. Greff et al., "LSTM: a
search space odyssey", arXiv:1503.04069 (2015), CIFG; the cut: H. Sak, A. Senior and F. Beaufays,
"Long short-term memory recurrent neural network architectures for large scale acoustic modeling",
Interspeech (2014).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrnn.reference.linear import input_backward, input_forward, sum_outer
from fastrnn.reference.loss import sigmoid

Array = NDArray[Any]

GATES = ("i", "f", "g", "o")
STATES = ("h", "c")


def forward(
    params: dict[str, Array],
    x: Array,
    state: tuple[Array, ...],
    *,
    coupled: bool = False,
    clip: float = np.inf,
) -> tuple[Array, tuple[Array, ...], dict[str, Any]]:
    """One layer, one direction: x (T, B, I) or tokens (T, B), state (h, c) of (B, H) each.

    Returns (output (T, B, H), final state, saved).
    """
    weight_hh, bias_hh = params["weight_hh"], params.get("bias_hh", 0)
    a_x = input_forward(params["weight_ih"], x) + params.get("bias_ih", 0)
    T, (B, H) = len(x), state[0].shape
    p_i, p_f, p_o = _peepholes(params, coupled, H)
    h, c = np.empty((2, T + 1, B, H), weight_hh.dtype)  # [t] enters step t, [t + 1] leaves it
    i, f, g, o = np.empty((4, T, B, H), weight_hh.dtype)
    h[0], c[0] = state
    for t in range(T):
        a = np.split(a_x[t] + h[t] @ weight_hh.T + bias_hh, 3 if coupled else 4, axis=1)
        i[t] = sigmoid(a[0] + p_i * c[t])
        f[t] = 1 - i[t] if coupled else sigmoid(a[1] + p_f * c[t])
        g[t] = np.tanh(a[-2])
        c[t + 1] = np.clip(f[t] * c[t] + i[t] * g[t], -clip, clip)
        o[t] = sigmoid(a[-1] + p_o * c[t + 1])
        h[t + 1] = o[t] * np.tanh(c[t + 1])
    saved = {"x": x, "h": h, "c": c, "i": i, "f": f, "g": g, "o": o}
    return h[1:].copy(), (h[T].copy(), c[T].copy()), saved | {"coupled": coupled, "clip": clip}


def _peepholes(params: dict[str, Array], coupled: bool, H: int) -> tuple[Array, ...]:
    """p_i, p_f, p_o, zeros for what there is not."""
    none = np.zeros(H, params["weight_hh"].dtype)
    if "weight_ch" not in params:
        return none, none, none
    p = params["weight_ch"]
    return p[0], none if coupled else p[1], p[-1]


def backward(
    params: dict[str, Array],
    saved: dict[str, Any],
    d_output: Array,
    d_state: tuple[Array, ...],
) -> tuple[Array | None, tuple[Array, ...], dict[str, Array]]:
    """Gradients from d_output (T, B, H) and d_state (d_h, d_c) of the final state, (B, H) each.

    Returns (d_x or None, d_state of the initial state, grads).
    """
    weight_hh = params["weight_hh"]
    x, h, c, i, f, g, o = (saved[name] for name in ("x", "h", "c", "i", "f", "g", "o"))
    coupled, clip = saved["coupled"], saved["clip"]
    d_h, d_c = d_state
    T, B, H = i.shape
    p_i, p_f, p_o = _peepholes(params, coupled, H)
    d_a_i, d_a_f, d_a_g, d_a_o = np.empty((4, T, B, H), i.dtype)
    for t in reversed(range(T)):
        tanh_c = np.tanh(c[t + 1])
        d_h = d_h + d_output[t]
        d_o = d_h * tanh_c
        d_a_o[t] = d_o * o[t] * (1 - o[t])
        d_c = d_c + d_h * o[t] * (1 - tanh_c**2) + d_a_o[t] * p_o
        d_c = np.where(np.abs(c[t + 1]) < clip, d_c, 0)
        d_f = d_c * c[t]
        d_i = d_c * g[t] - d_f if coupled else d_c * g[t]
        d_g = d_c * i[t]
        d_a_i[t] = d_i * i[t] * (1 - i[t])
        d_a_f[t] = 0 if coupled else d_f * f[t] * (1 - f[t])
        d_a_g[t] = d_g * (1 - g[t] ** 2)
        d_a = np.concatenate(_rows(coupled, d_a_i[t], d_a_f[t], d_a_g[t], d_a_o[t]), axis=1)
        d_h = d_a @ weight_hh
        d_c = d_c * f[t] + d_a_i[t] * p_i + d_a_f[t] * p_f
    d_a = np.concatenate(_rows(coupled, d_a_i, d_a_f, d_a_g, d_a_o), axis=2)
    d_x, d_weight_ih = input_backward(params["weight_ih"], x, d_a)
    grads = {"weight_ih": d_weight_ih, "weight_hh": sum_outer(d_a, h[:-1])}
    if "bias_ih" in params:
        grads["bias_ih"] = d_a.sum(axis=(0, 1))
        grads["bias_hh"] = d_a.sum(axis=(0, 1))
    if "weight_ch" in params:
        d_p_i, d_p_f = (d_a_i * c[:-1]).sum(axis=(0, 1)), (d_a_f * c[:-1]).sum(axis=(0, 1))
        d_p_o = (d_a_o * c[1:]).sum(axis=(0, 1))
        grads["weight_ch"] = np.stack([d_p_i, d_p_o] if coupled else [d_p_i, d_p_f, d_p_o])
    return d_x, (d_h, d_c), grads


def _rows(coupled: bool, i: Array, f: Array, g: Array, o: Array) -> list[Array]:
    """The gates that have rows in the weights."""
    return [i, g, o] if coupled else [i, f, g, o]
