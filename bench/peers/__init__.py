"""Who is timed: one module for each contestant.

A module offers `training(case, cell, dtype, threads)` and, where it has one, `inference(...)`. Each
sets up one layer and returns `(step, read)`: `step()` does the work that is timed, `read(result)`
turns what it returned into an `Answer`. What a contestant cannot do raises `Missing`.
"""

from __future__ import annotations


class Missing(Exception):
    """The contestant has no such thing."""


NAMES = ("fastrnn", "torch", "jax", "keras", "onnx", "numpy")
