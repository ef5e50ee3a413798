"""The reference is proved here: every gradient against central differences in float64."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

import fastrnn.reference
from fastrnn.reference import CELLS, loss, masks, optim
from fastrnn.reference.linear import (
    embedding_backward,
    embedding_forward,
    linear_backward,
    linear_forward,
)
from fastrnn.reference.norm import norm_backward, norm_forward

CLIP = {"clip": 0.4}
MASK, ZONE = {"mask": "drawn"}, {"zone": "drawn"}
EXPECTED = {"zone": 0.3}
PLAIN = [
    ("rnn", {"nonlinearity": "tanh"}),
    ("rnn", {"nonlinearity": "relu"}),
    *((name, {}) for name in CELLS if name != "rnn"),
]
BASIC = [
    *PLAIN,
    ("lstm", {"coupled": True}),
    ("lstm", CLIP),
    ("lstm_peephole", {}),
    ("lstm_peephole", {"coupled": True, **CLIP}),
]
VARIANTS = [
    ("gru_norm", {}),
    ("lstm_norm", {}),
    ("lstm_norm", {"coupled": True}),
    ("lstm_norm", CLIP),
    ("lstm_peephole_norm", {}),
    ("lstm_proj", {}),
    ("lstm_proj", {"coupled": True}),
    ("lstm_proj", CLIP),
    ("lstm_peephole_proj", {}),
    ("lstm_proj_norm", {}),
    ("lstm_peephole_proj_norm", {"coupled": True, **CLIP}),
]
NOISES = [MASK, ZONE, EXPECTED, MASK | ZONE]
NOISY = [
    *((name, options | noise) for name, options in PLAIN for noise in NOISES),
    *((name, noise) for name in ("gru_norm", "lstm_norm", "lstm_proj") for noise in NOISES),
    ("lstm_peephole", MASK | ZONE),
    ("lstm_proj_norm", MASK | ZONE),
    ("lstm_peephole_proj", {"coupled": True, **CLIP, **MASK, **ZONE}),
    ("lstm_peephole_norm", {**CLIP, **MASK, **ZONE}),
    ("lstm_peephole_proj_norm", {"coupled": True, **CLIP, **MASK, **EXPECTED}),
]
# What stands behind a cell in these names is parameters beside the usual ones.
CELLS = {**{name: CELLS[name.split("_")[0]] for name, _ in BASIC + VARIANTS}, **CELLS}
# T, B, I, H
SHAPES = [(1, 1, 1, 1), (1, 3, 4, 2), (5, 1, 3, 4), (4, 3, 1, 5), (6, 2, 5, 1), (7, 3, 4, 5)]
FEWER = [(1, 3, 4, 2), (5, 1, 3, 4), (4, 3, 1, 5), (6, 2, 5, 1), (3, 2, 4, 5)]
# Of one number norm knows the sign alone, and of two which is larger: their gradients vanish.
WIDER = [(1, 3, 4, 3), (5, 1, 3, 4), (3, 2, 4, 5)]
PROBLEMS = [
    *((*case, seed, shape) for case in BASIC for seed in (0, 1) for shape in SHAPES),
    *(
        (*case, 0, shape)
        for case in VARIANTS + NOISY
        for shape in (WIDER if "norm" in case[0] else FEWER)
    ),
]


def label(name, options, *more):
    return "-".join([name, *(f"{key}={value}" for key, value in options.items()), *map(str, more)])


def each(cases):
    return pytest.mark.parametrize(("name", "options"), cases, ids=[label(*case) for case in cases])


each_case = each(BASIC + VARIANTS + NOISY)
each_silent_case = each(BASIC + VARIANTS)
each_problem = pytest.mark.parametrize(
    ("name", "options", "seed", "shape"), PROBLEMS, ids=[label(*problem) for problem in PROBLEMS]
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
    """Random params, x, state, d_output, d_state and options of one cell, read-only."""
    T, B, n_in, H = shape
    G = len(CELLS[name].GATES) - options.get("coupled", False)
    P = H
    if "proj" in name:
        P = H - 1 if H > 1 else 2
    widths = [P, H][: len(CELLS[name].STATES)]

    def normal(*size, scale=1.0):
        return frozen((rng.standard_normal(size) * scale).astype(dtype))[0]

    params = {
        "weight_ih": normal(G * H, n_in, scale=0.5),
        "weight_hh": normal(G * H, P, scale=0.5),
    }
    if bias:
        params |= {"bias_ih": normal(G * H, scale=0.5), "bias_hh": normal(G * H, scale=0.5)}
    if "peephole" in name:
        params["weight_ch"] = normal(G - 1, H)
    if "proj" in name:
        params["weight_hr"] = normal(P, H)
    if "norm" in name:
        params |= {"norm_ih": normal(G * H), "norm_hh": normal(G * H)}
        if "lstm" in name:
            params["norm_c"] = normal(2, H)
    x = frozen(rng.integers(n_in, size=(T, B)))[0] if tokens else normal(T, B, n_in)
    state, d_state = (tuple(normal(B, width) for width in widths) for _ in range(2))
    d_output = normal(T, B, P)
    if options.get("mask") == "drawn":
        mask = rng.uniform(0.5, 2, (B, P)) * (rng.random((B, P)) < 0.6)
        mask[:, :2] = 1.5  # of every h something is seen
        options = {**options, "mask": frozen(mask)[0]}
    if options.get("zone") == "drawn":
        zone = (rng.random((T, B, P)) < 0.4).astype(np.float64)
        zone[:1, 0, 0] = 0  # something is new
        options = {**options, "zone": frozen(zone)[0]}
    return params, x, state, d_output, d_state, options


def draw_smooth(name, options, seed, shape, bias, tokens):
    """A draw whose relu, if there is one, is alive at the first step and away from its kink."""
    rng = np.random.default_rng([seed, *shape])
    for _ in range(1000):
        problem = draw(name, options, rng, shape, bias, tokens)
        if "clip" not in options and options.get("nonlinearity") != "relu":
            return problem
        params, x, state, *_, drawn = problem
        saved = CELLS[name].forward(params, x, state, **drawn)[2]
        if "clip" in options:
            c = np.abs(saved["f"] * saved["c"][:-1] + saved["i"] * saved["g"])
            # Some are cut off, and from each initial state something comes through.
            through, cut = (c < options["clip"]).all(axis=0), c > options["clip"]
            enough = through.any() and (cut.any() or c.size < 8)
            if np.abs(c - options["clip"]).min() > KINK and enough:
                return problem
            continue
        h = saved["mask"] * saved["h"][:-1]
        a_x = params["weight_ih"].T[x] if tokens else x @ params["weight_ih"].T
        a = a_x + h @ params["weight_hh"].T + params.get("bias_ih", 0) + params.get("bias_hh", 0)
        if np.abs(a).min() > KINK and ((a[0] > 0) & (saved["zone"][0] < 1)).any():
            return problem
    raise AssertionError("no draw away from the kink")


def results(cell, problem, **changes):
    """Every array that forward and backward give, with these options changed."""
    params, x, state, d_output, d_state, options = problem
    output, final, saved = cell.forward(params, x, state, **{**options, **changes})
    d_x, d_state_0, grads = cell.backward(params, saved, d_output, d_state)
    assert list(grads) == list(params)
    found = {"output": output, **grads}
    found |= {f"final {s}": array for s, array in zip(cell.STATES, final, strict=True)}
    found |= {f"d_{s} initial": array for s, array in zip(cell.STATES, d_state_0, strict=True)}
    return found if d_x is None else {**found, "d_x": d_x}


@each_problem
@each_bias
@each_input
def test_cell_gradients(name, options, seed, shape, bias, tokens):
    cell = CELLS[name]
    params, x, state, d_output, d_state, options = draw_smooth(
        name, options, seed, shape, bias, tokens
    )
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
    params, x, state, d_output, d_state, options = draw(
        name, options, rng, (9, 4, 3, 5), bias, tokens=True
    )
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
    params, x, state, *_, options = draw(name, options, rng, (3, 2, 4, 5), False, False)
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
    params, x, state_0, d_output, d_final, options = draw(
        name, options, rng, (11, 3, 4, 5), bias, tokens
    )
    output, final, saved = cell.forward(params, x, state_0, **options)
    d_x, d_state_0, grads = cell.backward(params, saved, d_output, d_final)

    pieces = [slice(0, 4), slice(4, 5), slice(5, 11)]
    state, outputs, tape = state_0, [], []
    for piece in pieces:
        zone = options.get("zone", 0)
        ours = {**options, "zone": zone[piece]} if np.ndim(zone) else options
        out, state, saved = cell.forward(params, x[piece], state, **ours)
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
    params, x, state, d_output, d_state, options = draw(
        name, options, rng, (0, 2, 3, 4), True, tokens
    )
    output, final, saved = cell.forward(params, x, state, **options)
    d_x, d_state_0, grads = cell.backward(params, saved, d_output, d_state)
    assert output.shape == (0, 2, 3 if "proj" in name else 4)
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
    params, x, state, d_output, d_state, options = draw(
        name, options, rng, (3, 2, 4, 5), True, tokens, dtype
    )
    output, final, saved = cell.forward(params, x, state, **options)
    d_x, d_state_0, grads = cell.backward(params, saved, d_output, d_state)
    arrays = [output, *final, *d_state_0, *grads.values()] + ([] if tokens else [d_x])
    assert {array.dtype for array in arrays} == {np.dtype(dtype)}


@each_case
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("large", ["x", "state", "both"])
def test_extreme_input_stays_finite_and_silent(name, options, dtype, large):
    cell = CELLS[name]
    rng = np.random.default_rng(6)
    params, x, state, d_output, d_state, options = draw(
        name, options, rng, (5, 4, 3, 6), True, False, dtype
    )
    if large != "state":
        x = np.where(x > 0, dtype(1e4), dtype(-1e4))
    if large != "x":
        state = tuple(np.where(s > 0, dtype(1e4), dtype(-1e4)) for s in state)
    output, final, saved = cell.forward(params, x, state, **options)
    d_x, d_state_0, grads = cell.backward(params, saved, d_output, d_state)
    for array in (output, *final, d_x, *d_state_0, *grads.values()):
        assert np.isfinite(array).all()
    bounded = name == "lstm" or options.get("nonlinearity") == "tanh"
    if bounded and "zone" not in options:
        assert np.abs(output).max() <= 1


@each_case
def test_nan_stays_in_its_row(name, options):
    cell = CELLS[name]
    rng = np.random.default_rng(7)
    params, x, state, d_output, d_state, options = draw(
        name, options, rng, (5, 4, 3, 6), True, False
    )
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


@each_silent_case
@each_input
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_mask_of_ones_and_zone_of_zeros_change_no_bit(name, options, tokens, dtype):
    cell = CELLS[name]
    rng = np.random.default_rng(9)
    problem = draw(name, options, rng, (5, 3, 4, 6), True, tokens, dtype)
    shape = problem[3].shape
    ones, zeros = np.ones(shape[1:]), np.zeros(shape)
    want = results(cell, problem)
    for changes in (
        {"mask": None, "zone": None},
        {"mask": ones},
        {"zone": zeros},
        {"zone": 0.0},
        {"mask": ones.astype(bool), "zone": zeros.astype(bool)},
    ):
        got = results(cell, problem, **changes)
        assert got.keys() == want.keys()
        for key, array in want.items():
            assert array.any(), f"{key} vanishes: this tests nothing"
            assert got[key].tobytes() == array.tobytes(), key
    for changes in ({"mask": ones * rng.uniform(size=ones.shape)}, {"zone": 0.5}):
        got = results(cell, problem, **changes)
        for key, array in want.items():
            assert (got[key] != array).any(), key


@each_silent_case
def test_zone_of_ones_keeps_the_initial_state(name, options):
    cell = CELLS[name]
    rng = np.random.default_rng(10)
    params, x, state, d_output, d_state, options = draw(
        name, options, rng, (5, 3, 4, 6), True, False
    )
    # The new c is of use, so its gradient is left out first.
    without_c = (d_state[0], *map(np.zeros_like, d_state[1:]))
    for zone in (np.ones(d_output.shape), 1):
        found = results(cell, (params, x, state, d_output, without_c, options), zone=zone)
        np.testing.assert_array_equal(found["output"], np.stack([state[0]] * 5))
        np.testing.assert_array_equal(found["final h"], state[0])
        want = d_state[0] + d_output.sum(axis=0)
        np.testing.assert_allclose(found["d_h initial"], want, rtol=1e-12, atol=1e-12)
        assert not any(found[key].any() for key in (*params, "d_x"))
        if "lstm" in name:
            assert (found["final c"] != state[1]).any()
            assert not found["d_c initial"].any()
            found = results(cell, (params, x, state, d_output, d_state, options), zone=zone)
            assert found["weight_ih"].any()
            assert found["d_c initial"].any()


@each_silent_case
def test_mask_is_on_products_and_zone_on_the_rest(name, options):
    cell = CELLS[name]
    rng = np.random.default_rng(11)
    params, x, state, d_output, _, options = draw(name, options, rng, (1, 3, 4, 6), True, False)
    output, final, _ = cell.forward(params, x, state, **options)
    h = state[0]

    mask = rng.uniform(0, 2, h.shape)
    masked, _, saved = cell.forward(params, x, state, mask=mask, **options)
    seen = cell.forward(params, x, (mask * h, *state[1:]), **options)[0]
    mixed = saved["z"] * (h - mask * h) if "gru" in name else 0
    np.testing.assert_allclose(masked, seen + mixed, rtol=1e-12, atol=1e-12)
    assert np.abs(masked - output).max() > 1e-2

    for zone in (rng.uniform(size=d_output.shape), 0.3):
        zoned, final_zoned, _ = cell.forward(params, x, state, zone=zone, **options)
        np.testing.assert_allclose(zoned, zone * h + (1 - zone) * output, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(final_zoned[0], zoned[0])
        for got, want in zip(final_zoned[1:], final[1:], strict=True):
            np.testing.assert_array_equal(got, want)


@each([case for case in BASIC + NOISY if case[0] in ("lstm", "lstm_peephole")])
def test_projection_by_the_identity_is_none(name, options):
    cell = CELLS[name]
    rng = np.random.default_rng(12)
    params, *rest = draw(name, options, rng, (6, 3, 4, 5), True, False)
    got = results(cell, ({**params, "weight_hr": np.eye(5)}, *rest))
    want = results(cell, (params, *rest))
    assert got.pop("weight_hr").any()
    assert got.keys() == want.keys()
    for key, array in want.items():
        np.testing.assert_allclose(got[key], array, rtol=1e-12, atol=1e-12, err_msg=key)


@each_seed
@pytest.mark.parametrize("scale", [2, 0.1], ids=["large", "small"])
@pytest.mark.parametrize("shape", [(4,), (7,), (3, 4), (2, 3, 5)], ids=str)
def test_norm_gradient(seed, scale, shape):
    rng = np.random.default_rng(seed)
    v, d_normed = frozen(rng.standard_normal(shape) * scale + 1, rng.standard_normal(shape))
    normed, factor = norm_forward(v)
    assert factor.shape == (*shape[:-1], 1)
    centred = v - v.sum(axis=-1, keepdims=True) / shape[-1]
    var = (centred**2).sum(axis=-1, keepdims=True) / shape[-1]
    np.testing.assert_allclose(normed, centred / np.sqrt(var + 1e-5), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(factor, 1 / np.sqrt(var + 1e-5), rtol=1e-10, atol=1e-12)

    def f(arrays):
        return np.vdot(norm_forward(arrays["v"])[0], d_normed)

    check_gradients(f, {"v": v}, {"v": norm_backward(d_normed, normed, factor)})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_norm_of_a_constant(dtype):
    normed, scale = norm_forward(np.full((2, 4), 3, dtype))
    d_v = norm_backward(np.array([[4, 0, 0, 0], [1, 1, 1, 1]], dtype), normed, scale)
    assert normed.dtype == scale.dtype == d_v.dtype == dtype
    np.testing.assert_array_equal(normed, 0)
    np.testing.assert_allclose(scale, 1e5**0.5, rtol=1e-6)
    want = np.array([[3, -1, -1, -1], [0, 0, 0, 0]]) * 1e5**0.5
    np.testing.assert_allclose(d_v, want, rtol=1e-6)


def test_streams_are_those_of_splitmix64():
    assert [masks.stream(1234567, number) for number in range(5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert masks.stream(0, 0) == 0xE220A8397B1DCDAF
    assert masks.stream(0, 1) == 0x6E789E6AA1B965F4
    assert masks.stream(-1, 3) == masks.stream(2**64 - 1, 3) == masks.stream(2**65 - 1, 3)


def test_bits_are_streams_of_streams():
    seed, rows, units = 2**64 - 3, np.arange(4), np.array([0, 3, 2**40])
    found = masks.bits(seed, rows[:, None], units)
    assert found.dtype == np.uint64
    want = [[masks.stream(masks.stream(seed, int(r)), int(u)) for u in units] for r in rows]
    assert found.tolist() == want
    assert int(masks.bits(seed, 2, 3)) == want[2][1]


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5])
def test_masks_are_functions_of_the_place(p):
    seed, units = 2**63 + 12345, 6
    steps, sequences = np.array([4, 0, 9]), np.array([2, 7])

    def drawn(row, column, use, unit):
        key = masks.stream(masks.stream(seed, int(row)), int(column))
        return masks.stream(masks.stream(key, use), int(unit)) >> 11 < int(p * 2**53)

    def scaled(*place):
        return 0 if drawn(*place) else 1 / (1 - p)

    every = range(units)
    for found, want in (
        (
            masks.dropout_mask(seed, steps, sequences, units, p),
            [[[scaled(t, b, 0, u) for u in every] for b in sequences] for t in steps],
        ),
        (
            masks.locked_mask(seed, sequences, units, p),
            [[scaled(0, b, 1, u) for u in every] for b in sequences],
        ),
        (
            masks.zone_mask(seed, steps, sequences, units, p),
            [[[float(drawn(t, b, 2, u)) for u in every] for b in sequences] for t in steps],
        ),
        (
            masks.weight_mask(seed, 5, units, p),
            [[scaled(row, 0, 3, column) for column in every] for row in range(5)],
        ),
    ):
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_draw_as_often_as_they_should(p):
    T, B, units = 20, 50, 40
    steps, sequences = np.arange(T), np.arange(B)
    drawn = [
        masks.dropout_mask(1, steps, sequences, units, p) == 0,
        masks.dropout_mask(2, steps, sequences, units, p) == 0,
        masks.zone_mask(1, steps, sequences, units, p) == 1,
        masks.weight_mask(1, T * B, units, p).reshape(T, B, units) == 0,
        masks.locked_mask(1, np.arange(T * B), units, p).reshape(T, B, units) == 0,
    ]
    error = 5 * (p * (1 - p) / (T * B * units)) ** 0.5
    for i, one in enumerate(drawn):
        assert abs(one.mean() - p) < error
        for other in drawn[:i]:
            assert abs((one & other).mean() - p * p) < error


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
