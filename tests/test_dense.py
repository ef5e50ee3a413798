"""Linear layers and embeddings against the reference, and what they say of bad input."""

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
    forms,
    same,
    says,
    spoilt_arrays,
    zeros,
)

import fastrnn
from fastrnn.reference import linear as reference_linear


@each_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("lead", [(), (1,), (6,), (5, 3), (2, 3, 4)], ids=str)
def test_linear_against_the_reference(dtype, bias, lead, rng):
    linear = fastrnn.Linear(19, 7, bias, dtype=dtype, seed=0)
    wide = {key: value.astype(F8) for key, value in linear.params.items()}
    x, d_y = (rng.standard_normal((*lead, size)).astype(dtype) for size in (19, 7))
    y, saved = linear.forward(x)
    start = {key: np.ones_like(value) for key, value in linear.params.items()}
    d_x, grads = linear.backward(saved, d_y, start)
    assert grads is start
    want, kept = reference_linear.linear_forward(wide, x.astype(F8))
    want_d_x, want_grads = reference_linear.linear_backward(wide, kept, d_y.astype(F8))
    agree(y, want, dtype, 19)
    same(linear(x), y)
    agree(d_x, want_d_x, dtype, 7)
    for key, value in want_grads.items():
        agree(grads[key], value + 1, dtype, 1 + math.prod(lead))
    none, again = linear.backward(saved, d_y, need_d_x=False)
    assert none is None
    assert list(again) == list(linear.params)
    for form in forms(x):
        same(linear(form), y)


@each_dtype
@pytest.mark.parametrize("lead", [(), (1,), (6,), (5, 3), (2, 3, 4)], ids=str)
def test_embedding_against_the_reference(dtype, lead, rng):
    embedding = fastrnn.Embedding(4, 19, dtype=dtype, seed=0)
    wide = {key: value.astype(F8) for key, value in embedding.params.items()}
    ids, d_y = rng.integers(4, size=lead), rng.standard_normal((*lead, 19)).astype(dtype)
    y, saved = embedding.forward(ids)
    start = {"weight": np.ones((4, 19), dtype)}
    grads = embedding.backward(saved, d_y, start)
    assert grads is start
    want, kept = reference_linear.embedding_forward(wide, ids)
    same(y, want.astype(dtype))
    same(embedding(ids), y)
    want_grads = reference_linear.embedding_backward(wide, kept, d_y.astype(F8))
    agree(grads["weight"], want_grads["weight"] + 1, dtype, 1 + math.prod(lead))
    y += 1
    same(embedding(ids), want.astype(dtype))


def bad_linear_calls():
    linear, embedding = fastrnn.Linear(3, 4), fastrnn.Embedding(3, 4)
    x, d_y = zeros(2, 3), zeros(2, 4)
    ids = np.array([0, 2])
    yield lambda: linear(zeros(2, 5)), ValueError, ("x:", "(..., 3)", "(2, 5)")
    yield lambda: linear(F4(1)), ValueError, ("x:", "(3)", "()")
    yield lambda: linear(zeros(0, 3)), ValueError, ("x:", "(0, 3)", "no axis may be empty")
    yield lambda: linear(zeros(2, 3, dtype=F8)), TypeError, ("x:", "float32", "float64")
    yield lambda: linear.backward(x, zeros(2, 5)), ValueError, ("d_y:", "(2, 4)", "(2, 5)")
    yield lambda: linear.backward(x, zeros(2, 4, dtype=F8)), TypeError, ("d_y:", "float32", "64")
    yield lambda: linear.backward(zeros(2, 7), d_y), ValueError, ("saved:", "(..., 3)", "(2, 7)")
    yield lambda: linear.backward(x.astype(F8), d_y), TypeError, ("saved:", "float32", "float64")
    yield lambda: linear.backward(x, d_y, {}), TypeError, ("grads['weight']", "array", "NoneType")
    yield lambda: embedding([0.5]), TypeError, ("tokens:", "integer", "float64")
    yield lambda: embedding([3]), ValueError, ("tokens:", "[0, 3)", "3")
    yield lambda: embedding([-1]), ValueError, ("tokens:", "[0, 3)", "-1")
    yield lambda: embedding(zeros(1, 1, 1, 1, 0, dtype=int)), ValueError, ("tokens:", "empty")
    yield lambda: embedding.backward(ids, zeros(2, 5)), ValueError, ("d_y:", "(2, 4)", "(2, 5)")
    yield lambda: embedding.backward([0, 9], d_y), ValueError, ("saved:", "[0, 3)", "9")
    yield lambda: embedding.backward(ids, d_y, {}), TypeError, ("grads['weight']", "NoneType")


@each_of(("call", "error", "parts"), bad_linear_calls)
def test_bad_calls_of_linear_and_embedding(call, error, parts):
    with pytest.raises(error, match=says(*parts)):
        call()


def test_bad_params_of_linear_and_embedding():
    for layer, x in ((fastrnn.Linear(3, 40), zeros(2, 3)), (fastrnn.Embedding(3, 40), [0, 1])):
        good = layer.params["weight"]
        for wrong, error, parts in spoilt_arrays(good):
            layer.params["weight"] = wrong
            with pytest.raises(error, match=says("params['weight']", *parts)):
                layer(x)
