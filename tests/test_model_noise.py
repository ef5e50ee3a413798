"""Language models with all that is drawn in training."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import check_slopes, same, same_results, threads

from fastrnn.generate import generate
from fastrnn.models import CELL_NAMES, LanguageModel, model_from_config
from fastrnn.reference import masks

OPTIONS = {
    "dropout": 0.2,
    "input_dropout": 0.2,
    "embedding_dropout": 0.3,
    "recurrent_dropout": 0.3,
    "weight_dropout": 0.2,
    "zoneout": 0.2,
    "locked_dropout": True,
}
V, H, E, T, B = 11, 9, 6, 5, 3


def new(cell="lstm", **options):
    sizes = {"num_layers": 2, "embedding_size": E, "dtype": np.float64, "seed": 1}
    return LanguageModel(V, H, cell=cell, **sizes | options)


def text(rng):
    return rng.integers(V, size=(T, B)), rng.integers(V, size=(T, B))


@pytest.mark.parametrize("cell", CELL_NAMES)
@pytest.mark.parametrize(
    "options", [OPTIONS, {"embedding_dropout": 0.4}, {"input_dropout": 0.4}], ids=str
)
def test_gradients_by_finite_differences(cell, options, rng):
    model = new(cell, **options)
    tokens, targets = text(rng)
    loss = model.loss_and_grads(tokens, targets, seed=5)[0]
    assert loss == model.loss_and_grads(tokens, targets, seed=5)[0]
    assert loss != model.loss_and_grads(tokens, targets, seed=6)[0]
    check_slopes(model, tokens, targets, rng, seed=5)


@pytest.mark.parametrize("few", [0, 10**6])
def test_vectors_that_are_dropped_take_no_part(few, rng, monkeypatch):
    # Through a table of vectors, or one for each step.
    monkeypatch.setattr("fastrnn.models._FEW", few)
    model, seed = new(embedding_dropout=0.5), 3
    tokens, targets = text(rng)
    _, grads, _ = model.loss_and_grads(tokens, targets, seed=seed)
    kept = masks.weight_mask(seed + 254, V, 1, 0.5)[:, 0]
    used = np.isin(np.arange(V), tokens)
    moved = (grads["embedding.weight"] != 0).any(axis=1)
    assert (moved == (used & (kept > 0))).all()
    assert 0 < moved.sum() < used.sum()


def test_same_bits(rng):
    model = new(
        **OPTIONS,
    )
    tokens, targets = text(rng)
    _, want, _ = model.loss_and_grads(tokens, targets, seed=5)
    with threads(3):
        same_results(model.loss_and_grads(tokens, targets, seed=5)[1], want)
    plain = new()
    logits, _ = model(tokens)
    assert (logits != plain(tokens)[0]).any(), "zoneout is expected in inference"
    model = new(**OPTIONS | {"zoneout": 0.0})
    same(model(tokens)[0], plain(tokens)[0])


def test_dropout_of_one_layer_acts_before_the_logits(rng):
    tokens, targets = text(rng)
    losses = set()
    # Warnings are errors here.
    for options in ({}, {"dropout": 0.5}, {"dropout": 0.5, "locked_dropout": True}):
        model = new(num_layers=1, **options)
        again = model_from_config(model.config(), dict(model.params))
        assert again.config() == model.copy().config() == model.config()
        losses.add(model.loss_and_grads(tokens, targets, seed=3)[0])
        assert again.loss_and_grads(tokens, targets, seed=3)[0] in losses
    assert len(losses) == 3
    with pytest.raises(ValueError, match="locked_dropout: expected dropout or input_dropout"):
        new(embedding_dropout=0.5, locked_dropout=True)


def test_sampling_expects_zoneout(rng):
    model = new(zoneout=0.4)
    tokens, _ = text(rng)
    (found,) = generate(model, tokens[:, 0], 6, greedy=True)
    prompt = tokens[:, :1]
    for token in found:
        assert model(prompt)[0][-1, 0].argmax() == token
        prompt = np.concatenate([prompt, [[token]]])


def test_config_comes_back_and_an_older_one_is_understood(rng):
    model = new(**OPTIONS)
    config = model.config()
    assert OPTIONS.items() <= config.items()
    again = model_from_config(config, dict(model.params))
    assert again.config() == config
    old = {key: value for key, value in new().config().items() if key not in OPTIONS}
    old["dropout"] = 0.0
    older = model_from_config(old, dict(model.params))
    assert older.config() == new().config()


@pytest.mark.parametrize("name", ["input_dropout", "embedding_dropout"])
def test_without_an_embedding_there_is_nothing_to_drop(name):
    with pytest.raises(ValueError, match=f"{name}: expected 0 without an embedding"):
        LanguageModel(V, H, **{name: 0.5})


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - {"locked_dropout"}))
def test_a_bad_probability_is_named(name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        new(**{name: 1.0})
