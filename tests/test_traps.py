"""Where weights and results moved between libraries go wrong unnoticed: one test for each trap."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import as_parts, as_state, same

import fastrnn

KINDS = ["RNN", "GRU", "LSTM"]
each_kind = pytest.mark.parametrize("kind", KINDS)
T, B, n_in, H = 7, 4, 5, 19


def ours(kind, *sizes, seed=0, **options):
    layer = getattr(fastrnn, kind)(*sizes, dtype=np.float64, seed=seed, **options)
    rng = np.random.default_rng(seed)
    for value in layer.params.values():
        value[...] = 0.5 * rng.standard_normal(value.shape)
    return layer


def theirs(torch, layer, **options):
    """PyTorch's layer with the same weights."""
    kind = getattr(torch.nn, type(layer).__name__)
    sizes = layer.input_size, layer.hidden_size, layer.num_layers
    other = kind(*sizes, bidirectional=layer.bidirectional, dtype=torch.float64, **options)
    other.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in layer.params.items()})
    return other


def as_torch(torch, state):
    return as_state(tuple(torch.from_numpy(part) for part in as_parts(state)))


def compare(found, wanted):
    for a, b in zip(as_parts(found), as_parts(wanted), strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-10, atol=1e-12)


@each_kind
def test_1_both_biases_count_each_in_its_place(kind, rng):
    torch = pytest.importorskip("torch")
    layer = ours(kind, n_in, H)
    x = rng.standard_normal((T, B, n_in))
    compare(layer(x)[0], theirs(torch, layer)(torch.from_numpy(x))[0])
    # Merged they are another network where the reset gate scales one of them, the same elsewhere.
    merged = ours(kind, n_in, H)
    merged.params["bias_ih_l0"] += merged.params["bias_hh_l0"]
    merged.params["bias_hh_l0"][...] = 0
    distance = np.abs(merged(x)[0] - layer(x)[0]).max()
    assert distance > 1e-3 if kind == "GRU" else distance < 1e-12


@each_kind
def test_2_no_two_sizes_are_equal(kind, rng):
    torch = pytest.importorskip("torch")
    layer = ours(kind, n_in, H, 2, bidirectional=True)
    x, lengths = rng.standard_normal((T, B, n_in)), [7, 2, 5, 1]
    state = as_state(tuple(rng.standard_normal((4, B, H)) for _ in layer.state_names))
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        torch.from_numpy(x), torch.tensor(lengths), enforce_sorted=False
    )
    y, last = theirs(torch, layer)(packed, as_torch(torch, state))
    y = torch.nn.utils.rnn.pad_packed_sequence(y, total_length=T)[0]
    found, final = layer(x, state, lengths)
    compare(found, y)
    compare(final, last)


def test_3_reset_before_and_after_are_two_networks(rng):
    x = rng.standard_normal((T, B, n_in))
    after = ours("GRU", n_in, H)
    before = ours("GRU", n_in, H, reset_after=False)
    assert np.abs(after(x)[0] - before(x)[0]).max() > 1e-2
    p = {key.removesuffix("_l0"): value for key, value in after.params.items()}
    (W_r, W_z, W_n), (R_r, R_z, R_n) = (np.split(p[k], 3) for k in ("weight_ih", "weight_hh"))
    (b_r, b_z, b_n), (c_r, c_z, c_n) = (np.split(p[k], 3) for k in ("bias_ih", "bias_hh"))
    for layer, linear_before_reset in ((after, 1), (before, 0)):
        # ONNX, operator GRU.
        h = np.zeros((B, H))
        for x_t in x:
            z = 1 / (1 + np.exp(-(x_t @ W_z.T + h @ R_z.T + b_z + c_z)))
            r = 1 / (1 + np.exp(-(x_t @ W_r.T + h @ R_r.T + b_r + c_r)))
            if linear_before_reset:
                n = np.tanh(x_t @ W_n.T + r * (h @ R_n.T + c_n) + b_n)
            else:
                n = np.tanh(x_t @ W_n.T + (r * h) @ R_n.T + c_n + b_n)
            h = (1 - z) * n + z * h
        np.testing.assert_allclose(layer(x)[1][0], h, rtol=1e-10, atol=1e-12)


@each_kind
def test_4_behind_a_sequence_are_zeros_not_its_last_output(kind, rng):
    layer = ours(kind, n_in, H)
    y, last = layer(rng.standard_normal((T, B, n_in)), None, [7, 3, 0, 1])
    assert (y[3:, 1] == 0).all()
    same(as_parts(last)[0][0, 1], y[2, 1])


def test_5_h_comes_before_c(rng):
    torch = pytest.importorskip("torch")
    layer = ours("LSTM", n_in, H)
    x = rng.standard_normal((T, B, n_in))
    h, c = rng.standard_normal((2, 1, B, H))
    found, (last_h, last_c) = layer(x, (h, c))
    wanted, last = theirs(torch, layer)(torch.from_numpy(x), as_torch(torch, (h, c)))
    compare(found, wanted)
    compare((last_h, last_c), last)
    same(last_h[0], found[-1])
    assert np.abs(layer(x, (c, h))[0] - found).max() > 1e-3
    assert np.abs(last_c[0] - found[-1]).max() > 1e-3


@each_kind
def test_6_the_final_state_of_the_reverse_direction_is_at_the_first_step(kind, rng):
    layer = ours(kind, n_in, H, bidirectional=True)
    y, last = layer(rng.standard_normal((T, B, n_in)))
    h = as_parts(last)[0]
    same(h[0], np.ascontiguousarray(y[-1, :, :H]))
    same(h[1], np.ascontiguousarray(y[0, :, H:]))
    assert np.abs(h[1] - y[-1, :, H:]).max() > 1e-3


@each_kind
def test_7_square_weights_are_not_transposed(kind, rng):
    torch = pytest.importorskip("torch")
    layer = ours(kind, H, H, 2)
    x = rng.standard_normal((T, B, H))
    wanted = theirs(torch, layer)(torch.from_numpy(x))[0]
    compare(layer(x)[0], wanted)
    for key in ("weight_ih_l0", "weight_hh_l1"):
        other = ours(kind, H, H, 2)
        gates = other.params[key].reshape(-1, H, H)
        gates[...] = gates.transpose(0, 2, 1).copy()
        assert np.abs(other(x)[0] - layer(x)[0]).max() > 1e-3


@each_kind
def test_8_weights_come_back_as_they_were(kind):
    torch = pytest.importorskip("torch")
    layer = ours(kind, n_in, H, 2, bidirectional=True)
    state = theirs(torch, layer).state_dict()
    again = ours(kind, n_in, H, 2, bidirectional=True, seed=1)
    again.load_state_dict(state)
    assert list(state) == list(layer.params) == list(again.params)
    for key, value in layer.params.items():
        same(again.params[key], value)


@each_kind
def test_9_the_reverse_direction_gives_its_output_in_the_order_of_time(kind, rng):
    both = ours(kind, n_in, H, bidirectional=True)
    alone = ours(kind, n_in, H)
    for key, value in alone.params.items():
        value[...] = both.params[f"{key}_reverse"]
    x = rng.standard_normal((T, B, n_in))
    backwards = alone(np.ascontiguousarray(x[::-1]))[0]
    y = both(x)[0][:, :, H:]
    same(np.ascontiguousarray(y), np.ascontiguousarray(backwards[::-1]))


@each_kind
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 50])
def test_10_sizes_that_fill_no_register(kind, size, rng):
    torch = pytest.importorskip("torch")
    layer = ours(kind, size + 1, size, 2)
    x = rng.standard_normal((T, B, size + 1))
    state = as_state(tuple(rng.standard_normal((2, B, size)) for _ in layer.state_names))
    wanted, last = theirs(torch, layer)(torch.from_numpy(x), as_torch(torch, state))
    found, final = layer(x, state)
    compare(found, wanted)
    compare(final, last)


@each_kind
def test_11_states_never_have_the_batch_first(kind, rng):
    torch = pytest.importorskip("torch")
    layer = ours(kind, n_in, H, 2, batch_first=True)
    x = rng.standard_normal((B, T, n_in))
    state = as_state(tuple(rng.standard_normal((2, B, H)) for _ in layer.state_names))
    other = theirs(torch, layer, batch_first=True)
    wanted, last = other(torch.from_numpy(x), as_torch(torch, state))
    found, final = layer(x, state)
    compare(found, wanted)
    compare(final, last)
    with pytest.raises(ValueError, match="state"):
        layer(x, as_state(tuple(part.swapaxes(0, 1) for part in as_parts(state))))
