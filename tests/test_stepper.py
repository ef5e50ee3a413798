"""A stepper takes the layer's own steps, to the bit."""

from __future__ import annotations

import copy
import gc

import numpy as np
import pytest
from helpers import each_kind

import fastrnn
import fastrnn.stepper
from fastrnn import memory
from fastrnn.simd import lanes

each_dtype = pytest.mark.parametrize("dtype", ["f4", "f8"])


def parts(state):
    return state if isinstance(state, tuple) else (state,)


def same(found, wanted):
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == wanted.dtype


@each_kind
@each_dtype
@pytest.mark.parametrize("batch", [None, 1, 3, 40])
@pytest.mark.parametrize("tokens", [False, True])
def test_steps_are_those_of_the_layer(kind, dtype, batch, tokens, rng):
    for inputs, size, layers in ((1, 1, 1), (5, lanes(np.dtype(dtype)) + 1, 3), (64, 64, 2)):
        layer = kind(inputs, size, layers, dtype=dtype, seed=1, bias=size != 1)
        shape = (7,) if batch is None else (7, batch)
        if tokens:
            x = rng.integers(inputs, size=shape)
        else:
            x = rng.standard_normal((*shape, inputs)).astype(dtype)
        stepper = layer.stepper(batch, tokens=tokens)
        wanted, last = layer(x)
        for t in range(7):
            same(stepper(x[t]), wanted[t])
        for found, part in zip(parts(stepper.state), parts(last), strict=True):
            same(found, part)
        # From a state, and on from there.
        stepper.state = last
        again, last = layer(x[:2], last)
        same(np.stack([stepper(x[0]), stepper(x[1])]), again)
        stepper.state = None
        same(stepper(x[0]), wanted[0])


@each_kind
@each_dtype
def test_a_reset_is_that_of_the_layer(kind, dtype, rng):
    layer = kind(5, lanes(np.dtype(dtype)) + 1, 2, dtype=dtype, seed=1)
    x = rng.standard_normal((7, 4, 5)).astype(dtype)
    resets = rng.random((7, 4)) < 0.4
    resets[3], resets[4], resets[5] = True, False, [True, False, False, True]
    wanted, last = layer(x, resets=resets)
    stepper = layer.stepper(4)
    for t in range(7):
        stepper.reset(resets[t])
        same(stepper(x[t]), wanted[t])
    for found, part in zip(parts(stepper.state), parts(last), strict=True):
        same(found, part)
    # What was not finite is gone, too.
    stepper(np.full((4, 5), np.nan, dtype))
    stepper.reset()
    same(stepper(x[0]), layer(x[:1])[0][0])
    alone = layer.stepper()
    wanted, _ = layer(x[:, 0], resets=resets[:, 0])
    for t in range(7):
        alone.reset(resets[t, 0] if t % 2 else bool(resets[t, 0]))
        same(alone(x[t, 0]), wanted[t])


@each_kind
def test_a_reset_begins_with_the_learned_state(kind, rng):
    layer = kind(3, 17, 2, learned_state=True, seed=0)
    for key, value in layer.params.items():
        if key.startswith(("h_0", "c_0")):
            value[...] = rng.standard_normal(value.shape)
    x = rng.standard_normal((4, 3, 3)).astype("f4")
    through, (anew, _) = layer(x)[0], layer(x[2:])
    stepper = layer.stepper(3)
    same(np.stack([stepper(x[0]), stepper(x[1])]), through[:2])
    stepper.reset([False, True, False])
    found = np.stack([stepper(x[2]), stepper(x[3])])
    same(found[:, 1], anew[:, 1])
    same(found[:, ::2], through[2:, ::2])
    stepper.reset()
    same(stepper(x[2]), anew[0])


@pytest.mark.parametrize(
    ("batch", "mask", "error", "words"),
    [
        (2, [0, 1], TypeError, "mask: expected booleans, got int64; write .astype(bool)"),
        (2, [True], ValueError, "mask: expected shape (B,) = (2), got (1,)"),
        (2, True, ValueError, "mask: expected shape (B,) = (2), got ()"),
        (None, [True], ValueError, "mask: expected shape () = (), got (1,)"),
        (None, 1, TypeError, "mask: expected booleans"),
        (2, "all", TypeError, "mask: expected an array of numbers"),
    ],
)
def test_a_wrong_mask_is_named_and_resets_nothing(batch, mask, error, words):
    stepper = fastrnn.LSTM(2, 3, seed=0).stepper(batch)
    stepper(np.ones((2,) if batch is None else (2, 2), "f4"))
    before = stepper.state
    with pytest.raises(error) as caught:
        stepper.reset(mask)
    assert str(caught.value).startswith(words)
    for one, other in zip(stepper.state, before, strict=True):
        same(one, other)


@each_kind
def test_threads_do_not_matter(kind, rng, threads):
    layer = kind(70, 130, 2, seed=0)
    x = rng.standard_normal((3, 40, 70)).astype("f4")
    one = layer.stepper(40)
    wanted = [one(v) for v in x]
    threads(2)
    two = layer.stepper(40)
    for v, y in zip(x, wanted, strict=True):
        same(two(v), y)


@each_kind
def test_a_copy_from_another_kind_of_cpu_is_refused(kind):
    stepper = kind(3, 17, seed=0).stepper()
    state = stepper.__getstate__()
    state["_lanes"] *= 2
    with pytest.raises(ValueError, match=r"stepper: expected one from a CPU with .* make it again"):
        stepper.__class__.__new__(stepper.__class__).__setstate__(state)


@each_kind
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_goes_its_own_way(kind, copied, rng):
    layer = kind(3, 17, seed=0)
    x = rng.standard_normal((3, 3)).astype("f4")
    wanted, _ = layer(x)
    stepper = layer.stepper()
    same(stepper(x[0]), wanted[0])
    other = copied(stepper)
    same(other(x[1]), wanted[1])
    if copied is copy.copy:  # it has the same state, as a shallow copy has
        same(stepper(x[2]), wanted[2])
        return
    same(stepper(x[1]), wanted[1])
    for p in layer.params.values():
        p[...] = 0
    stepper.refresh()
    del stepper
    gc.collect()
    same(other(x[2]), wanted[2])


def test_an_interrupted_refresh_changes_nothing(rng, monkeypatch):
    layer = fastrnn.LSTM(30, 70, seed=0)
    x = rng.standard_normal((2, 30)).astype("f4")
    wanted, _ = layer(x)
    stepper = layer.stepper()
    same(stepper(x[0]), wanted[0])
    for p in layer.params.values():
        p[...] = 0

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(fastrnn.stepper._step, "compile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stepper.refresh()
    # What would take the place of memory that was let go.
    taken = [memory.empty(size, np.float32) for size in range(10_000, 40_000, 16)]
    same(stepper(x[1]), wanted[1])
    del taken


def test_out_is_all_that_is_written(rng):
    layer = fastrnn.GRU(3, 17, seed=0)
    x = rng.standard_normal((4, 3)).astype("f4")
    memory = np.full(19, np.nan, "f4")
    out = memory[1:18]
    wanted, _ = layer(x)
    stepper = layer.stepper()
    for v, y in zip(x, wanted, strict=True):
        assert stepper(v, out=out) is out
        same(out, y)
    assert np.isnan(memory[[0, 18]]).all()
    first = stepper(x[0])
    kept = first.copy()
    stepper(x[1])
    same(first, kept)


def test_refresh_takes_over_new_weights(rng):
    layer, other = fastrnn.LSTM(3, 4, seed=0), fastrnn.LSTM(3, 4, seed=1)
    x = rng.standard_normal((2, 3)).astype("f4")
    stepper = layer.stepper()
    wanted, state = layer(x[:1])
    layer.load_state_dict(other.params)
    same(stepper(x[0]), wanted[0])
    stepper.refresh()
    same(stepper(x[1]), other(x[1:], state)[0][0])


def test_inputs_of_any_kind_are_taken(rng):
    layer = fastrnn.RNN(6, 5, seed=0)
    x = rng.standard_normal((2, 12)).astype("f4")
    wanted, _ = layer(np.ascontiguousarray(x[:1, ::2]))
    same(layer.stepper()(x[0, ::2]), wanted[0])
    same(layer.stepper()(x[:1, ::2].T[:, 0]), wanted[0])
    same(layer.stepper(tokens=True)(4), layer(np.array([4]))[0][0])
    same(layer.stepper(2, tokens=True)([4, 0]), layer(np.array([[4, 0]]))[0][0])


@pytest.mark.parametrize(
    ("arguments", "x", "error", "words"),
    [
        ({}, np.zeros(3, "f4"), ValueError, "x"),
        ({}, np.zeros((1, 2), "f4"), ValueError, "x"),
        ({"batch": 2}, np.zeros(2, "f4"), ValueError, "x"),
        ({}, np.zeros(2, "c8"), TypeError, "x"),
        ({}, None, TypeError, "x"),
        ({"tokens": True}, 2, ValueError, "x"),
        ({"tokens": True}, -1, ValueError, "x"),
        ({"tokens": True}, 1.5, TypeError, "x"),
        ({"tokens": True, "batch": 2}, [0], ValueError, "x"),
    ],
)
def test_a_wrong_input_is_named_and_moves_nothing(arguments, x, error, words):
    layer = fastrnn.LSTM(2, 3, seed=0)
    stepper = layer.stepper(**arguments)
    before = stepper.state
    with pytest.raises(error, match=words):
        stepper(x)
    for one, other in zip(stepper.state, before, strict=True):
        same(one, other)


@pytest.mark.parametrize(
    "out", [np.zeros(2, "f4"), np.zeros(3, "f8"), np.zeros(6, "f4")[::2], np.zeros((1, 3), "f4")]
)
def test_a_wrong_out_is_named(out):
    stepper = fastrnn.LSTM(2, 3, seed=0).stepper()
    with pytest.raises((ValueError, TypeError), match="out"):
        stepper(np.zeros(2, "f4"), out=out)
    frozen = np.zeros(3, "f4")
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="out"):
        stepper(np.zeros(2, "f4"), out=frozen)


@pytest.mark.parametrize("batch", [0, -1, 1.5, "2"])
def test_a_wrong_batch_is_named(batch):
    with pytest.raises((ValueError, TypeError), match="batch"):
        fastrnn.GRU(2, 3).stepper(batch)


def test_weights_that_kernels_cannot_read_are_refused():
    layer = fastrnn.GRU(2, 3, seed=0)
    layer.params["weight_hh_l0"] = np.zeros((9, 3), "f8")
    with pytest.raises((ValueError, TypeError), match="weight_hh_l0"):
        layer.stepper()


def test_a_read_only_input_compiles_nothing_new(threads, rng):
    threads(2)
    layer = fastrnn.GRU(70, 130, seed=0)
    x = rng.standard_normal((2, 40, 70)).astype("f4")
    stepper = layer.stepper(40)
    wanted = stepper(x[0])
    before = len(fastrnn.stepper._step.signatures)
    x.flags.writeable = False
    stepper.state = None
    same(stepper(x[0]), wanted)
    assert len(fastrnn.stepper._step.signatures) == before


def test_a_stepper_uses_the_threads_of_the_moment(threads, monkeypatch):
    parts = []
    run = fastrnn.stepper.run
    monkeypatch.setattr(fastrnn.stepper, "run", lambda f, n, *a: (parts.append(n), run(f, n, *a)))
    threads(3)
    stepper = fastrnn.LSTM(100, 200, seed=0).stepper(40)
    for count in (3, 2, 1):
        threads(count)
        stepper(np.zeros((40, 100), "f4"))
    assert parts == [3, 2]
