"""Options together, drawn at random: outputs by the reference, gradients by finite differences."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import CLIP, as_parts, as_state, reference_of, same, same_results, threads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastrnn
from fastrnn.reference import masks

T, B, n_in = 6, 4, 3


def chance(p):
    return st.sampled_from([0.0, p])


gru = st.one_of(
    st.just({"reset_after": False}), st.just({"reset_gate": False}), st.just({"layer_norm": True})
)
lstm = st.fixed_dictionaries(
    {
        "peephole": st.booleans(),
        "coupled": st.booleans(),
        "cell_clip": st.sampled_from([None, CLIP]),
        "proj_size": st.sampled_from([0, 5]),
    }
)
cells = st.one_of(
    st.tuples(st.just("RNN"), st.just({})),
    st.tuples(st.just("GRU"), st.one_of(st.just({}), gru)),
    st.tuples(st.just("LSTM"), st.one_of(lstm, st.just({"layer_norm": True}))),
)
everywhere = st.fixed_dictionaries(
    {
        "num_layers": st.integers(1, 2),
        "bias": st.booleans(),
        "bidirectional": st.booleans(),
        "dropout": chance(0.3),
        "input_dropout": chance(0.3),
        "locked_dropout": st.booleans(),
        "recurrent_dropout": chance(0.4),
        "weight_dropout": chance(0.3),
        "zoneout": chance(0.3),
        "learned_state": st.booleans(),
        "init": st.sampled_from(["pytorch", "glorot"]),
        "hidden_size": st.sampled_from([8, 17]),
    }
)
calls = st.fixed_dictionaries(
    {
        "lengths": st.none() | st.lists(st.integers(0, T), min_size=B, max_size=B),
        "resets": st.none() | st.integers(0, 99),
        "state": st.booleans(),
        "merge": st.sampled_from(["concat", "sum", "mean"]),
        "every": st.none() | st.integers(1, T),
        "count": st.integers(1, 3),
        "seed": st.integers(0, 2**63),
    }
)


class Oracle:
    """A layer's forward in training, one part of one sequence of one direction after another."""

    def __init__(self, layer, seed):
        self.layer, self.seed = layer, seed
        words = [type(layer).__name__.lower()]
        if words == ["gru"] and not layer.reset_gate:
            words.append("simple")
        elif words == ["gru"] and not layer.reset_after:
            words.append("before")
        elif words == ["rnn"]:
            words.append("tanh")
        elif words == ["lstm"]:
            words += ["coupled"] * layer.coupled + ["clip"] * (layer.cell_clip is not None)
        self.reference, self.options = reference_of("_".join(words))

    def _input(self, layer, x):
        own, rnn = self.seed + layer, self.layer
        p = rnn.dropout if layer else rnn.input_dropout
        if not p:
            return x
        if rnn.locked_dropout:
            return x * masks.locked_mask(own, np.arange(B), x.shape[2], p)
        return x * masks.dropout_mask(own, np.arange(T), np.arange(B), x.shape[2], p)

    def _side(self, layer, side, x, state, lengths, resets):
        rnn, own = self.layer, masks.stream(self.seed + layer, side)
        end = f"_l{layer}" + "_reverse" * side
        params = {k.removesuffix(end): v for k, v in rnn.params.items() if k.endswith(end)}
        if side == 0:
            params = {k: v for k, v in params.items() if not k.endswith("_reverse")}
        if rnn.weight_dropout:
            w = params["weight_hh"]
            params["weight_hh"] = w * masks.weight_mask(own, *w.shape, rnn.weight_dropout)
        units = rnn.state_sizes[0]
        mask = zone = None
        if rnn.recurrent_dropout:
            mask = masks.locked_mask(own, np.arange(B), units, rnn.recurrent_dropout)
        if rnn.zoneout:
            zone = masks.zone_mask(own, np.arange(T), np.arange(B), units, rnn.zoneout)
        y, last = np.zeros((T, B, units)), [part.copy() for part in state]
        for b, length in enumerate(lengths):
            begins = [t for t in range(length) if resets[t, b] or t == 0]
            parts = list(zip(begins, [*begins[1:], length], strict=False))
            now = tuple(part[b : b + 1] for part in state)
            for i, (begin, stop) in enumerate(reversed(parts) if side else parts):
                # A part begins with zeros if a reset is at the edge that it comes from.
                edge = stop < length if side else bool(resets[begin, b])
                if edge or i:
                    now = tuple(0 * part for part in now)
                steps = np.arange(begin, stop)[:: -1 if side else 1]
                given = dict(self.options)
                if mask is not None:
                    given["mask"] = mask[b : b + 1]
                if zone is not None:
                    given["zone"] = zone[steps, b : b + 1]
                out, now, _ = self.reference.forward(params, x[steps, b : b + 1], now, **given)
                y[steps, b] = out[:, 0]
            # To the left of a reset before the first step there is nothing.
            for total, part in zip(last, now, strict=True):
                total[b] = part[0]
        return y, last

    def __call__(self, x, state, lengths, resets):
        rnn, finals = self.layer, []
        sides = 1 + rnn.bidirectional
        for layer in range(rnn.num_layers):
            x = self._input(layer, x)
            at = range(layer * sides, (layer + 1) * sides)
            begun = [[part[i] for part in state] for i in at]
            done = [
                self._side(layer, side, x, begun[side], lengths, resets) for side in range(sides)
            ]
            finals += [last for _, last in done]
            x = done[0][0]
            if rnn.bidirectional:
                both = [y for y, _ in done]
                x = np.concatenate(both, axis=2) if rnn.merge == "concat" else sum(both)
                x = x / 2 if rnn.merge == "mean" else x
        return x, [np.stack(parts) for parts in zip(*finals, strict=True)]


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(cells, everywhere, calls, st.integers(0, 2**32))
def test_random_combinations(cell, options, call, number):
    check(cell, options, call, number)


@pytest.mark.slow
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(cells, everywhere, calls, st.integers(0, 2**32))
def test_many_random_combinations(cell, options, call, number):
    check(cell, options, call, number)


def check(cell, options, call, number):
    kind, own = cell
    options = {**options, **own}
    if options["bidirectional"]:
        options["merge"] = call["merge"]
    rng = np.random.default_rng(number)
    layer = getattr(fastrnn, kind)(n_in, dtype=np.float64, seed=1, **options)
    for key, value in layer.params.items():
        if not key.startswith("weight_hh"):
            value[...] = 0.7 * rng.standard_normal(value.shape)
    x = rng.standard_normal((T, B, n_in))
    count = layer.num_layers * (1 + layer.bidirectional)
    parts = [rng.standard_normal((count, B, size)) for size in layer.state_sizes]
    lengths = [T] * B if call["lengths"] is None else call["lengths"]
    resets = np.zeros((T, B), bool)
    if call["resets"] is not None:
        resets = np.random.default_rng(call["resets"]).random((T, B)) < 0.3
    given_state = as_state(tuple(parts)) if call["state"] else None
    arguments = {
        "lengths": call["lengths"],
        "resets": None if call["resets"] is None else resets,
        "seed": call["seed"],
    }

    y, final, saved = layer.forward(x, given_state, **arguments)
    y = y.copy()
    if not call["state"]:
        ends = [f"_l{i}{end}" for i in range(layer.num_layers) for end in layer._ends]
        for name, part in zip(layer.state_names, parts, strict=True):
            part[...] = 0
            if layer.learned_state:
                part[...] = np.stack([layer.params[f"{name}_0{end}"] for end in ends])[:, None]
    want_y, want_final = Oracle(layer, call["seed"])(x, parts, lengths, resets)
    np.testing.assert_allclose(y, want_y, rtol=1e-9, atol=1e-11)
    for found, wanted in zip(as_parts(final), want_final, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)

    d_y = rng.standard_normal(y.shape)
    d_state = tuple(rng.standard_normal(part.shape) for part in parts)
    d_x, _, grads = layer.backward(saved, d_y, as_state(d_state))
    with threads(call["count"]):
        again, _, saved = layer.forward(x, given_state, **arguments, checkpoint_every=call["every"])
        same(again, y)
        found_x, _, found = layer.backward(saved, d_y, as_state(d_state))
    same(found_x, d_x)
    same_results(found, grads)

    directions = {key: rng.standard_normal(value.shape) for key, value in layer.params.items()}
    towards = rng.standard_normal(x.shape)
    start = layer.state_dict()

    def loss(step):
        for key, value in layer.params.items():
            value[...] = start[key] + step * directions[key]
        out, last, _ = layer.forward(x + step * towards, given_state, **arguments)
        ends = zip(as_parts(last), d_state, strict=True)
        return np.vdot(out, d_y) + sum(np.vdot(part, d) for part, d in ends)

    slope = np.vdot(d_x, towards) + sum(np.vdot(grads[k], directions[k]) for k in directions)
    slopes = [(loss(step) - loss(-step)) / (2 * step) for step in (1e-5, 1e-6)]
    # A bound of the cell state may be met on the way: then it has no slope there.
    if layer.__dict__.get("cell_clip") is None or abs(slopes[0] - slopes[1]) < 1e-6:
        assert slopes[1] == pytest.approx(slope, rel=1e-4, abs=1e-5)
