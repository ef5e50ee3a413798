"""What recurrent layers say of bad input."""

from __future__ import annotations

import inspect
from fractions import Fraction

import numpy as np
import pytest
from helpers import (
    F4,
    F8,
    OPTIONS,
    each_of,
    frozen,
    same_results,
    says,
    spoilt_arrays,
    zeros,
)

import fastrnn
from fastrnn.cells import CELLS

T, B, n_in, H = 4, 3, 5, 6


@pytest.mark.parametrize("seed", [-1, 1.5, "x"])
def test_a_bad_seed_is_named(seed):
    model = fastrnn.models.LanguageModel(5, 3, seed=1)
    makers = [
        lambda: fastrnn.LSTM(2, 3, seed=seed),
        lambda: fastrnn.Linear(2, 3, seed=seed),
        lambda: fastrnn.Embedding(2, 3, seed=seed),
        lambda: fastrnn.LSTM(2, 3).forward(zeros(1, 1, 2), seed=seed),
        lambda: fastrnn.models.LanguageModel(5, 3, seed=seed),
        lambda: model.loss_and_grads([[1]], [[2]], seed=seed),
    ]
    if seed != -1:  # drawing takes any integer
        makers.append(lambda: fastrnn.generate.generate(model, [1], 3, seed=seed))
    for make in makers:
        with pytest.raises((ValueError, TypeError), match=r"^seed: expected"):
            make()


def test_bad_vectors_are_named():
    rnn = fastrnn.LSTM(5, 4)
    tokens = np.zeros((2, 3), int)
    cases = [
        (tokens, zeros(7, 6), ValueError, "vectors: expected shape (V, input_size) = (V, 5)"),
        (tokens, zeros(7), ValueError, "vectors: expected shape"),
        (tokens, zeros(0, 5), ValueError, "vectors: expected shape"),
        (tokens, zeros(7, 5, dtype=F8), TypeError, "vectors: expected float32"),
        (tokens, "ab", TypeError, "vectors: expected an array"),
        (tokens + 7, zeros(7, 5), ValueError, "x: expected tokens in [0, 7), got 7"),
        (zeros(2, 3, 5), zeros(7, 5), TypeError, "x: expected integer tokens beside vectors"),
    ]
    for x, vectors, error, message in cases:
        for call in (rnn, rnn.forward):
            with pytest.raises(error, match=says(message)):
                call(x, vectors=vectors)


def bad_layers():
    gru = fastrnn.GRU
    yield gru, (0, H), {}, ValueError, ("input_size", "at least 1", "0")
    yield gru, (2.5, H), {}, TypeError, ("input_size", "an integer", "2.5")
    yield gru, (n_in, -1), {}, ValueError, ("hidden_size", "at least 1", "-1")
    yield gru, (n_in, 0), {}, ValueError, ("hidden_size", "at least 1", "0")
    yield gru, (n_in, None), {}, TypeError, ("hidden_size", "an integer", "None")
    yield gru, (n_in, H, 0), {}, ValueError, ("num_layers", "at least 1", "0")
    yield gru, (n_in, H, -1), {}, ValueError, ("num_layers", "at least 1", "-1")
    yield gru, (n_in, H), {"dropout": 1}, ValueError, ("dropout", "[0, 1)", "1")
    yield gru, (n_in, H), {"dropout": np.nan}, ValueError, ("dropout", "[0, 1)", "nan")
    yield gru, (n_in, H), {"dropout": -0.1}, ValueError, ("dropout", "[0, 1)", "-0.1")
    yield gru, (n_in, H), {"dropout": None}, TypeError, ("dropout", "a number", "None")
    yield gru, (n_in, H), {"dropout": "x"}, TypeError, ("dropout", "a number", "'x'")
    yield gru, (n_in, H), {"dtype": np.float16}, ValueError, ("dtype", "float32 or float64", "16")
    yield gru, (n_in, H), {"dtype": "wrong"}, ValueError, ("dtype", "float32 or float64", "wrong")
    yield gru, (n_in, H), {"dtype": None}, ValueError, ("dtype", "float32 or float64", "None")
    yield gru, (n_in, H), {"dtype": ">f4"}, ValueError, ("dtype", "float32 or float64", ">f4")
    yield fastrnn.RNN, (n_in, H, 1, "sine"), {}, ValueError, ("nonlinearity", "tanh, relu", "sine")
    yield fastrnn.RNN, (n_in, H, 1, None), {}, ValueError, ("nonlinearity", "tanh, relu", "None")
    lstm = fastrnn.LSTM
    for size in (H, H + 1):
        parts = "proj_size", f"less than hidden_size = {H}", str(size), "0 means no projection"
        yield lstm, (n_in, H), {"proj_size": size}, ValueError, parts
    yield lstm, (n_in, 1), {"proj_size": 1}, ValueError, ("proj_size", "hidden_size = 1", "got 1")
    yield lstm, (n_in, H), {"proj_size": -1}, ValueError, ("proj_size", "at least 0", "-1")
    yield lstm, (n_in, H), {"proj_size": 1.5}, TypeError, ("proj_size", "an integer", "1.5")
    both = {"bidirectional": True, "merge": None}
    yield lstm, (n_in, H), both, ValueError, ("merge", "concat, sum, mean", "None")
    inits = "pytorch, glorot, identity"
    yield lstm, (n_in, H), {"init": None}, ValueError, ("init", inits, "None")
    several = np.array(["sum", "mean"])
    yield lstm, (n_in, H), both | {"merge": several}, ValueError, ("merge", "concat, sum", "array")
    alone = np.array(["tanh"])
    yield fastrnn.RNN, (n_in, H, 1, alone), {}, ValueError, ("nonlinearity", "tanh, relu", "array")
    yield lstm, (n_in, H), {"proj_size": several}, TypeError, ("proj_size", "an integer", "array")
    yield gru, (n_in, H), {"zoneout": 10**400}, ValueError, ("zoneout", "[0, 1)", "1000")
    yield lstm, (n_in, H), {"seed": -1}, ValueError, ("seed", "at least 0", "-1")
    yield fastrnn.Linear, (0, 1), {}, ValueError, ("in_features", "at least 1", "0")
    yield fastrnn.Linear, (1, "a"), {}, TypeError, ("out_features", "an integer", "'a'")
    yield fastrnn.Embedding, (0, 1), {}, ValueError, ("num_embeddings", "at least 1", "0")
    yield fastrnn.Embedding, (1, 0), {}, ValueError, ("embedding_dim", "at least 1", "0")


@each_of(("kind", "arguments", "options", "error", "parts"), bad_layers)
def test_bad_arguments_of_a_layer(kind, arguments, options, error, parts):
    with pytest.raises(error, match=says(*parts)):
        kind(*arguments, **options)


def test_numbers_that_python_does_not_write_are_described():
    huge, layer, x = 10**5000, fastrnn.GRU(3, 4, zoneout=0.5), np.zeros((5, 2, 3), np.float32)
    with pytest.raises(ValueError, match=r"zoneout: .*\[0, 1\), got an integer of 16610 bits"):
        fastrnn.GRU(3, 4, zoneout=huge)
    with pytest.raises(ValueError, match=r"zoneout: .* got a Fraction that is too long to write"):
        fastrnn.GRU(3, 4, zoneout=Fraction(huge, huge - 1))
    with pytest.raises(TypeError, match=r"wings: expected an option .* wings=an integer of 16610"):
        fastrnn.GRU(3, 4, wings=huge)
    with pytest.raises(ValueError, match=r"hidden_size: .* at least 1, got an integer of 16610"):
        fastrnn.GRU(3, -huge)
    with pytest.raises(ValueError, match=r"first_step: .* got an integer of 16610 bits"):
        layer.forward(x, seed=1, first_step=huge)


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
def test_an_option_that_a_layer_does_not_have_is_named(kind):
    listed = f"({', '.join(sorted({*kind.defaults(), 'seed'}))})"
    for name, value in {"hidden": 3, "device": "cpu", "wings": 2, "cell": "gru"}.items():
        with pytest.raises(TypeError) as caught:
            kind(n_in, H, **{name: value})
        wanted = f"{name}: expected an option that {kind.__name__} has {listed}, "
        assert str(caught.value) == f"{wanted}got {name}={value!r}"
    for options in OPTIONS.values():
        for name in set(options) - set(kind.defaults()):
            with pytest.raises(TypeError, match=f"{name}: expected an option that {kind.__name__}"):
                kind(n_in, H, **{name: options[name]})
    for name, value in kind.defaults().items():
        kind(n_in, H, **{name: value}, seed=1)


@pytest.mark.parametrize(
    ("kind", "sizes"), [(fastrnn.Linear, 2), (fastrnn.Embedding, 2), (fastrnn.Readout, 3)]
)
def test_an_option_that_another_part_does_not_have_is_named(kind, sizes):
    with pytest.raises(
        TypeError, match=f"device: expected an option that {kind.__name__} has .*'c"
    ):
        kind(*[3] * sizes, device="cpu")
    kind(*[3] * sizes, dtype=F8, seed=1)


def test_options_of_a_cell_of_ones_own():
    cell = CELLS["gru"]
    with pytest.raises(
        TypeError, match=r"reset_after: expected an option that Recurrent has \(batch"
    ):
        fastrnn.Recurrent(cell, n_in, H, reset_after=False)
    layer = fastrnn.Recurrent(cell=cell, input_size=n_in, hidden_size=H, num_layers=2, seed=3)
    assert (layer.input_size, layer.hidden_size, layer.num_layers) == (n_in, H, 2)

    class Own(fastrnn.Recurrent):
        def __init__(self, size, *, wings=2, **options):
            super().__init__(cell=cell, input_size=size, hidden_size=size, **options)

    assert Own(3, zoneout=0.5, wings=1).zoneout == 0.5
    with pytest.raises(TypeError, match=r"feet: expected an option that Own has \(.*wings.*feet=4"):
        Own(3, feet=4)
    with pytest.raises(TypeError, match="multiple values"):
        fastrnn.Recurrent(cell, n_in, H, hidden_size=3)


def test_signatures_tell_what_may_be_given():
    known = inspect.signature(fastrnn.Recurrent).parameters
    assert list(known)[:4] == ["cell", "input_size", "hidden_size", "num_layers"]
    assert {"merge", "zoneout", "dtype", "seed"} <= known.keys()
    assert not any(of.kind in (of.VAR_KEYWORD, of.VAR_POSITIONAL) for of in known.values())
    own = inspect.signature(fastrnn.LSTM).parameters
    assert {"input_size", "dropout", "proj_size", "cell_clip", "forget_bias"} <= own.keys()


def bad_inputs():
    yield zeros(T, B, n_in + 1), ValueError, ("x:", "(T, B, 5)", "(4, 3, 6)")
    yield zeros(T, B, n_in, 1), ValueError, ("x:", "(T, B, 5)", "(4, 3, 5, 1)")
    yield zeros(n_in), ValueError, ("x:", "(T, B, 5)", "(5,)")
    yield zeros(T, n_in + 1), ValueError, ("x:", "(T, 5)", "(4, 6)")
    yield F4(1), ValueError, ("x:", "(T, B, 5)", "()")
    yield zeros(0, B, n_in), ValueError, ("x:", "(0, 3, 5)", "no axis may be empty")
    yield zeros(T, 0, n_in), ValueError, ("x:", "(4, 0, 5)", "no axis may be empty")
    yield zeros(T, B, n_in, dtype=F8), TypeError, ("x:", "float32", "float64", "astype")
    yield zeros(T, B, n_in, dtype=np.float16), TypeError, ("x:", "float32", "float16")
    yield zeros(T, B, n_in, dtype=">f4"), TypeError, ("x:", "float32", ">f4")
    yield zeros(T, B, n_in, dtype=bool), TypeError, ("x:", "float32", "bool")
    yield zeros(T, B, n_in, dtype=complex), TypeError, ("x:", "numbers", "complex128")
    yield zeros(T, B, n_in, dtype=int), TypeError, ("x:", "float32", "int64", "astype")
    yield zeros(T, B, 1, 1, dtype=int), ValueError, ("x:", "(T, B)", "(4, 3, 1, 1)")
    yield zeros(0, B, dtype=int), ValueError, ("x:", "(0, 3)", "no axis may be empty")
    yield np.full((T, B), n_in), ValueError, ("x:", "[0, 5)", "5")
    yield np.full((T, B), -1), ValueError, ("x:", "[0, 5)", "-1")
    yield np.full(T, 2**63, np.uint64), ValueError, ("x:", "[0, 5)", str(2**63))
    yield None, TypeError, ("x:", "numbers", "object")
    yield "text", TypeError, ("x:", "numbers", "<U4")
    yield [[1.0], [1.0, 2.0]], TypeError, ("x:", "an array", "list")


@each_of(("x", "error", "parts"), bad_inputs)
def test_bad_input(x, error, parts):
    rnn = fastrnn.LSTM(n_in, H)
    for call in (rnn, rnn.forward):
        with pytest.raises(error, match=says(*parts)):
            call(x)


def test_bad_input_of_a_batch_first_layer_is_told_in_its_terms():
    rnn = fastrnn.GRU(n_in, H, batch_first=True)
    with pytest.raises(ValueError, match=says("x:", "(B, T, I) = (B, T, 5)", "(3, 4, 6)")):
        rnn(zeros(B, T, n_in + 1))
    _, _, saved = rnn.forward(zeros(B, T, n_in))
    with pytest.raises(ValueError, match=says("d_output:", "(B, T, H) = (3, 4, 6)", "(4, 3, 6)")):
        rnn.backward(saved, zeros(T, B, H))


def bad_states():
    good = zeros(1, B, H)
    yield fastrnn.GRU, zeros(B, H), ValueError, ("state:", "(1, 3, 6)", "(3, 6)")
    yield fastrnn.GRU, zeros(2, B, H), ValueError, ("state:", "(1, 3, 6)", "(2, 3, 6)")
    yield fastrnn.GRU, zeros(1, B, H, dtype=F8), TypeError, ("state:", "float32", "float64")
    yield fastrnn.GRU, (good,), ValueError, ("state:", "(1, 3, 6)", "(1, 1, 3, 6)")
    yield fastrnn.LSTM, good, TypeError, ("state:", "a pair (h, c)", "ndarray")
    yield fastrnn.LSTM, (good,), TypeError, ("state:", "a pair (h, c)", "tuple")
    yield fastrnn.LSTM, (good, zeros(1, B, 7)), ValueError, ("state c:", "(1, 3, 6)", "(1, 3, 7)")
    yield fastrnn.LSTM, (None, good), TypeError, ("state h:", "numbers", "object")


@each_of(("kind", "state", "error", "parts"), bad_states)
def test_bad_state(kind, state, error, parts):
    rnn = kind(n_in, H)
    with pytest.raises(error, match=says(*parts)):
        rnn(zeros(T, B, n_in), state)
    output, _, saved = rnn.forward(zeros(T, B, n_in))
    with pytest.raises(error, match=says(f"d_{parts[0]}", *parts[1:])):
        rnn.backward(saved, output, state)
    # What was wrong can be put right: saved has not been used up.
    rnn.backward(saved, output)


def bad_gradients():
    yield zeros(T, B, H + 1), ValueError, ("d_output:", "(4, 3, 6)", "(4, 3, 7)")
    yield zeros(1, 1, H), ValueError, ("d_output:", "(4, 3, 6)", "(1, 1, 6)")
    yield zeros(T, B, H, dtype=F8), TypeError, ("d_output:", "float32", "float64")
    yield zeros(T, B, H, dtype=int), TypeError, ("d_output:", "float32", "int64")


@each_of(("d_output", "error", "parts"), bad_gradients)
def test_bad_gradient_of_the_output(d_output, error, parts):
    rnn = fastrnn.GRU(n_in, H)
    output, _, saved = rnn.forward(zeros(T, B, n_in))
    with pytest.raises(error, match=says(*parts)):
        rnn.backward(saved, d_output)
    rnn.backward(saved, output)


def test_saved_is_used_once():
    rnn = fastrnn.GRU(n_in, H)
    output, _, saved = rnn.forward(zeros(T, B, n_in))
    rnn.backward(saved, output)
    with pytest.raises(ValueError, match=says("saved:", "a new forward", "used", "retain=True")):
        rnn.backward(saved, output)


def test_saved_of_something_else():
    rnn = fastrnn.GRU(n_in, H)
    output, _, saved = rnn.forward(zeros(T, B, n_in))
    with pytest.raises(TypeError, match=says("saved:", "third result of forward", "ndarray")):
        rnn.backward(output, output)
    for other in (fastrnn.LSTM(n_in, H), fastrnn.GRU(n_in, 40), fastrnn.GRU(n_in, H, 2)):
        with pytest.raises(ValueError, match=says("saved:", other.cell.name, "that of", "'gru'")):
            other.backward(saved, None)
    fastrnn.GRU(n_in, H).backward(saved, output)


@pytest.mark.parametrize("key", ["weight_ih_l0", "weight_hh_l1", "bias_ih_l1"])
def test_bad_grads(key):
    rnn = fastrnn.GRU(n_in, H, 2)
    output, _, saved = rnn.forward(zeros(T, B, n_in))
    cases = list(spoilt_arrays(rnn.params[key]))
    cases.append((frozen(rnn.params[key].copy()), ValueError, ("writable", "not writable")))
    for wrong, error, parts in cases:
        grads = rnn.state_dict() | {key: wrong}
        with pytest.raises(error, match=says(f"grads['{key}']", *parts)):
            rnn.backward(saved, output, grads=grads)
    with pytest.raises(TypeError, match=says("grads:", "mapping", "list")):
        rnn.backward(saved, output, grads=[1])
    rnn.backward(saved, output)


@pytest.mark.parametrize("key", ["weight_ih_l0", "weight_hh_l1", "bias_hh_l0"])
def test_bad_params(key):
    """`params` belongs to the user; what kernels cannot read by address must not reach them."""
    rnn = fastrnn.GRU(n_in, 40, 2)
    x = zeros(T, B, n_in)
    output, _, saved = rnn.forward(x)
    good = rnn.params[key]
    for wrong, error, parts in spoilt_arrays(good):
        rnn.params[key] = wrong
        for call in (rnn, rnn.forward, lambda x: rnn.backward(saved, output)):
            with pytest.raises(error, match=says(f"params['{key}']", *parts)):
                call(x)
    rnn.params[key] = good
    rnn.backward(saved, output)


def bad_state_dicts(params):
    key = "weight_hh_l0"
    yield [1], TypeError, ("state_dict:", "mapping", "list")
    yield {}, ValueError, ("state_dict:", "missing", key, "unknown []")
    yield params | {"more": params[key]}, ValueError, ("state_dict:", "missing []", "['more']")
    yield params | {key: params[key][:1]}, ValueError, (key, "(18, 6)", "(1, 6)")
    yield params | {key: params[key] * 1j}, TypeError, (key, "numbers", "complex64")
    yield params | {key: "text"}, TypeError, (key, "numbers", "<U4")


@pytest.mark.parametrize("case", range(6))
def test_bad_state_dict(case):
    rnn = fastrnn.GRU(n_in, H, seed=0)
    before = rnn.state_dict()
    mapping, error, parts = list(bad_state_dicts(fastrnn.GRU(n_in, H, seed=1).params))[case]
    with pytest.raises(error, match=says(*parts)):
        rnn.load_state_dict(mapping)
    same_results(rnn.params, before)
