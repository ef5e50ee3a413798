"""Generation and scoring against the model itself, step by step, and against a small oracle."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from helpers import agree, as_parts, each_dtype, same, threads

from fastrnn.generate import generate
from fastrnn.models import CELL_NAMES, LanguageModel
from fastrnn.reference.loss import softmax_cross_entropy
from fastrnn.score import score

V, H = 7, 10
each_name = pytest.mark.parametrize("name", CELL_NAMES)


def model_of(name="gru", vocabulary=V, *, scale=3, **options):
    """A model whose distributions are far from uniform."""
    model = LanguageModel(vocabulary, H, cell=name, seed=5, **options)
    for key, value in model.params.items():
        value *= 1 if "bias" in key else scale
    return model


def log_softmax(logits):
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def step_by_step(model, prompt, length, choose):
    """What `generate` must write, from the public model: `choose` picks from one row of logits."""
    logits, state = model(np.asarray(prompt)[:, None])
    text = []
    for _ in range(length):
        text.append(choose(logits[-1, 0]))
        logits, state = model(np.array([[text[-1]]]), state)
    return np.array(text, np.int32)


@each_name
@each_dtype
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("embedding_size", [0, 4])
def test_greedy_is_the_model_step_by_step(name, dtype, num_layers, embedding_size):
    options = {"num_layers": num_layers, "embedding_size": embedding_size, "dtype": dtype}
    model = model_of(name, scale=8, **options)
    texts = []
    for prompt in (*([v] for v in range(V)), [1, 2], [0, 5, 6, 2, 1]):
        (got,) = generate(model, prompt, 15, greedy=True)
        same(got, step_by_step(model, prompt, 15, np.argmax))
        texts.append(got)
    assert len(np.unique(texts)) > 2, "always the same tokens: this tests nothing"


@each_name
def test_every_drawn_token_is_possible_and_seeds_decide(name):
    model = model_of(name, num_layers=2)
    first = generate(model, [1], 40, seed=1, num_sequences=3)
    again = generate(model, [1], 40, seed=1, num_sequences=3)
    other = generate(model, [1], 40, seed=2, num_sequences=3)
    for a, b, c in zip(first, again, other, strict=True):
        same(a, b)
        assert (a != c).any()
        assert a.dtype == np.int32
        assert a.shape == (40,)
        assert a.min() >= 0
        assert a.max() < V
    assert (first[0] != first[1]).any()
    assert (generate(model, [1], 40)[0] != generate(model, [1], 40)[0]).any()
    same(generate(model, [1], 5, seed=-3)[0], generate(model, [1], 5, seed=2**64 - 3)[0])


def filtered(p, top_k=None, top_p=None):
    """The oracle: the k likeliest, then the fewest of these that reach top_p, renormalised."""
    order = np.argsort(-p, kind="stable")[:top_k]
    if top_p is not None:
        share = np.cumsum(p[order]) / p[order].sum()
        order = order[: np.argmax(share >= top_p) + 1]
    kept = np.zeros_like(p)
    kept[order] = p[order]
    return kept / kept.sum()


def chi_square(counts, p):
    """Pearson's statistic over the tokens that may come, in standard deviations from its mean."""
    possible = p > 0
    assert counts[~possible].sum() == 0, "a token that was ruled out"
    expected = p[possible] * counts.sum()
    assert expected.min() > 5
    degrees = possible.sum() - 1
    if degrees == 0:
        return 0.0
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    return (statistic - degrees) / math.sqrt(2 * degrees)


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": V},
    {"top_k": 1000},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 1.0},
    {"top_k": 4, "top_p": 0.7},
    {"top_k": 3, "top_p": 1.0, "temperature": 2.0},
    {"top_p": 0.8, "temperature": 0.7},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_frequencies(settings):
    """One token after a prompt, drawn 20,000 times."""
    model = model_of(scale=1.5)
    prompt = [1, 4, 2]
    logits = model(np.array(prompt)[:, None])[0][-1, 0]
    p = np.exp(log_softmax(logits.astype(np.float64) / settings.get("temperature", 1)))
    p = filtered(p, settings.get("top_k"), settings.get("top_p"))
    texts = generate(model, prompt, 1, seed=11, num_sequences=20_000, **settings)
    counts = np.bincount(np.concatenate(texts), minlength=V)
    # Far enough for a seed to pass by right, near enough for 3 % of one token to show.
    assert chi_square(counts, p) < 6


def test_frequencies_along_a_text():
    """Later tokens too, and independent of the ones before, which the model is made to forget."""
    model = model_of(scale=0)
    model.head.params["bias"][...] = np.log(np.arange(1, V + 1))
    p = np.arange(1, V + 1) / np.arange(1, V + 1).sum()
    (text,) = generate(model, [0], 30_000, seed=3)
    assert chi_square(np.bincount(text, minlength=V), p) < 6
    pairs = np.bincount(text[:-1] * V + text[1:], minlength=V * V)
    assert chi_square(pairs, np.outer(p, p).reshape(-1)) < 6
    rows = np.stack(generate(model, [0], 2, seed=3, num_sequences=20_000))
    pairs = np.bincount(rows[:, 0] * V + rows[:, 1], minlength=V * V)
    assert chi_square(pairs, np.outer(p, p).reshape(-1)) < 6
    pairs = np.bincount(rows[:-1, 0] * V + rows[1:, 0], minlength=V * V)
    assert chi_square(pairs, np.outer(p, p).reshape(-1)) < 6


def test_ties_at_the_limit_of_top_k_go_to_the_first():
    model = model_of(scale=0)
    model.head.params["bias"][...] = [0, 1, 1, 1, 0, 1, 0]
    text = generate(model, [0], 300, seed=0, top_k=2)[0]
    assert set(text.tolist()) == {1, 2}
    assert generate(model, [0], 3, greedy=True)[0].tolist() == [1, 1, 1]


def test_top_p_keeps_the_likeliest_whatever_it_is():
    model = model_of()
    same(generate(model, [1], 20, seed=0, top_p=1e-12)[0], generate(model, [1], 20, greedy=True)[0])


def test_top_k_of_one_and_low_temperature_are_greedy():
    model = model_of()
    want = generate(model, [1], 20, greedy=True)[0]
    for settings in ({"top_k": 1}, {"temperature": 1e-9}, {"temperature": 5e-324}):
        same(generate(model, [1], 20, seed=4, **settings)[0], want)


def test_a_forbidden_token_never_comes():
    model = model_of(scale=0)
    model.head.params["bias"][3] = -np.inf
    for settings in ({}, {"top_k": V}, {"top_k": V - 1, "top_p": 1.0}, {"temperature": 100}):
        text = generate(model, [0], 3000, seed=0, **settings)[0]
        assert set(text.tolist()) == set(range(V)) - {3}


@pytest.mark.parametrize("count", [1, 2])
def test_eos_stops_a_sequence_and_only_that(count):
    model = model_of(scale=1)
    whole = generate(model, [1], 50, seed=9, num_sequences=6)
    with threads(count):
        stopped = generate(model, [1], 50, seed=9, num_sequences=6, eos=2)
    lengths = set()
    for full, part in zip(whole, stopped, strict=True):
        ends = np.flatnonzero(full == 2)
        want = full[: ends[0]] if len(ends) else full
        same(part, want)
        lengths.add(len(part))
    assert len(lengths) > 2
    model.head.params["bias"][2] = 1e3
    for text in generate(model, [1], 5, seed=0, num_sequences=3, eos=2):
        same(text, np.empty(0, np.int32))
    for text in generate(model, [1], 5, greedy=True, num_sequences=3, eos=2):
        same(text, np.empty(0, np.int32))


def test_prompts():
    model = model_of()
    many = np.array([[1, 2, 3], [4, 5, 6]])
    texts = generate(model, many, 9, greedy=True)
    assert len(texts) == 3
    for b in range(3):
        same(texts[b], generate(model, many[:, b], 9, greedy=True)[0])
        same(texts[b], generate(model, many[:, b].tolist(), 9, greedy=True, num_sequences=2)[1])
    for form in (many.astype(">i8"), np.asfortranarray(many), many.astype(np.uint8)):
        for got, want in zip(generate(model, form, 9, greedy=True), texts, strict=True):
            same(got, want)
    texts[0][:] = 0
    assert (generate(model, many, 9, greedy=True)[1] == texts[1]).all()


def bad_calls():
    yield {"prompt": []}, TypeError, ("prompt:", "integer", "float64")
    yield {"prompt": np.empty(0, int)}, ValueError, ("prompt:", "(T, B)", "empty")
    yield {"prompt": 3}, ValueError, ("prompt:", "(T, B)", "()")
    yield {"prompt": [[[1]]]}, ValueError, ("prompt:", "(T, B)", "(1, 1, 1)")
    yield {"prompt": [1.0]}, TypeError, ("prompt:", "integer", "float64")
    yield {"prompt": "abc"}, TypeError, ("prompt:", "numbers", "<U3")
    yield {"prompt": [V]}, ValueError, ("prompt:", "[0, 7)", "7")
    yield {"prompt": [-1]}, ValueError, ("prompt:", "[0, 7)", "-1")
    yield {"length": 0}, ValueError, ("length:", "at least 1", "0")
    yield {"length": 2.0}, TypeError, ("length:", "an integer", "2.0")
    yield {"temperature": 0}, ValueError, ("temperature:", "(0, inf)", "0")
    yield {"temperature": -1}, ValueError, ("temperature:", "(0, inf)", "-1")
    yield {"temperature": math.inf}, ValueError, ("temperature:", "(0, inf)", "inf")
    yield {"temperature": math.nan}, ValueError, ("temperature:", "(0, inf)", "nan")
    yield {"temperature": "hot"}, TypeError, ("temperature:", "a number", "'hot'")
    yield {"top_k": 0}, ValueError, ("top_k:", "at least 1", "0")
    yield {"top_k": 2.5}, TypeError, ("top_k:", "an integer", "2.5")
    yield {"top_p": 0}, ValueError, ("top_p:", "(0, ", "0")
    yield {"top_p": 1.01}, ValueError, ("top_p:", "(0, 1]", "1.01")
    yield {"top_p": math.nan}, ValueError, ("top_p:", "(0, ", "nan")
    yield {"eos": V}, ValueError, ("eos:", "[0, 7)", "7")
    yield {"eos": -1}, ValueError, ("eos:", "at least 0", "-1")
    yield {"eos": 1.5}, TypeError, ("eos:", "an integer", "1.5")
    yield {"num_sequences": 0}, ValueError, ("num_sequences:", "at least 1", "0")
    yield {"prompt": [[1, 2]], "num_sequences": 2}, ValueError, ("num_sequences:", "1", "got 2")


@pytest.mark.parametrize(("options", "error", "parts"), list(bad_calls()), ids=str)
def test_bad_calls(options, error, parts):
    with pytest.raises(error, match=".*".join(re.escape(part) for part in parts)):
        generate(model_of(), **({"prompt": [1], "seed": 0} | options))


SPOILT = {"rnn.weight_hh_l0": (3, 2), "rnn.weight_ih_l0": (0, 1), "head.bias": (4,)}


@pytest.mark.parametrize("key", SPOILT)
@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_weights_that_are_not_finite(key, greedy, count):
    for bad in (np.nan, np.inf):
        if bad == np.inf and key.startswith("rnn"):
            continue  # gates saturate, and the logits are finite
        model = model_of()
        model.params[key][SPOILT[key]] = bad
        message = "model: expected finite logits, got NaN or infinity"
        with threads(count), pytest.raises(ValueError, match=message):
            generate(model, [1], 20, seed=0, greedy=greedy, num_sequences=3)


def test_replaced_weights_are_used_or_refused():
    model = model_of()
    model.head.params["weight"] = np.asfortranarray(model.head.params["weight"])
    with pytest.raises(ValueError, match=r"params\['weight'\]: expected a contiguous"):
        generate(model, [1], 3)


@each_name
@each_dtype
@pytest.mark.parametrize("embedding_size", [0, 4])
def test_score_is_the_sum_of_log_softmax(name, dtype, embedding_size, rng):
    model = model_of(name, num_layers=2, embedding_size=embedding_size, dtype=dtype)
    texts = [rng.integers(V, size=n) for n in (6, 1, 0, 13, 6)]
    scores = score(model, texts, 2)
    assert len(scores) == 5
    for text, found in zip(texts, scores, strict=True):
        assert found.dtype == np.float64
        assert found.shape == text.shape
        if len(text):
            logits, _ = model(np.concatenate([[2], text[:-1]])[:, None])
            want = log_softmax(logits[:, 0])[np.arange(len(text)), text]
            agree(found.astype(dtype), want, dtype, V)
            losses, _ = softmax_cross_entropy(logits[:, 0].astype(np.float64), text)
            agree(np.array(found.sum(), dtype), np.array(-losses.sum()), dtype, V * len(text))
    # All continuations of one text share one probability.
    whole = score(model, [[1, 3, v] for v in range(V)], 2)
    assert math.isclose(sum(math.exp(s[2]) for s in whole), 1, rel_tol=1e-5)


def test_score_does_not_depend_on_the_batch(rng, monkeypatch):
    import fastrnn.models
    import fastrnn.score

    model = model_of(num_layers=2)
    texts = [rng.integers(V, size=n) for n in rng.integers(0, 30, 150)]
    want = score(model, texts, 0)
    for i in (0, 1, 77, 149):
        same(score(model, [texts[i]], 0)[0], want[i])
    order = rng.permutation(150)
    for i, found in zip(order, score(model, [texts[i] for i in order], 0), strict=True):
        same(found, want[i])
    for batch, logits in ((1, 1), (7, 50), (1000, 10**6)):
        monkeypatch.setattr(fastrnn.score, "_BATCH", batch)
        monkeypatch.setattr(fastrnn.models, "_LOGITS", logits)
        for found, value in zip(score(model, texts, 0), want, strict=True):
            same(found, value)


def test_score_of_nothing():
    assert score(model_of(), [], 0) == []
    (found,) = score(model_of(), [[]], 0)
    same(found, np.empty(0))


def bad_scores():
    yield ([[1]], V), ValueError, ("start:", "[0, 7)", "7")
    yield ([[1]], -1), ValueError, ("start:", "at least 0", "-1")
    yield ([[1]], 2**40), ValueError, ("start:", "[0, 7)", str(2**40))
    yield ([[1]], 0.5), TypeError, ("start:", "an integer", "0.5")
    yield ([[1], [V]], 0), ValueError, ("sequences[1]:", "[0, 7)", "7")
    yield ([[1], [0.5]], 0), TypeError, ("sequences[1]:", "integer", "float64")
    yield ([[[1]]], 0), ValueError, ("sequences[0]:", "(T)", "(1, 1)")


@pytest.mark.parametrize(("arguments", "error", "parts"), list(bad_scores()), ids=str)
def test_bad_scores(arguments, error, parts):
    with pytest.raises(error, match=".*".join(re.escape(part) for part in parts)):
        score(model_of(), *arguments)


def test_a_text_scores_what_it_was_drawn_with():
    """Entropy: the mean score of drawn texts is the mean of sum p log p along them."""
    model = model_of(scale=1.5)
    texts = generate(model, [0], 12, seed=6, num_sequences=2000)
    scores = np.stack(score(model, texts, 0))
    tokens = np.concatenate([np.zeros((1, 2000), int), np.stack(texts, axis=1)[:-1]])
    log_p = log_softmax(model(tokens)[0])
    expected = (np.exp(log_p) * log_p).sum(axis=-1).T
    deviation = (scores - expected).std() / math.sqrt(scores.size)
    assert abs(scores.mean() - expected.mean()) < 5 * deviation


@each_name
def test_generation_leaves_the_model_alone(name):
    model = model_of(name)
    before = {key: value.copy() for key, value in model.params.items()}
    first = generate(model, [1, 2], 10, seed=0)[0]
    _, state = model(np.array([[1]]))
    generate(model, [3], 10, seed=5)
    same(generate(model, [1, 2], 10, seed=0)[0], first)
    for got, want in zip(as_parts(state), as_parts(model(np.array([[1]]))[1]), strict=True):
        same(got, want)
    for key, value in before.items():
        same(model.params[key], value)
