"""What the tests of the kernels share: problems, the reference's answers, and the one tolerance."""

from __future__ import annotations

import functools
import re
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest

import fastrnn
from fastrnn import parallel
from fastrnn.cells import CELLS
from fastrnn.reference import CELLS as REFERENCE
from fastrnn.reference import masks

F4, F8 = np.float32, np.float64
DTYPES = [F4, F8]
# float32 relu: a pre-activation this near zero might fall on either side of the kink.
KINK = 1e-4
# And a cell state this near its bound on either side of that.
EDGE = 2e-6
# The bound of the cell state in cells that have one: some units meet it.
CLIP = 0.4

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
each_cell = pytest.mark.parametrize("cell", sorted(CELLS))
# What is compiled again for each cell and dtype, and differs little between dtypes.
mostly_double = pytest.mark.parametrize(
    ("cell", "dtype"),
    [(cell, np.float64) for cell in sorted(CELLS)]
    + [(cell, np.float32) for cell in ("gru_before", "lstm", "lstm_projected", "rnn_tanh")],
    ids=lambda value: value if isinstance(value, str) else np.dtype(value).name,
)


def _projected(inputs, size, *arguments, **options):
    # One unit cannot be projected to fewer.
    return fastrnn.LSTM(inputs, max(2, size), *arguments, proj_size=-(-size // 2), **options)


# Layers of every form that a step may have.
KINDS = {
    "lstm": fastrnn.LSTM,
    "gru": fastrnn.GRU,
    "rnn": fastrnn.RNN,
    "rnn_relu": functools.partial(fastrnn.RNN, nonlinearity="relu"),
    "gru_before": functools.partial(fastrnn.GRU, reset_after=False),
    "gru_simple": functools.partial(fastrnn.GRU, reset_gate=False),
    "lstm_peephole": functools.partial(fastrnn.LSTM, peephole=True),
    "lstm_variants": functools.partial(fastrnn.LSTM, peephole=True, coupled=True, cell_clip=0.3),
    "lstm_projected": _projected,
    "lstm_norm": functools.partial(fastrnn.LSTM, layer_norm=True),
    "gru_norm": functools.partial(fastrnn.GRU, layer_norm=True),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


# Options that the layers do not share.
OPTIONS = {
    fastrnn.RNN: {"nonlinearity": "relu", "init": "identity"},
    fastrnn.GRU: {"reset_after": False, "reset_gate": False, "bias": False},
    fastrnn.LSTM: {"proj_size": 3, "peephole": True, "coupled": True, "cell_clip": 0.5},
}


def zeros(*shape, dtype=F4):
    return np.zeros(shape, dtype)


def says(*parts):
    """A pattern of an error: these parts in this order."""
    return ".*".join(re.escape(part) for part in parts)


def each_of(names, generator):
    """A parameter for each case; what the error says, its last part, is its name."""
    cases = [pytest.param(*case, id=" ".join(case[-1])) for case in generator()]
    return pytest.mark.parametrize(names, cases)


def forms(array):
    """The same numbers, laid out otherwise."""
    yield np.asfortranarray(array)
    yield np.repeat(array, 2, axis=-1)[..., ::2]
    yield np.flip(np.flip(array, 0).copy(), 0)
    yield frozen(array.copy())
    misaligned = np.empty(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    misaligned[...] = array
    yield misaligned


def spoilt_arrays(array):
    """What kernels could not take for `array`, and what is said about it."""
    yield None, TypeError, ("an array", "NoneType")
    yield array.tolist(), TypeError, ("an array", "list")
    yield array.astype(np.float64), ValueError, ("contiguous", "float32", "float64")
    yield array[:-1].copy(), ValueError, (str(array.shape), str(array[:-1].shape))
    yield np.stack([array, array], -1)[..., 0], ValueError, ("contiguous", "not contiguous")


def tolerance(dtype, terms):
    """Largest relative error that sums of `terms` numbers of `dtype` may have.

    float64: 1e-12, whatever the sum. float32: rounding errors of n terms add up like a random walk
    (Higham and Mary 2019), eps * sqrt(n); the factor is what nonlinearities and norms may add.
    """
    if np.dtype(dtype) == np.float64:
        return 1e-12
    return 8 * float(np.finfo(np.float32).eps) * float(np.sqrt(terms))


def terms(rnn, x):
    """Numbers that the longest chain of sums behind any result of a layer adds up."""
    steps, batch = x.shape[:2]
    inputs = 1 if x.dtype.kind == "i" else rnn.input_size
    gates = rnn.cell.gates * rnn.hidden_size
    layers = rnn.num_layers * (1 + rnn.bidirectional)
    return layers * steps * (inputs + rnn.hidden_size + gates + 8) + steps * batch


def agree(got, want, dtype, terms, name="", scale=0.0):
    """Assert that `got` is `want`: in norm, and element by element on the scale of the array.

    `scale` is the size of a usual element, where those of `want` may have cancelled out.
    """
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    assert got.dtype == np.dtype(dtype), f"{name}: {got.dtype}, expected {np.dtype(dtype)}"
    assert np.isfinite(want).all(), f"{name}: the expected value is not finite"
    assert np.isfinite(got).all(), f"{name}: not finite at {np.argwhere(~np.isfinite(got))[:5]}"
    bound = tolerance(dtype, terms)
    error = np.abs(got.astype(np.float64) - want)
    usual = max(rms(want), scale) or 1.0
    relative = rms(error) / usual
    assert relative <= bound, f"{name}: relative error {relative:.2e}, allowed {bound:.2e}"
    worst = np.max(error / (np.abs(want) + usual), initial=0)
    assert worst <= bound, f"{name}: element off by {worst:.2e}, allowed {bound:.2e}"


def rms(*arrays):
    """Root mean square of all elements."""
    size = sum(a.size for a in arrays)
    return float(np.sqrt(sum(np.vdot(a, a) for a in arrays) / max(1, size)))


def same(got, want, name=""):
    """Assert that the bits are the same; one NaN is as good as another."""
    assert got.dtype == want.dtype, f"{name}: {got.dtype}, expected {want.dtype}"
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    equal = got == want
    if got.dtype.kind == "f":
        equal = equal & (np.signbit(got) == np.signbit(want)) | (np.isnan(got) & np.isnan(want))
    wrong = np.argwhere(~equal)
    assert not len(wrong), f"{name}: {len(wrong)} of {got.size} elements differ, first {wrong[:3]}"


def check_slopes(model, tokens, targets, rng, *, seed):
    """Assert that a model's gradients are the slopes of its loss, each parameter's along a line."""
    _, grads, _ = model.loss_and_grads(tokens, targets, seed=seed)
    assert grads.keys() == model.params.keys()
    for key, value in model.params.items():
        direction, start = rng.standard_normal(value.shape), value.copy()
        found = []
        for sign in (1, -1):
            value[...] = start + sign * 1e-6 * direction
            found.append(model.loss_and_grads(tokens, targets, seed=seed)[0])
        value[...] = start
        slope = np.vdot(grads[key], direction)
        assert abs(slope) > 1e-6, key
        assert (found[0] - found[1]) / 2e-6 == pytest.approx(slope, rel=1e-4), key


def same_results(got, want):
    """Assert that two dicts of arrays have the same bits."""
    assert got.keys() == want.keys()
    for key in want:
        same(got[key], want[key], key)


def frozen(array):
    """The array, read-only: code that wrote to it would raise or make a copy."""
    array.flags.writeable = False
    return array


@contextmanager
def threads(count):
    """Cut every call, however small, into `count` parts."""
    before = parallel._SMALL, parallel.get_num_threads()
    parallel._SMALL = 0
    parallel.set_num_threads(count)
    try:
        yield
    finally:
        parallel._SMALL = before[0]
        parallel.set_num_threads(before[1])


def reference_of(cell):
    """The reference module of a cell and the options that make it this cell."""
    if cell in REFERENCE:
        return REFERENCE[cell], {}
    name, *words = cell.split("_")
    if name == "rnn":
        return REFERENCE[name], {"nonlinearity": words[0]}
    if name == "gru":
        return REFERENCE[name], {}
    options = {"coupled": "coupled" in words, "clip": CLIP if "clip" in words else np.inf}
    return REFERENCE[name], options


def new_layer(cell, *sizes, **options):
    """The public layer that runs a cell."""
    name, *words = cell.split("_")
    if name == "rnn":
        options["nonlinearity"] = words[0]
    elif words:
        if "projected" in words:
            # One unit cannot be projected to fewer.
            sizes = (sizes[0], max(2, sizes[1]), *sizes[2:])
        special = {"before": ("reset_after", False), "simple": ("reset_gate", False)}
        special["norm"] = "layer_norm", True
        special |= {"clip": ("cell_clip", CLIP), "projected": ("proj_size", -(-sizes[1] // 2))}
        options |= dict(special.get(word, (word, True)) for word in words)
    return getattr(fastrnn, name.upper())(*sizes, **options)


def as_parts(state):
    """A state as a tuple of arrays, whatever the cell."""
    return tuple(state) if isinstance(state, (tuple, list)) else (state,)


def as_state(parts):
    """The opposite: what a layer takes and returns."""
    return tuple(parts) if len(parts) > 1 else parts[0]


@dataclass
class Problem:
    """A layer with parameters, and everything that goes into forward and backward."""

    cell: str
    rnn: object
    x: np.ndarray
    state: tuple
    d_output: np.ndarray
    d_state: tuple
    names: tuple = field(init=False)

    def __post_init__(self):
        self.names = reference_of(self.cell)[0].STATES

    @property
    def dtype(self):
        return self.rnn.dtype

    @property
    def terms(self):
        return terms(self.rnn, self.x)

    def piece(self, rows=slice(None), columns=slice(None)):
        """The same layer on some steps and sequences."""
        return Problem(
            self.cell,
            self.rnn,
            self.x[rows, columns],
            tuple(s[:, columns] for s in self.state),
            self.d_output[rows, columns],
            tuple(s[:, columns] for s in self.d_state),
        )


def make_problem(
    cell, T, B, n_in, H, *, layers=1, bias=True, tokens=False, dtype=np.float64, seed=0, **options
):
    """A random problem; relu comes alive and away from its kink."""
    rng = np.random.default_rng([seed, T, B, n_in, H, layers])
    rnn = new_layer(cell, n_in, H, layers, bias=bias, dtype=dtype, seed=0, **options)
    for _ in range(500):
        problem = _draw(cell, rng, rnn, T, B, n_in, tokens)
        if not {"relu", "clip"} & set(cell.split("_")) or _away_from_kink(problem):
            return problem
    raise AssertionError("no draw away from the kink")


def _draw(cell, rng, rnn, T, B, n_in, tokens):
    def normal(*shape, scale=1.0):
        return frozen((rng.standard_normal(shape) * scale).astype(rnn.dtype))

    def states():
        return tuple(normal(rnn.num_layers, B, size) for size in rnn.state_sizes)

    for key, value in rnn.params.items():
        if key.startswith("weight_hh"):
            # No larger: rounding errors must not grow from step to step.
            value[...] = rng.uniform(-1, 1, value.shape) / np.sqrt(value.shape[1])
        else:
            value[...] = normal(*value.shape, scale=0.8 / np.sqrt(value[0].size))
    x = frozen(rng.integers(n_in, size=(T, B))) if tokens else normal(T, B, n_in)
    return Problem(cell, rnn, x, states(), normal(T, B, rnn.output_size), states())


def layer_params(rnn, layer, dtype=np.float64):
    """The parameters of one layer under the reference's keys."""
    end = f"_l{layer}"
    found = {k.removesuffix(end): v for k, v in rnn.params.items() if k.endswith(end)}
    return {key: value.astype(dtype) for key, value in found.items()}


def _away_from_kink(problem):
    reference, options = reference_of(problem.cell)
    x = wide(problem.x)
    for layer in range(problem.rnn.num_layers):
        params = layer_params(problem.rnn, layer)
        state = tuple(s[layer].astype(np.float64) for s in problem.state)
        output, _, saved = reference.forward(params, x, state, **options)
        if "clip" in options:
            c = saved["f"] * saved["c"][:-1] + saved["i"] * saved["g"]
            if np.abs(np.abs(c) - CLIP).min() < EDGE:
                return False
            x = output
            continue
        first = state[0]
        h = np.concatenate([first[None], output[:-1]])
        a = params["weight_ih"].T[x] if x.dtype.kind == "i" else x @ params["weight_ih"].T
        a = a + h @ params["weight_hh"].T + params.get("bias_ih", 0) + params.get("bias_hh", 0)
        if np.abs(a).min() < KINK or not ((output[0] > 0).any() and (output[-1] > 0).any()):
            return False
        x = output
    return True


def wide(array):
    """Floats as float64."""
    return array.astype(np.float64) if array.dtype.kind == "f" else array


class Drawn:
    """What a layer draws in training with a seed, from the NumPy reference of the masks."""

    def __init__(self, rnn, steps, batch, seed, first_step=0, sequences=None):
        self.rnn, self.seed = rnn, seed
        self.steps = np.arange(first_step, first_step + steps)
        self.batch = np.arange(batch) if sequences is None else sequences

    def inputs(self, layer, width):
        """Of what comes into a layer: (T, B, width) or (B, width)."""
        rnn = self.rnn
        p = rnn.dropout if layer else rnn.input_dropout
        if not p or self.seed is None:
            return 1.0
        seed = self.seed + layer
        if rnn.locked_dropout:
            return masks.locked_mask(seed, self.batch, width, p)
        return masks.dropout_mask(seed, self.steps, self.batch, width, p)

    def inside(self, layer):
        """Options of the reference's forward."""
        rnn = self.rnn
        units = rnn.state_sizes[0]
        if self.seed is None:
            return {"zone": rnn.zoneout} if rnn.zoneout else {}
        own = masks.stream(self.seed + layer, 0)
        found = {}
        if rnn.recurrent_dropout:
            found["mask"] = masks.locked_mask(own, self.batch, units, rnn.recurrent_dropout)
        if rnn.zoneout:
            found["zone"] = masks.zone_mask(own, self.steps, self.batch, units, rnn.zoneout)
        return found

    def weights(self, layer, shape):
        """Of weight_hh."""
        if not self.rnn.weight_dropout or self.seed is None:
            return 1.0
        own = masks.stream(self.seed + layer, 0)
        return masks.weight_mask(own, *shape, self.rnn.weight_dropout)


def expected(problem, *, d_output=True, d_state=True, seed=None, **whose):
    """Every array of forward and backward by the reference, layer after layer, in float64.

    seed   of what is drawn in training; None: nothing is
    whose  first_step and sequences, as forward takes them
    """
    reference, options = reference_of(problem.cell)
    x, saved, weights = wide(problem.x), [], []
    finals = []
    drawn = Drawn(problem.rnn, *x.shape[:2], seed, **whose)
    for layer in range(problem.rnn.num_layers):
        state = tuple(wide(s[layer]) for s in problem.state)
        params = layer_params(problem.rnn, layer)
        params["weight_hh"] = params["weight_hh"] * drawn.weights(layer, params["weight_hh"].shape)
        weights.append(params)
        if x.dtype.kind == "f":
            x = x * drawn.inputs(layer, x.shape[2])
        x, final, kept = reference.forward(params, x, state, **options, **drawn.inside(layer))
        finals.append(final)
        saved.append(kept)
    results = {"output": x}
    for i, name in enumerate(problem.names):
        results[f"final {name}"] = np.stack([final[i] for final in finals])
    d_y = wide(problem.d_output) * d_output
    initial, grads = [], {}
    for layer in reversed(range(problem.rnn.num_layers)):
        d_last = tuple(wide(s[layer]) * d_state for s in problem.d_state)
        d_y, d_first, found = reference.backward(weights[layer], saved[layer], d_y, d_last)
        initial.insert(0, d_first)
        if d_y is not None:
            d_y = d_y * drawn.inputs(layer, d_y.shape[2])
        found["weight_hh"] = found["weight_hh"] * drawn.weights(layer, found["weight_hh"].shape)
        grads |= {f"{key}_l{layer}": value for key, value in found.items()}
    for i, name in enumerate(problem.names):
        results[f"d initial {name}"] = np.stack([first[i] for first in initial])
    if d_y is not None:
        results["d x"] = d_y
    return results | grads


def computed(problem, *, d_output=True, d_state=True, grads=None, given=None, **options):
    """The same arrays by the layer; `given`: more arguments of forward."""
    rnn = problem.rnn
    output, final, saved = rnn.forward(problem.x, as_state(problem.state), **(given or {}))
    results = {"output": output.copy()}
    for name, value in zip(problem.names, as_parts(final), strict=True):
        results[f"final {name}"] = value
    d_x, d_first, grads = rnn.backward(
        saved,
        problem.d_output if d_output else None,
        as_state(problem.d_state) if d_state else None,
        grads,
        **options,
    )
    for name, value in zip(problem.names, as_parts(d_first), strict=True):
        results[f"d initial {name}"] = value
    if d_x is not None:
        results["d x"] = d_x
    return results | grads


def compare(problem, got, want):
    """Assert that every array of `computed` is that of `expected`, and that none tests nothing."""
    assert got.keys() == want.keys()
    for keys in ([k for k in want if k in problem.rnn.params], [k for k in want if " " in k]):
        # One number alone may have cancelled out; its neighbours tell how large it could be.
        scale = rms(*(want[k] for k in keys))
        assert scale > 0, f"{keys} vanish: this tests nothing"
        for key in keys:
            agree(got[key], want[key], problem.dtype, problem.terms, key, scale)
    agree(got["output"], want["output"], problem.dtype, problem.terms, "output")


def check(problem, **options):
    """Assert that layer and reference agree in every array."""
    compare(problem, computed(problem, **options), expected(problem, **options))
