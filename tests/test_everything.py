"""Options together, drawn at random: outputs by the reference, gradients by finite differences.

That is in float64, with which float32 is then compared.
"""

from __future__ import annotations

import numpy as np
import pytest
from helpers import (
    CLIP,
    agree,
    as_parts,
    as_state,
    reference_of,
    rms,
    same_results,
    terms,
    threads,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastrnn
from fastrnn.reference import masks

T, B, n_in = 6, 4, 3
V = 7  # vectors


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
# All of it is compiled once more for each cell in float32: a few will do.
some = st.sampled_from(
    [
        ("RNN", {}),
        ("GRU", {"reset_after": False}),
        ("LSTM", {}),
        ("LSTM", {"proj_size": 5}),
    ]
)
forms = st.tuples(cells, st.just(np.float64)) | st.tuples(some, st.just(np.float32))
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
        "inputs": st.sampled_from(["features", "tokens", "vectors"]),
        "flow": st.booleans(),
    }
)


class Oracle:
    """A layer's forward in training, one part of one sequence of one direction after another."""

    def __init__(self, layer, seed):
        self.layer, self.seed = layer, seed
        self.inputs, self.parts = [], []
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
                final = i == len(parts) - 1
                self.parts.append((layer, side, b, steps, final, params, given, now))
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
            self.inputs.append(x)
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

    def flow(self, d_output, d_state):
        """After the call: norms of the gradients in h, each that of the state before a rest."""
        rnn, sides = self.layer, 1 + self.layer.bidirectional
        found = np.zeros((rnn.num_layers * sides, T, B))
        d_y = d_output / 2 if rnn.merge == "mean" else d_output
        for layer in reversed(range(rnn.num_layers)):
            x = self.inputs[layer]
            d_x = np.zeros_like(x)
            for of, side, b, steps, final, params, options, state in self.parts:
                if of != layer:
                    continue
                at, width = layer * sides + side, rnn.state_sizes[0]
                own = d_y[:, :, side * width :] if rnn.merge == "concat" else d_y
                own = own[steps, b : b + 1, :width]
                d_end = [part[at, b : b + 1] * final for part in d_state]
                for k in range(len(steps) + 1):
                    # All but the first step of what the last turn had.
                    rest = dict(options)
                    if "zone" in options:
                        rest["zone"] = options["zone"][k:]
                    d_first = d_end
                    if k < len(steps):
                        _, _, saved = self.reference.forward(
                            params, x[steps[k:], b : b + 1], state, **rest
                        )
                        d_rest, d_first, _ = self.reference.backward(params, saved, own[k:], d_end)
                        state = tuple(saved[name][1] for name in self.reference.STATES)
                    if k:
                        found[at, steps[k - 1], b] = np.linalg.norm(own[k - 1] + d_first[0])
                    else:
                        d_x[steps, b] += d_rest[:, 0]
            d_y = self._input(layer, d_x) / (2 if rnn.merge == "mean" else 1)
        return found


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(forms, everywhere, calls, st.integers(0, 2**32))
def test_random_combinations(form, options, call, number):
    check(form, options, call, number)


@pytest.mark.slow
@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(forms, everywhere, calls, st.integers(0, 2**32))
def test_many_random_combinations(form, options, call, number):
    check(form, options, call, number)


def results(layer, x, state, given, d_output, d_state, *, flow=True):
    """Every array of forward and backward."""
    y, final, saved = layer.forward(x, as_state(state), **given)
    found = {"output": y.copy()}
    d_x, d_first, grads, *more = layer.backward(
        saved, d_output, as_state(d_state), return_flow=flow
    )
    if flow:
        found["flow"] = more[0].astype(layer.dtype)
    for kind, parts in (("final", final), ("d initial", d_first)):
        found |= {f"{kind} {i}": part for i, part in enumerate(as_parts(parts))}
    return found | ({} if d_x is None else {"d x": d_x}) | grads


def check(form, options, call, number):
    (kind, own), dtype = form
    options = {**options, **own}
    options["dropout"] *= options["num_layers"] > 1
    options["locked_dropout"] &= options["dropout"] + options["input_dropout"] > 0
    if options["bidirectional"]:
        options["merge"] = call["merge"]
    if call["inputs"] != "features":
        options["input_dropout"] = 0.0
    rng = np.random.default_rng(number)

    def normal(*shape):
        # Numbers that float32 has, too.
        return rng.standard_normal(shape).astype("f4").astype("f8")

    layer = getattr(fastrnn, kind)(n_in, dtype=np.float64, seed=1, **options)
    for key, value in layer.params.items():
        drawn = value if key.startswith("weight_hh") else 0.7 * normal(*value.shape)
        value[...] = drawn.astype("f4")
    vectors = normal(V, n_in) if call["inputs"] == "vectors" else None
    if call["inputs"] == "features":
        x = rows = normal(T, B, n_in)
    else:
        table = np.eye(n_in) if vectors is None else vectors
        x = rng.integers(len(table), size=(T, B))
        rows = table[x]
    count = layer.num_layers * (1 + layer.bidirectional)
    parts, d_state = (tuple(normal(count, B, size) for size in layer.state_sizes) for _ in range(2))
    d_output = normal(T, B, layer.output_size)
    resets = np.zeros((T, B), bool)
    if call["resets"] is not None:
        resets = np.random.default_rng(call["resets"]).random((T, B)) < 0.3
    state = parts if call["state"] else (None,)
    given = {
        "lengths": call["lengths"],
        "resets": None if call["resets"] is None else resets,
        "vectors": vectors,
        "seed": call["seed"],
    }

    found = results(layer, x, state, given, d_output, d_state)
    begun = [part.copy() for part in parts]
    if not call["state"]:
        ends = [f"_l{i}{end}" for i in range(layer.num_layers) for end in layer._ends]
        for name, part in zip(layer.state_names, begun, strict=True):
            part[...] = 0
            if layer.learned_state:
                part[...] = np.stack([layer.params[f"{name}_0{end}"] for end in ends])[:, None]
    lengths = [T] * B if call["lengths"] is None else call["lengths"]
    oracle = Oracle(layer, call["seed"])
    want_y, want_final = oracle(rows, begun, lengths, resets)
    np.testing.assert_allclose(found["output"], want_y, rtol=1e-9, atol=1e-11)
    for i, wanted in enumerate(want_final):
        np.testing.assert_allclose(found[f"final {i}"], wanted, rtol=1e-9, atol=1e-11)
    want_flow = oracle.flow(d_output, d_state)
    np.testing.assert_allclose(found["flow"], want_flow, rtol=1e-9, atol=1e-11)

    with threads(call["count"]):
        pieces = given | {"checkpoint_every": call["every"]}
        again = results(layer, x, state, pieces, d_output, d_state, flow=call["flow"])
    same_results(again, {key: found[key] for key in found if key != "flow" or call["flow"]})

    arrays = dict(layer.params)
    if call["state"]:
        arrays |= {f"d initial {i}": part for i, part in enumerate(parts)}
    if "d x" in found:
        arrays["d x"] = x if vectors is None else vectors
    start = {key: value.copy() for key, value in arrays.items()}
    directions = {key: rng.standard_normal(value.shape) for key, value in arrays.items()}

    def loss(step):
        for key, value in arrays.items():
            value[...] = start[key] + step * directions[key]
        out, last, _ = layer.forward(x, as_state(state), **given)
        ends = zip(as_parts(last), d_state, strict=True)
        return np.vdot(out, d_output) + sum(np.vdot(part, d) for part, d in ends)

    slope = sum(np.vdot(found[key], directions[key]) for key in arrays)
    slopes = [(loss(step) - loss(-step)) / (2 * step) for step in (1e-5, 1e-6)]
    loss(0)
    # A bound of the cell state may be met on the way: then it has no slope there.
    if layer.__dict__.get("cell_clip") is None or abs(slopes[0] - slopes[1]) < 1e-6:
        assert slopes[1] == pytest.approx(slope, rel=1e-4, abs=1e-5)

    if dtype == np.float32:
        narrow = getattr(fastrnn, kind)(n_in, dtype=dtype, **options)
        narrow.load_state_dict({key: value.astype(dtype) for key, value in layer.params.items()})
        compare_narrow(narrow, found, x, state, given, d_output, d_state, call)


def compare_narrow(layer, wanted, x, state, given, d_output, d_state, call):
    """Assert that a layer in float32 gives what one in float64 did."""

    def cast(array):
        return array if array is None or array.dtype.kind != "f" else array.astype(np.float32)

    given = given | {"vectors": cast(given["vectors"])}
    arguments = cast(x), tuple(cast(part) for part in state)
    gradients = cast(d_output), tuple(cast(part) for part in d_state)
    found = results(layer, *arguments, given, *gradients)
    with threads(call["count"]):
        pieces = given | {"checkpoint_every": call["every"]}
        same_results(results(layer, *arguments, pieces, *gradients), found)
    assert found.keys() == wanted.keys()
    for keys in (layer.params, [key for key in wanted if key not in layer.params]):
        scale = rms(*(wanted[key] for key in keys))
        for key in keys:
            agree(found[key], wanted[key], np.float32, terms(layer, x), key, scale)
