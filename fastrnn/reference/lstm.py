"""Long short-term memory with a forget gate, as in PyTorch; rows of the weights: i, f, g, o.

    i  = σ(W_ii x + b_ii + W_hi h + b_hi)         input gate
    f  = σ(W_if x + b_if + W_hf h + b_hf)         forget gate
    g  = tanh(W_ig x + b_ig + W_hg h + b_hg)      new cell content
    o  = σ(W_io x + b_io + W_ho h + b_ho)         output gate
    c' = f ⊙ c + i ⊙ g
    h' = o ⊙ tanh(c')

Variants, in any combination:

    peephole     p_i ⊙ c, p_f ⊙ c and p_o ⊙ c' are added inside σ; params have them in this order as
                 weight_ch (3, H)
    coupled      f = 1 - i; rows of the weights: i, g, o, of weight_ch: p_i, p_o
    clip         c' is cut off at ±clip; where it is, no gradient passes
    projection   h' = W_hr (o ⊙ tanh(c')); params have weight_hr (P, H), as in PyTorch, and h has P
                 units: weight_hh (4 H, P)
    norm         W_i x becomes norm_ih ⊙ norm(W_i x), W_h h becomes norm_hh ⊙ norm(W_h h), each over
                 all rows, and c' in tanh(c') becomes norm_c[0] ⊙ norm(c') + norm_c[1]; params have
                 norm_ih (4 H,), norm_hh (4 H,) and norm_c (2, H), norm is that of norm.py

Sources: S. Hochreiter and J. Schmidhuber, "Long short-term memory", Neural Computation 9 (1997)
1735-1780, doi:10.1162/neco.1997.9.8.1735; the forget gate: F. A. Gers, J. Schmidhuber and
F. Cummins, "Learning to forget", Neural Computation 12 (2000) 2451-2471,
doi:10.1162/089976600300015015; peepholes: F. A. Gers and J. Schmidhuber, "Recurrent nets that time
and count", IJCNN (2000), doi:10.1109/IJCNN.2000.861302; coupled gates: K. Greff et al., "LSTM: a
search space odyssey", arXiv:1503.04069 (2015), CIFG; the cut: H. Sak, A. Senior and F. Beaufays,
"Long short-term memory recurrent neural network architectures for large scale acoustic modeling",
Interspeech (2014); the projection: the same, "Long short-term memory based recurrent neural network
architectures for large vocabulary speech recognition", arXiv:1402.1128 (2014); normalisation:
J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer normalization", arXiv:1607.06450 (2016).
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

GATES = ("i", "f", "g", "o")
STATES = ("h", "c")


def forward(
    params: dict[str, Array],
    x: Array,
    state: tuple[Array, ...],
    *,
    coupled: bool = False,
    clip: float = np.inf,
    mask: Array | None = None,
    zone: Array | float | None = None,
) -> tuple[Array, tuple[Array, ...], dict[str, Any]]:
    """One layer, one direction: x (T, B, I) or tokens (T, B), state (h, c) of (B, P) and (B, H).

    Returns (output (T, B, P), final state, saved); P is H without a projection. v_x, v_h and v_c
    are W_ih x, W_hh h and c', normalised if this layer does that. m is what is projected.
    """
    weight_hh, bias_hh = params["weight_hh"], params.get("bias_hh", 0)
    norm, _ = NORMS["norm_ih" in params]
    norm_ih, norm_hh, gain_c, shift_c = _gains(params)
    v_x, scale_x = norm(input_forward(params["weight_ih"], x))
    a_x = norm_ih * v_x + params.get("bias_ih", 0)
    T, (B, P), H = len(x), state[0].shape, state[1].shape[1]
    mask = in_full(mask, 1, (B, P), weight_hh.dtype)
    zone = in_full(zone, 0, (T, B, P), weight_hh.dtype)
    p_i, p_f, p_o = _peepholes(params, coupled, H)
    h = np.empty((T + 1, B, P), weight_hh.dtype)  # [t] enters step t, [t + 1] leaves it
    c = np.empty((T + 1, B, H), weight_hh.dtype)
    i, f, g, o, v_c, m = np.empty((6, T, B, H), weight_hh.dtype)
    v_h = np.empty(v_x.shape, weight_hh.dtype)
    scale_h, scale_c = np.empty((2, T, B, 1), weight_hh.dtype)
    h[0], c[0] = state
    for t in range(T):
        v_h[t], scale_h[t] = norm((mask * h[t]) @ weight_hh.T)
        a = np.split(a_x[t] + norm_hh * v_h[t] + bias_hh, 3 if coupled else 4, axis=1)
        i[t] = sigmoid(a[0] + p_i * c[t])
        f[t] = 1 - i[t] if coupled else sigmoid(a[1] + p_f * c[t])
        g[t] = np.tanh(a[-2])
        c[t + 1] = np.clip(f[t] * c[t] + i[t] * g[t], -clip, clip)
        o[t] = sigmoid(a[-1] + p_o * c[t + 1])
        v_c[t], scale_c[t] = norm(c[t + 1])
        m[t] = o[t] * np.tanh(gain_c * v_c[t] + shift_c)
        h_new = m[t] @ params["weight_hr"].T if "weight_hr" in params else m[t]
        h[t + 1] = zone[t] * h[t] + (1 - zone[t]) * h_new
    saved: dict[str, Any] = {"x": x, "h": h, "c": c, "i": i, "f": f, "g": g, "o": o, "m": m}
    saved |= {"v_x": v_x, "v_h": v_h, "v_c": v_c}
    saved |= {"scale_x": scale_x, "scale_h": scale_h, "scale_c": scale_c}
    saved |= {"coupled": coupled, "clip": clip, "mask": mask, "zone": zone}
    return h[1:].copy(), (h[T].copy(), c[T].copy()), saved


def _gains(params: dict[str, Array]) -> tuple[Any, ...]:
    """norm_ih, norm_hh, and gain and shift of c', or those that change nothing."""
    gain_c, shift_c = params.get("norm_c", (1, 0))
    return params.get("norm_ih", 1), params.get("norm_hh", 1), gain_c, shift_c


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
    """Gradients from d_output (T, B, P) and d_state (d_h, d_c) of the final state.

    Returns (d_x or None, d_state of the initial state, grads). d_u_x and d_u_h are the gradients
    of the products W_ih x and W_hh h, before they are normalised; d_s is that of what tanh is of.
    """
    weight_hh = params["weight_hh"]
    _, norm_back = NORMS["norm_ih" in params]
    norm_ih, norm_hh, gain_c, shift_c = _gains(params)
    x, h, c, i, f, g, o, m = (saved[name] for name in ("x", "h", "c", "i", "f", "g", "o", "m"))
    v_x, v_h, v_c = saved["v_x"], saved["v_h"], saved["v_c"]
    scale_x, scale_h, scale_c = saved["scale_x"], saved["scale_h"], saved["scale_c"]
    coupled, clip, mask, zone = (saved[name] for name in ("coupled", "clip", "mask", "zone"))
    d_h, d_c = d_state
    T, B, H = i.shape
    p_i, p_f, p_o = _peepholes(params, coupled, H)
    d_a_i, d_a_f, d_a_g, d_a_o, d_s = np.empty((5, T, B, H), i.dtype)
    d_u_h, d_h_new = np.empty_like(v_h), np.empty_like(h[1:])
    for t in reversed(range(T)):
        tanh_c = np.tanh(gain_c * v_c[t] + shift_c)
        d_h = d_h + d_output[t]
        d_h_new[t] = (1 - zone[t]) * d_h
        d_m = d_h_new[t] @ params["weight_hr"] if "weight_hr" in params else d_h_new[t]
        d_o = d_m * tanh_c
        d_a_o[t] = d_o * o[t] * (1 - o[t])
        d_s[t] = d_m * o[t] * (1 - tanh_c**2)
        d_c = d_c + norm_back(gain_c * d_s[t], v_c[t], scale_c[t]) + d_a_o[t] * p_o
        d_c = np.where(np.abs(c[t + 1]) < clip, d_c, 0)
        d_f = d_c * c[t]
        d_i = d_c * g[t] - d_f if coupled else d_c * g[t]
        d_g = d_c * i[t]
        d_a_i[t] = d_i * i[t] * (1 - i[t])
        d_a_f[t] = 0 if coupled else d_f * f[t] * (1 - f[t])
        d_a_g[t] = d_g * (1 - g[t] ** 2)
        d_a = np.concatenate(_rows(coupled, d_a_i[t], d_a_f[t], d_a_g[t], d_a_o[t]), axis=1)
        d_u_h[t] = norm_back(norm_hh * d_a, v_h[t], scale_h[t])
        d_h = zone[t] * d_h + mask * (d_u_h[t] @ weight_hh)
        d_c = d_c * f[t] + d_a_i[t] * p_i + d_a_f[t] * p_f
    d_a = np.concatenate(_rows(coupled, d_a_i, d_a_f, d_a_g, d_a_o), axis=2)
    d_u_x = norm_back(norm_ih * d_a, v_x, scale_x)
    d_x, d_weight_ih = input_backward(params["weight_ih"], x, d_u_x)
    grads = {"weight_ih": d_weight_ih, "weight_hh": sum_outer(d_u_h, mask * h[:-1])}
    if "bias_ih" in params:
        grads["bias_ih"] = d_a.sum(axis=(0, 1))
        grads["bias_hh"] = d_a.sum(axis=(0, 1))
    if "weight_ch" in params:
        d_p_i, d_p_f = (d_a_i * c[:-1]).sum(axis=(0, 1)), (d_a_f * c[:-1]).sum(axis=(0, 1))
        d_p_o = (d_a_o * c[1:]).sum(axis=(0, 1))
        grads["weight_ch"] = np.stack([d_p_i, d_p_o] if coupled else [d_p_i, d_p_f, d_p_o])
    if "weight_hr" in params:
        grads["weight_hr"] = sum_outer(d_h_new, m)
    if "norm_ih" in params:
        grads["norm_ih"] = (d_a * v_x).sum(axis=(0, 1))
        grads["norm_hh"] = (d_a * v_h).sum(axis=(0, 1))
        grads["norm_c"] = np.stack([(d_s * v_c).sum(axis=(0, 1)), d_s.sum(axis=(0, 1))])
    return d_x, (d_h, d_c), grads


def _rows(coupled: bool, i: Array, f: Array, g: Array, o: Array) -> list[Array]:
    """The gates that have rows in the weights."""
    return [i, g, o] if coupled else [i, f, g, o]
