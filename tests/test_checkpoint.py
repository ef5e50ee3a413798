from __future__ import annotations

import errno
import json
import os
import pickle
import re
import stat
import struct
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fastrnn import checkpoint
from fastrnn.checkpoint import load, save

# A shared machine may stall any single example.
patient = settings(deadline=None)
DTYPES = [
    "bool",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "float16",
    "uint32",
    "int32",
    "float32",
    "uint64",
    "int64",
    "float64",
]
OURS = {"__metadata__": {"fastrnn": '{"metadata":{},"version":1}'}}
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoint") / "file.safetensors"


@pytest.fixture
def old(tmp_path):
    """A saved checkpoint, alone in its directory."""
    path = tmp_path / "model.safetensors"
    save(path, {"old": np.arange(5)}, {"step": 1})
    return path


def check_old(path):
    tensors, metadata = load(path)
    assert list(tensors) == ["old"]
    assert tensors["old"].tolist() == [0, 1, 2, 3, 4]
    assert metadata == {"step": 1}
    assert os.listdir(path.parent) == [path.name]


def write(path, header, data=b"", length=None):
    """A file by hand: the header as JSON or raw bytes, and any length claimed for it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def check_well_formed(tensors, metadata):
    assert type(metadata) is dict
    for name, array in tensors.items():
        assert type(name) is str
        assert type(array) is np.ndarray
        assert array.dtype.name in DTYPES
        assert array.dtype.isnative
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert array.flags.owndata
        if array.dtype == bool:
            assert set(array.tobytes()) <= {0, 1}


# Round trips


@st.composite
def arrays(draw):
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=4)))
    count = int(np.prod(shape, dtype=int))
    if dtype.kind == "b":
        values = draw(st.lists(st.booleans(), min_size=count, max_size=count))
        array = np.array(values, bool).reshape(shape)
    else:
        size = count * dtype.itemsize
        raw = draw(st.binary(min_size=size, max_size=size))
        array = np.frombuffer(raw, dtype).reshape(shape)
    how = draw(st.sampled_from(["C", "F", "swapped", "reversed", "read-only"]))
    if how == "F":
        array = np.asfortranarray(array).reshape(shape, order="A")
    elif how == "swapped":
        array = array.astype(dtype.newbyteorder("S"))
    elif how == "reversed":
        array = np.array(array[..., ::-1])[..., ::-1] if shape else array
    return array


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
names = st.text(max_size=8).filter(lambda name: name != "__metadata__")


@patient
@given(st.dictionaries(names, arrays(), max_size=4), st.dictionaries(st.text(), json_values))
def test_round_trip(scratch, tensors, metadata):
    save(scratch, tensors, metadata)
    loaded, described = load(scratch)
    check_well_formed(loaded, described)
    assert described == metadata
    assert list(loaded) == sorted(tensors)
    for name, array in tensors.items():
        assert loaded[name].dtype == array.dtype.newbyteorder("=")
        assert loaded[name].shape == array.shape
        # Bytes, because NaN is unequal to itself and its payload must survive too.
        assert loaded[name].tobytes() == array.astype(loaded[name].dtype, order="C").tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (1, 2, 3), (1,) * 32])
def test_every_dtype_and_shape(scratch, dtype, shape):
    array = np.arange(int(np.prod(shape, dtype=int))).reshape(shape).astype(dtype)
    save(scratch, {"a": array, "b": array}, {})
    tensors, _ = load(scratch)
    check_well_formed(tensors, {})
    for name in ("a", "b"):
        assert tensors[name].dtype == dtype
        assert tensors[name].shape == shape
        assert np.array_equal(tensors[name], array)
    assert not np.shares_memory(tensors["a"], tensors["b"])


def test_special_floats(scratch):
    array = np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 5e-324])
    save(scratch, {"a": array}, {"best": float("nan"), "loss": float("-inf")})
    tensors, metadata = load(scratch)
    assert tensors["a"].tobytes() == array.tobytes()
    assert np.isnan(metadata["best"])
    assert metadata["loss"] == float("-inf")


def test_metadata_of_many_kinds(scratch):
    metadata = {"pair": (1, (2, "x")), "big": 2**200, "text": "é𝄞\ud800\0\n", "np": np.float64(0.5)}
    save(scratch, {}, metadata)
    tensors, loaded = load(scratch)
    assert tensors == {}
    assert loaded == {**metadata, "pair": [1, [2, "x"]]}


def test_long_and_long_long_are_the_same_integers(scratch):
    save(scratch, {"q": np.arange(3, dtype="q"), "l": np.arange(3, dtype="l")}, {})
    assert [array.tolist() for array in load(scratch)[0].values()] == [[0, 1, 2]] * 2


def test_the_safetensors_library_reads_what_we_write(scratch):
    tensors = {
        "b": np.arange(6.0).reshape(2, 3).T,
        "a": np.array(True),
        "c": np.arange(3, dtype=">i2"),
    }
    save(scratch, tensors, {"step": 3})
    read = load_file(scratch)
    assert set(read) == set(tensors)
    assert all(np.array_equal(read[name], tensors[name]) for name in tensors)
    with safe_open(scratch, framework="np") as file:
        assert json.loads(file.metadata()["fastrnn"]) == {"version": 1, "metadata": {"step": 3}}


def test_data_are_aligned_in_the_file(scratch):
    save(scratch, {"a": np.ones(3, bool), "b": np.ones(3, "f4"), "c": np.ones(3)}, {})
    data = scratch.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    for name, itemsize in (("a", 1), ("b", 4), ("c", 8)):
        assert header[name]["data_offsets"][0] % itemsize == 0


def test_the_same_content_gives_the_same_bytes(scratch):
    a, b = np.arange(6.0).reshape(2, 3), np.arange(3, dtype=np.int8)
    save(scratch, {"a": a, "b": b, "c": b}, {"x": 1, "y": {"p": [1], "q": 2}})
    first = scratch.read_bytes()
    swapped = np.asfortranarray(a).astype(">f8")
    save(scratch, {"c": b, "b": b[::-1][::-1], "a": swapped}, {"y": {"q": 2, "p": (1,)}, "x": 1})
    assert scratch.read_bytes() == first
    save(scratch, {"a": a, "b": b, "c": b}, {"x": 2, "y": {"p": [1], "q": 2}})
    assert scratch.read_bytes() != first


# What save refuses


circular: list = []
circular.append(circular)
deep: list = []
for _ in range(100_000):
    deep = [deep]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (None, "tensors: expected a mapping, got NoneType"),
        ([("a", np.ones(1))], "tensors: expected a mapping, got list"),
        ({1: np.ones(1)}, "tensors: expected names other than '__metadata__', got 1"),
        ({"__metadata__": np.ones(1)}, "tensors: expected names other .* got '__metadata__'"),
        ({"\ud800": np.ones(1)}, r"tensors: expected Unicode names, got '\\ud800'"),
        ({"a": [1.0]}, r"tensors\['a'\]: expected a numpy array, got list"),
        ({"a": np.float32(1)}, r"tensors\['a'\]: expected a numpy array, got float32"),
        ({"a": np.ones(1, complex)}, r"tensors\['a'\]: .*float64, got complex128"),
        ({"a": np.ones(1, object)}, r"tensors\['a'\]: .*float64, got object"),
        ({"a": np.array(["x"])}, r"tensors\['a'\]: .*float64, got <U1"),
        ({"a": np.zeros(1, "M8[s]")}, r"tensors\['a'\]: .*float64, got datetime64"),
        ({"a": np.zeros(1, [("x", "f4")])}, r"tensors\['a'\]: .*float64, got \[\('x', '<f4'\)\]"),
    ],
)
def test_tensors_that_cannot_be_saved(old, tensors, message):
    with pytest.raises(ValueError, match=re.escape(repr(str(old))) + ": " + message):
        save(old, tensors, {})
    check_old(old)


def test_dtypes_without_a_byte_order_cannot_be_saved(old):
    if not hasattr(np.dtypes, "StringDType"):
        pytest.skip("needs NumPy 2")
    with pytest.raises(ValueError, match=r"tensors\['a'\]: .*got StringDType"):
        save(old, {"a": np.array(["x"], np.dtypes.StringDType())}, {})
    check_old(old)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "metadata: expected a mapping, got NoneType"),
        ([1], "metadata: expected a mapping, got list"),
        ({1: 2}, "metadata: expected string keys, got 1"),
        ({"a": [{"b": {None: 2}}]}, r"metadata\['a'\]\[0\]\['b'\]: expected string keys, got None"),
        ({"a": {1, 2}}, r"metadata\['a'\]: expected a JSON value, got set"),
        ({"a": [0, np.int64(3)]}, r"metadata\['a'\]\[1\]: expected a JSON value, got int64"),
        ({"a": b"x"}, r"metadata\['a'\]: expected a JSON value, got bytes"),
        ({"a": np.ones(1)}, r"metadata\['a'\]: expected a JSON value, got ndarray"),
        ({"a": 10**5000}, "Exceeds the limit"),
        ({"a": circular}, "metadata: expected JSON values, got nesting without end"),
        ({"a": deep}, "metadata: expected JSON values, got nesting without end"),
    ],
    ids=range(11),
)
def test_metadata_that_cannot_be_saved(old, metadata, message):
    with pytest.raises(ValueError, match=re.escape(repr(str(old))) + ": " + message):
        save(old, {}, metadata)
    check_old(old)


def test_a_header_that_no_reader_would_take_is_not_written(old, monkeypatch):
    monkeypatch.setattr(checkpoint, "_MAX_HEADER", 1000)
    save(old, {"old": np.arange(5)}, {"step": 1})
    with pytest.raises(
        ValueError, match=r"metadata and names: expected at most 1000 bytes .*, got"
    ):
        save(old, {}, {"text": "x" * 1000})
    check_old(old)


# Where save writes


def test_an_existing_file_is_replaced(old):
    save(str(old), {"new": np.ones(1)}, {"step": 2})
    assert load(old)[1] == {"step": 2}
    assert os.listdir(old.parent) == [old.name]


def test_a_path_relative_to_the_working_directory(old, monkeypatch):
    monkeypatch.chdir(old.parent)
    save(old.name, {"new": np.ones(1)}, {"step": 2})
    assert load(old.name)[1] == {"step": 2}
    assert os.listdir(old.parent) == [old.name]


def test_the_longest_name(tmp_path):
    path = tmp_path / ("x" * 255)
    save(path, {}, {"step": 1})
    assert load(path)[1] == {"step": 1}


@POSIX
def test_modes(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    created = []
    plain_open = os.open

    def spy(name, flags, mode=0o777, **options):
        created.append(mode)
        return plain_open(name, flags, mode, **options)

    monkeypatch.setattr(checkpoint.os, "open", spy)
    umask = os.umask(0o027)
    try:
        save(path, {}, {})
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        for mode in (0o600, 0o664, 0o777):
            path.chmod(mode)
            created.clear()
            save(path, {}, {})
            assert stat.S_IMODE(path.stat().st_mode) == mode
            # While it is written it is as private as can be.
            assert created[0] == 0o600
    finally:
        os.umask(umask)


@POSIX
@pytest.mark.parametrize("name", ["fchown", "fchmod"])
def test_a_file_system_without_modes_or_owners_will_do(old, monkeypatch, name):
    calls = []

    def refuse(*args):
        calls.append(args)
        raise PermissionError(errno.EPERM, "not here")

    monkeypatch.setattr(checkpoint.os, name, refuse)
    save(old, {}, {"step": 2})
    assert load(old)[1] == {"step": 2}
    assert len(calls) == 1


@POSIX
@pytest.mark.parametrize("exists", [True, False])
def test_a_symbolic_link_is_followed(tmp_path, exists):
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "real.safetensors"
    if exists:
        save(target, {}, {"step": 1})
    link = tmp_path / "link"
    link.symlink_to(os.path.join("there", "real.safetensors"))
    save(link, {}, {"step": 2})
    assert link.is_symlink()
    assert not target.is_symlink()
    assert load(target) == load(link) == ({}, {"step": 2})
    assert os.listdir(target.parent) == [target.name]
    assert sorted(os.listdir(tmp_path)) == ["link", "there"]


@POSIX
def test_a_circle_of_links(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for action in (lambda: save(loop, {}, {}), lambda: load(loop)):
        with pytest.raises(OSError, match=r"cannot (save|load) the checkpoint: .*loop") as caught:
            action()
        assert caught.value.errno == errno.ELOOP
    assert loop.is_symlink()


def test_a_directory_is_not_written(old):
    for path in (old.parent, f"{old.parent}/", f"{old.parent}/new/", f"{old.parent}/new/.", ""):
        with pytest.raises(
            IsADirectoryError, match="cannot save the checkpoint: Is a dir"
        ) as caught:
            save(path, {}, {})
        assert caught.value.filename == str(path)
    check_old(old)


def test_directories_that_are_none(old):
    with pytest.raises(FileNotFoundError, match=r"cannot save the checkpoint: .*absent") as caught:
        save(old.parent / "absent" / "new", {}, {})
    assert caught.value.filename == str(old.parent / "absent" / "new")
    with pytest.raises(OSError, match=r"cannot save the checkpoint: .*new") as caught:
        save(old / "new", {}, {})
    assert caught.value.errno in (errno.ENOTDIR, errno.ENOENT)
    with pytest.raises(ValueError, match=r"cannot save the checkpoint 'a\\x00b'"):
        save("a\0b", {}, {})
    check_old(old)


@POSIX
def test_pipes_and_devices_are_left_alone(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, "/dev/null"):
        with pytest.raises(ValueError, match=r"cannot save .* expected a regular file, got a dev"):
            save(path, {}, {})
        with pytest.raises(ValueError, match=r"cannot load .* expected a regular file, got a dev"):
            load(path)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_read_only_file_is_kept(old, monkeypatch):
    old.chmod(0o444)
    if os.access(old, os.W_OK):
        # Permission bits do not bind root, so the system's answer is played.
        monkeypatch.setattr(checkpoint.os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(PermissionError, match="cannot save the checkpoint: the file is read-only"):
        save(old, {}, {"step": 2})
    check_old(old)
    old.chmod(0o644)


@POSIX
def test_a_read_only_directory(old):
    old.parent.chmod(0o555)
    try:
        if os.access(old.parent, os.W_OK):
            pytest.skip("permission bits do not bind this user")
        with pytest.raises(PermissionError, match="checkpoint: Permission denied") as caught:
            save(old, {}, {"step": 2})
        assert caught.value.filename == str(old)
        check_old(old)
    finally:
        old.parent.chmod(0o755)


# Failures half-way


class Stop(BaseException):
    pass


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left"), OSError("odd"), KeyboardInterrupt(), Stop()]
)
@pytest.mark.parametrize("where", ["open", "fsync", "replace", "asarray"])
def test_a_failure_leaves_the_old_file_and_nothing_else(old, monkeypatch, where, failure, exists):
    path = old if exists else old.parent / "new"

    def fail(*args, **options):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.np if where == "asarray" else checkpoint.os, where, fail)
        with pytest.raises(type(failure)) as caught:
            save(path, {"a": np.ones(1000)}, {"step": 2})
    if isinstance(failure, OSError):
        assert caught.value.errno == failure.errno
        assert caught.value.filename == str(path)
        reason = failure.strerror or "odd"
        assert f"cannot save the checkpoint: {reason}" in str(caught.value)
    else:
        assert caught.value is failure
    check_old(old)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("size", [1, 1_000_000])
def test_a_full_disk(old, monkeypatch, size):
    plain_open = os.open
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "open", lambda *args: plain_open("/dev/full", os.O_WRONLY))
        with pytest.raises(OSError, match="cannot save the checkpoint: No space left") as caught:
            save(old, {"a": np.ones(size)}, {"step": 2})
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(old)
    check_old(old)


def run_python(program, *arguments):
    """A Python process with this one's import path, to be waited for."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@POSIX
def test_a_write_that_the_system_cuts_short(old):
    # A bound on the size of files makes the kernel itself refuse, after a part is on the disk.
    program = (
        "import resource, sys, numpy as np; from fastrnn.checkpoint import save\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: save(sys.argv[1], {'a': np.ones(100_000)}, {})\n"
        "except OSError as error: print(error.errno, error.filename)\n"
    )
    output, errors = run_python(program, old).communicate(timeout=60)
    assert (output, errors) == (f"{errno.EFBIG} {old}\n", "")
    check_old(old)


def test_the_order_of_the_steps(old, monkeypatch):
    steps = []
    plain_fsync, plain_replace = os.fsync, os.replace

    def fsync(descriptor):
        status = os.fstat(descriptor)
        kind = "directory" if stat.S_ISDIR(status.st_mode) else "file"
        steps.append((kind, kind == "file" and status.st_size > 8000))
        plain_fsync(descriptor)

    def replace(source, target):
        steps.append(("replace", os.path.dirname(source) == os.path.dirname(target)))
        plain_replace(source, target)

    monkeypatch.setattr(checkpoint.os, "fsync", fsync)
    monkeypatch.setattr(checkpoint.os, "replace", replace)
    save(old, {"a": np.ones(1000)}, {})
    assert steps[:2] == [("file", True), ("replace", True)]
    assert os.name != "posix" or steps[2:] == [("directory", False)]


@pytest.mark.parametrize("where", ["open", "fsync"])
def test_a_directory_that_cannot_be_synced_will_do(old, monkeypatch, where):
    calls = []
    plain = getattr(os, where)

    def fail_second(*args):
        calls.append(args)
        if len(calls) > 1:
            raise OSError(errno.EINVAL, "not for directories")
        return plain(*args)

    monkeypatch.setattr(checkpoint.os, where, fail_second)
    save(old, {}, {"step": 2})
    monkeypatch.undo()
    assert len(calls) == 2
    assert load(old) == ({}, {"step": 2})


@POSIX
def test_killed_savers_and_simultaneous_readers(tmp_path):
    path = tmp_path / "model.safetensors"
    program = (
        "import itertools, sys, numpy as np; from fastrnn.checkpoint import save\n"
        "for step in itertools.count(int(sys.argv[2])):\n"
        "    size = 100_000 + step % 7 * 50_000\n"
        "    save(sys.argv[1], {'a': np.full(size, step), 'b': np.full(9, step)}, {'step': step})\n"
        "    print(step, flush=True)\n"
    )
    reached = 0
    for pause in (0.0, 0.011, 0.037, 0.083):
        saver = run_python(program, path, reached + 1)
        try:
            assert saver.stdout.readline(), saver.stderr.read()
            # The reader runs against the saver: what it gets is of one save.
            end = time.monotonic() + pause
            while True:
                tensors, metadata = load(path)
                step = metadata["step"]
                assert tensors["a"].shape == (100_000 + step % 7 * 50_000,)
                assert (tensors["a"] == step).all()
                assert (tensors["b"] == step).all()
                if time.monotonic() >= end:
                    break
        finally:
            saver.kill()
            saver.communicate(timeout=60)
        tensors, metadata = load(path)
        step = metadata["step"]
        assert step > reached
        assert (tensors["a"] == step).all()
        assert tensors["a"].shape == (100_000 + step % 7 * 50_000,)
        reached = step
    leftovers = set(os.listdir(tmp_path)) - {path.name}
    assert len(leftovers) <= 4
    assert all(re.fullmatch(r"\.fastrnn-[0-9a-f]{16}\.tmp", name) for name in leftovers)


# What load refuses


def check_refused(path, message=""):
    """load raises ValueError with the file's name, and allocates next to nothing before."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as caught:
            load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert type(caught.value) is ValueError
    text = str(caught.value)
    assert text.startswith(f"cannot load the checkpoint {str(path)!r}: ")
    assert re.search(message, text)
    assert peak < 200_000 + 50 * os.path.getsize(path)


def small():
    return {"a": np.arange(3, dtype=np.float32), "b": np.array([[True], [False]])}


def test_every_truncation_is_refused(scratch):
    save(scratch, small(), {"step": 1})
    whole = scratch.read_bytes()
    for length in range(len(whole)):
        scratch.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cannot load the checkpoint .*safetensors file"):
            load(scratch)
    scratch.write_bytes(whole)
    assert load(scratch)[1] == {"step": 1}


def test_anything_appended_is_refused(scratch):
    save(scratch, small(), {"step": 1})
    with scratch.open("ab") as file:
        file.write(b"\0")
    check_refused(scratch, "damaged, cut short")


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_flipped_bytes(scratch, data):
    save(scratch, small(), {"step": 1})
    damaged = bytearray(scratch.read_bytes())
    positions = st.integers(0, len(damaged) - 1)
    for position, flip in data.draw(
        st.lists(st.tuples(positions, st.integers(1, 255)), min_size=1, max_size=3)
    ):
        damaged[position] ^= flip
    scratch.write_bytes(damaged)
    try:
        result = load(scratch)
    except ValueError:
        return
    check_well_formed(*result)


@patient
@given(st.binary(max_size=100))
@example(pickle.dumps({"a": 1}))
@example(b"PK\x03\x04" + b"\0" * 60)
@example(b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }")
@example(b"{}")
def test_any_bytes_are_refused(scratch, data):
    scratch.write_bytes(data)
    with pytest.raises(ValueError, match="cannot load the checkpoint"):
        load(scratch)


numbers = st.integers(-2, 9) | st.sampled_from([2**31, 2**32, 2**63, 2**64 - 1, 2**64, 0.5, None])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BOOL", "BF16", "F8_E4M3", "C64", "F4", "X", 3]),
        "shape": st.lists(numbers, max_size=3),
        "data_offsets": st.lists(numbers, min_size=1, max_size=3),
    },
)
headers = st.dictionaries(st.text(max_size=3), entries | json_values, max_size=3)


@settings(deadline=None, max_examples=300)
@given(headers, st.booleans(), st.binary(max_size=9))
@example({"a": entry(shape=(2, 1), offsets=(0, 8))}, True, b"\0" * 8)
def test_any_header_is_refused_or_well_formed(scratch, header, ours, data):
    write(scratch, {**header, **(OURS if ours else {})}, data)
    try:
        result = load(scratch)
    except ValueError:
        return
    assert ours
    check_well_formed(*result)


def test_the_hand_made_files_are_good_but_for_their_fault(scratch):
    tensors, metadata = load(write(scratch, {**OURS, "a": entry()}, b"\0\0\x80\x3f"))
    assert tensors["a"].tolist() == [1.0]
    assert metadata == {}


@pytest.mark.parametrize(
    "claimed", [10, 1 << 20, 99_999_999, 100_000_001, 1 << 40, 1 << 63, (1 << 64) - 1]
)
def test_a_header_longer_than_the_file(scratch, claimed):
    check_refused(write(scratch, OURS, b"", claimed), "expected a whole safetensors file")


@pytest.mark.parametrize(
    "faulty",
    [
        {"a": entry(offsets=(0, 2**40), shape=(2**38,))},
        {"a": entry(shape=(2**62, 2**62))},
        {"a": entry(shape=(2**64,))},
        {"a": entry(shape=(-1,))},
        {"a": entry(shape=(1.0,))},
        {"a": entry(shape=(2,))},
        {"a": entry(shape=(0,))},
        {"a": entry(shape=(0, 2**63), offsets=(0, 0)), "b": entry()},
        {"a": entry(shape=(1,) * 65)},
        {"a": entry(offsets=(4, 0))},
        {"a": entry(offsets=(0, -4))},
        {"a": entry(offsets=(1, 5))},
        {"a": entry(offsets=(0, 2**70))},
        {"a": entry(offsets=(0,))},
        {"a": entry(), "b": entry()},
        {"a": entry(), "b": entry(shape=(2,), offsets=(0, 8))},
        {"a": entry(dtype="F64")},
        {"a": entry(dtype="F31")},
        {"a": entry(dtype=None)},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": [1, 2]},
        {"a": None},
        {},
    ],
)
def test_hostile_headers(scratch, faulty):
    check_refused(write(scratch, {**OURS, **faulty}, b"\0" * 4))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"not json",
        b"\xff\xfe{}",
        b"[]",
        b"null",
        b'{"a":',
        b"{" * 100_000,
        b"[" * 100_000,
        b'{"a":' * 100_000 + b"0" + b"}" * 100_000,
        b'{"__metadata__":{"fastrnn":' + b"[" * 100_000,
        b'{"__metadata__":{"fastrnn":1}}',
    ],
    ids=range(11),
)
def test_headers_that_are_no_header(scratch, raw):
    check_refused(write(scratch, raw), "expected a whole safetensors file")


@pytest.mark.parametrize(
    "twice",
    [
        '{"__metadata__":M,"a":E,"a":E}',
        '{"__metadata__":M,"a":E,"\\u0061":E}',
        '{"__metadata__":M,"__metadata__":M,"a":E}',
        '{"__metadata__":{"fastrnn":"x","fastrnn":V},"a":E}',
    ],
)
def test_names_that_occur_twice(scratch, twice):
    described = json.dumps(OURS["__metadata__"]["fastrnn"])
    raw = twice.replace("M", json.dumps(OURS["__metadata__"])).replace("V", described)
    check_refused(write(scratch, raw.replace("E", json.dumps(entry())).encode(), b"\0" * 4))


@pytest.mark.parametrize(
    ("dtype", "size"), [("BF16", 2), ("F8_E4M3", 1), ("F8_E5M2", 1), ("C64", 8)]
)
def test_dtypes_that_numpy_or_we_do_not_have(scratch, dtype, size):
    header = {**OURS, "a": entry(), "w": entry(dtype, offsets=(4, 4 + size))}
    write(scratch, header, b"\0" * (4 + size))
    # Older safetensors do not know the last one and refuse the header.
    check_refused(scratch, f"tensor 'w': expected one of the dtypes bool, .*, got {dtype}|whole")


@pytest.mark.parametrize("byte", [2, 255])
def test_booleans_that_are_neither(scratch, byte):
    write(scratch, {**OURS, "a": entry("BOOL", (2,), (0, 2))}, bytes([1, byte]))
    check_refused(scratch, "tensor 'a': expected booleans of 0 or 1")


def test_a_safetensors_file_of_another_program(scratch):
    for metadata in (None, {}, {"format": "pt"}):
        save_file({"a": np.ones(3)}, scratch, metadata=metadata)
        check_refused(scratch, "a safetensors file without the metadata entry 'fastrnn'")


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ("", "expected JSON with distinct names, got something else"),
        ("{", "expected JSON with distinct names, got something else"),
        ("[" * 100_000, "expected JSON, got nesting without end"),
        (
            '{"version":1,"metadata":{"a":' + "9" * 5000 + "}}",
            "expected JSON with distinct names, got",
        ),
        ("[1]", r"expected an object with a version, got \[1\]"),
        ('{"metadata":{}}', "expected an object with a version"),
        ('{"metadata":{},"version":2}', "expected format version 1, got 2; a newer fastrnn may"),
        ('{"metadata":{},"version":true}', "expected format version 1, got True"),
        ('{"metadata":{},"version":"1"}', "expected format version 1, got '1'"),
        ('{"version":1}', "expected an object 'metadata' and a version, got"),
        ('{"metadata":[],"version":1}', "expected an object 'metadata' and a version, got"),
        ('{"metadata":{},"version":1,"more":0}', "expected an object 'metadata' and a version"),
        ('{"metadata":{},"metadata":{},"version":1}', ".*: the name 'metadata' occurs twice"),
        ('{"metadata":{"a":{"b":1,"b":1}},"version":1}', ".*: the name 'b' occurs twice"),
    ],
    ids=range(14),
)
def test_malformed_metadata(scratch, described, message):
    write(scratch, {"__metadata__": {"fastrnn": described}})
    check_refused(scratch, "the metadata entry 'fastrnn': " + message)


def test_files_that_are_not_there(tmp_path):
    path = tmp_path / "absent"
    with pytest.raises(FileNotFoundError, match="cannot load the checkpoint: No such") as caught:
        load(path)
    assert caught.value.filename == str(path)
    with pytest.raises(IsADirectoryError, match="cannot load the checkpoint: Is a dir") as caught:
        load(tmp_path)
    assert caught.value.filename == str(tmp_path)
    with pytest.raises(ValueError, match=r"cannot load the checkpoint 'a\\x00b'"):
        load("a\0b")
    path.touch()
    check_refused(path, "expected a safetensors file, got an empty file")


@POSIX
def test_a_sparse_file_does_not_count_as_data(scratch):
    write(scratch, {**OURS, "a": entry()}, b"")
    os.truncate(scratch, 1 << 40)
    tracemalloc.start()
    try:
        with pytest.raises((ValueError, OSError), match="cannot load the checkpoint"):
            load(scratch)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        os.truncate(scratch, 0)
    assert peak < 1_000_000
