"""Plain NumPy: the reference, in the dtype asked for; threads are those of its BLAS."""

from __future__ import annotations

import itertools
from typing import Any

from bench.cases import Case
from bench.language import STEPS, Model
from bench.problem import problem, solve


def _solved(mode: str) -> Any:
    def set_up(case: Case, cell: str, dtype: str, threads: int) -> Any:
        given = problem(case, cell, dtype, mode)
        return lambda: solve(mode, case, cell, dtype, given), lambda answer: answer

    return set_up


training = _solved("training")
inference = _solved("inference")
projection = _solved("projection")


def language(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """The reference's parts, optimiser and all."""
    steps = Model(case, cell, dtype).learn()

    def read(first: tuple[float, float]) -> Any:
        return {"steps": [first, *itertools.islice(steps, STEPS - 1)]}

    return lambda: next(steps), read
