from __future__ import annotations

import importlib
import pkgutil
import sys
import types
from contextlib import contextmanager

import numpy as np
import pytest
from helpers import threads as use_threads
from hypothesis import HealthCheck, settings

import fastrnn
from fastrnn import crew, parallel

# The first use of a kernel compiles it, which no deadline allows for.
settings.register_profile(
    "fastrnn",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fastrnn")

# Their kernels name np.empty themselves, and Numba would not know another function there.
_COMPILED = {"fastrnn.gemm", "fastrnn.generate"}


def pytest_collection_modifyitems(config, items):
    """Leave the long sweeps out unless `-m` says what to run."""
    if not config.getoption("markexpr"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)


@pytest.fixture
def rng(request):
    """Random numbers that depend on nothing but the name of the test."""
    return np.random.default_rng(list(request.node.name.encode()))


@pytest.fixture
def threads():
    """`threads(2)` cuts every call of this test from here on into two parts."""
    with use_threads(1):
        yield fastrnn.set_num_threads


@pytest.fixture
def pool(monkeypatch):
    """A new pool of up to two threads beside the caller; it must come out whole."""
    monkeypatch.setattr(parallel, "_threads", 3)
    monkeypatch.setattr(parallel, "_pool", parallel._Pool())
    yield parallel._pool
    assert len(parallel._pool._free) == parallel._pool._started
    for thread in parallel._pool._free:
        assert thread.slot[crew.STATE] == 0


def _poisoned(function):
    def poisoned(*args, **kwargs):
        array = function(*args, **kwargs)
        if array.dtype.kind == "f":
            array.fill(np.nan)
        return array

    return poisoned


@contextmanager
def _poison():
    poisoned_numpy = types.ModuleType("numpy")
    poisoned_numpy.__dict__.update(vars(np))
    for name in ("empty", "empty_like"):
        setattr(poisoned_numpy, name, _poisoned(getattr(np, name)))
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] == "fastrnn"]
    memory = importlib.import_module("fastrnn.memory")
    own, poisoned = memory.empty, _poisoned(memory.empty)
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            if getattr(module, "empty", None) is own:
                patch.setattr(module, "empty", poisoned)
            if getattr(module, "np", None) is np and module.__name__ not in _COMPILED:
                patch.setattr(module, "np", poisoned_numpy)
        yield


@pytest.fixture(autouse=True, scope="session")
def _poisoned_memory():
    """Whatever the package allocates holds NaN, so that an element nobody writes is seen."""
    for module in pkgutil.walk_packages(fastrnn.__path__, "fastrnn."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    with _poison():
        yield
