"""What the options of cells mean: identities between them, and other people's formulas."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import agree, each_dtype, same

import fastrnn

SHAPE = 7, 5, 3, 19  # T, B, I, H


def draw(rng, layer, T, B, I, H):  # noqa: E741
    """x and the initial states."""
    x = rng.standard_normal((T, B, I)).astype(layer.dtype)
    return x, [rng.standard_normal((1, B, H)).astype(layer.dtype) for _ in layer.state_names]


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def weights(layer):
    """(W, U, b): of the input, of the state, both biases together; in float64, gate by gate."""
    p = {key.removesuffix("_l0"): value.astype(np.float64) for key, value in layer.params.items()}
    gates = layer.cell.gates
    b = p["bias_ih"] + p["bias_hh"]
    return (np.split(a, gates) for a in (p["weight_ih"], p["weight_hh"], b))


@each_dtype
@pytest.mark.parametrize("shape", [SHAPE, (3, 1, 2, 130), (2, 33, 40, 64)], ids=str)
def test_all_forms_of_a_gru_are_one_where_the_reset_gate_is_1(dtype, shape, rng, threads):
    I, H = shape[2:]  # noqa: E741
    after = fastrnn.GRU(I, H, dtype=dtype, seed=1)
    before = fastrnn.GRU(I, H, dtype=dtype, reset_after=False)
    without = fastrnn.GRU(I, H, dtype=dtype, reset_gate=False)
    for key, value in after.params.items():
        value[:H] = 0
        if key == "bias_ih_l0":
            value[:H] = 20 if dtype == np.float32 else 40
        without.params[key][...] = value[H:]
    before.load_state_dict(after.params)
    x, (h,) = draw(rng, after, *shape)
    for count in (1, 2):
        threads(count)
        wanted = after(x, h)
        for layer in (before, without):
            for found, value in zip(layer(x, h), wanted, strict=True):
                same(found, value)
    # Elsewhere they differ.
    after.params["weight_ih_l0"][:H] = rng.standard_normal((H, I))
    after.params["bias_ih_l0"][:H] = 0
    before.load_state_dict(after.params)
    assert np.abs(after(x, h)[0] - before(x, h)[0]).max() > 1e-3


@each_dtype
def test_reset_before_is_that_of_keras(dtype, rng):
    layer = fastrnn.GRU(*SHAPE[2:], reset_after=False, dtype=dtype, seed=1)
    x, (h,) = draw(rng, layer, *SHAPE)
    output, last = layer(x, h)
    (w_r, w_z, w_n), (u_r, u_z, u_n), (b_r, b_z, b_n) = weights(layer)
    a, wanted = h[0].astype(np.float64), []
    for x_t in x.astype(np.float64):
        z = sigmoid(x_t @ w_z.T + a @ u_z.T + b_z)
        r = sigmoid(x_t @ w_r.T + a @ u_r.T + b_r)
        hh = np.tanh(x_t @ w_n.T + (r * a) @ u_n.T + b_n)
        a = z * a + (1 - z) * hh
        wanted.append(a)
    agree(output, np.array(wanted), dtype, 500)
    agree(last[0], a, dtype, 500)


@each_dtype
def test_without_a_reset_gate_it_is_that_of_the_course(dtype, rng):
    layer = fastrnn.GRU(*SHAPE[2:], reset_gate=False, dtype=dtype, seed=1)
    x, (h,) = draw(rng, layer, *SHAPE)
    (w_z, w_n), (u_z, u_n), (b_z, b_n) = weights(layer)
    # Columns are examples, the state comes first, and the gate says how much is new.
    w_u, w_c = np.hstack([-u_z, -w_z]), np.hstack([u_n, w_n])
    c, wanted = h[0].T.astype(np.float64), []
    for x_t in x.astype(np.float64):
        joined = np.vstack([c, x_t.T])
        new = np.tanh(w_c @ joined + b_n[:, None])
        gamma = sigmoid(w_u @ joined - b_z[:, None])
        c = gamma * new + (1 - gamma) * c
        wanted.append(c.T)
    agree(layer(x, h)[0], np.array(wanted), dtype, 500)


@each_dtype
@pytest.mark.parametrize("clip", [None, 0.3])
def test_peepholes_are_those_of_tensorflow(dtype, clip, rng):
    layer = fastrnn.LSTM(*SHAPE[2:], peephole=True, cell_clip=clip, dtype=dtype, seed=1)
    layer.params["weight_ch_l0"][...] *= 4
    x, (h, c) = draw(rng, layer, *SHAPE)
    output, (_, last) = layer(x, (h, c))
    W, U, b = weights(layer)
    w_ci, w_cf, w_co = layer.params["weight_ch_l0"].astype(np.float64)
    h, c = h[0].astype(np.float64), c[0].astype(np.float64)
    wanted = []
    for x_t in x.astype(np.float64):
        i, f, g, o = (x_t @ w.T + h @ u.T + d for w, u, d in zip(W, U, b, strict=True))
        cs = sigmoid(f + w_cf * c) * c + sigmoid(i + w_ci * c) * np.tanh(g)
        c = cs if clip is None else np.clip(cs, -clip, clip)
        h = sigmoid(o + w_co * c) * np.tanh(c)
        wanted.append(h)
    agree(output, np.array(wanted), dtype, 500)
    agree(last[0], c, dtype, 500)
    if clip is not None:
        assert (np.abs(last) == dtype(clip)).any()
        assert (np.abs(last) < dtype(clip)).any()


@each_dtype
def test_coupled_gates_add_up_to_1(dtype, rng):
    layer = fastrnn.LSTM(*SHAPE[2:], coupled=True, dtype=dtype, seed=1)
    full = fastrnn.LSTM(*SHAPE[2:], dtype=dtype)
    for key, value in full.params.items():
        i, g, o = np.split(layer.params[key], 3)
        # sigmoid(-a) = 1 - sigmoid(a)
        value[...] = np.concatenate([i, -i, g, o])
    x, (h, c) = draw(rng, layer, *SHAPE)
    wanted, (last_h, last_c) = full(x, (h, c))
    found, (found_h, found_c) = layer(x, (h, c))
    agree(found, wanted, dtype, 500)
    agree(found_h, last_h, dtype, 500)
    agree(found_c, last_c, dtype, 500)


@pytest.mark.parametrize("clip", [0, -1, np.nan, np.inf, "x"])
def test_a_bad_cell_clip_is_named(clip):
    with pytest.raises((TypeError, ValueError), match="cell_clip: expected"):
        fastrnn.LSTM(3, 4, cell_clip=clip)


@pytest.mark.parametrize("kind", [fastrnn.GRU, fastrnn.RNN, fastrnn.LSTM])
def test_an_unknown_option_is_refused(kind):
    with pytest.raises(TypeError, match="reset_befor"):
        kind(3, 4, reset_befor=True)


def test_results_belong_to_their_cell(rng):
    x = rng.standard_normal((3, 2, 3)).astype("f4")
    layers = [
        fastrnn.LSTM(3, 4),
        fastrnn.LSTM(3, 4, cell_clip=1.0),
        fastrnn.LSTM(3, 4, cell_clip=2.0),
        fastrnn.LSTM(3, 4, peephole=True),
    ]
    for layer in layers:
        y, _, saved = layer.forward(x)
        for other in layers:
            if other is not layer:
                with pytest.raises(ValueError, match="saved: expected the result of forward"):
                    other.backward(saved, y)


def test_keys_of_a_peephole_come_last():
    layer = fastrnn.LSTM(3, 4, 2, peephole=True, seed=0)
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_ch"]
    assert list(layer.params) == [f"{name}_l{i}" for i in range(2) for name in names]
    assert layer.params["weight_ch_l1"].shape == (3, 4)
    coupled = fastrnn.LSTM(3, 4, peephole=True, coupled=True)
    assert coupled.params["weight_ch_l0"].shape == (2, 4)
    assert coupled.params["weight_ih_l0"].shape == (12, 3)
