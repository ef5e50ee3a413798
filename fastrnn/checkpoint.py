"""Checkpoints: arrays and JSON metadata in one safetensors file, written atomically.

The metadata is one JSON string, `{"metadata": {...}, "version": 1}`, under the key "fastrnn" of
safetensors' own `__metadata__`, so every safetensors reader can open the file. Nothing in it is
ever executed.
"""

from __future__ import annotations

import errno
import json
import os
import reprlib
import stat
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from safetensors import safe_open

__all__ = ["load", "save"]

_KEY = "fastrnn"
_VERSION = 1
# The bound that the safetensors library sets when it reads.
_MAX_HEADER = 100_000_000
_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SHORT = reprlib.Repr()
# Enough for any sane tensor's name; hostile ones may be of any length.
_SHORT.maxstring = 100
_show = _SHORT.repr
_SUPPORTED = ", ".join(dtype.name for dtype in _DTYPES.values())


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, object],
) -> None:
    """Write a checkpoint; whatever fails or kills the process, `path` holds the old or the new one.

    The bytes depend on the arguments alone. They go to a hidden temporary file beside the target,
    which is flushed to the disk and then takes the target's name; every failure removes it, and
    only a kill that Python cannot see (SIGKILL, SIGTERM by default) leaves it behind. A symbolic
    link is followed, an existing file keeps its mode and, where allowed, its owner.

    Args:
        path: the file to write; its directory must exist.
        tensors: arrays of booleans, integers or floats by name; any shape, order and byte order.
        metadata: JSON values by name: None, bool, int, float (also NaN and infinity), str, and
            lists, tuples (read back as lists) and dicts with string keys of these.

    Raises:
        ValueError: something that the format cannot hold, naming it; nothing is written.
        OSError: the file cannot be written (no permission, full disk, a directory, ...).
    """
    name = os.fsdecode(path)
    header, arrays = _lay_out(name, tensors, metadata)
    try:
        target, previous = _find_target(name)
        _replace(target, previous, header, arrays)
    except OSError as error:
        what = f"cannot save the checkpoint: {error.strerror or error}"
        raise OSError(error.errno, what, name) from error
    except ValueError as error:
        raise ValueError(f"cannot save the checkpoint {name!r}: {error}") from error


def load(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a checkpoint: its arrays, fresh and writable and sorted by name, and its metadata.

    Memory stays within a small multiple of the file's true size, whatever the file claims.

    Raises:
        OSError: the file cannot be read (FileNotFoundError, IsADirectoryError, ...).
        ValueError: the file is not a whole, well-formed checkpoint of a known version.
    """
    name = os.fsdecode(path)
    try:
        status = os.stat(name)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("expected a regular file, got a device, pipe or socket")
        if status.st_size == 0:
            raise ValueError("expected a safetensors file, got an empty file")
        return _read(name, status.st_size)
    except OSError as error:
        what = f"cannot load the checkpoint: {error.strerror or error}"
        raise OSError(error.errno, what, name) from error
    except ValueError as error:
        raise ValueError(f"cannot load the checkpoint {name!r}: {error}") from error


def _lay_out(
    path: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, object]
) -> tuple[bytes, list[np.ndarray]]:
    """The first bytes of the file, and the arrays in the order in which their data follow."""
    for argument, value in (("tensors", tensors), ("metadata", metadata)):
        if not isinstance(value, Mapping):
            raise ValueError(
                f"cannot save the checkpoint {path!r}: {argument}: expected a mapping, got"
                f" {type(value).__name__}"
            )
    try:
        for name, array in tensors.items():
            _check_tensor(name, array)
        plain = _plain_json(metadata, "metadata")
        described = json.dumps(
            {"metadata": plain, "version": _VERSION}, sort_keys=True, separators=(",", ":")
        )
        header: dict[str, object] = {"__metadata__": {_KEY: described}}
        # Wide items first keeps every array aligned in the file.
        names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
        offset = 0
        for name in names:
            array = tensors[name]
            header[name] = {
                "dtype": _NAMES[array.dtype.newbyteorder("=")],
                "shape": array.shape,
                "data_offsets": (offset, offset + array.nbytes),
            }
            offset += array.nbytes
        encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except RecursionError:
        raise ValueError(
            f"cannot save the checkpoint {path!r}: metadata: expected JSON values, got nesting"
            " without end"
        ) from None
    except ValueError as error:
        raise ValueError(f"cannot save the checkpoint {path!r}: {error}") from error
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > _MAX_HEADER:
        raise ValueError(
            f"cannot save the checkpoint {path!r}: metadata and names: expected at most"
            f" {_MAX_HEADER} bytes as JSON, got {len(encoded)}"
        )
    return struct.pack("<Q", len(encoded)) + encoded, [tensors[name] for name in names]


def _check_tensor(name: object, array: object) -> None:
    if not isinstance(name, str) or name == "__metadata__":
        raise ValueError(f"tensors: expected names other than '__metadata__', got {_show(name)}")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"tensors: expected Unicode names, got {_show(name)}") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(
            f"tensors[{_show(name)}]: expected a numpy array, got {type(array).__name__}"
        )
    # The kind comes first: some new-style dtypes have no byte order to ask for.
    if array.dtype.kind not in "biuf" or array.dtype.newbyteorder("=") not in _NAMES:
        raise ValueError(
            f"tensors[{_show(name)}]: expected one of the dtypes {_SUPPORTED}, got {array.dtype}"
        )


def _plain_json(value: object, where: str) -> object:
    """A copy of JSON-able `value` in plain types; json.dumps alone would turn keys into strings."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where}: expected string keys, got {_show(key)}")
        return {str(key): _plain_json(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_json(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{where}: expected a JSON value, got {type(value).__name__}")


def _find_target(path: str) -> tuple[str, os.stat_result | None]:
    """The file that `path` leads to through symbolic links, and its status if it exists."""
    target = os.path.realpath(path)
    try:
        previous = os.stat(target)
    except FileNotFoundError:
        previous = None
    is_directory = previous is not None and stat.S_ISDIR(previous.st_mode)
    if is_directory or os.path.basename(path) in ("", ".", ".."):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if previous is None:
        return target, None
    if not stat.S_ISREG(previous.st_mode):
        raise ValueError("expected a regular file, got a device, pipe or socket")
    # Renaming over it would need no permission, but a protected file is meant to stay.
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "the file is read-only")
    return target, previous


def _replace(
    target: str, previous: os.stat_result | None, header: bytes, arrays: Iterable[np.ndarray]
) -> None:
    directory = os.path.dirname(target)
    # A short name of its own: one derived from the target's could exceed the length limit.
    temporary = os.path.join(directory, f".fastrnn-{os.urandom(8).hex()}.tmp")
    # Nobody may read a private file's data before its mode is restored.
    mode = 0o666 if previous is None else 0o600
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            if previous is not None and hasattr(os, "fchown"):
                # Not every user may give files away, nor has every file system modes.
                with suppress(OSError):
                    os.fchown(file.fileno(), previous.st_uid, previous.st_gid)
                with suppress(OSError):
                    os.fchmod(file.fileno(), stat.S_IMODE(previous.st_mode))
            file.write(header)
            for array in arrays:
                plain = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
                file.write(plain.reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    # The rename itself is safe without this; not every system can open a directory.
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read(path: str, size: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        opened = safe_open(path, framework="np")
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"expected a whole safetensors file, got {size} bytes that are damaged, cut short or"
            f" something else: {error}"
        ) from error
    # Everything returned comes from this one open file: a save may replace the path meanwhile.
    with opened as file:
        # The library has checked the header by now, but lets the last of equal names win.
        with open(path, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            _parse_json(raw.read(min(length, _MAX_HEADER)), "the safetensors header")
        metadata = _parse_metadata(file.metadata())
        return {name: _read_tensor(file, name) for name in sorted(file.keys())}, metadata


def _read_tensor(file: Any, name: str) -> np.ndarray:
    try:
        stored = file.get_slice(name).get_dtype()
        dtype = _DTYPES.get(stored)
        array = None if dtype is None else file.get_tensor(name)
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"tensor {_show(name)}: cannot be read: {error}") from error
    if dtype is None or array is None:
        raise ValueError(
            f"tensor {_show(name)}: expected one of the dtypes {_SUPPORTED}, got {stored}"
        )
    # Any other byte than 0 and 1 is a boolean that is neither true nor false to NumPy.
    if dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
        raise ValueError(f"tensor {_show(name)}: expected booleans of 0 or 1, got another byte")
    return np.array(array, dtype, order="C")


def _parse_metadata(entries: object) -> dict[str, Any]:
    if not isinstance(entries, dict) or _KEY not in entries:
        raise ValueError(
            f"expected a checkpoint, got a safetensors file without the metadata entry {_KEY!r}:"
            " another program wrote it"
        )
    what = f"the metadata entry {_KEY!r}"
    described = _parse_json(entries[_KEY], what)
    if not isinstance(described, dict) or "version" not in described:
        raise ValueError(f"{what}: expected an object with a version, got {_show(described)}")
    version = described["version"]
    if type(version) is not int or version != _VERSION:
        raise ValueError(
            f"{what}: expected format version {_VERSION}, got {_show(version)}; a newer fastrnn may"
            " read it"
        )
    if set(described) != {"metadata", "version"} or not isinstance(described["metadata"], dict):
        raise ValueError(
            f"{what}: expected an object 'metadata' and a version, got {_show(described)}"
        )
    return described["metadata"]


def _parse_json(text: str | bytes, what: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"{what}: expected JSON, got nesting without end") from None
    except ValueError as error:
        raise ValueError(
            f"{what}: expected JSON with distinct names, got something else: {error}"
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {_show(twice)} occurs twice")
    return found
