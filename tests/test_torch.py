"""The reference against PyTorch in float64: outputs, states, every gradient, losses, optimisers."""

from __future__ import annotations

import numpy as np
import pytest

from fastrnn.reference import CELLS, loss, optim
from fastrnn.reference.linear import (
    embedding_backward,
    embedding_forward,
    linear_backward,
    linear_forward,
)

torch = pytest.importorskip("torch")

CASES = [
    pytest.param("rnn", {"nonlinearity": "tanh"}, id="rnn-tanh"),
    pytest.param("rnn", {"nonlinearity": "relu"}, id="rnn-relu"),
    pytest.param("gru", {}, id="gru"),
    pytest.param("lstm", {}, id="lstm"),
    pytest.param("lstm_proj", {}, id="lstm-proj"),
]
MODULES = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM", "lstm_proj": "LSTM"}
SHAPES = [(7, 3, 4, 5), (1, 2, 3, 6), (12, 1, 5, 6), (3, 8, 1, 9)]  # T, B, I, H
TOLERANCE = 1e-12  # relative in norm: some thousand roundings of float64


def leaf(array):
    """A copy of the array as a tensor that collects its gradient."""
    return torch.tensor(array, requires_grad=np.issubdtype(array.dtype, np.floating))


def agree(got, tensor, name=""):
    want = tensor.detach().numpy()
    assert got.shape == want.shape, name
    assert np.linalg.norm(want) > 0, f"{name} vanishes: this tests nothing"
    assert np.linalg.norm(got - want) <= TOLERANCE * np.linalg.norm(want), name


def torch_cell(name, options, params, n_in, H):
    """torch.nn.RNN, GRU or LSTM that holds ``params``."""
    if "weight_hr" in params:
        options = {**options, "proj_size": len(params["weight_hr"])}
    with torch.random.fork_rng(devices=[]):  # the module's own initial values draw numbers
        cell = getattr(torch.nn, MODULES[name])(
            n_in, H, bias="bias_ih" in params, dtype=torch.float64, **options
        )
    cell.load_state_dict({f"{key}_l0": torch.tensor(value) for key, value in params.items()})
    return cell


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("tokens", [False, True], ids=["features", "tokens"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["x1", "x1e4"])
def test_reference_cell(name, options, bias, tokens, shape, scale):
    T, B, n_in, H = shape
    if "proj" in name and scale > 1:
        pytest.skip("few sums of shut gates: all of h may be 0")
    P = H - 2 if "proj" in name else H
    reference = CELLS[name.split("_")[0]]
    G, n_states = len(reference.GATES), len(reference.STATES)
    rng = np.random.default_rng(shape)
    params = {
        "weight_ih": rng.standard_normal((G * H, n_in)),
        "weight_hh": rng.standard_normal((G * H, P)) * 0.5,
    }
    if bias:
        params |= {"bias_ih": rng.standard_normal(G * H), "bias_hh": rng.standard_normal(G * H)}
    if "proj" in name:
        params["weight_hr"] = rng.standard_normal((P, H)) * 0.5
    x = rng.integers(n_in, size=(T, B)) if tokens else rng.standard_normal((T, B, n_in)) * scale
    widths = [P, H][:n_states]
    state = tuple(rng.standard_normal((B, width)) * scale for width in widths)
    d_output = rng.standard_normal((T, B, P))
    d_state = tuple(rng.standard_normal((B, width)) for width in widths)

    output, final, saved = reference.forward(params, x, state, **options)
    d_x, d_state_0, grads = reference.backward(params, saved, d_output, d_state)

    cell = torch_cell(name, options, params, n_in, H)
    x_t = leaf(np.eye(n_in)[x] if tokens else x)
    state_t = [leaf(s[None]) for s in state]
    output_t, final_t = cell(x_t, tuple(state_t) if n_states == 2 else state_t[0])
    final_t = final_t if n_states == 2 else (final_t,)
    objective = (output_t * torch.tensor(d_output)).sum()
    for s, d_s in zip(final_t, d_state, strict=True):
        objective = objective + (s * torch.tensor(d_s)).sum()

    agree(output, output_t, "output")
    for key, got, want in zip(reference.STATES, final, final_t, strict=True):
        agree(got, want[0], f"final {key}")
    if scale != 1:
        return  # gates saturate: gradients are differences of rounding errors
    objective.backward()
    for key, got, want in zip(reference.STATES, d_state_0, state_t, strict=True):
        agree(got, want.grad[0], f"initial {key}")
    assert set(grads) == {key.removesuffix("_l0") for key, _ in cell.named_parameters()}
    for key, got in grads.items():
        agree(got, getattr(cell, f"{key}_l0").grad, key)
    if not tokens:
        agree(d_x, x_t.grad, "x")


@pytest.mark.parametrize("name", ["gru", "lstm", "lstm_proj"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("tokens", [False, True], ids=["features", "tokens"])
@pytest.mark.parametrize("noise", [False, True], ids=["plain", "noise"])
def test_reference_normalised_cell(name, bias, tokens, noise):
    T, B, n_in, H = SHAPES[0]
    P = H - 2 if "proj" in name else H
    reference = CELLS[name.split("_")[0]]
    rows, widths = len(reference.GATES) * H, [P, H][: len(reference.STATES)]
    rng = np.random.default_rng(0)
    params = {"weight_ih": rng.standard_normal((rows, n_in))}
    params["weight_hh"] = rng.standard_normal((rows, P)) * 0.5
    if bias:
        params |= {"bias_ih": rng.standard_normal(rows), "bias_hh": rng.standard_normal(rows)}
    if "proj" in name:
        params["weight_hr"] = rng.standard_normal((P, H)) * 0.5
    params |= {"norm_ih": rng.standard_normal(rows), "norm_hh": rng.standard_normal(rows)}
    if "lstm" in name:
        params["norm_c"] = rng.standard_normal((2, H))
    x = rng.integers(n_in, size=(T, B)) if tokens else rng.standard_normal((T, B, n_in))
    state, d_state = (tuple(rng.standard_normal((B, w)) for w in widths) for _ in range(2))
    d_output = rng.standard_normal((T, B, P))
    mask, zone = np.ones((B, P)), np.zeros((T, B, P))
    if noise:
        mask, zone = rng.uniform(size=mask.shape), rng.uniform(size=zone.shape)

    options = {"mask": mask, "zone": zone} if noise else {}
    output, final, saved = reference.forward(params, x, state, **options)
    d_x, d_state_0, grads = reference.backward(params, saved, d_output, d_state)

    p = {key: leaf(value) for key, value in params.items()}
    x_t, state_t = leaf(np.eye(n_in)[x] if tokens else x), [leaf(s) for s in state]
    output_t, final_t = normalised(p, x_t, state_t, torch.tensor(mask), torch.tensor(zone))
    objective = (output_t * torch.tensor(d_output)).sum()
    for s, d_s in zip(final_t, d_state, strict=True):
        objective = objective + (s * torch.tensor(d_s)).sum()
    objective.backward()
    agree(output, output_t, "output")
    for key, s, s_t, d_s, begun in zip(
        reference.STATES, final, final_t, d_state_0, state_t, strict=True
    ):
        agree(s, s_t, f"final {key}")
        agree(d_s, begun.grad, f"initial {key}")
    assert grads.keys() == p.keys()
    for key, got in grads.items():
        agree(got, p[key].grad, key)
    if not tokens:
        agree(d_x, x_t.grad, "x")


def normalised(p, x, state, mask, zone):
    """Outputs and final state of a GRU, or of an LSTM if ``state`` has two parts."""

    def norm(v):
        return torch.nn.functional.layer_norm(v, v.shape[-1:], eps=1e-5)

    h, outputs = state[0], []
    c = state[1] if len(state) == 2 else None
    for x_t, zone_t in zip(x, zone, strict=True):
        a_x = p["norm_ih"] * norm(x_t @ p["weight_ih"].T) + p.get("bias_ih", 0)
        a_h = p["norm_hh"] * norm((mask * h) @ p["weight_hh"].T) + p.get("bias_hh", 0)
        if c is None:
            (r_x, z_x, n_x), (r_h, z_h, n_h) = a_x.chunk(3, dim=1), a_h.chunk(3, dim=1)
            r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
            new = (1 - z) * torch.tanh(n_x + r * n_h) + z * h
        else:
            i, f, g, o = (a_x + a_h).chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            new = torch.sigmoid(o) * torch.tanh(p["norm_c"][0] * norm(c) + p["norm_c"][1])
            new = new @ p["weight_hr"].T if "weight_hr" in p else new
        h = zone_t * h + (1 - zone_t) * new
        outputs.append(h)
    return torch.stack(outputs), [h] if c is None else [h, c]


@pytest.mark.parametrize("scale", [1, 30])
def test_reference_softmax_cross_entropy(scale):
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((6, 5)) * scale, rng.integers(5, size=6)
    losses, d_logits = loss.softmax_cross_entropy(logits, targets)
    logits_t = leaf(logits)
    losses_t = torch.nn.functional.cross_entropy(logits_t, leaf(targets), reduction="none")
    losses_t.sum().backward()
    agree(losses, losses_t)
    agree(d_logits, logits_t.grad)


@pytest.mark.parametrize("scale", [1, 30])
def test_reference_logistic_loss(scale):
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((6, 5)) * scale, rng.random((6, 5))
    losses, d_logits = loss.logistic_loss(logits, targets)
    logits_t = leaf(logits)
    losses_t = torch.nn.functional.binary_cross_entropy_with_logits(
        logits_t, torch.tensor(targets), reduction="none"
    )
    losses_t.sum().backward()
    agree(losses, losses_t)
    agree(d_logits, logits_t.grad)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_reference_linear(bias):
    rng = np.random.default_rng(0)
    params = {"weight": rng.standard_normal((4, 3))}
    if bias:
        params["bias"] = rng.standard_normal(4)
    x, d_output = rng.standard_normal((5, 2, 3)), rng.standard_normal((5, 2, 4))
    output, saved = linear_forward(params, x)
    d_x, grads = linear_backward(params, saved, d_output)
    x_t, params_t = leaf(x), {key: leaf(value) for key, value in params.items()}
    output_t = torch.nn.functional.linear(x_t, **params_t)
    output_t.backward(torch.tensor(d_output))
    agree(output, output_t)
    agree(d_x, x_t.grad)
    for key, got in grads.items():
        agree(got, params_t[key].grad, key)


def test_reference_embedding():
    rng = np.random.default_rng(0)
    params = {"weight": rng.standard_normal((4, 3))}
    ids, d_output = rng.integers(4, size=(6, 5)), rng.standard_normal((6, 5, 3))
    output, saved = embedding_forward(params, ids)
    grads = embedding_backward(params, saved, d_output)
    weight_t = leaf(params["weight"])
    output_t = torch.nn.functional.embedding(leaf(ids), weight_t)
    output_t.backward(torch.tensor(d_output))
    agree(output, output_t)
    agree(grads["weight"], weight_t.grad)


@pytest.mark.parametrize(
    ("name", "torch_name", "options"),
    [
        ("sgd", "SGD", {}),
        ("sgd", "SGD", {"momentum": 0.9}),
        ("sgd", "SGD", {"momentum": 0.9, "weight_decay": 0.1}),
        ("rmsprop", "RMSprop", {}),
        ("rmsprop", "RMSprop", {"alpha": 0.9, "eps": 1e-3}),
        ("adagrad", "Adagrad", {}),
        ("adagrad", "Adagrad", {"eps": 1e-3}),
        ("adam", "Adam", {}),
        ("adam", "Adam", {"betas": (0.5, 0.8), "eps": 1e-3, "weight_decay": 0.1}),
        ("adamw", "AdamW", {}),
        ("adamw", "AdamW", {"betas": (0.5, 0.8), "eps": 1e-3, "weight_decay": 0.1}),
    ],
    ids=str,
)
def test_reference_optimiser(name, torch_name, options):
    rng = np.random.default_rng(0)
    p, state = rng.standard_normal((4, 3)), {}
    p_t = torch.nn.Parameter(torch.tensor(p))
    optimiser = getattr(torch.optim, torch_name)([p_t], lr=0.05, **options)
    for _ in range(5):
        g = rng.standard_normal((4, 3))
        p_t.grad = torch.tensor(g)
        optimiser.step()
        p, state = getattr(optim, name)(p, g, state, lr=0.05, **options)
        agree(p, p_t)
    for key, value in optimiser.state[p_t].items():
        if value is not None and value.ndim:
            agree(state[key], value, key)
    assert state["step"] == 5
