"""How weights begin."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import each_cell, new_layer, same

import fastrnn


@each_cell
def test_glorot_is_that_of_keras(cell):
    layer = new_layer(cell, 40, 60, 2, init="glorot", seed=0, dtype=np.float64, learned_state=True)
    for key, value in layer.params.items():
        if key.startswith("weight_ih"):
            limit = np.sqrt(6 / sum(value.shape))
            assert 0.98 * limit < np.abs(value).max() <= limit
            assert abs(value.mean()) < 0.05 * limit
        elif key.startswith("weight_hh"):
            tall = value if len(value) >= value.shape[1] else value.T
            np.testing.assert_allclose(tall.T @ tall, np.eye(tall.shape[1]), atol=1e-12)
        elif key.startswith("bias_ih") and "lstm" in cell and "coupled" not in cell:
            assert (value == np.repeat([0, 1, 0, 0], layer.hidden_size)).all()
        elif key.startswith(("bias", "h_0", "c_0")):
            assert (value == 0).all()
        else:
            assert 0 < np.abs(value).max() <= 1
    again = new_layer(cell, 40, 60, 2, init="glorot", seed=0, dtype=np.float64, learned_state=True)
    other = new_layer(cell, 40, 60, 2, init="glorot", seed=1, dtype=np.float64)
    same(layer.params["weight_hh_l1"], again.params["weight_hh_l1"])
    assert (layer.params["weight_hh_l1"] != other.params["weight_hh_l1"]).any()


def test_no_direction_is_likelier():
    # Without the signs of R the diagonal of Q would have one sign.
    signs = [
        np.sign(fastrnn.RNN(2, 5, init="glorot", seed=s).params["weight_hh_l0"][0, 0])
        for s in range(60)
    ]
    assert 15 < signs.count(1) < 45


def test_identity_remembers():
    layer = fastrnn.RNN(3, 8, nonlinearity="relu", init="identity", seed=0)
    same(layer.params["weight_hh_l0"], np.eye(8, dtype=np.float32))
    assert 0 < np.abs(layer.params["weight_ih_l0"]).max() < 0.006
    h = np.arange(8, dtype=np.float32).reshape(1, 1, 8)
    y, _ = layer(np.zeros((50, 1, 3), np.float32), h)
    same(y[-1], h[0])


@pytest.mark.parametrize(
    "make", [fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN], ids=lambda kind: kind.__name__
)
def test_identity_is_for_relu(make):
    with pytest.raises(ValueError, match=r"init: expected \"pytorch\" or \"glorot\""):
        make(3, 4, init="identity")
    with pytest.raises(ValueError, match="init: expected one of pytorch, glorot, identity"):
        make(3, 4, init="xavier")


@pytest.mark.parametrize("init", ["pytorch", "glorot"])
def test_forget_bias(init):
    layer = fastrnn.LSTM(3, 4, 2, forget_bias=2.5, init=init, bidirectional=True, seed=0)
    plain = fastrnn.LSTM(3, 4, 2, init="pytorch", bidirectional=True, seed=0)
    for key, value in layer.params.items():
        if key.startswith("bias"):
            assert (value[4:8] == (2.5 if "ih" in key else 0)).all()
            if init == "pytorch":
                same(value[:4], plain.params[key][:4])
        elif init == "pytorch":
            same(value, plain.params[key])


@pytest.mark.parametrize("options", [{"bias": False}, {"coupled": True}], ids=str)
def test_no_forget_bias_where_there_is_none(options):
    with pytest.raises(ValueError, match="forget_bias: expected None beside"):
        fastrnn.LSTM(3, 4, forget_bias=1, **options)
    with pytest.raises((TypeError, ValueError), match="forget_bias: expected"):
        fastrnn.LSTM(3, 4, forget_bias=float("nan"))


def test_projection_sizes():
    for wrong in (4, 5, -1):
        with pytest.raises(ValueError, match="proj_size: expected"):
            fastrnn.LSTM(3, 4, proj_size=wrong)
    for kind in (fastrnn.GRU, fastrnn.RNN):
        with pytest.raises(ValueError, match="proj_size: expected 0, since this cell has no"):
            kind(3, 4, proj_size=2)
    layer = fastrnn.LSTM(3, 4, 2, proj_size=2, bidirectional=True)
    shapes = {key: value.shape for key, value in layer.params.items() if "_l1_reverse" in key}
    assert shapes == {
        "weight_ih_l1_reverse": (16, 4),
        "weight_hh_l1_reverse": (16, 2),
        "bias_ih_l1_reverse": (16,),
        "bias_hh_l1_reverse": (16,),
        "weight_hr_l1_reverse": (2, 4),
    }
    y, (h, c) = layer(np.zeros((5, 3, 3), np.float32))
    assert (y.shape, h.shape, c.shape) == ((5, 3, 4), (4, 3, 2), (4, 3, 4))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_initial_state_is_what_none_stands_for(bidirectional, rng):
    layer = fastrnn.LSTM(
        3, 4, 2, proj_size=2, bidirectional=bidirectional, learned_state=True, seed=0
    )
    for value in layer.params.values():
        value[...] = rng.standard_normal(value.shape)
    x = rng.standard_normal((5, 3, 3)).astype("f4")
    h, c = layer.initial_state(3)
    count = 4 if bidirectional else 2
    assert (h.shape, c.shape) == ((count, 3, 2), (count, 3, 4))
    same(h[1, 2], layer.params["h_0_l0_reverse" if bidirectional else "h_0_l1"])
    same(layer(x, (h, c))[0], layer(x)[0])
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        layer.initial_state(0)
    layer.params["c_0_l1"] = np.zeros(3, "f4")
    with pytest.raises(ValueError, match="c_0_l1"):
        layer.initial_state(3)
