"""How this package compiles: the options, in one place, and a disk cache that cannot go stale.

Numba's own cache keys a function by its bytecode alone, so an edit in a helper, another option or
another process can hand back the wrong machine code. Here a compiled function is one file whose
name is a hash of everything that went into it: all sources of the package, the versions, the
options, the signature and the CPU. Writers replace files atomically; a cache that cannot be read or
written is skipped.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import os
import pickle
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding
import numba.extending
from llvmlite import ir
from numba import types
from numba.core import cgutils, config, environment, sigutils
from numba.core.caching import FunctionCache, NullCache
from numba.core.ccallback import CFunc
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import CPUDispatcher
from numba.core.runtime import rtsys
from numba.core.serialize import dumps

# No fast-math: sums keep their order and NaN survives. No bounds checks: offsets are computed.
OPTIONS: dict[str, Any] = {
    "error_model": "numpy",
    "nopython": True,
    "nogil": True,
    "boundscheck": False,
}


# Entries that nobody comes in by; they would take a fifth of the time that compiling takes.
_FROM_KERNELS = {"no_cfunc_wrapper": True, "no_cpython_wrapper": True}
_FROM_PYTHON = {"no_cfunc_wrapper": True}


def helper(function: Callable) -> Any:
    """Compile `function` for use inside kernels; Python cannot call it. Never cached by itself."""
    return CPUDispatcher(py_func=function, targetoptions=OPTIONS | _FROM_KERNELS)


def overload(function: Callable) -> Any:
    """Numba's overload, for use inside kernels."""
    return numba.extending.overload(function, jit_options=dict(_FROM_KERNELS))


def intrinsic(function: Callable) -> Any:
    """Numba's intrinsic; for a type checker, a function of any arguments."""
    return numba.extending.intrinsic(function)


def kernel(function: Callable) -> Any:
    """Compile `function` as an entry point from Python: without the GIL, cached on disk."""
    return _Kernel(py_func=function, targetoptions=OPTIONS | _FROM_PYTHON)


def linked(signature: Callable[[Any], Any]) -> Callable[[Callable], Any]:
    """Compile a function on pointers once for each dtype; kernels call it by its symbol.

    signature   from a float type to the Numba signature; the first pointer to floats tells which
    Such a function must not fail: nobody would hear of it. It may call those declared before it.
    """

    def declare(function: Callable) -> Any:
        name = f"fastrnn_{function.__name__.strip('_')}"
        _declared.append((name, function, signature))

        def call(typingctx, *args):
            pointed = (a.dtype for a in args if isinstance(a, types.CPointer))
            dtype = next(d for d in pointed if isinstance(d, types.Float))

            def codegen(context, builder, sig, args):
                kind = ir.FunctionType(ir.VoidType(), [a.type for a in args])
                symbol = cgutils.get_or_insert_function(builder.module, kind, f"{name}_{dtype}")
                builder.call(symbol, args)
                return context.get_dummy_value()

            return signature(dtype), codegen

        # Numba binds the arguments of an intrinsic by its declared parameters.
        own = inspect.signature(function)
        context = inspect.Parameter("typingctx", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        vars(call)["__signature__"] = own.replace(parameters=[context, *own.parameters.values()])
        return intrinsic(call)

    return declare


_declared: list[tuple[str, Callable, Callable[[Any], Any]]] = []
_linked: dict[str, Any] = {}


def _link(dtypes: set) -> None:
    """Have the linked functions of these dtypes ready before a kernel that may call them."""
    for name, function, signature in _declared:
        for dtype in dtypes & {types.float32, types.float64}:
            symbol = f"{name}_{dtype}"
            if symbol not in _linked:
                sig = signature(dtype)
                callback: Any = CFunc(function, (sig.args, sig.return_type), {}, dict(OPTIONS))
                callback._cache = _cache(function)
                callback.compile()
                llvmlite.binding.add_symbol(symbol, callback.address)
                _linked[symbol] = callback


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Compile, one thread at a time, also where NUMBA_DISABLE_JIT leaves the user's code in Python.

    That setting would break the functions that Numba itself is made of, and with them our kernels.
    """
    with global_compiler_lock:
        disabled, config.DISABLE_JIT = config.DISABLE_JIT, 0
        try:
            yield
        finally:
            config.DISABLE_JIT = disabled


if hasattr(os, "register_at_fork"):
    # A child forked while another thread compiles would wait for that thread for ever.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


class _Kernel(CPUDispatcher):
    _looked_for_cache = False

    def compile(self, sig: Any) -> Any:
        arguments, _ = sigutils.normalize_signature(sig)
        with _compiling():
            # Not at import: Numba tries the directory out with a file.
            if not self._looked_for_cache:
                self._looked_for_cache = True
                self._cache = _cache(self.py_func)
            _link({a.dtype for a in arguments if isinstance(a, types.Array)})
            return super().compile(sig)


def _cache(function: Callable) -> Any:
    if _SOURCES is None:
        return NullCache()
    try:
        return _KernelCache(function)
    except (RuntimeError, OSError):
        # Numba found no directory it may write to: compile in memory.
        return NullCache()


def cache_directory() -> str:
    """Where compiled kernels are kept."""
    return getattr(_cache(_cache), "_cache_path", "none: no directory can be written to")


def _hash_sources() -> str | None:
    """Hash of the package's sources and of the compilers; None if there are no sources to read.

    That is so in a zip file or a frozen program, where nothing tells one release from the next.
    """
    digest = hashlib.sha256(repr((numba.__version__, llvmlite.__version__)).encode())
    try:
        paths = sorted(Path(__file__).parent.rglob("*.py"))
        for path in paths:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    except OSError:
        return None
    return digest.hexdigest() if paths else None


# Modules are read when they are first used; if the files have changed by then, no cache is used.
_SOURCES = _hash_sources()
_STAMP = (_SOURCES or "")[:12]


def _settings() -> tuple:
    """What else shapes machine code: options, and the variables that Numba reads."""
    names = ("OPT", "BOUNDSCHECK", "LOOP_VECTORIZE", "SLP_VECTORIZE", "CPU_NAME", "CPU_FEATURES")
    return (OPTIONS, *(getattr(config, name) for name in names))


class _KernelCache(FunctionCache):
    """Numba's function cache over files of ours."""

    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        self._cache_file = _Files(self._cache_path, self._impl.filename_base)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function for a signature, or None."""
        # A file that another program damaged must cost a compilation, not the call.
        with contextlib.suppress(Exception):
            if _hash_sources() == _SOURCES:
                # Numba's load_overload would first import all that compiling needs, for a quarter
                # of a second; code that is ready needs the runtime alone.
                rtsys.initialize(target_context)
                return self._load_overload(sig, target_context)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled function; losing it (full disk, no permission) costs only time."""
        # If the sources are not those of this process any more, its code must not pass for theirs.
        with contextlib.suppress(Exception):
            if _hash_sources() == _SOURCES:
                super().save_overload(sig, data)


class _Unpickler(pickle.Unpickler):
    """Of files of ours. Functions of a user's cell may come from a module that is not here."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numba.core.environment", "_rebuild_env"):
            return _environment
        return super().find_class(module, name)


def _environment(module: str, consts: Any, name: str) -> Any:
    """The globals of a compiled function; Numba's own would import the module to have them.

    Our compiled code never looks at them.
    """
    found = environment.lookup_environment(name)
    if found is None:
        names = vars(sys.modules[module]) if module in sys.modules else {"__name__": module}
        found = environment.Environment(names)
        found.consts[:], found.env_name = consts, name
        environment.Environment._memo[name] = found
    return found


class _Files:
    """One file per key in `directory`: base, hash of the sources, hash of the key."""

    def __init__(self, directory: str, base: str) -> None:
        self._directory = Path(directory)
        self._base = base

    def _path(self, key: Any) -> Path:
        name = hashlib.sha256(repr((_settings(), key)).encode()).hexdigest()[:24]
        return self._directory / f"{self._base}.{_STAMP}.{name}.nbc"

    def _all(self) -> Iterator[Path]:
        """The files of this function, wherever in its module it stood."""
        return self._directory.glob(f"{re.sub('-[0-9]+', '-*', self._base)}.*.nbc")

    def load(self, key: Any) -> Any:
        try:
            content = self._path(key).read_bytes()
        except OSError:
            return None
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            return None
        return _Unpickler(io.BytesIO(content[32:])).load()

    def save(self, key: Any, data: Any) -> None:
        path = self._path(key)
        payload = dumps(data)
        temporary = path.with_suffix(f".{os.getpid()}.{threading.get_ident():x}.tmp")
        try:
            temporary.write_bytes(hashlib.sha256(payload).digest() + payload)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        for other in self._all():
            if f".{_STAMP}." not in other.name:
                other.unlink(missing_ok=True)

    def flush(self) -> None:
        for path in self._all():
            path.unlink(missing_ok=True)
