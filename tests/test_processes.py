"""Forks, threads, signals and settings around the library: each in a process of its own.

A script trains small networks with every call cut into two parts, in whatever circumstances, and
prints hashes of what came out. They must be those of a plain run on one thread.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastrnn

# Enough for a cold cache on a slow machine; a hang costs no more than this.
LIMIT = 240
PRELUDE = """
import hashlib, os, signal, sys, threading, time, warnings
import numpy as np
import fastrnn
from fastrnn import parallel

# Python 3.12 and later warn of every fork of a process with threads.
warnings.simplefilter("ignore", DeprecationWarning)

def train(cell="GRU", dtype="float32"):
    layer = getattr(fastrnn, cell)(5, 19, num_layers=2, dtype=dtype, seed=1)
    rng = np.random.default_rng(2)
    hashed = hashlib.sha256()
    for _ in range(3):
        x = rng.standard_normal((7, 6, 5)).astype(dtype)
        target = rng.standard_normal((7, 6, 19)).astype(dtype)
        output, _, saved = layer.forward(x)
        d_x, _, grads = layer.backward(saved, output - target)
        for key, value in layer.params.items():
            value -= grads[key] / 8
        for array in (output, d_x, *layer.params.values()):
            hashed.update(array.tobytes())
    return f"{cell} {dtype} {hashed.hexdigest()}"

def report(*results):
    # One write a line: several processes share the pipe.
    os.write(1, "".join(f"{result}\\n" for result in results).encode())

def use_pool():
    parallel._SMALL = 0
    fastrnn.set_num_threads(2)

def pool_was_used():
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("fastrnn") == parallel._pool._started == 1, names
    assert len(parallel._pool._free) == 1

def in_child(function):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return pid

def wait(pid):
    status = os.waitpid(pid, 0)[1]
    assert status == 0, f"child ended with status {status}"
"""
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


class Program:
    """A script that runs in a session of its own, so that a hang ends with all its processes."""

    def __init__(self, folder, body, *, prelude=PRELUDE, **environment):
        script = folder / "script.py"
        script.write_text(prelude + body)
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        root = str(Path(fastrnn.__file__).parents[1])
        variables["PYTHONPATH"] = os.pathsep.join([root, variables.get("PYTHONPATH", "")])
        for name in ("PYTHONWARNINGS", "FASTRNN_NUM_THREADS"):
            if name not in environment:
                variables.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", str(script)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=variables,
            start_new_session=True,
        )

    def lines(self):
        """What it printed, once it has ended well."""
        try:
            output, errors = self.process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            output, errors = self.process.communicate()
            pytest.fail(f"no end after {LIMIT} s\n{output}{errors}")
        code = self.process.returncode
        assert code == 0, f"exit code {code}\n{output}{errors}"
        assert "Fatal" not in errors, errors
        assert "Traceback" not in errors, errors
        assert "Exception ignored" not in errors, errors
        return output.splitlines()


@pytest.fixture
def run(tmp_path):
    def run(body, **options):
        return Program(tmp_path, body, **options).lines()

    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The results of a run on one thread."""
    body = """
fastrnn.set_num_threads(1)
report(train("GRU"), train("LSTM"), train("GRU", "float64"))
assert parallel._pool._started == 0
"""
    gru, lstm, double = Program(tmp_path_factory.mktemp("plain"), body).lines()
    assert len({gru, lstm, double}) == 3
    return {"gru": gru, "lstm": lstm, "double": double}


def test_two_threads(run, plain):
    body = """
use_pool()
report(train("GRU"), train("LSTM"), train("GRU", "float64"))
pool_was_used()
"""
    assert run(body) == [plain["gru"], plain["lstm"], plain["double"]]


@posix
def test_fork_after_training(run, plain):
    body = """
use_pool()
report(train("GRU"))

def grandchild():
    report(train("LSTM"))
    pool_was_used()

def child():
    report(train("GRU"))
    pool_was_used()
    wait(in_child(grandchild))
    report(train("LSTM"))

wait(in_child(child))
report(train("LSTM"))
pool_was_used()
"""
    assert run(body) == [plain["gru"], plain["gru"], *[plain["lstm"]] * 3]


@posix
def test_fork_while_another_thread_trains(run, plain):
    body = """
use_pool()
train("GRU")
stop, results = threading.Event(), []

def work():
    while not stop.is_set():
        results.append(train("LSTM"))

thread = threading.Thread(target=work)
thread.start()
for pid in [in_child(lambda: report(train("GRU"), train("LSTM"))) for _ in range(6)]:
    wait(pid)
stop.set()
thread.join()
report(train("GRU"), *sorted(set(results)))
"""
    lines = run(body)
    assert sorted(lines[:12]) == [plain["gru"]] * 6 + [plain["lstm"]] * 6
    assert lines[12:] == [plain["gru"], plain["lstm"]]


@posix
def test_fork_while_another_thread_compiles(run):
    # The child must not wait for a lock whose owner does not exist in it.
    body = """
from fastrnn import jit

def apply(size):
    return fastrnn.Linear(size, 3, seed=1)(np.ones((4, size), np.float32)).tobytes().hex()

inside, link = threading.Event(), jit._link

def signalling(dtypes):
    inside.set()
    time.sleep(0.2)
    link(dtypes)

jit._link = signalling
thread = threading.Thread(target=lambda: report(apply(5)))
thread.start()
inside.wait()
pid = in_child(lambda: report(apply(5)))
thread.join()
wait(pid)
report(apply(5))
"""
    assert len(set(run(body, NUMBA_CACHE_DIR="cache"))) == 1


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(run, plain, method):
    import multiprocessing

    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    body = f"""
import multiprocessing

def work(cell):
    use_pool()
    result = train(cell)
    pool_was_used()
    return result

if __name__ == "__main__":
    use_pool()
    train("GRU")
    with multiprocessing.get_context("{method}").Pool(2) as pool:
        report(*pool.map(work, ["GRU", "LSTM", "GRU", "LSTM"], chunksize=1))
    report(train("LSTM"))
"""
    gru, lstm = plain["gru"], plain["lstm"]
    assert run(body) == [gru, lstm, gru, lstm, lstm]


EIGHT = """
barrier, results = threading.Barrier(8), [None] * 8

def work(i):
    barrier.wait()
    results[i] = {task}

threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
report(*results)
"""


@pytest.mark.parametrize("count", [2, 3, 20])
def test_eight_threads_train_at_once(run, plain, count):
    task = '[train(c, t) for c, t in (("GRU", "float32"), ("LSTM", "float32"), ("GRU", "float64"))]'
    body = f"use_pool(); fastrnn.set_num_threads({count})\n" + EIGHT.format(task=task)
    body += f"assert 0 < parallel._pool._started <= {count - 1}\n"
    want = [plain["gru"], plain["lstm"], plain["double"]]
    assert run(body) == [str(want)] * 8


def test_eight_threads_share_a_layer(run):
    body = """
use_pool()
layer = fastrnn.LSTM(5, 19, seed=1)
x = np.random.default_rng(0).standard_normal((9, 6, 5)).astype(np.float32)

def step():
    found = []
    for _ in range(20):
        output, _, saved = layer.forward(x)
        d_x, _, grads = layer.backward(saved, output)
        found.append(hashlib.sha256(b"".join(a.tobytes() for a in (output, d_x, *grads.values()))))
    return {f.hexdigest() for f in found}
""" + EIGHT.format(task="step()")
    lines = run(body + "report(step())\n")
    assert len(set(lines)) == 1
    assert lines[0].count("'") == 2, "one hash"


def test_eight_threads_compile_at_once(run):
    body = EIGHT.format(
        task="""(lambda dtype: fastrnn.Linear(5, 3, seed=1, dtype=dtype)(
            np.ones((4, 5), dtype)).tobytes().hex())(("float32", "float64")[i % 2])"""
    )
    lines = run("use_pool()\n" + body, NUMBA_CACHE_DIR="cache")
    assert lines == [*lines[:2]] * 4
    assert len(set(lines)) == 2


LAYER = """
import importlib

name = os.environ["NUMBA_THREADING_LAYER"]
module = {"omp": "omppool", "tbb": "tbbpool", "workqueue": "workqueue"}[name]
try:
    importlib.import_module(f"numba.np.ufunc.{module}")
except ImportError as error:
    report(f"unavailable: {error}")
    sys.exit()

from numba import njit, prange, threading_layer

@njit(parallel=True)
def square(x):
    y = np.empty_like(x)
    for i in prange(x.size):
        y[i] = x[i] * x[i]
    return y

x = np.arange(10_000.0)
stop, count = threading.Event(), 0

def users_own():
    assert np.array_equal(square(x), x * x)

def work():
    global count
    while not stop.is_set():
        users_own()
        count += 1

use_pool()
if os.environ["FIRST"] == "theirs":
    users_own()
report(train("GRU"))
users_own()
assert threading_layer() == name
report(train("LSTM"))
thread = threading.Thread(target=work)
thread.start()
report(*(train("GRU") for _ in range(10)))
while not count:
    time.sleep(0.01)
stop.set()
thread.join()
pool_was_used()
# Numba's own layers may not survive a fork; ours have to.
if hasattr(os, "fork"):
    wait(in_child(lambda: report(train("LSTM"))))
"""


@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize("layer", ["workqueue", "omp", "tbb"])
def test_beside_numba_threads(run, plain, layer, first):
    lines = run(LAYER, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2", FIRST=first)
    if lines[0].startswith("unavailable"):
        pytest.skip(f"{layer} {lines[0]}")
    gru, lstm = plain["gru"], plain["lstm"]
    assert lines == [gru, lstm, *[gru] * 10, *[lstm] * hasattr(os, "fork")]


def test_beside_torch(run, plain):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    body = """
use_pool()
torch.set_num_threads(2)
theirs = torch.nn.GRU(8, 32)
stop, count = threading.Event(), 0

def work():
    global count
    while not stop.is_set():
        theirs(torch.zeros(20, 16, 8))[0].sum().backward()
        count += 1

thread = threading.Thread(target=work)
report(train("GRU"))
thread.start()
report(*(train("LSTM") for _ in range(10)))
while not count: time.sleep(0.01)
stop.set()
thread.join()
report(train("GRU", "float64"))
"""
    # Its OpenMP and allocator must be there before ours.
    lines = run("import torch\n" + body)
    assert lines == [plain["gru"], *[plain["lstm"]] * 10, plain["double"]]


def test_exceptions_of_kernels_propagate(run, plain):
    body = """
from fastrnn.jit import kernel

@kernel
def fail(part, parts, wrong, seen):
    seen[part] = 1
    if part == wrong:
        raise ValueError("a part failed")

use_pool()
fastrnn.set_num_threads(3)
for wrong in (0, 1, 2):
    try:
        parallel.run(fail, 3, wrong, np.zeros(3))
    except ValueError as error:
        report(error)
seen = np.zeros(3)
parallel.run(fail, 3, 9, seen)
assert seen.all()
assert len(parallel._pool._free) == parallel._pool._started == 2
report(train("GRU"))
"""
    assert run(body) == ["a part failed"] * 3 + [plain["gru"]]


@posix
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process")
def test_interrupt_of_a_long_call(tmp_path, plain):
    body = """
use_pool()
train("GRU")
layer = fastrnn.LSTM(64, 256, seed=1)
x = np.zeros((1500, 16, 64), np.float32)
report("ready")
try:
    for _ in range(1000):
        output, _, saved = layer.forward(x)
        layer.backward(saved, output)
except KeyboardInterrupt:
    report("interrupted")
pool_was_used()
report(train("GRU"), train("LSTM"))
pool_was_used()
"""
    program = Program(tmp_path, body)
    assert program.process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    program.process.send_signal(signal.SIGINT)
    assert program.lines() == ["interrupted", plain["gru"], plain["lstm"]]


@posix
def test_interrupt_waits_for_the_threads(run):
    # They write into arrays of the caller.
    body = """
fastrnn.set_num_threads(2)
ended = []

def work(part, parts):
    if part:
        time.sleep(1)
        ended.append(part)
    else:
        time.sleep(0.2)  # so that the thread takes part 1

for _ in range(2):
    ended.clear()
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        parallel.run(work, 2)
    except KeyboardInterrupt:
        report(f"interrupted, {ended}")
    pool_was_used()
"""
    handler = "signal.signal(signal.SIGALRM, signal.default_int_handler)\n"
    assert run(handler + body) == ["interrupted, [1]"] * 2


def test_training_in_a_signal_handler(run, plain):
    body = """
use_pool()
train("GRU")
results = []

def handler(number, frame):
    results.append(train("LSTM"))

signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.05)
mine = [train("GRU") for _ in range(60)]
signal.setitimer(signal.ITIMER_REAL, 0)
assert results
report(*sorted({*mine, *results}))
"""
    if not hasattr(signal, "setitimer"):
        pytest.skip("no timers on this system")
    assert run(body) == [plain["gru"], plain["lstm"]]


def test_exit_with_waiting_threads(run, plain):
    body = """
import atexit
use_pool()
atexit.register(lambda: report(train("LSTM")))
report(train("GRU"))
pool_was_used()
"""
    assert run(body) == [plain["gru"], plain["lstm"]]


@pytest.mark.parametrize("attempt", range(4))
def test_exit_while_daemon_threads_train(run, attempt):
    body = f"""
use_pool()
train("GRU"); train("LSTM")
layer = fastrnn.GRU(16, 64, seed=1)
x = np.zeros((50, 16, 16), np.float32)

def work():
    while True:
        output, _, saved = layer.forward(x)
        layer.backward(saved, output)

for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep({0.1 + 0.013 * attempt})
report("end")
"""
    assert run(body) == ["end"]


def test_exit_while_threads_train(run, plain):
    body = """
use_pool()
train("GRU")
def work():
    time.sleep(0.2)
    report(train("GRU"), train("LSTM"))
threading.Thread(target=work).start()
"""
    assert run(body) == [plain["gru"], plain["lstm"]]


def test_settings_reach_a_process(run):
    body = "report(fastrnn.get_num_threads())"
    assert run(body, FASTRNN_NUM_THREADS="3", OMP_NUM_THREADS="5") == ["3"]
    assert run(body, OMP_NUM_THREADS="5") == ["5"]
    if hasattr(os, "sched_setaffinity"):
        pinned = """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
del os.environ["OMP_NUM_THREADS"]
report(parallel._default_threads())
"""
        assert run(pinned) == ["1"]


ALONE = """
import os, random, signal, sys, threading, warnings
import numpy as np
import numba, numba.extending, numba.core.ccallback, numba.core.typing.ctypes_utils
import safetensors, tqdm

events = []
sys.addaudithook(lambda event, arguments: events.append(event))
config = numba.core.config

def state():
    \"\"\"What a library must leave alone.\"\"\"
    return {
        "Numba": repr({name: getattr(config, name) for name in dir(config) if name.isupper()}),
        "NumPy errors": (np.geterr(), np.geterrcall(), np.getbufsize()),
        "NumPy printing": repr(np.get_printoptions()),
        "NumPy random": repr(np.random.get_state()),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "handlers": [signal.getsignal(number) for number in signal.valid_signals()],
        "hooks": (sys.excepthook, sys.displayhook, threading.excepthook, sys.gettrace()),
        "path": list(sys.path),
        "random": random.getstate(),
        "recursion": sys.getrecursionlimit(),
        "switching": sys.getswitchinterval(),
        "warnings": list(warnings.filters),
    }

def threads():
    tasks = "/proc/self/task"
    return threading.active_count(), os.listdir(tasks) if os.path.isdir(tasks) else []

def compare():
    now = state()
    changed = [key for key in before if now[key] != before[key]]
    assert not changed, changed
    apart = ("ctypes.dlopen", "os.exec", "os.fork", "os.posix_spawn", "os.system", "socket.")
    assert not [event for event in events if event.startswith((*apart, "subprocess.", "urllib."))]

modules, before, running = set(sys.modules), state(), threads()
events.clear()
import fastrnn
for name in fastrnn.__all__:
    getattr(fastrnn, name)
compare()
assert "import" in events
assert "fastrnn.recurrence" in sys.modules
assert threads() == running
new = {name.split(".")[0] for name in set(sys.modules) - modules}
assert "fastrnn" in new
assert not new & {"asyncio", "concurrent", "ctypes", "http", "matplotlib", "multiprocessing",
                  "pandas", "requests", "scipy", "socket", "ssl", "subprocess", "tensorflow",
                  "tkinter", "torch", "urllib"}, new

layer = fastrnn.GRU(5, 19, dropout=0.5, num_layers=2, seed=1)
fastrnn.parallel._SMALL = 0
fastrnn.set_num_threads(2)
output, _, saved = layer.forward(np.ones((7, 6, 5), np.float32))
layer.backward(saved, output)
compare()
assert threading.active_count() == running[0] + 1
"""


def test_the_process_is_left_alone(run):
    run(ALONE, prelude="")


def test_disabled_jit_is_the_users_business(run):
    body = """
import numba
from fastrnn.loss import softmax_cross_entropy

def work():
    output = fastrnn.Linear(5, 3, seed=1)(np.ones((4, 5), np.float32))
    return softmax_cross_entropy(output, np.arange(4) % 3)[1].tobytes().hex()

report(work())
function = lambda: 1
assert (numba.njit(function) is function) == ("NUMBA_DISABLE_JIT" in os.environ)
assert numba.config.DISABLE_JIT == int(os.environ.get("NUMBA_DISABLE_JIT", 0))
"""
    # A cold cache: code that is loaded is not compiled.
    assert run(body, NUMBA_DISABLE_JIT="1", NUMBA_CACHE_DIR="cache") == run(body)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's allocator")
def test_freed_memory_is_not_used(run, plain):
    body = """
from fastrnn.generate import generate
from fastrnn.models import LanguageModel

def others():
    linear = fastrnn.Linear(40, 70, seed=1)
    x = np.random.default_rng(0).standard_normal((30, 40)).astype(np.float32)
    y, saved = linear.forward(x)
    d_x, grads = linear.backward(saved, y)
    model = LanguageModel(60, 50, cell="gru", embedding_size=30, num_layers=2, seed=1)
    tokens = np.random.default_rng(1).integers(60, size=(9, 5))
    embedding = fastrnn.Embedding(60, 20, seed=1)
    vectors, used = embedding.forward(tokens)
    arrays = [y, d_x, *grads.values(), *embedding.backward(used, vectors).values()]
    arrays += generate(model, tokens[:, 0], 12, seed=1, num_sequences=5)
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()

report(train("GRU"), train("LSTM"), train("GRU", "float64"), others())
"""
    usual = run(body)
    assert usual[:3] == list(plain.values())
    # Freed memory is filled with other bytes and, in pieces of 4 KiB, goes back to the system.
    settings = "mmap_threshold=4096 top_pad=0 trim_threshold=0 tcache_count=0 perturb=165"
    tunables = ":".join(f"glibc.malloc.{setting}" for setting in settings.split())
    assert run(body, GLIBC_TUNABLES=tunables) == usual


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="glibc on x86-64 only"
)
def test_floating_point_modes_are_kept(run, plain):
    body = """
import ctypes

libm = ctypes.CDLL("libm.so.6")

def mode(new=None):
    # glibc's fenv_t ends in MXCSR, whose lowest six bits are flags of past operations.
    environment = ctypes.create_string_buffer(32)
    libm.fegetenv(environment)
    if new is not None:
        environment[28:32] = new.to_bytes(4, "little")
        libm.fesetenv(environment)
    return int.from_bytes(environment.raw[28:32], "little") & ~0x3F

use_pool()
usual = mode()
train("GRU")
assert mode() == usual
flush, flush_both, upwards = usual | 0x8000, usual | 0x8040, usual | 0x4000
for chosen in (usual, flush, flush_both, upwards):
    mode(chosen)
    assert mode() == chosen
    result = train("GRU"), train("LSTM")
    assert mode() == chosen, hex(chosen)
    mode(usual)
    if chosen != upwards:
        report(*result)
for settings in ({"all": "raise"}, {"all": "ignore"}, {"over": "warn", "under": "raise"}):
    with np.errstate(**settings):
        kept = np.geterr()
        report(train("GRU"), train("LSTM"))
        assert np.geterr() == kept
"""
    assert run(body) == [plain["gru"], plain["lstm"]] * 6


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="glibc on x86-64 only"
)
def test_floating_point_modes_do_not_show(run):
    body = """
import ctypes

libm = ctypes.CDLL("libm.so.6")
use_pool()
layer = fastrnn.Linear(4, 3, bias=False, seed=1)
x = np.full((8, 4), 1e-39, np.float32)
layer(x)  # starts the pool, in the usual mode
environment = ctypes.create_string_buffer(32)
libm.fegetenv(environment)
mode = int.from_bytes(environment.raw[28:32], "little")
environment[28:32] = (mode | 0x8040).to_bytes(4, "little")
libm.fesetenv(environment)
for count in (1, 2):
    fastrnn.set_num_threads(count)
    report(*{layer(x).tobytes().hex() for _ in range(200)})
"""
    assert len(set(run(body))) == 1
