"""Losses on logits, each with its gradient, and the sigmoid; stable at extreme logits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def softplus(x: Array) -> Array:
    """log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)): exp cannot overflow."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def sigmoid(x: Array) -> Array:
    """σ(x) = 1 / (1 + exp(-x)) = exp(x) / (1 + exp(x)): whichever of the two cannot overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def softmax_cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Cross-entropy of a softmax, in nats, for logits (N, V) and integer targets (N,).

        p[n]         = exp(logits[n]) / Σ_v exp(logits[n, v])
        loss[n]      = -log p[n, targets[n]]
        d_logits[n]  = p[n] - onehot(targets[n])

    Returns (losses (N,), d_logits (N, V)); d_logits is the gradient of the SUM of the losses.
    """
    rows = np.arange(len(targets))
    shifted = logits - logits.max(axis=1, keepdims=True)  # p is unchanged, exp cannot overflow
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    losses = -log_p[rows, targets]
    d_logits = np.exp(log_p)
    d_logits[rows, targets] -= 1
    return losses, d_logits


def logistic_loss(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Binary cross-entropy, elementwise, in nats, for logits x and targets y in [0, 1].

        loss  = -y log σ(x) - (1 - y) log σ(-x) = y softplus(-x) + (1 - y) softplus(x)
        d_x   = (1 - y) σ(x) - y σ(-x)          = σ(x) - y

    Returns (losses, d_logits), both of the logits' shape. The first form of d_x does not cancel
    when σ(x) is close to y = 1.
    """
    targets = targets.astype(logits.dtype)  # integer targets must not widen float32 logits
    losses = targets * softplus(-logits) + (1 - targets) * softplus(logits)
    d_logits = (1 - targets) * sigmoid(logits) - targets * sigmoid(-logits)
    return losses, d_logits
