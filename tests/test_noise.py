"""What is drawn in training: each kind of it against the reference with the reference's masks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers import (
    agree,
    as_parts,
    as_state,
    compare,
    computed,
    each_cell,
    expected,
    make_problem,
    mostly_double,
    new_layer,
    rms,
    same,
    same_results,
    threads,
)
from hypothesis import given
from hypothesis import strategies as st

import fastrnn
from fastrnn.cells import CELLS
from fastrnn.counter import stream
from fastrnn.dropout import drop_weights, rows_mask
from fastrnn.reference import masks

KINDS = {
    "dropout": {"dropout": 0.4},
    "input": {"input_dropout": 0.3},
    "locked": {"dropout": 0.4, "input_dropout": 0.3, "locked_dropout": True},
    "recurrent": {"recurrent_dropout": 0.4},
    "weight": {"weight_dropout": 0.4},
    "zoneout": {"zoneout": 0.3},
    "both": {"recurrent_dropout": 0.3, "zoneout": 0.3},
    "all": {
        "dropout": 0.2,
        "input_dropout": 0.1,
        "locked_dropout": True,
        "recurrent_dropout": 0.3,
        "weight_dropout": 0.2,
        "zoneout": 0.2,
    },
}
# Each kind alone where cells differ in what noise meets, all together everywhere.
MAIN = ("rnn_tanh", "gru", "gru_before", "lstm", "lstm_projected")
PAIRS = [(cell, kind) for cell in sorted(CELLS) for kind in (KINDS if cell in MAIN else ("all",))]
each_kind = pytest.mark.parametrize(("cell", "kind"), PAIRS)
each_case = pytest.mark.parametrize(
    ("cell", "kind", "dtype"),
    [(*pair, np.float64) for pair in PAIRS]
    + [(cell, kind, np.float32) for cell in ("gru", "lstm_projected") for kind in ("both", "all")],
    ids=lambda value: value if isinstance(value, str) else np.dtype(value).name,
)
SHAPE = 6, 5, 4, 19  # T, B, I, H


def noisy(cell, kind, *, shape=SHAPE, **options):
    return make_problem(cell, *shape, layers=2, **KINDS[kind], **options)


@each_case
@pytest.mark.parametrize("seed", [0, 2**63 + 5])
def test_training_is_that_of_the_reference(cell, dtype, kind, seed):
    problem = noisy(cell, kind, dtype=dtype)
    got = computed(problem, given={"seed": seed})
    compare(problem, got, expected(problem, seed=seed))
    plain = expected(problem)
    assert rms(got["output"] - plain["output"]) > 1e-3 * rms(plain["output"])


@each_kind
def test_tokens_and_shapes_beside(cell, kind):
    for shape in ((1, 2, 3, 7), (3, 70, 2, 5), (2, 3, 5, 33)):
        tokens = "input_dropout" not in KINDS[kind]
        problem = noisy(cell, kind, shape=shape, tokens=tokens)
        compare(problem, computed(problem, given={"seed": 7}), expected(problem, seed=7))


@mostly_double
def test_inference_draws_nothing_and_expects_zoneout(cell, dtype):
    problem = make_problem(cell, *SHAPE, layers=2, dtype=dtype, **KINDS["all"])
    want = expected(problem)
    output, final = problem.rnn(problem.x, as_state(problem.state))
    agree(output, want["output"], dtype, problem.terms)
    stepper = problem.rnn.stepper(SHAPE[1])
    stepper.state = as_state(problem.state)
    for x, y in zip(problem.x, output, strict=True):
        same(stepper(x), y)
    for found, wanted in zip(as_parts(stepper.state), as_parts(final), strict=True):
        same(found, wanted)
    frozen = problem.rnn.freeze()
    same(frozen(problem.x, as_state(problem.state))[0], output)


@each_case
def test_same_bits_for_any_threads_pieces_and_company(cell, dtype, kind):
    problem = noisy(cell, kind, dtype=dtype)
    want = computed(problem, given={"seed": 3})
    for count in (2, 3, 5):
        with threads(count):
            same_results(computed(problem, given={"seed": 3}), want)
    for every in (1, 2, 4):
        same_results(computed(problem, given={"seed": 3, "checkpoint_every": every}), want)
    # The first sequences have the same masks whatever stands behind them.
    some = computed(problem.piece(columns=slice(0, 3)), given={"seed": 3})
    for key in ("output", "d x"):
        same(some[key], np.ascontiguousarray(want[key][:, :3]), key)


@each_kind
def test_sequences_alone(cell, kind):
    """Lengths: each sequence is what it is without the steps behind its end."""
    problem = noisy(cell, kind)
    lengths = [3, 6, 0, 6, 1]
    rnn, state = problem.rnn, as_state(problem.state)
    output, _, saved = rnn.forward(problem.x, state, lengths, seed=3)
    _, _, grads = rnn.backward(saved, problem.d_output, as_state(problem.d_state))
    whole = rnn.forward(problem.x, state, seed=3)[0]
    for b, length in enumerate(lengths):
        assert (output[length:, b] == 0).all()
        same(np.ascontiguousarray(output[:length, b]), np.ascontiguousarray(whole[:length, b]))
    with threads(3):
        again, _, saved = rnn.forward(problem.x, state, lengths, seed=3, checkpoint_every=2)
        same(again, output)
        _, _, found = rnn.backward(saved, problem.d_output, as_state(problem.d_state))
        same_results(found, grads)


def _of(array, order):
    return np.ascontiguousarray(array[:, order])


@each_kind
@pytest.mark.parametrize("uneven", [False, True])
def test_sequences_have_their_masks_in_any_batch(cell, kind, uneven):
    problem = noisy(cell, kind)
    own = np.array([7, 0, 3, 2**31 - 1, 12])
    rng = np.random.default_rng(1)
    lengths = np.array([6, 2, 5, 0, 3]) if uneven else np.full(5, 6)
    resets = (rng.random(SHAPE[:2]) < 0.2) & uneven

    def run(order, **given):
        given |= {"lengths": lengths[order], "resets": resets[:, order], "seed": 3}
        return computed(problem.piece(columns=order), given=given)

    whole = run(np.arange(5), sequences=own)
    for order in ([4, 2, 0, 3, 1], [3, 1], [2]):
        some = run(order, sequences=own[order])
        for key, value in whole.items():
            if key not in problem.rnn.params:
                same(some[key], _of(value, order), key)
    if kind != "weight":
        assert (run(np.arange(5))["output"] != whole["output"]).any(), "whose masks does not matter"


@each_kind
@pytest.mark.parametrize("uneven", [False, True])
def test_pieces_in_calls_of_their_own(cell, kind, uneven):
    problem = noisy(cell, kind)
    rnn, ends = problem.rnn, (0, 1, 4, SHAPE[0])
    lengths = np.array([6, 2, 5, 0, 3]) if uneven else np.full(5, 6)
    resets = (np.random.default_rng(1).random(SHAPE[:2]) < 0.3) & uneven
    for own in (None, np.array([4, 1, 9, 0, 2])):
        whole = {"seed": 3, "sequences": own, "lengths": lengths, "resets": resets}
        want = computed(problem, given=whole)
        state, calls, outputs = as_state(problem.state), [], []
        for begin, end in itertools.pairwise(ends):
            given = {"seed": 3, "first_step": begin, "sequences": own}
            given["lengths"] = np.clip(lengths - begin, 0, end - begin)
            given["resets"] = resets[begin:end]
            output, state, saved = rnn.forward(problem.x[begin:end], state, **given)
            outputs.append(output.copy())
            calls.append((saved, problem.d_output[begin:end]))
        same(np.concatenate(outputs), want["output"], "output")
        d_state, grads, d_xs = as_state(problem.d_state), None, []
        for saved, d_output in reversed(calls):
            d_x, d_state, grads = rnn.backward(saved, d_output, d_state, grads)
            d_xs.insert(0, d_x)
        same(np.concatenate(d_xs), want["d x"], "d x")
        for name, value in zip(problem.names, as_parts(d_state), strict=True):
            same(value, want[f"d initial {name}"], name)
        for key, value in grads.items():
            # Those of weights that are dropped are summed up apart in each call.
            if rnn.weight_dropout and key.startswith("weight_hh"):
                agree(value, want[key], problem.dtype, problem.terms, key)
            else:
                same(value, want[key], key)


@pytest.mark.parametrize("uneven", [False, True])
def test_both_directions_have_their_masks_in_any_batch(uneven):
    T, B, n_in, H = SHAPE
    options = KINDS["all"] | {"num_layers": 2, "bidirectional": True}
    rnn = fastrnn.LSTM(n_in, H, seed=1, **options)
    rng = np.random.default_rng(2)
    x = rng.standard_normal((T, B, n_in), np.float32)
    d_y = rng.standard_normal((T, B, 2 * H), np.float32)
    own, lengths = np.array([7, 0, 3, 40, 12]), np.array([6, 2, 5, 0, 3])
    resets = rng.random((T, B)) < 0.3

    def run(order):
        given = {"lengths": lengths[order], "resets": resets[:, order]} if uneven else {}
        y, state, saved = rnn.forward(x[:, order], seed=3, sequences=own[order], **given)
        d_x, d_state, _ = rnn.backward(saved, d_y[:, order])
        return y, d_x, *state, *d_state

    whole = run(np.arange(B))
    for order in ([4, 2, 0, 3, 1], [3, 1], [2]):
        for some, value in zip(run(order), whole, strict=True):
            same(np.ascontiguousarray(some), np.ascontiguousarray(value[:, order]))


def test_steps_and_sequences_are_those_of_the_reference():
    problem = noisy("lstm", "all")
    own = np.array([4, 1, 9, 0, 2])
    got = computed(problem, given={"seed": 5, "first_step": 11, "sequences": own})
    compare(problem, got, expected(problem, seed=5, first_step=11, sequences=own))


def test_one_sequence_may_be_given_as_a_number():
    layer = fastrnn.GRU(3, 4, zoneout=0.5, seed=0)
    x = np.random.default_rng(0).standard_normal((6, 1, 3), dtype=np.float32)
    want = layer.forward(x, seed=1, sequences=[5])[0]
    same(layer.forward(x[:, 0], seed=1, sequences=5)[0], np.ascontiguousarray(want[:, 0]))
    assert (layer.forward(x, seed=1)[0] != want).any()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"first_step": -1}, ValueError, "first_step: expected at least 0, got -1"),
        ({"first_step": 2**31}, ValueError, "first_step: expected an integer from 0 to"),
        ({"first_step": 1.5}, TypeError, "first_step: expected an integer"),
        ({"sequences": [0]}, ValueError, r"sequences: expected shape \(B\) = \(2\)"),
        ({"sequences": [0, -1]}, ValueError, "sequences: expected integers from 0 to .*, got -1"),
        ({"sequences": [0, 2**31]}, ValueError, "sequences: expected integers from 0 to"),
        ({"sequences": [0.0, 1.0]}, TypeError, "sequences: expected integers, got float64"),
        ({"first_step": 1}, ValueError, "seed: expected an integer beside first_step"),
        ({"sequences": [4, 5]}, ValueError, "seed: expected an integer beside first_step"),
    ],
    ids=str,
)
def test_bad_steps_and_sequences_are_named(given, error, message):
    layer = fastrnn.GRU(3, 4, zoneout=0.5)
    with pytest.raises(error, match=message):
        layer.forward(np.zeros((5, 2, 3), np.float32), **given)


@each_cell
def test_a_reset_keeps_the_masks_of_its_sequence(cell, rng):
    problem = noisy(cell, "both")
    rnn = problem.rnn
    resets = np.zeros(SHAPE[:2], bool)
    resets[3] = True
    output, _, _ = rnn.forward(problem.x, as_state(problem.state), resets=resets, seed=3)
    changed = problem.x.copy()
    changed[:3] = rng.standard_normal(changed[:3].shape)
    other, _, _ = rnn.forward(changed, as_state(problem.state), resets=resets, seed=3)
    same(np.ascontiguousarray(output[3:]), np.ascontiguousarray(other[3:]))
    assert (output[:3] != other[:3]).any()


@each_kind
def test_both_directions(cell, kind, rng):
    """The second direction is a layer that draws from its own stream, on turned sequences."""
    T, B, n_in, H = SHAPE
    # There is nothing between layers.
    away = ("weight_dropout", "dropout")
    options = {key: p for key, p in KINDS[kind].items() if key not in away}
    rnn = new_layer(cell, n_in, H, bidirectional=True, dtype=np.float64, seed=1, **options)
    x = rng.standard_normal((T, B, n_in))
    d_y = rng.standard_normal((T, B, rnn.output_size))
    lengths = [6, 2, 0, 5, 6]
    y, _, saved = rnn.forward(x, None, lengths, seed=3)
    d_x, _, grads = rnn.backward(saved, d_y)
    for every in (1, 4):
        with threads(every):
            again, _, saved = rnn.forward(x, None, lengths, seed=3, checkpoint_every=every)
            same(again, y)
            found, _, other = rnn.backward(saved, d_y)
        same(found, d_x)
        same_results(other, grads)
    width = rnn.state_sizes[0]
    for b, length in enumerate(lengths):
        # From the end on, whatever is behind it.
        alone, _, _ = rnn.forward(x[:length, : b + 1], None, seed=3) if length else (y[:0], 0, 0)
        same(np.ascontiguousarray(alone[:, b]), np.ascontiguousarray(y[:length, b]))
    # With the same weights and x both directions differ by what they draw alone.
    for key, value in rnn.params.items():
        if key.endswith("_reverse"):
            value[...] = rnn.params[key.removesuffix("_reverse")]
    if set(options) - {"input_dropout", "locked_dropout"}:
        two, _, _ = rnn.forward(np.concatenate([x[:1], x[:1]]), seed=3)
        assert (two[1, :, :width] != two[0, :, width:]).any()


@each_kind
def test_gradients_by_finite_differences(cell, kind, rng):
    problem = noisy(cell, kind, shape=(4, 3, 3, 6))
    rnn = problem.rnn
    got = computed(problem, given={"seed": 5})

    def loss():
        y, final, _ = rnn.forward(problem.x, as_state(problem.state), seed=5)
        parts = zip(as_parts(final), problem.d_state, strict=True)
        return np.vdot(y, problem.d_output) + sum(np.vdot(s, d) for s, d in parts)

    for key, value in rnn.params.items():
        direction = rng.standard_normal(value.shape)
        start, step = value.copy(), 1e-6
        found = []
        for sign in (1, -1):
            value[...] = start + sign * step * direction
            found.append(loss())
        value[...] = start
        slope = (found[0] - found[1]) / (2 * step)
        assert abs(slope) > 1e-6, key
        assert slope == pytest.approx(np.vdot(got[key], direction), rel=1e-5, abs=1e-7), key


@given(
    st.sampled_from(sorted(set(CELLS) - {"rnn_relu"})),
    st.fixed_dictionaries(
        {
            "dropout": st.sampled_from([0, 0.3]),
            "input_dropout": st.sampled_from([0, 0.3]),
            "locked_dropout": st.booleans(),
            "recurrent_dropout": st.sampled_from([0, 0.4]),
            "weight_dropout": st.sampled_from([0, 0.4]),
            "zoneout": st.sampled_from([0, 0.4]),
            "bias": st.booleans(),
        }
    ),
    st.tuples(*[st.integers(1, 9)] * 3, st.integers(8, 40)),
    st.integers(0, 2**63),
    st.integers(1, 3),
    st.none() | st.integers(1, 9),
)
def test_random_combinations(cell, options, shape, seed, layers, every):
    options["dropout"] *= layers > 1
    options["locked_dropout"] &= options["dropout"] + options["input_dropout"] > 0
    problem = make_problem(cell, *shape, layers=layers, **options)
    got = computed(problem, given={"seed": seed, "checkpoint_every": every})
    compare(problem, got, expected(problem, seed=seed))


def test_how_often(rng):
    weight = np.ones((300, 400), np.float32)
    kept = drop_weights(weight, 0.25, 3)
    assert set(np.unique(kept)) == {0, np.float32(1 / 0.75)}
    assert abs((kept == 0).mean() - 0.25) < 0.01
    same(kept, masks.weight_mask(3, 300, 400, 0.25).astype("f4"))
    rows = rows_mask(300, 0.25, 3, np.float32)
    assert rows.shape == (300, 1)
    assert abs((rows == 0).mean() - 0.25) < 0.08


def test_streams_differ():
    assert stream(5, 0) == masks.stream(5, 0)
    assert len({stream(seed, number) for seed in range(50) for number in range(2)}) == 100
    same(
        np.array([stream(2**64 - 1, n) for n in range(9)], np.uint64),
        np.array([masks.stream(2**64 - 1, n) for n in range(9)], np.uint64),
    )


@pytest.mark.parametrize(
    "name", ["input_dropout", "recurrent_dropout", "weight_dropout", "zoneout"]
)
@pytest.mark.parametrize("p", [-0.1, 1, np.nan, "x"])
def test_a_bad_probability_is_named(name, p):
    with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
        fastrnn.GRU(3, 4, **{name: p})


def test_tokens_have_no_input_dropout(rng):
    layer = fastrnn.GRU(3, 4, input_dropout=0.5)
    with pytest.raises(ValueError, match="x: expected features beside input_dropout, got tokens"):
        layer.forward(rng.integers(3, size=(5, 2)))
    layer(rng.integers(3, size=(5, 2)))


def test_without_a_seed_it_is_drawn_anew(rng):
    x = rng.standard_normal((5, 2, 3)).astype("f4")
    for kind in ("recurrent_dropout", "weight_dropout", "zoneout", "input_dropout"):
        one, other = (fastrnn.LSTM(3, 8, seed=0, **{kind: 0.5}) for _ in range(2))
        runs = [one.forward(x)[0].copy() for _ in range(2)]
        assert (runs[0] != runs[1]).any()
        same(other.forward(x)[0].copy(), runs[0])
