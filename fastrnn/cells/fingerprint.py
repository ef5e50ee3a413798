"""What tells one cell of a user's from another of the same name: its code, and what that uses.

Compiled kernels are kept on disk, and the package's own sources are part of their key; what else
they are made of is in this.
"""

from __future__ import annotations

import contextlib
import hashlib
import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

# Modules of these are known by their names.
_KNOWN = ("fastrnn", "math", "numba", "numpy")


def fingerprint(functions: Iterable[Callable | None]) -> str:
    """A hash of functions: bytecode, constants, closures, and the globals that they name.

    Those of this package are known by their names.
    """
    digest = hashlib.sha256()
    for function in functions:
        _add(digest, function, set())
    return digest.hexdigest()[:16]


def _root(value: Any) -> str:
    return (getattr(value, "__module__", None) or "").partition(".")[0]


def _add(digest: Any, value: Any, seen: set[int]) -> None:
    # Of a compiled function what it was compiled from, of an intrinsic what defines it.
    value = getattr(value, "py_func", getattr(value, "_defn", value))
    if id(value) in seen:
        return
    if isinstance(value, types.FunctionType) and _root(value) not in _KNOWN:
        seen.add(id(value))
        _add_code(digest, value.__code__, value.__globals__, seen)
        for part in (value.__defaults__, value.__kwdefaults__):
            _add(digest, part, seen)
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty one
                _add(digest, cell.cell_contents, seen)
    elif isinstance(value, np.ndarray):
        digest.update(repr((value.dtype.str, value.shape)).encode() + value.tobytes())
    elif isinstance(value, (tuple, list, frozenset)):
        digest.update(f"{type(value).__name__}{len(value)}".encode())
        for part in sorted(value, key=repr) if isinstance(value, frozenset) else value:
            _add(digest, part, seen)
    elif isinstance(value, (int, float, complex, str, bytes, np.generic, type(None))):
        digest.update(f"{type(value).__name__}{value!r}".encode())
    else:
        # Modules, and what other packages make: known by where it is found.
        name = getattr(value, "__qualname__", getattr(value, "__name__", type(value).__name__))
        digest.update(f"{getattr(value, '__module__', '')}.{name}".encode())


def _add_code(digest: Any, code: types.CodeType, names: dict, seen: set[int]) -> None:
    digest.update(code.co_code)
    digest.update(repr((code.co_names, code.co_varnames, code.co_argcount)).encode())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _add_code(digest, constant, names, seen)
        else:
            _add(digest, constant, seen)
    found = [names[name] for name in code.co_names if name in names]
    for value in found:
        _add(digest, value, seen)
        if isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] not in _KNOWN:
            # What is taken from it may be any of the names.
            for name in code.co_names:
                _add(digest, getattr(value, name, None), seen)
