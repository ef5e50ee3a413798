"""The reference is proved here: every gradient against central differences in float64."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

import fastrnn.reference
from fastrnn.reference import CELLS, loss, optim
from fastrnn.reference.linear import (
    embedding_backward,
    embedding_forward,
    linear_backward,
    linear_forward,
)

CLIP = {"clip": 0.4}
CASES = [
    ("rnn", {"nonlinearity": "tanh"}),
    ("rnn", {"nonlinearity": "relu"}),
    *((name, {}) for name in CELLS if name != "rnn"),
    ("lstm", {"coupled": True}),
    ("lstm", CLIP),
    ("lstm_peephole", {}),
    ("lstm_peephole", {"coupled": True, **CLIP}),
]
# With weight_ch among the parameters or not.
CELLS = {**CELLS, "lstm_peephole": CELLS["lstm"]}
# T, B, I, H
SHAPES = [(1, 1, 1, 1), (1, 3, 4, 2), (5, 1, 3, 4), (4, 3, 1, 5), (6, 2, 5, 1), (7, 3, 4, 5)]
each_case = pytest.mark.parametrize(
    ("name", "options"),
    CASES,
    ids=["-".join([name, *map(str, options.values())]) for name, options in CASES],
)
each_seed = pytest.mark.parametrize("seed", [0, 1])
each_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
each_input = pytest.mark.parametrize("tokens", [False, True], ids=["features", "tokens"])

STEP = 1e-5  # of the central differences; truncation and rounding both stay near 1e-10
KINK = 1e-3  # relu pre-activations stay this far from 0, far more than STEP can move them


def relative_error(got, want):
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def numeric_gradient(f, arrays, name):
    """df/d arrays[name] by central differences."""
    gradient = np.empty_like(arrays[name])
    for index in np.ndindex(gradient.shape):
        ends = []
        for step in (STEP, -STEP):
            moved = arrays[name].copy()
            moved[index] += step
            ends.append(f({**arrays, name: moved}))
        gradient[index] = (ends[0] - ends[1]) / (2 * STEP)
    return gradient


def check_gradients(f, arrays, gradients):
    """Every array of ``gradients`` is df of the array of the same name, and none is near zero."""
    for name, got in gradients.items():
        want = numeric_gradient(f, arrays, name)
        assert np.linalg.norm(want) > 1e-3, f"the gradient of {name} vanishes: this tests nothing"
        assert relative_error(got, want) <= 1e-6, name


def frozen(*arrays):
    """The arrays, read-only: a reference that wrote to an argument would raise."""
    for array in arrays:
        array.flags.writeable = False
    return arrays


def draw(name, options, rng, shape, bias, tokens, dtype=np.float64):
    """Random params, x, state, d_output and d_state of one cell, read-only."""
    T, B, n_in, H = shape
    G = len(CELLS[name].GATES) - options.get("coupled", False)

    def normal(*size, scale=1.0):
        return frozen((rng.standard_normal(size) * scale).astype(dtype))[0]

    params = {
        "weight_ih": normal(G * H, n_in, scale=0.5),
        "weight_hh": normal(G * H, H, scale=0.5),
    }
    if bias:
        params |= {"bias_ih": normal(G * H, scale=0.5), "bias_hh": normal(G * H, scale=0.5)}
    if name == "lstm_peephole":
        params["weight_ch"] = normal(G - 1, H)
    x = frozen(rng.integers(n_in, size=(T, B)))[0] if tokens else normal(T, B, n_in)
    state, d_state = (tuple(normal(B, H) for _ in CELLS[name].STATES) for _ in range(2))
    return params, x, state, normal(T, B, H), d_state


def draw_smooth(name, options, seed, shape, bias, tokens):
    """A draw whose relu, if there is one, is alive at the first step and away from its kink."""
    rng = np.random.default_rng([seed, *shape])
    for _ in range(1000):
        problem = draw(name, options, rng, shape, bias, tokens)
        params, x, state, *_ = problem
        if "clip" in options:
            _, _, saved = CELLS[name].forward(params, x, state, **options)
            c = np.abs(saved["f"] * saved["c"][:-1] + saved["i"] * saved["g"])
            # Some are cut off, and from each initial state something comes through.
            through, cut = (c < options["clip"]).all(axis=0), c > options["clip"]
            enough = through.any() and (cut.any() or c.size < 8)
            if np.abs(c - options["clip"]).min() > KINK and enough:
                return problem
            continue
        if options.get("nonlinearity") != "relu":
            return problem
        output, _, _ = CELLS[name].forward(params, x, state, **options)
        h = np.concatenate([state[0][None], output[:-1]])
        a_x = params["weight_ih"].T[x] if tokens else x @ params["weight_ih"].T
        a = a_x + h @ params["weight_hh"].T + params.get("bias_ih", 0) + params.get("bias_hh", 0)
        if np.abs(a).min() > KINK and (a[0] > 0).any():
            return problem
    raise AssertionError("no draw away from the kink")


@each_case
@each_seed
@each_bias
@each_input
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cell_gradients(name, options, seed, bias, tokens, shape):
    cell = CELLS[name]
    params, x, state, d_output, d_state = draw_smooth(name, options, seed, shape, bias, tokens)
    arrays = {"x": x, **dict(zip(cell.STATES, state, strict=True)), **params}

    def f(arrays):
        state = tuple(arrays[s] for s in cell.STATES)
        output, state, _ = cell.forward(
            {k: arrays[k] for k in params}, arrays["x"], state, **options
        )
        return np.vdot(output, d_output) + sum(map(np.vdot, state, d_state))

    _, _, saved = cell.forward(params, x, state, **options)
    d_x, d_state_0, grads = cell.backward(params, saved, d_output, d_state)
    assert list(grads) == list(params)
    gradients = {**dict(zip(cell.STATES, d_state_0, strict=True)), **grads}
    if tokens:
        assert d_x is None
    else:
        gradients["x"] = d_x
    check_gradients(f, arrays, gradients)


@each_case
@each_bias
def test_tokens_are_one_hot_rows(name, options, bias):
    cell = CELLS[name]
    rng = np.random.default_rng(2)
    params, x, state, d_output, d_state = draw(name, options, rng, (9, 4, 3, 5), bias, tokens=True)
    runs = []
    for x_form in (x, np.eye(3)[x]):
        output, final, saved = cell.forward(params, x_form, state, **options)
        _, d_state_0, grads = cell.backward(params, saved, d_output, d_state)
        runs.append([output, *final, *d_state_0, *grads.values()])
    for got, want in zip(*runs, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@each_case
def test_no_bias_is_zero_bias(name, options):
    cell = CELLS[name]
    rng = np.random.default_rng(8)
    params, x, state, *_ = draw(name, options, rng, (3, 2, 4, 5), False, False)
    zeros = np.zeros(len(params["weight_hh"]))
    output, final, _ = cell.forward(params, x, state, **options)
    with_zeros = cell.forward({**params, "bias_ih": zeros, "bias_hh": zeros}, x, state, **options)
    for got, want in zip((output, *final), (with_zeros[0], *with_zeros[1]), strict=True):
        np.testing.assert_array_equal(got, want)


@each_case
@each_bias
@each_input
def test_sequence_equals_its_pieces(name, options, bias, tokens):
    cell = CELLS[name]
    rng = np.random.default_rng(3)
    params, x, state_0, d_output, d_final = draw(name, options, rng, (11, 3, 4, 5), bias, tokens)
    output, final, saved = cell.forward(params, x, state_0, **options)
    d_x, d_state_0, grads = cell.backward(params, saved, d_output, d_final)

    pieces = [slice(0, 4), slice(4, 5), slice(5, 11)]
    state, outputs, tape = state_0, [], []
    for piece in pieces:
        out, state, saved = cell.forward(params, x[piece], state, **options)
        outputs.append(out)
        tape.append(saved)
    d_state, d_xs, sums = d_final, [], {key: np.zeros_like(p) for key, p in params.items()}
    for piece, saved in zip(reversed(pieces), reversed(tape), strict=True):
        d_x_piece, d_state, grads_piece = cell.backward(params, saved, d_output[piece], d_state)
        d_xs.insert(0, d_x_piece)
        for key, grad in grads_piece.items():
            sums[key] += grad

    assert relative_error(np.concatenate(outputs), output) <= 1e-12
    for got, want in zip((*state, *d_state), (*final, *d_state_0), strict=True):
        assert relative_error(got, want) <= 1e-12
    for key, want in grads.items():
        assert relative_error(sums[key], want) <= 1e-12, key
    if tokens:
        assert d_x is None
    else:
        assert relative_error(np.concatenate(d_xs), d_x) <= 1e-12


@each_case
@each_input
def test_empty_sequence_passes_the_state_through(name, options, tokens):
    cell = CELLS[name]
    rng = np.random.default_rng(4)
    params, x, state, d_output, d_state = draw(name, options, rng, (0, 2, 3, 4), True, tokens)
    output, final, saved = cell.forward(params, x, state, **options)
    d_x, d_state_0, grads = cell.backward(params, saved, d_output, d_state)
    assert output.shape == (0, 2, 4)
    assert d_x is None if tokens else d_x.shape == (0, 2, 3)
    for got, want in zip((*final, *d_state_0), (*state, *d_state), strict=True):
        np.testing.assert_array_equal(got, want)
    assert not any(grad.any() for grad in grads.values())


@each_case
@each_input
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_is_that_of_the_params(name, options, tokens, dtype):
    cell = CELLS[name]
    rng = np.random.default_rng(5)
    params, x, state, d_output, d_state = draw(
        name, options, rng, (3, 2, 4, 5), True, tokens, dtype
    )
    output, final, saved = cell.forward(params, x, state, **options)
    d_x, d_state_0, grads = cell.backward(params, saved, d_output, d_state)
    results = [output, *final, *d_state_0, *grads.values()] + ([] if tokens else [d_x])
    assert {array.dtype for array in results} == {np.dtype(dtype)}


@each_case
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("large", ["x", "state", "both"])
def test_extreme_input_stays_finite_and_silent(name, options, dtype, large):
    cell = CELLS[name]
    rng = np.random.default_rng(6)
    params, x, state, d_output, d_state = draw(name, options, rng, (5, 4, 3, 6), True, False, dtype)
    if large != "state":
        x = np.where(x > 0, dtype(1e4), dtype(-1e4))
    if large != "x":
        state = tuple(np.where(s > 0, dtype(1e4), dtype(-1e4)) for s in state)
    output, final, saved = cell.forward(params, x, state, **options)
    d_x, d_state_0, grads = cell.backward(params, saved, d_output, d_state)
    for array in (output, *final, d_x, *d_state_0, *grads.values()):
        assert np.isfinite(array).all()
    if name == "lstm" or options.get("nonlinearity") == "tanh":
        assert np.abs(output).max() <= 1


@each_case
def test_nan_stays_in_its_row(name, options):
    cell = CELLS[name]
    rng = np.random.default_rng(7)
    params, x, state, d_output, d_state = draw(name, options, rng, (5, 4, 3, 6), True, False)
    others = [0, 1, 3]
    poisoned = x.copy()
    poisoned[2, 2] = np.nan
    runs = []
    for x_form in (x, poisoned):
        output, final, saved = cell.forward(params, x_form, state, **options)
        d_x, d_state_0, _ = cell.backward(params, saved, d_output, d_state)
        runs.append((output, d_x, *final, *d_state_0))
    clean, dirty = runs
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a[..., others, :], b[..., others, :])
    output, final = dirty[0], dirty[2]
    np.testing.assert_array_equal(output[:2], clean[0][:2])
    assert np.isnan(output[2:, 2]).all()
    assert np.isnan(final[2]).all()


def test_sigmoid():
    x = np.linspace(0, 700, 1401)
    np.testing.assert_allclose(loss.sigmoid(x), 1 / (1 + np.exp(-x)), rtol=1e-15)
    np.testing.assert_allclose(loss.sigmoid(-x), np.exp(-x) / (1 + np.exp(-x)), rtol=1e-13)
    for dtype in (np.float32, np.float64):
        extreme = np.array([-np.inf, -1e4, 0, 1e4, np.inf, np.nan], dtype)
        got = loss.sigmoid(extreme)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, [0, 0, 0.5, 1, 1, np.nan])


@each_seed
@pytest.mark.parametrize(("N", "V"), [(1, 2), (1, 7), (5, 3)])
def test_softmax_cross_entropy_gradient(seed, N, V):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((N, V)) * 2
    targets = rng.integers(V, size=N)
    losses, d_logits = loss.softmax_cross_entropy(*frozen(logits, targets))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(losses, -np.log(p[np.arange(N), targets]), rtol=1e-12)

    def f(arrays):
        return loss.softmax_cross_entropy(arrays["logits"], targets)[0].sum()

    check_gradients(f, {"logits": logits}, {"logits": d_logits})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softmax_cross_entropy_at_extreme_logits(dtype):
    logits = np.array([[1e4, -1e4], [1e4, -1e4], [1e4, 1e4], [-1e4, -1e4]], dtype)
    losses, d_logits = loss.softmax_cross_entropy(logits, np.array([0, 1, 0, 1]))
    assert losses.dtype == d_logits.dtype == dtype
    np.testing.assert_allclose(losses, [0, 2e4, np.log(2), np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(d_logits, [[0, 0], [1, -1], [-0.5, 0.5], [0.5, -0.5]], rtol=1e-6)


def test_softmax_cross_entropy_keeps_nan_in_its_row():
    logits = np.array([[0.0, 1.0], [np.nan, 1.0], [2.0, 1.0]])
    losses, d_logits = loss.softmax_cross_entropy(logits, np.array([0, 0, 1]))
    np.testing.assert_array_equal(np.isnan(losses), [False, True, False])
    np.testing.assert_array_equal(np.isnan(d_logits).any(axis=1), [False, True, False])


@each_seed
@pytest.mark.parametrize("shape", [(1,), (6,), (3, 4)])
def test_logistic_loss_gradient(seed, shape):
    rng = np.random.default_rng(seed)
    logits, targets = frozen(rng.standard_normal(shape) * 2, rng.random(shape))
    losses, d_logits = loss.logistic_loss(logits, targets)
    p = 1 / (1 + np.exp(-logits))
    want = -targets * np.log(p) - (1 - targets) * np.log(1 - p)
    np.testing.assert_allclose(losses, want, rtol=1e-12)

    def f(arrays):
        return loss.logistic_loss(arrays["logits"], targets)[0].sum()

    check_gradients(f, {"logits": logits}, {"logits": d_logits})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logistic_loss_at_extreme_logits(dtype):
    logits = np.array([1e4, 1e4, -1e4, -1e4, 40], dtype)
    losses, d_logits = loss.logistic_loss(logits, np.array([0, 1, 0, 1, 1]))
    assert losses.dtype == d_logits.dtype == dtype
    np.testing.assert_allclose(losses, [1e4, 0, 0, 1e4, np.exp(-40.0)], rtol=1e-6)
    np.testing.assert_allclose(d_logits, [1, 0, 0, -1, -np.exp(-40.0)], rtol=1e-6)


@each_seed
@each_bias
@pytest.mark.parametrize("lead", [(), (3,), (4, 2)], ids=str)
@pytest.mark.parametrize(("n_in", "n_out"), [(1, 1), (1, 4), (5, 1), (3, 4)])
def test_linear_gradients(seed, bias, lead, n_in, n_out):
    rng = np.random.default_rng(seed)
    params = {"weight": rng.standard_normal((n_out, n_in))}
    if bias:
        params["bias"] = rng.standard_normal(n_out)
    x, d_output = frozen(rng.standard_normal((*lead, n_in)), rng.standard_normal((*lead, n_out)))
    output, saved = linear_forward(params, x)
    d_x, grads = linear_backward(params, saved, d_output)
    product = np.einsum("oi,...i->...o", params["weight"], x)
    np.testing.assert_allclose(output, product + params["bias"] if bias else product, rtol=1e-12)
    assert list(grads) == list(params)

    def f(arrays):
        output, _ = linear_forward({key: arrays[key] for key in params}, arrays["x"])
        return np.vdot(output, d_output)

    check_gradients(f, {"x": x, **params}, {"x": d_x, **grads})


@each_seed
@pytest.mark.parametrize("lead", [(1,), (7,), (5, 3)], ids=str)
@pytest.mark.parametrize(("V", "E"), [(1, 1), (4, 3)])
def test_embedding_gradient(seed, lead, V, E):
    rng = np.random.default_rng(seed)
    params = {"weight": rng.standard_normal((V, E))}
    ids, d_output = frozen(rng.integers(V, size=lead), rng.standard_normal((*lead, E)))
    output, saved = embedding_forward(params, ids)
    grads = embedding_backward(params, saved, d_output)
    np.testing.assert_array_equal(output, np.eye(V)[ids] @ params["weight"])

    def f(arrays):
        return np.vdot(embedding_forward(arrays, ids)[0], d_output)

    check_gradients(f, params, grads)


FIRST_STEPS = {  # new p after one step from p = 2, g = -4, lr = 0.5
    "sgd": 2 + 0.5 * 4,
    "rmsprop": 2 + 0.5 * 4 / (0.1 * 4 + 1e-8),
    "adagrad": 2 + 0.5 * 4 / (4 + 1e-10),
    "adam": 2 + 0.5 * 4 / (4 + 1e-8),
    "adamw": 2 * (1 - 0.5 * 0.01) + 0.5 * 4 / (4 + 1e-8),
}


@pytest.mark.parametrize("name", FIRST_STEPS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_optimiser_step(name, dtype):
    step = getattr(optim, name)
    p, g = frozen(np.full((2, 3), 2, dtype), np.full((2, 3), -4, dtype))
    nothing = {}
    p_1, state_1 = step(p, g, nothing, lr=0.5)
    np.testing.assert_allclose(p_1, FIRST_STEPS[name], rtol=1e-6 if dtype == np.float32 else 1e-12)
    assert nothing == {}
    assert state_1["step"] == 1
    before = {key: np.copy(value) for key, value in state_1.items()}
    p_2, state_2 = step(p_1, g, state_1, lr=0.5)
    assert state_2["step"] == 2
    for key, value in before.items():
        np.testing.assert_array_equal(state_1[key], value)
    arrays = [p_1, p_2, *(state_2[key] for key in state_2 if key != "step")]
    assert {(array.dtype, array.shape) for array in arrays} == {(np.dtype(dtype), (2, 3))}


def test_reference_imports_only_numpy_and_itself():
    allowed = {"__future__", "collections", "numpy", "types", "typing"}
    files = list(Path(fastrnn.reference.__file__).parent.glob("*.py"))
    assert len(files) >= 7
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, file
                modules = [node.module or ""]
            else:
                continue
            for module in modules:
                own = module == "fastrnn.reference" or module.startswith("fastrnn.reference.")
                assert own or module.split(".")[0] in allowed, (file, module)
