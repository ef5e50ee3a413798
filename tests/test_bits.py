"""Same bits: for any number of threads, alone or in a batch, whole or in pieces."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import (
    as_parts,
    as_state,
    computed,
    each_cell,
    each_dtype,
    make_problem,
    same,
    same_results,
    threads,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import fastrnn
from fastrnn import gemm, optim, single
from fastrnn.cells import CELLS
from fastrnn.clip import clip_grad_norm_, grad_norm
from fastrnn.dropout import dropout
from fastrnn.generate import generate
from fastrnn.loss import softmax_cross_entropy, token_losses
from fastrnn.models import CELL_NAMES, LanguageModel
from fastrnn.score import score

COUNTS = (1, 2, 3)
each_input = pytest.mark.parametrize("tokens", [False, True], ids=["dense", "tokens"])
each_name = pytest.mark.parametrize("name", CELL_NAMES)


def for_any_threads(function):
    """The results of a call, the same for any number of threads and for how calls are cut."""
    want = function()
    for count in COUNTS:
        with threads(count):
            same_results(function(), want)
    return want


def numbered(*arrays):
    return dict(enumerate(arrays))


@each_cell
@each_dtype
@each_input
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (5, 2, 3, 19), (3, 7, 18, 33), (2, 97, 3, 5)], ids=str
)
def test_threads(cell, dtype, tokens, shape):
    problem = make_problem(cell, *shape, layers=2, tokens=tokens, dtype=dtype)
    for_any_threads(lambda: computed(problem))


@each_cell
@each_dtype
@each_input
def test_a_sequence_alone_and_in_any_batch(cell, dtype, tokens):
    shape = (3, gemm.HEIGHT + 3, 5, 19)
    problem = make_problem(cell, *shape, layers=2, tokens=tokens, dtype=dtype)
    params = problem.rnn.params
    whole = {k: v for k, v in computed(problem).items() if k not in params}
    last = shape[1]
    places = [slice(0, 1), slice(4, 5), slice(last - 1, last)]
    places += [slice(first, first + size) for first, size in ((1, 2), (3, 5), (2, 6), (7, 7))]
    places += [[4, 0, 90], list(reversed(range(last)))]
    for columns in places:
        piece = problem.piece(columns=columns)
        for count in (1, 2):
            with threads(count):
                got = computed(piece)
            for key, value in whole.items():
                same(got[key], value[:, columns], key)


def in_pieces(problem, lengths, grads=None):
    """The arrays of `computed`, over pieces: forward from the first, backward from the last."""
    rnn, state = problem.rnn, as_state(problem.state)
    ends = np.cumsum(lengths)
    cuts = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    outputs, kept = [], []
    for cut in cuts:
        output, state, saved = rnn.forward(problem.x[cut], state)
        outputs.append(output.copy())
        kept.append(saved)
    results = {"output": np.concatenate(outputs)}
    results |= {f"final {n}": s for n, s in zip(problem.names, as_parts(state), strict=True)}
    d_state, d_xs = as_state(problem.d_state), []
    for cut, saved in zip(reversed(cuts), reversed(kept), strict=True):
        d_x, d_state, grads = rnn.backward(saved, problem.d_output[cut], d_state, grads)
        d_xs.insert(0, d_x)
    results |= {f"d initial {n}": s for n, s in zip(problem.names, as_parts(d_state), strict=True)}
    if d_xs[0] is not None:
        results["d x"] = np.concatenate(d_xs)
    return results | grads


@each_cell
@each_dtype
@each_input
@pytest.mark.parametrize("lengths", [(7,), (3, 4), (1, 6), (6, 1), (2, 3, 2), (1,) * 7], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 61])
def test_a_sequence_and_its_pieces(cell, dtype, tokens, lengths, batch):
    problem = make_problem(cell, 7, batch, 5, 19, layers=2, tokens=tokens, dtype=dtype)
    same_results(in_pieces(problem, lengths), computed(problem))


@each_cell
@each_dtype
def test_pieces_by_different_threads_that_add_to_given_gradients(cell, dtype, rng):
    problem = make_problem(cell, 7, 3, 5, 19, dtype=dtype)
    params = problem.rnn.params
    start = {key: rng.standard_normal(p.shape).astype(dtype) for key, p in params.items()}
    want = computed(problem, grads={key: value.copy() for key, value in start.items()})
    for count in COUNTS:
        with threads(count):
            grads = {key: value.copy() for key, value in start.items()}
            same_results(in_pieces(problem, (2, 4, 1), grads), want)


@st.composite
def cut_problems(draw):
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    n_in, H, B = draw(st.integers(1, 40)), draw(st.integers(3, 40)), draw(st.integers(1, 15))
    cell = draw(st.sampled_from(sorted(CELLS)))
    if "relu" in cell:
        lengths = [min(n, 2) for n in lengths[:3]]
    problem = make_problem(
        cell,
        sum(lengths),
        B,
        n_in,
        H,
        layers=draw(st.integers(1, 2)),
        bias=draw(st.booleans()),
        tokens=draw(st.booleans()),
        dtype=draw(st.sampled_from([np.float32, np.float64])),
    )
    return problem, lengths, draw(st.integers(1, 4)), draw(st.integers(0, B - 1))


def check_cut(problem, lengths, count, column):
    want = computed(problem)
    with threads(count):
        same_results(in_pieces(problem, lengths), want)
        alone = computed(problem.piece(columns=slice(column, column + 1)))
    for key in want.keys() - problem.rnn.params.keys():
        same(alone[key], want[key][:, column : column + 1], key)


@given(cut_problems())
def test_random_cuts(case):
    check_cut(*case)


@pytest.mark.slow
@settings(max_examples=1000)
@given(cut_problems())
def test_many_random_cuts(case):
    check_cut(*case)


@each_cell
@each_dtype
@each_input
@pytest.mark.parametrize("chunk_bytes", [1, 5000, single._CHUNK_BYTES])
def test_inference_and_training(cell, dtype, tokens, chunk_bytes, monkeypatch):
    problem = make_problem(cell, 9, 3, 5, 19, layers=2, tokens=tokens, dtype=dtype)
    want = computed(problem)
    monkeypatch.setattr(single, "_CHUNK_BYTES", chunk_bytes)
    for count in COUNTS:
        with threads(count):
            output, final = problem.rnn(problem.x, as_state(problem.state))
            same(output, want["output"])
            for name, value in zip(problem.names, as_parts(final), strict=True):
                same(value, want[f"final {name}"])
            same_results(computed(problem), want)


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (7, 19), (130, 3)], ids=str)
def test_dropout_masks(dtype, shape, rng):
    x = rng.standard_normal((shape[0], 1, shape[1])).astype(dtype)

    def drop(seed=5):
        y = np.full_like(x, np.nan)
        dropout(x, 0.4, seed, y)
        return numbered(y)

    want = for_any_threads(drop)
    inplace = x.copy()
    dropout(inplace, 0.4, 5, inplace)
    same(inplace, want[0])
    # A sequence has its mask whatever batch it stands in.
    batch = np.concatenate([x, -x, x], axis=1)
    dropout(batch, 0.4, 5, batch)
    same(batch[:, :1], want[0])
    if x.size > 50:
        assert (drop(6)[0] != want[0]).any()


@each_cell
@each_dtype
@each_input
def test_dropout_between_layers(cell, dtype, tokens):
    problem = make_problem(cell, 4, 3, 5, 19, layers=3, dropout=0.5, tokens=tokens, dtype=dtype)
    rnn = problem.rnn

    def train(seed=7):
        output, final, saved = rnn.forward(problem.x, as_state(problem.state), seed=seed)
        d_x, d_state, grads = rnn.backward(saved, problem.d_output, as_state(problem.d_state))
        parts = as_parts(final) + as_parts(d_state)
        return numbered(output, *parts, *(() if tokens else (d_x,))) | grads

    want = for_any_threads(train)
    assert (train(8)[0] != want[0]).any()


@each_dtype
@pytest.mark.parametrize("lead", [(1,), (7,), (5, 3)], ids=str)
def test_linear(dtype, lead, rng):
    linear = fastrnn.Linear(19, 33, dtype=dtype, seed=0)
    x, d_y = (rng.standard_normal((*lead, n)).astype(dtype) for n in (19, 33))

    def train(x=x, d_y=d_y, grads=None):
        y, saved = linear.forward(x)
        d_x, grads = linear.backward(saved, d_y, grads)
        return numbered(y, d_x) | grads

    want = for_any_threads(train)
    for i in range(lead[0]):
        alone = train(x[i : i + 1], d_y[i : i + 1])
        same(alone[0], want[0][i : i + 1])
        same(alone[1], want[1][i : i + 1])
    if len(lead) == 2:
        grads = None
        for i in reversed(range(lead[0])):
            grads = linear.backward(x[i : i + 1], d_y[i : i + 1], grads)[1]
        same_results(grads, {key: want[key] for key in linear.params})


@each_dtype
def test_embedding(dtype, rng):
    embedding = fastrnn.Embedding(4, 37, dtype=dtype, seed=0)
    ids, d_y = rng.integers(4, size=(6, 3)), rng.standard_normal((6, 3, 37)).astype(dtype)
    want = for_any_threads(lambda: numbered(embedding(ids)) | embedding.backward(ids, d_y))
    grads = None
    for t in reversed(range(6)):
        grads = embedding.backward(ids[t : t + 1], d_y[t : t + 1], grads)
    same(grads["weight"], want["weight"])


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (7, 19), (5, 3, 130)], ids=str)
def test_softmax_cross_entropy(dtype, shape, rng):
    logits = (rng.standard_normal(shape) * 4).astype(dtype)
    targets = rng.integers(shape[-1], size=shape[:-1])

    def both():
        loss, d_logits = softmax_cross_entropy(logits, targets, ignore_index=0)
        return numbered(np.array(loss), d_logits)

    want = for_any_threads(both)
    inplace = logits.copy()
    loss, d_logits = softmax_cross_entropy(inplace, targets, ignore_index=0, inplace=True)
    assert np.shares_memory(d_logits, inplace)
    same_results(numbered(np.array(loss), d_logits), want)
    ids = targets.astype(np.int32)
    losses = for_any_threads(lambda: numbered(token_losses(logits, ids)))[0]
    for index in np.ndindex(shape[:-1]):
        alone = token_losses(logits[index][None], np.array([ids[index]]))
        same(alone[0], losses[index])


@each_dtype
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
@pytest.mark.parametrize("shape", [(1,), (2,), (3, 7), (130, 5)], ids=str)
def test_optimisers(dtype, name, shape, rng):
    start = rng.standard_normal(shape).astype(dtype)
    steps = [rng.standard_normal(shape).astype(dtype) for _ in range(3)]

    def train():
        params = {"w": start.copy()}
        optimiser = optim.OPTIMIZERS[name](params, lr=0.1)
        for g in steps:
            optimiser.step({"w": g})
        return params | optimiser.state

    for_any_threads(train)


@each_dtype
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 4095, 4096, 4097, 4099])
def test_clip_grad_norm(dtype, size, rng):
    start = {key: rng.standard_normal(size).astype(dtype) for key in "ab"}

    def clip():
        grads = {key: value.copy() for key, value in start.items()}
        return numbered(np.array(clip_grad_norm_(grads, 0.5))) | grads

    want = for_any_threads(clip)
    padded = {key: np.stack([value, value], axis=1)[:, 0] for key, value in start.items()}
    same(np.array(grad_norm(padded)), want[0])


def model_of(name, **options):
    model = LanguageModel(11, 19, cell=name, num_layers=2, seed=0, **options)
    for key, value in model.params.items():
        value *= 1 if "bias" in key else 3
    return model


@each_name
@each_dtype
@pytest.mark.parametrize("embedding_size", [0, 6])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_language_model(name, dtype, embedding_size, dropout, rng):
    model = model_of(name, dtype=dtype, embedding_size=embedding_size, dropout=dropout)
    tokens, targets = rng.integers(11, size=(2, 7, 5))

    def train():
        loss, grads, state = model.loss_and_grads(tokens, targets, seed=3)
        return numbered(np.array(loss), *as_parts(state)) | grads

    for_any_threads(train)
    losses = for_any_threads(lambda: numbered(model.token_losses(tokens, targets)[0]))[0]
    first, state = model.token_losses(tokens[:3], targets[:3])
    second, _ = model.token_losses(tokens[3:], targets[3:], state)
    same(np.concatenate([first, second]), losses)
    for b in range(5):
        alone, _ = model.token_losses(tokens[:, b : b + 1], targets[:, b : b + 1])
        same(alone[:, 0], losses[:, b])


@each_name
@each_dtype
@pytest.mark.parametrize("embedding_size", [0, 6])
def test_generation(name, dtype, embedding_size):
    model = model_of(name, dtype=dtype, embedding_size=embedding_size)
    options = {"length": 12, "seed": 4, "num_sequences": 7}
    many = for_any_threads(lambda: numbered(*generate(model, [1, 2], **options)))
    assert len({tuple(text) for text in many.values()}) > 1
    for count in (1, 2, 3):
        fewer = generate(model, [1, 2], **(options | {"num_sequences": count}))
        same_results(numbered(*fewer), {i: many[i] for i in range(count)})
    prompts = np.arange(14).reshape(2, 7) % 11
    greedy = for_any_threads(lambda: numbered(*generate(model, prompts, 12, greedy=True)))
    for b in range(7):
        same(generate(model, prompts[:, b], 12, greedy=True)[0], greedy[b])


@each_dtype
def test_score(dtype, rng):
    model = model_of("gru", dtype=dtype)
    texts = [rng.integers(11, size=n) for n in (5, 0, 1, 9, 5, 3)]
    want = for_any_threads(lambda: numbered(*score(model, texts, 0)))
    for i, text in enumerate(texts):
        same(score(model, [text], 0)[0], want[i])
    backwards = score(model, texts[::-1], 0)
    same_results(numbered(*backwards[::-1]), want)
