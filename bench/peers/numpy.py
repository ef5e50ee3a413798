"""Plain NumPy: the reference, in the dtype asked for."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.cases import Case
from bench.problem import Answer, problem, solve
from fastrnn.reference import CELLS


def training(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """forward and backward; threads are those of its BLAS, set by the environment."""
    given = problem(case, cell, dtype)
    return lambda: solve(given, cell), lambda answer: answer


def inference(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """forward."""
    given = problem(case, cell, dtype)
    params = {key.removesuffix("_l0"): value for key, value in given.params.items()}
    zeros = tuple(np.zeros((case.B, case.H), dtype) for _ in CELLS[cell].STATES)
    return lambda: CELLS[cell].forward(params, given.x, zeros)[0], Answer
