"""Where threads that work on one step of a sequence wait for each other, inside a kernel.

A meeting is an array of int64, a line of the cache for each part and one more. A part's number is 0
before it has come, 1 when it has, GONE if it must not come any more; from when all have come on it
is 2 and the steps that the part has done. The last number is 1 when there is nothing to wait for:
the first part does it all, or one has failed. A kernel that is given an empty array meets nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastrnn.atomic import look, rest, say, swap
from fastrnn.jit import helper
from fastrnn.parallel import launch

_APART = 8
GONE = -1
# Looks after which a part that has not come is not waited for, milliseconds.
_PATIENT = 5000

NOBODY = np.empty(0, np.int64)


def together(function: Callable, parts: int, *arguments: Any) -> None:
    """Call the kernel `function(part, parts, meeting, *arguments)` for all parts at the same time.

    It has to `gather` first, since there may be fewer parts; then all of them are there.
    """
    place = np.zeros((parts + 1) * _APART, np.int64)
    launch(function, parts, (place, *arguments), place[-_APART:])


@helper
def gather(place, part, parts):
    """Come together: how many parts there are, 1 if the first is to do it all, 0 for who leaves."""
    if not swap(place, part * _APART, 0, 1):
        return 0
    last = place.size - _APART
    if part > 0:
        looks = 0
        # The first decides.
        while look(place, 0) < 2:
            if look(place, last):
                return 0
            rest(looks)
            looks += 1
        say(place, part * _APART, 2)
        return parts
    looks = 0
    for other in range(1, parts):
        while look(place, other * _APART) == 0:
            if looks == _PATIENT and swap(place, other * _APART, 0, GONE):
                say(place, last, 1)
                return 1
            rest(looks)
            looks += looks < _PATIENT
    say(place, 0, 2)
    return parts


@helper
def arrive(place, part, steps):
    """Say that this part has done so many steps."""
    say(place, part * _APART, steps + 2)


@helper
def wait(place, parts, steps):
    """Wait until all have done so many steps, or one has failed."""
    last = place.size - _APART
    for other in range(parts):
        looks = 0
        while look(place, other * _APART) < steps + 2 and not look(place, last):
            rest(looks)
            looks += 1
