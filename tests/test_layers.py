"""What layers, losses, optimisers and clipping promise, and what they say of bad input."""

from __future__ import annotations

import gc
import inspect
import math
import re
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import (
    agree,
    as_parts,
    as_state,
    computed,
    each_cell,
    each_dtype,
    frozen,
    make_problem,
    new_layer,
    same,
    same_results,
    threads,
)

import fastrnn
from fastrnn import layout, loss, memory, optim, reference
from fastrnn.cells import CELLS
from fastrnn.clip import clip_grad_norm_, clip_grad_value_, grad_norm
from fastrnn.dropout import dropout
from fastrnn.reference import linear as reference_linear
from fastrnn.reference import loss as reference_loss
from fastrnn.simd import lanes

F4, F8 = np.float32, np.float64
T, B, n_in, H = 4, 3, 5, 6


def zeros(*shape, dtype=F4):
    return np.zeros(shape, dtype)


def says(*parts):
    """A pattern of an error: these parts in this order."""
    return ".*".join(re.escape(part) for part in parts)


def each_of(names, generator):
    """A parameter for each case; what the error says, its last part, is its name."""
    cases = [pytest.param(*case, id=" ".join(case[-1])) for case in generator()]
    return pytest.mark.parametrize(names, cases)


# Recurrent layers


@each_cell
def test_shapes_and_types(cell):
    for dtype in (F4, F8):
        for rnn in (new_layer(cell, n_in, H, 2, dtype=dtype), new_layer(cell, n_in, H, 2)):
            x = zeros(T, B, n_in, dtype=rnn.dtype)
            output, state = rnn(x)
            assert (output.shape, output.dtype) == ((T, B, rnn.output_size), rnn.dtype)
            shapes = [(2, B, size) for size in rnn.state_sizes]
            assert [s.shape for s in as_parts(state)] == shapes
            assert len(shapes) == 1 + rnn.cell.carries
            _, _, saved = rnn.forward(x)
            d_x, d_state, grads = rnn.backward(saved, output)
            assert (d_x.shape, d_x.dtype) == (x.shape, rnn.dtype)
            assert [s.shape for s in as_parts(d_state)] == [s.shape for s in as_parts(state)]
            assert list(grads) == list(rnn.params)
            assert [g.shape for g in grads.values()] == [p.shape for p in rnn.params.values()]
    assert new_layer(cell, n_in, H).dtype == F4


SIZES = [
    (4, 3, 7, 5, 6),
    (1, 1, 1, 1, 1),
    (5, 2, 40, 33, 17),
    (3, 7, 5, 300, 47),
    (4, 3, 7, 20, 32),
]


@each_cell
@each_dtype
@pytest.mark.parametrize(("steps", "batch", "count", "width", "size"), SIZES)
def test_vectors_of_tokens_are_what_their_rows_are(cell, dtype, steps, batch, count, width, size):
    rng = np.random.default_rng(steps)
    rnn = new_layer(cell, width, size, 2, dtype=dtype, seed=3)
    vectors = frozen(rng.standard_normal((count, width)).astype(dtype))
    tokens = rng.integers(count, size=(steps, batch))
    d_output = rng.standard_normal((steps, batch, rnn.output_size)).astype(dtype)
    want, want_state, saved_want = rnn.forward(vectors[tokens])
    got, state, saved = rnn.forward(tokens, vectors=vectors)
    for part, value in zip(as_parts(state), as_parts(want_state), strict=True):
        same(part, value)
    same(got, want)
    same(rnn(tokens, vectors=vectors)[0], want)
    same(rnn(vectors[tokens])[0], want)
    d_x, d_want, grads_want = rnn.backward(saved_want, d_output)
    d_rows, d_state, grads = rnn.backward(saved, d_output)
    for part, value in zip(as_parts(d_state), as_parts(d_want), strict=True):
        same(part, value)
    exact = np.zeros((count, width))
    np.add.at(exact, tokens, d_x)
    terms = steps * batch * width
    agree(d_rows, exact, dtype, terms, "vectors")
    for key, value in grads_want.items():
        agree(grads[key], value.astype(np.float64), dtype, terms, key, scale=1e-3)
        if key != "weight_ih_l0":
            same(grads[key], value, key)


@each_cell
def test_vectors_with_threads_gradients_given_and_a_state(cell):
    rng = np.random.default_rng(5)
    rnn = new_layer(cell, 20, 18, seed=3, batch_first=True)
    vectors, tokens = rng.standard_normal((9, 20)).astype(F4), rng.integers(9, size=(4, 6))
    found = []
    for count in (1, 2, 3):
        with threads(count):
            y, _, saved = rnn.forward(tokens, vectors=vectors)
            d_vectors, _, grads = rnn.backward(saved, y, retain=True)
            none, _, more = rnn.backward(saved, y, grads=grads, need_d_x=False)
            assert none is None
            found.append({"y": y, "vectors": d_vectors} | more)
    for other in found[1:]:
        same_results(other, found[0])
    _, _, saved = rnn.forward(tokens, vectors=vectors)
    once = rnn.backward(saved, y)[2]
    for key, value in found[0].items():
        if key in once:
            agree(value, 2.0 * once[key].astype(F8), F4, 24 * 20, key)


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


def test_sgd_without_momentum_forgets_an_infinity():
    params = {"w": np.ones(3, F4)}
    sgd = optim.SGD(params, lr=1.0)
    for g in (np.inf, -np.inf, 1.0):
        params["w"][:] = 1
        sgd.step({"w": np.array([g, 0.5, 0], F4)})
    np.testing.assert_array_equal(params["w"], [0, 0.5, 1])


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


@each_cell
@pytest.mark.parametrize("tokens", [False, True], ids=["dense", "tokens"])
def test_layouts_agree(cell, tokens):
    """Unbatched and batch-first are the same numbers in another shape."""
    problem = make_problem(cell, T, B, n_in, H, layers=2, tokens=tokens)
    want = computed(problem)
    first = new_layer(cell, n_in, H, 2, batch_first=True, dtype=F8)
    first.load_state_dict(problem.rnn.params)
    runs = [
        (first, problem.x.swapaxes(0, 1), lambda a: a.swapaxes(0, 1), lambda s: s),
        (problem.rnn, problem.x[:, 1], lambda a: a[:, 1], lambda s: s[:, 1]),
        (first, problem.x[:, 1], lambda a: a[:, 1], lambda s: s[:, 1]),
    ]
    for rnn, x, move, part in runs:
        state = as_state(tuple(part(s) for s in problem.state))
        d_state = as_state(tuple(part(s) for s in problem.d_state))
        output, final, saved = rnn.forward(x, state)
        same(output, move(want["output"]))
        d_x, d_first, _ = rnn.backward(saved, move(problem.d_output), d_state)
        assert (d_x is None) == tokens
        if not tokens:
            same(d_x, move(want["d x"]))
        for name, f, d in zip(problem.names, as_parts(final), as_parts(d_first), strict=True):
            same(f, part(want[f"final {name}"]))
            same(d, part(want[f"d initial {name}"]))


def test_seeds():
    a, b, c = (fastrnn.LSTM(n_in, H, 2, seed=seed) for seed in (1, 1, 2))
    same_results(a.params, b.params)
    assert all((a.params[key] != c.params[key]).all() for key in a.params)
    assert all(np.abs(p).max() <= 1 / np.sqrt(H) for p in a.params.values())
    for kind, arguments in ((fastrnn.Linear, (5, 4)), (fastrnn.Embedding, (5, 4))):
        same_results(kind(*arguments, seed=1).params, kind(*arguments, seed=1).params)


def test_state_dict_is_a_copy():
    rnn = fastrnn.GRU(n_in, H, seed=0)
    kept = rnn.state_dict()
    for value in rnn.params.values():
        value += 1
    assert all((kept[key] != rnn.params[key]).all() for key in kept)
    arrays = dict(rnn.params)
    rnn.load_state_dict(kept)
    assert all(rnn.params[key] is arrays[key] for key in arrays)
    same_results(rnn.params, kept)


def test_repr():
    assert repr(fastrnn.LSTM(3, 4, 2)) == "LSTM(3, 4, num_layers=2, dtype=float32)"
    options = {"proj_size": 2, "cell_clip": 1.5, "learned_state": True, "dtype": "f8"}
    wanted = (
        "LSTM(3, 4, num_layers=1, proj_size=2, learned_state=True, cell_clip=1.5, dtype=float64)"
    )
    assert repr(fastrnn.LSTM(3, 4, **options)) == wanted
    wanted = "RNN(3, 4, num_layers=1, init='identity', nonlinearity='relu', dtype=float32)"
    assert repr(fastrnn.RNN(3, 4, 1, "relu", init="identity")) == wanted
    wanted = "GRU(3, 4, num_layers=2, bias=False, dropout=0.5, reset_after=False, dtype=float32)"
    assert repr(fastrnn.GRU(3, 4, 2, False, False, 0.5, reset_after=False)) == wanted
    own = fastrnn.Recurrent(CELLS["gru"], 3, 4, zoneout=0.1)
    assert repr(own) == "Recurrent(gru, 3, 4, num_layers=1, zoneout=0.1, dtype=float32)"


OPTIONS = {
    fastrnn.RNN: {"nonlinearity": "relu", "init": "identity"},
    fastrnn.GRU: {"reset_after": False, "reset_gate": False, "bias": False},
    fastrnn.LSTM: {"proj_size": 3, "peephole": True, "coupled": True, "cell_clip": 0.5},
}


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("general", [{}, {"bidirectional": True, "learned_state": True}], ids=str)
def test_a_layer_says_what_was_chosen(kind, general):
    defaults = kind.defaults()
    for options in ({}, OPTIONS[kind] | general, {"init": "glorot"}):
        layer = kind(n_in, H, 2, **options)
        wanted = defaults | options | {"num_layers": 2}
        assert {name: getattr(layer, name) for name in defaults} == wanted
        wanted = {key: value.shape for key, value in layer.params.items()}
        assert kind._plan(n_in, H, 2, **options) == wanted


def test_a_plan_is_checked_and_takes_no_memory():
    tracemalloc.start()
    try:
        shapes = fastrnn.LSTM._plan(10**12, 10**15, proj_size=7)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert shapes["weight_hr_l0"] == (7, 10**15)
    with pytest.raises(ValueError, match="proj_size: expected less than hidden_size"):
        fastrnn.LSTM._plan(3, 4, proj_size=4)


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


def spoilt_arrays(array):
    """What kernels could not take for `array`, and what is said about it."""
    yield None, TypeError, ("an array", "NoneType")
    yield array.tolist(), TypeError, ("an array", "list")
    yield array.astype(F8), ValueError, ("contiguous", "float32", "float64")
    yield array[:-1].copy(), ValueError, (str(array.shape), str(array[:-1].shape))
    yield np.stack([array, array], -1)[..., 0], ValueError, ("contiguous", "not contiguous")


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


def test_replaced_params_are_used():
    rnn = fastrnn.GRU(n_in, H, seed=0)
    twin = fastrnn.GRU(n_in, H, seed=1)
    x = np.ones((T, B, n_in), F4)
    rnn.params |= twin.state_dict()
    same(rnn(x)[0], twin(x)[0])


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


# Arrays of every kind


def forms(array):
    """The same numbers, laid out otherwise."""
    yield np.asfortranarray(array)
    yield np.repeat(array, 2, axis=-1)[..., ::2]
    yield np.flip(np.flip(array, 0).copy(), 0)
    yield frozen(array.copy())
    misaligned = np.empty(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    misaligned[...] = array
    yield misaligned


@each_cell
@each_dtype
def test_any_layout_of_the_input(cell, dtype):
    problem = make_problem(cell, T, B, n_in, H, layers=2, dtype=dtype)
    want = computed(problem)
    fields = [forms(problem.x), forms(problem.d_output)]
    fields += [zip(*map(forms, parts), strict=True) for parts in (problem.state, problem.d_state)]
    for problem.x, problem.d_output, problem.state, problem.d_state in zip(*fields, strict=True):
        same_results(computed(problem), want)


@pytest.mark.parametrize("kind", ["u1", "i2", ">i2", "i4", ">i4", "u4", "i8", ">i8", "u8"])
def test_any_type_of_tokens(kind):
    problem = make_problem("lstm", T, B, n_in, H, tokens=True)
    want = computed(problem)
    for x in forms(problem.x):
        problem.x = x.astype(kind, order="K")
        same_results(computed(problem), want)


def test_sequences_of_numbers_are_arrays():
    rnn = fastrnn.GRU(2, H, dtype=F8)
    same(rnn([[[1.0, 2.0]], [[3.0, 4.0]]])[0], rnn(np.array([[[1.0, 2.0]], [[3.0, 4.0]]]))[0])
    same(rnn([0, 1, 1])[0], rnn(np.array([0, 1, 1]))[0])


@each_cell
@each_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_goes_through_and_stays_in_its_sequence(cell, dtype, bad):
    """A NaN must show in what depends on it, and nowhere else: not by padding, not by a tile."""
    problem = make_problem(cell, 5, 8, 3, lanes(dtype) + 3, layers=2, dtype=dtype)
    want = computed(problem)
    x = problem.x.copy()
    x[2, 3, 1] = bad
    problem.x = x
    with np.errstate(invalid="ignore"):
        got = computed(problem)
    others = [b for b in range(8) if b != 3]
    for key in want.keys() - problem.rnn.params.keys():
        same(got[key][:, others], want[key][:, others], key)
    same(got["output"][:2], want["output"][:2])
    if np.isnan(bad):
        assert np.isnan(got["output"][2:, 3]).all()
        assert np.isnan(got["final h"][:, 3]).all()
        # relu has no slope where it is NaN, in the reference too.
        if "relu" not in cell:
            assert np.isnan(got["d x"][2, 3]).all()
            assert all(np.isnan(got[key]).any() for key in problem.rnn.params)


@each_cell
def test_nan_in_state_and_gradients(cell):
    problem = make_problem(cell, 5, 8, 3, 19, dtype=F4)
    want = computed(problem)
    state = tuple(s.copy() for s in problem.state)
    state[-1][0, 5, 7] = np.nan
    problem.state = state
    others = [b for b in range(8) if b != 5]
    got = computed(problem)
    assert np.isnan(got["output"][:, 5]).any()
    for key in want.keys() - problem.rnn.params.keys():
        same(got[key][:, others], want[key][:, others], key)
    problem = make_problem(cell, 5, 8, 3, 19, dtype=F4)
    problem.d_output = problem.d_output.copy()
    problem.d_output[3, 5] = np.nan
    got = computed(problem)
    same(got["output"], want["output"])
    same(got["d x"][4], want["d x"][4])
    for key in ("d x", "d initial h"):
        assert np.isnan(got[key][0, 5]).any()
        same(got[key][:, others], want[key][:, others], key)


# Memory and threads


@each_cell
@each_dtype
def test_one_layer_used_twice_before_backward(cell, dtype):
    first = make_problem(cell, 4, 3, n_in, H, layers=2, dtype=dtype)
    wants = [computed(first)]
    second = first.piece(slice(1, 4), slice(0, 2))
    wants.append(computed(second))
    saved = [p.rnn.forward(p.x, as_state(p.state)) for p in (first, second)]
    for p, (output, final, kept), want in zip((first, second), saved, wants, strict=True):
        same(output, want["output"])
        d_x, d_first, grads = p.rnn.backward(kept, p.d_output, as_state(p.d_state))
        same(d_x, want["d x"])
        for name, f, d in zip(p.names, as_parts(final), as_parts(d_first), strict=True):
            same(f, want[f"final {name}"])
            same(d, want[f"d initial {name}"])
        same_results(grads, {key: want[key] for key in grads})


@each_cell
@pytest.mark.parametrize("count", [1, 2])
def test_one_layer_in_several_threads(cell, count):
    problem = make_problem(cell, 6, 5, n_in, 19, layers=2, dtype=F4)
    pieces = [problem.piece(slice(i, 6), slice(i, 5)) for i in range(4)]
    wants = [computed(piece) for piece in pieces]

    def work(i):
        for _ in range(20):
            same_results(computed(pieces[i]), wants[i])

    with threads(count), ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


@each_cell
@each_dtype
@pytest.mark.parametrize("num_layers", [1, 2])
def test_bytes_of_saved(cell, dtype, num_layers):
    size, steps, batch = 19, 5, 3
    rnn = new_layer(cell, n_in, size, num_layers, dtype=dtype)
    output, _, saved = rnn.forward(zeros(steps, batch, n_in, dtype=dtype))
    padded = -(-size // lanes(dtype)) * lanes(dtype)
    states = rnn.state_sizes[0] + rnn.cell.carries * padded
    numbers = steps * rnn.cell.tape * padded + (steps + 1) * states + 3 * steps * rnn.cell.normed
    assert saved.nbytes == num_layers * batch * numbers * np.dtype(dtype).itemsize
    rnn.backward(saved, output, retain=True)
    assert saved.nbytes > 0
    rnn.backward(saved, output)
    assert saved.nbytes == 0


@each_cell
def test_tokens_that_change_before_backward(cell):
    """Backward writes where the tokens say: they are those that forward has checked."""
    problem = make_problem(cell, T, B, n_in, H, tokens=True)
    want = computed(problem)
    x = problem.x.astype(np.int32)
    _, _, saved = problem.rnn.forward(x, as_state(problem.state))
    x[...] = 1 << 30
    _, _, grads = problem.rnn.backward(saved, problem.d_output, as_state(problem.d_state))
    same_results(grads, {key: want[key] for key in grads})


@each_cell
def test_results_are_the_callers(cell):
    """What was returned does not change when the layer works again, nor by changing it."""
    problem = make_problem(cell, 5, 70, n_in, 70, dtype=F4)
    runs = [computed(problem) for _ in range(3)]
    same_results(runs[0], runs[1])
    output, state = problem.rnn(problem.x)
    training, _, _ = problem.rnn.forward(problem.x)
    with pytest.raises(ValueError, match="read-only"):
        training += 1  # backward reads it
    for part in as_parts(state):
        part += 1
    output += 1
    for array in runs[0].values():
        array += 1
    same_results(computed(problem), runs[1])


# Dropout


def test_dropout_keeps_the_mean_and_scales(rng):
    x = np.ones((50, 4, 500), F4)
    y = np.empty_like(x)
    for p in (0.0, 0.1, 0.5, 0.9):
        dropout(x, p, 3, y)
        assert set(np.unique(y)) == ({F4(1)} if p == 0 else {F4(0), F4(1 / (1 - p))})
        # Six standard deviations of a fraction of 100,000 independent draws.
        assert abs((y == 0).mean() - p) <= 6 * math.sqrt(p * (1 - p) / y.size)
        # Neighbours are independent: along units and along rows.
        kept = (y > 0) - (1 - p)
        for a, b in ((kept[..., 1:], kept[..., :-1]), (kept[1:], kept[:-1])):
            assert abs((a * b).mean()) <= 6 * p * (1 - p) / math.sqrt(a.size) + 1e-12


def test_dropout_of_nan():
    x = np.full((2, 1, 500), np.nan, F4)
    y = np.empty_like(x)
    dropout(x, 0.5, 0, y)
    assert 0 < (y == 0).sum() < 1000
    assert np.isnan(y[y != 0]).all()


@each_cell
def test_dropout_between_layers_against_the_reference(cell):
    """One draw of masks, as the reference sees it: between layers, and again in backward."""
    p, seed = 0.4, 11
    problem = make_problem(cell, 4, 3, n_in, 19, layers=3, dropout=p)
    rnn = problem.rnn
    output, _, saved = rnn.forward(problem.x, as_state(problem.state), seed=seed)
    d_x, d_state, grads = rnn.backward(saved, problem.d_output, as_state(problem.d_state))
    singles = []
    for layer in range(3):
        single = new_layer(cell, n_in if layer == 0 else rnn.output_size, 19, dtype=F8)
        end = f"_l{layer}"
        single.load_state_dict(
            {k.replace(end, "_l0"): v for k, v in rnn.params.items() if k.endswith(end)}
        )
        singles.append(single)
    x, kept, masks = problem.x, [], [1.0]
    for layer, single in enumerate(singles):
        if layer:
            mask = np.empty_like(x)
            dropout(np.ones_like(x), p, seed + layer, mask)
            masks.append(mask)
            x = x * mask
        state = as_state(tuple(s[layer : layer + 1] for s in problem.state))
        x, _, one = single.forward(x, state)
        kept.append(one)
    same(output, x)
    d_y = problem.d_output
    for layer in (2, 1, 0):
        d_last = as_state(tuple(s[layer : layer + 1] for s in problem.d_state))
        d_y, d_first, found = singles[layer].backward(kept[layer], d_y, d_last)
        d_y = d_y * masks[layer]
        for got, want in zip(as_parts(d_state), as_parts(d_first), strict=True):
            same(got[layer : layer + 1], want)
        for key, value in found.items():
            same(grads[key.replace("_l0", f"_l{layer}")], value, key)
    same(d_x, d_y)


def test_dropout_is_for_training_and_draws_anew():
    rnn = fastrnn.GRU(n_in, H, 2, dropout=0.5, seed=0)
    plain = fastrnn.GRU(n_in, H, 2, seed=0)
    x = np.ones((T, B, n_in), F4)
    same(rnn(x)[0], plain(x)[0])
    first, second = rnn.forward(x)[0], rnn.forward(x)[0]
    assert (first != second).any()
    again = fastrnn.GRU(n_in, H, 2, dropout=0.5, seed=0)
    same(again.forward(x)[0], first)
    same(again.forward(x)[0], second)
    with pytest.warns(UserWarning, match="dropout: acts between layers only"):
        one_layer = fastrnn.GRU(n_in, H, dropout=0.5, seed=0)
    same(one_layer.forward(x)[0], one_layer(x)[0])


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
def test_dropout_that_acts_on_nothing_is_warned_of_where_it_was_chosen(kind):
    class Own(kind):
        pass

    words = r"dropout: acts between layers only, got dropout=0.5 with num_layers=1"
    makers = [
        lambda: kind(n_in, H, dropout=0.5),
        lambda: Own(n_in, H, 1, dropout=0.5, input_dropout=0.5),
        lambda: fastrnn.Recurrent(CELLS["gru"], n_in, H, dropout=0.5),
    ]
    for make in makers:
        with pytest.warns(UserWarning, match=words) as caught:
            layer = make()
        assert [warning.filename for warning in caught] == [__file__]
        assert caught[0].lineno == make.__code__.co_firstlineno
        assert layer.dropout == 0.5
    # Warnings are errors here.
    kind(n_in, H, 2, dropout=0.5)
    kind(n_in, H, input_dropout=0.5)
    kind._plan(n_in, H, dropout=0.5)


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
def test_masks_that_nobody_draws_cannot_be_locked(kind):
    for options in ({}, {"recurrent_dropout": 0.5, "weight_dropout": 0.5, "zoneout": 0.5}):
        with pytest.raises(ValueError, match="locked_dropout: expected dropout or input_dropout"):
            kind(n_in, H, 2, locked_dropout=True, **options)
    for name in ("dropout", "input_dropout"):
        assert kind(n_in, H, 2, locked_dropout=True, **{name: 0.5}).locked_dropout


# Linear and Embedding


@each_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("lead", [(), (1,), (6,), (5, 3), (2, 3, 4)], ids=str)
def test_linear_against_the_reference(dtype, bias, lead, rng):
    linear = fastrnn.Linear(19, 7, bias, dtype=dtype, seed=0)
    wide = {key: value.astype(F8) for key, value in linear.params.items()}
    x, d_y = (rng.standard_normal((*lead, size)).astype(dtype) for size in (19, 7))
    y, saved = linear.forward(x)
    start = {key: np.ones_like(value) for key, value in linear.params.items()}
    d_x, grads = linear.backward(saved, d_y, start)
    assert grads is start
    want, kept = reference_linear.linear_forward(wide, x.astype(F8))
    want_d_x, want_grads = reference_linear.linear_backward(wide, kept, d_y.astype(F8))
    agree(y, want, dtype, 19)
    same(linear(x), y)
    agree(d_x, want_d_x, dtype, 7)
    for key, value in want_grads.items():
        agree(grads[key], value + 1, dtype, 1 + math.prod(lead))
    none, again = linear.backward(saved, d_y, need_d_x=False)
    assert none is None
    assert list(again) == list(linear.params)
    for form in forms(x):
        same(linear(form), y)


@each_dtype
@pytest.mark.parametrize("lead", [(), (1,), (6,), (5, 3), (2, 3, 4)], ids=str)
def test_embedding_against_the_reference(dtype, lead, rng):
    embedding = fastrnn.Embedding(4, 19, dtype=dtype, seed=0)
    wide = {key: value.astype(F8) for key, value in embedding.params.items()}
    ids, d_y = rng.integers(4, size=lead), rng.standard_normal((*lead, 19)).astype(dtype)
    y, saved = embedding.forward(ids)
    start = {"weight": np.ones((4, 19), dtype)}
    grads = embedding.backward(saved, d_y, start)
    assert grads is start
    want, kept = reference_linear.embedding_forward(wide, ids)
    same(y, want.astype(dtype))
    same(embedding(ids), y)
    want_grads = reference_linear.embedding_backward(wide, kept, d_y.astype(F8))
    agree(grads["weight"], want_grads["weight"] + 1, dtype, 1 + math.prod(lead))
    y += 1
    same(embedding(ids), want.astype(dtype))


def bad_linear_calls():
    linear, embedding = fastrnn.Linear(3, 4), fastrnn.Embedding(3, 4)
    x, d_y = zeros(2, 3), zeros(2, 4)
    ids = np.array([0, 2])
    yield lambda: linear(zeros(2, 5)), ValueError, ("x:", "(..., 3)", "(2, 5)")
    yield lambda: linear(F4(1)), ValueError, ("x:", "(3)", "()")
    yield lambda: linear(zeros(0, 3)), ValueError, ("x:", "(0, 3)", "no axis may be empty")
    yield lambda: linear(zeros(2, 3, dtype=F8)), TypeError, ("x:", "float32", "float64")
    yield lambda: linear.backward(x, zeros(2, 5)), ValueError, ("d_y:", "(2, 4)", "(2, 5)")
    yield lambda: linear.backward(x, zeros(2, 4, dtype=F8)), TypeError, ("d_y:", "float32", "64")
    yield lambda: linear.backward(zeros(2, 7), d_y), ValueError, ("saved:", "(..., 3)", "(2, 7)")
    yield lambda: linear.backward(x.astype(F8), d_y), TypeError, ("saved:", "float32", "float64")
    yield lambda: linear.backward(x, d_y, {}), TypeError, ("grads['weight']", "array", "NoneType")
    yield lambda: embedding([0.5]), TypeError, ("tokens:", "integer", "float64")
    yield lambda: embedding([3]), ValueError, ("tokens:", "[0, 3)", "3")
    yield lambda: embedding([-1]), ValueError, ("tokens:", "[0, 3)", "-1")
    yield lambda: embedding(zeros(1, 1, 1, 1, 0, dtype=int)), ValueError, ("tokens:", "empty")
    yield lambda: embedding.backward(ids, zeros(2, 5)), ValueError, ("d_y:", "(2, 4)", "(2, 5)")
    yield lambda: embedding.backward([0, 9], d_y), ValueError, ("saved:", "[0, 3)", "9")
    yield lambda: embedding.backward(ids, d_y, {}), TypeError, ("grads['weight']", "NoneType")


@each_of(("call", "error", "parts"), bad_linear_calls)
def test_bad_calls_of_linear_and_embedding(call, error, parts):
    with pytest.raises(error, match=says(*parts)):
        call()


def test_bad_params_of_linear_and_embedding():
    for layer, x in ((fastrnn.Linear(3, 40), zeros(2, 3)), (fastrnn.Embedding(3, 40), [0, 1])):
        good = layer.params["weight"]
        for wrong, error, parts in spoilt_arrays(good):
            layer.params["weight"] = wrong
            with pytest.raises(error, match=says("params['weight']", *parts)):
                layer(x)


# Losses


@each_dtype
@pytest.mark.parametrize("scale", [1, 100, 1e4])
@pytest.mark.parametrize("shape", [(1,), (2,), (19,), (6, 1), (7, 33), (4, 3, 16)], ids=str)
def test_softmax_cross_entropy_against_the_reference(dtype, scale, shape, rng):
    logits = (rng.standard_normal(shape) * scale).astype(dtype)
    targets = rng.integers(shape[-1], size=shape[:-1])
    got, d_logits = loss.softmax_cross_entropy(frozen(logits), targets)
    rows = logits.reshape(-1, shape[-1]).astype(F8)
    losses, want = reference_loss.softmax_cross_entropy(rows, targets.reshape(-1))
    assert type(got) is float
    agree(np.array(got, dtype), np.array(losses.mean()), dtype, shape[-1], "loss", scale=1)
    agree(d_logits, want.reshape(shape) / len(rows), dtype, shape[-1], "d", scale=1 / len(rows))
    each = loss.token_losses(logits, targets.astype(np.int32))
    assert each.dtype == F8
    agree(each.astype(dtype), losses.reshape(targets.shape), dtype, shape[-1], "each", scale=1)
    same(loss.softmax_cross_entropy(np.asfortranarray(logits), targets)[1], d_logits)


@each_dtype
def test_inplace_spares_what_is_read_only(dtype, rng):
    logits, targets = rng.standard_normal((3, 19)).astype(dtype), [0, 5, 18]
    want, d_want = loss.softmax_cross_entropy(logits, targets)
    fixed = frozen(logits.copy())
    for array in (fixed, fixed[:, ::-1][:, ::-1]):
        got, d_logits = loss.softmax_cross_entropy(array, targets, inplace=True)
        assert got == want
        same(d_logits, d_want)
        same(fixed, logits)


@each_dtype
def test_ignored_targets(dtype, rng):
    logits, targets = rng.standard_normal((6, 19)).astype(dtype), rng.integers(19, size=6)
    targets[[1, 4]] = -100
    kept = targets >= 0
    got, d_logits = loss.softmax_cross_entropy(logits, targets, ignore_index=-100)
    want, d_want = loss.softmax_cross_entropy(logits[kept], targets[kept])
    assert math.isclose(got, want, rel_tol=1e-15)
    same(d_logits[kept], d_want)
    same(d_logits[~kept], np.zeros((2, 19), dtype))
    got, d_logits = loss.softmax_cross_entropy(logits, np.full(6, 7), ignore_index=7)
    assert got == 0
    same(d_logits, np.zeros((6, 19), dtype))


@each_dtype
def test_loss_of_nan_stays_in_its_row(dtype, rng):
    logits, targets = rng.standard_normal((4, 33)).astype(dtype), np.array([0, 5, 17, 32])
    clean, d_clean = (
        loss.token_losses(logits, targets),
        loss.softmax_cross_entropy(logits, targets)[1],
    )
    for column in (0, 5, 16, 32):
        for bad in (np.nan, np.inf):
            spoilt = logits.copy()
            spoilt[1, column] = bad
            dirty = loss.token_losses(spoilt, targets)
            assert np.isnan(dirty[1])
            same(dirty[[0, 2, 3]], clean[[0, 2, 3]])
            value, d = loss.softmax_cross_entropy(spoilt, targets)
            assert np.isnan(value)
            assert np.isnan(d[1]).all()
            same(d[[0, 2, 3]], d_clean[[0, 2, 3]])


@each_dtype
def test_minus_infinity_forbids_a_token(dtype, rng):
    logits = rng.standard_normal((1, 5)).astype(dtype)
    fewer, d_fewer = loss.softmax_cross_entropy(logits[:, [0, 1, 3, 4]], [1])
    logits[0, 2] = -np.inf
    got, d_logits = loss.softmax_cross_entropy(logits, [1])
    agree(np.array(got, dtype), np.array(fewer), dtype, 5)
    agree(d_logits[:, [0, 1, 3, 4]], d_fewer, dtype, 5)
    assert d_logits[0, 2] == 0


@each_dtype
@pytest.mark.parametrize("scale", [1, 30, 1e4])
@pytest.mark.parametrize("shape", [(), (1,), (19,), (4, 3)], ids=str)
def test_logistic_loss_against_the_reference(dtype, scale, shape, rng):
    logits = np.asarray(rng.standard_normal(shape) * scale, dtype)
    targets = np.asarray(rng.random(shape), dtype)
    for t in (targets, np.round(targets).astype(int)):
        got, d_logits = loss.logistic_loss(logits, t)
        losses, want = reference_loss.logistic_loss(logits.astype(F8), t)
        assert type(got) is float
        agree(np.array(got, dtype), np.array(losses.mean()), dtype, 20, "loss", scale=1e-3)
        agree(d_logits, want / logits.size, dtype, 20, "d", scale=1 / logits.size)


def bad_losses():
    soft, logistic = loss.softmax_cross_entropy, loss.logistic_loss
    x = zeros(2, 4)
    yield lambda: soft(zeros(2, 4, dtype=int), [0, 1]), ValueError, ("logits:", "float32", "int64")
    yield lambda: soft(zeros(2, 0), [0, 1]), ValueError, ("logits:", "(2, 0)", "empty")
    yield lambda: soft(zeros(0, 4), []), ValueError, ("logits:", "(0, 4)", "empty")
    yield lambda: soft(F4(1), 0), ValueError, ("logits:", "(V)", "()")
    yield lambda: soft(None, 0), TypeError, ("logits:", "numbers", "object")
    yield lambda: soft(x, [0, 1, 2]), ValueError, ("targets:", "(2)", "(3,)")
    yield lambda: soft(zeros(4), [1, 2]), ValueError, ("targets:", "()", "(2,)")
    yield lambda: soft(x, [0, 4]), ValueError, ("targets:", "[0, 4)", "4")
    yield lambda: soft(x, [0, -1]), ValueError, ("targets:", "[0, 4)", "-1")
    yield lambda: soft(x, [0, -1], ignore_index=-2), ValueError, ("targets:", "[0, 4)", "-1")
    yield lambda: soft(x, [0.0, 1.0]), TypeError, ("targets:", "integer", "float64")
    yield lambda: logistic(zeros(0), zeros(0)), ValueError, ("logits:", "at least one", "(0,)")
    yield lambda: logistic(zeros(2, dtype=int), [0, 1]), ValueError, ("logits:", "float32", "int")
    yield lambda: logistic(zeros(2), zeros(3)), ValueError, ("targets:", "(2)", "(3,)")
    yield lambda: logistic(F4(1), zeros(3)), ValueError, ("targets:", "()", "(3,)")
    yield lambda: logistic(zeros(2), [0, 1.5]), ValueError, ("targets:", "[0, 1]", "1.5")
    yield lambda: logistic(zeros(2), [-0.5, 1]), ValueError, ("targets:", "[0, 1]", "-0.5")
    yield lambda: logistic(zeros(2), [np.nan, 1]), ValueError, ("targets:", "[0, 1]", "nan")


@each_of(("call", "error", "parts"), bad_losses)
def test_bad_calls_of_losses(call, error, parts):
    with pytest.raises(error, match=says(*parts)):
        call()


# Optimisers and schedules

OPTIMISERS = [
    ("sgd", {}),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "weight_decay": 0.1}),
    ("rmsprop", {}),
    ("rmsprop", {"alpha": 0.9, "eps": 1e-3}),
    ("adagrad", {}),
    ("adagrad", {"eps": 1e-3}),
    ("adam", {}),
    ("adam", {"betas": (0.5, 0.8), "eps": 1e-3, "weight_decay": 0.1}),
    ("adamw", {}),
    ("adamw", {"betas": (0.5, 0.8), "eps": 1e-3, "weight_decay": 0.1}),
]


@each_dtype
@pytest.mark.parametrize(("name", "options"), OPTIMISERS, ids=str)
def test_optimiser_against_the_reference(dtype, name, options, rng):
    start = {
        "w": rng.standard_normal((4, 5)).astype(dtype),
        "b": rng.standard_normal(3).astype(dtype),
    }
    params = {key: value.copy() for key, value in start.items()}
    arrays = dict(params)
    ours = optim.OPTIMIZERS[name](params, lr=0.05, **options)
    wants = {key: (value.astype(F8), {}) for key, value in start.items()}
    for step in range(7):
        ours.lr = 0.05 / (1 + step)  # may be set between steps
        grads = {key: rng.standard_normal(p.shape).astype(dtype) for key, p in params.items()}
        ours.step({key: frozen(g) for key, g in grads.items()})
        for key, (p, state) in wants.items():
            function = getattr(reference.optim, name)
            wants[key] = function(p, grads[key].astype(F8), state, lr=ours.lr, **options)
            agree(params[key], wants[key][0], dtype, 10 * (step + 1), f"{key} at step {step}")
    assert ours.steps == 7
    assert all(params[key] is arrays[key] for key in arrays)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_optimisers_take_any_layout_of_gradients(name, rng):
    start, g = rng.standard_normal((2, 6, 4)).astype(F4)
    results = []
    for form in (g, *forms(g)):
        params = {"w": start.copy()}
        optim.OPTIMIZERS[name](params, lr=0.1).step({"w": form, "unused": g})
        results.append(params["w"])
    assert (results[0] != start).all()
    for found in results[1:]:
        same(found, results[0])


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_optimisers_go_on_where_they_stopped(name, rng):
    start = rng.standard_normal(5).astype(F4)
    steps = rng.standard_normal((6, 5)).astype(F4)
    options = {"momentum": 0.9} if name == "sgd" else {}
    whole, halves = {"w": start.copy()}, {"w": start.copy()}
    first = optim.OPTIMIZERS[name](whole, lr=0.1, **options)
    for g in steps:
        first.step({"w": g})
    before = optim.OPTIMIZERS[name](halves, lr=0.1, **options)
    for g in steps[:3]:
        before.step({"w": g})
    after = optim.OPTIMIZERS[name](halves, lr=0.1, **options)
    after.load_state({key: value.copy() for key, value in before.state.items()}, before.steps)
    for g in steps[3:]:
        after.step({"w": g})
    same_results(halves, whole)
    same_results(after.state, first.state)
    with pytest.raises(ValueError, match=says("optimiser state:", "missing", "unknown ['w']")):
        after.load_state({"w": start}, 3)
    with pytest.raises(ValueError, match=says("steps:", "at least 0", "-1")):
        after.load_state(before.state, -1)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_nan_in_a_gradient_stays_in_its_element(name):
    params = {"w": np.ones(40, F4)}
    g = np.ones(40, F4)
    g[17] = np.nan
    optim.OPTIMIZERS[name](params, lr=0.1).step({"w": g})
    assert np.isnan(params["w"]).tolist() == [i == 17 for i in range(40)]


@pytest.mark.parametrize("name", ["rmsprop", "adagrad", "adam", "adamw"])
def test_no_epsilon_and_no_gradient(name):
    """0 / 0 is NaN, as in PyTorch; a kernel must not stop half-way through the parameters."""
    params = {"w": np.ones(3, F4)}
    optim.OPTIMIZERS[name](params, lr=0.1, eps=0).step({"w": np.array([1, 0, 1], F4)})
    assert np.isnan(params["w"]).tolist() == [False, True, False]


def bad_optimisers():
    good = {"w": zeros(3)}
    g = {"w": zeros(3)}
    yield lambda: optim.SGD(good, -1), ValueError, ("lr:", "[0, inf)", "-1")
    yield lambda: optim.SGD(good, np.nan), ValueError, ("lr:", "[0, inf)", "nan")
    yield lambda: optim.SGD(good, np.inf), ValueError, ("lr:", "[0, inf)", "inf")
    yield lambda: optim.SGD(good, "x"), TypeError, ("lr:", "a number", "'x'")
    yield lambda: optim.SGD(good, momentum=1), ValueError, ("momentum:", "[0, 1)", "1")
    yield lambda: optim.SGD(good, weight_decay=-1), ValueError, ("weight_decay:", "[0,", "-1")
    yield lambda: optim.RMSProp(good, alpha=2), ValueError, ("alpha:", "[0, 1)", "2")
    yield lambda: optim.Adagrad(good, eps=-1), ValueError, ("eps:", "[0, inf)", "-1")
    yield lambda: optim.Adam(good, betas=(1, 0)), ValueError, ("betas[0]:", "[0, 1)", "1")
    yield lambda: optim.Adam(good, betas=(0, -1)), ValueError, ("betas[1]:", "[0, 1)", "-1")
    yield lambda: optim.SGD({"w": [1.0]}), ValueError, ("params['w']:", "float32", "list")
    yield (
        lambda: optim.SGD({"w": zeros(3, dtype=int)}),
        ValueError,
        ("params['w']:", "float32", "int"),
    )
    yield lambda: optim.SGD({"w": zeros(6)[::2]}), ValueError, ("params['w']:", "contiguous")
    yield lambda: optim.SGD({"w": frozen(zeros(6))}), ValueError, ("params['w']:", "not writable")
    yield lambda: optim.SGD(good).step({}), ValueError, ("grads:", "['w']", "none for 'w'")
    yield lambda: optim.SGD(good).step({"w": zeros(4)}), ValueError, ("grads['w']:", "(3,)", "(4,)")
    yield (
        lambda: optim.SGD(good).step({"w": [1] * 3}),
        ValueError,
        ("grads['w']:", "float32", "int"),
    )
    yield lambda: optim.SGD(good).step({"w": zeros(3, dtype=F8)}), ValueError, ("float32", "64")
    yield lambda: optim.Optimizer(good, 1).step(g), TypeError, ("Optimizer:", "a subclass")


@each_of(("call", "error", "parts"), bad_optimisers)
def test_bad_calls_of_optimisers(call, error, parts):
    with pytest.raises(error, match=says(*parts)):
        call()


def test_a_bad_gradient_changes_nothing():
    params = {"a": np.ones(3, F4), "b": np.ones(3, F4)}
    optimiser = optim.Adam(params, 0.1)
    with pytest.raises(ValueError, match=r"grads\['b'\]"):
        optimiser.step({"a": np.ones(3, F4), "b": np.ones(4, F4)})
    assert optimiser.steps == 0
    assert all((value == 1).all() for value in params.values())


def test_constant_schedule():
    assert [optim.Constant().rate(0.5, step, None) for step in range(3)] == [0.5] * 3


def test_warmup_and_cosine():
    schedule = optim.WarmupCosine(warmup=4, floor=0.1)
    rates = [schedule.rate(2.0, step, 14) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert math.isclose(rates[9], 2.0 * 0.55)
    assert (np.diff(rates[4:15]) < 0).all()
    assert np.allclose(rates[14:], 0.2)
    assert optim.WarmupCosine().rate(2.0, 0, 5) == 2.0
    assert optim.WarmupCosine(warmup=9).rate(2.0, 9, 5) == 2.0
    assert schedule.rate(2.0, 1, None) == 1.0
    with pytest.raises(ValueError, match=says("schedule:", "number of steps", "none")):
        schedule.rate(2.0, 4, None)


def test_plateau():
    schedule = optim.Plateau(factor=0.5, patience=2)
    rates = []
    for value in (3.0, 2.0, 2.0, 2.5, 1.0, math.nan, 1.0, 0.5):
        schedule.observe(value)
        rates.append(schedule.rate(1.0, 0, None))
    assert rates == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_bad_schedules():
    with pytest.raises(ValueError, match=says("warmup:", "at least 0", "-1")):
        optim.WarmupCosine(-1)
    with pytest.raises(ValueError, match=says("floor:", "[0, 1)", "1")):
        optim.WarmupCosine(0, 1)
    with pytest.raises(ValueError, match=says("factor:", "(0, 1)", "0")):
        optim.Plateau(0)
    with pytest.raises(ValueError, match=says("patience:", "at least 1", "0")):
        optim.Plateau(0.5, 0)


# Clipping


@each_dtype
@pytest.mark.parametrize("norm_type", [2, np.inf])
def test_clip_grad_norm(dtype, norm_type, rng):
    start = {key: rng.standard_normal(n).astype(dtype) for key, n in (("a", 5), ("b", 9000))}
    flat = np.concatenate([g.astype(F8) for g in start.values()])
    want = np.linalg.norm(flat, norm_type)
    for limit in (want / 3, want * 3, 0.0):
        grads = {key: g.copy() for key, g in start.items()}
        got = clip_grad_norm_(grads, limit, norm_type)
        assert math.isclose(got, want, rel_tol=1e-12)
        if limit > want:
            same_results(grads, start)
        else:
            assert grad_norm(grads, norm_type) <= limit * (1 + np.finfo(dtype).eps)
            # The small number is PyTorch's, against a division by zero.
            factor = limit / (want + 1e-6)
            for key, g in grads.items():
                agree(g, start[key].astype(F8) * factor, dtype, 10, key)


@each_dtype
def test_clip_grad_value(dtype, rng):
    start = {key: rng.standard_normal(n).astype(dtype) for key, n in (("a", 5), ("b", 90))}
    start["a"][2] = np.nan
    grads = {key: g.copy() for key, g in start.items()}
    clip_grad_value_(grads, 0.5)
    same_results(grads, {key: np.clip(g, dtype(-0.5), dtype(0.5)) for key, g in start.items()})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("norm_type", [2, np.inf])
def test_norm_that_is_not_finite(bad, norm_type):
    grads = {"a": np.ones(3, F4), "b": np.array([1, bad, 2], F4)}
    before = {key: g.copy() for key, g in grads.items()}
    assert not math.isfinite(clip_grad_norm_(grads, 1.0, norm_type))
    same_results(grads, before)
    with pytest.raises(ValueError, match=says("grads:", "finite norm")):
        clip_grad_norm_(grads, 1.0, norm_type, error_if_nonfinite=True)


def test_norm_of_large_numbers_does_not_overflow():
    g = np.full(4, 1e30, F4)
    assert math.isclose(grad_norm({"a": g}), 2e30, rel_tol=1e-6)
    assert math.isclose(grad_norm({"a": np.full(4, 1e300)}), 2e300, rel_tol=1e-12)


def test_no_limit_only_measures():
    grads = {"a": np.array([3.0, 4.0])}
    assert clip_grad_norm_(grads, np.inf) == 5
    assert grads["a"].tolist() == [3, 4]


def test_norm_of_nothing():
    assert grad_norm({}) == 0
    assert grad_norm({}, np.inf) == 0
    assert clip_grad_norm_({}, 1.0, np.inf) == 0


def bad_clips():
    good, fixed = {"a": zeros(3)}, {"a": frozen(zeros(3))}
    yield lambda: clip_grad_norm_(good, -1), ValueError, ("max_norm:", "[0, inf)", "-1")
    yield lambda: clip_grad_norm_(good, np.nan), ValueError, ("max_norm:", "[0, inf)", "nan")
    yield lambda: clip_grad_norm_(good, 1, 3), ValueError, ("norm_type:", "2 or inf", "3")
    yield lambda: clip_grad_norm_(fixed, 1), ValueError, ("grads['a']:", "writable", "read-only")
    yield lambda: clip_grad_norm_([zeros(3)], 1), TypeError, ("grads:", "mapping", "list")
    yield lambda: clip_grad_value_([zeros(3)], 1), TypeError, ("grads:", "mapping", "list")
    yield lambda: clip_grad_value_(good, "x"), TypeError, ("clip_value:", "a number", "'x'")
    yield lambda: clip_grad_value_(fixed, 1), ValueError, ("grads['a']:", "writable", "read-only")


@each_of(("call", "error", "parts"), bad_clips)
def test_bad_calls_of_clipping(call, error, parts):
    with pytest.raises(error, match=says(*parts)):
        call()


def test_every_cell_is_a_public_layer():
    found = {layer.cell.name for layer in (new_layer(cell, n_in, H) for cell in CELLS)}
    assert found == set(CELLS)


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
