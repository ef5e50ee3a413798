"""How this package compiles: the options, in one place, and a disk cache that cannot go stale.

Numba's own cache keys a function by its bytecode alone, so an edit in a helper, another option or
another process can hand back the wrong machine code. Here a compiled function is one file whose
name is a hash of everything that went into it: all sources of the package, the versions, the
options, the signature and the CPU. Writers replace files atomically; a cache that cannot be read or
written is skipped.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding
import numba.extending
from numba import types
from numba.core import config, sigutils
from numba.core.caching import FunctionCache, NullCache
from numba.core.ccallback import CFunc
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import CPUDispatcher
from numba.core.serialize import dumps

# No fast-math: sums keep their order and NaN survives. No bounds checks: offsets are computed.
OPTIONS: dict[str, Any] = {"nopython": True, "nogil": True, "boundscheck": False}


def helper(function: Callable) -> Any:
    """Compile `function` for use inside kernels; never cached by itself."""
    return CPUDispatcher(py_func=function, targetoptions=dict(OPTIONS))


def intrinsic(function: Callable) -> Any:
    """Numba's intrinsic; for a type checker, a function of any arguments."""
    return numba.extending.intrinsic(function)


def kernel(function: Callable) -> Any:
    """Compile `function` as an entry point from Python: without the GIL, cached on disk."""
    dispatcher = _Kernel(py_func=function, targetoptions=dict(OPTIONS))
    dispatcher._cache = _cache(function)
    return dispatcher


def external(symbol: str, function: Callable, signature: Any, dtype: Any) -> str:
    """Compile `function` once and let kernels call it by `symbol`; returns the symbol.

    It is compiled or loaded before the first kernel with an array of `dtype` is.
    """
    _externals.append((symbol, function, signature, dtype))
    return symbol


_externals: list[tuple[str, Callable, Any, Any]] = []
_linked: dict[str, Any] = {}


def _link(dtypes: set) -> None:
    with global_compiler_lock:
        for symbol, function, signature, dtype in _externals:
            if dtype in dtypes and symbol not in _linked:
                callback: Any = CFunc(function, (signature.args, signature.return_type), {}, {})
                callback._cache = _cache(function)
                callback.compile()
                llvmlite.binding.add_symbol(symbol, callback.address)
                _linked[symbol] = callback


class _Kernel(CPUDispatcher):
    def compile(self, sig: Any) -> Any:
        arguments, _ = sigutils.normalize_signature(sig)
        _link({a.dtype for a in arguments if isinstance(a, types.Array)})
        return super().compile(sig)


def _cache(function: Callable) -> Any:
    try:
        return _KernelCache(function)
    except (RuntimeError, OSError):
        # Numba found no directory it may write to: compile in memory.
        return NullCache()


def cache_directory() -> str:
    """Where compiled kernels are kept."""
    return getattr(_cache(_cache), "_cache_path", "none: no directory can be written to")


@functools.cache
def source_stamp() -> str:
    """Hash of the package's sources and of every version and option that shapes machine code."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    options = (OPTIONS, config.OPT, config.BOUNDSCHECK, config.LOOP_VECTORIZE, config.SLP_VECTORIZE)
    digest.update(repr((numba.__version__, llvmlite.__version__, options)).encode())
    return digest.hexdigest()


class _KernelCache(FunctionCache):
    """Numba's function cache over files of ours."""

    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        self._cache_file = _Files(self._cache_path, self._impl.filename_base)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function for a signature, or None."""
        # A file that another program damaged must cost a compilation, not the call.
        with contextlib.suppress(Exception):
            return super().load_overload(sig, target_context)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled function; losing it (full disk, no permission) costs only time."""
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


class _Files:
    """One file per key in `directory`: base, hash of the sources, hash of the key."""

    def __init__(self, directory: str, base: str) -> None:
        self._directory = Path(directory)
        self._base = base

    def _path(self, key: Any) -> Path:
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:24]
        return self._directory / f"{self._base}.{source_stamp()[:12]}.{name}.nbc"

    def load(self, key: Any) -> Any:
        try:
            content = self._path(key).read_bytes()
        except OSError:
            return None
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            return None
        return pickle.loads(content[32:])

    def save(self, key: Any, data: Any) -> None:
        path = self._path(key)
        payload = dumps(data)
        temporary = path.with_suffix(f".{os.getpid()}.{threading.get_ident():x}.tmp")
        try:
            temporary.write_bytes(hashlib.sha256(payload).digest() + payload)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        for other in self._directory.glob(f"{self._base}.*.nbc"):
            if f".{source_stamp()[:12]}." not in other.name:
                other.unlink(missing_ok=True)

    def flush(self) -> None:
        for path in self._directory.glob(f"{self._base}.*.nbc"):
            path.unlink(missing_ok=True)
