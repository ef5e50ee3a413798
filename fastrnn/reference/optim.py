"""One step of each optimiser for one array, with PyTorch's definitions and defaults.

    p (any shape), g = gradient of the loss in p, state = {} before the first step
    returns (new p, new state); no argument is changed

``state`` holds the step count under "step" and arrays of p's shape under PyTorch's names.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
State = dict[str, Any]


def sgd(
    p: Array, g: Array, state: State, lr: float, momentum: float = 0.0, weight_decay: float = 0.0
) -> tuple[Array, State]:
    """g ← g + weight_decay p;  v ← momentum v + g;  p ← p - lr v.

    Heavy-ball momentum without dampening: B. T. Polyak (1964), doi:10.1016/0041-5553(64)90137-5.
    The learning rate stands outside v, as in PyTorch.
    """
    g = g + weight_decay * p
    # without momentum v is g alone: 0 * v would keep an old inf as NaN
    v = momentum * state.get("momentum_buffer", 0) + g if momentum else g
    return p - lr * v, {"step": state.get("step", 0) + 1, "momentum_buffer": v}


def rmsprop(
    p: Array, g: Array, state: State, lr: float, alpha: float = 0.99, eps: float = 1e-8
) -> tuple[Array, State]:
    """v ← alpha v + (1 - alpha) g²;  p ← p - lr g / (√v + eps).

    T. Tieleman and G. Hinton, Lecture 6.5 of Neural Networks for Machine Learning (2012); not
    centred, eps outside the root.
    """
    v = alpha * state.get("square_avg", 0) + (1 - alpha) * g**2
    new_p = p - lr * g / (np.sqrt(v) + eps)
    return new_p, {"step": state.get("step", 0) + 1, "square_avg": v}


def adagrad(p: Array, g: Array, state: State, lr: float, eps: float = 1e-10) -> tuple[Array, State]:
    """s ← s + g²;  p ← p - lr g / (√s + eps).

    J. Duchi, E. Hazan and Y. Singer, Journal of Machine Learning Research 12 (2011) 2121-2159.
    """
    s = state.get("sum", 0) + g**2
    new_p = p - lr * g / (np.sqrt(s) + eps)
    return new_p, {"step": state.get("step", 0) + 1, "sum": s}


def adam(
    p: Array,
    g: Array,
    state: State,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Array, State]:
    """Adam; weight_decay is added to the gradient.

        g ← g + weight_decay p
        m ← β1 m + (1 - β1) g          m̂ = m / (1 - β1^step)
        v ← β2 v + (1 - β2) g²         v̂ = v / (1 - β2^step)
        p ← p - lr m̂ / (√v̂ + eps)

    D. P. Kingma and J. Ba, arXiv:1412.6980v9 (2017), algorithm 1.
    """
    beta1, beta2 = betas
    step = state.get("step", 0) + 1
    g = g + weight_decay * p
    m = beta1 * state.get("exp_avg", 0) + (1 - beta1) * g
    v = beta2 * state.get("exp_avg_sq", 0) + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    new_p = p - lr * m_hat / (np.sqrt(v_hat) + eps)
    return new_p, {"step": step, "exp_avg": m, "exp_avg_sq": v}


def adamw(
    p: Array,
    g: Array,
    state: State,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[Array, State]:
    """p ← (1 - lr weight_decay) p, then Adam with the same g and no decay in the gradient.

    I. Loshchilov and F. Hutter, arXiv:1711.05101v3 (2019), with PyTorch's factor lr on the decay.
    """
    return adam((1 - lr * weight_decay) * p, g, state, lr, betas, eps)
