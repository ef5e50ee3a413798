"""The layers against the reference: every array of forward and backward, every shape of a tile."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import (
    agree,
    as_parts,
    as_state,
    check,
    compare,
    computed,
    each_cell,
    each_dtype,
    expected,
    make_problem,
    rms,
    same,
    same_results,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrnn import gemm, single
from fastrnn.cells import CELLS
from fastrnn.simd import lanes

each_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
each_input = pytest.mark.parametrize("tokens", [False, True], ids=["dense", "tokens"])

W, HALF = lanes(np.float32), lanes(np.float64)


def around(*edges):
    """Each number with its neighbours."""
    return sorted({n + d for n in edges for d in (-1, 0, 1) if n + d > 0})


# H and I meet registers, strips of three, panels and blocks of depth; B meets tiles of rows.
WIDTHS = around(
    1, HALF, W, 3 * HALF, 3 * W, gemm.COLS * HALF, gemm.COLS * W, gemm.DEPTH
)  # fmt: skip
BATCHES = around(1, gemm.ROWS, 2 * gemm.ROWS, gemm.HEIGHT)
SHAPES = [  # T, B, I, H
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (11, 2, 3, 13),
    (13, 7, 17, 11),
    *((3, 2, 4, H) for H in WIDTHS),
    *((3, 2, width, 5) for width in WIDTHS),
    *((2, B, 3, 5) for B in BATCHES),
    *((T, 1, 3, 5) for T in around(1, gemm.RUN)),
    *((T, 43, 2, 3) for T in (5, 6)),  # T * B on either side of RUN
    (9, 19, 33, 37),
]


@each_cell
@each_dtype
@each_input
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_edges(cell, dtype, tokens, shape):
    check(make_problem(cell, *shape, dtype=dtype, tokens=tokens))


@each_cell
@each_dtype
@each_bias
@each_input
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_stacks(cell, dtype, bias, tokens, num_layers, seed):
    problem = make_problem(
        cell, 5, 3, 4, 19, layers=num_layers, bias=bias, tokens=tokens, dtype=dtype, seed=seed
    )
    check(problem)


sizes = st.one_of(st.sampled_from([1, 2, 3, 5, 7, 11, 13, W - 1, W, W + 1]), st.integers(1, 40))
cases = st.fixed_dictionaries(
    {
        "cell": st.sampled_from(sorted(CELLS)),
        "T": sizes,
        "B": sizes,
        "n_in": sizes,
        "H": sizes,
        "layers": st.integers(1, 3),
        "bias": st.booleans(),
        "tokens": st.booleans(),
        "dtype": st.sampled_from([np.float32, np.float64]),
        "seed": st.integers(0, 9),
    }
)


def check_drawn(case):
    # A relu with few units dies on the way, or meets its kink somewhere in a large problem.
    if "relu" in case["cell"]:
        case |= {"T": min(case["T"], 5), "B": min(case["B"], 7), "H": max(case["H"], 3)}
    check(make_problem(**case))


@given(cases)
def test_random_shapes(case):
    check_drawn(case)


big = st.one_of(sizes, st.sampled_from(WIDTHS), st.sampled_from(BATCHES))


@pytest.mark.slow
@settings(max_examples=2000)
@given(cases, big, big)
def test_many_random_shapes(case, size, batch):
    check_drawn(case | {"H": size, "B": batch})


@each_cell
@each_dtype
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("T", [3, 4, 5, 8, 9])
def test_chunks_of_steps(cell, dtype, chunk, T, monkeypatch):
    problem = make_problem(cell, T, 3, 4, 19, dtype=dtype)
    row = problem.rnn.cell.tape * -(-19 // lanes(dtype)) * lanes(dtype)
    monkeypatch.setattr(single, "_CHUNK_BYTES", chunk * 3 * row * np.dtype(dtype).itemsize)
    check(problem)
    output, final = problem.rnn(problem.x, as_state(problem.state))
    want = expected(problem)
    agree(output, want["output"], dtype, problem.terms)
    for name, value in zip(problem.names, as_parts(final), strict=True):
        agree(value, want[f"final {name}"], dtype, problem.terms, name)


@each_cell
@each_dtype
@each_input
@pytest.mark.parametrize("num_layers", [1, 2])
def test_loss_on_the_final_state_only(cell, dtype, tokens, num_layers):
    shape = (4, 3, 5, 18)
    problem = make_problem(cell, *shape, layers=num_layers, tokens=tokens, dtype=dtype)
    check(problem, d_output=False)


@each_cell
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (3, 2)], ids=str)
def test_no_gradient_into_the_output_is_a_gradient_of_zeros(cell, shape):
    problem = make_problem(cell, *shape, 3, 18)
    absent = computed(problem, d_output=False)
    problem.d_output = np.zeros_like(problem.d_output)
    same_results(computed(problem), absent)


@each_cell
@each_dtype
@pytest.mark.parametrize("num_layers", [1, 2])
def test_loss_on_the_output_only(cell, dtype, num_layers):
    problem = make_problem(cell, 4, 3, 5, 18, layers=num_layers, dtype=dtype)
    check(problem, d_state=False)


@each_cell
def test_no_state_is_a_state_of_zeros(cell):
    problem = make_problem(cell, 4, 3, 5, 18)
    problem.state = tuple(np.zeros_like(s) for s in problem.state)
    output, final, _ = problem.rnn.forward(problem.x)
    given_zeros = computed(problem)
    same(output, given_zeros["output"])
    for name, value in zip(problem.names, as_parts(final), strict=True):
        same(value, given_zeros[f"final {name}"])


@each_cell
@each_dtype
@pytest.mark.parametrize("num_layers", [1, 2])
def test_without_d_x(cell, dtype, num_layers):
    problem = make_problem(cell, 4, 3, 5, 18, layers=num_layers, dtype=dtype)
    want = computed(problem)
    del want["d x"]
    same_results(computed(problem, need_d_x=False), want)


@each_cell
@each_dtype
@each_input
def test_retain(cell, dtype, tokens):
    problem = make_problem(cell, 4, 3, 5, 18, layers=2, tokens=tokens, dtype=dtype)
    rnn = problem.rnn
    arguments = problem.d_output, as_state(problem.d_state)
    _, _, saved = rnn.forward(problem.x, as_state(problem.state))
    runs = [rnn.backward(saved, *arguments, retain=retain) for retain in (True, True, False)]
    once = rnn.backward(rnn.forward(problem.x, as_state(problem.state))[2], *arguments)
    for d_x, d_state, grads in runs:
        assert (d_x is None) == tokens
        if not tokens:
            same(d_x, once[0])
        for got, want in zip(as_parts(d_state), as_parts(once[1]), strict=True):
            same(got, want)
        same_results(grads, once[2])


@each_cell
@each_dtype
@each_bias
@each_input
def test_gradients_are_added_to_given_ones(cell, dtype, bias, tokens, rng):
    problem = make_problem(cell, 4, 3, 5, 18, bias=bias, tokens=tokens, dtype=dtype)
    params = problem.rnn.params
    start = {key: rng.standard_normal(p.shape).astype(dtype) for key, p in params.items()}
    grads = {key: value.copy() for key, value in start.items()}
    got = computed(problem, grads=grads)
    want = expected(problem)
    assert all(got[key] is grads[key] for key in params)
    compare(problem, got, want | {key: want[key] + start[key].astype(np.float64) for key in params})


@each_cell
@each_dtype
def test_nothing_that_was_given_changes(cell, dtype):
    # make_problem hands out read-only arrays; a second run sees what a first one may have left.
    problem = make_problem(cell, 4, 3, 5, 18, layers=2, dtype=dtype)
    before = problem.rnn.state_dict()
    first = computed(problem)
    same_results(problem.rnn.params, before)
    same_results(computed(problem), first)


@each_cell
@each_dtype
def test_extreme_inputs(cell, dtype):
    """Gates at their ends: no overflow on the way, and the reference's values."""
    problem = make_problem(cell, 4, 3, 5, 18, dtype=dtype)
    problem.x = problem.x * dtype(1e4)
    want = expected(problem)
    output, final = problem.rnn(problem.x, as_state(problem.state))
    scale = rms(want["output"])
    agree(output, want["output"], dtype, problem.terms, "output", scale)
    for name, value in zip(problem.names, as_parts(final), strict=True):
        agree(value, want[f"final {name}"], dtype, problem.terms, name)


@pytest.mark.parametrize("tokens", [False, True], ids=["dense", "tokens"])
def test_relu_on_small_integers_is_exact(tokens, rng):
    """Sums of small integers round nowhere: here even float32 has no excuse, kinks included."""
    problem = make_problem("rnn_relu", 3, 5, 7, 18, tokens=tokens, dtype=np.float32)
    for value in problem.rnn.params.values():
        value[...] = rng.integers(-2, 3, value.shape)
    if not tokens:
        problem.x = rng.integers(-2, 3, problem.x.shape).astype(np.float32)
    problem.state = tuple(rng.integers(0, 3, s.shape).astype(np.float32) for s in problem.state)
    problem.d_output = rng.integers(-2, 3, problem.d_output.shape).astype(np.float32)
    problem.d_state = tuple(rng.integers(-2, 3, s.shape).astype(np.float32) for s in problem.state)
    got, want = computed(problem), expected(problem)
    assert (want["output"] == 0).any()
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert np.abs(value).max() < 2**24, key
        np.testing.assert_array_equal(got[key], value, err_msg=key)
