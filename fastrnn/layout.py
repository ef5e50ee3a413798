"""Which row of memory is which step of which sequence.

Steps lie one after the other without gaps: the first of every sequence, then the second of those
that have one, and so on; sequences in an order of falling length, their *columns*. So the sequences
that take a step are always the first ones. States lie likewise, with the initial ones before them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from fastrnn.memory import zeros


class Layout(NamedTuple):
    """Rows of N steps of B sequences, the longest of T.

    columns (B,): which of the caller's sequences each column is
    source  (N,): which row of the caller's (S*B, ...) array each step is; S may be above T
    starts  (T+2,): the states before step t begin at row starts[t], those after it, one for each
            sequence that takes the step, at starts[t+1]; the steps themselves at
            starts[t+1] - B
    ends    (B+1,): how many steps the first 0, 1, ... columns have
    rows    (N,): the steps in the order in which gradients are added up: back in time, at each
            step in the caller's order of sequences
    before  (N,): the rows of the states before these
    last    (B,): the rows of each column's final state
    """

    columns: np.ndarray
    source: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    rows: np.ndarray
    before: np.ndarray
    last: np.ndarray

    @property
    def steps(self) -> int:
        return len(self.starts) - 2

    @property
    def batch(self) -> int:
        return len(self.ends) - 1

    @property
    def count(self) -> int:
        return len(self.rows)

    def gather(self, array: np.ndarray) -> np.ndarray:
        """The rows of the caller's (S*B, ...) array that are steps; a view if all are."""
        if self.count == self.steps * self.batch:
            return array[: self.count]
        return array[self.source]

    def scatter(self, rows: np.ndarray, steps: int) -> np.ndarray:
        """The opposite, for S = `steps`: zeros where there is no step; a view if all are."""
        if self.count == steps * self.batch:
            return rows
        array = zeros((steps * self.batch, *rows.shape[1:]), rows.dtype)
        array[self.source] = rows
        return array


@functools.lru_cache(maxsize=64)
def even(steps: int, batch: int) -> Layout:
    """Sequences of one length, in the caller's order."""
    return of_lengths(np.full(batch, steps))


def of_lengths(lengths: np.ndarray) -> Layout:
    """Sequences of any lengths from 0, those of one length in the caller's order."""
    batch = len(lengths)
    columns = np.argsort(-lengths, kind="stable")
    falling = lengths[columns]
    steps = int(falling[0])
    taking = np.searchsorted(-falling, -np.arange(steps), side="left")
    starts = np.concatenate([[0, batch], batch + np.cumsum(taking)])
    time = np.repeat(np.arange(steps), taking)
    column = np.arange(len(time)) - (starts[1:-1] - batch)[time]
    # By the caller's time and sequence, which is what gradients are added up by.
    place = np.full(steps * batch, -1)
    place[(steps - 1 - time) * batch + columns[column]] = np.arange(len(time))
    rows = place[place >= 0]
    return Layout(
        columns,
        time * batch + columns[column],
        starts,
        np.concatenate([[0], np.cumsum(falling)]),
        rows,
        (starts[time] + column)[rows],
        starts[falling] + np.arange(batch),
    )
