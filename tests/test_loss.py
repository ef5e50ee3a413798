"""Losses against the reference, and what they say of bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers import (
    F4,
    F8,
    agree,
    each_dtype,
    each_of,
    frozen,
    same,
    says,
    zeros,
)

from fastrnn import loss
from fastrnn.reference import loss as reference_loss


@each_dtype
@pytest.mark.parametrize("scale", [1, 100, 1e4])
@pytest.mark.parametrize("shape", [(1,), (2,), (19,), (6, 1), (7, 33), (4, 3, 16)], ids=str)
def test_softmax_cross_entropy_against_the_reference(dtype, scale, shape, rng):
    logits = (rng.standard_normal(shape) * scale).astype(dtype)
    targets = rng.integers(shape[-1], size=shape[:-1])
    got, d_logits = loss.softmax_cross_entropy(frozen(logits), targets)
    rows = logits.reshape(-1, shape[-1]).astype(F8)
    losses, want = reference_loss.softmax_cross_entropy(rows, targets.reshape(-1))
    assert type(got) is float
    agree(np.array(got, dtype), np.array(losses.mean()), dtype, shape[-1], "loss", scale=1)
    agree(d_logits, want.reshape(shape) / len(rows), dtype, shape[-1], "d", scale=1 / len(rows))
    each = loss.token_losses(logits, targets.astype(np.int32))
    assert each.dtype == F8
    agree(each.astype(dtype), losses.reshape(targets.shape), dtype, shape[-1], "each", scale=1)
    same(loss.softmax_cross_entropy(np.asfortranarray(logits), targets)[1], d_logits)


@each_dtype
def test_inplace_spares_what_is_read_only(dtype, rng):
    logits, targets = rng.standard_normal((3, 19)).astype(dtype), [0, 5, 18]
    want, d_want = loss.softmax_cross_entropy(logits, targets)
    fixed = frozen(logits.copy())
    for array in (fixed, fixed[:, ::-1][:, ::-1]):
        got, d_logits = loss.softmax_cross_entropy(array, targets, inplace=True)
        assert got == want
        same(d_logits, d_want)
        same(fixed, logits)


@each_dtype
def test_ignored_targets(dtype, rng):
    logits, targets = rng.standard_normal((6, 19)).astype(dtype), rng.integers(19, size=6)
    targets[[1, 4]] = -100
    kept = targets >= 0
    got, d_logits = loss.softmax_cross_entropy(logits, targets, ignore_index=-100)
    want, d_want = loss.softmax_cross_entropy(logits[kept], targets[kept])
    assert math.isclose(got, want, rel_tol=1e-15)
    same(d_logits[kept], d_want)
    same(d_logits[~kept], np.zeros((2, 19), dtype))
    got, d_logits = loss.softmax_cross_entropy(logits, np.full(6, 7), ignore_index=7)
    assert got == 0
    same(d_logits, np.zeros((6, 19), dtype))


@each_dtype
def test_loss_of_nan_stays_in_its_row(dtype, rng):
    logits, targets = rng.standard_normal((4, 33)).astype(dtype), np.array([0, 5, 17, 32])
    clean, d_clean = (
        loss.token_losses(logits, targets),
        loss.softmax_cross_entropy(logits, targets)[1],
    )
    for column in (0, 5, 16, 32):
        for bad in (np.nan, np.inf):
            spoilt = logits.copy()
            spoilt[1, column] = bad
            dirty = loss.token_losses(spoilt, targets)
            assert np.isnan(dirty[1])
            same(dirty[[0, 2, 3]], clean[[0, 2, 3]])
            value, d = loss.softmax_cross_entropy(spoilt, targets)
            assert np.isnan(value)
            assert np.isnan(d[1]).all()
            same(d[[0, 2, 3]], d_clean[[0, 2, 3]])


@each_dtype
def test_minus_infinity_forbids_a_token(dtype, rng):
    logits = rng.standard_normal((1, 5)).astype(dtype)
    fewer, d_fewer = loss.softmax_cross_entropy(logits[:, [0, 1, 3, 4]], [1])
    logits[0, 2] = -np.inf
    got, d_logits = loss.softmax_cross_entropy(logits, [1])
    agree(np.array(got, dtype), np.array(fewer), dtype, 5)
    agree(d_logits[:, [0, 1, 3, 4]], d_fewer, dtype, 5)
    assert d_logits[0, 2] == 0


@each_dtype
@pytest.mark.parametrize("scale", [1, 30, 1e4])
@pytest.mark.parametrize("shape", [(), (1,), (19,), (4, 3)], ids=str)
def test_logistic_loss_against_the_reference(dtype, scale, shape, rng):
    logits = np.asarray(rng.standard_normal(shape) * scale, dtype)
    targets = np.asarray(rng.random(shape), dtype)
    for t in (targets, np.round(targets).astype(int)):
        got, d_logits = loss.logistic_loss(logits, t)
        losses, want = reference_loss.logistic_loss(logits.astype(F8), t)
        assert type(got) is float
        agree(np.array(got, dtype), np.array(losses.mean()), dtype, 20, "loss", scale=1e-3)
        agree(d_logits, want / logits.size, dtype, 20, "d", scale=1 / logits.size)


def bad_losses():
    soft, logistic = loss.softmax_cross_entropy, loss.logistic_loss
    x = zeros(2, 4)
    yield lambda: soft(zeros(2, 4, dtype=int), [0, 1]), ValueError, ("logits:", "float32", "int64")
    yield lambda: soft(zeros(2, 0), [0, 1]), ValueError, ("logits:", "(2, 0)", "empty")
    yield lambda: soft(zeros(0, 4), []), ValueError, ("logits:", "(0, 4)", "empty")
    yield lambda: soft(F4(1), 0), ValueError, ("logits:", "(V)", "()")
    yield lambda: soft(None, 0), TypeError, ("logits:", "numbers", "object")
    yield lambda: soft(x, [0, 1, 2]), ValueError, ("targets:", "(2)", "(3,)")
    yield lambda: soft(zeros(4), [1, 2]), ValueError, ("targets:", "()", "(2,)")
    yield lambda: soft(x, [0, 4]), ValueError, ("targets:", "[0, 4)", "4")
    yield lambda: soft(x, [0, -1]), ValueError, ("targets:", "[0, 4)", "-1")
    yield lambda: soft(x, [0, -1], ignore_index=-2), ValueError, ("targets:", "[0, 4)", "-1")
    yield lambda: soft(x, [0.0, 1.0]), TypeError, ("targets:", "integer", "float64")
    yield lambda: logistic(zeros(0), zeros(0)), ValueError, ("logits:", "at least one", "(0,)")
    yield lambda: logistic(zeros(2, dtype=int), [0, 1]), ValueError, ("logits:", "float32", "int")
    yield lambda: logistic(zeros(2), zeros(3)), ValueError, ("targets:", "(2)", "(3,)")
    yield lambda: logistic(F4(1), zeros(3)), ValueError, ("targets:", "()", "(3,)")
    yield lambda: logistic(zeros(2), [0, 1.5]), ValueError, ("targets:", "[0, 1]", "1.5")
    yield lambda: logistic(zeros(2), [-0.5, 1]), ValueError, ("targets:", "[0, 1]", "-0.5")
    yield lambda: logistic(zeros(2), [np.nan, 1]), ValueError, ("targets:", "[0, 1]", "nan")


@each_of(("call", "error", "parts"), bad_losses)
def test_bad_calls_of_losses(call, error, parts):
    with pytest.raises(error, match=says(*parts)):
        call()
