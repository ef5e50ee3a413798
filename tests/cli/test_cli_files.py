"""Files that are damaged or hostile."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from commands import (
    FOX,
    TINY,
    check_refused,
    files,
)
from safetensors.numpy import save_file

from fastrnn import checkpoint
from fastrnn.cli import main


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Arrays and description of a saved run of the command."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "fox.txt").write_text(FOX)
    line = ["train", str(folder / "fox.txt"), *TINY, "--steps", "3", "--quiet"]
    with pytest.raises(SystemExit):
        main([*line, "--out", str(folder / "m")])
    return checkpoint.load(folder / "m")


def spoil(good, *path, value):
    """The saved run with another value somewhere in its description."""
    tensors, description = good
    description = json.loads(json.dumps(description))
    inner = description
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    checkpoint.save("bad", tensors, description)


def check_all_refuse(cli, *fragments, commands=("sample", "score", "resume")):
    before = files()
    lines = {
        "sample": ("sample", "bad"),
        "score": ("score", "bad", "the fox"),
        "resume": ("train", "--resume", "bad", "--steps", 9),
    }
    for name in commands:
        check_refused(cli(*lines[name]), *fragments)
    assert files() == before


def test_a_file_that_is_no_model_is_refused_by_name(good, cli):
    check_all_refuse(cli, "bad: cannot load the checkpoint: No such file")
    Path("bad").mkdir()
    check_all_refuse(cli, "bad: cannot load the checkpoint: Is a directory")
    Path("bad").rmdir()
    tensors, description = good
    checkpoint.save("bad", tensors, description)
    content = Path("bad").read_bytes()
    for junk in (
        b"",
        b"x",
        b"\0" * 1000,
        random.Random(0).randbytes(1000),
        FOX.encode(),
        content[:7],
        content[:1000],
        content[:-1],
        content + b"x",
        b"\xff" * 8 + content[8:],
    ):
        Path("bad").write_bytes(junk)
        check_all_refuse(cli, "cannot load the checkpoint 'bad'")
    save_file({"a": np.zeros(3)}, "bad")
    check_all_refuse(cli, "cannot load the checkpoint 'bad'", "another program wrote it")
    checkpoint.save("bad", tensors, {"kind": "a cake"})
    check_all_refuse(cli, "bad: expected a fastrnn language model, got kind 'a cake'")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model",), None),
        (("model",), "lstm"),
        (("model", "hidden_size"), 10**9),
        (("model", "vocab_size"), 10**18),
        (("model", "embedding_size"), 10**12),
        (("model", "num_layers"), 10**9),
        (("model", "cell"), "gru"),
        (("model", "dtype"), "f4,(2"),
        (("vocabulary",), None),
        (("vocabulary",), []),
        (("vocabulary", "level"), "byte"),
        (("vocabulary", "level"), "bit"),
        (("vocabulary", "tokens"), None),
        (("vocabulary", "tokens"), ["<unk>", "<eos>"]),
        (("vocabulary", "tokens"), ["<unk>", "<eos>", "a", "a"]),
        (("vocabulary", "tokens"), [1] * 31),
        (("vocabulary", "more"), 1),
    ],
    ids=str,
)
def test_a_hostile_model_is_refused(path, value, good, cli):
    spoil(good, *path, value=value)
    check_all_refuse(cli, "bad: ", "expected")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("run",), None),
        (("run",), []),
        (("run", "settings"), None),
        (("run", "settings"), 5),
        (("run", "settings", "batch"), 0),
        (("run", "settings", "batch"), "2"),
        (("run", "settings", "lr"), 10**400),
        (("run", "settings", "lr"), [1]),
        (("run", "settings", "optimizer"), "magic"),
        (("run", "settings", "steps"), 2.5),
        (("corpus",), None),
        (("corpus",), "fox.txt"),
        (("corpus", "path"), 0),
        (("corpus", "path"), ["fox.txt"]),
        (("corpus", "sha256"), None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_hostile_run_is_not_resumed(path, value, good, cli):
    spoil(good, *path, value=value)
    check_all_refuse(cli, "bad: ", "expected", commands=["resume"])
    # The model itself is well.
    assert cli("score", "bad", "the fox").code == 0


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("run", "step"), -1),
        (("run", "step"), "3"),
        (("run", "seconds"), 10**400),
        (("run", "losses"), 5),
        (("run", "val_loss"), None),
        (("run", "settings", "batch"), 3),
        (("run", "settings", "optimizer"), "sgd"),
        (("run", "settings", "val_fraction"), 0.001),
        (("corpus", "sha256"), "0" * 64),
        (("corpus", "sha256"), 5),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_run_that_contradicts_itself_is_not_resumed(path, value, good, cli):
    spoil(good, *path, value=value)
    check_all_refuse(cli, "expected", commands=["resume"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(value, good, cli):
    tensors, description = good
    weights = tensors["model.head.bias"].copy()
    weights[3] = value
    checkpoint.save("bad", tensors | {"model.head.bias": weights}, description)
    check_all_refuse(cli, "model: expected finite logits", commands=["sample", "score"])
