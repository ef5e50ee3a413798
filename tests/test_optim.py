"""Optimisers and schedules against the reference, and what they say of bad input."""

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
    frozen,
    same,
    same_results,
    says,
    zeros,
)

from fastrnn import optim, reference


def test_sgd_without_momentum_forgets_an_infinity():
    params = {"w": np.ones(3, F4)}
    sgd = optim.SGD(params, lr=1.0)
    for g in (np.inf, -np.inf, 1.0):
        params["w"][:] = 1
        sgd.step({"w": np.array([g, 0.5, 0], F4)})
    np.testing.assert_array_equal(params["w"], [0, 0.5, 1])


OPTIMISERS = [
    ("sgd", {}),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "weight_decay": 0.1}),
    ("rmsprop", {}),
    ("rmsprop", {"alpha": 0.9, "eps": 1e-3}),
    ("adagrad", {}),
    ("adagrad", {"eps": 1e-3}),
    ("adam", {}),
    ("adam", {"betas": (0.5, 0.8), "eps": 1e-3, "weight_decay": 0.1}),
    ("adamw", {}),
    ("adamw", {"betas": (0.5, 0.8), "eps": 1e-3, "weight_decay": 0.1}),
]


@each_dtype
@pytest.mark.parametrize(("name", "options"), OPTIMISERS, ids=str)
def test_optimiser_against_the_reference(dtype, name, options, rng):
    start = {
        "w": rng.standard_normal((4, 5)).astype(dtype),
        "b": rng.standard_normal(3).astype(dtype),
    }
    params = {key: value.copy() for key, value in start.items()}
    arrays = dict(params)
    ours = optim.OPTIMIZERS[name](params, lr=0.05, **options)
    wants = {key: (value.astype(F8), {}) for key, value in start.items()}
    for step in range(7):
        ours.lr = 0.05 / (1 + step)  # may be set between steps
        grads = {key: rng.standard_normal(p.shape).astype(dtype) for key, p in params.items()}
        ours.step({key: frozen(g) for key, g in grads.items()})
        for key, (p, state) in wants.items():
            function = getattr(reference.optim, name)
            wants[key] = function(p, grads[key].astype(F8), state, lr=ours.lr, **options)
            agree(params[key], wants[key][0], dtype, 10 * (step + 1), f"{key} at step {step}")
    assert ours.steps == 7
    assert all(params[key] is arrays[key] for key in arrays)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_optimisers_take_any_layout_of_gradients(name, rng):
    start, g = rng.standard_normal((2, 6, 4)).astype(F4)
    results = []
    for form in (g, *forms(g)):
        params = {"w": start.copy()}
        optim.OPTIMIZERS[name](params, lr=0.1).step({"w": form, "unused": g})
        results.append(params["w"])
    assert (results[0] != start).all()
    for found in results[1:]:
        same(found, results[0])


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_optimisers_go_on_where_they_stopped(name, rng):
    start = rng.standard_normal(5).astype(F4)
    steps = rng.standard_normal((6, 5)).astype(F4)
    options = {"momentum": 0.9} if name == "sgd" else {}
    whole, halves = {"w": start.copy()}, {"w": start.copy()}
    first = optim.OPTIMIZERS[name](whole, lr=0.1, **options)
    for g in steps:
        first.step({"w": g})
    before = optim.OPTIMIZERS[name](halves, lr=0.1, **options)
    for g in steps[:3]:
        before.step({"w": g})
    after = optim.OPTIMIZERS[name](halves, lr=0.1, **options)
    after.load_state({key: value.copy() for key, value in before.state.items()}, before.steps)
    for g in steps[3:]:
        after.step({"w": g})
    same_results(halves, whole)
    same_results(after.state, first.state)
    with pytest.raises(ValueError, match=says("optimiser state:", "missing", "unknown ['w']")):
        after.load_state({"w": start}, 3)
    with pytest.raises(ValueError, match=says("steps:", "at least 0", "-1")):
        after.load_state(before.state, -1)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_nan_in_a_gradient_stays_in_its_element(name):
    params = {"w": np.ones(40, F4)}
    g = np.ones(40, F4)
    g[17] = np.nan
    optim.OPTIMIZERS[name](params, lr=0.1).step({"w": g})
    assert np.isnan(params["w"]).tolist() == [i == 17 for i in range(40)]


@pytest.mark.parametrize("name", ["rmsprop", "adagrad", "adam", "adamw"])
def test_no_epsilon_and_no_gradient(name):
    """0 / 0 is NaN, as in PyTorch; a kernel must not stop half-way through the parameters."""
    params = {"w": np.ones(3, F4)}
    optim.OPTIMIZERS[name](params, lr=0.1, eps=0).step({"w": np.array([1, 0, 1], F4)})
    assert np.isnan(params["w"]).tolist() == [False, True, False]


def bad_optimisers():
    good = {"w": zeros(3)}
    g = {"w": zeros(3)}
    yield lambda: optim.SGD(good, -1), ValueError, ("lr:", "[0, inf)", "-1")
    yield lambda: optim.SGD(good, np.nan), ValueError, ("lr:", "[0, inf)", "nan")
    yield lambda: optim.SGD(good, np.inf), ValueError, ("lr:", "[0, inf)", "inf")
    yield lambda: optim.SGD(good, "x"), TypeError, ("lr:", "a number", "'x'")
    yield lambda: optim.SGD(good, momentum=1), ValueError, ("momentum:", "[0, 1)", "1")
    yield lambda: optim.SGD(good, weight_decay=-1), ValueError, ("weight_decay:", "[0,", "-1")
    yield lambda: optim.RMSProp(good, alpha=2), ValueError, ("alpha:", "[0, 1)", "2")
    yield lambda: optim.Adagrad(good, eps=-1), ValueError, ("eps:", "[0, inf)", "-1")
    yield lambda: optim.Adam(good, betas=(1, 0)), ValueError, ("betas[0]:", "[0, 1)", "1")
    yield lambda: optim.Adam(good, betas=(0, -1)), ValueError, ("betas[1]:", "[0, 1)", "-1")
    yield lambda: optim.SGD({"w": [1.0]}), ValueError, ("params['w']:", "float32", "list")
    yield (
        lambda: optim.SGD({"w": zeros(3, dtype=int)}),
        ValueError,
        ("params['w']:", "float32", "int"),
    )
    yield lambda: optim.SGD({"w": zeros(6)[::2]}), ValueError, ("params['w']:", "contiguous")
    yield lambda: optim.SGD({"w": frozen(zeros(6))}), ValueError, ("params['w']:", "not writable")
    yield lambda: optim.SGD(good).step({}), ValueError, ("grads:", "['w']", "none for 'w'")
    yield lambda: optim.SGD(good).step({"w": zeros(4)}), ValueError, ("grads['w']:", "(3,)", "(4,)")
    yield (
        lambda: optim.SGD(good).step({"w": [1] * 3}),
        ValueError,
        ("grads['w']:", "float32", "int"),
    )
    yield lambda: optim.SGD(good).step({"w": zeros(3, dtype=F8)}), ValueError, ("float32", "64")
    yield lambda: optim.Optimizer(good, 1).step(g), TypeError, ("Optimizer:", "a subclass")


@each_of(("call", "error", "parts"), bad_optimisers)
def test_bad_calls_of_optimisers(call, error, parts):
    with pytest.raises(error, match=says(*parts)):
        call()


def test_a_bad_gradient_changes_nothing():
    params = {"a": np.ones(3, F4), "b": np.ones(3, F4)}
    optimiser = optim.Adam(params, 0.1)
    with pytest.raises(ValueError, match=r"grads\['b'\]"):
        optimiser.step({"a": np.ones(3, F4), "b": np.ones(4, F4)})
    assert optimiser.steps == 0
    assert all((value == 1).all() for value in params.values())


def test_constant_schedule():
    assert [optim.Constant().rate(0.5, step, None) for step in range(3)] == [0.5] * 3


def test_warmup_and_cosine():
    schedule = optim.WarmupCosine(warmup=4, floor=0.1)
    rates = [schedule.rate(2.0, step, 14) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert math.isclose(rates[9], 2.0 * 0.55)
    assert (np.diff(rates[4:15]) < 0).all()
    assert np.allclose(rates[14:], 0.2)
    assert optim.WarmupCosine().rate(2.0, 0, 5) == 2.0
    assert optim.WarmupCosine(warmup=9).rate(2.0, 9, 5) == 2.0
    assert schedule.rate(2.0, 1, None) == 1.0
    with pytest.raises(ValueError, match=says("schedule:", "number of steps", "none")):
        schedule.rate(2.0, 4, None)


def test_plateau():
    schedule = optim.Plateau(factor=0.5, patience=2)
    rates = []
    for value in (3.0, 2.0, 2.0, 2.5, 1.0, math.nan, 1.0, 0.5):
        schedule.observe(value)
        rates.append(schedule.rate(1.0, 0, None))
    assert rates == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_bad_schedules():
    with pytest.raises(ValueError, match=says("warmup:", "at least 0", "-1")):
        optim.WarmupCosine(-1)
    with pytest.raises(ValueError, match=says("floor:", "[0, 1)", "1")):
        optim.WarmupCosine(0, 1)
    with pytest.raises(ValueError, match=says("factor:", "(0, 1)", "0")):
        optim.Plateau(0)
    with pytest.raises(ValueError, match=says("patience:", "at least 1", "0")):
        optim.Plateau(0.5, 0)
