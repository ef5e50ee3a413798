"""The kernel cache on disk: never stale, never in the way.

Each test has a copy of the package and runs small programs with it, whose kernels compile fast.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import fastrnn
from fastrnn import jit

SOURCE = Path(fastrnn.__file__).parent
LIMIT = 240

# Prints the numbers that some kernels give, and how many of these were loaded and compiled.
PROGRAM = """
import json, sys
import numpy as np
import fastrnn
from fastrnn import jit
{first}
from fastrnn.dropout import dropout
from fastrnn.loss import softmax_cross_entropy
{before}
def numbers(name, dtype="float32"):
    x = np.linspace(-2, 2, 12).astype(dtype).reshape(3, 4)
    if name == "linear":
        y = fastrnn.Linear(4, 5, seed=1, dtype=dtype)(x)
    elif name == "dropout":
        y = np.empty_like(x[None])
        dropout(x[None], 0.5, 1, y)
    elif name == "softmax":
        y = softmax_cross_entropy(x, np.arange(3))[1]
    else:
        y = fastrnn.RNN(4, 5, seed=1, dtype=dtype)(x[None])[0]
    return y.astype("float64").ravel().tolist()

if sys.argv[1:] == ["dropout"]:
    jit._link = lambda dtypes: None  # it calls no linked function, and those take long to compile
result = {{name: numbers(*name.split()) for name in sys.argv[1:]}}
kernels = {{v for m, module in sys.modules.items() if m.startswith("fastrnn")
           for v in vars(module).values() if isinstance(v, jit._Kernel)}}
hits = sum(sum(kernel.stats.cache_hits.values()) for kernel in kernels)
misses = sum(sum(kernel.stats.cache_misses.values()) for kernel in kernels)
linked = [bool(callback.cache_hits) for callback in jit._linked.values()]
print(json.dumps({{"numbers": result, "loaded": hits + sum(linked),
                  "compiled": misses + len(linked) - sum(linked), "file": fastrnn.__file__,
                  "cache": jit.cache_directory()}}))
"""


class Installation:
    """A copy of the package, and programs that run with it."""

    def __init__(self, folder):
        self.folder = folder
        self.package = folder / "site" / "fastrnn"
        self.cache = folder / "cache"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(SOURCE, self.package, ignore=ignored)

    def start(self, *kernels, first="", before="", **environment):
        """A program that uses some kernels; an environment variable of None is removed."""
        variables = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(self.package.parent),
            "NUMBA_CACHE_DIR": str(self.cache),
            # Python trusts times of files, which are too coarse for edits as fast as these.
            "PYTHONDONTWRITEBYTECODE": "1",
            **environment,
        }
        program = self.folder / ("special.py" if first or before else "program.py")
        if first or before or not program.exists():  # a process may be about to read it
            program.write_text(PROGRAM.format(first=first, before=before))
        return subprocess.Popen(
            [sys.executable, str(program), *kernels],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env={key: value for key, value in variables.items() if value is not None},
        )

    def finish(self, process):
        try:
            output, errors = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"no end after {LIMIT} s")
        assert process.returncode == 0, errors
        assert not errors
        result = json.loads(output)
        assert Path(result["file"]).is_relative_to(self.package.parent)
        return result

    def run(self, *kernels, **options):
        return self.finish(self.start(*kernels, **options))

    def files(self):
        """The cache: names and contents."""
        found = self.cache.rglob("*")
        return {path.name: path.read_bytes() for path in found if path.is_file()}


@pytest.fixture
def installation(tmp_path):
    return Installation(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """An installation whose cache holds every kernel that the programs use, and their numbers."""
    made = Installation(tmp_path_factory.mktemp("shared"))
    first = made.run("linear", "dropout", "softmax", "rnn")
    assert first["compiled"] > 4
    assert first["loaded"] == 0
    made.expected = first["numbers"]
    return made


@pytest.fixture
def copied(shared, tmp_path, monkeypatch):
    """The same cache, to be damaged: `(installation, expected numbers)`."""
    copy = shutil.copytree(shared.cache, tmp_path / "cache")
    monkeypatch.setattr(shared, "cache", copy)
    return shared


@pytest.fixture
def store(tmp_path):
    """A store with one entry: `(store, path of its file)`."""
    files = jit._Files(str(tmp_path), "base")
    files.save("key", {"data": list(range(20))})
    (path,) = tmp_path.iterdir()
    return files, path


def test_a_second_process_loads(shared):
    before = shared.files()
    second = shared.run("linear", "dropout", "softmax", "rnn")
    assert second["numbers"] == shared.expected
    assert second["compiled"] == 0
    assert second["loaded"] == len(before) > 4
    assert shared.files() == before
    assert all(name.endswith(".nbc") for name in before)


# ---- stale entries

EDITS = {
    "the product": (
        "linear",
        "tile.py",
        r"\Z",
        "\n_single = multiply_add\n"
        "def multiply_add(builder, vec, a, b, c):\n"
        "    return _single(builder, vec, builder.fadd(a, a), b, c)\n",
    ),
    "a helper": ("dropout", "counter.py", "0x9E3779B97F4A7C15", "0x9E3779B97F4A7C17"),
    "a constant of the vector math": (
        "softmax",
        "vmath.py",
        r"\n_TAYLOR = .*",
        "\n_TAYLOR = tuple(2 / math.factorial(k) for k in range(14))",
    ),
    "a cell": ("rnn", "cells/rnn.py", "import tanh", "import sigmoid as tanh"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_recompiles(copied, edit):
    kernel, name, pattern, replacement = EDITS[edit]
    path = copied.package / name
    source = path.read_text()
    assert len(re.findall(pattern, source)) >= 1, "this test edits what is not there any more"
    try:
        path.write_text(re.sub(pattern, lambda match: replacement, source, count=1))
        edited = copied.run(kernel)
    finally:
        path.write_text(source)
    assert edited["loaded"] == 0
    assert edited["compiled"] > 0
    assert edited["numbers"][kernel] != copied.expected[kernel]
    again = copied.run(kernel)
    assert again["numbers"][kernel] == copied.expected[kernel]


def test_every_source_counts(tmp_path, monkeypatch):
    made = Installation(tmp_path)
    monkeypatch.setattr(jit, "__file__", str(made.package / "jit.py"))
    stamp = jit._hash_sources()
    assert stamp == jit._hash_sources()
    stamps = {stamp}
    paths = sorted(made.package.rglob("*.py"))
    assert len(paths) == len(list(SOURCE.rglob("*.py"))) > 20
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(content + b"#\n")
        stamps.add(jit._hash_sources())
        path.write_bytes(content)
        assert jit._hash_sources() == stamp
    assert len(stamps) == len(paths) + 1
    (made.package / "new.py").write_text("")
    assert jit._hash_sources() not in stamps


def test_versions_count(monkeypatch):
    stamp = jit._hash_sources()
    monkeypatch.setattr("numba.__version__", "0.1")
    assert jit._hash_sources() != stamp


EDIT = """
from pathlib import Path
path = Path(fastrnn.__file__).parent / "counter.py"
path.write_text(path.read_text().replace("0x9E3779B97F4A7C15", "0x9E3779B97F4A7C17"))
"""


def test_an_edit_under_a_running_process(installation):
    # What runs is the old code: it must not be kept as that of the new sources.
    first = installation.run("dropout", before=EDIT)
    second = installation.run("dropout")
    assert first["numbers"] != second["numbers"]
    assert second["loaded"] == 0


def test_an_edit_between_imports(installation):
    # What runs is the new code: it must not be kept as that of the old sources.
    path = installation.package / "counter.py"
    source = path.read_text()
    first = installation.run("dropout", first=EDIT)
    assert path.read_text() != source
    path.write_text(source)
    second = installation.run("dropout")
    assert first["numbers"] != second["numbers"]
    assert second["loaded"] == 0


def test_old_entries_are_removed(installation):
    installation.run("dropout")
    names = installation.files().keys()
    path = installation.package / "dropout.py"
    path.write_text("\n" + path.read_text())  # the kernel stands in another line, too
    installation.run("dropout")
    assert len(installation.files()) == len(names) == 1
    assert not installation.files().keys() & names


# ---- settings of the compiler


@pytest.mark.parametrize(
    "settings",
    [{"NUMBA_OPT": "1"}, {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}],
    ids=lambda settings: " ".join(settings),
)
def test_settings_share_nothing(copied, settings):
    if "NUMBA_CPU_NAME" in settings and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("a CPU of another kind")
    before = copied.files()
    first = copied.run("dropout", **settings)
    assert first["loaded"] == 0
    assert first["numbers"]["dropout"] == copied.expected["dropout"]
    assert copied.files().items() > before.items(), "an entry of other settings is gone"
    for options in (settings, {}):
        assert copied.run("dropout", **options)["compiled"] == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OPT", 1),
        ("BOUNDSCHECK", 1),
        ("LOOP_VECTORIZE", 0),
        ("SLP_VECTORIZE", 1),
        ("CPU_NAME", "generic"),
        ("CPU_FEATURES", "+avx"),
    ],
)
def test_every_setting_counts(store, monkeypatch, name, value):
    files, _ = store
    monkeypatch.setattr(jit.config, name, value)
    assert files.load("key") is None
    files.save("key", "other")
    monkeypatch.undo()
    assert files.load("key") == {"data": list(range(20))}


def test_our_options_count(store, monkeypatch):
    files, _ = store
    monkeypatch.setitem(jit.OPTIONS, "fastmath", True)
    assert files.load("key") is None


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 only")
def test_the_cpu_name_alone_is_another_machine(copied):
    # Numba sees the same name and features in both; the width of our registers differs.
    import llvmlite.binding

    features = llvmlite.binding.get_host_cpu_features().flatten()
    for settings in ({}, {"NUMBA_CPU_FEATURES": features}):
        result = copied.run("linear", NUMBA_CPU_NAME="haswell", **settings)
        assert result["loaded"] == 0
        assert result["numbers"]["linear"] == pytest.approx(copied.expected["linear"], rel=1e-5)


# ---- damage


def checksummed(content):
    return hashlib.sha256(content).digest() + content


DAMAGES = (
    lambda content: b"",
    lambda content: content[: len(content) // 2],
    lambda content: bytes(range(256)) * 100,
    lambda content: content[:-100] + bytes([content[-100] ^ 4]) + content[-99:],
    lambda content: checksummed(b"garbage"),
)


def test_damaged_files_cost_a_compilation(copied):
    names = ("linear", "dropout", "softmax")
    before = copied.files()
    paths = sorted(copied.cache.rglob("*.nbc"))
    assert len(paths) == len(before) >= len(DAMAGES)
    for path, damage in zip(paths, itertools.cycle(DAMAGES), strict=False):
        path.write_bytes(damage(path.read_bytes()))
        assert path.read_bytes() != before[path.name]
    result = copied.run(*names)
    assert result["numbers"] == {name: copied.expected[name] for name in names}
    assert result["loaded"] == 0
    assert copied.run(*names)["compiled"] == 0
    assert copied.files().keys() == before.keys()


def test_files_that_hold_something_else(copied):
    for path in copied.cache.rglob("*.nbc"):
        path.write_bytes(checksummed(pickle.dumps(["not", "a", "kernel"])))
    result = copied.run("dropout")
    assert result["numbers"]["dropout"] == copied.expected["dropout"]
    assert (result["loaded"], result["compiled"]) == (0, 1)


def test_store(store):
    files, path = store
    assert files.load("key") == {"data": list(range(20))}
    assert files.load("another") is None
    files.save("key", "new")
    files.save("another", "more")
    assert files.load("key") == "new"
    assert files.load("another") == "more"
    files.flush()
    assert files.load("key") is None
    assert not list(path.parent.iterdir())


def test_any_flipped_bit_is_seen(store):
    files, path = store
    content = path.read_bytes()
    for at in range(len(content)):
        for bit in range(8):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
            assert files.load("key") is None, (at, bit)


def test_any_truncation_is_seen(store):
    files, path = store
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert files.load("key") is None, length
    path.write_bytes(content + b"\0")
    assert files.load("key") is None


def test_a_failed_write_leaves_nothing(store, monkeypatch):
    files, path = store

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        files.save("key", "new")
    assert files.load("key") == {"data": list(range(20))}
    assert list(path.parent.iterdir()) == [path]


def test_threads_write_one_key(store):
    files, path = store
    values = [str(i) * 10_000 for i in range(8)]

    def work(value):
        for _ in range(30):
            files.save("key", value)
            assert files.load("key") in values

    threads = [threading.Thread(target=work, args=(value,)) for value in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files.load("key") in values
    assert list(path.parent.iterdir()) == [path]


# ---- nowhere to write


def test_a_read_only_installation(installation):
    # Permissions do not bind root: files stand where directories would have to be made.
    for folder in [installation.package, *installation.package.rglob("*/")]:
        if folder.is_dir():
            (folder / "__pycache__").write_text("in the way")
    home = installation.folder / "home"
    home.write_text("in the way")
    nowhere = str(home / "below")
    before = sorted(installation.folder.rglob("*"))
    result = installation.run(
        "dropout",
        HOME=nowhere,
        USERPROFILE=nowhere,
        LOCALAPPDATA=nowhere,
        XDG_CACHE_HOME=nowhere,
        NUMBA_CACHE_DIR=None,
    )
    assert result["cache"].startswith("none")
    assert result["compiled"] > 0
    assert result["loaded"] == 0
    assert any(result["numbers"]["dropout"])
    after = sorted(installation.folder.rglob("*"))
    assert [path.name for path in after if path not in before] == ["program.py"]


def test_a_cache_directory_that_cannot_be_made(installation):
    installation.cache.write_text("in the way")
    result = installation.run("dropout")
    assert any(result["numbers"]["dropout"])
    assert installation.cache.read_text() == "in the way"


def test_a_cache_directory_that_is_gone(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "cache", tmp_path / "cache")
    before = """
import os, shutil
folder, save = os.environ["NUMBA_CACHE_DIR"], jit._KernelCache.save_overload

def save_overload(*arguments):
    shutil.rmtree(folder)
    open(folder, "w").close()
    save(*arguments)

jit._KernelCache.save_overload = save_overload
"""
    result = shared.run("dropout", before=before)
    assert result["numbers"]["dropout"] == shared.expected["dropout"]
    assert result["loaded"] == 0
    assert shared.cache.is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="no limits there")
def test_a_full_disk(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "cache", tmp_path / "cache")
    before = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
    result = shared.run("dropout", before=before)
    assert result["numbers"]["dropout"] == shared.expected["dropout"]
    assert result["loaded"] == 0
    assert not shared.files()
    assert shared.run("dropout")["loaded"] == 0
    assert shared.run("dropout")["compiled"] == 0


def test_a_zip_file_is_not_cached(installation):
    # It has no files to hash, so that one release could load the kernels of another.
    site = installation.package.parent
    archive = shutil.make_archive(str(installation.folder / "site"), "zip", site)
    shutil.rmtree(site)
    installation.package = Path(archive) / "fastrnn"
    result = installation.run("dropout")
    assert result["cache"].startswith("none")
    assert any(result["numbers"]["dropout"])
    assert not installation.files()


# ---- several processes


def test_eight_processes_on_a_cold_cache(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "cache", tmp_path / "cache")
    processes = [shared.start("dropout") for _ in range(8)]
    for result in [shared.finish(process) for process in processes]:
        assert result["numbers"]["dropout"] == shared.expected["dropout"]
    assert len(shared.files()) == 1
    assert all(name.endswith(".nbc") for name in shared.files())
    last = shared.run("dropout")
    assert (last["loaded"], last["compiled"]) == (1, 0)
    assert last["numbers"]["dropout"] == shared.expected["dropout"]


def test_two_processes_compile_two_types(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "cache", tmp_path / "cache")
    names = ("linear float32", "linear float64")
    processes = [shared.start(name) for name in names]
    results = [shared.finish(process)["numbers"] for process in processes]
    last = shared.run(*names)
    assert last["compiled"] == 0
    assert last["loaded"] == len(shared.files())
    assert last["numbers"] == results[0] | results[1]
    single, double = last["numbers"].values()
    assert single == shared.expected["linear"]
    assert double == pytest.approx(single)
    assert double != single


WARMED = """
import sys
from pathlib import Path
import numpy as np
import fastrnn
from fastrnn.generate import generate
from fastrnn.train import Settings, Trainer

def kernels():
    return {path.name for path in Path(sys.argv[1]).rglob("*.nbc")}

fastrnn.warmup("gru")
warm = kernels()
assert warm
layer = fastrnn.GRU(5, 7)
y, _, saved = layer.forward(np.zeros((3, 2, 5), "f4"))
layer.backward(saved, y.copy())
layer.stepper()(np.zeros(5, "f4"))
model = fastrnn.LanguageModel(9, 8, cell="gru", embedding_size=8, dropout=0.2, num_layers=2)
settings = Settings(steps=2, batch=2, tbptt_steps=8, average=0.9)
Trainer(model, np.arange(500) % 9, settings).fit()
table = fastrnn.Embedding(5, 3)
table.backward(*table.forward(np.arange(5))[::-1])
generate(model, [1], 3)
print(sorted(kernels() - warm))
"""


def test_after_warmup_nothing_is_compiled(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", WARMED, str(tmp_path)],
        env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "[]\n"


@pytest.mark.parametrize("cells", ["lstn", ["gru", 3], 3, None])
def test_warmup_names_what_it_does_not_know(cells):
    with pytest.raises((TypeError, ValueError), match="cells"):
        fastrnn.warmup(cells)
