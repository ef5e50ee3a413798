"""Which row of memory is which step of which sequence.

Steps lie one after the other without gaps: the first of every column, then the second of those that
have one, and so on. A *column* is a sequence, or a part of one that begins with a state of its own;
they stand in an order of falling length, so those that take a step are always the first ones.
States lie likewise, with the initial ones before them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fastrnn import rows


@dataclass(frozen=True, eq=False)
class Layout:
    """N steps in C columns, from B sequences of an array (T, B, ...) of the caller's.

    batch   B
    begin   the caller's row from which on these steps are
    plain   whether they are the caller's rows in the caller's order
    source  (N,): which row of the caller's (T*B, ...) each step is
    starts  (S+2,), S steps in the longest column: the states before step s begin at row starts[s],
            those after it, one for each column that takes the step, at starts[s+1]; the steps
            themselves at starts[s+1] - C
    ends    (C+1,): how many steps the first 0, 1, ... columns have
    rows    (N,): the steps in the order in which gradients are added up: back in the caller's time,
            of columns that are turned round on in it, and at each time sequence by sequence
    before  (N,): the rows of the states before these
    fresh   (B,): whether a sequence begins anew, without its initial state; None: no one does
    ended   (B,): whether another begins anew behind it; likewise
    first   (B,): the column that it begins in; a slice if these are all in order
    final   (B,): the column that it ends in; likewise
    last    (B,): the row of its final state; likewise
    """

    batch: int
    begin: int
    plain: bool
    source: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    rows: np.ndarray
    before: np.ndarray
    fresh: np.ndarray | None
    ended: np.ndarray | None
    first: np.ndarray | slice
    final: np.ndarray | slice
    last: np.ndarray | slice

    @functools.cached_property
    def steps(self) -> int:
        return len(self.starts) - 2

    @functools.cached_property
    def columns(self) -> int:
        return len(self.ends) - 1

    @functools.cached_property
    def count(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def who(self) -> np.ndarray:
        """(C,): which sequence each column is of; of columns without steps: any."""
        who = np.zeros(self.columns, int)
        begun = self.source[: self.starts[2] - self.starts[1]] if self.steps else self.source
        who[: len(begun)] = begun % self.batch
        return who

    @functools.cached_property
    def alone(self) -> np.ndarray:
        """(N,): the rows in their own order."""
        return np.arange(self.count)

    @functools.cached_property
    def _place(self) -> tuple[np.ndarray, np.ndarray]:
        """(step, column) of each row."""
        step = np.repeat(np.arange(self.steps), np.diff(self.starts[1:]))
        return step, np.arange(self.count) - (self.starts[1:-1] - self.columns)[step]

    @functools.cached_property
    def flip(self) -> np.ndarray:
        """(N,): where each step is if every column is turned round; the way back is the same."""
        step, column = self._place
        length = np.diff(self.ends)
        return self.starts[length[column] - step] - self.columns + column

    @functools.cached_property
    def turned(self) -> Layout:
        """The same of columns that are turned round: they begin where a sequence ends."""
        step, column = self._place
        length = np.diff(self.ends)
        first = np.arange(self.columns)[self.first]
        source = self.source[self.flip]
        order = _ordered(source - self.begin)
        return replace(
            self,
            plain=False,
            source=source,
            rows=order,
            before=(self.starts[step] + column)[order],
            fresh=self.ended,
            ended=self.fresh,
            first=self.final,
            final=self.first,
            last=_in_order(self.starts[length[first]] + first),
        )

    def heard(self, state: np.ndarray) -> np.ndarray:
        """An initial state (B, H), or its gradient, as far as it is heard of."""
        if self.fresh is not None:
            state = state.copy()
            state[self.fresh] = 0
        return state

    def gather(self, array: np.ndarray) -> np.ndarray:
        """The rows of the caller's (T*B, ...) array that are steps, in their order."""
        if self.plain:
            return array[self.begin : self.begin + self.count]
        return rows.gather(self.source, array)

    def scatter(self, values: np.ndarray, array: np.ndarray) -> None:
        """The opposite."""
        if self.plain:
            array[self.begin : self.begin + self.count] = values
        else:
            rows.scatter(self.source, values, array)


class Drawing(NamedTuple):
    """What a step of a layout is to those who draw its masks.

    first_step  steps of the same sequences before a call
    sequences   (B,): who they are; None: 0 to B-1
    """

    first_step: int = 0
    sequences: np.ndarray | None = None

    def who(self, layout: Layout) -> np.ndarray:
        """(C,): whose each column is."""
        return layout.who if self.sequences is None else self.sequences[layout.who]

    def places(self, layout: Layout) -> tuple[np.ndarray, int]:
        """step * count + sequence of each row, (N,), and that count."""
        if self.sequences is None and self.first_step == 0:
            return layout.source, layout.batch
        step, who = np.divmod(layout.source, layout.batch)
        count = layout.batch
        if self.sequences is not None:
            who, count = self.sequences[who], int(self.sequences.max()) + 1
        return (step + self.first_step) * count + who, count


class Taking(NamedTuple):
    """How many of B sequences take each step, (T,), and how many begin anew in it, (T,) or None."""

    batch: int
    steps: np.ndarray
    anew: np.ndarray | None

    def cut(self, every: int) -> list[tuple[int, int]]:
        """(N, C) of each piece that `cut` would make."""
        begins = np.arange(0, len(self.steps), every)
        counts = np.add.reduceat(self.steps, begins)
        columns = np.full(len(begins), self.batch)
        if self.anew is not None:
            # Who begins anew with a piece has a column in any case.
            inside = self.anew.copy()
            inside[begins] = 0
            columns += np.add.reduceat(inside, begins)
        return list(zip(counts.tolist(), columns.tolist(), strict=True))


def taking(steps: int, lengths: np.ndarray, resets: np.ndarray | None) -> Taking:
    """Of sequences of T = `steps` at most; arguments as in `cut`."""
    ended = np.searchsorted(np.sort(lengths), np.arange(steps), side="right")
    anew = None
    if resets is not None:
        anew = (resets & (np.arange(steps)[:, None] < lengths)).sum(axis=1)
    return Taking(len(lengths), len(lengths) - ended, anew)


@functools.lru_cache(maxsize=32)
def even(steps: int, batch: int, first: int) -> Layout:
    """Sequences of one length; of the caller's steps, those from `first` on."""
    return of_lengths(np.full(batch, steps), first=first)


def cut(steps: int, lengths: np.ndarray, resets: np.ndarray | None, every: int) -> list[Layout]:
    """Pieces of `every` steps of sequences of T = `steps` at most; see `of_lengths`."""
    pieces = []
    for first in range(0, steps, every):
        count = min(every, steps - first)
        end = first + count
        within = None if resets is None else resets[first:end]
        ended = None
        if resets is not None and end < steps:
            ended = resets[end] & (lengths > end)
        if within is None and (lengths >= end).all():
            pieces.append(even(count, len(lengths), first))
        else:
            counts = np.clip(lengths - first, 0, count)
            pieces.append(of_lengths(counts, within, ended, first=first))
    return pieces


def of_lengths(
    lengths: np.ndarray,
    resets: np.ndarray | None = None,
    ended: np.ndarray | None = None,
    *,
    first: int = 0,
) -> Layout:
    """Sequences of any lengths from 0; `resets` (T, B) is True before what step one begins anew.

    ended  (B,) likewise, for the step after these
    first  of the caller's steps, the first of these
    """
    batch = len(lengths)
    origin = first * batch
    if resets is None:
        sequence, begin, length = np.arange(batch), np.zeros(batch, int), lengths
    else:
        sequence, begin, length = _parts(lengths, resets)
    order = np.argsort(-length, kind="stable")
    sequence, begin, length = sequence[order], begin[order], length[order]
    taking = np.searchsorted(-length, -np.arange(length[0]), side="left")
    starts = np.concatenate([[0, len(order)], len(order) + np.cumsum(taking)])
    step = np.repeat(np.arange(length[0]), taking)
    column = np.arange(len(step)) - (starts[1:-1] - len(order))[step]
    time, who = begin[column] + step, sequence[column]
    source = time * batch + who
    summed = _ordered((lengths.max() - 1 - time) * batch + who)
    before = starts[step] + column
    entry, final = np.empty(batch, int), np.empty(batch, int)
    number = np.arange(len(order))
    entry[sequence[begin == 0]] = number[begin == 0]
    ending = begin + length == lengths[sequence]
    final[sequence[ending]] = number[ending]
    return Layout(
        batch,
        origin,
        bool((source == np.arange(len(source))).all()),
        source + origin,
        starts,
        np.concatenate([[0], np.cumsum(length)]),
        summed,
        before[summed],
        None if resets is None else resets[0] & (lengths > 0),
        ended,
        _in_order(entry),
        _in_order(final),
        _in_order(starts[length[final]] + final),
    )


def _ordered(keys: np.ndarray) -> np.ndarray:
    """What np.argsort would give, of numbers from 0 that occur once each."""
    place = np.full(keys.max(initial=-1) + 1, -1)
    place[keys] = np.arange(len(keys))
    return place[place >= 0]


def _in_order(rows: np.ndarray) -> np.ndarray | slice:
    """A slice, which NumPy is quicker with, if they follow one another."""
    return slice(rows[0], rows[-1] + 1) if (np.diff(rows) == 1).all() else rows


def _parts(lengths: np.ndarray, resets: np.ndarray) -> tuple[np.ndarray, ...]:
    """(sequence, begin, length) of each part: a reset before the first step makes no part."""
    inside = np.arange(len(resets))[:, None] < lengths
    begins = resets & inside
    # An empty sequence is a part, too.
    begins[0] = True
    sequence, begin = np.nonzero(begins.T)
    end = np.append(begin[1:], 0)
    whole = np.append(sequence[1:] != sequence[:-1], True)
    end[whole] = lengths[sequence[whole]]
    return sequence, begin, end - begin
