"""What every contestant is given, and what is right."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np

from bench.cases import GATES, Case

# Arrays by name: y (T, B, H); of training also d_x (T, B, I) and the gradients by PyTorch's keys;
# the first losses and norms of a language model that is trained; of one that writes the likeliest
# tokens, and the shape and range of those that are drawn.
Answer = dict[str, Any]


class Problem(NamedTuple):
    """A recurrent or a linear layer: parameters by PyTorch's keys, x (T, B, I), d_y (T, B, H)."""

    params: dict[str, np.ndarray]
    x: np.ndarray
    d_y: np.ndarray


def layer_shapes(case: Case, cell: str, layer: int, inputs: int) -> dict[str, tuple[int, ...]]:
    """Of a recurrent layer."""
    rows = GATES[cell] * case.H
    return {
        f"weight_ih_l{layer}": (rows, inputs),
        f"weight_hh_l{layer}": (rows, case.H),
        f"bias_ih_l{layer}": (rows,),
        f"bias_hh_l{layer}": (rows,),
    }


def draw(
    random: np.random.Generator, shapes: dict[str, tuple[int, ...]], bound: float, dtype: str
) -> dict[str, np.ndarray]:
    """Weights up to +-bound, the same in every dtype."""
    return {
        key: random.uniform(-bound, bound, shape).astype("f4").astype(dtype)
        for key, shape in shapes.items()
    }


def problem(case: Case, cell: str, dtype: str, mode: str = "training") -> Problem:
    """The same numbers for everyone."""
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"weight": (case.H, case.I), "bias": (case.H,)}
    if mode != "projection":
        shapes = layer_shapes(case, cell, 0, case.I)
    params = draw(random, shapes, case.H**-0.5, dtype)
    x = random.standard_normal((case.T, case.B, case.I), dtype="f4").astype(dtype)
    d_y = random.standard_normal((case.T, case.B, case.H), dtype="f4").astype(dtype)
    return Problem(params, x, d_y)


def solve(mode: str, case: Case, cell: str, dtype: str, given: Problem | None = None) -> Answer:
    """One step of the NumPy reference; of a language model that is trained, a few."""
    from bench.language import STEPS, Model, seen
    from fastrnn.reference import CELLS
    from fastrnn.reference.linear import linear_backward, linear_forward

    if mode == "language":
        return {"steps": np.array(list(itertools.islice(Model(case, cell, dtype).learn(), STEPS)))}
    if mode == "sampling":
        written = Model(case, cell, dtype).write()
        return {"tokens": written, "drawn": seen(written, case)}
    given = given or problem(case, cell, dtype, mode)
    if mode == "projection":
        y, saved = linear_forward(given.params, given.x)
        d_x, grads = linear_backward(given.params, saved, given.d_y)
        return {"y": y, "d_x": d_x, **grads}
    module = CELLS[cell]
    params = {key.removesuffix("_l0"): value for key, value in given.params.items()}
    state = tuple(np.zeros((case.B, case.H), dtype) for _ in module.STATES)
    y, _, saved = module.forward(params, given.x, state)
    if mode != "training":
        return {"y": y}
    d_x, _, grads = module.backward(params, saved, given.d_y, state)
    return {"y": y, "d_x": d_x, **{f"{key}_l0": value for key, value in grads.items()}}


def error(found: Answer, wanted: Answer) -> float:
    """Largest distance in norm, relative, of an array of `found` to its counterpart in `wanted`.

    NaN if one is missing.
    """
    if not found.keys() >= wanted.keys():
        return float("nan")
    # Not max(), which can lose a NaN.
    return float(
        np.max([_distance(np.asarray(found[key], "f8"), value) for key, value in wanted.items()])
    )


def _distance(found: np.ndarray, wanted: np.ndarray) -> float:
    if found.shape != wanted.shape:
        return float("nan")
    return float(np.linalg.norm(found - wanted) / (np.linalg.norm(wanted) or 1))
