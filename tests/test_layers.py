"""What recurrent layers promise: shapes, types, layouts, and whose memory is whose."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import (
    F4,
    F8,
    OPTIONS,
    agree,
    as_parts,
    as_state,
    computed,
    each_cell,
    each_dtype,
    forms,
    frozen,
    make_problem,
    new_layer,
    same,
    same_results,
    threads,
    zeros,
)

import fastrnn
from fastrnn.cells import CELLS
from fastrnn.simd import lanes

T, B, n_in, H = 4, 3, 5, 6


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


def test_replaced_params_are_used():
    rnn = fastrnn.GRU(n_in, H, seed=0)
    twin = fastrnn.GRU(n_in, H, seed=1)
    x = np.ones((T, B, n_in), F4)
    rnn.params |= twin.state_dict()
    same(rnn(x)[0], twin(x)[0])


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


def test_every_cell_is_a_public_layer():
    found = {layer.cell.name for layer in (new_layer(cell, n_in, H) for cell in CELLS)}
    assert found == set(CELLS)
