"""A cell written outside the package: the example's minimal gated unit."""

from __future__ import annotations

import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import pytest
from helpers import agree, each_dtype, same, same_results, threads

import fastrnn
from fastrnn import recurrence
from fastrnn.cells import CELLS, Cell, helper, tanh
from fastrnn.cells.fingerprint import fingerprint

EXAMPLE = Path(__file__).parents[1] / "examples" / "minimal_gated_unit.py"
MGU = runpy.run_path(str(EXAMPLE))["MGU"]
T, B, n_in, H = 7, 5, 3, 19


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def oracle(layer, x, h):
    """Zhou et al. 2016, in NumPy."""
    p = {key.removesuffix("_l0"): value.astype(np.float64) for key, value in layer.params.items()}
    (W_f, W_n), (U_f, U_n) = np.split(p["weight_ih"], 2), np.split(p["weight_hh"], 2)
    b_f, b_n = np.split(p["bias_ih"] + p["bias_hh"], 2)
    h, outputs = h.astype(np.float64), []
    for x_t in x.astype(np.float64):
        f = sigmoid(x_t @ W_f.T + h @ U_f.T + b_f)
        n = np.tanh(x_t @ W_n.T + (f * h) @ U_n.T + b_n)
        h = (1 - f) * h + f * n
        outputs.append(h)
    return np.array(outputs)


@each_dtype
def test_forward(dtype, rng):
    layer = fastrnn.Recurrent(MGU, n_in, H, dtype=dtype, seed=0)
    x = rng.standard_normal((T, B, n_in)).astype(dtype)
    h = rng.standard_normal((1, B, H)).astype(dtype)
    y, last = layer(x, h)
    agree(y, oracle(layer, x, h[0]), dtype, 500)
    same(last[0], y[-1])
    stepper = layer.stepper(B)
    stepper.state = h
    for x_t, y_t in zip(x, y, strict=True):
        same(stepper(x_t), y_t)
    _, _, gates = layer(x, h, return_gates=True)
    assert gates.keys() == {"n_l0", "f_l0", "h_l0"}


@pytest.mark.parametrize("options", [{}, {"zoneout": 0.3, "recurrent_dropout": 0.3}], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradients_by_finite_differences(options, bidirectional, rng):
    layer = fastrnn.Recurrent(
        MGU, n_in, H, 2, dtype=np.float64, seed=0, bidirectional=bidirectional, **options
    )
    x = rng.standard_normal((T, B, n_in))
    lengths = [7, 3, 0, 5, 7]
    y, _, saved = layer.forward(x, None, lengths, seed=1)
    d_y = rng.standard_normal(y.shape)
    d_x, _, grads = layer.backward(saved, d_y)
    for key, value in (("x", x), *layer.params.items()):
        direction = rng.standard_normal(value.shape)
        start, found = value.copy(), []
        for sign in (1, -1):
            value[...] = start + sign * 1e-6 * direction
            found.append(np.vdot(layer.forward(x, None, lengths, seed=1)[0], d_y))
        value[...] = start
        slope = np.vdot(d_x if key == "x" else grads[key], direction)
        assert abs(slope) > 1e-6, key
        assert (found[0] - found[1]) / 2e-6 == pytest.approx(slope, rel=1e-5), key


def test_same_bits(rng):
    layer = fastrnn.Recurrent(MGU, n_in, H, 2, seed=0)
    x = rng.standard_normal((T, B, n_in)).astype("f4")

    def run(**given):
        y, _, saved = layer.forward(x, **given)
        d_x, _, grads = layer.backward(saved, y)
        return {"y": y.copy(), "d x": d_x} | grads

    want = run()
    same_results(run(checkpoint_every=2), want)
    with threads(3):
        same_results(run(), want)


SCRIPT = """
import runpy, numpy as np, fastrnn
from fastrnn import recurrence
MGU = runpy.run_path("cell.py")["MGU"]
layer = fastrnn.Recurrent(MGU, 3, 4, seed=0)
y, _, saved = layer.forward(np.ones((3, 2, 3), np.float32))
layer.backward(saved, y)
kernels = recurrence.forward_slice, recurrence.backward_slice
print(sum(sum(kernel.stats.cache_misses.values()) for kernel in kernels), y.sum())
"""


def test_it_is_compiled_once_and_again_when_it_changes(tmp_path):
    source = EXAMPLE.read_text()

    def run(text):
        (tmp_path / "cell.py").write_text(text)
        (tmp_path / "run.py").write_text(SCRIPT)
        done = subprocess.run(
            [sys.executable, "run.py"], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        misses, total = done.stdout.split()
        return int(misses), total

    _, total = run(source)
    assert run(source) == (0, total)
    # Where it stands does not matter, what it computes does.
    assert run("# moved\n" + source) == (0, total)
    changed = source.replace("fma(f, n - h, h)", "fma(f, n - 2.0 * h, h)")
    assert changed != source
    assert run(changed)[1] != total
    assert run(source) == (0, total)


def test_what_changes_a_fingerprint():
    own = CELLS["gru"]
    assert fingerprint([own.gates_of, None]) != fingerprint([own.output, None])
    factor = 2.0

    def one(s, h, carry):
        return s, carry

    def other(s, h, carry):
        return s * 2.0, carry

    def closure(s, h, carry):
        return s * factor, carry

    def calling(s, h, carry):
        return helped(s), carry

    @helper
    def helped(s):
        return s

    functions = [one, other, closure, calling, helper(closure), own.gates_of]
    before = [fingerprint([f, one]) for f in functions]
    assert len(set(before)) == 5
    assert before[2] == before[4]
    factor = 3.0
    after = [fingerprint([f, one]) for f in functions]
    assert [a == b for a, b in zip(before, after, strict=True)] == [
        *[True, True, False, True],
        *[False, True],
    ]

    @helper
    def helped(s):  # noqa: F811
        return tanh(s)

    assert fingerprint([calling, one]) != before[3]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tape": 3}, "operand"),
        ({"tail": 5}, "tail"),
        ({"order_x": (0, 0)}, "order_x"),
        ({"order_h": (0, 1)}, "order_h and order_late"),
        ({"backward_operand": None}, "order_late"),
        ({"projected": True}, "order_late"),
        ({"normed": True}, "order_late"),
        ({"normed_carry": True}, "normed_carry"),
        ({"trained": 1}, "trained"),
        ({"vectors": 1, "trained": 1}, "backward_vectors"),
        ({"gate_names": ("a",)}, "gate_names"),
        ({"gate_names": ("h", "", "", "", "")}, "gate_names"),
        ({"gate_names": ("a", "a", "", "", "")}, "gate_names"),
        ({"operand": -1}, "operand"),
        ({"carries": -1}, "carries"),
        ({"carries": 2, "carry_names": ("a",)}, "carry_names"),
    ],
    ids=str,
)
def test_counts_that_do_not_fit_are_named(change, named):
    with pytest.raises(ValueError, match=f"{named}: expected"):
        replace(MGU, **change)


def test_it_takes_a_cell():
    with pytest.raises(TypeError, match=r"cell: expected a fastrnn\.cells\.Cell, got str"):
        fastrnn.Recurrent("mgu", 3, 4)
    layer = fastrnn.Recurrent(CELLS["lstm"], 3, 4, seed=0)
    same_results(layer.params, fastrnn.LSTM(3, 4, seed=0).params)
    assert isinstance(MGU, Cell)


def test_vectors_that_nobody_gives_are_refused():
    for cell, bias in ((CELLS["lstm_clip"], True), (CELLS["lstm_norm"], False)):
        with pytest.raises(ValueError, match="cell: expected one with"):
            fastrnn.Recurrent(cell, 3, 4, bias=bias)
    fastrnn.Recurrent(CELLS["lstm_norm"], 3, 4)
    other = replace(CELLS["gru"], output=CELLS["gru_norm"].output)
    assert other._numba_type_ != CELLS["gru"]._numba_type_


def test_states_have_names():
    assert replace(MGU, carries=1).carry_names == ("c",)
    assert replace(MGU, carries=2).carry_names == ("c0", "c1")


def test_warmup_takes_a_layer():
    cell = replace(MGU, name="warm")
    layer = fastrnn.Recurrent(cell, 3, 4, zoneout=0.1, batch_first=True, seed=0)
    kind = numba.typeof(cell)
    kernels = recurrence.forward_slice, recurrence.backward_slice
    assert not any(kind in signature for kernel in kernels for signature in kernel.signatures)
    fastrnn.warmup(layer)
    assert all(any(kind in found for found in kernel.signatures) for kernel in kernels)
    compiled = [len(kernel.signatures) for kernel in kernels]
    _, _, saved = layer.forward(np.ones((2, 3, 3), np.float32))
    layer.backward(saved, np.ones((2, 3, 4), np.float32))
    assert [len(kernel.signatures) for kernel in kernels] == compiled


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("output", helper(lambda tape, h, carry: (h, tape[:4]))),
        ("gates_of", helper(lambda s, h, carry: (s, (h,)))),
        ("backward", helper(lambda tape, a, h, b, c, d_h, d: (tape[1:], d_h, d))),
    ],
    ids=["output", "gates", "backward"],
)
def test_registers_too_few_or_too_many_are_named(name, function):
    cell = replace(MGU, **{name: function})
    layer = fastrnn.Recurrent(cell, 3, 4, seed=0)

    def train():
        _, _, saved = layer.forward(np.ones((2, 1, 3), np.float32))
        layer.backward(saved, np.ones((2, 1, 4), np.float32))

    with pytest.raises(numba.TypingError, match=r"mgu: expected \d registers as the \w+ that"):
        train()


def test_the_page_about_cells_is_true(tmp_path):
    """Its code runs, in a file of its own as it says; the last block compares the gradients."""
    page = (Path(__file__).parents[1] / "docs" / "cells.md").read_text()
    blocks = [block.split("```")[0] for block in page.split("```python\n")[1:]]
    assert len(blocks) == 3
    (tmp_path / "page.py").write_text("\n\n".join(blocks))
    found = runpy.run_path(str(tmp_path / "page.py"))
    assert (found["y"][3:, 1] == 0).all()
    assert all(abs(value).max() > 0 for value in found["grads"].values())
