"""The deep readout: NumPy's formula, finite differences, PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import agree, each_dtype, same, same_results, threads

import fastrnn

each_activation = pytest.mark.parametrize("activation", ["relu", "tanh"])


def by_hand(layer, x):
    count = len(layer.params) // 2
    y = x.astype(np.float64)
    for i in range(count):
        y = y @ layer.params[f"{i}.weight"].astype("f8").T + layer.params[f"{i}.bias"]
        if i < count - 1:
            y = np.maximum(y, 0) if layer.activation == "relu" else np.tanh(y)
    return y


@each_dtype
@each_activation
@pytest.mark.parametrize("hidden", [7, (19, 33), []], ids=str)
@pytest.mark.parametrize("lead", [(6, 5), (4,), (2, 3, 2)], ids=str)
def test_values_and_gradients(dtype, activation, hidden, lead, rng):
    layer = fastrnn.Readout(5, hidden, 3, activation=activation, dtype=dtype, seed=0)
    x = rng.standard_normal((*lead, 5)).astype(dtype)
    y, saved = layer.forward(x)
    agree(y, by_hand(layer, x), dtype, 200)
    same(layer(x), y)
    d_y = rng.standard_normal(y.shape).astype(dtype)
    d_x, grads = layer.backward(saved, d_y)
    with threads(3):
        y, again = layer.forward(x)
        found, more = layer.backward(again, d_y)
    same(found, d_x)
    same_results(more, grads)
    assert layer.backward(again, d_y, need_d_x=False)[0] is None
    torch = pytest.importorskip("torch")
    step = {"relu": torch.relu, "tanh": torch.tanh}[activation]
    params = {k: torch.tensor(v.astype("f8"), requires_grad=True) for k, v in layer.params.items()}
    value = first = torch.tensor(x.astype("f8"), requires_grad=True)
    for i in range(len(params) // 2):
        value = value if i == 0 else step(value)
        value = value @ params[f"{i}.weight"].T + params[f"{i}.bias"]
    (value * torch.tensor(d_y.astype("f8"))).sum().backward()
    agree(d_x, first.grad.numpy(), dtype, 200)
    for key, wanted in params.items():
        agree(grads[key], wanted.grad.numpy(), dtype, 500, key)


def test_gradients_are_added_to_given_ones(rng):
    layer = fastrnn.Readout(5, 4, 3, seed=0, dtype=np.float64)
    x = rng.standard_normal((6, 5))
    y, saved = layer.forward(x)
    _, once = layer.backward(saved, y)
    _, grads = layer.backward(saved, y, {key: value.copy() for key, value in once.items()})
    for key in once:
        np.testing.assert_allclose(grads[key], 2 * once[key])


def test_nan_stays(rng):
    for activation in ("relu", "tanh"):
        layer = fastrnn.Readout(2, 3, 1, activation=activation, seed=0)
        assert np.isnan(layer(np.array([[np.nan, 1]], np.float32))).all()


def test_arguments():
    with pytest.raises(ValueError, match="activation: expected one of relu, tanh, got 'gelu'"):
        fastrnn.Readout(2, 3, 1, activation="gelu")
    with pytest.raises(ValueError, match="hidden_features: expected at least 1, got 0"):
        fastrnn.Readout(2, (3, 0), 1)
    layer = fastrnn.Readout(2, 3, 1)
    with pytest.raises(TypeError, match="saved: expected the second result of forward"):
        layer.backward(None, np.zeros((1, 1), np.float32))
    layer.params["0.weight"] = np.zeros((3, 3), np.float32)
    with pytest.raises(ValueError, match=r"params\['0.weight'\]: expected"):
        layer(np.zeros((1, 2), np.float32))
