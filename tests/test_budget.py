"""The memory of a training step is what `training_bytes` says."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest
from helpers import (
    each_dtype,
    threads,
)

import fastrnn
from fastrnn import layout, memory


def taken(layer, steps, batch, *, checkpoint_every=None, return_flow=False, **given):
    """Bytes that a second training step takes at most, what it says, and what without pieces."""
    x = np.ones((steps, batch, layer.input_size), layer.dtype)
    d_y = np.ones((steps, batch, layer.output_size), layer.dtype)

    def step():
        _output, _, saved = layer.forward(x, checkpoint_every=checkpoint_every, **given)
        layer.backward(saved, d_y, return_flow=return_flow)

    with threads(1):
        step()
        gc.collect()
        memory._give_up_idle()
        layout.even.cache_clear()
        tracemalloc.start()
        try:
            step()
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        given["return_flow"] = return_flow
        said = layer.training_bytes(steps, batch, checkpoint_every=checkpoint_every, **given)
        whole = layer.training_bytes(steps, batch, **given)
        assert layer.training_bytes(steps, batch, checkpoint_every=steps, **given) == whole
        return most, said, whole


@pytest.mark.parametrize("every", [None, 20])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("given", ["lengths", "resets", "return_flow"])
def test_uneven_sequences_take_what_they_say(given, both, every):
    steps, batch = 160, 24
    rng = np.random.default_rng(0)
    value = {
        "lengths": rng.integers(steps // 4, steps + 1, size=batch),
        "resets": rng.random((steps, batch)) < 0.1,
        "return_flow": True,
    }[given]
    layer = fastrnn.LSTM(90, 72, 2, bidirectional=both, seed=0)
    most, said, _ = taken(layer, steps, batch, checkpoint_every=every, **{given: value})
    plain = layer.training_bytes(steps, batch, checkpoint_every=every)
    if every is None:
        assert most == pytest.approx(said, rel=0.05)
    else:
        assert 0.8 * said < most < 1.06 * said
    if (given, both, every) in {("resets", False, 20), ("lengths", False, None)}:
        # Not as good without knowing of it.
        assert abs(most - plain) > 2 * abs(most - said)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("sizes", [(2000, 4, 50), (3000, 1, 50), (400, 32, 50)], ids=str)
def test_many_uneven_pieces_take_what_they_say(sizes, both):
    steps, batch, every = sizes
    layer = fastrnn.LSTM(64, 64, 2, bidirectional=both, seed=0)
    resets = np.random.default_rng(1).random((steps, batch)) < 0.05
    most, said, _ = taken(layer, steps, batch, checkpoint_every=every, resets=resets)
    assert 0.75 * said < most < 1.06 * said
    # No sequence begins anew, but any might.
    most, said, _ = taken(layer, steps, batch, checkpoint_every=every, resets=resets & False)
    assert 0.75 * said < most < 1.06 * said
    # All end early, so half of the pieces have no steps.
    lengths = np.full(batch, steps // 2)
    most, said, _ = taken(layer, steps, batch, checkpoint_every=every, lengths=lengths)
    assert 0.75 * said < most < 1.06 * said


def test_budgets_and_bytes_are_found_without_layouts(monkeypatch):
    """Of each piece that is tried these would take longer than the rest of the step."""
    layer = fastrnn.LSTM(1, 8, seed=0)
    resets = np.zeros((20_000, 4), bool)
    resets[::9] = True
    x = np.zeros((20_000, 4, 1), np.float32)
    monkeypatch.setattr(layout, "of_lengths", None)
    with pytest.raises(ValueError, match="budget_mb: expected at least"):
        layer.forward(x, resets=resets, budget_mb=0.1)
    # That many states are most of it.
    assert layer.training_bytes(10**6, 1, checkpoint_every=1) > 10**6 * 16 * 4


@pytest.mark.parametrize(
    "options",
    [
        {"layer_norm": True},
        {"proj_size": 40},
        {"recurrent_dropout": 0.2},
        {"weight_dropout": 0.2},
        {"input_dropout": 0.2},
    ],
    ids=str,
)
def test_options_take_what_they_say(options):
    layer = fastrnn.LSTM(64, 96, 2, seed=0, **options)
    for every in (None, 20):
        most, said, _ = taken(layer, 100, 16, checkpoint_every=every)
        assert most == pytest.approx(said, rel=0.05 if every is None else 0.1)


@each_dtype
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", [fastrnn.RNN, fastrnn.GRU, fastrnn.LSTM])
@pytest.mark.parametrize(
    "sizes", [(64, 16, 40, 50, 1), (30, 20, 200, 130, 2), (100, 8, 1, 33, 3)], ids=str
)
def test_a_training_step_takes_what_it_says(kind, sizes, both, dtype):
    steps, batch, *shape = sizes
    p = 0.5 if shape[2] > 1 else 0
    layer = kind(*shape, dropout=p, bidirectional=both, dtype=dtype, seed=0)
    most, said, _ = taken(layer, steps, batch)
    assert most == pytest.approx(said, rel=0.05)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", [fastrnn.GRU, fastrnn.LSTM])
@pytest.mark.parametrize("sizes", [(128, 32, 64, 128, 1), (300, 16, 1, 96, 3)], ids=str)
def test_a_step_in_pieces_takes_what_it_says(kind, sizes, both):
    steps, batch, *shape = sizes
    p = 0.5 if shape[2] > 1 else 0
    layer = kind(*shape, dropout=p, bidirectional=both, seed=0)
    most, said, whole = taken(layer, steps, batch, checkpoint_every=20)
    assert most == pytest.approx(said, rel=0.1)
    assert said < 0.7 * whole
    with pytest.raises(ValueError, match="checkpoint_every: expected"):
        layer.training_bytes(steps, batch, checkpoint_every=0)
