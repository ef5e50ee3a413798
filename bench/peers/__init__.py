"""Who is timed: one module for each contestant.

A module offers a function for each of `bench.cases.MODES` that it has: `training(case, cell, dtype,
threads)` and so on set up the work and return `(step, read)`. `step()` does the work that is timed;
`read(result)`, called once after the first of them, turns what it returned into an `Answer`. What a
contestant cannot do raises `Missing`. For `bench.loss` there is a class `Learner`
that takes a `bench.language.Lesson`.
"""

from __future__ import annotations

from typing import NamedTuple


class Missing(Exception):
    """The contestant has no such thing."""


NAMES = ("fastrnn", "torch", "jax", "keras", "onnx", "numpy")
DTYPES = ("float32", "float64")
# CPUs whose instructions ours is held to on request.
CPUS = ("x86-64", "haswell")


class Contestant(NamedTuple):
    """One of NAMES, and how it runs if not as the others do: fastrnn:1, torch:busy.

    option  a number of threads; a dtype; busy: beside another process that keeps one processor
            busy; or, of fastrnn, one of CPUS: no other instructions are used; or "call": inference
            by the layer, with weights that may change between calls
    """

    name: str
    option: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.option}" if self.option else self.name

    @property
    def threads(self) -> int | None:
        return int(self.option) if self.option.isdecimal() else None

    @property
    def dtype(self) -> str | None:
        return self.option if self.option in DTYPES else None

    @property
    def busy(self) -> bool:
        return self.option == "busy"

    def does(self, mode: str) -> str:
        """The function of its module for a mode."""
        return "calling" if (self.option, mode) == ("call", "inference") else mode

    @property
    def environment(self) -> dict[str, str]:
        if self.option not in CPUS:
            return {}
        # Without the second, LLVM goes on using what this machine has beyond that CPU.
        return {"NUMBA_CPU_NAME": self.option, "NUMBA_CPU_FEATURES": ""}


def contestant(text: str) -> Contestant:
    """From its name."""
    name, _, option = text.partition(":")
    if name not in NAMES:
        raise ValueError(f"contestant: expected one of {', '.join(NAMES)}, got {name!r}")
    options = (*DTYPES, "busy", *((*CPUS, "call") if name == "fastrnn" else ()))
    threads = option.isdecimal() and int(option) > 0
    if option and not threads and option not in options:
        raise ValueError(
            f"contestant: expected {name}: a number of threads or one of {', '.join(options)}, "
            f"got {option!r}"
        )
    return Contestant(name, option)
