"""What can be seen of a layer: gates, states, how gradients flow; states that are learned."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from helpers import (
    agree,
    as_parts,
    as_state,
    computed,
    each_cell,
    each_dtype,
    expected,
    layer_params,
    make_problem,
    mostly_double,
    new_layer,
    reference_of,
    same,
    same_results,
    threads,
)

import fastrnn
from fastrnn import plot

T, B, n_in, H = 6, 4, 3, 19


@each_cell
@each_dtype
def test_gates_are_those_of_the_reference(cell, dtype):
    problem = make_problem(cell, T, B, n_in, H, layers=2, dtype=dtype)
    rnn, state = problem.rnn, as_state(problem.state)
    output, _, gates = rnn(problem.x, state, return_gates=True)
    same(output, rnn(problem.x, state)[0])
    reference, options = reference_of(cell)
    x = problem.x.astype(np.float64)
    names = set()
    for layer in range(2):
        params = layer_params(rnn, layer)
        first = tuple(s[layer].astype(np.float64) for s in problem.state)
        x, _, saved = reference.forward(params, x, first, **options)
        wanted = {name: saved[name] for name in reference.GATES if name in saved}
        if "coupled" in cell:
            del wanted["f"]
        wanted |= {name: saved[name][1:] for name in reference.STATES}
        for name, value in wanted.items():
            names.add(f"{name}_l{layer}")
            agree(gates[f"{name}_l{layer}"], value, dtype, problem.terms, name)
    assert gates.keys() == names
    assert {f"{name}_l0" for name in rnn.state_names} <= names
    _, _, saved, again = rnn.forward(problem.x, state, return_gates=True)
    same_results(again, gates)
    rnn.backward(saved, problem.d_output)


def test_gates_of_both_directions_and_lengths(rng):
    layer = fastrnn.LSTM(n_in, H, bidirectional=True, batch_first=True, seed=0)
    x = rng.standard_normal((B, T, n_in)).astype("f4")
    lengths = [6, 2, 0, 4]
    y, _, gates = layer(x, None, lengths, return_gates=True)
    keys = {f"{name}_l0{end}" for name in "ifgohc" for end in ("", "_reverse")}
    assert gates.keys() == keys
    same(np.ascontiguousarray(gates["h_l0"]), np.ascontiguousarray(y[:, :, :H]))
    same(np.ascontiguousarray(gates["h_l0_reverse"]), np.ascontiguousarray(y[:, :, H:]))
    for b, length in enumerate(lengths):
        for value in gates.values():
            assert value.shape == (B, T, H)
            assert (value[b, length:] == 0).all()
            assert (value[b, :length] != 0).any() or length == 0
    o, c = gates["o_l0_reverse"], gates["c_l0_reverse"]
    agree(gates["h_l0_reverse"], o * np.tanh(c), np.float32, 10)
    one, _, alone = layer(x[0], return_gates=True)
    assert alone["i_l0"].shape == (T, H)
    same(np.ascontiguousarray(alone["h_l0"]), np.ascontiguousarray(one[:, :H]))


def test_gates_are_not_kept_in_pieces(rng):
    layer = fastrnn.GRU(n_in, H)
    x = rng.standard_normal((T, B, n_in)).astype("f4")
    for options in ({"checkpoint_every": 2}, {"budget_mb": 100}):
        with pytest.raises(ValueError, match="return_gates: expected False beside"):
            layer.forward(x, return_gates=True, **options)


@mostly_double
def test_flow_is_the_gradient_of_the_state_before_each_step(cell, dtype):
    """The reference's gradient of the initial state, of all that comes after step t."""
    problem = make_problem(cell, T, B, n_in, H, layers=2, dtype=dtype)
    rnn = problem.rnn
    want = computed(problem)

    def run(**given):
        _, _, saved = rnn.forward(problem.x, as_state(problem.state), **given)
        arguments = saved, problem.d_output, as_state(problem.d_state)
        d_x, _, grads, flow = rnn.backward(*arguments, return_flow=True)
        same(d_x, want["d x"])
        same_results(grads, {key: want[key] for key in grads})
        return flow

    flow = run()
    assert flow.shape == (2, T, B)
    same(run(checkpoint_every=2), flow)
    with threads(3):
        same(run(), flow)
    # Of the upper layer: h after step t is an initial state of the rest.
    _, _, gates = rnn(problem.x, as_state(problem.state), return_gates=True)
    upper = new_layer(cell, rnn.output_size, H, dtype=dtype)
    upper.load_state_dict({f"{k}_l0": v for k, v in layer_params(rnn, 1, dtype).items()})
    for t in range(T - 1):
        parts = tuple(gates[f"{name}_l1"][t][None] for name in rnn.state_names)
        rest = make_problem(cell, T - 1 - t, B, rnn.output_size, H, dtype=dtype)
        rest.rnn, rest.x = upper, np.ascontiguousarray(gates["h_l0"][t + 1 :])
        rest.state, rest.d_output = parts, problem.d_output[t + 1 :]
        rest.d_state = tuple(d[1:] for d in problem.d_state)
        d_h = expected(rest)["d initial h"][0] + problem.d_output[t]
        got = flow[1, t].astype(dtype)
        agree(got, np.linalg.norm(d_h, axis=1), dtype, problem.terms, f"flow at {t}")
    last = problem.d_output[-1] + problem.d_state[0][1]
    assert flow.dtype == np.float64
    agree(
        flow[1, -1].astype(dtype), np.linalg.norm(last.astype("f8"), axis=1), dtype, problem.terms
    )


def test_flow_of_both_directions_lengths_and_axes(rng):
    layer = fastrnn.LSTM(n_in, H, 2, bidirectional=True, batch_first=True, seed=0)
    x = rng.standard_normal((B, T, n_in)).astype("f4")
    lengths = [6, 2, 0, 4]
    y, _, saved = layer.forward(x, None, lengths)
    d_y = rng.standard_normal(y.shape).astype("f4")
    _, _, _, flow = layer.backward(saved, d_y, return_flow=True)
    assert flow.shape == (4, T, B)
    for b, length in enumerate(lengths):
        assert (flow[:, length:, b] == 0).all()
        assert (flow[:, :length, b] > 0).all()
    y, _, saved = layer.forward(x[0])
    _, _, _, alone = layer.backward(saved, d_y[0], return_flow=True)
    same(np.ascontiguousarray(alone), np.ascontiguousarray(flow[:, :, 0]))


def test_a_picture_of_the_flow(rng):
    pytest.importorskip("matplotlib")
    flow = rng.random((2, 7, 3)) + 0.1
    ax = plot.gradient_flow(flow)
    lines = ax.get_lines()
    assert [line.get_label() for line in lines] == ["0", "1"]
    np.testing.assert_allclose(lines[1].get_ydata(), np.sqrt((flow[1] ** 2).mean(axis=1)))
    assert ax.get_yscale() == "log"
    assert plot.gradient_flow(flow[:, :, 0], ["a", "b"], ax) is ax
    with pytest.raises(ValueError, match="labels: expected 2"):
        plot.gradient_flow(flow, ["a"])
    with pytest.raises(ValueError, match="flow: expected shape"):
        plot.gradient_flow(flow[0, 0])


def drawn(flow, **options):
    return plot.gradient_flow(flow, **options).get_lines()[0].get_ydata()


def test_a_gradient_that_has_vanished_counts_in_the_picture():
    pytest.importorskip("matplotlib")
    flow = np.ones((1, 3, 4))
    flow[0, 0, :3] = 0
    flow[0, 1] = 0
    # A step that nothing comes back to has no logarithm.
    np.testing.assert_array_equal(drawn(flow), [0.5, np.nan, 1])
    np.testing.assert_array_equal(drawn(flow[:, :, 3]), [1, np.nan, 1])


def test_a_picture_of_sequences_of_several_lengths():
    pytest.importorskip("matplotlib")
    lengths = np.array([3, 1, 0, 2])
    mask = np.arange(3)[:, None] < lengths
    flow = np.where(mask, 2.0, 0)[None]
    flow[0, 0, 0] = 0
    wanted = [np.sqrt(8 / 3), 2, 2]
    np.testing.assert_allclose(drawn(flow, lengths=lengths), wanted)
    np.testing.assert_allclose(drawn(flow, lengths=mask), wanted)
    np.testing.assert_allclose(drawn(flow), np.sqrt([8 / 4, 8 / 4, 4 / 4]))
    np.testing.assert_array_equal(drawn(np.ones((1, 3)), lengths=2), [1, 1, np.nan])
    np.testing.assert_array_equal(drawn(np.ones((1, 3, 4)), lengths=[0] * 4), [np.nan] * 3)
    for wrong in ([1, 2, 3], [1, 2, 3, 4], mask[1:]):
        with pytest.raises(ValueError, match="lengths: expected"):
            plot.gradient_flow(flow, lengths=wrong)


def test_drawing_is_not_imported_before_it_is_asked_for():
    code = "import sys, fastrnn.plot; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@each_cell
@each_dtype
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_learned_state_is_a_given_one(cell, dtype, bidirectional, rng):
    options = {"bidirectional": bidirectional, "dtype": dtype, "seed": 0}
    layer = new_layer(cell, n_in, H, 2, learned_state=True, **options)
    plain = new_layer(cell, n_in, H, 2, **options)
    ends = [f"_l{i}{end}" for i in range(2) for end in ("", "_reverse")[: 1 + bidirectional]]
    names = layer.state_names
    for name in names:
        for end in ends:
            value = layer.params[f"{name}_0{end}"]
            assert (value == 0).all()
            value[...] = rng.standard_normal(value.shape)
    learned = {key for key in layer.params if key.partition("_l")[0] in {f"{n}_0" for n in names}}
    plain.load_state_dict({key: v for key, v in layer.params.items() if key not in learned})
    x = rng.standard_normal((T, B, n_in)).astype(dtype)
    state = [np.stack([layer.params[f"{name}_0{end}"] for end in ends]) for name in names]
    state = as_state([np.repeat(part[:, None], B, axis=1) for part in state])
    y, final, saved = layer.forward(x)
    want_y, want_final, want_saved = plain.forward(x, state)
    same(y, want_y)
    same(layer(x)[0], want_y)
    for found, wanted in zip(as_parts(final), as_parts(want_final), strict=True):
        same(found, wanted)
    d_y = rng.standard_normal(y.shape).astype(dtype)
    d_x, d_state, grads = layer.backward(saved, d_y)
    want_x, want_state, want_grads = plain.backward(want_saved, d_y)
    same(d_x, want_x)
    same_results({key: grads[key] for key in want_grads}, want_grads)
    for name, part in zip(names, as_parts(want_state), strict=True):
        for i, end in enumerate(ends):
            total = part[i].astype("f8").sum(axis=0)
            assert np.abs(total).max() > 0
            agree(grads[f"{name}_0{end}"], total, dtype, B * 100, name)
    for found, wanted in zip(as_parts(d_state), as_parts(want_state), strict=True):
        same(found, wanted)
    # Given, it is not learned.
    _, _, saved = layer.forward(x, state)
    _, _, grads = layer.backward(saved, d_y)
    assert all((grads[key] == 0).all() for key in learned)
    if not bidirectional:
        stepper = layer.stepper(B)
        same(stepper(x[0]), y[0])
        stepper.state = None
        same(stepper(x[0]), y[0])


def test_after_a_reset_a_state_is_zero_even_if_one_is_learned(rng):
    layer = fastrnn.GRU(n_in, H, learned_state=True, seed=0)
    layer.params["h_0_l0"][...] = 1
    x = rng.standard_normal((T, B, n_in)).astype("f4")
    resets = np.zeros((T, B), bool)
    resets[0, 1] = resets[3, 2] = True
    y, _, saved = layer.forward(x, resets=resets)
    zero = np.zeros((1, 1, H), np.float32)
    same(np.ascontiguousarray(y[:, 1:2]), layer(x[:, 1:2], zero)[0])
    same(np.ascontiguousarray(y[3:, 2:3]), layer(x[3:, 2:3], zero)[0])
    same(np.ascontiguousarray(y[:, :1]), layer(x[:, :1])[0])
    _, d_state, grads = layer.backward(saved, y)
    agree(grads["h_0_l0"], d_state[0].astype("f8").sum(axis=0), np.float32, 100)
    assert (d_state[0, 1] == 0).all()


@pytest.mark.parametrize("steps", [500, 4000])
def test_a_budget_chooses_the_pieces(steps, rng):
    layer = fastrnn.LSTM(8, 64, 2, seed=0)
    x = rng.standard_normal((steps, 2, 8)).astype("f4")
    # Each thread more needs memory that does not shrink with the pieces.
    with threads(1):
        need = layer.training_bytes(steps, 2)
        for share in (1.01, 0.8, 0.6):
            budget = need * share / 1e6
            _, _, saved = layer.forward(x, budget_mb=budget)
            every = saved.pieces[0].steps
            assert layer.training_bytes(steps, 2, checkpoint_every=every) <= budget * 1e6
            assert (every == steps) == (share > 1)
            twice = layer.training_bytes(steps, 2, checkpoint_every=min(steps, 2 * every))
            assert every == steps or twice > budget * 1e6
    lengths = rng.integers(steps // 2, steps, size=2)
    with threads(1):
        budget = layer.training_bytes(steps, 2, lengths=lengths, checkpoint_every=steps // 3) / 1e6
        _, _, saved = layer.forward(x, lengths=lengths, budget_mb=budget)
        every = len(saved.pieces[0].source) // 2
        assert len(saved.pieces) > 1
        said = layer.training_bytes(steps, 2, lengths=lengths, checkpoint_every=every)
        assert said <= budget * 1e6
        one = layer.forward(x[:, 0], lengths=lengths[:1], budget_mb=budget)[2]
        assert len(one.pieces) == 1
    with pytest.raises(ValueError, match=r"budget_mb: expected at least \d+\.\d for"):
        layer.forward(x, budget_mb=0.01)
    with pytest.raises(ValueError, match="budget_mb: expected None beside checkpoint_every"):
        layer.forward(x, budget_mb=10, checkpoint_every=3)
    with pytest.raises((TypeError, ValueError), match="budget_mb: expected"):
        layer.forward(x, budget_mb="x")


@pytest.mark.parametrize("lengths", [[3, 3], [4, 3], [5, 5]])
def test_gates_where_all_end_early(lengths, rng):
    layer = fastrnn.LSTM(4, 8, seed=0)
    x = rng.standard_normal((5, 2, 4)).astype("f4")
    _, _, gates = layer(x, None, lengths, return_gates=True)
    _, _, _, wanted = layer.forward(x, None, lengths, return_gates=True)
    assert gates.keys() == wanted.keys()
    for name, value in wanted.items():
        same(np.ascontiguousarray(gates[name]), np.ascontiguousarray(value))
