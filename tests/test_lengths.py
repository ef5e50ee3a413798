"""Lengths and resets: what each piece would give alone, whatever stands beside it."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import (
    as_parts,
    as_state,
    compare,
    each_cell,
    each_dtype,
    expected,
    make_problem,
    same,
    same_results,
    threads,
)
from hypothesis import given
from hypothesis import strategies as st

import fastrnn
from fastrnn import single
from fastrnn.cells import CELLS
from fastrnn.layout import even, of_lengths

LENGTHS = [(3, 7, 0, 7, 1), (0, 0), (4,), (7, 7, 7), (1, 2, 3, 4, 5, 6, 7), (0, 7)]


def run(problem, lengths, resets=None, *, keep=True):
    """Every array that forward and backward give."""
    rnn, state = problem.rnn, as_state(problem.state)
    if not keep:
        output, final = rnn(problem.x, state, lengths, resets=resets)
        return {"output": output} | named("final", problem, final)
    output, final, saved = rnn.forward(problem.x, state, lengths, resets=resets, seed=3)
    results = {"output": output.copy()} | named("final", problem, final)
    d_output = np.full_like(problem.d_output, np.nan)
    # What comes in at padded steps is ignored, even NaN.
    for b, length in enumerate(lengths):
        d_output[:length, b] = problem.d_output[:length, b]
    d_x, d_first, grads = rnn.backward(saved, d_output, as_state(problem.d_state))
    results |= named("d initial", problem, d_first)
    return results | ({} if d_x is None else {"d x": d_x}) | grads


def named(kind, problem, state):
    parts = zip(problem.names, as_parts(state), strict=True)
    return {f"{kind} {name}": part for name, part in parts}


def one_by_one(problem, lengths, resets=None):
    """The same by the reference, a piece at a time."""
    T, B = problem.x.shape[:2]
    resets = np.zeros((T, B), bool) if resets is None else resets
    rnn = problem.rnn
    shapes = {"output": (T, B, rnn.output_size), "d x": (T, B, rnn.input_size)}
    shapes |= {
        f"{kind} {name}": (rnn.num_layers, B, size)
        for kind in ("final", "d initial")
        for name, size in zip(problem.names, rnn.state_sizes, strict=True)
    }
    shapes |= {key: value.shape for key, value in rnn.params.items()}
    total = {key: np.zeros(shape) for key, shape in shapes.items()}
    for b, length in enumerate(lengths):
        if length == 0:
            for i, name in enumerate(problem.names):
                total[f"final {name}"][:, b] = problem.state[i][:, b]
                total[f"d initial {name}"][:, b] = problem.d_state[i][:, b]
        begins = sorted({0, *np.flatnonzero(resets[:length, b])}) if length else []
        for begin, end in zip(begins, [*begins[1:], length][: len(begins)], strict=True):
            piece = problem.piece(slice(begin, end), slice(b, b + 1))
            if resets[begin, b]:
                piece.state = tuple(0 * s for s in piece.state)
            if end < length:
                piece.d_state = tuple(0 * s for s in piece.d_state)
            for key, value in expected(piece).items():
                if key in ("output", "d x"):
                    total[key][begin:end, b] = value[:, 0]
                elif " " not in key:
                    total[key] += value
                elif end == length if "final" in key else begin == 0 and not resets[0, b]:
                    total[key][:, b] = value[:, 0]
    if problem.x.dtype.kind == "i":
        del total["d x"]
    return total


@each_cell
@each_dtype
@pytest.mark.parametrize("tokens", [False, True], ids=["dense", "tokens"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_each_sequence_is_alone(cell, dtype, tokens, lengths):
    problem = make_problem(cell, 7, len(lengths), 5, 19, layers=2, tokens=tokens, dtype=dtype)
    got = run(problem, lengths)
    for b, length in enumerate(lengths):
        assert (got["output"][length:, b] == 0).all()
        assert tokens or (got["d x"][length:, b] == 0).all()
    if not any(lengths):
        for name, first, d_last in zip(problem.names, problem.state, problem.d_state, strict=True):
            same(got[f"final {name}"], first)
            same(got[f"d initial {name}"], d_last)
        assert all((got[key] == 0).all() for key in problem.rnn.params)
        return
    compare(problem, got, one_by_one(problem, lengths))
    if not tokens:
        without = run(problem, lengths, keep=False)
        same_results(without, {key: got[key] for key in without})


@each_cell
@each_dtype
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_same_bits_for_any_number_of_threads(cell, dtype, lengths, count):
    problem = make_problem(cell, 7, len(lengths), 5, 33, layers=2, dtype=dtype)
    want = run(problem, lengths)
    with threads(count):
        same_results(run(problem, lengths), want)
        without = run(problem, lengths, keep=False)
    same_results(without, {key: want[key] for key in without})


@each_cell
def test_all_of_one_length_are_as_without(cell):
    problem = make_problem(cell, 7, 5, 5, 19, layers=2)
    with_lengths = run(problem, [7] * 5)
    output, _, saved = problem.rnn.forward(problem.x, as_state(problem.state))
    same(with_lengths["output"], output)
    d_x, _, grads = problem.rnn.backward(saved, problem.d_output, as_state(problem.d_state))
    same(with_lengths["d x"], d_x)
    same_results({key: with_lengths[key] for key in grads}, grads)


@each_cell
@pytest.mark.parametrize("lengths", LENGTHS[:1], ids=str)
def test_a_sequence_is_the_same_in_any_company(cell, lengths):
    problem = make_problem(cell, 7, len(lengths), 5, 19, layers=2)
    whole = run(problem, lengths)
    for b, length in enumerate(lengths):
        alone = run(problem.piece(slice(None), slice(b, b + 1)), [length])
        for key in alone:
            if " " in key or key == "output":
                same(np.ascontiguousarray(whole[key][:, b : b + 1]), alone[key], key)


@each_cell
@each_dtype
@pytest.mark.parametrize("tokens", [False, True], ids=["dense", "tokens"])
@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("lengths", [None, *LENGTHS[::3]], ids=str)
def test_each_part_between_resets_is_alone(cell, dtype, tokens, rate, lengths, rng):
    counts = lengths or (7, 7, 7, 7)
    problem = make_problem(cell, 7, len(counts), 5, 19, layers=2, tokens=tokens, dtype=dtype)
    resets = rng.random((7, len(counts))) < rate
    got = run(problem, counts, resets)
    want = one_by_one(problem, counts, resets)
    compare(problem, got, want)
    if lengths is None:
        without = problem.rnn(problem.x, as_state(problem.state), resets=resets)[0]
        if not tokens:
            same(without, got["output"])
    with threads(3):
        same_results(run(problem, counts, resets), got)


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_pieces_with_resets_are_the_whole(cell, rng):
    problem = make_problem(cell, 9, 4, 4, 5, layers=2)
    resets = rng.random((9, 4)) < 0.3
    want = run(problem, [9] * 4, resets)
    rnn = problem.rnn
    for cut in range(1, 9):
        early, late = slice(0, cut), slice(cut, 9)
        y1, state, first = rnn.forward(
            problem.x[early], as_state(problem.state), resets=resets[early]
        )
        y2, _, second = rnn.forward(problem.x[late], state, resets=resets[late])
        d_last = as_state(problem.d_state)
        d2, d_state, grads = rnn.backward(second, problem.d_output[late], d_last)
        d1, d_first, grads = rnn.backward(first, problem.d_output[early], d_state, grads)
        got = {"output": np.concatenate([y1, y2]), "d x": np.concatenate([d1, d2])}
        got |= named("d initial", problem, d_first) | grads
        same_results(got, {key: want[key] for key in got})


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=9),
    st.integers(1, 8),
    st.sampled_from(sorted(CELLS)),
    st.booleans(),
)
def test_pieces_are_the_whole(lengths, cut, cell, tokens):
    problem = make_problem("lstm" if "relu" in cell else cell, 9, len(lengths), 4, 5, tokens=tokens)
    want = run(problem, lengths)
    early = [min(n, cut) for n in lengths]
    late = [n - m for n, m in zip(lengths, early, strict=True)]
    rnn = problem.rnn
    y1, state, first = rnn.forward(problem.x[:cut], as_state(problem.state), early)
    y2, final, second = rnn.forward(problem.x[cut:], state, late)
    d2, d_state, grads = rnn.backward(second, problem.d_output[cut:], as_state(problem.d_state))
    d1, d_first, grads = rnn.backward(first, problem.d_output[:cut], d_state, grads)
    got = {"output": np.concatenate([y1, y2])}
    got |= named("final", problem, final) | named("d initial", problem, d_first)
    got |= {} if tokens else {"d x": np.concatenate([d1, d2])}
    same_results(got | grads, want)


@each_cell
def test_dropout_is_that_of_the_step_and_the_sequence(cell):
    lengths = LENGTHS[0]
    problem = make_problem(cell, 7, len(lengths), 5, 19, layers=3, dropout=0.5)
    padded, _, _ = problem.rnn.forward(problem.x, as_state(problem.state), seed=3)
    for b, length in enumerate(lengths):
        same(run(problem, lengths)["output"][:length, b], padded[:length, b])


def test_against_packed_sequences():
    torch = pytest.importorskip("torch")
    lengths = [3, 7, 2, 7, 1]
    problem = make_problem("lstm", 7, 5, 4, 6, layers=2)
    theirs = torch.nn.LSTM(4, 6, 2, dtype=torch.float64)
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in problem.rnn.params.items()})
    x = torch.tensor(problem.x, requires_grad=True)
    pack, unpack = torch.nn.utils.rnn.pack_padded_sequence, torch.nn.utils.rnn.pad_packed_sequence
    state = tuple(torch.tensor(s, requires_grad=True) for s in problem.state)
    packed, final = theirs(pack(x, torch.tensor(lengths), enforce_sorted=False), state)
    output, _ = unpack(packed)
    loss = (output * torch.tensor(problem.d_output)).sum()
    for part, d in zip(final, problem.d_state, strict=True):
        loss = loss + (part * torch.tensor(d)).sum()
    loss.backward()
    got = run(problem, lengths)
    want = {"output": output, "final h": final[0], "final c": final[1], "d x": x.grad}
    want |= {"d initial h": state[0].grad, "d initial c": state[1].grad}
    want |= {key: p.grad for key, p in theirs.named_parameters()}
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value.detach().numpy(), rtol=1e-9, atol=1e-11)


def test_a_mask_says_the_same():
    lengths = [3, 7, 0, 5]
    gru = fastrnn.GRU(5, 6, dtype=np.float64, seed=0)
    first = fastrnn.GRU(5, 6, dtype=np.float64, seed=0, batch_first=True)
    x = np.random.default_rng(0).standard_normal((7, 4, 5))
    want, state = gru(x, lengths=lengths)
    mask = np.arange(7)[:, None] < np.array(lengths)
    same(gru(x, lengths=mask)[0], want)
    got, last = first(x.swapaxes(0, 1), lengths=mask.T)
    same(np.ascontiguousarray(got.swapaxes(0, 1)), want)
    same(last, state)
    one, last = gru(x[:, 0], lengths=3)
    same(np.ascontiguousarray(one), np.ascontiguousarray(want[:, 0]))
    same(np.ascontiguousarray(last), np.ascontiguousarray(state[:, 0]))
    same(np.ascontiguousarray(gru(x[:, 0], lengths=mask[:, 0])[0]), np.ascontiguousarray(one))


BAD = [
    ([1, 2, 8], ValueError, "from 0 to T = 7, got 8"),
    ([1, -2, 7], ValueError, "from 0 to T = 7, got -2"),
    ([1, 2], ValueError, r"expected shape \(B\) = \(3\), got \(2,\)"),
    ([1.0, 2.0, 3.0], TypeError, "expected integers or a boolean mask, got float64"),
    ([1, None, 3], TypeError, "expected an array of numbers, got dtype object"),
    (np.arange(7)[:, None] >= np.arange(3), ValueError, "sequence 1; move the padding to the end"),
    (np.ones((3, 7), bool), ValueError, r"expected shape \(T, B\) = \(7, 3\), got \(3, 7\)"),
]


def test_what_resets_may_be():
    gru = fastrnn.GRU(5, 6)
    x = np.zeros((7, 3, 5), np.float32)
    with pytest.raises(ValueError, match=r"resets: expected shape \(T, B\) = \(7, 3\)"):
        gru(x, resets=np.zeros(7, bool))
    with pytest.raises(ValueError, match=r"resets: expected True or False.*write \.astype\(bool\)"):
        gru(x, resets=np.full((7, 3), 2))
    numbers = np.arange(21).reshape(7, 3) % 4 == 0
    for kind in (int, float, np.uint8):
        same(gru(x, resets=numbers.astype(kind))[0], gru(x, resets=numbers)[0])


@pytest.mark.parametrize(("lengths", "error", "words"), BAD, ids=str)
def test_what_lengths_may_be(lengths, error, words):
    gru = fastrnn.GRU(5, 6)
    with pytest.raises(error, match="lengths: .*" + words):
        gru(np.zeros((7, 3, 5), np.float32), lengths=lengths)


@pytest.mark.parametrize(
    ("lengths", "error", "words"),
    [
        (8, ValueError, "from 0 to T = 7, got 8"),
        (-1, ValueError, "from 0 to T = 7, got -1"),
        (2.0, TypeError, "expected integers or a boolean mask, got float64"),
        (np.arange(7) != 3, ValueError, "sequence 0; move the padding to the end"),
    ],
    ids=str,
)
def test_what_the_length_of_one_sequence_may_be(lengths, error, words):
    gru = fastrnn.GRU(5, 6)
    with pytest.raises(error, match="lengths: .*" + words):
        gru(np.zeros((7, 5), np.float32), lengths=lengths)


def test_what_a_mask_with_the_batch_first_may_be():
    gru = fastrnn.GRU(5, 6, batch_first=True)
    x, mask = np.zeros((3, 7, 5), np.float32), np.ones((3, 7), bool)
    with pytest.raises(ValueError, match=r"lengths: expected shape \(B, T\) = \(3, 7\)"):
        gru.forward(x, lengths=mask.T)
    mask[2, :2] = False
    with pytest.raises(ValueError, match=r"lengths: .* sequence 2; move the padding to the end"):
        gru.forward(x, lengths=mask)


@pytest.mark.parametrize("kind", [int, np.uint8, np.float32])
def test_a_mask_of_numbers_is_to_be_made_boolean(kind):
    mask = np.arange(7)[:, None] < np.array([7, 2, 0])
    x, words = np.zeros((7, 3, 5), np.float32), r"booleans, got \w+; write \.astype\(bool\)$"
    gru, first = fastrnn.GRU(5, 6, seed=0), fastrnn.GRU(5, 6, batch_first=True, seed=0)
    with pytest.raises(TypeError, match=r"lengths: expected a mask \(T, B\) of " + words):
        gru(x, lengths=mask.astype(kind))
    with pytest.raises(TypeError, match=r"lengths: expected a mask \(B, T\) of " + words):
        first(x.swapaxes(0, 1), lengths=mask.T.astype(kind))
    with pytest.raises(TypeError, match=r"lengths: expected a mask \(T\) of " + words):
        gru(x[:, 0], lengths=mask[:, 0].astype(kind))
    same(gru(x, lengths=mask.astype(kind).astype(bool))[0], gru(x, lengths=mask)[0])
    # As many steps as sequences: numbers are lengths.
    same(
        gru(x[:3], lengths=[1, 1, 0])[0],
        gru(x[:3], lengths=np.array([[1, 1, 0], *[[0] * 3] * 2]) > 0)[0],
    )
    same(gru(x[:1, 0], lengths=[1])[0], gru(x[:1, 0])[0])


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8))
def test_a_layout_has_each_step_once(lengths):
    layout = of_lengths(np.array(lengths))
    T, B = max(lengths), len(lengths)
    steps = [(t, b) for t in range(T) for b in range(B) if lengths[b] > t]
    assert sorted(layout.source) == [t * B + b for t, b in steps]
    # Backwards in time, then in the caller's order.
    order = sorted(steps, key=lambda step: (-step[0], step[1]))
    assert list(layout.source[layout.rows]) == [t * B + b for t, b in order]
    first = np.arange(B)[layout.first]
    column = {b: int(i) for b, i in enumerate(first)}
    assert list(np.arange(B)[layout.final]) == list(first)
    assert list(layout.before) == [layout.starts[t] + column[b] for t, b in order]
    assert list(np.arange(len(steps) + B)[layout.last]) == [
        layout.starts[n] + column[b] for b, n in enumerate(lengths)
    ]
    assert list(np.diff(layout.ends)) == sorted(lengths, reverse=True)


def test_even_is_the_plain_order():
    layout = even(3, 2, 0)
    assert list(layout.source) == list(range(6))
    assert list(layout.starts) == [0, 2, 4, 6, 8]
    assert list(layout.rows) == [4, 5, 2, 3, 0, 1]
    assert list(layout.before) == [4, 5, 2, 3, 0, 1]


@pytest.mark.parametrize("cell", ["gru", "gru_before", "lstm", "lstm_peephole", "rnn_tanh"])
@pytest.mark.parametrize("tokens", [False, True], ids=["dense", "tokens"])
def test_threads_in_different_chunks_share_no_memory(cell, tokens, monkeypatch):
    # Without a tape, rows are used again; the thread with the short sequences runs ahead.
    monkeypatch.setattr(single, "_CHUNK_BYTES", 1)
    lengths = (400, 350, 90, 80, 300, 60)
    problem = make_problem(cell, 400, 6, 5, 70, tokens=tokens, dtype=np.float32)
    want = run(problem, lengths)
    with threads(2):
        for _ in range(10):
            got = run(problem, lengths, keep=False)
            same_results(got, {key: want[key] for key in got})
