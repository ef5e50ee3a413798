"""Losses: value and gradient together, stable at extreme logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastrnn.checks import as_array, as_dtype, as_floats, as_tokens, check_shape
from fastrnn.crew import divided
from fastrnn.gemm import scratch
from fastrnn.jit import kernel
from fastrnn.memory import empty
from fastrnn.parallel import ELEMENT, parts_for, run
from fastrnn.simd import (
    broadcast,
    flush_denormals,
    load,
    load_n,
    restore_denormals,
    select_greater,
    store,
    store_n,
    width_of,
)
from fastrnn.vmath import exp


@kernel
def softmax_rows(part, parts, logits, targets, ignored, scale, losses, d_logits):
    """losses = log sum exp(logits) - logits[target], and d_logits = scale * its gradient, by row.

    logits (N, V), targets (N,), losses (N,) float64; d_logits (N, V), which may be logits, or
    (0, V): none. A row whose target is `ignored` loses nothing.
    """
    if divided(part, parts):
        return
    mode = flush_denormals()
    rows, size = logits.shape
    w = width_of(logits)
    # One row, its padding at minus infinity, so that whole registers can be used.
    row_size = (size + w - 1) // w * w
    values = scratch(logits, row_size)
    lanes = scratch(logits, w)
    for row in range(rows * part // parts, rows * (part + 1) // parts):
        start = row * size
        target = targets[row]
        if target == ignored:
            losses[row] = 0
            if d_logits.shape[0] > 0:
                d_logits[row, :] = 0
            continue
        picked = logits[row, target]
        for j in range(0, size, w):
            store(values, j, load_n(logits, start + j, size - j))
        values[size:] = -math.inf
        top = load(values, 0)
        for j in range(w, row_size, w):
            value = load(values, j)
            top = select_greater(value, top, value, top)
        store(lanes, 0, top)
        highest = lanes[0]
        for i in range(1, w):
            highest = max(highest, lanes[i])
        total = broadcast(values, 0)
        for j in range(0, row_size, w):
            power = exp(load(values, j) - highest)
            store(values, j, power)
            total = total + power
        store(lanes, 0, total)
        whole = 0.0
        for i in range(w):
            whole += lanes[i]
        losses[row] = math.log(whole) + (np.float64(highest) - np.float64(picked))
        if d_logits.shape[0] > 0:
            factor = values.dtype.type(scale / whole)
            for j in range(0, size, w):
                store_n(d_logits, start + j, load(values, j) * factor, size - j)
            d_logits[row, target] -= values.dtype.type(scale)
    restore_denormals(mode)


def softmax_cross_entropy(
    logits: Any, targets: Any, *, ignore_index: int | None = None, inplace: bool = False
) -> tuple[float, np.ndarray]:
    """Mean over targets of -log softmax(logits)[target], in nats, and its gradient in the logits.

    logits   (..., V) float32 or float64
    targets  (...) integers in [0, V); those equal to `ignore_index` do not count
    inplace  let the gradient take the memory of the logits
    """
    array = as_array("logits", logits)
    inplace = inplace and array.flags.writeable
    dtype = as_dtype(array.dtype, "logits")
    lead = array.shape[:-1]
    names = "(" + "..., " * len(lead) + "V)"
    array = as_floats("logits", array, dtype, (*(None for _ in lead), None), names)
    size = array.shape[-1]
    ids = as_array("targets", targets)
    check_shape("targets", ids, lead, "(" + ", ".join("..." for _ in lead) + ")")
    ignored = -1
    counted = ids.size
    if ignore_index is not None:
        skip = ids == ignore_index
        counted -= int(skip.sum())
        ids = np.where(skip, 0, ids)
    ids = as_tokens("targets", ids, size, lead, "(...)").reshape(-1)
    if ignore_index is not None:
        ids = np.where(skip.reshape(-1), np.int32(ignored), ids)
    rows = array.reshape(-1, size)
    losses = np.empty(len(rows))
    d_logits = rows if inplace else empty(rows.shape, dtype)
    scale = 1 / counted if counted else 0.0
    parts = parts_for(rows.size * ELEMENT, len(rows))
    run(softmax_rows, parts, rows, ids, ignored, scale, losses, d_logits)
    loss = float(losses.sum() * scale)
    return loss, d_logits.reshape(array.shape)


def token_losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] in nats, float64: logits (..., V), int32 targets (...)."""
    rows = logits.reshape(-1, logits.shape[-1])
    losses = np.empty(len(rows))
    none = np.empty((0, rows.shape[1]), rows.dtype)
    parts = parts_for(rows.size * ELEMENT, len(rows))
    run(softmax_rows, parts, rows, targets.reshape(-1), -1, 1.0, losses, none)
    return losses.reshape(targets.shape)


def logistic_loss(logits: Any, targets: Any) -> tuple[float, np.ndarray]:
    """Mean of -t log s(x) - (1-t) log(1-s(x)), s the logistic function, and its gradient in x.

    logits and targets have one shape; targets are in [0, 1].
    """
    x = as_array("logits", logits)
    dtype = as_dtype(x.dtype, "logits")
    t = as_array("targets", targets)
    if x.size == 0:
        raise ValueError(f"logits: expected at least one number, got shape {x.shape}")
    check_shape("targets", t, x.shape, "(" + ", ".join("..." for _ in x.shape) + ")")
    if not (t.min() >= 0 and t.max() <= 1):
        raise ValueError(f"targets: expected numbers in [0, 1], got {t.min()} to {t.max()}")
    power = np.exp(-np.abs(x))
    loss = np.maximum(x, 0) - x * t + np.log1p(power)
    probability = np.where(x >= 0, 1, power) / (1 + power)
    gradient = (probability - t) / x.size
    return float(loss.mean(dtype=np.float64)), gradient.astype(dtype)
