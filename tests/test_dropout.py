"""Dropout between layers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers import (
    F4,
    F8,
    OPTIONS,
    as_parts,
    as_state,
    each_cell,
    make_problem,
    new_layer,
    same,
)

import fastrnn
from fastrnn.cells import CELLS
from fastrnn.dropout import dropout

T, B, n_in, H = 4, 3, 5, 6


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
