"""Which options a class has: a name that it does not know is told beside those that it does."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar, cast

from fastrnn.checks import shown

_Init = TypeVar("_Init", bound=Callable[..., None])


def check_options(options: Mapping[str, Any], taken: Collection[str], owner: str) -> None:
    """Names of options are those that `owner` has."""
    for name, value in options.items():
        if name not in taken:
            raise TypeError(
                f"{name}: expected an option that {owner} has ({', '.join(sorted(taken))}), "
                f"got {name}={shown(value):.100}"
            )


def checking_names(init: _Init) -> _Init:
    """`init`, which tells what the class takes where it has no such option.

    That is what the class's `defaults` say, with the seed, if it has them, or else what init takes.
    """
    known = set(inspect.signature(init).parameters) - {"self"}

    @functools.wraps(init)
    def checked(self: Any, *arguments: Any, **options: Any) -> None:
        # Subclasses give the cell by position: by name it comes from their caller.
        free = known - {"cell"} if arguments else known
        unknown = {name: value for name, value in options.items() if name not in free}
        if unknown:
            taken = {*self.defaults(), "seed"} if hasattr(self, "defaults") else known
            check_options(unknown, taken, type(self).__name__)
        init(self, *arguments, **options)

    return cast(_Init, checked)


def callers_level() -> int:
    """The `stacklevel` of a warning that is about the call into this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] == "fastrnn":
        frame, level = frame.f_back, level + 1
    return level
