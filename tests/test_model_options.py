"""Language models with the options of the layers, and with a cell of a user's own."""

from __future__ import annotations

import json
import runpy
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers import agree, as_parts, check_slopes, same, same_results, threads

import fastrnn
from fastrnn import units
from fastrnn.generate import generate
from fastrnn.models import CELL_NAMES, LanguageModel, model_from_config
from fastrnn.reference.loss import softmax_cross_entropy
from fastrnn.score import score
from fastrnn.tile import COLS
from fastrnn.train import Settings, Trainer, load_model, save_model

EXAMPLES = Path(__file__).parents[1] / "examples"
OWN = runpy.run_path(str(EXAMPLES / "minimal_gated_unit.py"))["MGU"]
V, H, E, T, B = 7, 9, 6, 5, 3
CASES = {
    "lstm_projected": ("lstm", {"proj_size": 4, "recurrent_dropout": 0.2, "zoneout": 0.1}),
    "lstm_variants": ("lstm", {"peephole": True, "coupled": True, "cell_clip": 0.5}),
    "lstm_learned": ("lstm", {"learned_state": True, "proj_size": 8, "forget_bias": 2.0}),
    "lstm_norm": ("lstm", {"layer_norm": True, "init": "glorot", "weight_dropout": 0.2}),
    "gru_before": ("gru", {"reset_after": False, "zoneout": 0.3, "learned_state": True}),
    "gru_simple": ("gru", {"reset_gate": False, "bias": False}),
    "gru_norm": ("gru", {"layer_norm": True, "zoneout": 0.2}),
    "rnn_relu": ("rnn", {"nonlinearity": "relu", "init": "identity"}),
    "own": (OWN, {"zoneout": 0.2, "learned_state": True}),
}
# Each cell is compiled again for each dtype: where bits are compared, one will do.
DTYPES = {"lstm_projected": np.float32, "gru_before": np.float32}
each_case = pytest.mark.parametrize("case", CASES)
each_described = pytest.mark.parametrize("case", sorted(set(CASES) - {"own"}))
each_embedding = pytest.mark.parametrize("embedding", [0, E], ids=["tokens", "embedding"])


def new(case, embedding=E, *, scale=1.0, **options):
    """A model of two layers whose learned states, if there are any, are not zero."""
    cell, own = CASES[case]
    sizes = {"vocab_size": V, "hidden_size": H, "num_layers": 2, "dtype": np.float64, "seed": 1}
    model = LanguageModel(cell=cell, embedding_size=embedding, **sizes | own | options)
    random = np.random.default_rng(2)
    for key, value in model.params.items():
        if "_0_l" in key:
            value[...] = random.standard_normal(value.shape)
        elif case == "rnn_relu" and "rnn.weight" in key:
            # It remembers for ever, and one token would win: let it see more and forget.
            value *= 0.2 if "weight_hh" in key else 1.0
            value += 0.1 * scale * random.standard_normal(value.shape)
        elif "bias" not in key:
            value *= scale
    return model


def text(rng):
    return rng.integers(V, size=(T, B)), rng.integers(V, size=(T, B))


@each_case
@each_embedding
def test_gradients_by_finite_differences(case, embedding, rng):
    model = new(case, embedding)
    check_slopes(model, *text(rng), rng, seed=5)


@each_case
def test_the_state_before_a_text(case, rng):
    model = new(case)
    state = model.initial_state(B)
    sizes = model.rnn.state_sizes
    assert [part.shape for part in as_parts(state)] == [(2, B, size) for size in sizes]
    for name, part in zip(model.rnn.state_names, as_parts(state), strict=True):
        for layer in range(2):
            learned = model.params.get(f"rnn.{name}_0_l{layer}", np.zeros(part.shape[2]))
            same(part[layer], np.tile(learned, (B, 1)))
    tokens, targets = text(rng)
    same(model(tokens)[0], model(tokens, state)[0])
    loss, grads, end = model.loss_and_grads(tokens, targets, seed=5)
    again, carried, last = model.loss_and_grads(tokens, targets, state, seed=5)
    assert loss == again
    for a, b in zip(as_parts(end), as_parts(last), strict=True):
        same(a, b)
    for key, value in carried.items():
        if "_0_l" in key:
            assert grads[key].any()
            # A state that is given is no parameter.
            assert not value.any()
        else:
            same(grads[key], value, key)


# Sampling and scores


def greedy_text(model, prompt, length):
    """What the logits of the growing text, run from its beginning each time, make likeliest."""
    whole = np.array(prompt)[:, None]
    for _ in range(length):
        token = model(whole)[0][-1, 0].argmax()
        whole = np.concatenate([whole, [[token]]])
    return whole[len(prompt) :, 0].astype(np.int32)


@each_case
@each_embedding
def test_greedy_is_the_likeliest_after_the_growing_text(case, embedding):
    model = new(case, embedding, scale=6, dtype=DTYPES.get(case, np.float64))
    texts = []
    # Fewer steps than tokens, and more: vectors are read as they are, and in a table.
    for length in (3, 14):
        for prompt in ([0], [4], [1, 2], [0, 5, 6, 2, 1]):
            (got,) = generate(model, prompt, length, greedy=True)
            same(got, greedy_text(model, prompt, length))
            texts.append(got.tolist())
    assert len({token for text in texts for token in text}) > 2, "this tests nothing"


@each_case
@each_embedding
def test_any_number_of_threads_writes_the_same(case, embedding, monkeypatch):
    monkeypatch.setattr(units, "_SHARED", 0)
    monkeypatch.setattr(units, "_LARGE", -1)
    hidden, met = 2 * COLS * 8 + 3, []

    def spied(function, parts, *arguments):
        met.append(parts)
        together(function, parts, *arguments)

    together = fastrnn.generate.together
    monkeypatch.setattr(fastrnn.generate, "together", spied)
    model = new(case, embedding, hidden_size=hidden)
    prompt = np.array([[4, 2], [1, 6]])
    found = []
    for count in (1, 2, 3):
        with threads(count):
            for batch in (1, 2):
                texts = generate(model, prompt[:, :batch], 9, seed=5)
                found.append(texts[0].tolist())
                alone = generate(model, prompt[:, 0], 9, seed=5)
                assert texts[0].tolist() == alone[0].tolist()
    assert all(text == found[0] for text in found)
    cell = model.rnn.cell
    assert bool(met) != (cell.projected or cell.normed)


@each_case
def test_score_is_the_sum_of_log_softmax(case, rng):
    model = new(case, scale=3)
    texts = [rng.integers(V, size=n) for n in (6, 1, 13)]
    for tokens, found in zip(texts, score(model, texts, 2), strict=True):
        logits, _ = model(np.concatenate([[2], tokens[:-1]])[:, None])
        losses, _ = softmax_cross_entropy(logits[:, 0], tokens)
        agree(np.array(found.sum()), np.array(-losses.sum()), np.float64, V * len(tokens))


# Descriptions


@each_described
@each_embedding
def test_a_config_makes_the_model_again(case, embedding, tmp_path, rng):
    model = new(case, embedding, dtype=DTYPES.get(case, np.float64))
    config = json.loads(json.dumps(model.config()))
    assert CASES[case][1].items() <= config.items()
    again = model_from_config(config, model.state_dict())
    assert again.config() == model.config() == config
    assert repr(again) == repr(model)
    for name, value in CASES[case][1].items():
        assert f"{name}={value!r}" in repr(model)
    save_model(tmp_path / "m", model)
    saved, _, _ = load_model(tmp_path / "m")
    tokens, targets = text(rng)
    want, grads, _ = model.loss_and_grads(tokens, targets, seed=5)
    for other in (again, saved, model.copy()):
        same_results(other.params, model.params)
        loss, found, _ = other.loss_and_grads(tokens, targets, seed=5)
        assert loss == want
        same_results(found, grads)
        assert not any(
            np.shares_memory(other.params[key], value) for key, value in model.params.items()
        )


@pytest.mark.parametrize("cell", CELL_NAMES)
def test_an_older_file_says_nothing_of_them(cell):
    model = LanguageModel(V, H, cell=cell, num_layers=2, seed=1)
    said = ("vocab_size", "hidden_size", "cell", "num_layers", "embedding_size", "dropout", "dtype")
    old = {name: model.config()[name] for name in said}
    assert model_from_config(old, model.params).config() == model.config()


def test_plain_arguments_are_not_told():
    told = "vocab_size=7, hidden_size=9, cell='gru', num_layers=1, embedding_size=0, dropout=0.0, "
    told += "embedding_dropout=0.0, dtype='float32'"
    assert repr(LanguageModel(V, H, cell="gru")) == f"LanguageModel({told})"


HOSTILE = {
    ("lstm_projected", "proj_size"): [0, -1, 3, 5, 9, 10**18, 10**30, 4.0, True, "4", None],
    ("lstm_projected", "layer_norm"): [True, 1, None, "yes"],
    ("lstm_projected", "peephole"): [True, 1, None],
    ("lstm_projected", "cell"): ["gru", "rnn", "", None, ["lstm"], {}],
    ("lstm_projected", "num_layers"): [1, 3, 10**9, 10**30],
    ("lstm_projected", "hidden_size"): [4, 8, 10**9, 10**30],
    ("lstm_variants", "coupled"): [False, 0, None],
    ("lstm_variants", "cell_clip"): [0.0, -1.0, 1, float("nan"), float("inf"), 1e300, "1", True],
    ("lstm_variants", "forget_bias"): [1.0],
    ("lstm_learned", "forget_bias"): [1, True, float("nan"), float("inf"), "1", []],
    ("lstm_learned", "learned_state"): [False, 1, None],
    ("lstm_norm", "layer_norm"): [False],
    ("lstm_norm", "init"): ["identity", "", "zeros", None, 1, ["glorot"]],
    ("lstm_norm", "weight_dropout"): [1.0, -0.1, float("nan"), 0, None],
    ("gru_before", "layer_norm"): [True],
    ("gru_before", "zoneout"): [1.0, -1.0, float("nan")],
    ("gru_before", "proj_size"): [4, -4],
    ("gru_simple", "reset_gate"): [True, 0],
    ("gru_simple", "bias"): [True, None],
    ("rnn_relu", "nonlinearity"): ["", "sigmoid", "tanh", None, 1],
}


@pytest.mark.parametrize(
    ("case", "key", "value"),
    [(*where, value) for where, values in HOSTILE.items() for value in values],
    ids=lambda value: ascii(value)[:20],
)
def test_a_hostile_config_is_refused_and_allocates_nothing(case, key, value):
    model = new(case, dtype=np.float32)
    config = model.config() | {key: value}
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="expected"):
            model_from_config(config, model.params)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@each_described
def test_weights_must_bear_out_the_config(case):
    model = new(case)
    for key, value in model.params.items():
        without = {name: array for name, array in model.params.items() if name != key}
        for wrong in ({}, {key: value[None]}, {key: value.astype(np.float32)}):
            with pytest.raises(ValueError, match=rf"^model: expected {key} to be "):
                model_from_config(model.config(), without | wrong)


def test_a_cell_of_ones_own_cannot_be_described(tmp_path):
    model = new("own")
    assert repr(model).startswith("LanguageModel(vocab_size=7, hidden_size=9, cell='mgu'")
    with pytest.raises(ValueError, match=r"^cell: expected .* the cell mgu, .* state_dict\(\)"):
        model.config()
    with pytest.raises(ValueError, match=r"^cell: expected .* the cell mgu, .* state_dict\(\)"):
        save_model(tmp_path / "m", model)
    assert not list(tmp_path.iterdir())
    # What the message advises.
    np.savez(tmp_path / "arrays.npz", **model.state_dict())
    again = new("own", seed=3)
    again.load_state_dict(np.load(tmp_path / "arrays.npz"))
    same_results(again.params, model.params)


def test_a_model_of_ones_own_cell_is_trained():
    settings = Settings(batch=2, tbptt_steps=4, steps=6, average=0.5, val_fraction=0.2, lr=0.05)
    tokens = np.tile(np.arange(V), 20)
    whole = Trainer(new("own"), tokens, settings)
    whole.fit()
    half = Trainer(new("own"), tokens, settings, stop=lambda: True)
    half.fit()
    resumed = Trainer(new("own", seed=9), tokens, settings)
    resumed.restore(*half.checkpoint())
    assert resumed.step == 1
    resumed.fit()
    same_results(resumed.checkpoint()[0], whole.checkpoint()[0])
    assert whole.loss < new("own").loss_and_grads(tokens[:8, None], tokens[1:9, None])[0]


@each_case
@pytest.mark.parametrize(
    ("embedding", "few"), [(0, 0), (E, 0), (E, 10**6)], ids=["tokens", "rows", "table"]
)
def test_pieces_of_less_memory_give_the_same_bits(case, embedding, few, rng, monkeypatch):
    # Through a table of vectors, or one for each step.
    monkeypatch.setattr("fastrnn.models._FEW", few)
    model = new(case, embedding, dropout=0.3, dtype=DTYPES.get(case, np.float64))
    tokens, targets = rng.integers(V, size=(2, 7, B))
    state = None if model.rnn.learned_state else model(tokens)[1]

    def train(**options):
        loss, grads, final = model.loss_and_grads(tokens, targets, state, seed=3, **options)
        return grads | {str(i): part for i, part in enumerate((np.array(loss), *as_parts(final)))}

    pieces = []
    forward = model.rnn.forward

    def counted(*arguments, **options):
        found = forward(*arguments, **options)
        pieces.append(len(found[2].pieces))
        return found

    monkeypatch.setattr(model.rnn, "forward", counted)
    want = train()
    for options in ({"checkpoint_every": 1}, {"checkpoint_every": 3}, {"checkpoint_every": 9}):
        same_results(train(**options), want)
    inputs = bool(few) or not embedding
    most = model.rnn.training_bytes(7, B, checkpoint_every=4, tokens=inputs)
    same_results(train(budget_mb=most / 1e6), want)
    assert pieces[:4] == [1, 7, 3, 1]
    assert pieces[4] > 1


def test_bad_pieces_are_named(rng):
    model = LanguageModel(V, H)
    tokens, targets = rng.integers(V, size=(2, T, B))
    bad = [
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every: expected at least 1, got 0"),
        ({"checkpoint_every": 1.5}, TypeError, "checkpoint_every: expected an integer, got 1.5"),
        ({"budget_mb": 0}, ValueError, "budget_mb: expected a number in (0, inf), got 0"),
        ({"budget_mb": 1e-9}, ValueError, "budget_mb: expected"),
        ({"budget_mb": 9, "checkpoint_every": 2}, ValueError, "budget_mb: expected None beside"),
    ]
    for options, error, message in bad:
        with pytest.raises(error) as caught:
            model.loss_and_grads(tokens, targets, **options)
        assert str(caught.value).startswith(message)


# Arguments


BAD = [
    ("lstm", {"peephol": 1}, TypeError, "peephol: expected an option that cell='lstm' has (bias, "),
    ("lstm", {"reset_after": False}, TypeError, "reset_after: expected an option that cell='lstm'"),
    ("gru", {"cell_clip": 1}, TypeError, "cell_clip: expected an option that cell='gru' has"),
    ("gru", {"proj_size": 3}, ValueError, "proj_size: expected 0, since this cell has no projec"),
    ("rnn", {"layer_norm": True}, TypeError, "layer_norm: expected an option that cell='rnn' has"),
    ("lstm", {"bidirectional": True}, TypeError, "bidirectional: expected an option that"),
    ("lstm", {"batch_first": True}, TypeError, "batch_first: expected an option that"),
    ("lstm", {"merge": "sum"}, TypeError, "merge: expected an option that"),
    ("lstm", {"layer_norm": True, "proj_size": 3}, ValueError, "layer_norm: expected False beside"),
    ("lstm", {"forget_bias": "1.x"}, TypeError, "forget_bias: expected a number"),
    ("gru", {"init": "ones"}, ValueError, "init: expected one of"),
    (OWN, {"peephole": True}, TypeError, "peephole: expected an option that cell='mgu' has (bias,"),
    (OWN, {"proj_size": 2}, ValueError, "proj_size: expected 0"),
    (fastrnn.LSTM, {}, ValueError, "cell: expected one of lstm, gru, rnn, got"),
]


@pytest.mark.parametrize(
    ("cell", "options", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))]
)
def test_a_bad_option_is_named(cell, options, error, message):
    with pytest.raises(error) as caught:
        LanguageModel(V, H, cell=cell, **options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("cell", CELL_NAMES)
def test_what_a_cell_takes_is_listed(cell):
    kind = {"lstm": fastrnn.LSTM, "gru": fastrnn.GRU, "rnn": fastrnn.RNN}[cell]
    with pytest.raises(TypeError) as caught:
        LanguageModel(V, H, cell=cell, wings=2)
    assert str(caught.value).endswith("got wings=2")
    listed = set(str(caught.value).partition("(")[2].partition(")")[0].split(", "))
    away = {"num_layers", "dropout", "dtype", "batch_first", "bidirectional", "merge"}
    assert listed == set(kind.defaults()) - away
