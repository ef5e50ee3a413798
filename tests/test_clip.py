"""Clipping by norm and by value."""

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
    same_results,
    says,
    zeros,
)

from fastrnn.clip import clip_grad_norm_, clip_grad_value_, grad_norm


@each_dtype
@pytest.mark.parametrize("norm_type", [2, np.inf])
def test_clip_grad_norm(dtype, norm_type, rng):
    start = {key: rng.standard_normal(n).astype(dtype) for key, n in (("a", 5), ("b", 9000))}
    flat = np.concatenate([g.astype(F8) for g in start.values()])
    want = np.linalg.norm(flat, norm_type)
    for limit in (want / 3, want * 3, 0.0):
        grads = {key: g.copy() for key, g in start.items()}
        got = clip_grad_norm_(grads, limit, norm_type)
        assert math.isclose(got, want, rel_tol=1e-12)
        if limit > want:
            same_results(grads, start)
        else:
            assert grad_norm(grads, norm_type) <= limit * (1 + np.finfo(dtype).eps)
            # The small number is PyTorch's, against a division by zero.
            factor = limit / (want + 1e-6)
            for key, g in grads.items():
                agree(g, start[key].astype(F8) * factor, dtype, 10, key)


@each_dtype
def test_clip_grad_value(dtype, rng):
    start = {key: rng.standard_normal(n).astype(dtype) for key, n in (("a", 5), ("b", 90))}
    start["a"][2] = np.nan
    grads = {key: g.copy() for key, g in start.items()}
    clip_grad_value_(grads, 0.5)
    same_results(grads, {key: np.clip(g, dtype(-0.5), dtype(0.5)) for key, g in start.items()})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("norm_type", [2, np.inf])
def test_norm_that_is_not_finite(bad, norm_type):
    grads = {"a": np.ones(3, F4), "b": np.array([1, bad, 2], F4)}
    before = {key: g.copy() for key, g in grads.items()}
    assert not math.isfinite(clip_grad_norm_(grads, 1.0, norm_type))
    same_results(grads, before)
    with pytest.raises(ValueError, match=says("grads:", "finite norm")):
        clip_grad_norm_(grads, 1.0, norm_type, error_if_nonfinite=True)


def test_norm_of_large_numbers_does_not_overflow():
    g = np.full(4, 1e30, F4)
    assert math.isclose(grad_norm({"a": g}), 2e30, rel_tol=1e-6)
    assert math.isclose(grad_norm({"a": np.full(4, 1e300)}), 2e300, rel_tol=1e-12)


def test_no_limit_only_measures():
    grads = {"a": np.array([3.0, 4.0])}
    assert clip_grad_norm_(grads, np.inf) == 5
    assert grads["a"].tolist() == [3, 4]


def test_norm_of_nothing():
    assert grad_norm({}) == 0
    assert grad_norm({}, np.inf) == 0
    assert clip_grad_norm_({}, 1.0, np.inf) == 0


def bad_clips():
    good, fixed = {"a": zeros(3)}, {"a": frozen(zeros(3))}
    yield lambda: clip_grad_norm_(good, -1), ValueError, ("max_norm:", "[0, inf)", "-1")
    yield lambda: clip_grad_norm_(good, np.nan), ValueError, ("max_norm:", "[0, inf)", "nan")
    yield lambda: clip_grad_norm_(good, 1, 3), ValueError, ("norm_type:", "2 or inf", "3")
    yield lambda: clip_grad_norm_(fixed, 1), ValueError, ("grads['a']:", "writable", "read-only")
    yield lambda: clip_grad_norm_([zeros(3)], 1), TypeError, ("grads:", "mapping", "list")
    yield lambda: clip_grad_value_([zeros(3)], 1), TypeError, ("grads:", "mapping", "list")
    yield lambda: clip_grad_value_(good, "x"), TypeError, ("clip_value:", "a number", "'x'")
    yield lambda: clip_grad_value_(fixed, 1), ValueError, ("grads['a']:", "writable", "read-only")


@each_of(("call", "error", "parts"), bad_clips)
def test_bad_calls_of_clipping(call, error, parts):
    with pytest.raises(error, match=says(*parts)):
        call()
