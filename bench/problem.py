"""What every contestant is given, and what is right."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from bench.cases import GATES, Case


class Problem(NamedTuple):
    """One layer: parameters by PyTorch's keys, x (T, B, I), d_y (T, B, H)."""

    params: dict[str, np.ndarray]
    x: np.ndarray
    d_y: np.ndarray


class Answer(NamedTuple):
    """y (T, B, H); of a training step also d_x (T, B, I) and the gradients by PyTorch's keys."""

    y: Any
    d_x: Any = None
    grads: dict[str, Any] | None = None


def problem(case: Case, cell: str, dtype: str) -> Problem:
    """The same numbers for everyone."""
    random = np.random.default_rng(0)
    rows = GATES[cell] * case.H
    bound = case.H**-0.5
    shapes = {
        "weight_ih_l0": (rows, case.I),
        "weight_hh_l0": (rows, case.H),
        "bias_ih_l0": (rows,),
        "bias_hh_l0": (rows,),
    }
    params = {
        key: random.uniform(-bound, bound, shape).astype("f4").astype(dtype)
        for key, shape in shapes.items()
    }
    x = random.standard_normal((case.T, case.B, case.I), dtype="f4").astype(dtype)
    d_y = random.standard_normal((case.T, case.B, case.H), dtype="f4").astype(dtype)
    return Problem(params, x, d_y)


def solve(given: Problem, cell: str) -> Answer:
    """One training step of the NumPy reference, in the dtype of the problem."""
    from fastrnn.reference import CELLS

    module = CELLS[cell]
    params = {key.removesuffix("_l0"): value for key, value in given.params.items()}
    zeros = tuple(
        np.zeros((given.x.shape[1], given.d_y.shape[2]), given.x.dtype) for _ in module.STATES
    )
    y, _, saved = module.forward(params, given.x, zeros)
    d_x, _, grads = module.backward(params, saved, given.d_y, zeros)
    return Answer(y, d_x, {f"{key}_l0": value for key, value in grads.items()})


def error(found: Answer, wanted: Answer) -> float:
    """Largest distance in norm, relative, of an array of `found` to its counterpart in `wanted`.

    NaN if one is missing.
    """
    pairs = [(found.y, wanted.y)]
    if wanted.grads is not None:
        if found.grads is None:
            return float("nan")
        pairs += [(found.d_x, wanted.d_x)]
        pairs += [(found.grads[key], value) for key, value in wanted.grads.items()]
    # Not max(), which can lose a NaN.
    return float(np.max([_distance(np.asarray(a, "f8"), b) for a, b in pairs]))


def _distance(found: np.ndarray, wanted: np.ndarray) -> float:
    if found.shape != wanted.shape:
        return float("nan")
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
