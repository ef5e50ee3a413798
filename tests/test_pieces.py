"""`checkpoint_every`: pieces that are run again give the bits of the whole."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import (
    as_parts,
    as_state,
    each_cell,
    each_dtype,
    make_problem,
    same,
    same_results,
    threads,
)
from hypothesis import given
from hypothesis import strategies as st

import fastrnn
from fastrnn import recurrence, single
from fastrnn.cells import CELLS
from fastrnn.simd import padded

T, B, I, H = 7, 4, 5, 19  # noqa: E741


def run(problem, every, *, lengths=None, resets=None, vectors=None, twice=False):
    """Every array that forward and backward give."""
    rnn, state = problem.rnn, as_state(problem.state)
    options = {"resets": resets, "vectors": vectors, "seed": 3, "checkpoint_every": every}
    output, final, saved = rnn.forward(problem.x, state, lengths, **options)
    results = {"output": output.copy()}
    arguments = saved, problem.d_output, as_state(problem.d_state)
    if twice:
        rnn.backward(*arguments, retain=True)
    d_x, d_first, grads = rnn.backward(*arguments)
    for kind, parts in (("final", final), ("d initial", d_first)):
        results |= {f"{kind} {i}": part for i, part in enumerate(as_parts(parts))}
    return results | ({} if d_x is None else {"d x": d_x}) | grads


def both_ways(problem):
    """The same problem with room for two directions."""
    rng = np.random.default_rng(5)
    shape = problem.d_output.shape[:2]
    problem.d_output = rng.standard_normal((*shape, problem.rnn.output_size)).astype(problem.dtype)
    for name in ("state", "d_state"):
        parts = [np.concatenate([s, 2 * s]) for s in getattr(problem, name)]
        setattr(problem, name, tuple(parts))
    return problem


@each_cell
@each_dtype
@pytest.mark.parametrize("tokens", [False, True], ids=["dense", "tokens"])
@pytest.mark.parametrize("every", [1, 3, 6])
def test_same_bits(cell, dtype, tokens, every):
    problem = make_problem(cell, T, B, I, H, layers=2, tokens=tokens, dtype=dtype, dropout=0.3)
    want = run(problem, None)
    same_results(run(problem, every), want)
    same_results(run(problem, every, twice=True), want)
    same_results(run(problem, T), want)
    with threads(3):
        same_results(run(problem, every), want)


@each_cell
@pytest.mark.parametrize("every", [2, 5])
def test_with_vectors(cell, every, rng):
    problem = make_problem(cell, T, B, I, H, tokens=True, dtype=np.float32)
    vectors = rng.standard_normal((I + 4, I)).astype("f4")
    want = run(problem, None, vectors=vectors)
    assert want["d x"].shape == vectors.shape
    same_results(run(problem, every, vectors=vectors), want)


def both_directions(cell, dtype, merge, **options):
    rnn = make_problem(cell, T, B, I, H, layers=2, dtype=dtype, **options)
    kind, settings = type(rnn.rnn), {"bidirectional": True, "merge": merge, "dtype": dtype}
    for name in (
        *("nonlinearity", "reset_after", "reset_gate", "peephole", "coupled", "cell_clip"),
        *("proj_size", "layer_norm"),
    ):
        if hasattr(rnn.rnn, name):
            settings[name] = getattr(rnn.rnn, name)
    rnn.rnn = kind(I, H, 2, seed=4, **settings)
    return both_ways(rnn)


@each_cell
@pytest.mark.parametrize("merge", ["concat", "sum", "mean"])
def test_both_directions(cell, merge):
    problem = both_directions(cell, np.float32, merge)
    lengths = [7, 2, 0, 5]
    for given_lengths in (None, lengths):
        want = run(problem, None, lengths=given_lengths)
        for every in (1, 3):
            same_results(run(problem, every, lengths=given_lengths), want)


cases = st.fixed_dictionaries(
    {
        "cell": st.sampled_from(sorted(CELLS)),
        "both": st.booleans(),
        "tokens": st.booleans(),
        "every": st.integers(1, T),
        "lengths": st.none() | st.lists(st.integers(0, T), min_size=B, max_size=B),
        "resets": st.none() | st.integers(0, 2**31),
        "count": st.integers(1, 3),
    }
)


@given(cases)
def test_all_together(case):
    if case["both"]:
        problem = both_directions(case["cell"], np.float64, "concat")
    else:
        tokens = case["tokens"]
        problem = make_problem(case["cell"], T, B, I, H, layers=2, tokens=tokens, dropout=0.5)
    resets = case["resets"]
    if resets is not None:
        resets = np.random.default_rng(resets).random((T, B)) < 0.3
    options = {"lengths": case["lengths"], "resets": resets}
    want = run(problem, None, **options)
    with threads(case["count"]):
        same_results(run(problem, case["every"], **options), want)


def test_what_is_kept(rng):
    layer = fastrnn.LSTM(I, H, 2, seed=0)
    x = rng.standard_normal((100, B, I)).astype("f4")
    _, _, whole = layer.forward(x)
    _, _, pieces = layer.forward(x, checkpoint_every=10)
    # Of the last layer the last piece, all that backward begins with, instead of its states.
    states = (10 + 9) * 2 * B * H * 4
    hidden = padded(H, np.float32)
    last = B * (11 * H + 11 * hidden + 10 * 4 * hidden) * 4
    assert pieces.nbytes == states + last
    assert whole.nbytes == 2 * B * (101 * H + 101 * hidden + 100 * 4 * hidden) * 4


@pytest.mark.parametrize("every", [0, -1, 1.5, "x"])
def test_a_bad_number_is_named(every, rng):
    x = rng.standard_normal((3, 2, 3)).astype("f4")
    with pytest.raises((TypeError, ValueError), match="checkpoint_every: expected"):
        fastrnn.GRU(3, 4).forward(x, checkpoint_every=every)


def test_one_sequence_without_a_batch(rng):
    layer = fastrnn.GRU(3, 5, seed=0)
    x = rng.standard_normal((8, 3)).astype("f4")
    results = []
    for every in (None, 3):
        y, _, saved = layer.forward(x, checkpoint_every=every)
        results.append([y, *layer.backward(saved, np.ones_like(y))[:2]])
    for a, b in zip(*results, strict=True):
        same(a, b)


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn_tanh"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("lengths", [None, [T] * B, [7, 5, 0, 2]], ids=str)
def test_resets_where_pieces_begin(cell, layers, every, lengths):
    # No piece has a column more for them, but none may write over the one before.
    problem = make_problem(cell, T, B, I, H, layers=layers)
    resets = np.zeros((T, B), bool)
    resets[every::every, 1:] = True
    want = run(problem, None, lengths=lengths, resets=resets)
    same_results(run(problem, every, lengths=lengths, resets=resets), want)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("size", [64, 96, 144, 640])
def test_scratch_is_of_one_size_that_does_for_every_piece(size, both, count, monkeypatch):
    """Units that threads share make chunks longer; most sizes do not divide evenly."""
    rng = np.random.default_rng(0)
    found = []

    def watched(function, meet, parts, calls):
        if function is recurrence.forward_slice:
            for _, _, chunk, keep, starts, ends, *_, tape, _, _ in calls:
                assert len(tape) >= (starts[-1] - starts[1] if keep else chunk * (len(ends) - 1))
                found.extend([] if keep else [len(tape)])
        return original(function, meet, parts, calls)

    original = single._run
    monkeypatch.setattr(single, "_run", watched)
    layer = fastrnn.LSTM(3, size, bidirectional=both, seed=0)
    for batch in (1, 5):
        x = rng.standard_normal((1050, batch, 3), dtype=np.float32)
        resets = rng.random((1050, batch)) < 0.005
        for uneven in ({}, {"resets": resets}):
            found.clear()
            with threads(count):
                layer.forward(x, checkpoint_every=350, **uneven)
            assert len(found) == 2 * (1 + both)
            assert len(set(found)) == 1
